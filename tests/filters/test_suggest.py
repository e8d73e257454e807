"""Suggestions for misspelled names."""

import pytest

from filters.suggest import did_you_mean


@pytest.mark.parametrize(
    "name, known, expected",
    [
        ("c5", ["c4", "fineweb"], "; did you mean 'c4'?"),
        ("phone", ["EMAIL_ADDRESS", "PHONE_NUMBER"], "; did you mean 'PHONE_NUMBER'?"),
        ("c4.word_cuont", ["c4.word_count", "c4.lines"], "; did you mean 'c4.word_count'?"),
        ("zzz", ["a", "b", "a"], "; known: a, b"),
        ("zzz", iter([]), ""),
        ("", ["a"], "; known: a"),
        ("zzz", map(str, range(31)), f"; known: {', '.join(map(str, range(30)))}, …"),
    ],
)
def test_the_nearest_name_is_suggested(name, known, expected):
    assert did_you_mean(name, known) == expected


def test_a_name_with_equal_last_parts_suggests_the_first():
    assert did_you_mean("score", ["b.score", "a.score"]) == "; did you mean 'b.score'?"
