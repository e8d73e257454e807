"""Where a run's time goes, what it yields, and who is told. Torch is not needed to measure.

Every second belongs to one part: waiting for data, checkpoint, evaluation, restart, or compute, which is the rest.
    tokens/s                 tokens / seconds of all parts
    tokens/s without stalls  tokens / seconds of compute
    data-wait share          data wait / (data wait + compute)
    goodput                  compute of the steps in the state now / time since the first start; what a restart threw away,
                             replays and the time between incarnations are lost
    MFU                      tokens/s × FLOP per token / peak FLOP/s (PaLM, arXiv:2204.02311, appendix B)
Rates are over the last WINDOW steps and the time since. A GPU works ahead of Python, so the parts are right only if a step
ends by waiting for it, as reading the loss does.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from trainer.telemetry.feedback import Health, Report, Source, State, Totals

WINDOW = 128
Part = Literal["compute", "data_wait", "checkpoint", "evaluation", "restart"]


class SourceSums(NamedTuple):
    """What was trained on of one source: rows by generation, tokens, and the sum of the loss over
    its targets.
    """

    rows: Mapping[str, int]
    tokens: int
    loss_sum: float
    targets: int


class Step(NamedTuple):
    """One step: seconds by part since the step before, tokens of all ranks, what it took by source."""

    seconds: Mapping[str, float]
    tokens: int
    sources: Mapping[str, SourceSums]


class Rates(NamedTuple):
    """What the window says; None where it says nothing.

    Shares are in [0, 1], percentiles over steps by nearest rank.
    """

    tokens_per_second: float | None
    tokens_per_second_without_stalls: float | None
    step_seconds: float | None  # mean of data wait and compute
    data_wait_share: float | None
    data_wait_p50: float | None
    data_wait_p99: float | None
    goodput: float | None


class Meter:
    """Times the parts of a run and counts what they yield. `totals` is what the run had come to
    (feedback.resumed).

    Parts may be nested: a second belongs to the innermost. Wrap what comes before the first step in
    part("restart").
    """

    def __init__(
        self,
        totals: Totals | None = None,
        *,
        window: int = WINDOW,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._before = Totals() if totals is None else totals
        self._totals = self._before
        self._sources = sum_by_source(
            [{name: _taken(known) for name, known in self._before.sources.items()}]
        )
        self._clock = clock
        self._start = self._since = clock()
        self._inside: list[Part] = ["compute"]
        self._open: dict[str, float] = {}
        self._window: deque[Step] = deque(maxlen=window)

    @contextmanager
    def part(self, name: Part) -> Iterator[None]:
        """The time of the block goes to this part."""
        self._book()
        self._inside.append(name)
        try:
            yield
        finally:
            self._book()
            self._inside.pop()

    def step(self, *, tokens: int, sources: Mapping[str, SourceSums] | None = None) -> Step:
        """End a step.

        `sources`, over all ranks, may come every few steps for those since, but before a
        checkpoint's.
        """
        self._book()
        step = Step(self._open, tokens, sources or {})
        self._open = {}
        self._window.append(step)
        self._sources = sum_by_source([self._sources, step.sources])
        total = self._totals
        self._totals = total._replace(
            steps=total.steps + 1,
            tokens=total.tokens + tokens,
            tokens_processed=total.tokens_processed + tokens,
            useful_seconds=total.useful_seconds + step.seconds.get("compute", 0.0),
        )
        return step

    @property
    def totals(self) -> Totals:
        """What the run has come to, for its checkpoint."""
        wall = (
            max(self._before.wall_seconds, self._before.useful_seconds)
            + self._clock()
            - self._start
        )
        sources = {
            name: {"rows": dict(taken.rows), "tokens": taken.tokens}
            for name, taken in self._sources.items()
        }
        return self._totals._replace(wall_seconds=wall, sources=sources)

    def rates(self) -> Rates:
        """Rates of the window.

        While no step ends, as in a wait for supply, tokens/s falls with each call.
        """
        self._book()
        tokens = sum(step.tokens for step in self._window)
        wait, compute, every = (
            _seconds(part, self._window) for part in ("data_wait", "compute", None)
        )
        waited, now = self._open.get("data_wait", 0.0), sum(self._open.values())
        shares = [_share(step) for step in self._window]
        totals = self.totals
        return Rates(
            tokens_per_second=_ratio(tokens, every + now),
            tokens_per_second_without_stalls=_ratio(tokens, compute),
            step_seconds=_ratio(wait + compute, len(self._window)),
            data_wait_share=_ratio(wait + waited, wait + waited + compute),
            data_wait_p50=percentile(shares, 50),
            data_wait_p99=percentile(shares, 99),
            goodput=_ratio(totals.useful_seconds, totals.wall_seconds),
        )

    def report(
        self, state: State, *, mfu: float | None, health: Health | None, budget: int | None
    ) -> Report:
        """What the feedback's next line says."""
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
            sources={
                name: _source(taken, recent.get(name)) for name, taken in self._sources.items()
            },
            health=health,
            budget=budget,
        )

    def _book(self) -> None:
        now = self._clock()
        inside = self._inside[-1]
        self._open[inside] = self._open.get(inside, 0.0) + now - self._since
        self._since = now


def sum_by_source(parts: Iterable[Mapping[str, SourceSums]]) -> dict[str, SourceSums]:
    """The sum over steps or ranks, by source."""
    sums: dict[str, SourceSums] = {}
    for name, more in (item for part in parts for item in part.items()):
        known = sums.get(name, SourceSums({}, 0, 0.0, 0))
        rows = {
            key: known.rows.get(key, 0) + more.rows.get(key, 0) for key in (*known.rows, *more.rows)
        }
        loss_sum, targets = known.loss_sum + more.loss_sum, known.targets + more.targets
        sums[name] = SourceSums(rows, known.tokens + more.tokens, loss_sum, targets)
    return sums


def mfu(
    tokens_per_second: float | None, *, flops_per_token: float, peak: float | None
) -> float | None:
    """Model FLOP utilisation, in [0, 1]: tokens/s × FLOP per token / `peak`, the FLOP/s of all
    devices together.

    Recomputed activations are no useful FLOP and do not count. None when the peak is unknown, as it
    is for float32.
    """
    return (
        None
        if tokens_per_second is None or peak is None
        else tokens_per_second * flops_per_token / peak
    )


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The smallest value that at least `percent` of the values do not exceed; None without any."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)] if values else None


def _taken(known: Mapping[str, Any]) -> SourceSums:
    return SourceSums(known["rows"], known["tokens"], 0.0, 0)


def _source(taken: SourceSums, recent: SourceSums | None) -> Source:
    newest = max(
        taken.rows, key=lambda name: (len(name), name), default=""
    )  # gen-10000 comes after gen-9999
    loss = recent.loss_sum / recent.targets if recent and recent.targets else None
    return Source(newest, dict(taken.rows), taken.tokens, loss)


def _seconds(part: str | None, steps: Iterable[Step]) -> float:
    """Of one part, or of all."""
    return sum(
        sum(step.seconds.values()) if part is None else step.seconds.get(part, 0.0)
        for step in steps
    )


def _share(step: Step) -> float:
    wait, compute = step.seconds.get("data_wait", 0.0), step.seconds.get("compute", 0.0)
    return wait / (wait + compute) if wait else 0.0


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
