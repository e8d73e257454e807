"""Simulated traces of demand and yield (benchmarks.controller): what the controller makes of them."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.controller import TRACES, Trainer, World, foresee, play
from pipeline.controller.decide import HOUR
from pipeline.controller.policy import Policy
from pipeline.controller.records import Decision
from tests.support.examples import at_most


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
    world = World({"a": Trainer(100.0)})
    assert is_near_the_horizon(world, world.run(12)[-1])
    world.trainers["a"].rate = rate
    # of 6 h: the slew limit doubles the plan at most, and a glut of days must be read
    recovery = world.run(8)
    settled = world.run(60)
    assert all(is_near_the_horizon(world, d, rate) for d in settled)
    assert {d.state for d in settled} == {"BALANCED"}
    # over the mark and back and once again, but no hunting
    assert reversals([d.memory.plan for d in recovery + settled]) <= 3
    if rate > 100:
        assert max(landing(world, d, rate) for d in recovery) < 1.25 * 24


def test_noise_of_demand_within_the_dead_band_leaves_the_plan_alone():
    world = World({"a": Trainer(100.0)})
    world.run(20)
    plans = []
    for noise in (1.04, 0.97, 1.0, 1.05, 0.95, 0.98, 1.03) * 2:
        world.trainers["a"].rate = 100.0 * noise
        plans.append(world.run(1)[-1].inputs)
    # without a band: 5 % of 30 h are 7 % of 6 h, both ways and more
    assert max(plans) - min(plans) <= 0.2 * max(plans)
    assert all(d.state == "BALANCED" for d in world.decisions[20:])


def test_a_first_trainer_is_served_from_nothing_beyond_the_slew():
    decisions = World({"a": Trainer(100.0)}).run(8)
    # static; then what is read until the next batch lands; then the slew limit holds
    assert [d.inputs for d in decisions[:4]] == [10, 26, 52, 52]
    assert [d.state for d in decisions] == ["STARVED"] * 2 + ["BALANCED"] * 6
    assert (
        "most batches yielded nothing, or there is none, and there is no plan to keep: 10 inputs"
        in decisions[0].reasons
    )
    assert decisions[1].reasons[-1] == (
        "2,599,200 tokens / 100,000 per input = 26.0 inputs are read before the batch after this "
        "one lands; neither dead band nor slew holds them back: 26"
    )


@pytest.mark.parametrize(
    "state, why",
    [
        ("dead", "is silent: it has not reported for too long, and may read on or be dead"),
        ("stopped", "has stopped before the end of its budget, and may come back"),
        ("failed", "has failed, and may come back"),
    ],
)
def test_for_a_trainer_that_is_gone_batches_end_when_its_supply_covers_the_horizon(state, why):
    world = World({"a": Trainer(100.0)})
    world.run(10)
    world.trainers["a"].state = state
    gone = world.run(20)
    assert {d.state for d in gone[1:]} == {"BLIND"}
    assert f"a {why}" in gone[1].reasons
    left = (world.supply - world.trainers["a"].read) / 100.0 / HOUR
    one_input = world.yields / 100.0 / HOUR
    assert 24 <= left < 24 * 1.15 + gone[0].batch_hours + one_input
    assert [d.inputs for d in gone[2:]] == [0] * 18
    assert gone[2].reasons[-1] == (
        "what absent trainers have not read covers their demand as last known: 0 inputs"
    )
    world.trainers["a"].state = "running"
    back = world.run(9)[1:]
    assert {d.state for d in back} <= {"GLUT", "BALANCED"} and any(d.inputs for d in back)


def test_a_trainer_that_has_finished_needs_nothing_and_one_that_is_silent_beside_it_does():
    world = World({"a": Trainer(100.0, budget=20_000_000.0), "b": Trainer(100.0)})
    world.run(3)
    world.trainers["b"].state = "dead"
    world.trainers["b"].last_read = world.trainers["b"].read = 0.0
    late = world.run(30)[-1]
    assert (late.state, late.inputs) == ("BLIND", 0)
    assert "a has finished: it has no budget left, and needs nothing" in late.reasons
    world.trainers["b"].budget = 0.0
    assert (world.run(1)[0].state, world.decisions[-1].reasons[-1]) == (
        "FINISHING",
        "all trainers have finished",
    )


def test_a_plan_skipped_in_a_glut_is_the_one_that_the_next_starts_from():
    world = World({"a": Trainer(100.0)})
    plan = world.run(10)[-1].memory.plan
    world.trainers["a"].rate = 30.0
    assert [(d.state, d.inputs, d.memory.plan) for d in world.run(2)] == [("GLUT", 0, plan)] * 2


def test_a_collapse_of_yield_to_a_tenth_is_followed():
    world = World({"a": Trainer(100.0)})
    world.run(12)
    world.yields, first = 10_000.0, len(world.decisions)
    starved = world.trainers["a"].starved_seconds
    decisions = world.run(40)
    assert world.trainers["a"].starved_seconds - starved < HOUR
    assert [d.production.tokens_per_input for d in decisions[:4]] == [100_000.0] * 3 + [10_000.0]
    assert [d.production.lowest_per_input for d in decisions[:2]] == [100_000.0, 10_000.0]
    assert all(is_near_the_horizon(world, d) for d in world.decisions[first + 15 :])
    assert reversals([d.memory.plan for d in world.decisions[first + 15 :]]) <= 2


@pytest.mark.parametrize("skew_hours", [-7.0, 7.0, 1000.0])
def test_clocks_of_trainers_that_are_hours_off_change_no_decision(skew_hours):
    straight, skewed = World({"a": Trainer(100.0)}), World({"a": Trainer(100.0)})
    straight.run(1), skewed.run(1)  # the first reading has only the store's clock
    skewed.trainers["a"].skew = skew_hours * HOUR
    assert [d.inputs for d in straight.run(12)] == [d.inputs for d in skewed.run(12)]
    assert {d.state for d in skewed.decisions[4:]} == {"BALANCED"}


def test_two_trainers_of_different_speeds_and_positions_never_run_dry():
    world = World({"slow": Trainer(30.0), "fast": Trainer(150.0)})
    world.run(10)
    world.trainers["late"] = Trainer(100.0)  # begins at the first generation
    decisions = world.run(40)
    assert {d.state for d in decisions} == {"BALANCED"}
    assert min(d.supply_hours for d in decisions) > 12
    assert all(d.needs["fast"].hours == d.supply_hours for d in decisions)


def test_a_world_with_a_budget_ends_with_little_left_over():
    world = World({"a": Trainer(100.0, budget=40_000_000.0)})
    world.run(40)
    assert world.trainers["a"].read == 40_000_000
    assert 0 <= sum(g.tokens for g in world.generations) - 40_000_000 < world.yields
    assert [d.state for d in world.decisions[-3:]] == ["FINISHING"] * 3


def test_without_any_trainer_ever_static_batches_are_made_for_a_horizon():
    world = World({})
    decisions = world.run(8)
    # one each 6 h of the 24 h
    assert [(d.state, d.inputs) for d in decisions] == [("BLIND", 10)] * 4 + [("BLIND", 0)] * 4
    assert decisions[4].reasons == (
        "no live trainer reports its speed, and 4,000,000 unread tokens are what batches of 10 "
        "inputs yield in a horizon, 4.0 of them: 0 inputs",
    )
    world.trainers["a"] = Trainer(100.0)
    assert world.run(1)[0].inputs > 0


# --- the traces of the benchmark ------------------------------------------------------------------

# hours starved before and after the change, GPU-hours lost, hours left
GOLDEN = {
    "constant": (3.5, 0.0, 3.5, 17.9),
    "constant, 24 h apart": (22.2, 0.0, 22.2, 3.8),
    "constant, 24 h apart by schedule": (0.1, 0.0, 0.1, 4.7),
    "constant, 36 h apart": (34.6, 0.0, 34.6, 4.5),
    "noise of 20 %": (3.5, 0.0, 3.6, 17.1),
    "1 to 8 GPUs": (3.5, 0.9, 10.4, 16.5),
    "1 to 8 GPUs, 24 h apart": (22.2, 8.3, 88.7, 8.2),
    "1 to 8 GPUs, 24 h apart by schedule": (0.1, 8.9, 71.7, 8.2),
    "1 to 8 GPUs, slow batches": (4.0, 4.0, 36.3, 19.4),
    "8 to 1 GPUs": (8.2, 0.0, 65.4, 16.2),
    "a third of the yield": (3.5, 0.0, 3.5, 15.6),
    "a third of the yield, 24 h apart": (22.2, 13.5, 35.7, 4.2),
    "a third of the yield, 24 h apart by schedule": (0.1, 16.7, 16.8, 4.3),
    "fails, back in 3 days": (3.5, 0.0, 3.5, 19.6),
    "dies silently, back in 3 days": (3.5, 0.0, 3.5, 19.6),
    "dies silently": (3.5, 0.0, 3.5, 25.7),
    "stops early": (3.5, 0.0, 3.5, 24.3),
    "finishes": (3.5, 0.0, 3.5, 0.0),
    "feedback is lost": (3.5, 334.3, 337.8, 0.0),
    "the first comes after 10 days": (0.0, 0.0, 0.0, 16.1),
}


@pytest.mark.parametrize("name", TRACES)
def test_a_trace_has_its_figures(name):
    assert tuple(round(figure, 1) for figure in play(TRACES[name])) == GOLDEN[name]


@pytest.mark.parametrize("name", TRACES)
def test_an_oracle_of_demand_and_yield_starves_no_trainer_after_its_first_batch(name):
    outcome = play(TRACES[name], oracle=foresee)
    first_batch = 3.5  # hours, that of 8 GPUs
    assert outcome.early_hours + outcome.late_hours <= first_batch


@st.composite
def steady_worlds(draw) -> tuple[World, float]:
    """Constant demand and yield under any policy, and the factor of a jump of demand.

    Production is busy at most .9 of the time.
    """
    rate, jump = draw(st.floats(10, 1e4)), draw(st.floats(0.1, 10))
    busy, yields = draw(st.floats(0.01, 0.9)), draw(st.sampled_from([10_000.0, 100_000.0, 1e6]))
    policy = Policy(
        horizon_hours=draw(st.floats(0.5, 96)),
        max_inputs=10**9,
        static_inputs=draw(st.integers(1, 50)),
        slew=draw(st.floats(1, 4)),
        dead_band=draw(st.floats(0, 0.99)),
        yield_window=draw(st.integers(1, 9)),
    )
    seconds = busy * yields / rate / max(1.0, jump)
    hours, schedule = draw(st.floats(0.5, 72)), draw(st.booleans())
    return World({"a": Trainer(rate)}, yields, seconds, hours, schedule, policy), jump


@at_most(40)
@given(steady_worlds())
def test_under_constant_demand_supply_never_runs_out_after_a_few_batches(drawn):
    """Whatever period, horizon, slew and dead band, and again after a jump of demand."""
    world, jump = drawn
    trainer = world.trainers["a"]
    for factor in (1.0, jump):
        trainer.rate *= factor
        world.run(12)
        starved = trainer.starved_seconds
        world.run(30)
        assert trainer.starved_seconds == starved
