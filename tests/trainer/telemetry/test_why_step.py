"""Whose rows a step was: of a spike as it happens, of any step afterwards."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytestmark = pytest.mark.train
torch = pytest.importorskip("torch")

from stages.pack.pack import PROVENANCE
from tests.support.live_training import run_training
from trainer import loop
from trainer.telemetry.meter import SpikeDetector
from trainer.telemetry.records import read_metrics
from trainer.telemetry.why_step import (
    RowLoss,
    log_spike,
    why_step,
)


@pytest.fixture
def provenance(config):
    """Two documents in each row, whose ids and URLs tell the row."""
    run = Path(config.data.sources[0].run)
    spans = [
        (row, 10 * row + half, 8 * half, 8, 0, f"https://mill.example/{row}/{half}")
        for row in range(40)
        for half in (0, 1)
    ]
    table = pa.table([list(column) for column in zip(*spans, strict=True)], schema=PROVENANCE)
    pq.write_table(table, run / "generations" / "gen-0001" / "provenance.parquet")
    return run


def batches_of(monkeypatch):
    """The rows of each step, as they were handed out."""
    seen, update = {}, loop.Training._take_step

    def watched(self, batches):
        seen[self.step + 1] = [place for batch in batches for place in batch.row_ids]
        return update(self, batches)

    monkeypatch.setattr(loop.Training, "_take_step", watched)
    return seen


def test_the_rows_of_any_step_can_be_told_afterwards(config, provenance, monkeypatch):
    seen = batches_of(monkeypatch)
    run_training(config, device="cpu")  # 12 steps of 8 rows over 40: more than two epochs
    for step, rows in seen.items():
        blamed = why_step(Path(config.directory), step)
        assert [(b.row.generation, b.row.row) for b in blamed] == rows
        assert [[d.url for d in b.documents] for b in blamed] == [
            [f"https://mill.example/{row}/{n}" for n in (0, 1)] for _, row in rows
        ]


@pytest.mark.parametrize(
    ("step", "what"), [(0, "has no step 0; it has 1 to 12"), (13, "has no step 13; it has 1 to 12")]
)
def test_a_step_that_is_not_there_is_said_so(config, provenance, step, what):
    run_training(config, device="cpu")
    with pytest.raises(LookupError, match=what):
        why_step(Path(config.directory), step)
    with pytest.raises(LookupError, match=r"there is no metrics\.jsonl"):
        why_step(Path(config.directory) / "elsewhere", step)


@pytest.fixture
def spiking(monkeypatch):
    """Spikes are looked for in a window of 4, and step 7 is one: its first row costs a thousand
    nats more.
    """
    queue_gradients, calls = loop.queue_gradients, []

    def poisoned(model, batches, runs, **options):
        figures = queue_gradients(model, batches, runs, **options)
        calls.append(batches[1].row_ids[2])
        if len(calls) == 7:
            figures.row_nats[1][2] += 1000
            for loss in (figures.loss, figures.host[-2]):
                loss += 1000
        return figures

    monkeypatch.setattr(loop, "queue_gradients", poisoned)
    monkeypatch.setattr(loop, "SpikeDetector", lambda losses: SpikeDetector(losses, window=4))
    return calls


def test_a_spike_is_logged_with_its_worst_row_and_documents_first(config, provenance, spiking):
    run_training(config, device="cpu")
    [spike] = map(json.loads, Path(config.directory, "spikes.jsonl").read_text().splitlines())
    told = read_metrics(Path(config.directory) / "metrics.jsonl")[6]
    assert (spike["step"], spike["loss"]) == (told["step"], told["loss"]) == (
        7,
        told["loss"],
    ) and told["spike"]
    generation, row = spiking[6]
    worst = spike["rows"][0]
    assert (worst["generation"], worst["row"]) == (generation, row) and worst["loss"] > 50 > spike[
        "rows"
    ][1]["loss"]
    assert [document["url"] for document in worst["documents"]] == [
        f"https://mill.example/{row}/{n}" for n in (0, 1)
    ]
    assert len(spike["rows"]) == 8
    assert why_step(Path(config.directory), 7)[0].row == RowLoss(
        provenance.as_posix(), generation, row, worst["loss"]
    )


@pytest.mark.parametrize("skip", [False, True])
def test_a_spike_is_skipped_where_that_was_asked_for(
    config, provenance, spiking, monkeypatch, skip
):
    weights, update = {}, loop.Training._take_step

    def watched(self, batches):
        weights[self.step] = [p.full_tensor().clone() for p in self.model.parameters()]
        return update(self, batches)

    monkeypatch.setattr(loop.Training, "_take_step", watched)
    run_training(replace(config, skip_spikes=skip), device="cpu")
    assert all(map(torch.equal, weights[6], weights[7])) == skip
    assert not all(map(torch.equal, weights[7], weights[8]))


def test_a_loss_that_is_none_comes_first_and_a_lost_provenance_stops_nobody(tmp_path):
    rows = [
        RowLoss(str(tmp_path), "gen-0001", row, loss)
        for row, loss in enumerate([1.0, math.nan, 3.0])
    ]
    log_spike(tmp_path, 3, math.nan, rows)
    [spike] = map(json.loads, (tmp_path / "spikes.jsonl").read_text().splitlines())
    assert [row["row"] for row in spike["rows"]] == [1, 2, 0] and spike["loss"] is None
    assert all(row["documents"] == [] for row in spike["rows"])
