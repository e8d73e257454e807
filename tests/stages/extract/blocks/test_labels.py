"""Labels by the gold text: an alignment is a longest common subsequence, and shares follow it."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.extract.blocks.labels import _aligned, gold_shares, word_f1, words_of

WORDS = st.lists(st.sampled_from("abcd"), max_size=30)
TEXTS = st.lists(WORDS.map(" ".join) | st.text(max_size=10), max_size=8)


def lcs_length(a, b):
    lengths = [0] * (len(b) + 1)
    for x in a:
        before = lengths[:]
        for j, y in enumerate(b):
            lengths[j + 1] = before[j] + 1 if x == y else max(before[j + 1], lengths[j])
    return lengths[-1]


@given(WORDS, WORDS)
def test_words_are_aligned_along_a_longest_common_subsequence(words, gold):
    places = _aligned(words, gold)
    matched = [(word, place) for word, place in zip(words, places, strict=True) if place >= 0]
    assert all(gold[place] == word for word, place in matched)
    assert all(a < b for (_, a), (_, b) in pairwise(matched))
    assert len(matched) == lcs_length(words, gold)


@given(TEXTS)
def test_all_of_a_page_that_is_its_gold_text_is_main_content(texts):
    shares = gold_shares(texts, "\n".join(texts))
    assert shares == [1.0 if words_of(text) else 0.0 for text in texts]


@given(TEXTS, TEXTS)
def test_shares_are_shares(texts, gold):
    shares = gold_shares(texts, "\n".join(gold))
    assert len(shares) == len(texts)
    assert all(0 <= share <= 1 for share in shares)
    assert not any(gold_shares(texts, ""))


@pytest.mark.parametrize(
    "texts, gold, shares",
    [
        (["Menu", "the wheel turns", "Home"], "The wheel turns!", [0, 1, 0]),
        (["the a b c wheel"], "the wheel", [0]),  # scattered words are found everywhere
        (["the wheel of a b"], "the wheel of", [0.6]),
        (["mill"], "the mill", [1]),
        (["the mill", "", "..."], "the mill", [1, 0, 0]),
    ],
)
def test_shares_of_examples(texts, gold, shares):
    assert gold_shares(texts, gold) == pytest.approx(shares)


@given(st.text(), st.text())
def test_word_f1_is_symmetric_and_in_bounds(text, gold):
    assert word_f1(text, gold) == word_f1(gold, text)
    assert 0 <= word_f1(text, gold) <= 1
    assert word_f1(text, text) == (1.0 if words_of(text) else 0.0)
