"""What the report reads of a run: its ledger once, and the rows of a sample of its parts without
their texts.

At most MAX_PARTS parts, spread evenly over the run, and only columns of numbers and short strings.
A row remembers its place, so that the texts of the few documents that are shown can be read later,
from their row groups alone.
"""

import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.run.results import all_commits, corpus_phase, store_of
from pipeline.run.state import read_state
from stages.storage.ledger import Commit, Store
from stages.storage.parts import read_columns, score_names

MAX_PARTS = 64
MAX_ROWS = 1_000_000  # of sampled parts together: about 300 bytes each in memory


@dataclass(frozen=True)
class Ledger:
    """A run's state and commit records, read once."""

    root: str
    state: dict[str, Any]
    commits: dict[str, list[Commit]]

    def store(self, phase: str) -> Store:
        return store_of(self.root, self.state, phase)

    def setting(self, key: str, default: Any = None) -> Any:
        """A value of the configuration of the run; "off" is None."""
        entry = self.state.get("config", {}).get(key)
        if entry is None:
            return default
        value = tomllib.loads(f"v = {entry['value']}")["v"]
        return None if value == "off" else value

    def bound(self, rule: str) -> tuple[float, float] | None:
        value = self.setting(rule)
        return (
            (float(value[0]), float(value[1]))
            if isinstance(value, list) and len(value) == 2
            else None
        )

    def bounds_by_language(self, rule: str) -> dict[str, tuple[float, float] | None]:
        """The bounds of a rule for languages that have their own."""
        keys = [
            key
            for key in self.state.get("config", {})
            if key.startswith("per_language.") and key.endswith(f".{rule}")
        ]
        return {key.split(".")[1]: self.bound(key) for key in keys}

    @cached_property
    def corpus_phase(self) -> str:
        """The phase that wrote the corpus."""
        return corpus_phase(self.root, self.state)

    @cached_property
    def outputs(self) -> dict[str, set[str]]:
        """Paths of what the units of each phase wrote."""
        return {
            phase: {o["path"] for c in commits for o in c.outputs}
            for phase, commits in self.commits.items()
        }


@dataclass(frozen=True)
class Sample:
    """Rows of the sampled parts without their texts; `place` finds a document's part and row again.

    `documents` has a column `fate`: the rule that dropped a document in whatever stage, null for
    what is kept so far.
    """

    units: list[str]
    of: int
    documents: pa.Table
    corpus: pa.Table
    rejected: pa.Table


def read_ledger(root: str) -> Ledger:
    """State and commits of a run under the keys that it used last.

    FileNotFoundError with advice if it is none.
    """
    state = read_state(root)
    return Ledger(root, state, all_commits(root, state))


_DOCUMENT_COLUMNS = [
    *(
        "doc_id",
        "host",
        "crawl_date",
        "charset_source",
        "opt_out",
        "language",
        "language_score",
        "num_chars",
    ),
    *("rejected_by", "rejected_value", "rejected_low", "rejected_high"),
]


def read_sample(ledger: Ledger) -> Sample:
    extracted = ledger.commits["extract"]
    chosen = spread(
        extracted, rows=lambda c: sum(n for r, n in c.counts.items() if r != "warc.not_response")
    )
    units = [c.unit for c in chosen]
    documents = [_documents_of(ledger, unit) for unit in units]
    refined = {
        kind: [_refined_of(ledger, kind, unit) for unit in units] for kind in ("corpus", "rejected")
    }
    return Sample(
        units,
        len(extracted),
        joined(documents, pa.schema([("doc_id", pa.uint64()), ("fate", pa.string())])),
        joined(
            [t for t in refined["corpus"] if t is not None], pa.schema([("doc_id", pa.uint64())])
        ),
        joined(
            [t for t in refined["rejected"] if t is not None], pa.schema([("doc_id", pa.uint64())])
        ),
    )


def spread(commits: Sequence[Commit], *, rows: Callable[[Commit], int]) -> list[Commit]:
    """Commits spread evenly over a run: at most MAX_PARTS of about MAX_ROWS rows together; the same
    ones every time.
    """
    if not commits:
        return []
    mean = max(1.0, sum(rows(c) for c in commits) / len(commits))
    count = max(1, min(len(commits), MAX_PARTS, int(MAX_ROWS / mean)))
    return [commits[i * len(commits) // count] for i in range(count)]


def joined(tables: Sequence[pa.Table], empty: pa.Schema) -> pa.Table:
    return pa.concat_tables(tables, promote_options="default") if tables else empty.empty_table()


def part_uri(ledger: Ledger, phase: str, kind: str, unit: str) -> str | None:
    """Where a committed part lies, None if there is none."""
    path = f"{kind}/{unit}.parquet"
    return ledger.store(phase).uri(path) if path in ledger.outputs[phase] else None


def _documents_of(ledger: Ledger, unit: str) -> pa.Table:
    uri = ledger.store("extract").uri("documents", f"{unit}.parquet")
    table = read_columns(uri, [*_DOCUMENT_COLUMNS, *score_names(uri)])
    table = _placed(table, uri)
    months = pc.strftime(table["crawl_date"], format="%Y-%m")
    fates = pa.array(_fates(ledger, unit, table), pa.string())
    return table.append_column("crawl_month", months).append_column("fate", fates)


def _refined_of(ledger: Ledger, kind: str, unit: str) -> pa.Table | None:
    uri = part_uri(ledger, ledger.corpus_phase if kind == "corpus" else "refine", kind, unit)
    if uri is None:
        return None
    wanted = [
        "doc_id",
        "num_chars",
        "rejected_by",
        "rejected_value",
        "rejected_low",
        "rejected_high",
    ]
    table = read_columns(uri, [*wanted, *score_names(uri)])
    return _placed(table, uri)


def _placed(table: pa.Table, uri: str) -> pa.Table:
    """The table with each row's place, so that its text can be had later."""
    rows = pa.array(np.arange(table.num_rows, dtype=np.int32))
    part = pa.DictionaryArray.from_arrays(
        pa.array(np.zeros(table.num_rows, np.int32)), pa.array([uri])
    )
    return table.append_column("_row", rows).append_column(
        "_part", part.cast(pa.dictionary(pa.int32(), pa.string()))
    )


def _fates(ledger: Ledger, unit: str, table: pa.Table) -> list[str | None]:
    """The rule that dropped each document of a part in any stage that has come to it, None for what
    is kept so far.
    """
    fates: list[str | None] = table["rejected_by"].to_pylist()
    kept = [i for i, rule in enumerate(fates) if rule is None]
    keep_uri = part_uri(ledger, "dedup keep", "keep", unit)
    if keep_uri is not None:
        keep = read_columns(keep_uri, ["doc_id", "rule"])
        if keep["doc_id"].equals(
            table["doc_id"].take(pa.array(kept, pa.int64()))
        ):  # else: of an older part
            for i, rule in zip(kept, keep["rule"].to_pylist(), strict=True):
                fates[i] = rule
    rejected_uri = part_uri(ledger, "refine", "rejected", unit)
    if rejected_uri is not None:
        rejected = read_columns(rejected_uri, ["doc_id", "rejected_by"])
        rules = dict(
            zip(rejected["doc_id"].to_pylist(), rejected["rejected_by"].to_pylist(), strict=True)
        )
        for i, doc_id in enumerate(table["doc_id"].to_pylist()):
            fates[i] = rules.get(doc_id, fates[i])
    return fates


def by_draw(table: pa.Table) -> list[int]:
    """Indices of a table's rows in an order that looks random and is the same every time."""
    mixed = table["doc_id"].to_numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    order: list[int] = np.argsort(mixed ^ (mixed >> np.uint64(32)), kind="stable").tolist()
    return order
