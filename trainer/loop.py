"""The training loop: pure torch, the same under torchrun, Ray Train and pytest.

A step: this rank's micro-batches, gradients of the loss summed over the global batch and divided by its number of targets, one
update. A loss or gradient that is not finite never reaches the optimiser. Everything a restart needs is in a checkpoint, so
that the steps after it are those that would have come.
"""

import math
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from trainer import feedback
from trainer.checkpoint import Checkpoints
from trainer.config import TrainConfig
from trainer.data import Batch
from trainer.devices import gpu_health, peak_flops
from trainer.model import Transformer, flops_per_token, num_targets, unless_whole
from trainer.optim import learning_rate, make_optimizer, set_learning_rate
from trainer.parallel import clip_grad_norm, join_ranks, make_mesh, parallelize, sum_over_ranks
from trainer.supply import Supply
from trainer.telemetry import Meter, Spikes, Taken, Telemetry, merged, mfu

MAX_BAD_STEPS = 10  # in a row, before a run that only makes NaN gives up


class Diverged(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


class Result(NamedTuple):
    """How a training ended: the steps in its state, the loss of the last, in nats a token, and why it ended."""

    steps: int
    loss: float
    why: str


class Update(NamedTuple):
    """One step's figures over all ranks: loss in nats a target, gradient norm before clipping, tokens without fill, by source."""

    loss: float
    grad_norm: float
    tokens: int
    sources: dict[str, Taken]

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def train(config: TrainConfig, *, device: str) -> Result:
    """Train until `max_steps`, SIGTERM, or the end of the data, from the newest checkpoint in the folder if there is one.

    `device` is "cpu" or "cuda"; one process a device. GenerationFault for data that is not what was published, ValueError for
    a config that does not fit it or a checkpoint, Diverged when only NaN comes.
    """
    join_ranks(device)
    with ExitStack() as opened:
        run = _Run(config, device, opened)
        return run.to_the_end()


def build(config: TrainConfig, device: str) -> tuple[Transformer, Optimizer]:
    """The model, sharded and initialised by the seed, and its optimiser."""
    with torch.device("meta"):
        model = Transformer(config.model)
    parallelize(model, config.parallel, make_mesh(config.parallel, device=device))
    model.to_empty(device=device)
    model.init_weights(config.seed)
    return model, make_optimizer(model, config.optimizer)


def accumulate(model: Transformer, batches: Sequence[Batch], *, device: str) -> tuple[float, int, dict[str, Taken]]:
    """Gradients of the global batch's mean loss, this rank's part of it given: the loss, targets, and this rank's sources.

    Collective. FSDP averages gradients over ranks, so each rank's sum is scaled by their number.
    """
    ranks = dist.get_world_size()
    targets = int(sum_over_ranks(sum(num_targets(batch.documents) for batch in batches), device=device))
    total, taken = torch.zeros((), dtype=torch.float64, device=device), list[dict[str, Taken]]()
    for number, batch in enumerate(batches):
        model.set_requires_gradient_sync(number == len(batches) - 1)  # type: ignore[operator]
        documents = unless_whole(batch.documents)
        loss = model.loss(batch.tokens.to(device), None if documents is None else documents.to(device))
        (loss.sum * (ranks / max(1, targets))).backward()  # type: ignore[no-untyped-call]
        total += loss.sum.detach()
        taken.append(_taken(batch, float(loss.sum.detach()), int(loss.tokens)))
    return float(sum_over_ranks(total, device=device)) / max(1, targets), targets, merged(taken)


def _taken(batch: Batch, loss_sum: float, targets: int) -> dict[str, Taken]:
    """What a micro-batch took of each source. Its loss is shared out by targets, as one sum comes back for all rows."""
    rows_targets = [num_targets(batch.documents[i : i + 1]) for i in range(len(batch.sources))]
    rows_tokens = (batch.documents >= 0).sum(1).tolist()
    return merged(
        {source: Taken({generation: 1}, rows_tokens[i], loss_sum * rows_targets[i] / max(1, targets), rows_targets[i])}
        for i, (source, (generation, _)) in enumerate(zip(batch.sources, batch.where, strict=True))
    )


class _Run:
    """One incarnation of a training: what it holds, and its steps."""

    def __init__(self, config: TrainConfig, device: str, opened: ExitStack) -> None:
        self.config, self.device = config, device
        self.leads = dist.get_rank() == 0
        self.folder = Path(config.directory)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", config.checkpoint)
        saved = self.checkpoints.latest()
        extra = saved.extra if saved else {}
        self.step = self.saved_at = saved.step if saved else 0
        # first the data, which can be wrong in ways that a model's minutes of set-up should not hide
        self.supply = opened.enter_context(
            Supply(config.data, rank=dist.get_rank(), world_size=dist.get_world_size(), state=extra.get("supply"))
        )
        self.writer = self._writer() if self.leads else None
        before = feedback.Totals(**extra["totals"]) if saved else None
        self.meter = Meter(feedback.resumed(before, self.writer.previous if self.writer else None, now=time.time()))
        self.spikes = Spikes(extra.get("losses", ()))
        self.telemetry = self._telemetry(opened) if self.leads else None
        with self.meter.part("restart"):
            self.model, self.optimizer = build(config, device)
            if saved:
                self.checkpoints.load(saved, self.model, self.optimizer)
        self.loss, self.bad_steps = math.nan, 0
        self.sigterm = False
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no handlers
            opened.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, self._on_sigterm))

    def _on_sigterm(self, *_: object) -> None:
        self.sigterm = True

    def _asked_to_stop(self) -> bool:
        """Whether any rank was, as when its machine is taken away: then all save and end at the same step."""
        return bool(sum_over_ranks(float(self.sigterm), device=self.device) > 0)

    def to_the_end(self) -> Result:
        why, state = "a fault", "failed"
        try:
            self._tell("running")
            why, state = self._steps(), "stopped"
            if self.step > self.saved_at:
                self._save()
            self.checkpoints.finish()
        finally:
            if self.writer:
                self.writer.close(self._report(state))
        return Result(self.step, self.loss, why)

    def _steps(self) -> str:
        """Step after step; why they ended."""
        while not self.config.max_steps or self.step < self.config.max_steps:
            with self.meter.part("data_wait"):
                batches = self.supply.next(self.step)
            if not batches:
                return "the data ended"
            self._tell_step(self._update(batches))
            if self._asked_to_stop():
                return "it was asked to stop"
            if self.step % self.config.checkpoint.every_steps == 0:
                self._save()
        return f"step {self.config.max_steps} was reached"

    def _update(self, batches: Sequence[Batch]) -> Update:
        """One step, counted whether or not its update was fit to be made."""
        rate = learning_rate(self.step, self.config.max_steps, self.config.schedule, self.config.optimizer.lr)
        set_learning_rate(self.optimizer, rate)
        loss, _, sources = accumulate(self.model, batches, device=self.device)
        norm = float(clip_grad_norm(self.model.parameters(), self.config.optimizer.clip_norm))
        update = Update(loss, norm, sum(taken.tokens for taken in sources.values()), sources)
        if update.is_finite:
            self.optimizer.step()
        self.bad_steps = 0 if update.is_finite else self.bad_steps + 1
        if self.bad_steps == MAX_BAD_STEPS:
            raise Diverged(f"{MAX_BAD_STEPS} steps in a row up to {self.step} had no finite loss or gradient: lower optimizer.lr")
        self.optimizer.zero_grad()
        self.step, self.loss = self.step + 1, loss
        everyone = _gathered(sources)
        return update._replace(sources=everyone, tokens=sum(taken.tokens for taken in everyone.values()))

    def _tell_step(self, update: Update) -> None:
        spike = self.spikes.observe(update.loss)
        step = self.meter.step(tokens=update.tokens, sources=update.sources)
        if self.telemetry:
            rates = self.meter.rates()
            sources = {name: {"loss": t.loss_sum / max(1, t.targets), "tokens": t.tokens} for name, t in update.sources.items()}
            figures = {"step": self.step, "loss": update.loss, "grad_norm": update.grad_norm, "tokens": update.tokens}
            rate = self.optimizer.param_groups[0]["lr"]
            more = {"lr": rate, "spike": spike, "mfu": self._mfu(), "seconds": step.seconds, "sources": sources}
            self.telemetry.step(figures | more | rates._asdict())
        if self.writer and self.writer.due():
            self._tell("running")

    def _save(self) -> None:
        with self.meter.part("checkpoint"):
            extra = {
                "supply": self.supply.state_dict(),
                "totals": self.meter.totals._asdict(),
                "losses": self.spikes.losses,
                "config": asdict(self.config),
            }
            self.checkpoints.save(self.step, self.model, self.optimizer, extra)
        self.saved_at = self.step

    def _tell(self, state: feedback.State) -> None:
        if self.writer:
            self.writer.write(self._report(state))

    def _report(self, state: Any) -> feedback.Report:
        health = gpu_health(str(torch.cuda.get_device_properties(0).uuid)) if self.device == "cuda" else None
        return self.meter.report(state, mfu=self._mfu(), health=health, budget=None)

    def _mfu(self) -> float | None:
        if self.device != "cuda" or self.config.parallel.precision != "bf16" or self.supply.seq_len is None:
            return None
        peak = peak_flops(torch.cuda.get_device_name())
        whole = peak and peak * dist.get_world_size()
        flops = flops_per_token(self.config.model, self.supply.seq_len)
        return mfu(self.meter.rates().tokens_per_second, flops_per_token=flops, peak=whole)

    def _writer(self) -> feedback.Writer:
        told = self.config.telemetry
        folder = told.feedback or f"{self.config.data.sources[0].run.rstrip('/')}/feedback"
        return feedback.Writer(folder, trainer=self.folder.resolve().name, every_seconds=told.every_seconds)

    def _telemetry(self, opened: ExitStack) -> Telemetry:
        telemetry = Telemetry(self.folder, run=self.folder.resolve().name, sinks=self.config.telemetry.sinks)
        opened.callback(telemetry.close)
        return telemetry


def _gathered(sources: dict[str, Taken]) -> dict[str, Taken]:
    """What all ranks took."""
    if dist.get_world_size() == 1:
        return sources
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, sources)
    return merged(everyone)
