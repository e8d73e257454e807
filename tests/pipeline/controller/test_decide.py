"""The controller of batches: simulated traces, and the laws that hold for every decision."""

import dataclasses
import itertools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.controller.decide import HOUR, decide, replay
from pipeline.controller.policy import Policy
from pipeline.controller.records import (
    Batch,
    Decision,
    Generation,
    Inputs,
    PlanState,
    Record,
    from_json,
    to_json,
)
from trainer.telemetry.feedback import Report, Source, Summary

SERIES = "s3://bucket/series"
ROW = 1000  # tokens of a row
NOW = 1_800_000_000.0
POLICY = Policy(horizon_hours=24, min_inputs=1, max_inputs=1000, static_inputs=10)


def report(**changed) -> Report:
    base = Report(
        state="running",
        steps=10,
        tokens_total=0,
        tokens_processed=0,
        tokens_per_second=90.0,
        tokens_per_second_without_stalls=100.0,
        data_wait_share=0.01,
        mfu=None,
        goodput=None,
        wall_seconds=1.0,
        restarts=0,
        sources={},
        health=None,
        budget=None,
    )
    return dataclasses.replace(base, **changed)


def summary(
    trainer: str = "a", *, sequence: int = 1, modified: float | None = NOW, **changed
) -> Summary:
    return Summary(
        trainer, "i", sequence, "2026-11-21T00:00:00+00:00", 1.0, 30.0, report(**changed), modified
    )


def read(rows: int, generation: str = "gen-0001", series: str = SERIES) -> dict[str, Source]:
    return {series: Source(generation, {generation: rows}, rows * ROW, 3.0)}


def inputs(*trainers: Summary, **changed) -> Inputs:
    """By default a day's supply for 100 tokens/s, an input yields 100,000 tokens in 36 s, and the
    last plan was 10 inputs.
    """
    base = {
        "now": NOW,
        "series": SERIES,
        "generations": (Generation("gen-0001", 8640, 8_640_000),),
        "trainers": trainers,
        "batches": (Batch(10, "published", NOW - 2 * HOUR, NOW - 2 * HOUR + 360, 1_000_000),),
        "inputs_left": 10**6,
        "before": PlanState(10),
    }
    return Inputs(**(base | changed))


# --- a small world --------------------------------------------------------------------------------


@dataclass
class Eater:
    """A trainer: reads what is published, in order, and writes a line every 30 s while it lives."""

    rate: float
    read: float = 0.0
    budget: float | None = None
    alive: bool = True
    died: float = math.inf
    sequence: int = 0
    waits: bool = False
    skew: float = 0.0

    def live(self, seconds: float, supply: float) -> None:
        if self.alive:
            most = min(supply, math.inf if self.budget is None else self.budget)
            self.waits = self.read + self.rate * seconds > most
            self.read = max(self.read, min(most, self.read + self.rate * seconds))
            self.sequence += max(1, int(seconds / 30))

    def says(self, name: str, generations, now: float) -> Summary:
        rows, left = {}, int(self.read) // ROW
        for generation in generations:
            rows[generation.name] = min(left, generation.rows)
            left -= rows[generation.name]
        return summary(
            name,
            sequence=self.sequence,
            modified=(now if self.alive else self.died) + self.skew,
            state="waiting" if self.waits else "running",
            tokens_per_second_without_stalls=self.rate,
            sources={SERIES: Source("", rows, int(self.read), None)},
            budget=None if self.budget is None else max(0, int(self.budget - self.read)),
        )


@dataclass
class World:
    """Trainers eat while batches are made, one decision every `every_hours`.

    An input gives `yields` tokens in `seconds`.
    """

    eaters: dict[str, Eater]
    yields: float = 100_000.0
    seconds: float = 36.0
    every_hours: float = 6.0
    policy: Policy = POLICY
    now: float = NOW
    generations: list[Generation] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    lines: list[bytes] = field(default_factory=list)

    def run(self, rounds: int) -> list[Decision]:
        for _ in range(rounds):
            before = self.decisions[-1].memory if self.decisions else PlanState()
            trainers = tuple(
                e.says(name, self.generations, self.now) for name, e in self.eaters.items()
            )
            seen = Inputs(
                self.now,
                SERIES,
                tuple(self.generations),
                trainers,
                tuple(self.batches),
                10**6,
                before,
            )
            self.decisions.append(decide(seen, self.policy))
            self.lines.append(to_json(Record(seen, self.policy, self.decisions[-1])))
            self._make(self.decisions[-1].inputs)
        return self.decisions[-rounds:]

    def _make(self, taken: int) -> None:
        start = self.now
        if taken:
            self._pass(taken * self.seconds)
            rows = int(taken * self.yields) // ROW
            self.generations.append(
                Generation(f"gen-{len(self.generations) + 1:04d}", rows, rows * ROW)
            )
            self.batches.append(Batch(taken, "published", start, self.now, rows * ROW))
        self._pass(start + self.every_hours * HOUR - self.now)

    def _pass(self, seconds: float) -> None:
        self.now += max(0.0, seconds)
        for eater in self.eaters.values():
            eater.live(max(0.0, seconds), sum(g.tokens for g in self.generations))


def landing(world: World, decision: Decision, rate: float) -> float:
    """Hours of supply for `rate` when the batch decided on lands."""
    return decision.supply_hours + decision.inputs * (world.yields / rate - world.seconds) / HOUR


def reversals(plans: list[int]) -> int:
    """How often a rise of the plan is followed by a fall, or the other way round."""
    moves = [b - a for a, b in itertools.pairwise(plans) if a != b]
    return sum((a > 0) != (b > 0) for a, b in itertools.pairwise(moves))


def is_near_the_horizon(world: World, decision: Decision, rate: float = 100.0) -> bool:
    """Within the dead band, the rounding to whole inputs, and what the batch's duration was
    misjudged by.
    """
    misjudged = abs(decision.batch_hours - decision.inputs * world.seconds / HOUR)
    return (
        abs(landing(world, decision, rate) - 24)
        <= 0.15 * 24 + world.yields / rate / HOUR + misjudged
    )


@pytest.mark.parametrize("rate", [50.0, 200.0, 330.0])
def test_after_a_step_of_demand_supply_is_back_at_the_horizon_and_stays(rate):
    world = World({"a": Eater(100.0)})
    assert is_near_the_horizon(world, world.run(12)[-1])
    world.eaters["a"].rate = rate
    # of 6 h: the slew limit doubles the plan at most, and a glut of days must be eaten
    recovery = world.run(8)
    settled = world.run(60)
    assert all(is_near_the_horizon(world, d, rate) for d in settled)
    assert {d.state for d in settled} == {"BALANCED"}
    # over the mark and back and once again, but no hunting
    assert reversals([d.memory.plan for d in recovery + settled]) <= 3
    if rate > 100:
        assert max(landing(world, d, rate) for d in recovery) < 1.25 * 24


def test_noise_of_demand_within_the_dead_band_leaves_the_plan_alone():
    world = World({"a": Eater(100.0)})
    world.run(20)
    plans = []
    for noise in (1.04, 0.97, 1.0, 1.05, 0.95, 0.98, 1.03) * 2:
        world.eaters["a"].rate = 100.0 * noise
        plans.append(world.run(1)[-1].inputs)
    # without a band: 5 % of 30 h are 7 % of 6 h, both ways and more
    assert max(plans) - min(plans) <= 0.2 * max(plans)
    assert all(d.state == "BALANCED" for d in world.decisions[20:])


def test_a_first_trainer_is_served_from_nothing_within_the_slew():
    decisions = World({"a": Eater(100.0)}).run(8)
    # static, then twice as much until it is enough
    assert [d.inputs for d in decisions[:4]] == [
        10,
        20,
        40,
        56,
    ]
    assert [d.state for d in decisions] == ["STARVED"] * 3 + ["BALANCED"] * 5
    assert (
        "most batches yielded nothing, or there is none, and there is no plan to keep: 10 inputs"
        in decisions[0].reasons
    )


def test_a_dead_trainer_goes_stale_and_its_plan_is_held():
    world = World({"a": Eater(100.0)})
    plan = world.run(10)[-1].memory.plan
    world.eaters["a"].alive, world.eaters["a"].died = False, world.now
    decisions = world.run(5)
    assert [(d.state, d.inputs) for d in decisions[1:]] == [("BLIND", decisions[0].memory.plan)] * 4
    # it has just told us
    assert decisions[0].state == "BALANCED" and decisions[0].memory.plan <= 2 * plan
    assert decisions[1].reasons == (
        "a is stale: it has not reported for too long",
        f"no live trainer reports its speed, the last plan stays: {decisions[1].inputs} inputs",
    )


def test_a_plan_skipped_in_a_glut_is_the_one_that_is_held():
    world = World({"a": Eater(100.0)})
    plan = world.run(10)[-1].memory.plan
    world.eaters["a"].rate = 30.0
    assert [(d.state, d.inputs, d.memory.plan) for d in world.run(2)] == [("GLUT", 0, plan)] * 2
    world.eaters["a"].alive, world.eaters["a"].died = False, world.now - 2 * HOUR
    assert [(d.state, d.inputs) for d in world.run(2)] == [("BLIND", plan)] * 2


def test_a_collapse_of_yield_to_a_tenth_is_followed():
    world = World({"a": Eater(100.0)})
    before = world.run(12)[-1].inputs
    world.yields, first = 10_000.0, len(world.decisions)
    world.run(40)
    assert [d.production.tokens_per_input for d in world.decisions[first:][:4]] == [
        100_000.0
    ] * 3 + [10_000.0]
    assert all(
        b.inputs <= 2 * max(a.inputs, before)
        for a, b in itertools.pairwise(world.decisions[first:])
        if a.inputs
    )
    assert all(is_near_the_horizon(world, d) for d in world.decisions[first + 15 :])
    assert reversals([d.memory.plan for d in world.decisions[first + 15 :]]) <= 2


def test_one_odd_batch_does_not_swing_the_plan():
    steady = tuple(
        Batch(10, "published", NOW - h * HOUR, NOW - h * HOUR + 360, 1_000_000)
        for h in (30, 24, 18, 12)
    )
    odd = Batch(500, "published", NOW - 6 * HOUR, NOW - HOUR, 1_000)
    usual, after = (decide(inputs(summary(), batches=b), POLICY) for b in (steady, (*steady, odd)))
    assert after.production == usual.production and after.inputs == usual.inputs


@pytest.mark.parametrize("skew_hours", [-7.0, 7.0, 1000.0])
def test_clocks_of_trainers_that_are_hours_off_change_no_decision(skew_hours):
    straight, skewed = World({"a": Eater(100.0)}), World({"a": Eater(100.0)})
    straight.run(1), skewed.run(1)  # the first reading has only the store's clock
    skewed.eaters["a"].skew = skew_hours * HOUR
    assert [d.inputs for d in straight.run(12)] == [d.inputs for d in skewed.run(12)]
    assert {d.state for d in skewed.decisions[4:]} == {"BALANCED"}
    line = summary()
    at_home, abroad = (
        dataclasses.replace(line, time="2020-01-01T00:00:00+00:00"),
        dataclasses.replace(line, time="2036-01-01T00:00:00+00:00"),
    )
    assert decide(inputs(at_home), POLICY) == decide(inputs(abroad), POLICY)


def test_a_trainer_thrown_back_to_its_checkpoint_has_that_much_more_to_read():
    ahead = summary(sequence=9, tokens_total=4_000_000, sources=read(4000))
    back = summary(
        sequence=10,
        tokens_total=1_000_000,
        sources=read(1000),
        tokens_per_second_without_stalls=None,
    )
    first = decide(
        inputs(ahead, generations=(Generation("gen-0001", 9000, 9_000_000),), before=PlanState(50)),
        POLICY,
    )
    later = inputs(
        back,
        generations=(Generation("gen-0001", 9000, 9_000_000),),
        before=first.memory,
        now=NOW + 60,
    )
    second = decide(later, POLICY)
    assert (first.supply_tokens, second.supply_tokens) == (5_000_000, 8_000_000)
    # not yet measured again: the last one known
    assert second.needs["a"].tokens_per_second == 100.0
    assert second.inputs < first.inputs
    forgotten = decide(dataclasses.replace(later, before=PlanState(30)), POLICY)
    assert (forgotten.state, forgotten.inputs) == ("BLIND", 30)


def test_trainers_share_generations_and_the_neediest_decides():
    slow_behind = summary("slow", tokens_per_second_without_stalls=10.0)
    fast_ahead = summary("fast", tokens_per_second_without_stalls=400.0, sources=read(8000))
    decided = decide(inputs(slow_behind, fast_ahead), POLICY)
    assert decided.demand_tokens_per_second == 410.0
    assert {n: t.unread for n, t in decided.needs.items()} == {"slow": 8_640_000, "fast": 640_000}
    assert decided.supply_tokens == 640_000 and decided.supply_hours == pytest.approx(
        640_000 / 400 / 3600
    )
    assert decided.state == "STARVED"
    assert (
        decided.inputs
        == decide(inputs(fast_ahead), POLICY).inputs
        > decide(inputs(slow_behind), POLICY).inputs
        == 0
    )
    twins = decide(
        inputs(summary("a", sources=read(8000)), summary("b", sources=read(8000))), POLICY
    )
    # not twice as much
    assert twins.inputs == decide(inputs(summary("a", sources=read(8000))), POLICY).inputs


def test_two_trainers_of_different_speeds_and_positions_never_run_dry():
    world = World({"slow": Eater(30.0), "fast": Eater(150.0)})
    world.run(10)
    world.eaters["late"] = Eater(100.0)  # begins at the first generation
    decisions = world.run(40)
    assert {d.state for d in decisions} == {"BALANCED"}
    assert min(d.supply_hours for d in decisions) > 12
    assert all(d.needs["fast"].hours == d.supply_hours for d in decisions)


def test_nothing_is_made_when_the_supply_covers_all_budgets():
    covered, open_end = summary("a", budget=8_000_000), summary("b", sources=read(8000))
    decided = decide(inputs(covered), POLICY)
    assert (decided.state, decided.inputs, decided.memory.plan) == ("FINISHING", 0, 0)
    assert decide(inputs(covered, open_end), POLICY).inputs > 0
    assert decide(inputs(summary(budget=8_640_001)), POLICY).inputs == 1  # one token short
    assert decide(inputs(summary(budget=0)), POLICY).demand_tokens_per_second == 0
    # less than an hour to read, but that is all it wants
    nearly = summary("a", budget=100_000, sources=read(8500))
    assert decide(inputs(nearly, summary("b", sources=read(4000))), POLICY).state == "BALANCED"
    done = summary("a", state="stopped", budget=0)
    assert decide(inputs(done, before=decided.memory), POLICY).state == "FINISHING"
    after = decide(inputs(done, summary("b", sources=read(8640)), before=decided.memory), POLICY)
    assert (after.state, after.inputs) == ("STARVED", 87)  # a new one: no plan to be near to


def test_a_world_with_a_budget_ends_with_little_left_over():
    world = World({"a": Eater(100.0, budget=40_000_000.0)})
    world.run(40)
    assert world.eaters["a"].read == 40_000_000
    assert 0 <= sum(g.tokens for g in world.generations) - 40_000_000 < world.yields
    assert [d.state for d in world.decisions[-3:]] == ["FINISHING"] * 3


def test_a_stall_of_the_loader_is_no_shortage():
    slow_loader = summary(data_wait_share=0.6, tokens_per_second=40.0)
    smooth = decide(inputs(summary()), POLICY)
    decided = decide(inputs(slow_loader), POLICY)
    assert decided.loader_stalls == ("a",) and decided.state == "BALANCED"
    assert (decided.inputs, decided.demand_tokens_per_second) == (smooth.inputs, 100.0)
    assert (
        "a waits for data with 8,640,000 tokens to read: its loader is too slow, not the supply"
        in decided.reasons
    )
    # as one that waits for the rows of another series
    deaf = decide(inputs(summary(state="waiting")), POLICY)
    assert deaf.loader_stalls == ("a",) and deaf.state == "BALANCED"
    for rows in (8640, 8600):  # the last rows of a generation may be too few for a step
        empty = decide(
            inputs(summary(state="waiting", data_wait_share=0.6, sources=read(rows))), POLICY
        )
        assert empty.loader_stalls == () and empty.state == "STARVED"


def test_a_trainer_that_never_had_anything_to_read_is_starved():
    decided = decide(
        inputs(summary(state="waiting", tokens_per_second_without_stalls=None), generations=()),
        POLICY,
    )
    assert (decided.state, decided.inputs) == ("STARVED", 10)


def test_without_any_trainer_ever_the_static_plan_holds():
    world = World({})
    assert [(d.state, d.inputs) for d in world.run(3)] == [("BLIND", 10)] * 3
    assert world.decisions[-1].reasons == (
        "no live trainer reports its speed, and there is no plan to keep: 10 inputs",
    )


def test_what_is_being_made_counts():
    running = Batch(40, "running", NOW - HOUR)
    alone = decide(inputs(summary(sources=read(6000))), POLICY)
    beside = decide(
        inputs(summary(sources=read(6000)), batches=(*inputs().batches, running)), POLICY
    )
    assert (alone.inputs, beside.inputs) == (20, 10)
    assert beside.production.pending == 4_000_000.0


def test_a_trainer_of_several_series_takes_its_share_of_each():
    mix = {
        SERIES + "/": Source("gen-0001", {"gen-0001": 2000}, 2_000_000, 3.0),
        "other": Source("gen-0007", {}, 6_000_000, 3.0),
    }
    need = decide(inputs(summary(sources=mix, budget=1_000_000)), POLICY).needs["a"]
    assert (need.tokens_per_second, need.unread, need.budget) == (25.0, 6_640_000, 250_000)
    moved = decide(inputs(summary(sources=read(2000, series="/mnt/elsewhere"))), POLICY)
    assert moved.supply_tokens == 6_640_000  # one source alone: another path to this series
    others = decide(inputs(summary(sources={"x": mix["other"], "y": mix["other"]})), POLICY)
    assert (
        others.state == "BLIND"
        and "a takes no more of this series: it is done, or reads others" in others.reasons
    )


def test_production_below_demand_is_told():
    slow = (Batch(10, "published", NOW - 9 * HOUR, NOW, 1_000_000),)  # 31 tokens/s
    assert (
        "a reads faster than batches are made: larger batches do not help, more workers may"
        in decide(inputs(summary(), batches=slow), POLICY).reasons
    )


def test_batches_that_yield_nothing_hold_the_plan_and_do_not_end_it():
    barren = tuple(Batch(10, "published", NOW - HOUR, NOW, tokens) for tokens in (1_000_000, 0, 0))
    decided = decide(inputs(summary(sources=read(8640)), batches=barren), POLICY)
    assert (decided.state, decided.inputs, decided.production.tokens_per_input) == (
        "STARVED",
        10,
        None,
    )


def test_a_plan_falls_by_the_slew_at_most():
    # 2 inputs short, 15 with the band
    assert decide(inputs(summary(), before=PlanState(40)), POLICY).inputs == 20


def test_rows_read_again_take_nothing_from_other_generations():
    two = (Generation("gen-0001", 100, 100_000), Generation("gen-0002", 50, 50_000))
    assert (
        decide(inputs(summary(sources=read(350)), generations=two), POLICY).supply_tokens == 50_000
    )


def test_after_the_end_of_one_trainer_another_gets_the_static_plan():
    unknown = summary("b", tokens_per_second_without_stalls=None)
    for line, batches in ((unknown, inputs().batches), (summary("b", sources=read(8000)), ())):
        assert decide(inputs(line, batches=batches, before=PlanState(0)), POLICY).inputs == 10


def test_a_held_plan_does_not_creep_by_rounding():
    tokens, made_of, plan = 1, 5, 3
    assert plan * (tokens / made_of) / (tokens / made_of) > plan
    batches = (Batch(made_of, "published", NOW, NOW, tokens),)
    starved = inputs(summary(), generations=(), batches=batches, before=PlanState(plan))
    assert decide(starved, Policy(slew=1.0)).inputs == plan


@pytest.mark.parametrize(
    "wrong, reason",
    [
        ({"min_inputs": 5, "max_inputs": 4}, "min_inputs = 5 exceeds max_inputs = 4"),
        ({"dead_band": 1.0}, "dead_band"),
        ({"horizon_hours": math.nan}, "finite"),
        ({"horizont": 3}, "horizont"),
    ],
)
def test_a_policy_that_cannot_be_is_refused(wrong, reason):
    with pytest.raises(ValidationError, match=reason):
        Policy(**wrong)


# --- laws -----------------------------------------------------------------------------------------

# each is mostly of a size at which the others matter, and now and then of any size
TOKENS = st.integers(0, 10**8) | st.integers(0, 10**13)
RATES = st.floats(1, 1e4) | st.floats(1, 1e4) | st.floats(0, 1e308) | st.none()
BUDGETS = st.none() | st.none() | TOKENS | st.just(10**400)
ROWS = st.sampled_from(
    [{}, {"gen-0001": 500}, {"gen-0001": 1000, "gen-0002": 3}, {"gen-0001": 3000, "gen-0009": 1}]
)
BATCHES = st.builds(
    Batch,
    st.integers(0, 99),
    st.sampled_from(["running", "published", "failed"]),
    st.just(NOW - 9e4),
    st.none() | st.floats(NOW - 1e5, NOW),
    TOKENS,
)


@st.composite
def summaries(draw, name: str) -> Summary:
    own, others = (Source("", draw(ROWS), draw(TOKENS), None) for _ in range(2))
    sources = draw(
        st.sampled_from(
            [
                {},
                {SERIES: own},
                {SERIES: own},
                {SERIES: own, "other": others},
                {"x": own, "y": others},
            ]
        )
    )
    return summary(
        name,
        modified=draw(st.none() | st.none() | st.floats(NOW - 1e3, NOW + 1e3)),
        state=draw(
            st.sampled_from(["running", "running", "running", "waiting", "stopped", "failed"])
        ),
        tokens_per_second_without_stalls=draw(RATES),
        data_wait_share=draw(st.none() | st.floats(0, 1)),
        sources=sources,
        budget=draw(BUDGETS),
    )


@st.composite
def situations(draw) -> tuple[Inputs, Policy]:
    names = draw(st.sampled_from([(), ("gen-0001",), ("gen-0001", "gen-0002")]))
    found = inputs(
        *(draw(summaries(name)) for name in draw(st.sampled_from(["", "a", "ab", "ab"]))),
        generations=tuple(
            Generation(name, draw(st.integers(0, 1000)), draw(TOKENS)) for name in names
        ),
        batches=tuple(draw(st.lists(BATCHES, max_size=3))),
        before=PlanState(
            draw(st.none() | st.integers(0, 1000)), {}, draw(st.sampled_from([{}, {"a": 50.0}]))
        ),
        inputs_left=draw(st.just(10**6) | st.integers(0, 100)),
    )
    low = draw(st.integers(1, 10))
    policy = Policy(
        horizon_hours=draw(st.floats(1, 100) | st.floats(1e-3, 8760)),
        min_inputs=low,
        max_inputs=draw(st.integers(low, 10**5)),
        static_inputs=draw(st.integers(1, 1000)),
        slew=draw(st.floats(1, 9) | st.floats(1, 1e308)),
        dead_band=draw(st.floats(0, 1, exclude_max=True)),
        yield_window=draw(st.integers(1, 9)),
        starved_hours=draw(st.floats(1e-3, 100)),
    )
    return found, policy


@given(situations())
def test_a_decision_is_within_its_bounds_and_survives_json_and_replay(situation):
    found, policy = situation
    decided = decide(found, policy)
    assert 0 <= decided.inputs <= min(policy.max_inputs, found.inputs_left)
    assert decided.inputs == 0 or decided.inputs >= min(policy.min_inputs, found.inputs_left)
    assert decided.reasons
    for value in (found, policy, decided):
        again = from_json(type(value), to_json(value))
        assert again == value and to_json(again) == to_json(value)
    assert replay([to_json(Record(found, policy, decided))]) == []


@given(situations(), st.integers(1, 10**12))
def test_more_supply_never_asks_for_more_inputs(situation, more):
    found, policy = situation
    richer = dataclasses.replace(
        found, generations=(*found.generations, Generation("gen-0005", more, more))
    )
    assert decide(richer, policy).inputs <= decide(found, policy).inputs


@given(situations(), st.floats(1, 1e3), st.sampled_from("ab"))
def test_more_demand_never_asks_for_fewer_inputs(situation, factor, who):
    found, policy = situation

    def faster(line: Summary) -> Summary:
        rate = line.report.tokens_per_second_without_stalls
        return (
            line
            if rate is None or line.trainer != who
            else dataclasses.replace(
                line,
                report=dataclasses.replace(
                    line.report, tokens_per_second_without_stalls=min(rate * factor, 1e308)
                ),
            )
        )

    hungrier = dataclasses.replace(found, trainers=tuple(faster(line) for line in found.trainers))
    assert decide(hungrier, policy).inputs >= decide(found, policy).inputs


def test_a_world_is_replayed_and_what_was_tampered_with_is_found():
    world = World({"a": Eater(100.0), "b": Eater(70.0)})
    world.run(6)
    assert replay(world.lines) == []
    broken = json.loads(world.lines[3])
    broken["decision"]["inputs"] += 1
    newer = json.loads(world.lines[4]) | {"version": 2}
    lines = [
        *world.lines[:3],
        json.dumps(broken).encode(),
        json.dumps(newer).encode(),
        world.lines[5][:-9],
        b"\xff",
        b"[1]",
        b"[" * 100_000,
    ]
    found = replay(lines)
    assert [mismatch.line for mismatch in found] == [4, 5, 6, 7, 8, 9]
    was = world.decisions[3].inputs
    assert found[0].what == f"inputs was {was + 1}, is {was}"
    assert "version" in found[1].what
    assert all(mismatch.what.startswith("cannot be read: ") for mismatch in found[1:])


def test_a_log_of_an_earlier_version_is_replayed():
    lines = (Path(__file__).parent / "decisions_v1.jsonl").read_bytes().splitlines()
    assert len(lines) == 5 and replay(lines) == []


def test_the_wording_of_reasons_may_change_between_versions():
    world = World({"a": Eater(100.0)})
    world.run(1)
    line = json.loads(world.lines[0])
    line["decision"]["reasons"] = ["worded differently"]
    assert replay([json.dumps(line).encode()]) == []
