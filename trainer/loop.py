"""Step 5 of a row's way to the loss: the training loop, in plain torch.

It is the same under torchrun, Ray Train and pytest. A step: this rank's micro-batches
(`data.loader`), gradients of the global batch's mean loss, one update (`model.step`). A loss or
gradient that is not finite never reaches the weights. A checkpoint has everything that a restart
needs to take exactly the steps that would have followed.

On a GPU the figures of a step are read after the next one is queued, so that it never waits for
Python; before an evaluation, a checkpoint and a wait for data they are read at once.
"""

import gc
import itertools
import json
import logging
import math
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stages.storage.catalog import GenerationError
from stages.storage.locks import try_lock
from trainer.branch import check_same_parent, open_parent
from trainer.checkpoint import Checkpoints, Saved
from trainer.config import CONFIG, STOP, TrainConfig, with_vocab_size
from trainer.data.loader import BatchLoader
from trainer.data.rows import Batch, RowRange
from trainer.evaluate.held_out import Evaluation, Scores
from trainer.model.llama import flops_per_token
from trainer.model.optim import set_learning_rate
from trainer.model.packing import row_targets
from trainer.model.parallel import join_ranks, sum_over_ranks
from trainer.model.pretrained import check_same_init, load_pretrained
from trainer.model.schedule import Schedule, change_of, resumed
from trainer.model.step import (
    DeviceClock,
    Read,
    RunSums,
    StepFigures,
    build,
    queue_gradients,
    queue_update,
)
from trainer.ranks import Ranks, gather_objects
from trainer.telemetry import feedback
from trainer.telemetry.devices import gpu_health, peak_flops, worst_health
from trainer.telemetry.feedback_writer import Writer
from trainer.telemetry.meter import Meter, SourceSums, SpikeDetector, mfu
from trainer.telemetry.profile import Profiler
from trainer.telemetry.sinks import METRICS, Telemetry
from trainer.telemetry.why_step import SPIKES, RowLoss, log_spike

MAX_BAD_STEPS = 10  # consecutive steps without a finite loss before a run gives up
_LOG = logging.getLogger(__name__)
LATE = {"cuda"}  # devices that work while Python goes on: a step's figures are read a step late
PREEMPTION_CHECK_STEPS = 10  # steps between two checks whether this machine will be taken away
HEALTH_STEPS = 20  # steps between two looks at all ranks' GPUs, a millisecond and a collective


class Diverged(RuntimeError):
    """Too many consecutive steps had a loss or gradient that is not finite."""


class Result(NamedTuple):
    """How a training ended: steps in its state, loss of the last in nats per token, and why."""

    steps: int
    loss: float
    reason: str


class QueuedStep(NamedTuple):
    """A step that the device may still work on, and what is needed to record it later."""

    step: int
    rate: float
    batches: Sequence[Batch]
    row_ranges: dict[str, list[RowRange]]
    figures: StepFigures


class Training:
    """One attempt at a training, from the newest checkpoint in its folder if there is one.

    `device` is "cpu" or "cuda"; one process per device. `preempted` returns whether a machine will
    soon be taken away, the same on all ranks. What it opens is closed with `resources`. On all
    ranks alike: GenerationError for data that is not what was published, CheckpointError if no
    checkpoint can be used, ValueError for a config that fits neither.
    """

    def __init__(
        self,
        config: TrainConfig,
        resources: ExitStack,
        *,
        device: str,
        preempted: Callable[[], bool] = lambda: False,
    ) -> None:
        join_ranks(device, timeout_seconds=config.parallel.timeout_seconds)
        self.config, self.device, self.preempted = config, device, preempted
        self.ranks, self.folder = Ranks(), Path(config.directory)
        self.checkpoints = Checkpoints(
            config.checkpoint.folder or f"{config.directory}/checkpoints", config.checkpoint
        )
        resources.callback(self.checkpoints.close)
        saved = self._find_checkpoint()
        extra = saved.extra if saved else {}
        self.parent: dict[str, Any] | None = extra.get("parent")
        self.step = self.saved_at = saved.step if saved else 0
        self.schedule, self.notice = self._resume_schedule(extra.get("schedule"))
        # the data first: its faults should show before the minutes that a model's set-up takes
        self._open_data(resources, position=extra.get("supply"))
        self._open_reports(resources, totals=extra.get("totals"))
        self.spikes = SpikeDetector(extra.get("losses", ()))
        self.loss = (self.spikes.losses or [math.nan])[-1]
        with self.meter.part("restart"):
            self._build_model(saved)
        self.queued: QueuedStep | None = None
        self.clock, self.bad_steps, self.was_preempted = DeviceClock(device), 0, False
        # of this rank by a signal; of any rank, as all of them know it
        self.stop_requested, self.stopping = False, False
        # in other threads Python does not allow signal handlers
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                resources.callback(signal.signal, number, signal.signal(number, self._on_signal))

    def _find_checkpoint(self) -> Saved | None:
        """The newest checkpoint, or for a new branch that of its parent."""
        saved = self.checkpoints.latest()
        self.is_fresh = saved is None
        self.is_new_branch = saved is None and bool(self.config.branch)
        if saved:
            check_same_parent(self.config.branch, saved.extra.get("parent"))
        if self.is_new_branch:
            saved = open_parent(self.config, self.checkpoints, ranks=self.ranks)
        self.init: dict[str, Any] | None = saved.extra.get("init") if saved else None
        if saved:
            check_same_init(self.config.model.init, self.init, ranks=self.ranks)
            self.config = with_vocab_size(self.config, saved.model["vocab_size"])
        return saved

    def _open_data(self, resources: ExitStack, *, position: dict[str, Any] | None) -> None:
        """The loader and the rows of evaluations; the vocabulary is that of the data."""
        config, ranks = self.config, self.ranks
        self.loader = resources.enter_context(
            BatchLoader(config.data, rank=ranks.rank, world_size=ranks.count, state=position)
        )
        self.config = config = with_vocab_size(config, self.loader.vocab_size)
        self.loader.limit_vocabulary(config.model.vocab_size)
        self.evaluation: Evaluation | None = None
        if config.evaluation.every_steps:
            self.evaluation = Evaluation(
                config.evaluation, config.data, device=self.device, begun=self.loader.begun()
            )

    def _open_reports(self, resources: ExitStack, *, totals: dict[str, Any] | None) -> None:
        """Metrics, feedback and profile, which rank 0 writes, and the meter."""
        self.writer: Writer | None = None
        self.telemetry: Telemetry | None = None
        self.previous: feedback.Summary | None = None
        self.ranks.on_first(lambda: self._open_outputs(resources, fresh=self.is_fresh))
        before = feedback.Totals(**totals) if totals else None
        if self.previous or not self.is_fresh:
            before = feedback.resumed(before, self.previous, now=time.time())
        self.meter = Meter(before)
        steps = self.config.telemetry.profile_steps if self.ranks.leads else 0
        self.profiler = Profiler(self.folder / "profile", steps=steps, device=self.device)
        resources.callback(self.profiler.close)
        self.scores: Scores | None = None  # of the last step, if it was evaluated
        self.held_out: dict[str, float | None] = {}  # losses of the last evaluation
        self.worst, self.health_due = worst_health([]), 0  # of all ranks' GPUs; when to look again

    def _build_model(self, saved: Saved | None) -> None:
        """The model and its optimizer, from a checkpoint, a Hugging Face one, or the seed."""
        self.model, self.optimizer = build(self.config, self.device)
        if saved:
            self.checkpoints.load(saved, self.model, self.optimizer)
        elif self.config.model.init:
            self.init = load_pretrained(self.model, seed=self.config.seed, ranks=self.ranks)

    def _resume_schedule(self, saved: dict[str, Any] | None) -> tuple[Schedule, str | None]:
        """The schedule, and what to say of it if it has changed since it was `saved`."""
        new = Schedule(self.config.schedule, self.config.max_steps)
        schedule = resumed(saved, new, step=self.step)
        return schedule, change_of(schedule, new, base_lr=self.config.optimizer.lr)

    def run(self) -> Result:
        """Train until `max_steps`, the end of the data, SIGTERM, Ctrl-C, or a file "stop".

        Diverged if no step has a finite loss any more.
        """
        state: feedback.State = "failed"
        if self.notice and self.ranks.leads:
            _LOG.warning(self.notice)
        try:
            self._write_feedback("running")
            if self.is_new_branch:  # the parent may remove its checkpoint from now on
                self._save()
                self.checkpoints.finish()
            gc.collect()
            gc.freeze()  # a collection among all objects of torch would hold up all ranks
            reason, state = self._run_steps(), "stopped"
            if self.step > self.saved_at:
                self._save()
            self.checkpoints.finish()
        finally:
            gc.unfreeze()
            if self.writer:
                self.writer.close(self._report(state))
        # workers of Ray have no console: what they warned of is said again at the end
        notes = filter(None, (reason, self.notice, *self.loader.left_out()))
        return Result(self.step, self.loss, "; ".join(notes))

    def _run_steps(self) -> str:
        """Train step by step; why it ended."""
        if 0 < self.config.max_steps <= self.step:
            return f"step {self.step} had been reached before"
        while not self.config.max_steps or self.step < self.config.max_steps:
            batches = self._next_batches()
            if batches:
                self._take_step(batches)
            elif self._should_stop():
                return "it was asked to stop"
            else:
                return "the data ended"
            if self.stopping:
                self._record_queued()
                return "it was asked to stop"
            if self._is_checkpoint_due():
                self._record_queued()
                if not self.bad_steps:
                    self._save()
        self._record_queued()
        return f"step {self.config.max_steps} was reached"

    def _next_batches(self) -> list[Batch]:
        """The micro-batches of the next step; [] at the end of the data, after waiting if set."""
        begin = time.perf_counter()
        with self.meter.part("data_wait"):
            batches = self.loader.next(self.step)
        if batches:
            # while the device still had work, it did not wait
            overlap = time.perf_counter() - begin - self.clock.idle_seconds()
            self.meter.move(overlap, "data_wait", "compute")
        else:
            self._record_queued()
            batches = self._wait_for_batches()
        largest = max((int(batch.tokens.max()) for batch in batches), default=0)
        if largest >= self.config.model.vocab_size:
            raise GenerationError(
                f"token {largest} exceeds model.vocab_size = {self.config.model.vocab_size}; "
                "enlarge it"
            )
        return batches

    def _wait_for_batches(self) -> list[Batch]:
        with self.meter.part("data_wait"):
            while self.loader.should_wait() and not self._should_stop():
                if self.loader.poll() and (batches := self.loader.next(self.step)):
                    return batches
                self._write_feedback("waiting")
            return []

    def _take_step(self, batches: Sequence[Batch]) -> None:
        """Queue one step, which counts even if it does not change the weights."""
        config, rate = self.config, self.schedule.rate(self.step, self.config.optimizer.lr)
        figures = queue_gradients(
            self.model,
            batches,
            list(self.loader.row_ranges),
            device=self.device,
            clip_norm=config.optimizer.clip_norm,
            stop=self._is_asked_to_stop(),
        )
        self._record_queued()  # the device works on the gradients of this step meanwhile
        set_learning_rate(self.optimizer, rate)
        highest = self.spikes.bound() if config.skip_spikes else math.inf
        queue_update(self.optimizer, figures, highest_loss=highest)
        self.clock.mark()
        self.step += 1
        self.profiler.step(self.step)
        self.queued = QueuedStep(self.step, rate, batches, self.loader.row_ranges, figures)
        if self.device not in LATE or self._is_evaluation_due(self.step):
            self._record_queued()

    def _record_queued(self) -> None:
        """Read the figures of the queued step, if any, which waits for the device; record them.

        Diverged if it is one too many that is not finite.
        """
        queued, self.queued = self.queued, None
        if queued is None:
            return
        read = queued.figures.read()
        self.loss, self.stopping = read.loss, read.stop > 0
        self.bad_steps = 0 if read.is_finite else self.bad_steps + 1
        is_spike = self.spikes.observe(read.loss)
        if is_spike:
            rows = _row_losses(queued.batches, queued.figures.row_nats)
            if self.ranks.leads:
                log_spike(self.folder, queued.step, read.loss, rows)
        if self.bad_steps == MAX_BAD_STEPS:
            raise Diverged(
                f"{MAX_BAD_STEPS} steps in a row up to {queued.step} had no finite loss or "
                "gradient: lower optimizer.lr"
            )
        if queued.step >= self.health_due:  # by steps, which are the same on all ranks
            self.health_due = queued.step + HEALTH_STEPS
            self.worst = worst_health(gather_objects(self._own_health()))
        self._record_step(queued, read, is_spike=is_spike)

    # --- stop and save ----------------------------------------------------------------------------

    def _on_signal(self, *_: object) -> None:
        self.stop_requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends at once

    def _is_asked_to_stop(self) -> bool:
        return self.stop_requested or (self.ranks.leads and (self.folder / STOP).exists())

    def _should_stop(self) -> bool:
        """Whether any rank was asked to stop: all then end at the same step. Collective.

        For use while there is no step: a step itself tells the other ranks.
        """
        flags = sum_over_ranks(float(self._is_asked_to_stop()), device=self.device)
        return self.stopping or bool(flags > 0)

    def _is_checkpoint_due(self) -> bool:
        return self.step % self.config.checkpoint.every_steps == 0 or (
            self.step % PREEMPTION_CHECK_STEPS == 0 and self._is_newly_preempted()
        )

    def _is_newly_preempted(self) -> bool:
        """Whether a machine will be taken away, and was not going to be at the last check."""
        before, self.was_preempted = self.was_preempted, self.preempted()
        return self.was_preempted and not before

    def _save(self) -> None:
        with self.meter.part("checkpoint"):
            extra = {
                "supply": self.loader.state_dict(),
                "totals": self.meter.totals._asdict(),
                "losses": self.spikes.losses,
                "schedule": self.schedule.state(),
                "init": self.init,
                "parent": self.parent,
            }
            metric = self.scores.loss if self.scores else None
            self.checkpoints.save(self.step, self.model, self.optimizer, extra, metric=metric)
        self.saved_at = self.step

    # --- evaluate and report ----------------------------------------------------------------------

    def _is_evaluation_due(self, step: int) -> bool:
        return self.evaluation is not None and step % self.config.evaluation.every_steps == 0

    def _evaluate(self, step: int) -> Scores | None:
        if self.evaluation is None or not self._is_evaluation_due(step):
            return None
        with self.meter.part("evaluation"):
            scores = self.evaluation.run(self.model)
        self.held_out = {"sources": scores.loss if scores.sources else None, **scores.sets}
        return scores

    def _record_step(self, queued: QueuedStep, read: Read, *, is_spike: bool) -> None:
        sources = _sources(queued.row_ranges, read.runs)
        self.scores = self._evaluate(queued.step)
        tokens, pairs = sum(run.tokens for run in read.runs), sum(run.pairs for run in read.runs)
        seconds = self.meter.step(tokens=tokens, pairs=pairs, sources=sources).seconds
        if self.telemetry:
            record = {
                "step": queued.step,
                "loss": read.loss,
                "grad_norm": read.grad_norm,
                "tokens": tokens,
                "lr": queued.rate,
                "spike": is_spike,
                "mfu": self._mfu(),
                "mfu_palm": self._mfu(context=self.loader.seq_len),
                "seconds": seconds,
                "sources": {
                    name: {"loss": sums.loss_sum / max(1, sums.targets), "tokens": sums.tokens}
                    for name, sums in sources.items()
                },
                "restarts": self.meter.totals.restarts,
                "data": queued.row_ranges,
            }
            health = asdict(self.worst.health) if self.worst.health else {}
            scores: dict[str, float] = self.scores.figures() if self.scores else {}
            self.telemetry.step(record | self.meter.rates()._asdict() | health | scores)
        self._write_feedback("running")

    def _write_feedback(self, state: feedback.State) -> None:
        if self.writer and self.writer.due():
            self.writer.write(self._report(state))

    def _report(self, state: feedback.State) -> feedback.Report:
        seq_len, budget = self.loader.seq_len, None
        if self.config.max_steps and seq_len:
            steps = max(0, self.config.max_steps - self.step)
            budget = steps * self.config.data.global_batch_rows * seq_len
        report = self.meter.report(state, mfu=self._mfu(), health=self.worst.health, budget=budget)
        return replace(report, health_ranks=self.worst.ranks, held_out=self.held_out)

    def _own_health(self) -> feedback.Health | None:
        if self.device != "cuda":
            return None
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        return gpu_health(str(gpu.uuid))

    def _mfu(self, *, context: float | None = None) -> float | None:
        """Model FLOP utilization; with the length of a row as `context` it is PaLM's."""
        rates = self.meter.rates()
        context = rates.mean_context if context is None else context
        if self.device != "cuda" or self.config.parallel.precision != "bf16" or context is None:
            return None
        peak = peak_flops(torch.cuda.get_device_name())
        return mfu(
            rates.tokens_per_second,
            flops_per_token=flops_per_token(self.model, context),
            peak=peak and peak * self.ranks.count,
        )

    def _open_outputs(self, resources: ExitStack, *, fresh: bool) -> None:
        """On rank 0: lock the folder, and open metrics and feedback.

        A `fresh` training renames the metrics that another one has left in the folder.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:  # two trainers would remove each other's checkpoints
            resources.enter_context(try_lock(self.folder / "lock"))
        except BlockingIOError:
            raise ValueError(
                f"{self.folder}: another training is at work here; wait for it, or set another "
                "directory"
            ) from None
        had_metrics = (self.folder / METRICS).exists()
        if fresh:
            for name in (METRICS, SPIKES):
                if (self.folder / name).exists():
                    (self.folder / name).replace(self.folder / f"{name}.old")
        config, name = self.config.telemetry, self.folder.resolve().name
        folder = config.feedback or f"{self.config.data.sources[0].run.rstrip('/')}/feedback"
        self.writer = Writer(
            folder, trainer=config.name or name, every_seconds=config.every_seconds
        )
        self.previous = self.writer.previous if had_metrics else None
        self.telemetry = Telemetry(self.folder, run=name, sinks=("jsonl", *config.sinks))
        resources.callback(self.telemetry.close)
        (self.folder / CONFIG).write_text(json.dumps(asdict(self.config), indent=1))


def _sources(
    row_ranges: Mapping[str, Sequence[RowRange]], runs: Sequence[RunSums]
) -> dict[str, SourceSums]:
    """What a step took of each run."""
    sources = {}
    for (run, parts), sums in zip(row_ranges.items(), runs, strict=True):
        rows = Counter[str]()
        for part in parts:
            rows[part.generation] += part.stop - part.start
        sources[run] = SourceSums(dict(rows), sums.tokens, sums.nats, sums.targets)
    return sources


def _row_losses(batches: Sequence[Batch], row_nats: Sequence[Tensor]) -> list[RowLoss]:
    """The rows of all ranks and the loss of each in nats per target; called for spikes only."""
    losses = []
    for batch, nats in zip(batches, row_nats, strict=True):
        means = (nats.cpu() / row_targets(batch.documents).clamp(min=1)).tolist()
        losses += [
            RowLoss(run, *row_id, mean)
            for run, row_id, mean in zip(batch.sources, batch.row_ids, means, strict=True)
        ]
    return list(itertools.chain(*gather_objects(losses)))
