"""Phase names of stage refine, if asked for: names of people and places in the corpus, by a
language model for entities.

A phase of its own, on its own pool of workers: the model does some tens of kB a second where all of
refine does megabytes, and a change of its settings measures nothing again. It drops nothing: the
corpus part it writes has the rows of refine's.
"""

from collections import Counter
from dataclasses import field

import pyarrow as pa

from filters import validated
from filters.pii.ner import Ner
from filters.pii.spans import Scrubbed, Span
from stages.formats.document import Row, pii_column
from stages.refine.refine import scrubbed_columns
from stages.storage.files import open_parquet
from stages.storage.ledger import Commit, Store, Unit

VERSION = 1
BATCH = 64  # documents that the model is given at once


@validated
class NerTask:
    """A corpus part by URI."""

    corpus: str


@validated
class NerResult:
    """Characters of the documents, and spans by entity."""

    chars_out: int = 0
    pii: dict[str, int] = field(default_factory=dict)


def ner_unit(unit: Unit, ner: Ner, store: Store) -> Commit:
    """Replace the names in one corpus part. The task is a NerTask."""
    commit = Commit(unit.name, unit.fingerprint)
    spans: Counter[str] = Counter()
    chars = 0
    with open_parquet(unit.task.corpus) as part:
        counts = {pii_column(entity): pa.int32() for entity in ner.entities}
        schema = pa.schema([*part.schema_arrow, *pa.schema(counts)])
        with store.part_writer("corpus", unit.name, schema, commit=commit) as writer:
            for batch in part.iter_batches(batch_size=BATCH):
                rows = _scrubbed(batch.to_pylist(), ner)
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                commit.rows_out += len(rows)
                chars += sum(row["num_chars"] for row in rows)
                for entity in ner.entities:
                    spans[entity] += sum(row[pii_column(entity)] for row in rows)
    commit.rows_in = commit.rows_out
    commit.result = NerResult(chars, dict(sorted((+spans).items())))
    return commit


def _scrubbed(rows: list[Row], ner: Ner) -> list[Row]:
    """Rows of the model's language, or of none, without names; others as they are."""
    before = [
        Scrubbed(row["text"], [Span(**span) for span in row["pii_spans"] or ()]) for row in rows
    ]
    readable = [i for i, row in enumerate(rows) if row["language"] in (None, ner.language)]
    after = dict(zip(readable, ner.scrub_batch([before[i] for i in readable]), strict=True))
    return [
        row | scrubbed_columns(after.get(i, before[i]), ner.entities) for i, row in enumerate(rows)
    ]
