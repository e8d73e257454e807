"""Start a training: with Ray Train, in this process alone, or as one rank of torchrun.

The only file that imports ray.train. Ray restarts workers from the last checkpoint when one dies.
Its own checkpoints and reports are not used: ours are in the training's folder, and Ray's reports
are a barrier that keeps only rank 0's.
"""

import importlib
import inspect
import logging
import math
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
    """How a training ended: steps, loss of the last in nats per token, and why.

    `metrics` is the file of step records, None if another rank or machine has it.
    """

    steps: int
    loss: float
    reason: str
    metrics: Path | None


class TrainingError(RuntimeError):
    """The training could not go on; its checkpoints remain."""


class FinalError(TrainingError):
    """An error of all ranks that a restart would meet again."""


def launch(config: TrainConfig, *, on_ray: bool) -> Ended:
    """Train, on GPUs if there are any. Ranks of torchrun do not use Ray.

    ConfigError for a wrong config, TrainingError for a fault of the data or the model.
    """
    environment = cuda_environment(config.directory)
    os.environ.update(environment)  # before CUDA starts
    try:
        import torch
    except ImportError:
        raise ConfigError("training needs PyTorch: pip install 'gristmill[train]'") from None
    from trainer.telemetry.sinks import METRICS

    is_rank = {"RANK", "WORLD_SIZE"} <= os.environ.keys()  # set by torchrun
    leads = os.environ.get("RANK", "0") == "0"
    folder = Path(config.directory)
    if leads:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / STOP).unlink(missing_ok=True)  # left by an earlier run
    if on_ray and not is_rank:
        result = _train_on_ray(config, environment)
    else:
        result = _train_as_rank(config, "cuda" if torch.cuda.is_available() else "cpu")
    metrics = folder / METRICS
    return Ended(**result, metrics=metrics if leads and metrics.exists() else None)


def why_step(directory: Path, step: int) -> "list[RowDocuments]":
    """The rows of a step and their documents (see trainer.telemetry.why_step).

    TrainingError if they are unknown.
    """
    from trainer.telemetry import why_step as module

    with _raised_as(TrainingError, LookupError, OSError, ValueError):
        return module.why_step(directory, step)


def export(training: str, output: str, *, step: int | None, **options: Any) -> int:
    """Write the weights of a checkpoint, the newest or that of `step`, for transformers; its step.

    `training` is the directory of a training, or the folder or URL of its checkpoints. `options`
    are those of `export_hugging_face`. TrainingError if there is no such checkpoint or it is
    damaged.
    """
    from trainer.checkpoint_files import CheckpointError, checkpoint_folder, committed
    from trainer.model.hugging_face import export_hugging_face

    folder = checkpoint_folder(training)
    with _raised_as(TrainingError, CheckpointError, ValueError):
        folders = committed(folder)
        if step is None:
            step = max(folders, default=None)
        if step not in folders:
            missing = "" if step is None else f", none of {step}"
            raise TrainingError(f"{folder} holds checkpoints of the steps {list(folders)}{missing}")
        export_hugging_face(folders[step], output, **options)
        return step


def cuda_environment(directory: str) -> dict[str, str]:
    """Environment variables for ranks on GPUs, which CUDA and NCCL read when they start.

    The allocator's segments can grow: micro-batches need buffers of many sizes. If a collective
    times out, each rank writes its last 2,000 to DIRECTORY/flight_recorder, which
    `python -m torch.distributed.flight_recorder.fr_trace` reads. What the user has set stays.
    """
    settings = {
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_FR_DUMP_TEMP_FILE": f"{Path(directory).absolute()}/flight_recorder/rank_",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }
    if "PYTORCH_CUDA_ALLOC_CONF" in os.environ:  # the older name of the same
        del settings["PYTORCH_ALLOC_CONF"]
    return {name: value for name, value in settings.items() if name not in os.environ}


@contextmanager
def _raised_as(kind: type[TrainingError], *errors: type[Exception]) -> Iterator[None]:
    try:
        yield
    except errors as error:
        raise kind(str(error)) from error


def _train_as_rank(
    config: TrainConfig, device: str, preempted: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """Train in this process; the fields of loop.Result."""
    from stages.storage.catalog import GenerationError
    from trainer.checkpoint_files import CheckpointError
    from trainer.loop import Diverged, Training

    if device == "cuda":
        (Path(config.directory) / "flight_recorder").mkdir(parents=True, exist_ok=True)
    with (
        ExitStack() as resources,
        # a store may answer the next time
        _raised_as(TrainingError, CheckpointError, GenerationError, OSError),
    ):
        with _raised_as(FinalError, ValueError):
            training = Training(config, resources, device=device, preempted=preempted)
        with _raised_as(FinalError, Diverged, ConfigError):
            return training.run()._asdict()


# --- Ray Train ------------------------------------------------------------------------------------


def _train_on_ray(config: TrainConfig, environment: dict[str, str]) -> dict[str, Any]:
    """Train on the cluster of $RAY_ADDRESS, which `ray job submit` sets, or on this machine.

    `environment` is for the workers, wherever they start.
    """
    counts, on_gpus = worker_counts(config), _start_ray(config.ray.gpus)
    _check_resources(config, counts[0], on_gpus)
    import ray.train
    from ray.train.torch import TorchConfig

    from trainer.model.parallel import backend_of

    api: Any = ray.train  # type checkers see the older of its two interfaces
    # the console is this process's, see _console_metrics
    sinks = tuple(sink for sink in config.telemetry.sinks if sink != "console")
    quiet = replace(config, telemetry=replace(config.telemetry, sinks=sinks))
    trainer = _trainer_class(counts)(
        _train_worker,
        train_loop_config={"config": quiet, "device": "cuda" if on_gpus else "cpu"},
        scaling_config=api.ScalingConfig(
            num_workers=counts[0] if len(counts) == 1 else (counts[0], counts[-1]),
            use_gpu=on_gpus,
            resources_per_worker={"CPU": config.ray.cpus_per_worker, "GPU": int(on_gpus)},
        ),
        torch_config=TorchConfig(
            backend=backend_of("cuda" if on_gpus else "cpu"),
            timeout_s=math.ceil(config.parallel.timeout_seconds),
        ),
        run_config=api.RunConfig(
            name="ray",
            worker_runtime_env={"env_vars": environment},
            storage_path=config.directory,
            failure_config=api.FailureConfig(config.ray.max_failures),
        ),
    )
    with _console_metrics(config), _stop_on_signals(config):
        try:
            result: dict[str, Any] = trainer.fit().return_value
        except api.TrainingFailedError as error:
            raise TrainingError(_first_cause(error)) from error
    if "fault" in result:
        raise TrainingError(result["fault"])
    return result


def worker_counts(config: TrainConfig) -> list[int]:
    """The numbers of workers that Ray may start, ascending.

    ConfigError if none in the range divides the global batch.
    """
    ray, rows, micro_rows = config.ray, config.data.global_batch_rows, config.data.micro_batch_rows
    valid = valid_rank_counts(rows, micro_rows)
    counts = [n for n in valid if (ray.min_workers or ray.workers) <= n <= ray.workers]
    if not counts:
        raise ConfigError(
            f"ray.workers = {ray.workers}, ray.min_workers = {ray.min_workers}: {rows} rows in "
            f"micro-batches of {micro_rows} divide among {', '.join(map(str, valid))} workers; "
            "take one of these"
        )
    return counts


@contextmanager
def _stop_on_signals(config: TrainConfig) -> Iterator[None]:
    """On SIGTERM or Ctrl-C, ask the workers to save and end, and wait for them.

    A second signal ends this process at once.
    """

    with ExitStack() as handlers:

        def request_stop(*_: object) -> None:
            Path(config.directory, STOP).touch()
            print("asked the workers to save and end; repeat to end at once", file=sys.stderr)
            handlers.close()

        for number in (signal.SIGTERM, signal.SIGINT):
            handlers.callback(signal.signal, number, signal.signal(number, request_stop))
        yield


@contextmanager
def _console_metrics(config: TrainConfig) -> Iterator[None]:
    """Print the workers' metrics on this console: their own output is lost among Ray's."""
    from trainer.telemetry.sinks import METRICS, console, follow_metrics

    if "console" not in config.telemetry.sinks:
        yield
        return
    ended, path = threading.Event(), Path(config.directory, METRICS)
    thread = threading.Thread(target=follow_metrics, args=(path, console(), ended))
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _check_resources(config: TrainConfig, workers: int, on_gpus: bool) -> None:
    """ConfigError if this machine has too few CPUs or GPUs, for which Ray would wait silently.

    Clusters are not checked, since they may grow.
    """
    import ray

    if os.environ.get("RAY_ADDRESS"):
        return
    resources: Any = ray.cluster_resources()  # type: ignore[no-untyped-call]
    for name, per_worker in (("CPU", config.ray.cpus_per_worker), ("GPU", float(on_gpus))):
        needed, available = workers * per_worker, resources.get(name, 0)
        if needed > available:
            raise ConfigError(
                f"{workers} workers need {needed:g} {name}, and there are {available:g}; "
                "change the section ray"
            )


def _start_ray(gpus: str) -> bool:
    """Connect to Ray or start it; whether workers use GPUs."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # importing torch can take longer than the default of 60 s
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
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


def _trainer_class(counts: Sequence[int]) -> Any:
    """TorchTrainer with two changes that its public interface does not allow.

    TrainingError if Ray's private interface is not that of 2.60.
    """
    ray_parts = _private_parts()
    if changes := interface_changes(*ray_parts):
        raise TrainingError(_changed_interface(changes))

    class DividingScalingPolicy(ray_parts.policy):  # type: ignore[misc, name-defined]
        """Uses only `counts`: Ray would use any number of workers in the range."""

        def _count_possible_workers(self, reserved_resources: Any) -> int:
            possible = super()._count_possible_workers(reserved_resources)
            return max((count for count in counts if count <= possible), default=0)

    class Trainer(ray_parts.trainer):  # type: ignore[misc, name-defined]
        def _initialize_and_run_controller(self, **parts: Any) -> Any:
            scaling: Any = self.scaling_config
            if scaling.elasticity_enabled:
                parts["scaling_policy"] = DividingScalingPolicy(scaling)
            return super()._initialize_and_run_controller(**parts)

        def _register_sigint_handler(self, controller: Any) -> None:
            """No handler: Ray's would end the workers before they have saved."""

    return Trainer


class _PrivateParts(NamedTuple):
    """Classes of Ray whose private methods are replaced or called; None for a missing one."""

    trainer: Any
    policy: Any
    controller: Any


def _private_parts() -> _PrivateParts:
    return _PrivateParts(
        *(
            _found(f"ray.train.{module}", name)
            for module, name in (
                ("torch", "TorchTrainer"),
                ("v2._internal.execution.scaling_policy", "ElasticScalingPolicy"),
                ("v2._internal.execution.controller", "TrainController"),
            )
        )
    )


def _found(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


# the parameters after `self` that the methods have in Ray 2.60
_PARAMETERS = {
    "trainer": {
        "_initialize_and_run_controller": ["controller_init_kwargs"],
        "_register_sigint_handler": ["controller"],
    },
    "policy": {
        "__init__": ["scaling_config"],
        "_count_possible_workers": ["reserved_resources"],
    },
}


def interface_changes(trainer: Any, policy: Any, controller: Any) -> list[str]:
    """How Ray's private interface differs from that of 2.60, in a line each."""
    classes = {"trainer": trainer, "policy": policy, "controller": controller}
    if missing := [name for name, cls in classes.items() if cls is None]:
        return [f"the class of the {name} is not where it was" for name in missing]
    changes = []
    for role, methods in _PARAMETERS.items():
        for method, expected in methods.items():
            actual = _parameters(classes[role], method)
            if actual != expected:
                name = f"{classes[role].__name__}.{method}"
                found = "is missing" if actual is None else f"takes {actual}"
                changes.append(f"{name} {found}, and took {expected}")
    # `_initialize_and_run_controller` passes its keyword arguments on
    if "scaling_policy" not in (_parameters(controller, "__init__") or ()):
        changes.append(f"{controller.__name__} takes no scaling_policy any more")
    return changes


def _parameters(cls: Any, method: str) -> list[str] | None:
    function = getattr(cls, method, None)
    return None if function is None else list(inspect.signature(function).parameters)[1:]


def _changed_interface(changes: Sequence[str]) -> str:
    import ray

    return (
        f"Ray {ray.__version__} has another private interface than 2.60, for which this was "
        f"written: {'; '.join(changes)}. Install 'ray[train]~=2.60.0', or start ranks with "
        "torchrun, which needs no Ray; to support this version, change _trainer_class and "
        "_PARAMETERS in trainer/launch.py"
    )


def _train_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """Train as a worker of Ray. A FinalError is returned: Ray restarts workers that raise."""
    import ray.train
    import torch

    if settings["device"] == "cpu":  # Ray gives torch one thread per reserved CPU
        local_workers = ray.train.get_context().get_local_world_size()
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_workers))

    def preempted() -> bool:
        return ray.train.get_preemption_info() is not None

    try:
        return _train_as_rank(settings["config"], settings["device"], preempted)
    except FinalError as error:
        return {"fault": str(error)}


def _first_cause(error: Exception) -> str:
    """The first worker's error, without Ray's frames; errors of ours go before lost connections."""
    failures = list(getattr(error, "worker_failures", {}).values()) or [error]
    ours = [failure for failure in failures if "TrainingError" in repr(failure)]
    return str((ours or failures)[0])
