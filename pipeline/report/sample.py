"""What report, why and export read of a run: commit records, and rows of a sample of its parts.

At most MAX_PARTS parts, spread evenly over the run. Texts stay in the parts; those of the few
documents that are shown are read later, from their row groups alone.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePath
from typing import Any

import numpy as np
import pyarrow as pa

from filters import Bound
from pipeline.report.charts import Floats
from pipeline.run import query
from pipeline.run.results import (
    all_commits,
    corpus_phase,
    result_parts,
    result_schemas,
    store_of,
)
from pipeline.run.state import RunState, read_state
from stages.storage.files import exists
from stages.storage.ledger import Commit, Commits, Store
from stages.storage.parts import documents, schema_of, unit_of

Row = dict[str, Any]
MAX_PARTS = 64
MAX_ROWS = 1_000_000  # of all sampled parts: about 300 bytes each in memory


@dataclass(frozen=True)
class Ledger:
    """A run's state and commit records, read once."""

    root: str
    state: RunState
    commits: dict[str, Commits]

    def store(self, phase: str) -> Store:
        return store_of(self.root, self.state, phase)

    def setting(self, key: str, default: Any = None) -> Any:
        """A value of the configuration of the run; "off" is None."""
        return self.state.setting(key, default)

    def bound(self, rule: str) -> Bound:
        limits = self.setting(rule)
        return limits and (float(limits[0]), float(limits[1]))

    def bounds_by_language(self, rule: str) -> dict[str, Bound]:
        """The bounds of a rule for languages that have their own."""
        return {
            key.split(".")[1]: self.bound(key)
            for key in self.state.config
            if key.startswith("per_language.") and key.endswith(f".{rule}")
        }

    @cached_property
    def corpus_phase(self) -> str:
        """The phase that wrote the corpus."""
        return corpus_phase(self.root, self.state)

    @cached_property
    def outputs(self) -> dict[str, set[str]]:
        """Paths of what the units of each phase wrote."""
        return {
            phase: {o.path for w in commits.written() for o in w.outputs}
            for phase, commits in self.commits.items()
        }

    @cached_property
    def parts(self) -> dict[str, list[str]]:
        """URIs of all parts of each kind of row."""
        return result_parts(self.root, self.state, self.commits)

    def row(self, phase: str, kind: str, doc_id: int, *columns: str) -> Row | None:
        """A row of a committed part, None where there is none. Without `columns`, all of them."""
        path = f"{kind}/{unit_of(doc_id)}.parquet"
        if path not in self.outputs[phase]:
            return None
        return _row_of_part(self.store(phase).uri(path), doc_id, columns)

    def document(self, doc_id: int, kept_in: int | None, *columns: str) -> Row | None:
        """A document of this run, or of the earlier batch with the number `kept_in`."""
        if kept_in is None:
            return self.row("extract", "documents", doc_id, *columns)
        return earlier_row(self.state.indexes[kept_in].documents, "documents", doc_id, *columns)


def summed(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    """The sums of counts by name."""
    total: Counter[str] = Counter()
    for some in counts:
        total.update(some)
    return total


def earlier_row(store: str, kind: str, doc_id: int, *columns: str) -> Row | None:
    """A row that an earlier batch wrote to a store; None if it has been removed since."""
    uri = Store(store).uri(kind, f"{unit_of(doc_id)}.parquet")
    return _row_of_part(uri, doc_id, columns) if exists(uri) else None


def _row_of_part(uri: str, doc_id: int, columns: Sequence[str]) -> Row | None:
    columns = columns or [name for name in schema_of(uri).names if name != "doc_id"]
    return documents(uri, [doc_id], columns).get(doc_id)


def read_ledger(root: str) -> Ledger:
    """State and commits of a run under the keys that it used last.

    FileNotFoundError with advice if `root` is not a run.
    """
    state = read_state(root)
    return Ledger(root, state, all_commits(root, state))


@dataclass(frozen=True)
class Sample:
    """Rows of the sampled parts in DuckDB, without texts.

    Table `pages`: rows of extract, with `fate`, the rule that dropped a page in any stage, null for
    what is kept so far. Table `refined`: rows of refine, kept and rejected. Views: `keep`, and
    `spans` of pack. Macro draw(doc_id): a random order of rows, the same every time.
    """

    connection: Any
    parts: int
    of: int

    def table(self, sql: str, **parameters: Any) -> pa.Table:
        return query.table(self.connection, sql, parameters or None)

    def rows(self, sql: str, **parameters: Any) -> list[Row]:
        rows: list[Row] = self.table(sql, **parameters).to_pylist()
        return rows

    def values(self, sql: str) -> Floats:
        """The only column of a query, as floats."""
        values: Floats = self.table(sql)[0].to_numpy().astype(np.float64)
        return values

    def count(self, table: str) -> int:
        return int(self.rows(f"SELECT count(*) AS n FROM {table}")[0]["n"])

    def scores(self, table: str) -> list[str]:
        """Names of the scores in a table."""
        schema = self.table(f"SELECT * FROM {table} LIMIT 0").schema
        return [f.name for f in schema if "." in f.name and not pa.types.is_string(f.type)]


@contextmanager
def open_sample(ledger: Ledger) -> Iterator[Sample]:
    """Read the sampled parts: all columns of numbers, and short strings."""
    extracted = spread(ledger.commits["extract"], rows=_pages_of)
    units = {commit.unit for commit in extracted}
    parts = {
        kind: [uri for uri in uris if PurePath(uri).stem in units]
        for kind, uris in ledger.parts.items()
    }
    packed = spread(ledger.commits["pack"], rows=lambda commit: commit.rows_in)
    parts["spans"] = [
        ledger.store("pack").uri(output.path)
        for commit in packed
        for output in commit.outputs
        if output.kind == "provenance"
    ]
    spans = pa.schema([("doc_id", pa.uint64()), ("length", pa.int64())])
    schemas = result_schemas(parts) | {"spans": spans}
    views = {"refine_rows": "FROM corpus UNION ALL BY NAME FROM rejected_by_refine"}
    with query.connect(parts, schemas, views=views) as connection:
        sample = Sample(connection, len(extracted), len(ledger.commits["extract"]))
        pages = _columns(sample, "documents", _PAGE_COLUMNS)
        refined = _columns(sample, "refine_rows", _REFINED_COLUMNS)
        for statement in (
            _DRAW,
            _PAGES.format(columns=pages),
            f"CREATE TABLE refined AS SELECT {refined} FROM refine_rows",
        ):
            connection.execute(statement).fetchall()
        yield sample


_VERDICT = ("rejected_by", "rejected_value", "rejected_low", "rejected_high")
_REFINED_COLUMNS = ("doc_id", "num_chars", *_VERDICT)
_PAGE_COLUMNS = (
    *("host", "crawl_date", "charset_source", "opt_out", "language", "language_score"),
    *("license", "extract_confidence"),
    *_REFINED_COLUMNS,
)
# multiply and fold, modulo 2^64
_DRAW = """
CREATE MACRO draw(id) AS (
    WITH mixed AS (SELECT (id::HUGEINT * 11400714819323198485 % 18446744073709551616)::UBIGINT AS m)
    SELECT xor(m, m >> 32) FROM mixed)"""
# keep rows of an earlier version of a part, whose ids are others, do not count
_PAGES = """
CREATE TABLE pages AS
WITH current AS (
    SELECT doc_id >> 32 AS unit, count(*), bit_xor(hash(doc_id))
    FROM documents WHERE rejected_by IS NULL GROUP BY unit
    INTERSECT SELECT doc_id >> 32 AS unit, count(*), bit_xor(hash(doc_id)) FROM keep GROUP BY unit)
SELECT {columns}, strftime(crawl_date, '%Y-%m') AS crawl_month,
    coalesce(refine_rule, rejected_by, dedup_rule) AS fate
FROM documents
LEFT JOIN (SELECT doc_id, rejected_by AS refine_rule FROM rejected_by_refine) USING (doc_id)
LEFT JOIN (
    SELECT doc_id, rule AS dedup_rule FROM keep WHERE doc_id >> 32 IN (SELECT unit FROM current)
) USING (doc_id)"""


def _pages_of(commit: Commit) -> int:
    return sum(n for rule, n in commit.counts.items() if rule != "warc.not_response")


def _columns(sample: Sample, table: str, names: Sequence[str]) -> str:
    """Columns and scores of a table as SQL; null for what parts of an earlier version lack."""
    known = {*sample.table(f"SELECT * FROM {table} LIMIT 0").schema.names}
    quoted = {name: query.quoted(name, '"') for name in [*names, *sample.scores(table)]}
    return ", ".join(q if name in known else f"NULL AS {q}" for name, q in quoted.items())


def spread(commits: Sequence[Commit], *, rows: Callable[[Commit], int]) -> list[Commit]:
    """At most MAX_PARTS commits spread evenly over a run, with about MAX_ROWS rows in total.

    Deterministic.
    """
    if not commits:
        return []
    mean = max(1.0, sum(rows(c) for c in commits) / len(commits))
    count = max(1, min(len(commits), MAX_PARTS, int(MAX_ROWS / mean)))
    chosen = {i * len(commits) // count for i in range(count)}
    return [commit for i, commit in enumerate(commits) if i in chosen]
