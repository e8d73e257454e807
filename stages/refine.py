"""Stage refine: kept documents to clean corpus text: model scores and their bounds, then PII scrubbing.

Models are loaded once per worker. A document is measured by every filter in order, judged, and only if kept scrubbed. The
corpus part holds the kept documents, the rejected part the others; both have the same columns.
"""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field
from pydantic.dataclasses import dataclass

from filters import STRICT, first_failure
from filters.pii import Pii
from filters.text import TextView
from stages.document import NamedFilter, corpus_schema, sampled
from stages.ledger import Commit, Store, Unit
from stages.lines import cut_text
from stages.parts import read_columns

VERSION = 1
Row = dict[str, Any]


@dataclass(frozen=True, config=STRICT)
class RefineConfig:
    """Settings of the refine stage: `filters` in the order in which they are checked, then whether to scrub PII.

    `keep_rejected_text`: share of the documents rejected here whose text is kept, in [0, 1]. `parallelism` caps the workers
    that hold the models at once; 0 leaves it to the cluster's size.
    """

    filters: tuple[str, ...] = ()
    scrub_pii: bool = True
    keep_rejected_text: float = Field(default=0.01, ge=0, le=1)
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


def refine_unit(unit: Unit, plan: RefinePlan, store: Store) -> Commit:
    """Do one documents part. `unit.task`: {"documents": URI, "keep": URI, "cuts": URI or None}."""
    commit = Commit(unit.name, unit.fingerprint)
    documents = _kept_copies(unit.task["documents"], unit.task["keep"])
    cuts = _cuts(unit.task["cuts"])
    schema = corpus_schema(documents.schema, plan.filters, plan.entities)
    counts: Counter[str] = Counter()
    pii: Counter[str] = Counter()
    with (
        store.create("corpus", f"{unit.name}.parquet", outputs=commit.outputs) as corpus_path,
        store.create("rejected", f"{unit.name}.parquet", outputs=commit.outputs) as rejected_path,
        pq.ParquetWriter(corpus_path, schema, compression="zstd") as corpus,
        pq.ParquetWriter(rejected_path, schema, compression="zstd") as rejected,
    ):
        for rows in _rows(documents, cuts, plan):
            for row in rows:
                counts[row["rejected_by"] or "kept"] += 1
                pii.update(span["entity"] for span in row["pii_spans"] or ())
            kept = [row for row in rows if row["rejected_by"] is None]
            corpus.write_table(pa.Table.from_pylist(kept, schema=schema))
            rejected.write_table(pa.Table.from_pylist([r for r in rows if r["rejected_by"]], schema=schema))
            commit.totals["chars_out"] = commit.totals.get("chars_out", 0) + sum(row["num_chars"] for row in kept)
    commit.rows_in, commit.rows_out = documents.num_rows, counts["kept"]
    commit.counts = dict(sorted(counts.items()))
    commit.extra["pii"] = dict(sorted(pii.items()))
    return commit


def _kept_copies(documents_uri: str, keep_uri: str) -> pa.Table:
    """The documents of a part that dedup kept, with their cluster's id and size, in order of doc_id."""
    documents = read_columns(documents_uri, None)
    documents = documents.filter(pa.compute.is_null(documents["rejected_by"]))
    if documents["text"].null_count:
        raise ValueError(f"{documents_uri}: texts were not kept; set extract.keep_text = true")
    keep = read_columns(keep_uri, ["doc_id", "cluster_id", "cluster_size", "keep"])
    if not documents["doc_id"].equals(keep["doc_id"]):
        raise ValueError(f"{keep_uri} does not list the documents of {documents_uri}; rerun stage 'dedup'")
    for name in ("cluster_id", "cluster_size"):
        documents = documents.append_column(name, keep[name])
    return documents.filter(keep["keep"])


def _cuts(uri: str | None) -> dict[int, list[int]]:
    """Numbers of the lines, or paragraphs, that each document loses because an earlier one has them."""
    if uri is None:
        return {}
    table = read_columns(uri, ["doc_id", "cut"])
    return dict(zip(table["doc_id"].to_pylist(), table["cut"].to_pylist(), strict=True))


def _rows(documents: pa.Table, cuts: dict[int, list[int]], plan: RefinePlan) -> Iterator[list[Row]]:
    for batch in documents.to_batches(max_chunksize=plan.config.batch_size):
        yield [_refine(_without_repeats(row, cuts, plan), plan) for row in batch.to_pylist()]


def _without_repeats(row: Row, cuts: dict[int, list[int]], plan: RefinePlan) -> Row:
    cut = cuts.get(row["doc_id"])
    if cut is None or plan.lines == "off":
        return row
    text = cut_text(row["text"], cut, plan.lines)
    return row | {"text": text, "num_chars": len(text)}


def _refine(row: Row, plan: RefinePlan) -> Row:
    row |= {"rejected_by": None, "pii_spans": None}
    if plan.lines != "off" and not row["text"].strip():
        return row | {"rejected_by": "dedup.lines", "rejected_value": 0.0, "rejected_low": 1.0, "rejected_high": math.inf}
    view = TextView(row["text"])
    for name, filter in plan.filters:
        scores = filter.measure(view)
        row |= {f"{name}.{rule}": float(score) for rule, score in scores.items()}
        failure = first_failure(name, filter, scores)
        if failure is not None and row["rejected_by"] is None:
            low, high = failure.bound
            row |= {"rejected_by": failure.rule, "rejected_value": failure.value}
            row |= {"rejected_low": low, "rejected_high": high}
    if row["rejected_by"] is not None:
        return row if sampled(row["doc_id"], share=plan.config.keep_rejected_text, seed=plan.seed) else row | {"text": None}
    return row | (_scrub(row["text"], plan) if plan.config.scrub_pii else {})


def _scrub(text: str, plan: RefinePlan) -> Row:
    scrubbed = plan.pii.scrub(text)
    spans = [{"entity": entity, "start": start, "end": end} for entity, start, end in scrubbed.spans]
    counts = Counter(span["entity"] for span in spans)
    per_entity = {f"pii.{entity.lower()}": counts[entity] for entity in plan.entities}
    return {"text": scrubbed.text, "num_chars": len(scrubbed.text), "pii_spans": spans, **per_entity}
