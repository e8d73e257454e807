"""Stage refine: kept documents to clean corpus text: model scores and their bounds, then PII
scrubbing.

Models are loaded once per worker, in its killable child. A document is measured by every filter in
order, judged, and only if kept scrubbed. The corpus part holds the kept documents, the rejected
part the others; both have the same columns.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import pyarrow as pa
from pydantic import Field

from filters import Rejection, first_failure, validated
from filters.pii.scrub import Pii
from filters.pii.spans import Scrubbed
from stages.dedup.lines import cut_text
from stages.formats.document import (
    NamedFilter,
    Row,
    Tallies,
    corpus_schema,
    first_broken_rule,
    measured_columns,
    measured_fields,
    pii_column,
    rejection_columns,
    sampled,
)
from stages.isolation.child import Child, Limits, Loss, shared_child
from stages.storage.ledger import Commit, Store, Unit
from stages.storage.parts import read_columns, score_names

VERSION = 4
RECYCLE_AFTER = 50_000  # documents

Document = tuple[str, str | None]  # text and language


@validated
class RefineConfig:
    """Settings of the refine stage: `filters` in the order in which they are checked, then whether
    to scrub PII.

    `keep_rejected_text`: share of the documents rejected here whose text is kept, in [0, 1].
    A document that takes more than `timeout_seconds` of CPU time, or `child_memory_bytes` beyond
    the models, is rejected. `parallelism` caps the workers that hold the models at once; 0 leaves
    it to the cluster's size.
    """

    filters: tuple[str, ...] = ()
    scrub_pii: bool = True
    keep_rejected_text: float = Field(default=0.01, ge=0, le=1)
    timeout_seconds: float = Field(default=30.0, gt=0)
    child_memory_bytes: int = Field(default=2_000_000_000, ge=500_000_000)
    num_cpus: float = Field(default=1.0, gt=0)
    memory: int = Field(default=1_500_000_000, gt=0)
    parallelism: int = Field(default=0, ge=0)
    batch_size: int = Field(default=512, gt=0)


@dataclass(frozen=True)
class RefinePlan:
    """Everything a worker needs for a unit of this stage; paths are absolute."""

    config: RefineConfig
    filters: tuple[NamedFilter, ...]
    pii: Pii
    seed: int
    lines: Literal["off", "line", "paragraph"] = "off"

    @property
    def entities(self) -> tuple[str, ...]:
        """PII entities that are scrubbed, () when scrubbing is off."""
        return self.pii.entities if self.config.scrub_pii else ()

    def child(self, make: Callable[["RefinePlan"], Callable[[Document], Row]]) -> Child:
        """The worker's child for one kind of work on documents."""
        config = self.config
        limits = Limits(config.timeout_seconds, config.child_memory_bytes, RECYCLE_AFTER)
        return shared_child(make, self, limits)


@dataclass(frozen=True)
class SamplePlan:
    """What a worker needs to measure a sample: the shares, in [0, 1], of the documents that dedup
    kept, and of all that extract saw, which are drawn by `seed`.
    """

    refine: RefinePlan
    share: float
    extracted_share: float
    seed: int


@validated
class RefineTask:
    """A documents part, its keep table, and the lines to cut from it, if any, by URI."""

    documents: str
    keep: str
    cuts: str | None = None


@validated
class RefineResult:
    """Characters of the kept documents, PII spans by entity, and counts of the filters' tallies."""

    chars_out: int = 0
    pii: dict[str, int] = field(default_factory=dict)
    tallies: dict[str, dict[str, list[int]]] = field(default_factory=dict)


def refine_unit(unit: Unit, plan: RefinePlan, store: Store) -> Commit:
    """Refine one documents part. The task is a RefineTask."""
    task: RefineTask = unit.task
    commit = Commit(unit.name, unit.fingerprint)
    documents = _kept_copies(task.documents, task.keep)
    child, chars_out = plan.child(make_judge), 0
    started = child.cpu_seconds
    schema = corpus_schema(documents.schema, plan.filters, plan.entities)
    counts: Counter[str] = Counter()
    pii: Counter[str] = Counter()
    tallies = Tallies(plan.filters)
    with (
        store.part_writer("corpus", unit.name, schema, commit=commit) as corpus,
        store.part_writer("rejected", unit.name, schema, commit=commit) as rejected,
    ):
        for batch in _batches(documents, task.cuts, plan):
            rows = [_refine(row, plan, child) for row in batch]
            for row in rows:
                counts[row["rejected_by"] or "kept"] += 1
                pii.update(span["entity"] for span in row["pii_spans"] or ())
                tallies.add(row)
            kept = [row for row in rows if row["rejected_by"] is None]
            corpus.write_table(pa.Table.from_pylist(kept, schema=schema))
            rejected.write_table(
                pa.Table.from_pylist([r for r in rows if r["rejected_by"]], schema=schema)
            )
            chars_out += sum(row["num_chars"] for row in kept)
    commit.rows_in, commit.rows_out = documents.num_rows, counts["kept"]
    commit.counts = dict(sorted(counts.items()))
    commit.cpu_seconds = round(child.cpu_seconds - started, 3)
    commit.result = RefineResult(chars_out, dict(sorted(pii.items())), tallies.counts)
    return commit


def sample_unit(unit: Unit, plan: SamplePlan, store: Store) -> Commit:
    """Measure a sample of one documents part with every filter. The task is a RefineTask.

    "sample" holds the scores of documents that dedup kept, "extracted" those that extract stored,
    rejected documents included.
    """
    commit = Commit(unit.name, unit.fingerprint)
    documents = _kept_copies(unit.task.documents, unit.task.keep)
    drawn = _sample_rows(documents, plan.share, plan.seed)
    identity = pa.schema({"doc_id": pa.uint64(), "language": pa.string()})
    schema = pa.schema([*identity, *measured_fields(plan.refine.filters)])
    child = plan.refine.child(make_measure)
    measured = (
        row | columns
        for batch in _batches(drawn, unit.task.cuts, plan.refine)
        for row in batch
        if not isinstance(columns := child.result((row["text"], row["language"])), Loss)
    )
    rows = list(measured)
    store.write_part(pa.Table.from_pylist(rows, schema=schema), "sample", unit.name, commit=commit)
    identified = ["doc_id", "num_chars", "language", "language_score", "language_line_share"]
    extracted = read_columns(unit.task.documents, [*identified, *score_names(unit.task.documents)])
    extracted = extracted.filter(pa.compute.is_valid(extracted["num_chars"]))
    sample = _sample_rows(extracted, plan.extracted_share, plan.seed)
    store.write_part(sample, "extracted", unit.name, commit=commit)
    commit.rows_in, commit.rows_out = documents.num_rows, len(rows)
    return commit


def _sample_rows(rows: pa.Table, share: float, seed: int) -> pa.Table:
    wanted = [sampled(doc_id, share=share, seed=seed) for doc_id in rows["doc_id"].to_pylist()]
    return rows.filter(pa.array(wanted, pa.bool_()))


def _kept_copies(documents_uri: str, keep_uri: str) -> pa.Table:
    """Documents of a part that dedup kept, with cluster id and size, in order of doc_id."""
    documents = read_columns(documents_uri, None)
    documents = documents.filter(pa.compute.is_null(documents["rejected_by"]))
    if documents["text"].null_count:
        raise ValueError(f"{documents_uri}: texts were not kept; set extract.keep_text = true")
    keep = read_columns(keep_uri, ["doc_id", "cluster_id", "cluster_size", "keep"])
    if not documents["doc_id"].equals(keep["doc_id"]):
        raise ValueError(
            f"{keep_uri} does not list the documents of {documents_uri}; rerun stage 'dedup'"
        )
    for name in ("cluster_id", "cluster_size"):
        documents = documents.append_column(name, keep[name])
    return documents.filter(keep["keep"])


def _batches(documents: pa.Table, cuts: str | None, plan: RefinePlan) -> Iterator[list[Row]]:
    """The documents in batches of rows, without the lines or paragraphs listed in `cuts`."""
    cut_rows = [] if cuts is None else read_columns(cuts, ["doc_id", "cut"]).to_pylist()
    cut_of = {row["doc_id"]: row["cut"] for row in cut_rows}
    for batch in documents.to_batches(max_chunksize=plan.config.batch_size):
        rows = batch.to_pylist()
        for row in rows:
            if row["doc_id"] in cut_of and plan.lines != "off":
                row["text"] = cut_text(row["text"], cut_of[row["doc_id"]], plan.lines)
                row["num_chars"] = len(row["text"])
        yield rows


def _refine(row: Row, plan: RefinePlan, child: Child) -> Row:
    row |= {"rejected_by": None, "pii_spans": None}
    if plan.lines != "off" and not row["text"].strip():
        return row | rejection_columns("dedup.lines", 0.0, (1.0, math.inf))
    judged = child.result((row["text"], row["language"]))
    row |= rejection_columns(*judged.rejection("refine")) if isinstance(judged, Loss) else judged
    if row["rejected_by"] and not sampled(
        row["doc_id"], share=plan.config.keep_rejected_text, seed=plan.seed
    ):
        row["text"] = None
    return row


# --- in the child ---------------------------------------------------------------------------------


def make_measure(plan: RefinePlan) -> Callable[[Document], Row]:
    """What measures a document, after all models have been loaded: a model that cannot be loaded
    must fail the unit, and loading counts towards no document's limits.
    """
    for language in {language for named in plan.filters for language, _ in named.all()}:
        measured_columns("The mill grinds.", language, plan.filters)
    return lambda document: measured_columns(*document, plan.filters)


def make_judge(plan: RefinePlan) -> Callable[[Document], Row]:
    """What measures, judges and scrubs a document; the columns that this changes."""
    measure = make_measure(plan)
    return lambda document: _judged(measure(document), document[1], plan)


def _judged(row: Row, language: str | None, plan: RefinePlan) -> Row:
    failure = first_broken_rule(row | {"language": language}, plan.filters)
    if failure is None and not row["text"].strip():
        # filters that edit left nothing
        failure = Rejection("refine.empty_text", 0.0, (1.0, math.inf))
    if failure is None and plan.config.scrub_pii:
        row |= scrubbed_columns(plan.pii.scrub(row["text"]), plan.entities)
        row["pii.count"] = float(len(row["pii_spans"]))
        failure = first_failure("pii", plan.pii, {"count": row["pii.count"]})
    return row if failure is None else row | rejection_columns(*failure)


def scrubbed_columns(scrubbed: Scrubbed, entities: Sequence[str]) -> Row:
    """The columns that a scrubbed text replaces, and the number of its spans of each entity."""
    counts = Counter(span.entity for span in scrubbed.spans)
    return {
        "text": scrubbed.text,
        "num_chars": len(scrubbed.text),
        "pii_spans": [span._asdict() for span in scrubbed.spans],
        **{pii_column(entity): counts[entity] for entity in entities},
    }
