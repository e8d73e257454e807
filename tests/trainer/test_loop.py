"""The loop on one process: it learns, resumes bit for bit, keeps NaN from the weights, and its feedback is its own count."""

import itertools
import json
import math
import os
import signal
from dataclasses import replace

import pytest

pytestmark = pytest.mark.train
torch = pytest.importorskip("torch")

from tests.trainer.shards import publish  # noqa: E402
from trainer import loop  # noqa: E402
from trainer.config import (  # noqa: E402
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    SourceConfig,
    TelemetryConfig,
    TrainConfig,
)
from trainer.feedback import read_summaries  # noqa: E402


@pytest.fixture
def config(tmp_path):
    publish(tmp_path / "run", 40)
    return TrainConfig(
        directory=str(tmp_path / "train"),
        max_steps=12,
        model=ModelConfig(vocab_size=64, dim=16, layers=1, heads=2, kv_heads=1, hidden_dim=32),
        optimizer=OptimizerConfig(lr=1e-2),
        schedule=ScheduleConfig(warmup_steps=2),
        data=DataConfig(
            sources=(SourceConfig(str(tmp_path / "run")),),
            global_batch_rows=8,
            micro_batch_rows=4,
            when_empty="repeat",
            max_epochs=20,
        ),
        checkpoint=CheckpointConfig(every_steps=4),
        telemetry=TelemetryConfig(sinks=("jsonl",)),
    )


def metrics(config):
    with open(f"{config.directory}/metrics.jsonl") as file:
        return {row["step"]: row for row in map(json.loads, file)}


def test_the_loss_falls_and_the_run_ends_where_it_was_told_to(config):
    result = loop.train(config, device="cpu")
    losses = [row["loss"] for row in metrics(config).values()]
    assert (result.steps, result.why, len(losses)) == (12, "step 12 was reached", 12)
    assert losses[0] == pytest.approx(math.log(64), abs=0.2) and losses[-1] < losses[0] - 0.3


def test_a_resumed_run_takes_the_steps_that_would_have_come(config, tmp_path):
    whole = replace(config, directory=str(tmp_path / "whole"))
    loop.train(whole, device="cpu")
    stopped = replace(config, max_steps=12, data=replace(config.data, max_epochs=1))  # 5 steps of 8 rows
    assert loop.train(stopped, device="cpu").why == "the data ended"
    loop.train(config, device="cpu")
    expected, found = metrics(whole), metrics(config)
    assert [found[step]["loss"] for step in range(1, 13)] == [expected[step]["loss"] for step in range(1, 13)]
    assert [found[step]["grad_norm"] for step in range(1, 13)] == [expected[step]["grad_norm"] for step in range(1, 13)]


def test_what_is_not_finite_never_reaches_the_weights(config, monkeypatch):
    accumulate, calls, weights = loop.accumulate, [], []

    def poisoned(model, batches, *, device):
        calls.append(len(calls))
        weights.append([p.full_tensor().clone() for p in model.parameters()])
        loss, targets, sources = accumulate(model, batches, device=device)
        if calls[-1] == 3:
            next(model.parameters()).grad.fill_(math.nan)
        return loss, targets, sources

    monkeypatch.setattr(loop, "accumulate", poisoned)
    loop.train(replace(config, max_steps=6), device="cpu")
    same = [all(map(torch.equal, *pair)) for pair in itertools.pairwise(weights)]
    assert same == [False, False, False, True, False]


def test_only_nan_ends_the_run_and_the_last_good_state_stays(config, monkeypatch):
    loop.train(replace(config, max_steps=4), device="cpu")
    monkeypatch.setattr(loop, "accumulate", lambda *args, **kwargs: (math.nan, 1, {}))
    with pytest.raises(loop.Diverged, match=r"10 steps in a row up to 13 had no finite loss or gradient: lower optimizer.lr"):
        loop.train(replace(config, max_steps=99, checkpoint=CheckpointConfig(every_steps=100)), device="cpu")
    [summary] = read_summaries(f"{config.data.sources[0].run}/feedback").summaries
    assert summary.report.state == "failed"
    monkeypatch.undo()
    assert loop.train(replace(config, max_steps=5), device="cpu").steps == 5


def test_a_run_that_is_asked_to_stop_saves_first(config, monkeypatch):
    accumulate, handler = loop.accumulate, signal.getsignal(signal.SIGTERM)

    def asked(model, batches, **kwargs):
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        seen.append(batches[0].where)
        return accumulate(model, batches, **kwargs)

    seen = []
    monkeypatch.setattr(loop, "accumulate", asked)
    result = loop.train(config, device="cpu")
    assert (result.steps, result.why) == (3, "it was asked to stop")
    assert signal.getsignal(signal.SIGTERM) == handler
    result = loop.train(config, device="cpu")
    assert (result.steps, len(seen)) == (12, 12)


def test_feedback_counts_what_was_trained_on_once(config):
    loop.train(replace(config, max_steps=6), device="cpu")
    loop.train(config, device="cpu")
    [summary] = read_summaries(f"{config.data.sources[0].run}/feedback").summaries
    rows = metrics(config)
    assert summary.report.state == "stopped" and summary.report.steps == 12
    assert summary.report.tokens_total == sum(row["tokens"] for row in rows.values())
    assert summary.report.restarts == 1
