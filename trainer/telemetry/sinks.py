"""Where training metrics go: console, JSON lines, TensorBoard, W&B, MLflow."""

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from trainer.telemetry.feedback import append_line, to_json

METRICS = "metrics.jsonl"
Record = Mapping[str, Any]
_LOG = logging.getLogger(__name__)


class Sink(NamedTuple):
    """Receives the record of each step."""

    step: Callable[[Record], None]
    close: Callable[[], None] = lambda: None


class Telemetry:
    """Writes the record of each step to every sink; used on rank 0.

    A record has "step" and numbers by name, or by name within a part or source: {"step": 7,
    "loss": 3.1, "seconds": {"compute": 0.5}, "sources": {"cc": {"loss": 3.2}}}. `sinks` are names
    of `TelemetryConfig.sinks`; files go to `folder`. ImportError if a sink's package is not
    installed. A sink that fails later is dropped and its error kept in `failed`: no dashboard may
    stop a training.
    """

    def __init__(self, folder: Path, *, run: str, sinks: Sequence[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._sinks = {name: _open_sink(name, folder, run) for name in dict.fromkeys(sinks)}
        self.failed: dict[str, str] = {}

    def step(self, record: Record) -> None:
        """Write a record to all sinks."""
        self._for_each(lambda sink: sink.step(record))

    def close(self) -> None:
        """Flush and close all sinks."""
        self._for_each(lambda sink: sink.close())

    def _for_each(self, action: Callable[[Sink], None]) -> None:
        for name, sink in list(self._sinks.items()):
            try:
                action(sink)
            except Exception as error:  # each dashboard has its own error types
                del self._sinks[name]
                self.failed[name] = repr(error)
                _LOG.warning("telemetry to %r stopped: %r", name, error)


def flatten(record: Record, prefix: str = "") -> dict[str, float]:
    """The numbers in a record, with nested names joined by "/"."""
    numbers: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            # a source is named by its path
            numbers |= flatten(value, f"{prefix}{key.lstrip('/')}/")
        elif isinstance(value, int | float):
            numbers[f"{prefix}{key}"] = float(value)
    return numbers


def console_line(record: Record) -> str:
    """A record in one line; None is shown as "unknown", missing keys are left out."""
    columns = [
        f"{label} {'unknown' if record[key] is None else form.format(record[key])}"
        for key, (label, form) in (_LOSSES | _named_sets(record) | _COLUMNS).items()
        if key in record
    ]
    return "  ".join([*columns, "SPIKE"] if record.get("spike") else columns)


def _named_sets(record: Record) -> dict[str, tuple[str, str]]:
    """Columns of the losses on named sets; those of sources are named by paths, too long here."""
    keys = (key.split("/") for key in record if key.startswith("held_out/"))
    return {"/".join(key): (key[1], "{:.4f}") for key in keys if len(key) == 3}


_LOSSES = {
    "step": ("step", "{:,}"),
    "loss": ("loss", "{:.4f}"),
    "held_out/loss": ("held out", "{:.4f}"),
}
_COLUMNS = {
    "grad_norm": ("|g|", "{:.3g}"),
    "lr": ("lr", "{:.3g}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "tokens_per_second_without_stalls": ("without stalls", "{:,.0f}"),
    "data_wait_share": ("data wait", "{:.1%}"),
    "data_wait_p50": ("p50", "{:.1%}"),
    "data_wait_p99": ("p99", "{:.1%}"),
    "mfu": ("MFU", "{:.1%}"),
    "goodput": ("goodput", "{:.1%}"),
    "memory_used_bytes": ("GPU bytes", "{:,}"),
    "utilisation": ("busy", "{:.0%}"),
    "temperature_celsius": ("°C", "{:.0f}"),
    "power_watts": ("W", "{:.0f}"),
}


def _open_sink(name: str, folder: Path, run: str) -> Sink:
    try:
        return _SINKS[name](folder, run)
    except ImportError as error:
        raise ImportError(
            f"telemetry to {name!r}: {error}; install it or remove {name!r} from the sinks"
        ) from error


def console(*, every_seconds: float = 10.0, clock: Callable[[], float] = time.monotonic) -> Sink:
    """Prints a line every `every_seconds`, for each evaluation and for each spike."""
    import rich.console

    terminal = rich.console.Console(highlight=False, soft_wrap=True)
    next_time = clock()

    def step(record: Record) -> None:
        nonlocal next_time
        if clock() >= next_time or record.get("spike") or "held_out/loss" in record:
            terminal.print(console_line(record), markup=False)
            next_time = clock() + every_seconds

    return Sink(step)


def follow_metrics(path: Path, sink: Sink, ended: threading.Event) -> None:
    """Pass on each record that another process appends to a metrics file, until `ended` is set."""
    offset = path.stat().st_size if path.exists() else 0
    last = False
    while not last:
        last = ended.wait(0.5)
        if path.exists():
            with open(path, "rb") as file:
                # a restart without a checkpoint starts the file again
                offset = file.seek(offset if offset <= path.stat().st_size else 0)
                for line in file:
                    if line.endswith(b"\n"):  # otherwise it is still being written
                        offset += len(line)
                        with suppress(ValueError):  # a partial line, left by a kill
                            sink.step(json.loads(line))


def _json_lines(folder: Path, _run: str) -> Sink:
    """Appends a line per step. A restart repeats steps: the last line of a step counts."""
    path = str(folder / METRICS)
    return Sink(lambda record: append_line(path, to_json(record)))


def _tensorboard(folder: Path, _run: str) -> Sink:
    try:
        from torch.utils.tensorboard import SummaryWriter  # needs the package tensorboard
    except ImportError:
        from tensorboardX import SummaryWriter  # type: ignore[no-redef, unused-ignore]
    writer = SummaryWriter(str(folder / "tensorboard"))

    def step(record: Record) -> None:
        for name, value in flatten(record).items():
            writer.add_scalar(name, value, record["step"])

    return Sink(step, writer.close)


def _wandb(folder: Path, run: str) -> Sink:
    import wandb

    client = wandb.init(project="gristmill", id=run, name=run, dir=str(folder), resume="allow")
    return Sink(lambda record: client.log(flatten(record), step=record["step"]), client.finish)


def _mlflow(_folder: Path, run: str) -> Sink:
    import mlflow

    mlflow.start_run(run_name=run)
    return Sink(
        lambda record: mlflow.log_metrics(flatten(record), step=record["step"]), mlflow.end_run
    )


_SINKS: dict[str, Callable[[Path, str], Sink]] = {
    "console": lambda _folder, _run: console(),
    "jsonl": _json_lines,
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
}
