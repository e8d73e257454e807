"""The controller of batches: single decisions, and the laws that hold for every one."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from benchmarks.controller import NOW, POLICY, ROW, SERIES, Trainer, World
from pipeline.controller.decide import HOUR, decide, replay
from pipeline.controller.policy import Policy
from pipeline.controller.records import (
    Batch,
    Generation,
    Inputs,
    PlanState,
    Record,
    from_json,
    to_json,
)
from trainer.telemetry.feedback import Report, Source, Summary


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


def test_one_odd_batch_does_not_swing_the_plan():
    steady = tuple(
        Batch(10, "published", NOW - h * HOUR, NOW - h * HOUR + 360, 1_000_000)
        for h in (30, 24, 18, 12)
    )
    odd = Batch(500, "published", NOW - 6 * HOUR, NOW - HOUR, 1_000)
    usual, after = (decide(inputs(summary(), batches=b), POLICY) for b in (steady, (*steady, odd)))
    assert after.production == usual.production._replace(lowest_per_input=2.0)
    assert after.inputs == usual.inputs
    # but where a trainer would run dry it may be the new yield: what a period allows, 6 h of 36 s
    hungry = summary(sources=read(8640))
    short = decide(inputs(hungry, batches=(*steady, odd)), POLICY)
    assert short.inputs == 600 > decide(inputs(hungry, batches=steady), POLICY).inputs


def test_the_trainers_own_clock_decides_nothing():
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


def test_a_speed_of_zero_is_unknown():
    """As None: the last known one counts, and there is none without one."""
    known = PlanState(10, rates={"a": 100.0})
    for before in (known, PlanState(10)):
        zero, unknown = (
            decide(inputs(summary(tokens_per_second_without_stalls=s), before=before), POLICY)
            for s in (0.0, None)
        )
        assert zero == unknown
        assert zero.needs["a"].tokens_per_second == before.rates.get("a")


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


def test_a_live_trainer_of_unknown_speed_gets_plans_until_it_has_a_horizon_of_them_unread():
    unknown = summary(tokens_per_second_without_stalls=None)
    before = PlanState(10, decided=(NOW - 6 * HOUR,))  # four plans of 1,000,000 tokens in 24 h

    def decided(rows):
        generations = (Generation("gen-0001", rows, rows * ROW),)
        return decide(inputs(unknown, generations=generations, before=before), POLICY)

    assert [(d.state, d.inputs) for d in map(decided, (0, 3999, 4000))] == [
        ("STARVED", 10),
        ("BLIND", 10),
        ("BLIND", 0),
    ]


def test_a_live_trainer_decides_and_one_that_is_gone_does_not():
    gone = summary("b", state="failed", tokens_per_second_without_stalls=900.0)
    alone, beside = decide(inputs(summary()), POLICY), decide(inputs(summary(), gone), POLICY)
    assert (beside.inputs, beside.needs) == (alone.inputs, alone.needs)
    assert "b has failed, and may come back" in beside.reasons


def test_the_schedulers_own_period_counts_where_it_is_known():
    late = PlanState(10, decided=(NOW - 6 * HOUR, NOW - HOUR))
    hungry = summary(sources=read(8000))
    learned, known = (
        decide(inputs(hungry, before=late, period_seconds=p), POLICY) for p in (None, 24 * HOUR)
    )
    assert (learned.period_hours, known.period_hours) == (3.0, 24.0)
    assert known.inputs > learned.inputs


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
        and "a takes no more of this series: it reads others" in others.reasons
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
    # enough for the window, not for the horizon, of which the slew limit allows the last plan
    waiting = inputs(
        summary(tokens_per_second_without_stalls=1.0),
        generations=(Generation("gen-0001", 8, 15_000),),
        batches=batches,
        before=PlanState(plan, decided=(NOW - 3 * HOUR,)),
    )
    assert decide(waiting, Policy(slew=1.0)).inputs == plan


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
            draw(st.none() | st.integers(0, 1000)),
            {},
            draw(st.sampled_from([{}, {"a": 50.0}])),
            draw(st.sampled_from([(), (NOW - 9e4,), (NOW - 2e5, NOW - 1e5, NOW)])),
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
    world = World({"a": Trainer(100.0), "b": Trainer(70.0)})
    world.run(6)
    assert replay(world.lines) == []
    broken = json.loads(world.lines[3])
    broken["decision"]["inputs"] += 1
    newer = json.loads(world.lines[4]) | {"version": 3}
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


def log(version: int) -> list[bytes]:
    """Five decisions of a world, in a version of the log."""
    return (Path(__file__).parent / f"decisions_v{version}.jsonl").read_bytes().splitlines()


def test_a_log_of_this_version_is_decided_the_same():
    assert len(log(2)) == 5 and replay(log(2)) == []


def test_a_log_of_version_1_is_read_and_what_was_decided_otherwise_is_told():
    assert len(log(1)) == 5 and replay(log(1)) == [
        (2, "inputs by version 1 was 20, is 26"),
        (5, "inputs by version 1 was 18, is 9"),
    ]


def test_a_series_goes_on_from_a_log_of_version_1():
    last = from_json(Record, log(1)[-1])
    went_on = dataclasses.replace(last.inputs, before=last.decision.memory, now=NOW + 250_000)
    # starts of batches stand for the decisions that it does not list
    assert decide(went_on, last.policy).period_hours == pytest.approx(6, rel=0.5)


def test_the_wording_of_reasons_may_change_between_versions():
    world = World({"a": Trainer(100.0)})
    world.run(1)
    line = json.loads(world.lines[0])
    line["decision"]["reasons"] = ["worded differently"]
    assert replay([json.dumps(line).encode()]) == []
