"""Measure where a run's time goes and what it yields, and detect loss spikes; needs no torch.

Every second belongs to one part: data wait, checkpoint, evaluation, restart, or compute (the rest).
    tokens/s                 tokens / seconds of all parts
    tokens/s without stalls  tokens / seconds of compute
    data-wait share          data wait / (data wait + compute)
    goodput                  compute of the steps in the current state / time since the first start
    MFU                      tokens/s × FLOP per token / peak FLOP/s (PaLM, arXiv:2204.02311, B)
Work that a restart threw away, replayed steps and the time between attempts lower the goodput.
Rates cover the last WINDOW steps and the time since. A GPU works behind Python, so the parts are
right only if each step waits for the one before, as reading its loss does; and what Python waits
for data meanwhile is compute (`Meter.move`).
"""

import math
import operator
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, NamedTuple

import numpy as np

from trainer.telemetry.feedback import Health, Report, Source, State, Totals

WINDOW = 128
Part = Literal["compute", "data_wait", "checkpoint", "evaluation", "restart"]


class SourceSums(NamedTuple):
    """Sums over what was trained on from one source.

    `rows` are by generation, `loss_sum` is in nats over all `targets`.
    """

    rows: Mapping[str, int]
    tokens: int
    loss_sum: float
    targets: int


class Step(NamedTuple):
    """One step: seconds by part since the previous step, tokens of all ranks, sums by source.

    `pairs` are those of a token and a position that it attends to.
    """

    seconds: Counter[str]
    tokens: int
    pairs: int
    sources: Mapping[str, SourceSums]


class Rates(NamedTuple):
    """Rates over the window, None if unknown. Shares are in [0, 1], percentiles by nearest rank."""

    tokens_per_second: float | None
    tokens_per_second_without_stalls: float | None
    step_seconds: float | None  # mean of data wait and compute
    data_wait_share: float | None
    data_wait_p50: float | None
    data_wait_p99: float | None
    goodput: float | None
    mean_context: float | None  # positions that a token attends to


class Meter:
    """Times the parts of a run and counts tokens and rows.

    `totals` are those of the run so far (feedback.resumed). Parts may be nested: a second belongs
    to the innermost. Wrap everything before the first step in part("restart").
    """

    def __init__(
        self,
        totals: Totals | None = None,
        *,
        window: int = WINDOW,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._before = self._totals = Totals() if totals is None else totals
        self._sources = {
            name: SourceSums(totals_of_source["rows"], totals_of_source["tokens"], 0.0, 0)
            for name, totals_of_source in self._before.sources.items()
        }
        self._clock = clock
        self._start = self._last = clock()
        self._parts: list[Part] = ["compute"]  # the open ones, innermost last
        self._seconds = Counter[str]()  # by part, since the last step
        self._window: deque[Step] = deque(maxlen=window)

    @contextmanager
    def part(self, name: Part) -> Iterator[None]:
        """Count the time of the block to this part."""
        self._count_time()
        self._parts.append(name)
        try:
            yield
        finally:
            self._count_time()
            self._parts.pop()

    def move(self, seconds: float, source: Part, target: Part) -> None:
        """Count seconds of the open step to another part, as many as there are."""
        moved = min(max(0.0, seconds), self._seconds[source])
        self._seconds[source] -= moved  # type: ignore[assignment]
        self._seconds[target] += moved  # type: ignore[assignment]

    def step(
        self, *, tokens: int, pairs: int = 0, sources: Mapping[str, SourceSums] | None = None
    ) -> Step:
        """End a step.

        `sources`, over all ranks, may be given every few steps for the steps since, but has to be
        given before a checkpoint.
        """
        self._count_time()
        step = Step(self._seconds, tokens, pairs, sources or {})
        self._seconds = Counter()
        self._window.append(step)
        self._sources = sum_by_source([self._sources, step.sources])
        total = self._totals
        self._totals = total._replace(
            steps=total.steps + 1,
            tokens=total.tokens + tokens,
            tokens_processed=total.tokens_processed + tokens,
            useful_seconds=total.useful_seconds + step.seconds["compute"],
        )
        return step

    @property
    def totals(self) -> Totals:
        """The totals of the run, for its checkpoint."""
        before = max(self._before.wall_seconds, self._before.useful_seconds)
        wall = before + self._clock() - self._start
        sources = {
            name: {"rows": dict(sums.rows), "tokens": sums.tokens}
            for name, sums in self._sources.items()
        }
        return self._totals._replace(wall_seconds=wall, sources=sources)

    def rates(self) -> Rates:
        """Rates over the window. While no step ends, as in a wait for data, tokens/s falls."""
        self._count_time()
        window = [step.seconds for step in self._window]
        tokens = sum(step.tokens for step in self._window)
        wait = sum(seconds["data_wait"] for seconds in window)
        compute = sum(seconds["compute"] for seconds in window)
        total = sum(seconds.total() for seconds in window) + self._seconds.total()
        open_wait = self._seconds["data_wait"]
        shares = [_data_wait_share(seconds) for seconds in window]
        p50 = p99 = None
        if shares:
            p50, p99 = np.percentile(shares, (50, 99), method="inverted_cdf").tolist()
        totals = self.totals
        return Rates(
            tokens_per_second=_ratio(tokens, total),
            tokens_per_second_without_stalls=_ratio(tokens, compute),
            step_seconds=_ratio(wait + compute, len(self._window)),
            data_wait_share=_ratio(wait + open_wait, wait + open_wait + compute),
            data_wait_p50=p50,
            data_wait_p99=p99,
            goodput=_ratio(totals.useful_seconds, totals.wall_seconds),
            mean_context=_ratio(sum(step.pairs for step in self._window), tokens),
        )

    def report(
        self, state: State, *, mfu: float | None, health: Health | None, budget: int | None
    ) -> Report:
        """The next line of feedback."""
        rates, totals = self.rates(), self.totals
        recent = sum_by_source(step.sources for step in self._window)
        return Report(
            state=state,
            steps=totals.steps,
            tokens_total=totals.tokens,
            tokens_processed=totals.tokens_processed,
            tokens_per_second=rates.tokens_per_second,
            tokens_per_second_without_stalls=rates.tokens_per_second_without_stalls,
            data_wait_share=rates.data_wait_share,
            mfu=mfu,
            goodput=rates.goodput,
            wall_seconds=totals.wall_seconds,
            restarts=totals.restarts,
            sources={name: _source(sums, recent.get(name)) for name, sums in self._sources.items()},
            health=health,
            budget=budget,
        )

    def _count_time(self) -> None:
        now = self._clock()
        self._seconds[self._parts[-1]] += now - self._last  # type: ignore[assignment]
        self._last = now


def sum_by_source(parts: Iterable[Mapping[str, SourceSums]]) -> dict[str, SourceSums]:
    """The sums over steps or ranks, by source."""
    totals: dict[str, SourceSums] = {}
    for name, sums in (item for part in parts for item in part.items()):
        rows, *numbers = totals.get(name, SourceSums({}, 0, 0.0, 0))
        rows = {key: rows.get(key, 0) + sums.rows.get(key, 0) for key in (*rows, *sums.rows)}
        totals[name] = SourceSums(rows, *map(operator.add, numbers, sums[1:]))
    return totals


class SpikeDetector:
    """Finds losses `sigmas` standard deviations above the mean of the last `window` losses.

    A spike enters the window, so a level at which the loss stays is no spike for long. `losses` go
    into a checkpoint.
    """

    def __init__(
        self, losses: Iterable[float] = (), *, sigmas: float = 6.0, window: int = WINDOW
    ) -> None:
        self._sigmas = sigmas
        self._losses: deque[float] = deque(losses, maxlen=window)

    @property
    def losses(self) -> list[float]:
        """The window, oldest first."""
        return list(self._losses)

    def observe(self, loss: float) -> bool:
        """Add a loss; whether it is a spike. Never before the window is full.

        A loss that is not finite always is one, and does not enter the window.
        """
        if not math.isfinite(loss):
            return True
        spike = loss > self.bound()
        self._losses.append(loss)
        return spike

    def bound(self) -> float:
        """The loss above which the next one is a spike; inf before the window is full."""
        if len(self._losses) < (self._losses.maxlen or 0):
            return math.inf
        count = len(self._losses)
        mean = sum(self._losses) / count
        variance = sum((loss - mean) * (loss - mean) for loss in self._losses) / max(1, count - 1)
        # the last term: a constant loss deviates by rounding only
        return mean + self._sigmas * math.sqrt(variance) + 1e-9 * abs(mean)


def mfu(
    tokens_per_second: float | None, *, flops_per_token: float, peak: float | None
) -> float | None:
    """Model FLOP utilization in [0, 1]; None if the rate or the peak is unknown.

    `peak` is the FLOP/s of all devices together; it is unknown for float32. Recomputed activations
    are not useful FLOP and do not count.
    """
    if tokens_per_second is None or peak is None:
        return None
    return tokens_per_second * flops_per_token / peak


def _source(sums: SourceSums, recent: SourceSums | None) -> Source:
    # by length first: gen-10000 comes after gen-9999
    newest = max(sums.rows, key=lambda name: (len(name), name), default="")
    loss = recent.loss_sum / recent.targets if recent and recent.targets else None
    return Source(newest, dict(sums.rows), sums.tokens, loss)


def _data_wait_share(seconds: Counter[str]) -> float:
    wait = seconds["data_wait"]
    return _ratio(wait, wait + seconds["compute"]) or 0.0


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
