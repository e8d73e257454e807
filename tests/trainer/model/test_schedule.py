"""The learning rate: its corners, and that a change on resuming leaves the past as it was."""

import itertools
import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import ScheduleConfig
from trainer.model.schedule import Schedule, change_of, resumed

COSINE = ScheduleConfig(name="cosine", warmup_steps=4, min_ratio=0.1)
LINEAR = replace(COSINE, name="linear")
WSD = replace(COSINE, name="wsd", decay_share=0.25)


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        (COSINE, 0, 0.25),  # not 0: the first step counts
        (COSINE, 3, 1.0),
        (COSINE, 11, 0.55),  # half-way down
        (COSINE, 19, 0.1),
        (COSINE, 500, 0.1),
        (LINEAR, 3, 1.0),
        (LINEAR, 7, 0.775),
        (LINEAR, 11, 0.55),
        (LINEAR, 19, 0.1),
        (WSD, 3, 1.0),
        (WSD, 14, 1.0),
        (WSD, 15, 0.82),  # a fifth down
        (WSD, 19, 0.1),
        (replace(WSD, decay_share=0.0), 19, 1.0),
        (replace(WSD, decay_share=1.0), 3, 1.0),  # never down while it goes up
        (replace(COSINE, warmup_steps=0), 0, 0.1 + 0.9 * (1 + math.cos(math.pi / 20)) / 2),
        (replace(COSINE, warmup_steps=40), 19, 0.5),  # ends while it goes up
        (replace(COSINE, warmup_steps=20), 20, 0.1),
    ],
)
def test_rates_of_20_steps_at_their_corners(schedule, step, expected):
    assert Schedule(schedule, 20).rate(step, 2.0) == pytest.approx(2.0 * expected)


@pytest.mark.parametrize("schedule", [COSINE, LINEAR, WSD])
def test_without_a_known_end_the_rate_stays_up(schedule):
    assert [Schedule(schedule, 0).rate(step, 1.0) for step in (0, 3, 4, 10**6)] == [0.25, 1, 1, 1]


@given(
    name=st.sampled_from(["cosine", "linear", "wsd"]),
    warmup=st.integers(0, 30),
    total=st.integers(1, 60),
    share=st.floats(0, 1),
    low=st.floats(0, 1),
)
def test_rates_rise_to_the_base_then_fall_and_stay_within_bounds(name, warmup, total, share, low):
    schedule = ScheduleConfig(name=name, warmup_steps=warmup, decay_share=share, min_ratio=low)
    rates = [Schedule(schedule, total).rate(step, 3.0) for step in range(total + 5)]
    up, down = rates[: min(warmup, total)], rates[min(warmup, total) :]
    assert up == sorted(up)
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(down)) or warmup > total
    assert all(0 < rate <= 3 + 1e-12 for rate in up)
    assert all(3 * low - 1e-9 <= rate <= 3 + 1e-9 for rate in rates[warmup:])


SCHEDULES = st.builds(
    ScheduleConfig,
    name=st.sampled_from(["cosine", "linear", "wsd"]),
    warmup_steps=st.integers(0, 10),
    decay_share=st.floats(0, 1),
    min_ratio=st.floats(0, 1),
)


@given(st.lists(st.tuples(SCHEDULES, st.integers(0, 60), st.integers(1, 30)), min_size=2))
def test_a_resumed_schedule_goes_on_from_the_rate_that_was_reached(changes):
    """However often the settings change, and wherever it resumes from."""
    schedule, step, taken = None, 0, []
    for config, total, steps in changes:
        new = Schedule(config, total)
        before = None if schedule is None else json.loads(json.dumps(schedule.state()))
        resumed_schedule = resumed(before, new, step=step)
        if schedule is not None and resumed_schedule.anchor == step:
            rate = resumed_schedule.rate(step, 1.0)
            assert rate <= taken[-1] + 1e-12  # it never jumps up
            # and the next restart from the same checkpoint takes the same steps
            assert resumed(before, new, step=step) == resumed_schedule
        schedule = resumed_schedule
        state = json.loads(json.dumps(schedule.state()))
        assert resumed(state, new, step=step + steps) == schedule  # unchanged settings: no anchor
        taken += [schedule.rate(n, 1.0) for n in range(step, step + steps)]
        step += steps


def test_more_steps_leave_the_rates_that_were_taken_and_fall_from_there():
    first, longer = Schedule(COSINE, 20), Schedule(COSINE, 40)
    after = resumed(first.state(), longer, step=12)
    assert after == Schedule(COSINE, 40, anchor=12, anchor_ratio=pytest.approx(0.55))
    assert after.rate(12, 1.0) < 0.55 < longer.rate(11, 1.0)
    assert after.rate(39, 1.0) == pytest.approx(0.1)
    assert change_of(after, longer, base_lr=1e-3) == (
        "max_steps or schedule was changed at step 12: the learning rate goes on from there, "
        "0.00055 to 0.0001 at step 40; the new schedule alone would have been at 0.000895"
    )
    ended = resumed(first.state(), longer, step=20)
    assert [ended.rate(n, 1.0) for n in (20, 30, 39)] == pytest.approx([0.1] * 3)


@pytest.mark.parametrize(
    ("before", "after", "step"),
    [
        (Schedule(COSINE, 20), Schedule(COSINE, 40), 4),  # while it goes up
        (Schedule(WSD, 20), Schedule(WSD, 40), 15),  # before it goes down
        (Schedule(COSINE, 20), Schedule(COSINE, 20), 15),
    ],
)
def test_a_change_that_leaves_the_past_alone_needs_no_word(before, after, step):
    schedule = resumed(before.state(), after, step=step)
    assert change_of(schedule, after, base_lr=1.0) is None
    assert [schedule.rate(n, 1.0) for n in range(step, 60)] == [
        after.rate(n, 1.0) for n in range(step, 60)
    ]


def test_a_checkpoint_without_a_schedule_is_resumed_under_the_new_one():
    assert resumed(None, Schedule(COSINE, 20), step=7) == Schedule(COSINE, 20)
