"""Parts that are read ahead."""

import threading

import pytest

from stages.storage.parts import read_ahead


def test_items_are_read_ahead_of_their_turn_and_come_in_order():
    others = threading.Barrier(3, timeout=20)  # passes only if three are read at once

    def read(item):
        others.wait()
        return item * item

    assert list(read_ahead(read, range(9), at_once=3)) == [n * n for n in range(9)]


def test_no_more_are_read_than_asked_and_an_error_comes_in_its_turn():
    begun = []

    def read(item):
        begun.append(item)
        if item == 4:
            raise ValueError("wrong part")
        return item

    results = read_ahead(read, range(100), at_once=2)
    assert [next(results) for _ in range(4)] == [0, 1, 2, 3] and len(begun) <= 7
    with pytest.raises(ValueError, match="wrong part"):
        next(results)
