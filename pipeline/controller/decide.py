"""How many inputs the next batch takes: a pure function of what trainers said and what was
published, logged and replayable.

The policy is order-up-to (base stock) under periodic review with a lead time, smoothed. What is on
hand and on order is brought up to what will be eaten until the batch lands (the lead time) and over
the horizon after that:

    tokens = demand × (horizon + duration of a batch) − unread − being made         inputs = tokens / yield

The horizon is safety stock, and must exceed the time between batches. Plain order-up-to amplifies
each change of demand (the bullwhip effect; Dejonckheere et al. 2003,
doi:10.1016/S0377-2217(02)00369-7, prove it for every forecast). Against it: what is being made
counts; a dead band leaves the plan alone; the slew limit bounds each change. Order: need, dead
band, slew, budget, whole inputs, [min, max], what the listing has left.

Trainers share tokens: each reads every generation, so that two of equal speed need what one does.
For each live trainer its own unread tokens are set against its own demand, and the neediest
decides; the sum of demands is only told. Unread is by rows, as they stand: a trainer thrown back to
a checkpoint reads again what it then finds unread. Of a trainer that mixes several series only the
share of its tokens that it took of this one counts. Feedback does not tell that a trainer is to
read some generations only: it seems to have others before it.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import Field, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass as section

from filters import STRICT
from trainer.telemetry import feedback

HOUR = 3600.0
State = Literal["STARVED", "BALANCED", "GLUT", "FINISHING", "BLIND"]
# what a trainer is believed to read, in tokens/s and tokens: a broken file must make no infinite
# plan
SLOWEST, FASTEST, MOST = 1e-3, 1e15, 10**18
FINITE = STRICT | {"allow_inf_nan": False}
_T = TypeVar("_T")


@section(frozen=True, config=FINITE)
class Policy:
    """How supply is kept ahead of trainers.

    `horizon_hours`: supply left when a batch lands. `static_inputs`: the batch while no trainer was
    ever heard, or nothing is known of what an input yields. `slew`: largest factor between one plan
    and the next. `dead_band`: share of the horizon by which supply may be off before the plan
    moves. `patience_seconds`: as of feedback.demand. `yield_window`: batches that count.
    `starved_hours`: supply below which a trainer is short. `stall_share`: data wait, in [0, 1],
    from which on it stalls.
    """

    horizon_hours: float = Field(default=24.0, gt=0, le=8760)
    min_inputs: int = Field(default=1, ge=1)
    max_inputs: int = Field(default=1000, ge=1)
    static_inputs: int = Field(default=100, ge=1)
    slew: float = Field(default=2.0, ge=1)
    dead_band: float = Field(default=0.15, ge=0, lt=1)
    patience_seconds: float = Field(default=300.0, gt=0)
    yield_window: int = Field(default=5, ge=1)
    starved_hours: float = Field(default=1.0, gt=0)
    stall_share: float = Field(default=0.1, ge=0, le=1)

    @model_validator(mode="after")
    def _check(self) -> "Policy":
        if self.min_inputs > self.max_inputs:
            raise ValueError(
                f"min_inputs = {self.min_inputs} exceeds max_inputs = {self.max_inputs}"
            )
        return self


class Generation(NamedTuple):
    """An entry of the catalog, which lists only what was verified."""

    name: str
    rows: int
    tokens: int


class Batch(NamedTuple):
    """A batch so far: what it took of the listing and what came of it.

    Unix times by the scheduler's clock.
    """

    inputs: int
    state: Literal[
        "running", "published", "failed"
    ]  # "running" is also one that a crash interrupted: it will be finished
    started: float
    finished: float | None = None
    tokens: int = 0  # 0 of a published one: nothing was kept


class Memory(NamedTuple):
    """What a decision leaves to the next: its plan before the listing's end cut it, and when and
    how fast trainers were.
    """

    plan: int | None = None
    seen: Mapping[str, feedback.Sighting] = {}
    rates: Mapping[
        str, float
    ] = {}  # tokens/s; a trainer that has just restarted does not know its own


@section(frozen=True, config=FINITE)
class Inputs:
    """All that a decision rests on. `series` is the URI that trainers name as their source;
    `batches` are oldest first.
    """

    now: float
    series: str
    generations: tuple[Generation, ...]
    trainers: tuple[feedback.Summary, ...]
    batches: tuple[Batch, ...]
    inputs_left: int = Field(ge=0)
    before: Memory = Memory()


class Need(NamedTuple):
    """A live trainer that is not done, in tokens of this series. None is unknown."""

    tokens_per_second: float | None
    unread: int
    hours: float | None
    budget: int | None
    covered: bool  # its budget, by what is unread
    short: bool
    # waits although there is enough to read; wrongly for the steps of the trainer's window after a
    # shortage
    stalled: bool
    tokens: float | None  # to order for it


class Production(NamedTuple):
    """What batches yield: medians over the window, so that one odd batch moves nothing, and a
    lasting change is followed after half a window (a ratio of sums would follow the largest batch).
    None when nothing came of most of them, or there is none."""

    tokens_per_input: float | None
    seconds_per_input: float
    pending: float  # tokens expected of batches that run


@section(frozen=True, config=FINITE)
class Decision:
    """How many inputs to take, why, and by which figures.

    FINISHING: what is unread covers the budgets of all live trainers. Else STARVED: one has less
    than `starved_hours` to read. Else BLIND: no live one tells its speed. Else GLUT: none needs a
    batch. Else BALANCED.
    """

    state: State
    inputs: int
    reasons: tuple[str, ...]
    demand_tokens_per_second: float  # of all live trainers
    supply_tokens: int | None  # unread by the trainer that is furthest on; None without a live one
    supply_hours: float | None  # of the one that runs dry first
    batch_hours: float
    production: Production
    needs: dict[str, Need]
    loader_stalls: tuple[str, ...]
    memory: Memory


def decide(inputs: Inputs, policy: Policy) -> Decision:
    """Size the next batch: the same values give the same decision, at any time and place."""
    before = inputs.before
    heard = feedback.demand(
        inputs.trainers, inputs.now, seen=before.seen, patience_seconds=policy.patience_seconds
    )
    rates = {**before.rates, **_rates(inputs)}
    production = _production(inputs.batches, policy.yield_window)
    base = before.plan if before.plan is not None and before.plan > 0 else None
    lead = production.seconds_per_input * (policy.static_inputs if base is None else base)
    setting = _Setting(inputs, policy, production, base, lead)
    needs = {
        t.trainer: need
        for t in inputs.trainers
        if t.trainer in heard.live and (need := _need(t, rates, setting))
    }
    state = _state(needs, inputs.trainers)
    plan, why = _plan(state, needs, setting)
    if plan > inputs.inputs_left:
        why.append(f"the listing has only {inputs.inputs_left} inputs left")
    known = [n.tokens_per_second for n in needs.values() if n.tokens_per_second is not None]
    return Decision(
        state=state,
        inputs=min(plan, inputs.inputs_left),
        reasons=(*_told(needs, heard, setting), *why),
        demand_tokens_per_second=sum(known),
        supply_tokens=min((n.unread for n in needs.values()), default=None),
        supply_hours=min((n.hours for n in needs.values() if n.hours is not None), default=None),
        batch_hours=lead / HOUR,
        production=production,
        needs=needs,
        loader_stalls=tuple(name for name, n in needs.items() if n.stalled),
        # a batch that is skipped leaves the plan to go on from
        memory=Memory(
            before.plan if plan == 0 and state != "FINISHING" else plan,
            {**before.seen, **heard.seen},
            rates,
        ),
    )


class _Setting(NamedTuple):
    """What is the same for all trainers; `base` is the plan that the dead band and slew refer to,
    None without one.
    """

    inputs: Inputs
    policy: Policy
    production: Production
    base: int | None
    lead: float  # seconds


# --- measures -------------------------------------------------------------------------------------


def _production(batches: Sequence[Batch], window: int) -> Production:
    done = [
        b for b in batches if b.state == "published" and b.inputs > 0 and b.finished is not None
    ][-window:]
    if not done:
        return Production(None, 0.0, 0.0)
    tokens = median([b.tokens / b.inputs for b in done])
    seconds = median([max(0.0, (b.finished or b.started) - b.started) / b.inputs for b in done])
    return Production(
        None if tokens == 0 else tokens,
        seconds,
        tokens * sum(b.inputs for b in batches if b.state == "running"),
    )


def _own(summary: feedback.Summary, series: str) -> feedback.Source | None:
    """What a trainer took of this series; None when it reads only others. One source alone is this
    one, whatever its name: the trainer reports here, and may see the series under another path."""
    sources = summary.report.sources
    named = [s for name, s in sources.items() if name.rstrip("/") == series.rstrip("/")] or list(
        sources.values()
    )
    return feedback.Source("", {}, 0, None) if not named else named[0] if len(named) == 1 else None


def _share(own: feedback.Source, report: feedback.Report) -> float:
    whole = sum(source.tokens for source in report.sources.values())
    return own.tokens / whole if whole else 1.0


def _rates(inputs: Inputs) -> dict[str, float]:
    """Tokens/s without stalls of those who know theirs: what they could take, however slow their
    loaders are.
    """
    rates = {}
    for summary in inputs.trainers:
        rate, own = summary.report.tokens_per_second_without_stalls, _own(summary, inputs.series)
        if rate is not None and own is not None:
            rates[summary.trainer] = min(max(SLOWEST, rate * _share(own, summary.report)), FASTEST)
    return rates


def _need(summary: feedback.Summary, rates: Mapping[str, float], setting: _Setting) -> Need | None:
    """None for a trainer that reads no more of this series."""
    report, own, policy = summary.report, _own(summary, setting.inputs.series), setting.policy
    if own is None or report.budget == 0:
        return None
    rate = rates.get(summary.trainer)
    unread = sum(
        g.tokens * max(0, g.rows - own.rows.get(g.name, 0)) // max(1, g.rows)
        for g in setting.inputs.generations
    )
    budget = (
        None if report.budget is None else math.ceil(min(report.budget, MOST) * _share(own, report))
    )
    covered = budget is not None and unread >= budget
    short = not covered and (
        unread == 0 if rate is None else unread < rate * policy.starved_hours * HOUR
    )
    waits = report.state == "waiting" or (report.data_wait_share or 0.0) > policy.stall_share
    hours = None if rate is None else unread / rate / HOUR
    tokens = (
        None if rate is None else _order(rate, unread + setting.production.pending, budget, setting)
    )
    return Need(
        rate, unread, hours, budget, covered, short, waits and unread > 0 and not short, tokens
    )


def _order(rate: float, position: float, budget: int | None, setting: _Setting) -> float:
    """Tokens to order for one trainer, `position` of them on hand or on order; 0 and less is none.

    Each step rises, or stays, with the rate and falls, or stays, with the position; so does the
    largest over trainers.
    """
    policy, base, yielded = setting.policy, setting.base, setting.production.tokens_per_input
    need = rate * (policy.horizon_hours * HOUR + setting.lead) - position
    if base is not None and yielded is not None:
        band, plan = rate * policy.dead_band * policy.horizon_hours * HOUR, base * yielded
        # to the band's near edge, not to the need itself: a jump to the need and a plan held there
        # take turns for ever
        need = min(max(plan, need - band), need + band)
        if need > 0:
            need = min(max(need, plan / policy.slew), plan * policy.slew)
    return need if budget is None else min(need, budget - position)


# --- the decision ---------------------------------------------------------------------------------


def _state(needs: Mapping[str, Need], trainers: Sequence[feedback.Summary]) -> State:
    live = list(needs.values())
    if (
        all(n.covered for n in live)
        if live
        else trainers and all(t.report.budget == 0 for t in trainers)
    ):
        return "FINISHING"
    if any(n.short for n in live):
        return "STARVED"
    orders = [n.tokens for n in live if n.tokens is not None]
    if not orders:
        return "BLIND"
    return "GLUT" if max(orders) <= 0 else "BALANCED"


def _plan(state: State, needs: Mapping[str, Need], setting: _Setting) -> tuple[int, list[str]]:
    """Inputs, whatever the listing has left, and the reasons."""
    policy, yielded = setting.policy, setting.production.tokens_per_input
    if state == "FINISHING":
        return 0, ["the unread supply covers all that trainers may still take"]
    orders = [n.tokens for n in needs.values() if n.tokens is not None]
    if not orders:
        return _held(setting, live=bool(needs), why="no live trainer tells its speed")
    if max(orders) <= 0:
        return 0, ["what is unread or being made exceeds the need and the dead band"]
    if yielded is None:
        return _held(setting, live=True, why="most batches yielded nothing, or there is none")
    wanted = max(orders) / yielded
    # rounded first: a plan that is held, times the yield and divided by it, may come out above
    # itself by a last bit
    plan = max(policy.min_inputs, math.ceil(round(min(wanted, policy.max_inputs), 6)))
    after = f"dead band and slew from {setting.base}" if setting.base else "no plan before it"
    why = f"{max(orders):,.0f} tokens / {yielded:,.0f} an input = {wanted:,.1f} inputs ({after})"
    return plan, [f"{why}, within [{policy.min_inputs}, {policy.max_inputs}]: {plan}"]


def _held(setting: _Setting, *, live: bool, why: str) -> tuple[int, list[str]]:
    """Without feedback, or without a yield to divide by: the last plan, or if there never was one,
    the static one.
    """
    inputs, policy = setting.inputs, setting.policy
    # the 0 of trainers that finished holds until another one comes
    last, what = setting.base if live else inputs.before.plan, "the last plan holds"
    if last is None or not (inputs.trainers or inputs.before.seen):
        last, what = policy.static_inputs, "nor is there a plan to hold"
    plan = 0 if last == 0 else min(max(policy.min_inputs, last), policy.max_inputs)
    return plan, [f"{why}, {what}: {plan} inputs"]


def _told(needs: Mapping[str, Need], heard: feedback.Demand, setting: _Setting) -> list[str]:
    """What was found, trainer by trainer."""
    said = [f"{name} is stale: it has told nothing for longer than it may" for name in heard.stale]
    said += [
        f"{name} takes no more of this series: done, or reads others"
        for name in heard.live
        if name not in needs
    ]
    horizon, lead, made = setting.policy.horizon_hours, setting.lead / HOUR, setting.production
    for name, n in needs.items():
        if n.tokens_per_second is not None:
            target = n.tokens_per_second * (horizon + lead) * HOUR
            what = f"{n.tokens_per_second:,.0f} tokens/s x ({horizon:g} h horizon + {lead:,.1f} h batch) = {target:,.0f} tokens"
            budget = "" if n.budget is None else f", budget {n.budget:,}"
            said.append(
                f"{name}: {what}; {n.unread:,} unread, {made.pending:,.0f} being made{budget}"
            )
            if n.tokens_per_second * made.seconds_per_input > (made.tokens_per_input or 0.0):
                said.append(
                    f"{name} eats faster than batches are made: larger ones will not do, more workers may"
                )
        if n.short:
            said.append(
                f"{name} is short: it has less than {setting.policy.starved_hours:g} h to read"
            )
        if n.stalled:
            said.append(
                f"{name} waits for data with {n.unread:,} tokens to read: by its loader, not for supply"
            )
    return said


# --- the log --------------------------------------------------------------------------------------


@section(frozen=True, config=FINITE)
class Record:
    """A line of the log: a decision with all that it was made of."""

    inputs: Inputs
    policy: Policy
    decision: Decision
    version: Literal[1] = 1


class Mismatch(NamedTuple):
    """A line, counted from 1, that cannot be read or that this code decides otherwise."""

    line: int
    what: str


def to_json(value: Any) -> bytes:
    """A value of this module as one line, without its end."""
    return json.dumps(_plain(value), allow_nan=False).encode()


def from_json(kind: type[_T], line: bytes) -> _T:
    """The value again, equal to the last bit.

    ValueError when it is none, or a Record of another version.
    """
    return TypeAdapter(kind).validate_json(line)


def replay(lines: Iterable[bytes]) -> list[Mismatch]:
    """Decide each Record anew: what comes out otherwise, and what cannot be read."""
    found = []
    for number, line in enumerate(lines, 1):
        try:
            record = from_json(Record, line)
            again = decide(record.inputs, record.policy)
        except (
            ValueError,
            ArithmeticError,
        ) as error:  # the second for numbers that only a broken line holds
            found.append(Mismatch(number, f"cannot be read: {' '.join(str(error).split())[:200]}"))
            continue
        for name in (field.name for field in dataclasses.fields(Decision)):
            was, now = getattr(record.decision, name), getattr(again, name)
            if was != now:
                found.append(Mismatch(number, f"{name} was {was!r}, is {now!r}"))
    return found


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {
            field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
