"""Find the rows and documents of a training step: of a spike as it happens, of any step later.

    DIRECTORY/spikes.jsonl    a line per spike: step, loss, and its rows by descending loss, each
                              with its documents and their URLs

A row's documents come from its generation's provenance, so the run that packed it may be deleted.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from stages.storage.catalog import read_catalog
from trainer.config import CONFIG
from trainer.data.generations import Document, documents_of, verify_generation
from trainer.telemetry.feedback import append_line, to_json
from trainer.telemetry.records import read_metrics
from trainer.telemetry.sinks import METRICS

SPIKES = "spikes.jsonl"
_LOG = logging.getLogger(__name__)


class RowLoss(NamedTuple):
    """A row and its mean loss in nats per target, None if it was not recorded."""

    run: str
    generation: str
    row: int
    loss: float | None


class RowDocuments(NamedTuple):
    """A row and the documents packed into it."""

    row: RowLoss
    documents: list[Document]


def log_spike(directory: Path, step: int, loss: float, rows: Iterable[RowLoss]) -> None:
    """Append a spike to spikes.jsonl, its rows by descending loss (NaN first).

    Without documents if provenance cannot be read: a diagnosis must not stop a training.
    """
    worst = sorted(rows, key=lambda row: (row.loss == row.loss, -(row.loss or 0.0)))
    try:
        entries = _with_documents(worst)
    except Exception as error:  # each store's client has its own error types
        _LOG.warning("the documents of step %d are unknown: %r", step, error)
        entries = [RowDocuments(row, []) for row in worst]
    lines = [
        row._asdict() | {"documents": [d._asdict() for d in documents]}
        for row, documents in entries
    ]
    with suppress(OSError):
        append_line(str(directory / SPIKES), to_json({"step": step, "loss": loss, "rows": lines}))


def why_step(directory: Path, step: int) -> list[RowDocuments]:
    """The rows of a step in reading order, or by descending loss if it was a spike.

    They follow from the row ranges in metrics.jsonl and the seeded order of the generations.
    LookupError if the training has no such step or wrote no metrics, GenerationError if a
    generation has changed.
    """
    if not (directory / METRICS).exists():
        raise LookupError(
            f"{directory}: there is no {METRICS}; is this the directory of a training?"
        )
    records = {record["step"]: record for record in read_metrics(directory / METRICS)}
    if step not in records:
        first, last = min(records, default=0), max(records, default=0)
        raise LookupError(f"{directory / METRICS} has no step {step}; it has {first} to {last}")
    config = json.loads((directory / CONFIG).read_bytes())["data"]
    rows = [
        RowLoss(run, generation, row, None)
        for run, ranges in records[step]["data"].items()
        for generation, row in _rows_of_ranges(run, ranges, config)
    ]
    spikes = {record["step"]: record for record in read_metrics(directory / SPIKES)}
    # if the losses differ, a restart has repeated the step since
    if step in spikes and spikes[step]["loss"] == records[step]["loss"]:
        rows = [RowLoss(*(row[key] for key in RowLoss._fields)) for row in spikes[step]["rows"]]
    return _with_documents(rows)


def _with_documents(rows: Sequence[RowLoss]) -> list[RowDocuments]:
    documents: dict[tuple[str, str, int], list[Document]] = {}
    for run, generation in {(row.run, row.generation) for row in rows}:
        numbers = [row.row for row in rows if (row.run, row.generation) == (run, generation)]
        for document in documents_of(run, generation, numbers):
            documents.setdefault((run, generation, document.row), []).append(document)
    return [RowDocuments(row, documents.get(row[:3], [])) for row in rows]


def _rows_of_ranges(
    run: str, ranges: Iterable[Any], config: Mapping[str, Any]
) -> Iterator[tuple[str, int]]:
    """(generation, row) of row ranges as metrics.jsonl has them."""
    from trainer.data.order import epoch_order

    entries = {entry["name"]: entry for entry in read_catalog(run)}
    seed, nodes = config["shuffle_seed"], config["canonical_nodes"]
    for name, epoch, start, stop in ranges:
        if name not in entries:
            raise LookupError(
                f"{run}/catalog.jsonl has no {name}, which the step has rows of; restore it"
            )
        manifest = verify_generation(run, entries[name], mode="quick")
        order = epoch_order(manifest, epoch, seed=seed, nodes=nodes)
        yield from ((name, row) for row in order[start:stop].tolist())
