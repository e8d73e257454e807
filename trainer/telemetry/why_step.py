"""Which rows and documents a step was trained on: for a spike of the loss as it happens, for any
step afterwards.

    DIRECTORY/spikes.jsonl    a line for each spike: step, loss, its rows by falling loss, each with its documents and their URLs

A row's documents are in its generation's provenance, so the run that packed it need not be there
any more.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from stages.storage.catalog import read_catalog
from trainer.data.generations import Document, documents_of, verify_generation
from trainer.telemetry.feedback import append_line, to_json
from trainer.telemetry.records import read_metrics
from trainer.telemetry.sinks import METRICS

CONFIG = "config.json"
SPIKES = "spikes.jsonl"
_LOG = logging.getLogger(__name__)


class RowLoss(NamedTuple):
    """A row of a generation of a run, and its mean loss in nats a target, None where nobody wrote
    it down.
    """

    run: str
    generation: str
    row: int
    loss: float | None


class RowDocuments(NamedTuple):
    """A row and what it was packed of."""

    row: RowLoss
    documents: list[Document]


def log_spike(directory: Path, step: int, loss: float, rows: Iterable[RowLoss]) -> None:
    """Append the spike of a step to spikes.jsonl, its worst rows first; without documents where
    provenance cannot be read.
    """
    worst = sorted(
        rows, key=lambda row: (row.loss == row.loss, -(row.loss or 0.0))
    )  # NaN is the worst
    try:
        blamed = with_documents(worst)
    except (
        Exception
    ) as error:  # each store's client has its own errors, and a diagnosis must not stop a training
        _LOG.warning("the documents of step %d are unknown: %r", step, error)
        blamed = [RowDocuments(row, []) for row in worst]
    said = [
        row._asdict() | {"documents": [d._asdict() for d in documents]} for row, documents in blamed
    ]
    with suppress(OSError):
        append_line(str(directory / SPIKES), to_json({"step": step, "loss": loss, "rows": said}))


def why_step(directory: Path, step: int) -> list[RowDocuments]:
    """The rows of a step, in the order in which they were drawn, or by falling loss if it was a
    spike.

    They follow from what metrics.jsonl says was taken and the seeded order of the generations.
    LookupError when the training has no such step or did not write metrics, GenerationError when a
    generation is no longer what it was.
    """
    if not (directory / METRICS).exists():
        raise LookupError(
            f"{directory}: there is no {METRICS}; is this the directory of a training?"
        )
    records = {record["step"]: record for record in read_metrics(directory / METRICS)}
    if step not in records:
        raise LookupError(
            f"{directory / METRICS} has no step {step}; it has {min(records, default=0)} to {max(records, default=0)}"
        )
    config = json.loads((directory / CONFIG).read_bytes())["data"]
    rows = [
        RowLoss(run, *place, None)
        for run, drawn in records[step]["data"].items()
        for place in _places(run, drawn, config)
    ]
    spikes = {record["step"]: record for record in read_metrics(directory / SPIKES)}
    if (
        step in spikes and spikes[step]["loss"] == records[step]["loss"]
    ):  # else it was of steps that a restart took back
        rows = [RowLoss(*(row[key] for key in RowLoss._fields)) for row in spikes[step]["rows"]]
    return with_documents(rows)


def with_documents(rows: Iterable[RowLoss]) -> list[RowDocuments]:
    """Each row with its documents, in the order of the rows."""
    rows = list(rows)
    packed: dict[tuple[str, str, int], list[Document]] = {}
    for run, generation in {(row.run, row.generation) for row in rows}:
        mine = [row.row for row in rows if (row.run, row.generation) == (run, generation)]
        for document in documents_of(run, generation, mine):
            packed.setdefault((run, generation, document.row), []).append(document)
    return [RowDocuments(row, packed.get((row.run, row.generation, row.row), [])) for row in rows]


def _places(run: str, drawn: Iterable[Any], config: Mapping[str, Any]) -> list[tuple[str, int]]:
    """(generation, row) of stretches as metrics.jsonl has them."""
    from trainer.data.order import epoch_order

    entries = {entry["name"]: entry for entry in read_catalog(run)}
    places = []
    for name, epoch, start, stop in drawn:
        if name not in entries:
            raise LookupError(
                f"{run}/catalog.jsonl lists no {name}, from which the step has rows; restore it"
            )
        manifest = verify_generation(run, entries[name], mode="quick")
        order = epoch_order(
            manifest, epoch, seed=config["shuffle_seed"], nodes=config["canonical_nodes"]
        )
        places += [(name, row) for row in order[start:stop].tolist()]
    return places
