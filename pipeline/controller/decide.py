"""How many inputs the next batch takes: a pure function of the trainers' reports and the catalog.

The policy is order-up-to (base stock) under periodic review with a lead time, smoothed. The supply
on hand and on order is raised to what trainers will read until the batch lands (the lead time), and
over the horizon after that, or until the batch after it has landed if that is later:

    cover  = max(horizon + duration of a batch, window)
    window = period between batches + duration of a batch + starved_hours
    tokens = demand x cover - unread - in production
    inputs = tokens / yield

The horizon beyond the window is safety stock. Plain order-up-to amplifies each change of demand
(the bullwhip effect; Dejonckheere et al. 2003, doi:10.1016/S0377-2217(02)00369-7, prove it for
every forecast). Against it: tokens in production count; a dead band leaves the plan as it is; the
slew limit bounds each change. Both act on the safety stock only: what a trainer reads within the
window is ordered whole, by the lower of the median and the latest yield. No batch takes longer than
a period, or its tokens come late. Order: need, dead band, slew, budget, window, whole inputs,
[min, max], what the listing has left.

Trainers share tokens: each reads every generation, so two of equal speed need what one does. For
each live trainer its own unread tokens are compared with its own demand, and the neediest decides;
the sum of demands is only reported. Unread tokens are by rows as they are now: a trainer that goes
back to a checkpoint reads again what is then unread. Of a trainer that mixes several series, only
the share of its tokens that it took from this one counts. Feedback does not say that a trainer
reads only some generations: it seems to have the others before it.

A trainer with a budget of 0 has finished and needs nothing. One that is silent, has stopped or has
failed may come back: while no other one is live, batches go on until what it had not read by its
last report covers its demand as last known, and end then. Where no speed was ever known, the plan
is taken for what trainers read in a period, and batches end when a horizon of such plans is unread.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import NamedTuple

from pipeline.controller.policy import Policy
from pipeline.controller.records import (
    VERSION,
    Batch,
    Decision,
    Inputs,
    Need,
    PlanState,
    Production,
    Record,
    State,
    from_json,
)
from trainer.telemetry import feedback

HOUR = 3600.0
# limits for what a trainer reports, in tokens/s and tokens: a broken file must not make an infinite
# plan
SLOWEST, FASTEST, MOST = 1e-3, 1e15, 10**18


def decide(inputs: Inputs, policy: Policy) -> Decision:
    """Size the next batch: the same values give the same decision, at any time and place."""
    before = inputs.before
    demand = feedback.demand(
        inputs.trainers, inputs.now, seen=before.seen, patience_seconds=policy.patience_seconds
    )
    rates = {**before.rates, **_rates(inputs)}
    context = _context(inputs, policy)
    live, absent = _needs(inputs.trainers, demand, rates, context)
    state, plan, why = _plan(live, absent, context)
    if plan > inputs.inputs_left:
        why.append(f"the listing has only {inputs.inputs_left} inputs left")
    # a skipped batch leaves the plan, for the next decision to start from
    next_plan = before.plan if plan == 0 and state != "FINISHING" else plan
    decided = (*before.decided, inputs.now)[-policy.yield_window :]
    return Decision(
        state=state,
        inputs=min(plan, inputs.inputs_left),
        reasons=(*_trainer_reasons(live, absent, demand, context), *why),
        demand_tokens_per_second=sum(n.tokens_per_second or 0.0 for n in live.values()),
        supply_tokens=min((n.unread for n in live.values()), default=None),
        supply_hours=min((n.hours for n in live.values() if n.hours is not None), default=None),
        batch_hours=context.lead / HOUR,
        production=context.production,
        needs=live,
        loader_stalls=tuple(name for name, n in live.items() if n.stalled),
        memory=PlanState(next_plan, {**before.seen, **demand.seen}, rates, decided),
        period_hours=context.period / HOUR,
    )


class _Context(NamedTuple):
    """What is the same for all trainers.

    `base` is the plan that dead band and slew refer to, None if there is none. `lead` is the lead
    time and `period` the time from one decision to the next, 0 if unknown, both in seconds.
    """

    inputs: Inputs
    policy: Policy
    production: Production
    base: int | None
    lead: float
    period: float

    @property
    def next_start(self) -> float:
        """Seconds until the batch after this one can begin."""
        return max(self.period, self.lead)

    @property
    def most(self) -> int:
        """The largest plan, which takes a period: more would delay its own tokens and the next one.

        Batches that follow each other without a pause may take `starved_hours`, or none could be
        larger than the last one.
        """
        seconds, policy = self.production.seconds_per_input, self.policy
        longest = max(self.next_start, policy.starved_hours * HOUR)
        most = min(longest / seconds if seconds else math.inf, policy.max_inputs)
        return max(policy.min_inputs, math.ceil(most))


def _context(inputs: Inputs, policy: Policy) -> _Context:
    production = _production(inputs.batches, policy.yield_window)
    plan = inputs.before.plan
    base = plan if plan is not None and plan > 0 else None
    lead = production.seconds_per_input * (policy.static_inputs if base is None else base)
    return _Context(inputs, policy, production, base, lead, _period(inputs, policy.yield_window))


# --- measures -------------------------------------------------------------------------------------


def _production(batches: Sequence[Batch], window: int) -> Production:
    done = [
        (b, b.finished)
        for b in batches
        if b.state == "published" and b.inputs > 0 and b.finished is not None
    ][-window:]
    if not done:
        return Production(None, 0.0, 0.0)
    yields = [b.tokens / b.inputs for b, _ in done]
    tokens, latest = median(yields), yields[-1]
    seconds = median([max(0.0, finished - b.started) / b.inputs for b, finished in done])
    pending = tokens * sum(b.inputs for b in batches if b.state == "running")
    if tokens == 0:
        return Production(None, seconds, pending)
    # a batch that yields nothing does not say what inputs yield that yield something
    return Production(tokens, seconds, pending, min(tokens, latest or tokens))


def _period(inputs: Inputs, window: int) -> float:
    """Seconds between decisions: the scheduler's, or the median of the latest, 0 if unknown.

    Starts of batches, by which a log of earlier versions knows them, leave out skipped batches.
    """
    if inputs.period_seconds is not None:
        return inputs.period_seconds
    times = inputs.before.decided or [b.started for b in inputs.batches]
    gaps = [max(0.0, b - a) for a, b in itertools.pairwise([*times, inputs.now])]
    return median(gaps[-window:]) if gaps else 0.0


def _own_source(summary: feedback.Summary, series: str) -> feedback.Source | None:
    """What a trainer took of this series; None if it reads only others.

    A single source is this series, whatever its name: the trainer reports here, and may see the
    series under another path.
    """
    sources = summary.report.sources
    if not sources:
        return feedback.Source("", {}, 0, None)
    named = [s for name, s in sources.items() if name.rstrip("/") == series.rstrip("/")]
    matches = named or list(sources.values())
    return matches[0] if len(matches) == 1 else None


def _own_share(own: feedback.Source, report: feedback.Report) -> float:
    total = sum(source.tokens for source in report.sources.values())
    return own.tokens / total if total else 1.0


def _rates(inputs: Inputs) -> dict[str, float]:
    """Tokens/s without stalls, of trainers that know it: what they could read, however slow their
    loaders are.
    """
    rates = {}
    for summary in inputs.trainers:
        rate = summary.report.tokens_per_second_without_stalls
        own = _own_source(summary, inputs.series)
        if rate and own is not None:  # 0 is a speed that was not measured: no trainer stands still
            own_rate = rate * _own_share(own, summary.report)
            rates[summary.trainer] = min(max(SLOWEST, own_rate), FASTEST)
    return rates


class _Needs(NamedTuple):
    """By trainer: those that are live, and those that are not but may come back."""

    live: dict[str, Need]
    absent: dict[str, Need]


def _needs(
    trainers: Sequence[feedback.Summary],
    demand: feedback.Demand,
    rates: Mapping[str, float],
    context: _Context,
) -> _Needs:
    """The needs of trainers that read this series and have not finished."""
    needs = _Needs({}, {})
    # the dead band spares trainers an unsteady plan; for the absent it would only go on longer
    of_absent = context._replace(policy=dataclasses.replace(context.policy, dead_band=0.0))
    for summary in trainers:
        own, name = _own_source(summary, context.inputs.series), summary.trainer
        if own is None or demand.ended.get(name) == "finished":
            continue
        if name in demand.live:
            needs.live[name] = _need(summary.report, own, rates.get(name), context)
        else:
            needs.absent[name] = _need(summary.report, own, rates.get(name), of_absent)
    return needs


def _need(
    report: feedback.Report, own: feedback.Source, rate: float | None, context: _Context
) -> Need:
    policy, budget = context.policy, None
    unread = sum(
        g.tokens * max(0, g.rows - own.rows.get(g.name, 0)) // max(1, g.rows)
        for g in context.inputs.generations
    )
    if report.budget is not None:
        budget = math.ceil(min(report.budget, MOST) * _own_share(own, report))
    covered = budget is not None and unread >= budget
    low = unread == 0 if rate is None else unread < rate * _least_seconds(context)
    short = not covered and low
    waits = report.state == "waiting" or (report.data_wait_share or 0.0) > policy.stall_share
    position = unread + context.production.pending
    tokens, window_tokens = (
        (None, None) if rate is None else _order(rate, position, budget, context)
    )
    return Need(
        tokens_per_second=rate,
        unread=unread,
        hours=None if rate is None else unread / rate / HOUR,
        budget=budget,
        covered=covered,
        short=short,
        stalled=waits and unread > 0 and not short,
        tokens=tokens,
        window_tokens=window_tokens,
    )


def _least_seconds(context: _Context) -> float:
    """Seconds of supply below which a trainer is short."""
    return max(context.policy.starved_hours * HOUR, context.lead)


class _Order(NamedTuple):
    """Tokens to order for a trainer, smoothed, and without which it starves; none if <= 0."""

    tokens: float
    window_tokens: float


def _order(rate: float, position: float, budget: int | None, context: _Context) -> _Order:
    """The order for one trainer, with `position` tokens on hand or on order.

    Each step rises, or stays, with the rate and falls, or stays, with the position; so does the
    maximum over trainers.
    """
    policy, duration = context.policy, _duration(rate, context)
    # until the batch after this one has landed, with `starved_hours` to spare
    seconds = context.next_start + duration + policy.starved_hours * HOUR
    window = rate * seconds - position
    need = rate * max(policy.horizon_hours * HOUR + duration, seconds) - position
    need = _smoothed(need, rate, context)
    if budget is not None:
        need, window = min(need, budget - position), min(window, budget - position)
    return _Order(need, window)


def _duration(rate: float, context: _Context) -> float:
    """Seconds of a batch: those of the last one, or of what is read in a period if that is more."""
    inputs = rate * context.next_start / (context.production.lowest_per_input or math.inf)
    seconds = context.production.seconds_per_input * math.ceil(min(inputs, context.most))
    return max(context.lead, seconds)


def _smoothed(need: float, rate: float, context: _Context) -> float:
    """A need within the dead band and the slew limit of the last plan."""
    policy, base = context.policy, context.base
    tokens_per_input = context.production.tokens_per_input
    if base is None or tokens_per_input is None:
        return need
    band, plan = rate * policy.dead_band * policy.horizon_hours * HOUR, base * tokens_per_input
    # to the near edge of the band, not to the need itself: a jump to the need and an unchanged
    # plan would alternate forever
    need = min(max(plan, need - band), need + band)
    return min(max(need, plan / policy.slew), plan * policy.slew) if need > 0 else need


# --- the decision ---------------------------------------------------------------------------------


def _plan(
    live: Mapping[str, Need], absent: Mapping[str, Need], context: _Context
) -> tuple[State, int, list[str]]:
    """The state, inputs (however many the listing has left), and the reasons."""
    if reason := _finishing(live or absent, context.inputs.trainers):
        return "FINISHING", 0, [reason]
    short = any(need.short for need in live.values())
    known = [need for need in live.values() if need.tokens is not None]
    if not known:
        return "STARVED" if short else "BLIND", *_blind_plan(live, absent, context)
    if all((need.tokens or 0.0) <= 0 for need in known):
        reason = "tokens unread or in production exceed the need and the dead band"
        return "STARVED" if short else "GLUT", 0, [reason]
    state: State = "STARVED" if short else "BALANCED"
    if not context.production.tokens_per_input:
        why = "most batches yielded nothing, or there is none"
        return state, *_last_plan(context, context.base, why)
    return state, *_sized_plan(known, context.production.tokens_per_input, context)


def _finishing(readers: Mapping[str, Need], trainers: Sequence[feedback.Summary]) -> str | None:
    """Why no batch is needed any more; None if one may be."""
    if readers:
        covered = all(need.covered for need in readers.values())
        return "the unread tokens cover all that trainers may still read" if covered else None
    finished = trainers and all(t.report.budget == 0 for t in trainers)
    return "all trainers have finished" if finished else None


def _sized_plan(
    needs: Sequence[Need], tokens_per_input: float, context: _Context
) -> tuple[int, list[str]]:
    """The smoothed order of the neediest, and not less than what is read within the window."""
    order = max(need.tokens or 0.0 for need in needs)
    plan = _whole(order / tokens_per_input, context)
    after = f"dead band and slew from {context.base}" if context.base else "no plan before it"
    bounds = f"within [{context.policy.min_inputs}, {context.most}]"
    why = [f"{_division(order, tokens_per_input)} ({after}), {bounds}: {plan}"]
    window_tokens = max(need.window_tokens or 0.0 for need in needs)
    lowest = context.production.lowest_per_input or tokens_per_input
    least = _whole(window_tokens / lowest, context)
    if window_tokens > 0 and least > plan:
        why.append(
            f"{_division(window_tokens, lowest)} are read before the batch after this one lands; "
            f"neither dead band nor slew holds them back: {least}"
        )
    return max(plan, least), why


def _whole(inputs: float, context: _Context) -> int:
    """Whole inputs within the bounds of a plan."""
    # rounded first: an unchanged plan, times the yield and divided by it, may exceed itself in the
    # last bit
    inputs = round(min(inputs, context.most), 6)
    return max(context.policy.min_inputs, math.ceil(inputs))


def _division(tokens: float, per_input: float) -> str:
    return f"{tokens:,.0f} tokens / {per_input:,.0f} per input = {tokens / per_input:,.1f} inputs"


def _last_plan(context: _Context, last: int | None, why: str) -> tuple[int, list[str]]:
    """Without feedback, or without a yield to divide by: the last plan, else the static one."""
    inputs, policy, source = context.inputs, context.policy, "the last plan stays"
    # the 0 of trainers that finished stays until another one comes
    if last is None or not (inputs.trainers or inputs.before.seen):
        last, source = policy.static_inputs, "and there is no plan to keep"
    plan = 0 if last == 0 else min(max(policy.min_inputs, last), policy.max_inputs)
    return plan, [f"{why}, {source}: {plan} inputs"]


# --- without a live trainer that reports its speed ------------------------------------------------


def _blind_plan(
    live: Mapping[str, Need], absent: Mapping[str, Need], context: _Context
) -> tuple[int, list[str]]:
    """Batches until the supply is what the absent would need if they came back."""
    tokens_per_input = context.production.tokens_per_input
    known = [need for need in absent.values() if need.tokens is not None]
    if known and tokens_per_input and not live:
        return _absent_plan(known, tokens_per_input, context)
    last = context.base if live else context.inputs.before.plan
    plan, why = _last_plan(context, last, "no live trainer reports its speed")
    unread = min(
        (need.unread for need in (live or absent).values()),
        default=sum(g.tokens for g in context.inputs.generations),
    )
    periods = max(1.0, context.policy.horizon_hours * HOUR / max(1.0, context.period))
    covered = plan * periods * (tokens_per_input or 0.0)
    if plan and unread >= covered > 0:
        return 0, [
            f"no live trainer reports its speed, and {unread:,} unread tokens are what batches of "
            f"{plan} inputs yield in a horizon, {periods:,.1f} of them: 0 inputs"
        ]
    return plan, why


def _absent_plan(
    needs: Sequence[Need], tokens_per_input: float, context: _Context
) -> tuple[int, list[str]]:
    """Up to the cover at the speeds last known, within the slew limit, and nothing beyond."""
    order = max(need.tokens or 0.0 for need in needs)
    if order <= 0:
        return 0, ["what absent trainers have not read covers their demand as last known: 0 inputs"]
    plan = _whole(order / tokens_per_input, context)
    return plan, [f"{_division(order, tokens_per_input)} cover the demand as last known: {plan}"]


def _trainer_reasons(
    live: Mapping[str, Need],
    absent: Mapping[str, Need],
    demand: feedback.Demand,
    context: _Context,
) -> Iterator[str]:
    """What is known of each trainer."""
    for name in demand.stale:
        yield f"{name} is silent: it has not reported for too long, and may read on or be dead"
    for name, how in demand.ended.items():
        yield f"{name} {_ENDED[how]}"
    for name in demand.live:
        if name not in live and name not in demand.ended:
            yield f"{name} takes no more of this series: it reads others"
    for name, need in live.items():
        yield from _need_reasons(name, need, context)
    if not live:
        for name, need in absent.items():
            rate = need.tokens_per_second
            speed = "an unknown speed" if rate is None else f"{rate:,.0f} tokens/s"
            yield f"{name}: {need.unread:,} unread, {speed} when it last reported"


_ENDED = {
    "finished": "has finished: it has no budget left, and needs nothing",
    "stopped": "has stopped before the end of its budget, and may come back",
    "failed": "has failed, and may come back",
}


def _need_reasons(name: str, need: Need, context: _Context) -> Iterator[str]:
    policy, production, rate = context.policy, context.production, need.tokens_per_second
    if rate is not None:
        horizon, lead = policy.horizon_hours, _duration(rate, context) / HOUR
        budget = "" if need.budget is None else f", budget {need.budget:,}"
        yield (
            f"{name}: {rate:,.0f} tokens/s x ({horizon:g} h horizon + {lead:,.1f} h batch) = "
            f"{rate * (horizon + lead) * HOUR:,.0f} tokens; {need.unread:,} unread, "
            f"{production.pending:,.0f} in production{budget}"
        )
        if rate * production.seconds_per_input > (production.tokens_per_input or 0.0):
            yield (
                f"{name} reads faster than batches are made: larger batches do not help, more "
                "workers may"
            )
    if need.short:
        hours = _least_seconds(context) / HOUR
        yield f"{name} is short: it has less than {hours:,.1f} h to read"
    if need.stalled:
        yield (
            f"{name} waits for data with {need.unread:,} tokens to read: its loader is too slow, "
            "not the supply"
        )


# --- replay ---------------------------------------------------------------------------------------


class Mismatch(NamedTuple):
    """A line, counted from 1, that cannot be read or that this version decides differently."""

    line: int
    what: str


def replay(lines: Iterable[bytes]) -> list[Mismatch]:
    """Decide each Record again and compare all figures; the wording of reasons may differ.

    Of a Record of an earlier version, state and inputs are compared: the other figures are new.
    """
    mismatches = []
    names = [field.name for field in dataclasses.fields(Decision) if field.name != "reasons"]
    for number, line in enumerate(lines, 1):
        try:
            record = from_json(Record, line)
            again = decide(record.inputs, record.policy)
        # arithmetic fails on numbers that only a broken line has
        except (ValueError, ArithmeticError) as error:
            what = f"cannot be read: {' '.join(str(error).split())[:200]}"
            mismatches.append(Mismatch(number, what))
            continue
        for name in names if record.version == VERSION else ("state", "inputs"):
            before, now = getattr(record.decision, name), getattr(again, name)
            if before != now:
                was = "was" if record.version == VERSION else f"by version {record.version} was"
                mismatches.append(Mismatch(number, f"{name} {was} {before!r}, is {now!r}"))
    return mismatches
