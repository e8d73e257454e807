"""Phase names of stage refine, if asked for: names of people and places in the corpus, by a
language model for entities.

A phase of its own, on its own pool of workers: the model does some tens of kB a second where all of
refine does megabytes, and a change of its settings measures nothing again. It drops nothing: the
corpus part it writes has the rows of refine's.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from filters.pii.ner import Ner
from filters.pii.spans import Scrubbed, Span
from stages.storage.files import open_parquet
from stages.storage.ledger import Commit, Store, Unit

VERSION = 1
BATCH = 64  # documents that the model is given at once


@dataclass(frozen=True)
class NamesPlan:
    """Everything a worker needs for a unit of this phase."""

    names: Ner


def names_unit(unit: Unit, plan: NamesPlan, store: Store) -> Commit:
    """Do one corpus part. `unit.task`: {"corpus": URI}."""
    commit = Commit(unit.name, unit.fingerprint)
    found: Counter[str] = Counter()
    chars = 0
    with (
        open_parquet(unit.task["corpus"]) as part,
        store.create("corpus", f"{unit.name}.parquet", outputs=commit.outputs) as path,
    ):
        schema = _schema(part.schema_arrow, plan.names)
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for batch in part.iter_batches(batch_size=BATCH):
                rows = _scrubbed(batch.to_pylist(), plan.names)
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                commit.rows_out += len(rows)
                chars += sum(row["num_chars"] for row in rows)
                found.update(
                    {
                        entity: sum(row[_column(entity)] for row in rows)
                        for entity in plan.names.entities
                    }
                )
    commit.rows_in = commit.rows_out
    commit.totals["chars_out"] = chars
    commit.extra["pii"] = dict(sorted((+found).items()))
    return commit


def _schema(corpus: pa.Schema, names: Ner) -> pa.Schema:
    for entity in names.entities:
        corpus = corpus.append(pa.field(_column(entity), pa.int32()))
    return corpus


def _column(entity: str) -> str:
    return f"pii.{entity.lower()}"


def _scrubbed(rows: list[dict[str, Any]], names: Ner) -> list[dict[str, Any]]:
    """Rows of the model's language, or of none, without names; others as they are."""
    before = [
        Scrubbed(row["text"], [Span(**span) for span in row["pii_spans"] or ()]) for row in rows
    ]
    readable = [i for i, row in enumerate(rows) if row["language"] in (None, names.language)]
    after = dict(zip(readable, names.scrub_batch([before[i] for i in readable]), strict=True))
    for i, row in enumerate(rows):
        text, spans = after.get(i, before[i])
        counts = Counter(span.entity for span in spans)
        row |= {
            "text": text,
            "num_chars": len(text),
            "pii_spans": [span._asdict() for span in spans],
        }
        row |= {_column(entity): counts[entity] for entity in names.entities}
    return rows
