"""The document row that every stage shares: its Arrow schema, its identity, and how policy is
written into it.
"""

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import pyarrow as pa
import xxhash

from filters import Rejection, apply, first_failure, notes, rules, settings
from filters.text.view import TextView

Row = dict[str, Any]


def table_schema(
    required: Mapping[str, pa.DataType], optional: Mapping[str, pa.DataType] = MappingProxyType({})
) -> pa.Schema:
    """A schema from types by column name; `required` columns hold no nulls."""
    return pa.schema(
        [f.with_nullable(False) for f in pa.schema(required)] + list((optional or {}).items())
    )


IDENTITY = table_schema(
    {"doc_id": pa.uint64()},
    {
        "url": pa.string(),
        "host": pa.string(),
        "source_id": pa.string(),
        "crawl_date": pa.timestamp("s", tz="UTC"),
        "warc_file": pa.string(),
        "warc_offset": pa.int64(),
    },
)
EXTRACTED = pa.schema(
    {
        # the record was cut short, is one of several segments, or has a wrong length
        "truncated": pa.bool_(),
        "charset": pa.string(),
        "charset_source": pa.string(),
        "opt_out": pa.string(),
        "language": pa.string(),
        "language_score": pa.float64(),
        "language_line_share": pa.float64(),
        # what the page says about itself: stages.extract.blocks.metadata; null for pages that the
        # gate drops and for other inputs than WARC
        "title": pa.string(),
        "canonical_url": pa.string(),
        "author": pa.string(),
        "published": pa.string(),
        "declared_language": pa.string(),
        "schema_types": pa.list_(pa.string()),
        "license": pa.string(),
        # expected F1 of the main text, in [0, 1]; null where the engine does not say
        "extract_confidence": pa.float64(),
        "num_chars": pa.int64(),
        "content_hash": pa.binary(16),
        # 8 bytes a band, little-endian: 112 bytes for a document of 14 bands
        "band_keys": pa.binary(),
    }
)
VERDICT = pa.schema(
    {
        "rejected_by": pa.string(),
        "rejected_value": pa.float64(),
        "rejected_low": pa.float64(),
        "rejected_high": pa.float64(),
        "text": pa.large_string(),
    }
)
REFINED = pa.schema(
    {
        "cluster_id": pa.uint64(),
        "cluster_size": pa.int64(),
        "pii_spans": pa.list_(
            pa.struct({"entity": pa.string(), "start": pa.int32(), "end": pa.int32()})
        ),
    }
)

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


def measured_columns(text: str, language: str | None, filters: Sequence[NamedFilter]) -> Row:
    """The scores and notes of every filter, and the text that filters which edit leave."""
    row: Row = {}
    view = TextView(text, language)
    for named in filters:
        # C4 hands on the text without the lines it removes
        view, measured = apply(named.of(language), view)
        row |= {
            f"{named.name}.{key}": value
            if value is None or isinstance(value, str)
            else float(value)
            for key, value in measured.items()
        }
    return row | {"text": view.text, "num_chars": len(view.text)}


def first_broken_rule(row: Row, filters: Sequence[NamedFilter]) -> Rejection | None:
    """The first rule, in the order of the filters, that the measured columns of a row break."""
    for named in filters:
        filter = named.of(row["language"])
        scores = {rule: row[f"{named.name}.{rule}"] for rule in rules(filter)}
        if failure := first_failure(named.name, filter, scores):
            return failure
    return None


def rejection_columns(
    rule: str | None,
    value: float | None = None,
    bound: tuple[float | None, float | None] = (None, None),
) -> Row:
    """The columns of a rejection; a `rule` of None means kept."""
    return {
        "rejected_by": rule,
        "rejected_value": value,
        "rejected_low": bound[0],
        "rejected_high": bound[1],
    }


def score_columns(filters: Sequence[NamedFilter]) -> list[str]:
    """Names of the score columns, in the order in which rules are checked: '<filter>.<rule>'."""
    return [f"{named.name}.{rule}" for named in filters for rule in rules(named.filter)]


def measured_fields(filters: Sequence[NamedFilter]) -> list[pa.Field]:
    """Columns of scores, then of notes, filter by filter."""
    columns: dict[str, pa.DataType] = {}
    for named in filters:
        columns |= dict.fromkeys(score_columns([named]), pa.float64())
        columns |= {f"{named.name}.{note}": pa.string() for note in notes(named.filter)}
    return list(pa.schema(columns))


class Tallies:
    """Documents by the value of each note that is counted: [measured, dropped by the filter that
    noted it]; "" for none.
    """

    def __init__(self, filters: Sequence[NamedFilter]) -> None:
        self.counts: dict[str, dict[str, list[int]]] = {
            f"{named.name}.{note}": {}
            for named in filters
            for note in getattr(named.filter, "tallied", ())
        }

    def add(self, row: Mapping[str, Any]) -> None:
        """Count a row that has been judged; one that the filter never saw is left out."""
        for column, tally in self.counts.items():
            if column in row:
                numbers = tally.setdefault(row[column] or "", [0, 0])
                numbers[0] += 1
                numbers[1] += (row["rejected_by"] or "").startswith(f"{column.partition('.')[0]}.")


def document_schema(filters: Sequence[NamedFilter], *, keys: str) -> pa.Schema:
    """Schema of the extract stage's parts. Scores are null where a document was rejected before it
    was measured.

    `keys` says how band keys and content hashes are made; it goes into the parts' metadata.
    """
    return pa.schema(
        [*IDENTITY, *EXTRACTED, *measured_fields(filters), *VERDICT],
        metadata={"gristmill.keys": keys},
    )


def pii_column(entity: str) -> str:
    """Name of the column with a document's number of replaced values of one kind."""
    return f"pii.{entity.lower()}"


def corpus_schema(
    documents: pa.Schema, filters: Sequence[NamedFilter], pii: Sequence[str]
) -> pa.Schema:
    """Schema of the refine stage's parts: the documents' own, without dedup keys, with what refine
    adds.
    """
    counts = {pii_column(entity): pa.int32() for entity in pii}
    if pii:
        counts["pii.count"] = pa.float64()
    replaced = {"band_keys", *VERDICT.names, *REFINED.names}
    kept = [f for f in documents if f.name not in replaced]
    return pa.schema([*kept, *REFINED, *measured_fields(filters), *pa.schema(counts), *VERDICT])


def sampled(doc_id: int, *, share: float, seed: int) -> bool:
    """Whether a rejected document belongs to the deterministic sample whose text is kept; `share`
    in [0, 1].
    """
    draw = xxhash.xxh64_intdigest(doc_id.to_bytes(8, "little"), seed=seed)
    return draw < share * 2.0**64
