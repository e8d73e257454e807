"""Questions about a finished or running run: how far it is, and its documents as plain files."""

import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import dedup_plan
from pipeline.progress import FunnelRow, funnel
from pipeline.run import read_state, store_uri
from stages.ledger import Commit, Store, open_fs
from stages.parts import read_columns

PHASES = ("extract", *dedup_plan.LISTINGS, "refine", "refine names", "pack")
KINDS = {"documents": "extract", "keep": "dedup keep", "rejected": "refine"}


def store_of(root: str, state: dict[str, Any], phase: str) -> Store:
    """The store of a phase under the keys that the run used last."""
    return Store(store_uri(root, state["keys"], phase))


def corpus_phase(root: str, state: dict[str, Any]) -> str:
    """The phase that wrote the corpus: the one that scrubs names, if the run has it."""
    return "refine names" if store_of(root, state, "refine names").listed_units() else "refine"


def all_commits(root: str, state: dict[str, Any]) -> dict[str, list[Commit]]:
    """Commits of every phase under the keys that the run used last."""
    return {phase: store_of(root, state, phase).listed_commits() for phase in PHASES}


def run_funnel(root: str) -> list[FunnelRow]:
    """The funnel of a run as far as it has come."""
    commits = all_commits(root, read_state(root))
    return funnel(commits["extract"], commits["dedup keep"], commits["refine"], commits["pack"])


def alarm(root: str) -> str | None:
    """A sentence on who lost nearly everything to dedup, None if nobody did; the report names them."""
    state = read_state(root)
    wiped = list(dedup_plan.wiped(store_of(root, state, "dedup alarm").listed_commits()))
    if not wiped:
        return None
    kinds = Counter(w["kind"] for w in wiped)
    counted = ", ".join(f"{count:,} {kind}{'s' * (count > 1)}" for kind, count in kinds.items())
    share = float(state["config"]["dedup.alarm_share"]["value"])
    return f"dedup dropped over {share:.0%} of the documents of {counted}; see Duplicates in the report"


def status(root: str) -> dict[str, Any]:
    """Units done, failed and left per phase, with rates over the phase and the time left, from the ledger alone."""
    state = read_state(root)
    phases = {phase: _phase_status(store_of(root, state, phase), since=state["history"][-1]["started"]) for phase in PHASES}
    return {
        "run": root,
        "stage": state.get("stage"),
        "process": state.get("pid"),
        "generation": state.get("generation"),
        "phases": phases,
    }


def _phase_status(store: Store, *, since: float) -> dict[str, Any]:
    units, commits = store.listed_units(), store.listed_commits()
    failures = {name: record for name, record in store.failures().items() if name in units}
    rows = sum(c.rows_in for c in commits)
    ends = [c.extra["finished"] for c in commits]
    # the rate of the run under way: what an earlier one did, and the pause between, say nothing of it
    fresh = [c for c in commits if c.extra["finished"] >= since] or commits
    elapsed = max(ends) - min(c.extra["finished"] - c.seconds for c in fresh) if ends else 0.0
    left = len(units) - len({c.unit for c in commits} | failures.keys())
    return {
        "done": len(commits),
        "failed": len(failures),
        "left": left,
        "rows_in": rows,
        "rows_out": sum(c.rows_out for c in commits),
        "rows_per_second": round(sum(c.rows_in for c in fresh) / elapsed, 1) if elapsed else None,
        "eta_seconds": round(elapsed / len(fresh) * left) if fresh and left else None,
        "last_commit_age_seconds": round(time.time() - max(ends)) if ends else None,
        "errors": {name: record["error"] for name, record in failures.items()},
    }


# --- export ----------------------------------------------------------------------------------------------------------


def tables(root: str, kind: str) -> Iterator[pa.Table]:
    """The parts of 'documents', 'keep', 'corpus' or 'rejected' (of both stages), in order of units."""
    state = read_state(root)
    if kind == "rejected":
        for table in tables(root, "documents"):
            yield table.filter(pc.is_valid(table["rejected_by"])).drop_columns(["band_keys", "content_hash"])
    store = store_of(root, state, corpus_phase(root, state) if kind == "corpus" else KINDS[kind])
    for commit in store.listed_commits():
        for output in commit.outputs:
            if output["path"].startswith(f"{kind}/"):
                yield read_columns(store.uri(output["path"]), None)


def export(root: str, kind: str, *, format: str, output: str) -> int:
    """Write the rows of a kind to one file; returns their number. Columns of parts are united, absent ones null."""
    schema = pa.unify_schemas([t.schema for t in tables(root, kind)] or [pa.schema([])])
    fs, path = open_fs(output)
    if "/" in path:
        fs.makedirs(path.rpartition("/")[0], exist_ok=True)
    count = 0
    with fs.open(path, "wb") as stream:
        if format == "parquet":
            with pq.ParquetWriter(stream, schema, compression="zstd") as writer:
                for table in tables(root, kind):
                    writer.write_table(_align(table, schema))
                    count += table.num_rows
            return count
        for table in tables(root, kind):
            for batch in table.to_batches(max_chunksize=1024):
                for row in batch.to_pylist():
                    stream.write(to_json(row).encode() + b"\n")
                    count += 1
    return count


def _align(table: pa.Table, schema: pa.Schema) -> pa.Table:
    columns = [table[f.name] if f.name in table.column_names else pa.nulls(table.num_rows, f.type) for f in schema]
    return pa.table(columns, schema=schema)


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Strict JSON: open bounds and NaN, which JSON has no word for, become null; bytes hex; dates ISO 8601."""
    return json.dumps(_plain(value), ensure_ascii=False, indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, bytes):
        return value.hex()
    return value if isinstance(value, str | int | float | None) else str(value)
