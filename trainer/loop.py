"""The training loop: pure torch, the same under torchrun, Ray Train and pytest.

A step: this rank's micro-batches, gradients of the loss summed over the global batch and divided by
its number of targets, one update. A loss or gradient that is not finite never reaches the
optimiser. Everything a restart needs is in a checkpoint, so that the steps after it are those that
would have come.
"""

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from stages.storage.catalog import GenerationError
from stages.storage.locks import try_lock
from trainer.checkpoint import Checkpoints
from trainer.config import STOP, TrainConfig
from trainer.data.loader import BatchLoader
from trainer.data.rows import Batch
from trainer.evaluate.held_out import Evaluation, Scores
from trainer.model.llama import flops_per_token
from trainer.model.optim import learning_rate, set_learning_rate
from trainer.model.packing import row_targets
from trainer.model.parallel import clip_grad_norm, from_rank_0, join_ranks, sum_over_ranks
from trainer.model.step import StepSums, accumulate, build
from trainer.telemetry import feedback
from trainer.telemetry.devices import gpu_health, peak_flops
from trainer.telemetry.feedback_writer import Writer
from trainer.telemetry.meter import Meter, SourceSums, mfu
from trainer.telemetry.sinks import METRICS, Telemetry
from trainer.telemetry.spikes import SpikeDetector
from trainer.telemetry.why_step import CONFIG, SPIKES, RowLoss, log_spike

MAX_BAD_STEPS = 10  # in a row, before a run that only makes NaN gives up
LOOK_EVERY = 10  # steps between two questions whether the machine is about to be taken away


class Diverged(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


class Result(NamedTuple):
    """How a training ended: the steps in its state, the loss of the last, in nats a token, and why
    it ended.
    """

    steps: int
    loss: float
    reason: str


class StepResult(NamedTuple):
    """One step's figures over all ranks: loss in nats a target, gradient norm before clipping, what
    it took by source.
    """

    loss: float
    grad_norm: float
    sources: dict[str, SourceSums]
    spike: bool

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class Training:
    """One incarnation of a training: what it holds, and its steps, from the newest checkpoint in
    the folder if there is one.

    `device` is "cpu" or "cuda"; one process a device. `preempted`, asked on all ranks alike, tells
    whether a machine is about to be taken away. GenerationError for data that is not what was
    published, CheckpointError when no checkpoint can be used, ValueError for a config that does not
    fit either: on all ranks alike. What is opened is closed with `opened`.
    """

    def __init__(
        self,
        config: TrainConfig,
        opened: ExitStack,
        *,
        device: str,
        preempted: Callable[[], bool] = lambda: False,
    ) -> None:
        join_ranks(device)
        self.config, self.device, self.preempted = config, device, preempted
        self.leads = dist.get_rank() == 0
        self.folder = Path(config.directory)
        self.checkpoints = Checkpoints(
            config.checkpoint.folder or f"{config.directory}/checkpoints", config.checkpoint
        )
        saved = self.checkpoints.latest()
        extra = saved.extra if saved else {}
        self.step = self.saved_at = saved.step if saved else 0
        # first the data, which can be wrong in ways that a model's minutes of set-up should not
        # hide
        rank, ranks = dist.get_rank(), dist.get_world_size()
        self.loader = opened.enter_context(
            BatchLoader(config.data, rank=rank, world_size=ranks, state=extra.get("supply"))
        )
        self.runs = list(dict.fromkeys(source.run for source in config.data.sources))
        told = config.evaluation
        self.evaluation = (
            Evaluation(told, config.data, rank=rank, world_size=ranks, device=device)
            if told.every_steps
            else None
        )
        self.writer: Writer | None = None
        self.telemetry: Telemetry | None = None
        self.previous: feedback.Summary | None = None
        from_rank_0(lambda: self._open(opened, fresh=saved is None))
        before = feedback.Totals(**extra["totals"]) if saved else None
        self.meter = Meter(feedback.resumed(before, self.previous, now=time.time()))
        self.spikes = SpikeDetector(extra.get("losses", ()))
        with self.meter.part("restart"):
            self.model, self.optimizer = build(config, device)
            if saved:
                self.checkpoints.load(saved, self.model, self.optimizer)
        self.loss, self.bad_steps, self.warned = (self.spikes.losses or [math.nan])[-1], 0, False
        self.scores: Scores | None = None  # of the step before, if it was time for them
        self.health: feedback.Health | None = None  # as it was told last
        self.signalled = False
        if (
            threading.current_thread() is threading.main_thread()
        ):  # elsewhere Python takes no handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                opened.callback(signal.signal, number, signal.signal(number, self._on_signal))

    def _on_signal(self, *_: object) -> None:
        self.signalled = True
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # who asks twice does not want to wait

    def _asked_to_stop(self) -> bool:
        """Whether any rank was, as when its machine is taken away: then all save and end at the
        same step.
        """
        asked = self.signalled or (self.leads and (self.folder / STOP).exists())
        return bool(sum_over_ranks(float(asked), device=self.device) > 0)

    def run(self) -> Result:
        """Train until `max_steps`, the end of the data, SIGTERM, Ctrl-C, or a file "stop".

        Diverged when only NaN comes.
        """
        reason, state = "a fault", "failed"
        try:
            self._tell("running")
            reason, state = self._steps(), "stopped"
            if self.step > self.saved_at:
                self._save()
            self.checkpoints.finish()
        finally:
            if self.writer:
                self.writer.close(self._report(state))
        return Result(self.step, self.loss, reason)

    def _steps(self) -> str:
        """Step after step; why they ended."""
        if 0 < self.config.max_steps <= self.step:
            return f"step {self.step} had been reached before"
        while not self.config.max_steps or self.step < self.config.max_steps:
            batches = self._next()
            if batches:
                self._tell_step(self._update(batches))
            if self._asked_to_stop():
                return "it was asked to stop"
            if not batches:
                return "the data ended"
            due = self.step % self.config.checkpoint.every_steps == 0 or (
                self.step % LOOK_EVERY == 0 and self._is_warned()
            )
            if due and not self.bad_steps:
                self._save()
        return f"step {self.config.max_steps} was reached"

    def _is_warned(self) -> bool:
        """Whether it is now told, for the first time, that a machine is about to be taken away."""
        before, self.warned = self.warned, self.preempted()
        return self.warned and not before

    def _next(self) -> list[Batch]:
        """The micro-batches of the next step; [] when there are none, and waiting is over or not
        wanted.
        """
        with self.meter.part("data_wait"):
            while not (batches := self.loader.next(self.step)):
                while self.loader.should_wait() and not self._asked_to_stop():
                    if self.loader.poll():
                        break
                    self._tell("waiting", when_due=True)
                else:
                    return []
        if (
            largest := max(int(batch.tokens.max()) for batch in batches)
        ) >= self.config.model.vocab_size:
            raise GenerationError(
                f"token {largest} exceeds model.vocab_size = {self.config.model.vocab_size}; enlarge it"
            )
        return batches

    def _update(self, batches: Sequence[Batch]) -> StepResult:
        """One step, counted whether or not its update was fit to be made."""
        rate = learning_rate(
            self.step, self.config.max_steps, self.config.schedule, self.config.optimizer.lr
        )
        set_learning_rate(self.optimizer, rate)
        sums = accumulate(self.model, batches, self.runs, device=self.device)
        norm = clip_grad_norm(self.model.parameters(), self.config.optimizer.clip_norm)
        update = self._figures(sums, norm)
        if update.is_finite and not (update.spike and self.config.skip_spikes):
            self.optimizer.step()
        self.bad_steps = 0 if update.is_finite else self.bad_steps + 1
        if self.bad_steps == MAX_BAD_STEPS:
            raise Diverged(
                f"{MAX_BAD_STEPS} steps in a row up to {self.step + 1} had no finite loss or gradient: lower optimizer.lr"
            )
        self.optimizer.zero_grad()
        self.step, self.loss = self.step + 1, update.loss
        if update.spike:
            rows = _row_losses(batches, sums.row_nats)
            if self.leads:
                log_spike(self.folder, self.step, update.loss, rows)
        return update

    def _figures(self, sums: StepSums, norm: Tensor) -> StepResult:
        """In numbers, which waits for the device: here a step ends."""
        *flat, grad_norm = torch.cat([sums.by_run.flatten(), norm.double().reshape(1)]).tolist()
        sources = {}
        for run, tokens, targets, nats in zip(
            self.runs, flat[::3], flat[1::3], flat[2::3], strict=True
        ):
            rows: dict[str, int] = {}
            for drawn in self.loader.row_ranges[run]:
                rows[drawn.generation] = rows.get(drawn.generation, 0) + drawn.stop - drawn.start
            sources[run] = SourceSums(rows, int(tokens), nats, int(targets))
        loss = sum(taken.loss_sum for taken in sources.values()) / max(
            1, sum(taken.targets for taken in sources.values())
        )
        return StepResult(loss, grad_norm, sources, self.spikes.observe(loss))

    def _evaluate(self) -> Scores | None:
        every = self.config.evaluation.every_steps
        if self.evaluation is None or self.step % every:
            return None
        with self.meter.part("evaluation"):
            return self.evaluation.run(self.model)

    def _tell_step(self, update: StepResult) -> None:
        self.scores = self._evaluate()
        tokens = sum(taken.tokens for taken in update.sources.values())
        step = self.meter.step(tokens=tokens, sources=update.sources)
        if self.telemetry:
            sources = {
                name: {"loss": t.loss_sum / max(1, t.targets), "tokens": t.tokens}
                for name, t in update.sources.items()
            }
            figures = {
                "step": self.step,
                "loss": update.loss,
                "grad_norm": update.grad_norm,
                "tokens": tokens,
            }
            rate = self.optimizer.param_groups[0]["lr"]
            more = {
                "lr": rate,
                "spike": update.spike,
                "mfu": self._mfu(),
                "seconds": step.seconds,
                "sources": sources,
            }
            more |= {"restarts": self.meter.totals.restarts, "data": self.loader.row_ranges}
            health = self.health._asdict() if self.health else {}
            scores: dict[str, float] = self.scores.figures() if self.scores else {}
            self.telemetry.step(figures | more | self.meter.rates()._asdict() | health | scores)
        self._tell("running", when_due=True)

    def _save(self) -> None:
        with self.meter.part("checkpoint"):
            extra = {
                "supply": self.loader.state_dict(),
                "totals": self.meter.totals._asdict(),
                "losses": self.spikes.losses,
            }
            metric = self.scores.loss if self.scores else None
            self.checkpoints.save(self.step, self.model, self.optimizer, extra, metric=metric)
        self.saved_at = self.step

    def _tell(self, state: feedback.State, *, when_due: bool = False) -> None:
        if self.writer and (not when_due or self.writer.due()):
            self.writer.write(self._report(state))

    def _report(self, state: Any) -> feedback.Report:
        if self.device == "cuda":
            self.health = gpu_health(str(torch.cuda.get_device_properties(0).uuid))
        rows = max(0, self.config.max_steps - self.step) * self.config.data.global_batch_rows
        budget = (
            rows * self.loader.seq_len if self.config.max_steps and self.loader.seq_len else None
        )
        return self.meter.report(state, mfu=self._mfu(), health=self.health, budget=budget)

    def _mfu(self) -> float | None:
        if (
            self.device != "cuda"
            or self.config.parallel.precision != "bf16"
            or self.loader.seq_len is None
        ):
            return None
        peak = peak_flops(torch.cuda.get_device_name())
        whole = peak and peak * dist.get_world_size()
        flops = flops_per_token(self.config.model, self.loader.seq_len)
        return mfu(self.meter.rates().tokens_per_second, flops_per_token=flops, peak=whole)

    def _open(self, opened: ExitStack, *, fresh: bool) -> None:
        """On rank 0: hold the folder, and begin to tell.

        What another training than this has left in it is put aside.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        _hold(opened, self.folder)
        known = (self.folder / METRICS).exists()
        if fresh:
            for name in (METRICS, SPIKES):
                if (self.folder / name).exists():
                    (self.folder / name).replace(self.folder / f"{name}.old")
        told = self.config.telemetry
        where = told.feedback or f"{self.config.data.sources[0].run.rstrip('/')}/feedback"
        self.writer = Writer(
            where, trainer=told.name or self.folder.resolve().name, every_seconds=told.every_seconds
        )
        self.previous = self.writer.previous if known else None
        self.telemetry = Telemetry(
            self.folder, run=self.folder.resolve().name, sinks=("jsonl", *told.sinks)
        )
        opened.callback(self.telemetry.close)
        (self.folder / CONFIG).write_text(json.dumps(asdict(self.config), indent=1))


def train(config: TrainConfig, *, device: str) -> Result:
    """Train from where the folder stands to the end. Raises what Training does."""
    with ExitStack() as opened:
        return Training(config, opened, device=device).run()


def _row_losses(batches: Sequence[Batch], row_nats: Sequence[Tensor]) -> list[RowLoss]:
    """The rows of all ranks with the loss of each, in nats a target; for the rare step that needs
    them.
    """
    mine = []
    for batch, nats in zip(batches, row_nats, strict=True):
        means = (nats.cpu() / row_targets(batch.documents).clamp(min=1)).tolist()
        mine += [
            RowLoss(run, *place, mean)
            for run, place, mean in zip(batch.sources, batch.row_ids, means, strict=True)
        ]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return [row for rows in everyone for row in rows]


def _hold(opened: ExitStack, folder: Path) -> None:
    """Lock the folder until `opened` closes: two trainers would remove each other's checkpoints."""
    try:
        opened.enter_context(try_lock(folder / "lock"))
    except BlockingIOError:
        raise ValueError(
            f"{folder}: another training is at work here; wait for it, or set another directory"
        ) from None
