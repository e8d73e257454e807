"""The document row that every stage shares: its Arrow schema, its identity, and how policy is
written into it.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import xxhash

from filters import notes, rules, settings

# Band keys are one binary value of 8 bytes a band (little-endian): a document of 14 bands costs 112
# bytes.
IDENTITY = [
    pa.field("doc_id", pa.uint64(), nullable=False),
    pa.field("url", pa.string()),
    pa.field("host", pa.string()),
    pa.field("source_id", pa.string()),
    pa.field("crawl_date", pa.timestamp("s", tz="UTC")),
    pa.field("warc_file", pa.string()),
    pa.field("warc_offset", pa.int64()),
]
EXTRACTED = [
    pa.field("charset", pa.string()),
    pa.field("charset_source", pa.string()),
    pa.field("opt_out", pa.string()),
    pa.field("language", pa.string()),
    pa.field("language_score", pa.float64()),
    pa.field("language_line_share", pa.float64()),
    pa.field("num_chars", pa.int64()),
    pa.field("content_hash", pa.binary(16)),
    pa.field("band_keys", pa.binary()),
]
VERDICT = [
    pa.field("rejected_by", pa.string()),
    pa.field("rejected_value", pa.float64()),
    pa.field("rejected_low", pa.float64()),
    pa.field("rejected_high", pa.float64()),
    pa.field("text", pa.large_string()),
]
REFINED = [
    pa.field("cluster_id", pa.uint64()),
    pa.field("cluster_size", pa.int64()),
    pa.field(
        "pii_spans",
        pa.list_(pa.struct({"entity": pa.string(), "start": pa.int32(), "end": pa.int32()})),
    ),
]

POSITION_BITS = 32


def make_doc_id(ordinal: int, position: int) -> int:
    """Identity of the record at `position` of input number `ordinal` of the run; both below 2^32
    (2^31 for signed readers).

    It depends on nothing but the run's append-only input list, so a retried task makes the same ids
    and a later batch never collides with an earlier one.
    """
    if not 0 <= position < 1 << POSITION_BITS or not 0 <= ordinal < 1 << (63 - POSITION_BITS):
        raise ValueError(f"doc_id out of range: input {ordinal}, record {position}")
    return ordinal << POSITION_BITS | position


def ordinal_of(doc_id: int) -> int:
    """The input number that a doc_id belongs to."""
    return doc_id >> POSITION_BITS


class NamedFilter(NamedTuple):
    """A filter with the name its scores are stored under, and what takes its place for documents of
    some languages.
    """

    name: str
    filter: Any
    by_language: tuple[tuple[str, Any], ...] = ()

    def of(self, language: str | None) -> Any:
        """The filter for documents of a language."""
        return next((filter for name, filter in self.by_language if name == language), self.filter)

    def all(self) -> list[tuple[str, Any]]:
        """Every variant with its language; the one for all other languages first, under ""."""
        return [("", self.filter), *self.by_language]

    def settings(self, *, without: Collection[str] = ()) -> list[tuple[str, dict[str, Any]]]:
        """What decides the scores, by language; a variant that differs in its bounds alone measures
        as its base does.
        """
        base, *variants = [
            (
                language,
                {key: value for key, value in settings(filter).items() if key not in without},
            )
            for language, filter in self.all()
        ]
        return [base, *(variant for variant in variants if variant[1] != base[1])]


def measured_columns(name: str, measured: Mapping[str, Any]) -> dict[str, Any]:
    """What a filter measured, under the names of its columns."""
    return {
        f"{name}.{key}": value if value is None or isinstance(value, str) else float(value)
        for key, value in measured.items()
    }


def score_columns(filters: Sequence[NamedFilter]) -> list[str]:
    """Names of the score columns, in the order in which rules are checked: '<filter>.<rule>'."""
    return [f"{named.name}.{rule}" for named in filters for rule in rules(named.filter)]


def measured_fields(filters: Sequence[NamedFilter]) -> list[pa.Field]:
    """Columns of scores, then of notes, filter by filter."""
    columns = []
    for named in filters:
        columns += [pa.field(name, pa.float64()) for name in score_columns([named])]
        columns += [pa.field(f"{named.name}.{note}", pa.string()) for note in notes(named.filter)]
    return columns


class Tallies:
    """Documents by the value of each note that is counted: [measured, dropped by the filter that
    noted it]; "" for none.
    """

    def __init__(self, filters: Sequence[NamedFilter]) -> None:
        noted = [
            (named.name, note) for named in filters for note in getattr(named.filter, "tallied", ())
        ]
        self.counts: dict[str, dict[str, list[int]]] = {
            f"{name}.{note}": {} for name, note in noted
        }

    def add(self, row: Mapping[str, Any]) -> None:
        """Count a row that has been judged; one that the filter never saw is left out."""
        for column, tally in self.counts.items():
            if column in row:
                found = tally.setdefault(row[column] or "", [0, 0])
                found[0] += 1
                found[1] += (row["rejected_by"] or "").startswith(f"{column.partition('.')[0]}.")


def document_schema(filters: Sequence[NamedFilter], *, keys: str) -> pa.Schema:
    """Schema of the extract stage's parts. Scores are null where a document was rejected before it
    was measured.

    `keys` says how band keys and content hashes are made; it goes into the parts' metadata.
    """
    return pa.schema(
        IDENTITY + EXTRACTED + measured_fields(filters) + VERDICT, metadata={"gristmill.keys": keys}
    )


def corpus_schema(
    documents: pa.Schema, filters: Sequence[NamedFilter], pii: Sequence[str]
) -> pa.Schema:
    """Schema of the refine stage's parts: the documents' own, without dedup keys, with what refine
    adds.
    """
    counts = [pa.field(f"pii.{entity.lower()}", pa.int32()) for entity in pii]
    counts += [pa.field("pii.count", pa.float64())] * bool(pii)
    left_out = {"band_keys", *(f.name for f in VERDICT + REFINED)}
    kept = [f for f in documents if f.name not in left_out]
    return pa.schema(kept + REFINED + measured_fields(filters) + counts + VERDICT)


def sampled(doc_id: int, *, share: float, seed: int) -> bool:
    """Whether a rejected document belongs to the deterministic sample whose text is kept; `share`
    in [0, 1].
    """
    draw = xxhash.xxh64_intdigest(doc_id.to_bytes(8, "little"), seed=seed)
    return draw < share * 2.0**64
