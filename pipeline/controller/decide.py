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

import math
from collections.abc import Mapping, Sequence
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
    State,
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
    state = _state(needs, inputs.trainers)
    plan, why = _plan(state, needs, context)
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
    policy, base, tokens_per_input = context.policy, context.base, context.production[0]
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


def _state(needs: Mapping[str, Need], trainers: Sequence[feedback.Summary]) -> State:
    live = list(needs.values())
    if live:
        finishing = all(n.covered for n in live)
    else:
        finishing = bool(trainers) and all(t.report.budget == 0 for t in trainers)
    if finishing:
        return "FINISHING"
    if any(n.short for n in live):
        return "STARVED"
    orders = _orders(needs)
    if not orders:
        return "BLIND"
    return "GLUT" if max(orders) <= 0 else "BALANCED"


def _orders(needs: Mapping[str, Need]) -> list[float]:
    return [n.tokens for n in needs.values() if n.tokens is not None]


def _plan(state: State, needs: Mapping[str, Need], context: _Context) -> tuple[int, list[str]]:
    """Inputs, however many the listing has left, and the reasons."""
    policy, tokens_per_input = context.policy, context.production.tokens_per_input
    if state == "FINISHING":
        return 0, ["the unread tokens cover all that trainers may still read"]
    orders = _orders(needs)
    if not orders:
        return _without_order(context, live=bool(needs), why="no live trainer reports its speed")
    order = max(orders)
    if order <= 0:
        return 0, ["tokens unread or in production exceed the need and the dead band"]
    if tokens_per_input is None:
        why = "most batches yielded nothing, or there is none"
        return _without_order(context, live=True, why=why)
    exact = order / tokens_per_input
    # rounded first: an unchanged plan, times the yield and divided by it, may exceed itself in the
    # last bit
    plan = max(policy.min_inputs, math.ceil(round(min(exact, policy.max_inputs), 6)))
    after = f"dead band and slew from {context.base}" if context.base else "no plan before it"
    return plan, [
        f"{order:,.0f} tokens / {tokens_per_input:,.0f} per input = {exact:,.1f} inputs ({after}), "
        f"within [{policy.min_inputs}, {policy.max_inputs}]: {plan}"
    ]


def _without_order(context: _Context, *, live: bool, why: str) -> tuple[int, list[str]]:
    """Without feedback, or without a yield to divide by: the last plan, else the static one."""
    inputs, policy = context.inputs, context.policy
    # the 0 of trainers that finished stays until another one comes
    last, source = context.base if live else inputs.before.plan, "the last plan stays"
    if last is None or not (inputs.trainers or inputs.before.seen):
        last, source = policy.static_inputs, "and there is no plan to keep"
    plan = 0 if last == 0 else min(max(policy.min_inputs, last), policy.max_inputs)
    return plan, [f"{why}, {source}: {plan} inputs"]


def _trainer_reasons(
    needs: Mapping[str, Need], demand: feedback.Demand, context: _Context
) -> list[str]:
    """What is known of each trainer."""
    reasons = [f"{name} is stale: it has not reported for too long" for name in demand.stale]
    reasons += [
        f"{name} takes no more of this series: it is done, or reads others"
        for name in demand.live
        if name not in needs
    ]
    for name, need in needs.items():
        reasons += _need_reasons(name, need, context)
    return reasons


def _need_reasons(name: str, need: Need, context: _Context) -> list[str]:
    policy, production, rate = context.policy, context.production, need.tokens_per_second
    horizon, lead, reasons = policy.horizon_hours, context.lead / HOUR, []
    if rate is not None:
        budget = "" if need.budget is None else f", budget {need.budget:,}"
        reasons.append(
            f"{name}: {rate:,.0f} tokens/s x ({horizon:g} h horizon + {lead:,.1f} h batch) = "
            f"{rate * (horizon + lead) * HOUR:,.0f} tokens; {need.unread:,} unread, "
            f"{production.pending:,.0f} in production{budget}"
        )
        if rate * production.seconds_per_input > (production.tokens_per_input or 0.0):
            reasons.append(
                f"{name} reads faster than batches are made: larger batches do not help, more "
                "workers may"
            )
    if need.short:
        reasons.append(f"{name} is short: it has less than {policy.starved_hours:g} h to read")
    if need.stalled:
        reasons.append(
            f"{name} waits for data with {need.unread:,} tokens to read: its loader is too slow, "
            "not the supply"
        )
    return reasons
