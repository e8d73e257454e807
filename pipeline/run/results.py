"""The stores, commits and rows that a run wrote under the keys that it used last."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline.run import query
from pipeline.run.dedup_plan import heavy_losses
from pipeline.run.funnel import FunnelRow, funnel
from pipeline.run.phases import PHASES, SPECS
from pipeline.run.state import RunState, read_state
from stages.dedup.keep import KEEP
from stages.formats.document import corpus_schema, document_schema
from stages.storage.ledger import Commit, Commits, Store
from stages.storage.parts import schema_of

if TYPE_CHECKING:
    import duckdb


def store_of(root: str, state: RunState, phase: str) -> Store:
    """The store of a phase under the keys that the run used last."""
    return SPECS[phase].store(root, state.keys)


def corpus_phase(root: str, state: RunState) -> str:
    """The phase that wrote the corpus: entity recognition, if the run has it, else refine."""
    return "refine ner" if store_of(root, state, "refine ner").listed_units() else "refine"


def all_commits(root: str, state: RunState) -> dict[str, Commits]:
    """Commits of every phase under the keys that the run used last."""
    return {spec.name: store_of(root, state, spec.name).listed_commits() for spec in PHASES}


def run_funnel(root: str) -> list[FunnelRow]:
    """The funnel of a run so far."""
    return funnel(all_commits(root, read_state(root)))


def alarm(root: str) -> str | None:
    """A sentence on who lost nearly everything to dedup, None if nobody did."""
    state = read_state(root)
    losses = heavy_losses(store_of(root, state, "dedup alarm").listed_commits())
    if not losses:
        return None
    kinds = Counter(loss.kind for loss in losses)
    counted = ", ".join(f"{count:,} {kind}{'s' * (count > 1)}" for kind, count in kinds.items())
    share = state.setting("dedup.alarm_share")
    return (
        f"dedup dropped over {share:.0%} of the documents of {counted}; "
        "see Duplicates in the report"
    )


# --- rows -----------------------------------------------------------------------------------------

# of both stages; export writes them without `stage`
REJECTED = """
    SELECT 'extract' AS stage, * EXCLUDE (band_keys, content_hash)
    FROM documents WHERE rejected_by IS NOT NULL
    UNION ALL BY NAME SELECT 'refine' AS stage, * FROM rejected_by_refine"""
_COMMITS = pa.schema(
    [
        *((name, pa.string()) for name in ("phase", "unit")),
        *((name, pa.int64()) for name in ("rows_in", "rows_out", "bytes_out")),
        ("counts", pa.map_(pa.string(), pa.int64())),
        ("totals", pa.map_(pa.string(), pa.float64())),
        *((name, pa.float64()) for name in ("seconds", "cpu_seconds")),
        ("finished", pa.timestamp("us", tz="UTC")),
    ]
)


@contextmanager
def open_results(root: str) -> Iterator["duckdb.DuckDBPyConnection"]:
    """A DuckDB connection (see pipeline.run.query) over what a run has written so far.

    Views: documents, keep, corpus, rejected (of extract and refine), commits. A stage that has not
    run is an empty view. FileNotFoundError with advice if there is no run.
    """
    state = read_state(root)
    commits = all_commits(root, state)
    parts = result_parts(root, state, commits)
    with query.connect(
        parts,
        result_schemas(parts),
        tables={"commits": commits_table(commits)},
        views={"rejected": REJECTED},
    ) as connection:
        yield connection


def result_parts(
    root: str, state: RunState, commits: Mapping[str, Commits]
) -> dict[str, list[str]]:
    """URIs of the parts of each kind of row that the given commits list, in order of units."""
    phases = {
        "documents": "extract",
        "keep": "dedup keep",
        "corpus": corpus_phase(root, state),
        "rejected_by_refine": "refine",
    }
    parts = {}
    for name, phase in phases.items():
        store, kind = store_of(root, state, phase), name.partition("_")[0]
        outputs = (o for w in commits[phase].written() for o in w.outputs)
        parts[name] = [store.uri(o.path) for o in outputs if o.kind == kind]
    return parts


def result_schemas(parts: Mapping[str, Sequence[str]]) -> dict[str, pa.Schema]:
    """Schemas of kinds of row that may have no part yet; without scores while nothing has any."""
    extracted = parts["documents"]
    documents = schema_of(extracted[0]) if extracted else document_schema([], keys="")
    corpus = corpus_schema(documents, [], [])
    return {"documents": documents, "keep": KEEP, "corpus": corpus, "rejected_by_refine": corpus}


def commits_table(commits: Mapping[str, Sequence[Commit]]) -> pa.Table:
    """One row per commit, in order of phases and units."""
    rows = [
        vars(commit)
        | {
            "phase": phase,
            "bytes_out": sum(o.bytes for o in commit.outputs),
            "totals": _totals(commit.result),
            "finished": round(commit.finished * 1e6) if commit.finished else None,
        }
        for phase, listed in commits.items()
        for commit in listed
    ]
    return pa.Table.from_pylist(rows, schema=_COMMITS)


def _totals(result: Any) -> dict[str, float]:
    """The numbers of a phase's result, by name."""
    fields = dataclasses.asdict(result) if result is not None else {}
    return {name: float(value) for name, value in fields.items() if isinstance(value, int | float)}
