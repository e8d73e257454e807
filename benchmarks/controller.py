"""Traces of demand and yield through the controller: hours that trainers starve, and what is left over.

    python -m benchmarks.controller [TRACE ...]

Decisions are the real ones (pipeline.controller.decide), made every period; trainers, batches and the clock
are simulated, so a trace of weeks takes milliseconds. An oracle plays each trace too: it knows what trainers
will read in the next two periods and what inputs will yield, and orders just that. Deterministic.
"""

import copy
import dataclasses
import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from pipeline.controller.decide import HOUR, decide
from pipeline.controller.policy import Policy
from pipeline.controller.records import (
    Batch,
    Decision,
    Generation,
    Inputs,
    PlanState,
    Record,
    to_json,
)
from trainer.telemetry.feedback import Report, Source, State, Summary

SERIES = "s3://bucket/series"
ROW = 1000  # tokens of a row
NOW = 1_800_000_000.0
GPU = 100.0  # tokens/s: the scale does not matter
POLICY = Policy(horizon_hours=24, min_inputs=1, max_inputs=1000, static_inputs=10)


# --- the world ------------------------------------------------------------------------------------


@dataclass
class Trainer:
    """Reads what is published, in order, and writes a line every 30 s while it runs.

    `rate` in tokens/s. A "lost" one reads on without a line, a "dead" one does neither; "stopped" and
    "failed" are said in a last line. `skew` is what the store's clock is ahead, in seconds.
    """

    rate: float
    read: float = 0.0
    budget: float | None = None
    state: Literal["running", "stopped", "failed", "lost", "dead"] = "running"
    skew: float = 0.0
    last_line: float = NOW
    last_read: float = 0.0  # by the last line
    sequence: int = 0
    waits: bool = False
    starved_seconds: float = 0.0
    lost_tokens: float = 0.0  # that it would have read while it starved

    def live(self, seconds: float, supply: float, now: float) -> None:
        """Read until `now`, for a time during which nothing is published; `supply` tokens are."""
        if self.state not in ("running", "lost"):
            return
        wanted = self.rate * seconds
        if self.budget is not None:
            wanted = min(wanted, max(0.0, self.budget - self.read))
        taken = min(wanted, max(0.0, supply - self.read))
        self.waits = taken < wanted
        self.starved_seconds += (wanted - taken) / self.rate
        self.lost_tokens += wanted - taken
        self.read += taken
        if self.state == "running":
            self.last_read, self.last_line = self.read, now
            self.sequence += max(1, int(seconds / 30))

    def report(self, name: str, generations: Sequence[Generation]) -> Summary:
        """Its last line."""
        rows, left = {}, int(self.last_read) // ROW
        for generation in generations:
            rows[generation.name] = min(left, generation.rows)
            left -= rows[generation.name]
        budget = None if self.budget is None else max(0, int(self.budget - self.last_read))
        report = Report(
            state=self._last_state(),
            steps=10,
            tokens_total=0,
            tokens_processed=0,
            tokens_per_second=None,
            tokens_per_second_without_stalls=self.rate,
            data_wait_share=0.01,
            mfu=None,
            goodput=None,
            wall_seconds=1.0,
            restarts=0,
            sources={SERIES: Source("", rows, int(self.last_read), None)},
            health=None,
            budget=budget,
        )
        time, modified = "2026-11-21T00:00:00+00:00", self.last_line + self.skew
        return Summary(name, "i", self.sequence, time, 1.0, 30.0, report, modified)

    def _last_state(self) -> State:
        if self.state == "stopped" or self.state == "failed":
            return self.state
        return "waiting" if self.waits else "running"


@dataclass
class World:
    """Trainers read while batches are made, one decision every `every_hours`, or after a longer batch.

    An input gives `yields` tokens in `seconds`. A `schedule` is `gristmill schedule`, which knows the period
    and decides again at once after a batch for a short trainer; else it is cron. `events` are changes by the hour they happen at. An
    `oracle` replaces the controller: the inputs of the next batch.
    """

    trainers: dict[str, Trainer]
    yields: float = 100_000.0
    seconds: float = 36.0
    every_hours: float = 6.0
    schedule: bool = False
    policy: Policy = POLICY
    events: list[tuple[float, Callable[["World"], None]]] = field(default_factory=list)
    oracle: Callable[["World"], int] | None = None
    now: float = NOW
    generations: list[Generation] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    inputs: list[Inputs] = field(default_factory=list)

    def run(self, rounds: int) -> list[Decision]:
        """Decide and make that many batches; the decisions."""
        for _ in range(rounds):
            self._make(self.oracle(self) if self.oracle else self._decide().inputs)
        return self.decisions[-rounds:]

    def run_hours(self, hours: float) -> None:
        """Run rounds until the hour of the world is reached."""
        while self.hour < hours:
            self.run(1)

    @property
    def hour(self) -> float:
        return (self.now - NOW) / HOUR

    @property
    def lines(self) -> list[bytes]:
        """The log of decisions."""
        pairs = zip(self.inputs, self.decisions, strict=True)
        return [to_json(Record(inputs, self.policy, decision)) for inputs, decision in pairs]

    @property
    def supply(self) -> int:
        """Tokens published."""
        return sum(generation.tokens for generation in self.generations)

    def pass_time(self, seconds: float) -> None:
        """Let trainers read, and events happen at their time."""
        end = self.now + max(0.0, seconds)
        while self.events and NOW + self.events[0][0] * HOUR <= end:
            hour, change = self.events.pop(0)
            self._read_until(NOW + hour * HOUR)
            change(self)
        self._read_until(end)

    def _read_until(self, end: float) -> None:
        for trainer in self.trainers.values():
            trainer.live(end - self.now, self.supply, end)
        self.now = end

    def _decide(self) -> Decision:
        memory = self.decisions[-1].memory if self.decisions else PlanState()
        trainers = (t.report(name, self.generations) for name, t in self.trainers.items())
        generations, batches = tuple(self.generations), tuple(self.batches)
        period = self.every_hours * HOUR if self.schedule else None
        inputs = Inputs(
            self.now, SERIES, generations, tuple(trainers), batches, 10**12, memory, period
        )
        decision = decide(inputs, self.policy)
        self.inputs.append(inputs)
        self.decisions.append(decision)
        return decision

    def _make(self, taken: int) -> None:
        start = self.now
        if taken:
            self.pass_time(taken * self.seconds)
            rows = int(taken * self.yields) // ROW
            name = f"gen-{len(self.generations) + 1:04d}"
            self.generations.append(Generation(name, rows, rows * ROW))
            self.batches.append(Batch(taken, "published", start, self.now, rows * ROW))
            if self.schedule and self.decisions[-1].state == "STARVED":
                return
        self.pass_time(start + self.every_hours * HOUR - self.now)


def foresee(world: World) -> int:
    """The oracle's batch: until the batch after it has landed, which takes two periods at most."""
    future = copy.deepcopy(world)
    future.generations.append(Generation("all", 10**15, 10**18))
    future.pass_time(2 * world.every_hours * HOUR)
    read = max((t.read for t in future.trainers.values()), default=0.0)
    return max(0, math.ceil((read - world.supply) / world.yields))


# --- the traces -----------------------------------------------------------------------------------


CHANGE, DAYS = 120, 20  # the hour when something changes; how long a trace is
Trace = Callable[[], World]


def at(hour: float, trainer: str = "a", **changed: object) -> tuple[float, Callable[[World], None]]:
    """An event: fields of a trainer change."""

    def change(world: World) -> None:
        world.trainers[trainer] = dataclasses.replace(world.trainers[trainer], **changed)  # type: ignore[arg-type]

    return hour, change


def _yield_falls() -> tuple[float, Callable[[World], None]]:
    return CHANGE, lambda world: setattr(world, "yields", world.yields / 3)


def _arrival(hour: float) -> tuple[float, Callable[[World], None]]:
    return hour, lambda world: world.trainers.update(a=Trainer(GPU))


def _steady(gpus: int = 1, **changed: object) -> World:
    return World({"a": Trainer(gpus * GPU)}, **changed)  # type: ignore[arg-type]


def _noise() -> World:
    """Demand changes every 6 h by up to a fifth."""
    draw = random.Random("benchmarks.controller.noise")
    hours = range(0, DAYS * 24, 6)
    return _steady(events=[at(hour + 3, rate=GPU * draw.uniform(0.8, 1.2)) for hour in hours])


TRACES: dict[str, Trace] = {
    "constant": _steady,
    "constant, 24 h apart": lambda: _steady(every_hours=24),
    "constant, 24 h apart by schedule": lambda: _steady(every_hours=24, schedule=True),
    "constant, 36 h apart": lambda: _steady(every_hours=36),
    "noise of 20 %": _noise,
    "1 to 8 GPUs": lambda: _steady(events=[at(CHANGE, rate=8 * GPU)]),
    "1 to 8 GPUs, 24 h apart": lambda: _steady(every_hours=24, events=[at(CHANGE, rate=8 * GPU)]),
    "1 to 8 GPUs, 24 h apart by schedule": lambda: _steady(
        every_hours=24, schedule=True, events=[at(CHANGE, rate=8 * GPU)]
    ),
    # production is busy 80 % of the time
    "1 to 8 GPUs, slow batches": lambda: _steady(seconds=100, events=[at(CHANGE, rate=8 * GPU)]),
    "8 to 1 GPUs": lambda: _steady(8, events=[at(CHANGE, rate=GPU)]),
    "a third of the yield": lambda: _steady(events=[_yield_falls()]),
    "a third of the yield, 24 h apart": lambda: _steady(every_hours=24, events=[_yield_falls()]),
    "a third of the yield, 24 h apart by schedule": lambda: _steady(
        every_hours=24, schedule=True, events=[_yield_falls()]
    ),
    "fails, back in 3 days": lambda: _steady(
        events=[at(CHANGE, state="failed"), at(CHANGE + 72, state="running")]
    ),
    "dies silently, back in 3 days": lambda: _steady(
        events=[at(CHANGE, state="dead"), at(CHANGE + 72, state="running")]
    ),
    "dies silently": lambda: _steady(events=[at(CHANGE, state="dead")]),
    "stops early": lambda: _steady(events=[at(CHANGE, state="stopped")]),
    "finishes": lambda: World({"a": Trainer(GPU, budget=CHANGE * HOUR * GPU)}),
    "feedback is lost": lambda: _steady(events=[at(CHANGE, state="lost")]),
    "the first comes after 10 days": lambda: World({}, events=[_arrival(240)]),
}


class Outcome(NamedTuple):
    """Hours without data of trainers that would have read, GPU-hours of them, and hours left over.

    `early_hours` are those of the first five days, before anything changes: the yield is not known, and
    static batches are too small. What is left is at the speed of the slowest trainer; of one that is gone
    it is what it had not read.
    """

    early_hours: float
    late_hours: float
    lost_gpu_hours: float
    left_hours: float


def play(trace: Trace, *, oracle: Callable[[World], int] | None = None) -> Outcome:
    """Run a trace to its end."""
    world = trace()
    world.oracle, world.schedule = oracle, world.schedule and oracle is None
    world.run_hours(CHANGE)
    early = sum(t.starved_seconds for t in world.trainers.values())
    world.run_hours(DAYS * 24)
    trainers = world.trainers.values()
    return Outcome(
        early / HOUR,
        (sum(t.starved_seconds for t in trainers) - early) / HOUR,
        sum(t.lost_tokens for t in trainers) / GPU / HOUR,
        max((world.supply - t.read) / t.rate for t in trainers) / HOUR,
    )


def main() -> None:
    """Print a line for each trace."""
    columns = ("starved in 5 days", "after them", "GPU-hours lost", "hours left", "oracle: starved")
    print(f"{'trace':44}", *(f"{column:>17}" for column in columns), f"{'hours left':>12}")
    for name in sys.argv[1:] or TRACES:
        ours, best = play(TRACES[name]), play(TRACES[name], oracle=foresee)
        figures = (*ours, best.early_hours + best.late_hours)
        print(f"{name:44}", *(f"{f:17,.1f}" for f in figures), f"{best.left_hours:12,.1f}")


if __name__ == "__main__":
    main()
