"""The shared view: how a text falls into words, lines, paragraphs and sentences, and which n-grams
repeat.
"""

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.text.view import TextView
from tests.support.texts import REPETITIVE, TEXTS


@pytest.mark.parametrize(
    "text, words",
    [
        ("", []),
        ("One, two.", ["One", ",", "two", "."]),
        ("well-known and/or new", ["well", "-", "known", "and", "/", "or", "new"]),
        ("It's what O'Brien don’t", ["It", "'s", "what", "O'Brien", "don", "’t"]),
        ("1,000 at 10:30 or 3.5%", ["1,000", "at", "10:30", "or", "3.5", "%"]),
        ("the end.Start at example.com", ["the", "end", ".", "Start", "at", "example.com"]),
        ("see https://a.org/b?c=d or me@b.de", ["see", "https://a.org/b?c=d", "or", "me@b.de"]),
        ("e.g. J. Doe of the U.S.", ["e.g.", "J.", "Doe", "of", "the", "U.S."]),
        ("run --help in /etc 2025-10", ["run", "--help", "in", "/etc", "2025", "-", "10"]),
        ("wait... what…", ["wait", "...", "what", "…"]),
        ("snake_case __init__", ["snake_case", "_", "_", "init", "_", "_"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("ok 👍👍", ["ok", "👍", "👍"]),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert TextView(text).words == words


@given(TEXTS)
def test_words_are_the_text_without_its_white_space(text: str) -> None:
    words = TextView(text).words
    assert all(words)
    assert "".join(words) == "".join(text.split())


@given(TEXTS)
def test_words_are_numbered_through_the_vocabulary(text: str) -> None:
    view = TextView(text)
    assert [view.vocabulary[i] for i in view.word_ids] == view.words
    assert dict(zip(view.vocabulary, view.word_counts.tolist(), strict=True)) == Counter(view.words)
    assert np.diff(view.word_ends).tolist() == [len(word) for word in view.words]


@given(REPETITIVE, st.integers(1, 10))
def test_repeated_ngrams_are_those_that_a_counter_finds(text: str, n: int) -> None:
    view = TextView(text)
    ngrams = [tuple(view.words[i : i + n]) for i in range(len(view.words) - n + 1)]
    counts = Counter(ngrams)
    starts, kinds = view.repeated_ngrams(n)
    assert starts.tolist() == [i for i, ngram in enumerate(ngrams) if counts[ngram] > 1]
    assert len(set(kinds.tolist())) == len(
        {(ngrams[i], kind) for i, kind in zip(starts, kinds.tolist(), strict=True)}
    )
    assert len(set(kinds.tolist())) == len({ngrams[i] for i in starts})


def test_lines_are_not_blank_and_paragraphs_are_what_blank_lines_part() -> None:
    view = TextView("\none\r\n \n\ntwo \x85three\n\n\n")
    assert view.lines == ["one", "two ", "three"]
    assert view.paragraphs == ["one\r\n ", "two \x85three"]


@pytest.mark.parametrize(
    "text, count",
    [
        ("", 0),
        (" \n ", 0),
        ("No end", 1),
        ("One. Two! Three? Four", 4),
        ("One line\nTwo lines\n\nThree.", 3),
        ('He said: "Go." And she went.', 2),
        ("Mr. Smith of the U.S. met J. Doe, e.g. at 3.5 km.", 1),
        ("Well... no", 1),
        ("Stop. . . Go", 2),
        ("你好。你好吗？很好。", 3),
    ],
)
def test_sentence_count(text: str, count: int) -> None:
    assert TextView(text).sentence_count == count


@given(TEXTS, st.data())
def test_with_lines_is_the_view_of_those_lines(text: str, data: st.DataObject) -> None:
    view = TextView(text)
    kept = [line if data.draw(st.booleans()) else None for line in view.lines]
    edited = view.with_lines(kept)
    assert edited.text == "\n".join(line for line in kept if line is not None).strip()
    assert edited.words == TextView(edited.text).words
    assert edited.line_words == TextView(edited.text).line_words


def test_with_the_same_lines_is_the_same_view() -> None:
    view = TextView("one\ntwo")
    assert view.with_lines(["one", "two"]) is view


@pytest.mark.parametrize(
    "text",
    ["." * 100_000, ". " * 50_000, '."' * 50_000, "a." * 50_000, "'" * 100_000, "a:" * 50_000],
)
def test_no_text_takes_the_patterns_more_than_linear_time(text: str) -> None:
    view = TextView(text)
    assert view.sentence_count >= 1
    assert len(view.words) <= len(re.sub(r"\s", "", text))
