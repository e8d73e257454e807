"""The loop on one process: it learns, resumes bit for bit, keeps NaN from the weights, and its
feedback is its own count.
"""

import gzip
import itertools
import json
import math
import os
import signal
import threading
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.train
torch = pytest.importorskip("torch")

import torch.distributed as dist

from tests.support.checkpoints import is_saving
from tests.support.live_training import run_training
from tests.support.ranks import run_ranks
from tests.support.shards import publish
from trainer import checkpoint, loop
from trainer.checkpoint import Checkpoints
from trainer.config import (
    CheckpointConfig,
    EvaluationConfig,
    HeldOutConfig,
    ParallelConfig,
    SourceConfig,
)
from trainer.data import loader
from trainer.data.rows import read_batch
from trainer.launch import export
from trainer.telemetry.feedback import Health, read_summaries
from trainer.telemetry.feedback_writer import Writer
from trainer.telemetry.records import read_metrics


def without_loss(figures):
    host = figures.host.clone()
    host[-2] = math.nan
    return figures._replace(loss=host[-2], host=host)


def saved_by(config):
    return Checkpoints(f"{config.directory}/checkpoints", config.checkpoint).latest()


def metrics(config):
    return {
        record["step"]: record for record in read_metrics(Path(config.directory) / "metrics.jsonl")
    }


def test_the_loss_falls_and_the_run_ends_where_it_was_told_to(config):
    result = run_training(config, device="cpu")
    losses = [row["loss"] for row in metrics(config).values()]
    assert (result.steps, result.reason, len(losses)) == (12, "step 12 was reached", 12)
    assert losses[0] == pytest.approx(math.log(64), abs=0.2) and losses[-1] < losses[0] - 0.3


def test_a_resumed_run_takes_the_steps_that_would_have_come(config, tmp_path):
    whole = replace(config, directory=str(tmp_path / "whole"))
    run_training(whole, device="cpu")
    # 5 steps of 8 rows
    stopped = replace(config, max_steps=12, data=replace(config.data, max_epochs=1))
    assert run_training(stopped, device="cpu").reason == "the data ended"
    run_training(config, device="cpu")
    expected, found = metrics(whole), metrics(config)
    assert [found[step]["loss"] for step in range(1, 13)] == [
        expected[step]["loss"] for step in range(1, 13)
    ]
    assert [found[step]["grad_norm"] for step in range(1, 13)] == [
        expected[step]["grad_norm"] for step in range(1, 13)
    ]


def test_a_vocabulary_that_was_chosen_before_the_data_came_stays(config):
    """A training may begin before its first generation is published."""
    large = replace(config, max_steps=4, model=replace(config.model, vocab_size=256))
    run_training(large, device="cpu")
    open_end = replace(config, max_steps=6, model=replace(config.model, vocab_size=0))
    assert run_training(open_end, device="cpu").steps == 6
    assert saved_by(open_end).model["vocab_size"] == 256


def test_more_steps_do_not_change_the_rates_of_those_that_were_taken(config, caplog):
    config = replace(config, max_steps=6)
    run_training(config, device="cpu")
    taken = {step: record["lr"] for step, record in metrics(config).items()}
    result = run_training(replace(config, max_steps=10), device="cpu")
    rates = {step: record["lr"] for step, record in metrics(config).items()}
    assert taken.items() <= rates.items() and rates[7] <= taken[6]
    assert result.reason.startswith("step 10 was reached; max_steps or schedule was changed at st")
    assert "the learning rate goes on from there" in caplog.text


def test_a_run_starts_from_an_export_and_resumes_from_its_own_checkpoints(config, tmp_path):
    run_training(config, device="cpu")
    export(config.directory, str(tmp_path / "exported"), step=8, dtype="float32")
    init = replace(config.model, init=str(tmp_path / "exported"))
    child = replace(config, directory=str(tmp_path / "child"), model=init, max_steps=4)
    run_training(child, device="cpu")
    fresh = replace(config, directory=str(tmp_path / "fresh"), max_steps=4)
    run_training(fresh, device="cpu")
    assert metrics(child)[1]["data"] == metrics(fresh)[1]["data"]
    assert metrics(child)[1]["loss"] < metrics(fresh)[1]["loss"] - 0.05
    (tmp_path / "exported" / "model.safetensors").unlink()  # it is not read again
    assert run_training(replace(child, max_steps=6), device="cpu").steps == 6
    record = Checkpoints(f"{child.directory}/checkpoints", child.checkpoint).latest().extra["init"]
    assert record["path"] == init.init and len(record["sha256"]) == 64
    with pytest.raises(ValueError, match=r"model\.init = '', but this training started from"):
        run_training(replace(child, model=config.model), device="cpu")


def test_what_is_not_finite_never_reaches_the_weights(config, monkeypatch):
    queue_gradients, calls, weights = loop.queue_gradients, [], []

    def poisoned(model, *args, **options):
        calls.append(len(calls))
        weights.append([p.full_tensor().clone() for p in model.parameters()])
        figures = queue_gradients(model, *args, **options)
        if calls[-1] == 3:
            next(model.parameters()).grad.fill_(math.nan)
            return figures._replace(grad_norm=torch.tensor(math.nan))
        return figures

    monkeypatch.setattr(loop, "queue_gradients", poisoned)
    run_training(replace(config, max_steps=6), device="cpu")
    same = [all(map(torch.equal, *pair)) for pair in itertools.pairwise(weights)]
    assert same == [False, False, False, True, False]


def test_only_nan_ends_the_run_and_the_last_good_state_stays(config, monkeypatch):
    run_training(replace(config, max_steps=4), device="cpu")
    queue_gradients = loop.queue_gradients
    monkeypatch.setattr(
        loop,
        "queue_gradients",
        lambda *args, **options: without_loss(queue_gradients(*args, **options)),
    )
    with pytest.raises(
        loop.Diverged,
        match=r"10 steps in a row up to 14 had no finite loss or gradient: lower optimizer.lr",
    ):
        run_training(
            replace(config, max_steps=99, checkpoint=CheckpointConfig(every_steps=100)),
            device="cpu",
        )
    [summary] = read_summaries(f"{config.data.sources[0].run}/feedback").summaries
    assert summary.report.state == "failed"
    monkeypatch.undo()
    assert run_training(replace(config, max_steps=5), device="cpu").steps == 5


def test_a_run_that_is_asked_to_stop_saves_first(config, monkeypatch):
    queue_gradients, handler = loop.queue_gradients, signal.getsignal(signal.SIGTERM)

    def asked(model, batches, *args, **options):
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        seen.append(batches[0].row_ids)
        return queue_gradients(model, batches, *args, **options)

    seen = []
    monkeypatch.setattr(loop, "queue_gradients", asked)
    result = run_training(config, device="cpu")
    # the next step tells all ranks
    assert (result.steps, result.reason) == (4, "it was asked to stop")
    assert signal.getsignal(signal.SIGTERM) == handler
    result = run_training(config, device="cpu")
    assert (result.steps, len(seen)) == (12, 12)


def test_feedback_counts_what_was_trained_on_once(config):
    run_training(replace(config, max_steps=6), device="cpu")
    run_training(config, device="cpu")
    [summary] = read_summaries(f"{config.data.sources[0].run}/feedback").summaries
    rows = metrics(config)
    assert summary.report.state == "stopped" and summary.report.steps == 12
    assert summary.report.tokens_total == sum(row["tokens"] for row in rows.values())
    assert summary.report.restarts == 1


# --- ranks ----------------------------------------------------------------------------------------


def rank(number, ranks, folder, config):
    """In a process of its own: one rank of a training."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/ranks-{config.max_steps}-{ranks}",
        rank=number,
        world_size=ranks,
    )
    run_training(config, device="cpu")
    dist.destroy_process_group()


def spawn(ranks, folder, config):
    run_ranks(rank, ranks, folder, config, ranks=ranks)


def taken(config):
    return {step: row["data"] for step, row in metrics(config).items()}


def losses(config):
    return [row["loss"] for row in metrics(config).values()]


def test_two_ranks_in_bfloat16_train_like_one(config, tmp_path):
    config = replace(config, max_steps=6, parallel=ParallelConfig(precision="bf16"))
    run_training(config, device="cpu")
    two = replace(config, directory=str(tmp_path / "two"))
    spawn(2, tmp_path, two)
    assert losses(two) == pytest.approx(losses(config), rel=2e-3)
    assert taken(two) == taken(config)
    assert [row["tokens"] for row in metrics(two).values()] == [
        row["tokens"] for row in metrics(config).values()
    ]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_ranks_goes_on_with_the_same_global_batches(
    config, tmp_path, before, after
):
    config = replace(config, parallel=ParallelConfig(precision="fp32"))
    run_training(config, device="cpu")
    changed = replace(config, directory=str(tmp_path / "changed"))
    spawn(before, tmp_path, replace(changed, max_steps=5))
    spawn(after, tmp_path, changed)
    assert taken(changed) == taken(config) and len(taken(config)) == 12
    # max_steps shapes the learning rate: the first five steps were another schedule's
    assert losses(changed)[:2] == pytest.approx(losses(config)[:2], rel=1e-5)
    [summary] = read_summaries(f"{config.data.sources[0].run}/feedback").summaries[:1]
    assert summary.report.steps == 12


def test_a_profile_is_a_trace_of_the_steps_after_the_warm_up(config):
    telemetry = replace(config.telemetry, profile_steps=2)
    run_training(replace(config, max_steps=9, telemetry=telemetry), device="cpu")
    [path] = Path(config.directory, "profile").iterdir()
    assert path.name == "trace-00000007.json.gz"
    names = Counter(
        event["name"] for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    )
    steps = 2  # each updates once
    assert names["Optimizer.step#AdamW.step"] == steps


def test_a_training_too_short_for_a_profile_says_so(config, caplog):
    telemetry = replace(config.telemetry, profile_steps=2)
    run_training(replace(config, max_steps=6, telemetry=telemetry), device="cpu")
    assert "no profile: it needs 7 steps, 6 were taken" in caplog.text
    assert not Path(config.directory, "profile").exists()


@pytest.mark.parametrize("reduction", ["each_micro_batch", "last_micro_batch"])
def test_gradients_reduced_at_once_or_one_by_one_are_the_same_training(config, tmp_path, reduction):
    run_training(config, device="cpu")
    other = replace(
        config,
        directory=str(tmp_path / "other"),
        parallel=replace(config.parallel, gradient_reduction=reduction),
    )
    run_training(other, device="cpu")
    for auto, named in zip(metrics(config).values(), metrics(other).values(), strict=True):
        assert auto["loss"] == pytest.approx(named["loss"], rel=1e-5)


@pytest.mark.parametrize("skip_spikes", [False, True])
def test_a_training_is_the_same_whether_figures_are_read_late_or_at_once(
    config, tmp_path, monkeypatch, skip_spikes
):
    monkeypatch.setattr(loop, "SpikeDetector", partial(loop.SpikeDetector, sigmas=-1.0, window=3))
    evaluation = EvaluationConfig(every_steps=5)
    config = replace(config, skip_spikes=skip_spikes, evaluation=evaluation)
    run_training(config, device="cpu")
    late = replace(config, directory=str(tmp_path / "late"))
    monkeypatch.setattr(loop, "LATE", {"cpu"})
    run_training(late, device="cpu")
    compared = ("loss", "grad_norm", "lr", "tokens", "spike", "sources", "data")
    for at_once, read_late in zip(metrics(config).values(), metrics(late).values(), strict=True):
        assert all(at_once[key] == read_late[key] for key in compared)
    assert any(row["spike"] for row in metrics(config).values())
    found, expected = saved_by(late), saved_by(config)
    assert found.step == expected.step and found.extra["losses"] == expected.extra["losses"]


def test_the_figures_of_a_step_are_read_when_the_next_one_is_queued(config, monkeypatch):
    """So a GPU has work while Python reads; but before a checkpoint they are read at once."""
    monkeypatch.setattr(loop, "LATE", {"cpu"})
    events, queue_gradients, read = [], loop.queue_gradients, loop.StepFigures.read
    save = loop.Training._save

    def queue(*args, **options):
        events.append("queue")
        return queue_gradients(*args, **options)

    monkeypatch.setattr(loop, "queue_gradients", queue)
    monkeypatch.setattr(loop.StepFigures, "read", lambda self: events.append("read") or read(self))
    monkeypatch.setattr(loop.Training, "_save", lambda self: events.append("save") or save(self))
    checkpoints = replace(config.checkpoint, every_steps=3)
    run_training(replace(config, max_steps=5, checkpoint=checkpoints), device="cpu")
    assert " ".join(events) == ("queue queue read queue read read save queue queue read read save")


def rank_with_a_gpu(number, ranks, folder, config):
    loop.Training._own_health = lambda self: Health(number, 9, 0.9 - number / 10, 70, None)
    rank(number, ranks, folder, config)


def test_the_worst_gpu_of_all_ranks_is_told_and_whose_it_is(config, tmp_path):
    run_ranks(rank_with_a_gpu, 2, tmp_path, replace(config, max_steps=3), ranks=2)
    [summary] = read_summaries(f"{config.data.sources[0].run}/feedback").summaries
    assert summary.report.health == Health(1, 9, 0.8, 70, None)
    assert summary.report.health_ranks == {
        "memory_used_bytes": 1,
        "memory_total_bytes": 0,
        "utilisation": 1,
        "temperature_celsius": 0,
    }
    assert [row["utilisation"] for row in metrics(config).values()] == [0.8] * 3


def test_a_rank_looks_at_its_own_gpu(monkeypatch):
    gpus = {3: SimpleNamespace(uuid="11")}
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", gpus.__getitem__)
    monkeypatch.setattr(loop, "gpu_health", lambda uuid: Health(temperature_celsius=int(uuid)))
    assert loop.Training._own_health(SimpleNamespace(device="cuda")).temperature_celsius == 11
    assert loop.Training._own_health(SimpleNamespace(device="cpu")) is None


# --- what a slow disk and a slow save do ----------------------------------------------------------


def test_a_slow_reader_raises_data_wait_and_nothing_else(config, tmp_path, monkeypatch):
    run_training(config, device="cpu")
    monkeypatch.setattr(
        "trainer.data.rows.read_batch",
        lambda places, read=read_batch: time.sleep(0.2) or read(places),
    )
    slow = replace(config, directory=str(tmp_path / "slow"))
    run_training(slow, device="cpu")
    for quick, waited in zip(metrics(config).values(), metrics(slow).values(), strict=True):
        assert all(
            quick[key] == waited[key]
            for key in ("loss", "grad_norm", "tokens", "sources", "data", "lr")
        )
    last = metrics(slow)[12]
    wait = sum(row["seconds"].get("data_wait", 0) for row in metrics(slow).values())
    others = sum(sum(row["seconds"].values()) for row in metrics(slow).values()) - wait
    assert last["data_wait_share"] > metrics(config)[12]["data_wait_share"]
    assert wait > 12 * 2 * 0.2 - others  # what reading took and computing did not hide


def test_steps_go_on_while_a_checkpoint_is_written(config, monkeypatch):
    hashes, trained, steps = checkpoint.hash_files, threading.Event(), []

    def slow(*args):
        assert trained.wait(600)
        return hashes(*args)

    def counted(self, batches, update=loop.Training._take_step):
        steps.append((self.step, is_saving(self.checkpoints)))
        if self.step == 6:
            trained.set()
        return update(self, batches)

    config = replace(config, checkpoint=CheckpointConfig(every_steps=4))
    monkeypatch.setattr(checkpoint, "hash_files", slow)
    monkeypatch.setattr(loop.Training, "_take_step", counted)
    run_training(config, device="cpu")
    # the save after step 4 is in flight at the start of steps 4 to 6 (counted from 0), and waited
    # for by none of them
    assert [step for step, in_flight in steps if in_flight][:3] == [4, 5, 6]
    assert (
        checkpoint.Checkpoints(f"{config.directory}/checkpoints", config.checkpoint).latest().step
        == 12
    )


# --- supply that comes late -----------------------------------------------------------------------


def test_a_trainer_that_waits_says_so_and_goes_on_with_the_next_generation(config, monkeypatch):
    run = Path(config.data.sources[0].run)
    said = []
    monkeypatch.setattr(loader, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(
        loop.Writer,
        "write",
        lambda self, report, write=Writer.write: said.append(report) or write(self, report),
    )
    publish_after = iter([None] * 3)

    def poll(self, poll=loader.BatchLoader.poll):
        if next(publish_after, True):
            publish(run, 8, first=40)
        return poll(self)

    monkeypatch.setattr(loader.BatchLoader, "poll", poll)
    data = replace(config.data, at_end="wait")
    result = run_training(
        replace(
            config, max_steps=6, data=data, telemetry=replace(config.telemetry, every_seconds=0.001)
        ),
        device="cpu",
    )
    assert (result.steps, result.reason) == (6, "step 6 was reached")
    assert [report.steps for report in said if report.state == "waiting"] == [5, 5, 5]
    assert said[-1].sources[str(run)].rows == {"gen-0001": 40, "gen-0002": 8}
    assert said[-1].budget == 0 and said[0].budget == 6 * 8 * 16


def test_a_file_asks_a_run_to_stop_and_what_is_left_of_the_budget_is_told(config, monkeypatch):
    def asked(self, batches, update=loop.Training._take_step):
        if self.step == 3:
            (self.folder / "stop").touch()
        return update(self, batches)

    monkeypatch.setattr(loop.Training, "_take_step", asked)
    result = run_training(config, device="cpu")
    assert (result.steps, result.reason) == (4, "it was asked to stop")
    [summary] = read_summaries(f"{config.data.sources[0].run}/feedback").summaries
    assert summary.report.budget == 8 * 8 * 16


def test_a_machine_about_to_be_taken_away_is_saved_for_and_training_goes_on(config):
    config = replace(config, checkpoint=CheckpointConfig(every_steps=100, keep_last=5))
    with ExitStack() as opened:
        result = loop.Training(config, opened, device="cpu", preempted=lambda: True).run()
    assert (result.steps, result.reason) == (12, "step 12 was reached")
    assert sorted(path.name for path in Path(config.directory, "checkpoints").iterdir()) == [
        "step-00000010",
        "step-00000012",
    ]


# --- evaluation -----------------------------------------------------------------------------------


def test_held_out_loss_is_told_and_picks_the_best_checkpoint(config, tmp_path):
    run = tmp_path / "held"
    publish(run, 40, held_out=4)
    every = replace(
        config,
        data=replace(config.data, sources=(SourceConfig(str(run)),)),
        evaluation=EvaluationConfig(
            every_steps=4, held_out={"first": HeldOutConfig(str(run), rows=1)}
        ),
    )
    run_training(every, device="cpu")
    rows = metrics(every)
    told = {step: row["held_out/loss"] for step, row in rows.items() if "held_out/loss" in row}
    assert list(told) == [4, 8, 12] and told[12] < told[4]
    saved = checkpoint.Checkpoints(f"{every.directory}/checkpoints", every.checkpoint).latest()
    assert (saved.step, saved.metric) == (12, told[12])
    [summary] = read_summaries(f"{run}/feedback").summaries
    first = rows[12]["held_out/first/loss"]
    assert summary.report.held_out == {"sources": told[12], "first": first} and first != told[12]
    assert rows[8]["seconds"]["evaluation"] > 0
