"""Planning of global batches: shares, stretches over generations, divisibility.

Pure arithmetic against slow oracles.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.order import (
    Position,
    assign_sources,
    interleave,
    micro_batches_per_rank,
    next_slices,
)

WEIGHTS = st.lists(st.sampled_from([0.1, 0.25, 1.0, 3.0, 7.5]), min_size=1, max_size=5)


@given(WEIGHTS, st.integers(1, 300))
def test_every_share_is_met_within_rows(weights, rows):
    counts = np.zeros(len(weights))
    for owner in assign_sources(weights, [0] * len(weights), rows):
        counts[owner] += 1
    assert np.abs(counts - np.array(weights) / sum(weights) * rows).max() < len(weights)


@given(WEIGHTS, st.integers(0, 60), st.integers(0, 60))
def test_the_counters_are_all_the_state_there_is(weights, first, second):
    at_once = assign_sources(weights, [0] * len(weights), first + second)
    before = np.bincount(at_once[:first], minlength=len(weights)).tolist()
    assert assign_sources(weights, before, second).tolist() == at_once[first:].tolist()


def test_sources_alternate_within_a_batch():
    assert assign_sources([2, 1, 1], [0, 0, 0], 8).tolist() == [0, 1, 2, 0, 0, 1, 2, 0]


@given(
    st.lists(st.integers(0, 6), max_size=5),
    st.lists(st.integers(0, 7), max_size=8),
    st.integers(1, 3),
)
def test_stretches_walk_through_the_rows_of_all_epochs_in_order(sizes, counts, epochs):
    everything = [
        (epoch, at, row)
        for epoch in range(epochs)
        for at, size in enumerate(sizes)
        for row in range(size)
    ]
    position, done = Position(), 0
    for count in counts:
        found = next_slices(sizes, position, count, epochs=epochs)
        if done + count > len(everything):
            assert found is None
            continue
        assert found is not None
        spans, position = found
        walked = [(s.epoch, s.gen_index, row) for s in spans for row in range(s.start, s.stop)]
        assert walked == everything[done : done + count]
        done += count


def test_what_is_left_waits_for_the_next_generation():
    _, position = next_slices([5], Position(), 3, epochs=1)
    assert next_slices([5], position, 4, epochs=1) is None
    spans, _ = next_slices([5, 9], position, 4, epochs=1)
    assert spans == [(0, 0, 3, 5), (0, 1, 0, 2)]


@given(st.integers(0, 200), st.integers(1, 20))
def test_interleaving_deals_out_every_row_once_and_lanes_in_turn(rows, lanes):
    lists = [list(range(rows * i // lanes, rows * (i + 1) // lanes)) for i in range(lanes)]
    dealt = []
    while any(lists):
        dealt += [lane.pop(0) for lane in lists if lane]
    assert interleave(np.arange(rows), lanes).tolist() == dealt


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 16))
def test_only_ranks_that_divide_the_batch_are_taken(micros, micro_rows, world_size):
    if micros % world_size == 0:
        assert (
            micro_batches_per_rank(micros * micro_rows, micro_rows, world_size) * world_size
            == micros
        )
    else:
        with pytest.raises(ValueError, match="does not divide among"):
            micro_batches_per_rank(micros * micro_rows, micro_rows, world_size)


def test_the_error_lists_the_numbers_of_ranks_that_divide():
    with pytest.raises(
        ValueError, match=r"among 5 ranks; run with 1, 2, 3, 4, 6, 12 ranks, or change"
    ):
        micro_batches_per_rank(96, 8, 5)
    with pytest.raises(ValueError, match="positive multiple of micro_batch_rows=8"):
        micro_batches_per_rank(12, 8, 1)
