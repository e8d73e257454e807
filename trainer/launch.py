"""Start a training: by Ray Train, on this machine or a cluster; or in this process, alone or as one
rank of torchrun.

The one file that knows Ray Train. Workers are restarted from the last checkpoint when one dies. Of
what Ray offers, its own checkpoints and reports are not used: ours lie in the training's folder,
and its reports are a barrier that keeps rank 0's alone.
"""

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stages.formats.errors import ConfigError
from trainer.config import STOP, TrainConfig
from trainer.data.order import valid_rank_counts

if TYPE_CHECKING:
    from trainer.telemetry.why_step import RowDocuments


class Ended(NamedTuple):
    """How a training ended: the steps in its state, the loss of the last in nats a token, why it
    ended, and the records of its steps: None where another rank or machine has them.
    """

    steps: int
    loss: float
    reason: str
    metrics: Path | None


class TrainingError(RuntimeError):
    """The training could not go on; what its checkpoints hold stays."""


class FinalError(TrainingError):
    """One that all ranks met alike, and would meet again."""


def launch(config: TrainConfig, *, on_ray: bool) -> Ended:
    """Train, on GPUs where there are any. Ranks of torchrun do not use Ray.

    ConfigError for a config that is wrong in itself, TrainingError for data or a model that is at
    fault.
    """
    try:
        import torch
    except ImportError:
        raise ConfigError("training needs PyTorch: pip install 'gristmill[train]'") from None
    from trainer.telemetry.sinks import METRICS

    ranked = {"RANK", "WORLD_SIZE"} <= os.environ.keys()  # by torchrun
    leads = not ranked or os.environ["RANK"] == "0"
    folder = Path(config.directory)
    if leads:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / STOP).unlink(missing_ok=True)  # meant for an earlier run
    ended = (
        _on_ray(config)
        if on_ray and not ranked
        else _here(config, "cuda" if torch.cuda.is_available() else "cpu")
    )
    metrics = folder / METRICS
    return Ended(**ended, metrics=metrics if leads and metrics.exists() else None)


def why_step(directory: Path, step: int) -> "list[RowDocuments]":
    """The rows that a step was taken on, and their documents (see trainer.blame).

    TrainingError when they cannot be told.
    """
    from trainer.telemetry import why_step as blame

    try:
        return blame.why_step(directory, step)
    except (LookupError, OSError, ValueError) as error:
        raise TrainingError(str(error)) from error


def export(training: str, output: str, *, step: int | None) -> int:
    """Write a checkpoint's weights, the newest or that of `step`, for transformers; the step.

    `training` is its directory, or the folder or URL of its checkpoints. TrainingError if there is
    none or it is damaged.
    """
    from trainer.checkpoint_files import CheckpointError, committed
    from trainer.export import export_hugging_face
    from trainer.telemetry.why_step import CONFIG

    folder = training
    if Path(training, CONFIG).exists():
        config = json.loads(Path(training, CONFIG).read_bytes())
        folder = config["checkpoint"]["folder"] or f"{training}/checkpoints"
    try:
        found = committed(folder)
        chosen = max(found, default=None) if step is None else step
        if chosen not in found:
            raise TrainingError(
                f"{folder} holds checkpoints of the steps {list(found)}{f', none of {step}' if step else ''}"
            )
        export_hugging_face(found[chosen], output)
    except (CheckpointError, ValueError) as error:
        raise TrainingError(str(error)) from error
    return chosen


def _here(
    config: TrainConfig, device: str, preempted: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """Train as this rank: how it ended, as plain values."""
    from stages.storage.catalog import GenerationError
    from trainer.checkpoint_files import CheckpointError
    from trainer.loop import Diverged, Training

    with ExitStack() as opened:
        try:
            training = Training(config, opened, device=device, preempted=preempted)
        except ValueError as error:
            raise FinalError(str(error)) from error
        except (
            CheckpointError,
            OSError,
        ) as error:  # a store that does not answer may do so the next time
            raise TrainingError(str(error)) from error
        try:
            return training.run()._asdict()
        except (Diverged, ConfigError) as error:
            raise FinalError(str(error)) from error
        except (CheckpointError, GenerationError, OSError) as error:
            raise TrainingError(str(error)) from error


# --- Ray Train ------------------------------------------------------------------------------------


def _on_ray(config: TrainConfig) -> dict[str, Any]:
    """Train by Ray Train on the cluster of $RAY_ADDRESS, as `ray job submit` sets it, else on this
    machine.
    """
    counts, on_gpus = worker_counts(config), _start_ray(config.ray.gpus)
    _check_room(config, counts[0], on_gpus)
    import ray.train

    api: Any = ray.train  # of whose two interfaces type checkers see the old one
    sinks = tuple(sink for sink in config.telemetry.sinks if sink != "console")  # see _shown
    quiet = replace(config, telemetry=replace(config.telemetry, sinks=sinks))
    trainer = _trainer(counts)(
        _worker,
        train_loop_config={"config": quiet, "device": "cuda" if on_gpus else "cpu"},
        scaling_config=api.ScalingConfig(
            num_workers=counts[0] if len(counts) == 1 else (counts[0], counts[-1]),
            use_gpu=on_gpus,
            resources_per_worker={"CPU": config.ray.cpus_per_worker}
            | ({"GPU": 1} if on_gpus else {}),
        ),
        run_config=api.RunConfig(
            name="ray",
            storage_path=config.directory,
            failure_config=api.FailureConfig(config.ray.max_failures),
        ),
    )
    with _shown(config), _stoppable(config):
        try:
            ended: dict[str, Any] = trainer.fit().return_value
        except api.TrainingFailedError as error:
            raise TrainingError(_cause(error)) from error
    if "fault" in ended:
        raise TrainingError(ended["fault"])
    return ended


def worker_counts(config: TrainConfig) -> list[int]:
    """The numbers of workers that Ray may take, rising.

    ConfigError when none in the range divides the global batch.
    """
    least, most, data = (
        config.ray.min_workers or config.ray.workers,
        config.ray.workers,
        config.data,
    )
    fitting = valid_rank_counts(data.global_batch_rows, data.micro_batch_rows)
    counts = [count for count in fitting if least <= count <= most]
    if not counts:
        raise ConfigError(
            f"ray.workers = {most}, ray.min_workers = {config.ray.min_workers}: {data.global_batch_rows} rows in micro-batches "
            f"of {data.micro_batch_rows} divide among {', '.join(map(str, fitting))} workers; take one of these"
        )
    return counts


@contextmanager
def _stoppable(config: TrainConfig) -> Iterator[None]:
    """SIGTERM and Ctrl-C of this process ask the workers to save and end; it then waits for them,
    unless it is asked again.
    """

    def ask(*_: object) -> None:
        Path(config.directory, STOP).touch()
        print("the workers are asked to save and to end; once more: end at once", file=sys.stderr)
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _shown(config: TrainConfig) -> Iterator[None]:
    """The figures of the workers on this console: their own output is lost among Ray's."""
    from trainer.telemetry.sinks import METRICS, Console, follow_metrics

    ended = threading.Event()
    thread = threading.Thread(
        target=follow_metrics, args=(Path(config.directory, METRICS), Console(), ended)
    )
    if "console" in config.telemetry.sinks:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if thread.ident is not None:
            thread.join()


def _check_room(config: TrainConfig, workers: int, on_gpus: bool) -> None:
    """Ray would wait without a word for workers that this machine has no room for; a cluster may
    grow.
    """
    import ray

    if os.environ.get("RAY_ADDRESS"):
        return
    room: Any = ray.cluster_resources()  # type: ignore[no-untyped-call]
    for name, each in (("CPU", config.ray.cpus_per_worker), ("GPU", float(on_gpus))):
        if workers * each > room.get(name, 0):
            raise ConfigError(
                f"{workers} workers want {workers * each:g} {name}, and there are {room.get(name, 0):g}; change the section ray"
            )


def _start_ray(gpus: str) -> bool:
    """Connect or start; whether workers take GPUs."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault(
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600"
    )  # importing torch can take longer than the 60 s given
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    import ray

    address = os.environ.get("RAY_ADDRESS")
    local: dict[str, Any] = (
        {} if address else {"include_dashboard": False, "object_store_memory": 200_000_000}
    )
    if not ray.is_initialized():
        ray.init(
            address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **local
        )
    return gpus == "yes" or (gpus == "auto" and bool(ray.cluster_resources().get("GPU")))  # type: ignore[no-untyped-call]


def _trainer(counts: Sequence[int]) -> Any:
    """TorchTrainer, but for what its public interface leaves no room for; with Ray 2.60 this is
    where it lies.
    """
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy

    class Dividing(ElasticScalingPolicy):
        """Ray would take any number of workers in a range."""

        def _count_possible_workers(self, reserved_resources: Any) -> int:
            room = super()._count_possible_workers(reserved_resources)
            return max((count for count in counts if count <= room), default=0)

    class Trainer(TorchTrainer):
        def _initialize_and_run_controller(self, **parts: Any) -> Any:
            scaling: Any = self.scaling_config
            if scaling.elasticity_enabled:
                parts["scaling_policy"] = Dividing(scaling)
            return super()._initialize_and_run_controller(**parts)  # type: ignore[misc]

        def _register_sigint_handler(self, controller: Any) -> None:
            """Ray's would end the workers before they have saved."""

    return Trainer


def _worker(settings: dict[str, Any]) -> dict[str, Any]:
    """What each worker runs. What another start would meet again is returned: to raise it would
    start all anew.
    """
    import ray.train
    import torch

    if settings["device"] == "cpu":  # Ray allows torch a thread for each CPU reserved, which is one
        torch.set_num_threads(
            max(1, (os.cpu_count() or 1) // ray.train.get_context().get_local_world_size())
        )
    try:
        return _here(
            settings["config"],
            settings["device"],
            lambda: ray.train.get_preemption_info() is not None,
        )
    except FinalError as error:
        return {"fault": str(error)}


def _cause(error: Exception) -> str:
    """What went wrong first, without Ray's frames; ranks that lost their neighbours say so only
    after one that has a reason.
    """
    failures = list(getattr(error, "worker_failures", {}).values()) or [error]
    ours = [failure for failure in failures if "TrainingError" in repr(failure)]
    return str((ours or failures)[0])
