"""How many inputs the next batch takes: a pure function of the trainers' reports and the catalog.

The policy is order-up-to (base stock) under periodic review with a lead time, smoothed. The supply
on hand and on order is raised to what trainers will read until the batch lands (the lead time), and
over the horizon after that:

    tokens = demand x (horizon + duration of a batch) - unread - in production
    inputs = tokens / yield

The horizon is safety stock, and must exceed the time between batches. Plain order-up-to amplifies
each change of demand (the bullwhip effect; Dejonckheere et al. 2003,
doi:10.1016/S0377-2217(02)00369-7, prove it for every forecast). Against it: tokens in production
count; a dead band leaves the plan as it is; the slew limit bounds each change. Order: need, dead
band, slew, budget, whole inputs, [min, max], what the listing has left.

Trainers share tokens: each reads every generation, so two of equal speed need what one does. For
each live trainer its own unread tokens are compared with its own demand, and the neediest decides;
the sum of demands is only reported. Unread tokens are by rows as they are now: a trainer that goes
back to a checkpoint reads again what is then unread. Of a trainer that mixes several series, only
the share of its tokens that it took from this one counts. Feedback does not say that a trainer
reads only some generations: it seems to have the others before it.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import NamedTuple

from pipeline.controller.policy import Policy
from pipeline.controller.records import (
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
    production = _production(inputs.batches, policy.yield_window)
    base = before.plan if before.plan is not None and before.plan > 0 else None
    lead = production.seconds_per_input * (policy.static_inputs if base is None else base)
    context = _Context(inputs, policy, production, base, lead)
    needs = {
        t.trainer: need
        for t in inputs.trainers
        if t.trainer in demand.live and (need := _need(t, rates, context))
    }
    state, plan, why = _plan(needs, context)
    if plan > inputs.inputs_left:
        why.append(f"the listing has only {inputs.inputs_left} inputs left")
    # a skipped batch leaves the plan, for the next decision to start from
    next_plan = before.plan if plan == 0 and state != "FINISHING" else plan
    return Decision(
        state=state,
        inputs=min(plan, inputs.inputs_left),
        reasons=(*_trainer_reasons(needs, demand, context), *why),
        demand_tokens_per_second=sum(n.tokens_per_second or 0.0 for n in needs.values()),
        supply_tokens=min((n.unread for n in needs.values()), default=None),
        supply_hours=min((n.hours for n in needs.values() if n.hours is not None), default=None),
        batch_hours=lead / HOUR,
        production=production,
        needs=needs,
        loader_stalls=tuple(name for name, n in needs.items() if n.stalled),
        memory=PlanState(next_plan, {**before.seen, **demand.seen}, rates),
    )


class _Context(NamedTuple):
    """What is the same for all trainers.

    `base` is the plan that dead band and slew refer to, None if there is none. `lead` is the lead
    time in seconds.
    """

    inputs: Inputs
    policy: Policy
    production: Production
    base: int | None
    lead: float


# --- measures -------------------------------------------------------------------------------------


def _production(batches: Sequence[Batch], window: int) -> Production:
    done = [
        (b, b.finished)
        for b in batches
        if b.state == "published" and b.inputs > 0 and b.finished is not None
    ][-window:]
    if not done:
        return Production(None, 0.0, 0.0)
    tokens = median([b.tokens / b.inputs for b, _ in done])
    seconds = median([max(0.0, finished - b.started) / b.inputs for b, finished in done])
    pending = tokens * sum(b.inputs for b in batches if b.state == "running")
    return Production(None if tokens == 0 else tokens, seconds, pending)


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
        if rate is not None and own is not None:
            own_rate = rate * _own_share(own, summary.report)
            rates[summary.trainer] = min(max(SLOWEST, own_rate), FASTEST)
    return rates


def _need(summary: feedback.Summary, rates: Mapping[str, float], context: _Context) -> Need | None:
    """The need of a live trainer; None if it reads no more of this series."""
    report, policy = summary.report, context.policy
    own = _own_source(summary, context.inputs.series)
    if own is None or report.budget == 0:
        return None
    rate, budget = rates.get(summary.trainer), None
    unread = sum(
        g.tokens * max(0, g.rows - own.rows.get(g.name, 0)) // max(1, g.rows)
        for g in context.inputs.generations
    )
    if report.budget is not None:
        budget = math.ceil(min(report.budget, MOST) * _own_share(own, report))
    covered = budget is not None and unread >= budget
    low = unread == 0 if rate is None else unread < rate * policy.starved_hours * HOUR
    short = not covered and low
    waits = report.state == "waiting" or (report.data_wait_share or 0.0) > policy.stall_share
    position = unread + context.production.pending
    return Need(
        tokens_per_second=rate,
        unread=unread,
        hours=None if rate is None else unread / rate / HOUR,
        budget=budget,
        covered=covered,
        short=short,
        stalled=waits and unread > 0 and not short,
        tokens=None if rate is None else _order(rate, position, budget, context),
    )


def _order(rate: float, position: float, budget: int | None, context: _Context) -> float:
    """Tokens to order for one trainer, with `position` on hand or on order; none if not positive.

    Each step rises, or stays, with the rate and falls, or stays, with the position; so does the
    maximum over trainers.
    """
    policy, base = context.policy, context.base
    tokens_per_input = context.production.tokens_per_input
    need = rate * (policy.horizon_hours * HOUR + context.lead) - position
    if base is not None and tokens_per_input is not None:
        band, plan = rate * policy.dead_band * policy.horizon_hours * HOUR, base * tokens_per_input
        # to the near edge of the band, not to the need itself: a jump to the need and an unchanged
        # plan would alternate forever
        need = min(max(plan, need - band), need + band)
        if need > 0:
            need = min(max(need, plan / policy.slew), plan * policy.slew)
    return need if budget is None else min(need, budget - position)


# --- the decision ---------------------------------------------------------------------------------


def _plan(needs: Mapping[str, Need], context: _Context) -> tuple[State, int, list[str]]:
    """The state, inputs (however many the listing has left), and the reasons."""
    policy, tokens_per_input = context.policy, context.production.tokens_per_input
    trainers, before = context.inputs.trainers, context.inputs.before.plan
    if needs:
        finishing = all(need.covered for need in needs.values())
    else:
        finishing = bool(trainers) and all(t.report.budget == 0 for t in trainers)
    if finishing:
        return "FINISHING", 0, ["the unread tokens cover all that trainers may still read"]
    short = any(need.short for need in needs.values())
    orders = [need.tokens for need in needs.values() if need.tokens is not None]
    if not orders:
        why = "no live trainer reports its speed"
        return "STARVED" if short else "BLIND", *_without_order(
            context, context.base if needs else before, why
        )
    order = max(orders)
    if order <= 0:
        reason = "tokens unread or in production exceed the need and the dead band"
        return "STARVED" if short else "GLUT", 0, [reason]
    state: State = "STARVED" if short else "BALANCED"
    if tokens_per_input is None:
        why = "most batches yielded nothing, or there is none"
        return state, *_without_order(context, context.base, why)
    exact = order / tokens_per_input
    # rounded first: an unchanged plan, times the yield and divided by it, may exceed itself in the
    # last bit
    plan = max(policy.min_inputs, math.ceil(round(min(exact, policy.max_inputs), 6)))
    after = f"dead band and slew from {context.base}" if context.base else "no plan before it"
    reason = (
        f"{order:,.0f} tokens / {tokens_per_input:,.0f} per input = {exact:,.1f} inputs ({after}), "
        f"within [{policy.min_inputs}, {policy.max_inputs}]: {plan}"
    )
    return state, plan, [reason]


def _without_order(context: _Context, last: int | None, why: str) -> tuple[int, list[str]]:
    """Without feedback, or without a yield to divide by: the last plan, else the static one."""
    inputs, policy, source = context.inputs, context.policy, "the last plan stays"
    # the 0 of trainers that finished stays until another one comes
    if last is None or not (inputs.trainers or inputs.before.seen):
        last, source = policy.static_inputs, "and there is no plan to keep"
    plan = 0 if last == 0 else min(max(policy.min_inputs, last), policy.max_inputs)
    return plan, [f"{why}, {source}: {plan} inputs"]


def _trainer_reasons(
    needs: Mapping[str, Need], demand: feedback.Demand, context: _Context
) -> Iterator[str]:
    """What is known of each trainer."""
    for name in demand.stale:
        yield f"{name} is stale: it has not reported for too long"
    for name in demand.live:
        if name not in needs:
            yield f"{name} takes no more of this series: it is done, or reads others"
    for name, need in needs.items():
        yield from _need_reasons(name, need, context)


def _need_reasons(name: str, need: Need, context: _Context) -> Iterator[str]:
    policy, production, rate = context.policy, context.production, need.tokens_per_second
    horizon, lead = policy.horizon_hours, context.lead / HOUR
    if rate is not None:
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
        yield f"{name} is short: it has less than {policy.starved_hours:g} h to read"
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
    """Decide each Record again and compare all figures; the wording of reasons may differ."""
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
        for name in names:
            before, now = getattr(record.decision, name), getattr(again, name)
            if before != now:
                mismatches.append(Mismatch(number, f"{name} was {before!r}, is {now!r}"))
    return mismatches
