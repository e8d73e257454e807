"""Launching: a config becomes a training, in this process or by Ray Train, which starts dead
workers again.
"""

import fcntl
import json
import os
import re
import shutil
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from pipeline.config.train import load_training
from stages.formats.errors import ConfigError
from tests.support.live_training import metric_records
from tests.support.processes import descendants
from trainer.config import DataConfig, RayConfig, TrainConfig
from trainer.launch import cuda_environment, worker_counts


@pytest.mark.parametrize(
    ("rows", "micro", "ray", "counts"),
    [
        (8, 2, RayConfig(workers=4), [4]),
        (8, 2, RayConfig(workers=4, min_workers=1), [1, 2, 4]),
        (48, 4, RayConfig(workers=5, min_workers=2), [2, 3, 4]),
        (8, 8, RayConfig(), [1]),
    ],
)
def test_only_counts_that_divide_the_global_batch_are_taken(rows, micro, ray, counts):
    config = TrainConfig(
        "t", data=DataConfig(global_batch_rows=rows, micro_batch_rows=micro), ray=ray
    )
    assert worker_counts(config) == counts


@pytest.mark.parametrize("ray", [RayConfig(workers=3), RayConfig(workers=7, min_workers=5)])
def test_a_range_without_such_a_count_is_refused_with_those_that_do(ray):
    with pytest.raises(
        ConfigError,
        match="8 rows in micro-batches of 2 divide among 1, 2, 4 workers; take one of these",
    ):
        worker_counts(
            TrainConfig("t", data=DataConfig(global_batch_rows=8, micro_batch_rows=2), ray=ray)
        )


# --- in this process ------------------------------------------------------------------------------

train = pytest.mark.train


@pytest.fixture
def file(tmp_path) -> Path:
    """A config of 40 rows, twenty times over, in steps of 8: 100 steps."""
    pytest.importorskip("torch")
    from tests.support.shards import publish

    publish(tmp_path / "run", 40)
    text = f"""
        directory = "{tmp_path}/train"
        model = {{vocab_size = 64, dim = 16, num_layers = 1, num_heads = 2, num_kv_heads = 1, ffn_dim = 32}}
        parallel.precision = "fp32"
        schedule.warmup_steps = 2
        checkpoint = {{every_steps = 10, asynchronous = false}}
        telemetry.sinks = ["jsonl"]
        ray = {{workers = 2, cpus_per_worker = 0.5}}
        [data]
        global_batch_rows = 8
        micro_batch_rows = 4
        at_end = "repeat"
        max_epochs = 20
        [[data.sources]]
        run = "{tmp_path}/run"
    """
    (tmp_path / "train.toml").write_text("\n".join(line.strip() for line in text.splitlines()))
    return tmp_path / "train.toml"


@train
def test_a_training_is_launched_and_exported(file, tmp_path):
    from trainer.launch import TrainingError, export, launch

    ended = launch(load_training(file, ["max_steps=4", "checkpoint.every_steps=2"]), on_ray=False)
    assert (ended.steps, ended.reason) == (
        4,
        "step 4 was reached",
    ) and ended.metrics == tmp_path / "train" / "metrics.jsonl"
    assert export(f"{tmp_path}/train", f"{tmp_path}/hf", step=2) == 2
    assert export(f"{tmp_path}/train/checkpoints", f"{tmp_path}/newest", step=None) == 4
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "llama"
    with pytest.raises(
        TrainingError,
        match=r"train/checkpoints holds checkpoints of the steps \[2, 4\], none of 3$",
    ):
        export(f"{tmp_path}/train", f"{tmp_path}/other", step=3)
    assert export(f"{tmp_path}/train", f"{tmp_path}/again", step=None) == 4
    with pytest.raises(TrainingError, match=r"nowhere holds checkpoints of the steps \[\]$"):
        export(f"{tmp_path}/nowhere", f"{tmp_path}/other", step=None)


@train
def test_the_command_prints_how_a_training_ended_and_draws_its_page(file, tmp_path):
    from typer.testing import CliRunner

    from pipeline.__main__ import app

    result = CliRunner().invoke(app, ["train", str(file), "max_steps=2", "--no-ray"])
    assert result.exit_code == 0, result.output
    assert re.search(r"2 steps, loss \d+\.\d{4} nats a token; step 2 was reached", result.stdout)
    page = tmp_path / "train" / "training.html"
    assert f"plot {page}" in result.stdout and 'class="line c0"' in page.read_text()


@train
def test_a_request_to_stop_that_an_earlier_run_has_left_is_none(file, tmp_path):
    from trainer.launch import launch

    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "stop").touch()
    assert launch(load_training(file, ["max_steps=3"]), on_ray=False).steps == 3


@train
def test_a_folder_has_one_training_at_a_time_and_nothing_of_another_one(file, tmp_path):
    from trainer.launch import TrainingError, launch

    launch(load_training(file, ["max_steps=4"]), on_ray=False)
    with open(tmp_path / "train" / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(TrainingError, match="train: another training is at work here"):
            launch(load_training(file, ["max_steps=6"]), on_ray=False)
    shutil.rmtree(tmp_path / "train" / "checkpoints")
    launch(load_training(file, ["max_steps=2", "data.shuffle_seed=3"]), on_ray=False)
    assert [record["step"] for record in metric_records(tmp_path / "train")] == [1, 2]
    assert (tmp_path / "train" / "metrics.jsonl.old").exists()


@train
def test_a_training_that_has_reached_its_end_is_left_as_it_is(file, tmp_path):
    from trainer.launch import launch
    from trainer.telemetry.feedback import read_summaries

    first = launch(load_training(file, ["max_steps=4", "telemetry.sinks=[]"]), on_ray=False)
    again = launch(load_training(file, ["max_steps=3"]), on_ray=False)
    assert (again.steps, again.loss, again.reason) == (
        4,
        first.loss,
        "step 4 had been reached before",
    )
    [summary] = read_summaries(f"{tmp_path}/run/feedback").summaries
    assert (summary.report.budget, summary.report.restarts) == (0, 1)
    assert first.metrics.exists()  # metrics.jsonl is written whatever the sinks


@train
@pytest.mark.parametrize("rank_fault", ["telemetry.name='no name'", "model.vocab_size=20"])
def test_what_only_the_first_step_or_rank_0_can_know_is_told_in_a_line(file, rank_fault):
    from trainer.launch import TrainingError, launch

    expected = r"a trainer is named by letters|at most model.vocab_size = 20 tokens, found 64"
    with pytest.raises(TrainingError, match=expected):
        launch(load_training(file, [rank_fault]), on_ray=False)


# --- Ray Train ------------------------------------------------------------------------------------


def workers() -> list[int]:
    """Process ids of the workers of this test's Ray Train."""
    return descendants("ray::RayTrainWorker")


def when(folder: Path, step: int, action) -> threading.Thread:
    """Do something once the training has told of this step."""

    def watch() -> None:
        while not any(record["step"] >= step for record in metric_records(folder)):
            time.sleep(0.05)
        action()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@train
def test_rays_private_interface_is_the_one_that_we_change():
    """Fails with a new Ray: the message says what changed and what to do."""
    from trainer.launch import _changed_interface, _private_parts, interface_changes

    changes = interface_changes(*_private_parts())
    assert not changes, _changed_interface(changes)


class OtherTrainer:
    def _initialize_and_run_controller(self, parts): ...


class OtherPolicy:
    def __init__(self, scaling_config): ...

    def _count_possible_workers(self, reserved_resources, group): ...


@train
@pytest.mark.parametrize(
    "changed, message",
    [
        ({"policy": None}, "the class of the policy is not where it was"),
        (
            {"trainer": OtherTrainer},
            r"OtherTrainer._initialize_and_run_controller takes \['parts'\], and took "
            r"\['controller_init_kwargs'\]; OtherTrainer._register_sigint_handler is missing",
        ),
        (
            {"policy": OtherPolicy},
            r"OtherPolicy._count_possible_workers takes \['reserved_resources', 'group'\], and",
        ),
        ({"controller": OtherPolicy}, "OtherPolicy takes no scaling_policy any more"),
    ],
)
def test_another_private_interface_of_ray_is_an_error_that_says_what_to_do(
    monkeypatch, changed, message
):
    pytest.importorskip("ray.train")
    from trainer import launch

    parts = launch._private_parts()._replace(**changed)
    monkeypatch.setattr(launch, "_private_parts", lambda: parts)
    expected = rf"^Ray [0-9.]+ has another .*: {message}.*\. Install 'ray\[train\]~=2.60.0', or"
    with pytest.raises(launch.TrainingError, match=expected):
        launch._trainer_class([1])


@train
@pytest.mark.ray
@pytest.mark.kill
def test_a_killed_rank_costs_a_restart_and_no_sample(file, tmp_path, ray_session):
    from trainer.launch import launch
    from trainer.telemetry.feedback import read_summaries

    undisturbed = launch(load_training(file, [f"directory={tmp_path}/undisturbed"]), on_ray=True)
    killer = when(tmp_path / "train", 25, lambda: os.kill(workers()[-1], signal.SIGKILL))
    ended = launch(load_training(file, ["checkpoint.asynchronous=true"]), on_ray=True)
    killer.join()
    assert (ended.steps, ended.reason, ended.loss) == (100, "the data ended", undisturbed.loss)
    told, expected = (
        metric_records(tmp_path / "train"),
        {record["step"]: record for record in metric_records(tmp_path / "undisturbed")},
    )
    assert len(told) > 100  # steps since the last checkpoint came again
    exact = ("loss", "grad_norm", "lr", "tokens", "sources", "data")
    assert all(record[key] == expected[record["step"]][key] for record in told for key in exact)
    drawn = Counter()
    for record in {record["step"]: record for record in told}.values():
        [[[name, epoch, start, stop]]] = record["data"].values()
        drawn.update((name, epoch, place) for place in range(start, stop))
    assert drawn == {("gen-0001", epoch, place): 1 for epoch in range(20) for place in range(40)}
    reports = {
        summary.trainer: summary.report
        for summary in read_summaries(f"{tmp_path}/run/feedback").summaries
    }
    assert (reports["train"].restarts, reports["undisturbed"].restarts) == (1, 0)
    assert (
        reports["train"].tokens_total
        == reports["undisturbed"].tokens_total
        == reports["undisturbed"].tokens_processed
    )
    # what was thrown away is counted as far as it had been told before the kill, which it need not
    # have been
    assert reports["train"].tokens_processed >= reports["train"].tokens_total


@train
@pytest.mark.ray
@pytest.mark.kill
def test_a_fault_that_all_ranks_meet_ends_the_run_and_is_not_tried_again(
    file, tmp_path, ray_session
):
    from trainer.launch import TrainingError, launch

    # which rank 0 alone can know
    with pytest.raises(TrainingError, match="a trainer is named by letters"):
        launch(
            load_training(file, ["ray.max_failures=-1", "telemetry.name='no name'"]), on_ray=True
        )
    next((tmp_path / "run").rglob("*.mds")).unlink()
    with pytest.raises(
        TrainingError,
        match=r"generation gen-0001: part-0000\d/shard\.00000\.mds: file: expected present, found missing",
    ):
        # which would be tried for ever
        launch(load_training(file, ["ray.max_failures=-1"]), on_ray=True)
    with pytest.raises(
        ConfigError, match=r"2 workers need 200 CPU, and there are \d+; change the section ray"
    ):
        launch(load_training(file, ["ray.cpus_per_worker=100"]), on_ray=True)


@train
@pytest.mark.ray
@pytest.mark.kill
def test_an_elastic_run_takes_what_the_cluster_has_and_saves_when_it_is_told_to_end(
    file, tmp_path, ray_session
):
    from trainer.launch import launch

    seen = []

    def stop() -> None:
        seen.append(len(workers()))
        os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    import ray

    # there is room for 3 workers, among which 4 micro-batches do not divide
    each = 0.3 * ray.cluster_resources()["CPU"]
    stopper = when(tmp_path / "train", 5, stop)
    ended = launch(
        load_training(
            file,
            [
                "ray.min_workers=1",
                "ray.workers=4",
                f"ray.cpus_per_worker={each}",
                "data.micro_batch_rows=2",
            ],
        ),
        on_ray=True,
    )
    stopper.join()
    assert seen == [2] and ended.reason == "it was asked to stop" and ended.steps < 100
    assert signal.getsignal(signal.SIGTERM) == handler
    assert (tmp_path / "train" / "checkpoints" / f"step-{ended.steps:08}" / "meta.json").exists()


def test_what_the_user_has_set_for_cuda_stays(monkeypatch):
    monkeypatch.setattr(os, "environ", {})  # a training in this process has set them
    found = cuda_environment("run")
    assert found["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert found["TORCH_FR_DUMP_TEMP_FILE"] == f"{Path.cwd()}/run/flight_recorder/rank_"
    monkeypatch.setitem(os.environ, "PYTORCH_CUDA_ALLOC_CONF", "backend:native")
    monkeypatch.setitem(os.environ, "TORCH_FR_BUFFER_SIZE", "7")
    assert cuda_environment("run").keys() == {
        "TORCH_FR_DUMP_TEMP_FILE",
        "TORCH_NCCL_DUMP_ON_TIMEOUT",
    }
