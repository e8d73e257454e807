"""What a decision is made from, what it is, and its line in the log.

Field names are the keys of decisions.jsonl: logs of earlier versions must stay readable.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass as validated

from pipeline.controller.policy import FINITE, Policy
from stages.formats import json_output
from trainer.telemetry import feedback

State = Literal["STARVED", "BALANCED", "GLUT", "FINISHING", "BLIND"]
VERSION: Literal[2] = 2  # of the log; lines of version 1 are read too
_T = TypeVar("_T")


class Generation(NamedTuple):
    """An entry of the catalog, which lists only verified generations."""

    name: str
    rows: int
    tokens: int


class Batch(NamedTuple):
    """A batch so far: how many inputs it took, and its result.

    A "running" batch may also be one that a crash interrupted: it will be finished. A published one
    has 0 tokens if nothing was kept. Unix times by the scheduler's clock.
    """

    inputs: int
    state: Literal["running", "published", "failed"]
    started: float
    finished: float | None = None
    tokens: int = 0


class PlanState(NamedTuple):
    """What a decision passes to the next one.

    `plan` is in inputs, before the end of the listing cut it. `seen` and `rates` (tokens/s) are by
    trainer: a trainer that has just restarted does not know its own rate. `decided` are the times
    of the latest decisions, this one included, oldest first; () in logs of version 1.
    """

    plan: int | None = None
    seen: Mapping[str, feedback.Sighting] = {}
    rates: Mapping[str, float] = {}
    decided: tuple[float, ...] = ()


@validated(frozen=True, config=FINITE)
class Inputs:
    """Everything that a decision depends on.

    `series` is the URI that trainers name as their source; `batches` are oldest first.
    `period_seconds` is the time between decisions, None if who asks does not know it.
    """

    now: float
    series: str
    generations: tuple[Generation, ...]
    trainers: tuple[feedback.Summary, ...]
    batches: tuple[Batch, ...]
    inputs_left: int = Field(ge=0)
    before: PlanState = PlanState()
    period_seconds: float | None = Field(default=None, ge=0)


class Need(NamedTuple):
    """What a trainer that has not finished needs, in tokens of this series. None is unknown.

    `covered`: the unread tokens cover its budget. `short`: it has less than `starved_hours` to
    read, or runs dry before the next batch lands. `stalled`: it waits although it has enough to
    read; this can be wrong for the steps in the trainer's window after a shortage. `tokens` are to
    be ordered for it, and at least `window_tokens`, or it runs dry before the batch after the next
    lands; None in logs of version 1.
    """

    tokens_per_second: float | None
    unread: int
    hours: float | None
    budget: int | None
    covered: bool
    short: bool
    stalled: bool
    tokens: float | None
    window_tokens: float | None = None


class Production(NamedTuple):
    """What batches yield: medians over the window.

    One odd batch changes nothing, and a lasting change is followed after half a window; a ratio of
    sums would follow the largest batch. `tokens_per_input` is None if most batches yielded nothing,
    or there is none. `pending` are the tokens expected of running batches. `lowest_per_input` is
    the lower of the median and the latest batch's yield, None in logs of version 1.
    """

    tokens_per_input: float | None
    seconds_per_input: float
    pending: float
    lowest_per_input: float | None = None


@validated(frozen=True, config=FINITE)
class Decision:
    """How many inputs to take, and the figures that the decision rests on.

    `state` is the first that applies. FINISHING: the unread tokens cover the budgets of all live
    trainers, without one of those that may come back, or all have finished. STARVED: a live one is
    short. BLIND: no live trainer reports its speed. GLUT: none needs a batch. BALANCED.

    `demand_tokens_per_second` and `needs` are of all live trainers. `supply_tokens` are unread by
    the one that is furthest ahead, None without a live one; `supply_hours` are of the one that runs
    dry first. `period_hours` is the time between decisions: 0 is unknown, None a log of version 1.
    """

    state: State
    inputs: int
    reasons: tuple[str, ...]
    demand_tokens_per_second: float
    supply_tokens: int | None
    supply_hours: float | None
    batch_hours: float
    production: Production
    needs: dict[str, Need]
    loader_stalls: tuple[str, ...]
    memory: PlanState
    period_hours: float | None = None


@validated(frozen=True, config=FINITE)
class Record:
    """A line of the log: a decision and everything that it was made from.

    In version 1 slew limit and dead band could hold back what trainers were short of, and batches
    went on while no trainer was live.
    """

    inputs: Inputs
    policy: Policy
    decision: Decision
    version: Literal[1, 2] = VERSION


def to_json(value: Any) -> bytes:
    """A value of this module as one line of JSON, without a newline."""
    return json_output.to_json(value).encode()


def from_json(kind: type[_T], line: bytes) -> _T:
    """The value that `to_json` wrote, exactly equal.

    ValueError if it is not one, or a Record of another version.
    """
    return TypeAdapter(kind).validate_json(line)
