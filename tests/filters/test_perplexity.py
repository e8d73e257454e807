"""Perplexity against a bare KenLM loop in CCNet's manner, windows against all windows, and what
models are refused.
"""

import json
import math
import shutil
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import kenlm
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from filters.perplexity import BUNDLED, Perplexity, score
from filters.text import ccnet
from tests.support.ccnet_reference import NASTY, slow_line

PROSE = "The city is the capital of the province.\nIt was founded in 1850, and has been growing ever since."
SPAM = "cheap pills buy viagra casino bonus xxx replica watches click free loans poker"


def measured(text: str, **fields: object) -> dict:
    return Perplexity(model=str(BUNDLED), **fields).measure(SimpleNamespace(text=text))


def slow_lines(text: str) -> list[tuple[float, int]]:
    """Score and length of each line with a token, by KenLM's own loop over its words."""
    lm = kenlm.Model(str(BUNDLED))
    tokens = [found for line in text.split("\n") if (found := slow_line(line))]
    return [
        (sum(p for p, _, _ in lm.full_scores(" ".join(line))), len(line) + 1) for line in tokens
    ]


def slow_perplexity(lines: list[tuple[float, int]]) -> float:
    return 10.0 ** (-sum(s for s, _ in lines) / sum(n for _, n in lines))


def slow_worst_window(lines: list[tuple[float, int]], window: int) -> float:
    """Of all runs of lines with at least `window` tokens: those that no shorter one ends, and the
    shortest at the start.
    """
    runs = [
        lines[i:j]
        for i, j in combinations(range(len(lines) + 1), 2)
        if sum(n for _, n in lines[i:j]) >= window
    ]
    if not runs:
        return slow_perplexity(lines)
    ends = [
        min((r for r in (lines[i:j] for i in range(j)) if sum(n for _, n in r) >= window), key=len)
        for j in range(1, len(lines) + 1)
        if sum(n for _, n in lines[:j]) >= window
    ]
    first = next(
        lines[:j] for j in range(1, len(lines) + 1) if sum(n for _, n in lines[:j]) >= window
    )
    return max(map(slow_perplexity, [*ends, first]))


WORDS = st.sampled_from(
    ["the", "city", "of", "and", "was", "river", "qwxz", "19", ",", ".", "É", "“"]
)
LINES = st.lists(st.lists(WORDS, max_size=12).map(" ".join), max_size=12)


@given(LINES.map("\n".join), st.integers(1, 40))
@example(PROSE, 8)
@example(f"x\n{PROSE}\nqwxz qwxz", 9)
def test_scores_are_those_of_ccnets_loop_and_of_all_windows(text: str, window: int) -> None:
    found, lines = measured(text, window=window), slow_lines(text)
    if not lines:
        assert math.isnan(found["perplexity"]) and math.isnan(found["worst_window"])
        return
    # full_scores are 32 bits each
    assert found["perplexity"] == pytest.approx(slow_perplexity(lines), rel=1e-5)
    assert found["worst_window"] == pytest.approx(slow_worst_window(lines, window), rel=1e-5)


@given(st.text() | st.sampled_from(NASTY))
def test_measure_is_total_finite_or_nan(text: str) -> None:
    found = measured(text, buckets=(100.0, 1000.0))
    empty = not any(map(slow_line, text.split("\n")))
    for name in ("perplexity", "worst_window"):
        assert math.isnan(found[name]) if empty else 0 < found[name] < math.inf
    assert (found["bucket"] is None) == empty
    assert list(found) == ["perplexity", "worst_window", "bucket"]


def test_blank_lines_do_not_count() -> None:
    assert measured(PROSE.replace("\n", "\n\n \n"), window=8) == measured(PROSE, window=8)


def test_prose_is_likelier_than_shuffled_or_french() -> None:
    shuffled = " ".join(sorted(PROSE.split()))
    french = "La ville est la capitale de la province. Elle a été fondée en 1850."
    values = [measured(text)["perplexity"] for text in (PROSE, shuffled, french)]
    assert values == sorted(values)


@pytest.mark.parametrize("place", [0, 10, 20])
def test_worst_window_sees_spam_wherever_it_stands(place: int) -> None:
    lines = PROSE.split("\n") * 10
    clean, spammed = "\n".join(lines), "\n".join([*lines[:place], SPAM, *lines[place:]])
    assert measured(spammed, window=12)["worst_window"] == pytest.approx(
        measured(SPAM)["perplexity"]
    )
    assert (
        measured(spammed, window=12)["worst_window"]
        > 5 * measured(clean, window=12)["worst_window"]
    )
    assert measured(spammed)["perplexity"] < 2 * measured(clean)["perplexity"]


def test_windows_longer_than_the_document_are_the_document() -> None:
    found = measured(PROSE, window=1000)
    assert found["worst_window"] == found["perplexity"]


def test_bucket_ends_belong_to_the_better_one() -> None:
    value = measured(PROSE)["perplexity"]
    assert measured(PROSE, buckets=(value, value))["bucket"] == "head"
    assert measured(PROSE, buckets=(value - 1, value))["bucket"] == "middle"
    assert measured(PROSE, buckets=(value - 2, value - 1))["bucket"] == "tail"
    assert measured(PROSE, buckets="off")["bucket"] is None


def test_buckets_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"head ends at the first number.*got \[9.0, 1.0\]"):
        Perplexity(buckets=(9.0, 1.0))


@pytest.mark.parametrize("lines", [ccnet.Lines([], []), ccnet.Lines([b"", b" "], [0, 0])])
def test_no_line_has_no_score(lines: ccnet.Lines) -> None:
    assert all(map(math.isnan, score(lines, kenlm.Model(str(BUNDLED)), window=1)))


# --- what is refused ------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the bundled model, with its card."""
    shutil.copy(f"{BUNDLED}.json", tmp_path / "m.bin.json")
    return Path(shutil.copy(BUNDLED, tmp_path / "m.bin"))


def edit_card(model: Path, **changes: object) -> None:
    card = Path(f"{model}.json")
    card.write_text(json.dumps(json.loads(card.read_text()) | changes))


def test_the_bundled_model_passes(model: Path) -> None:
    Perplexity(model=str(BUNDLED)).check(("en",))
    Perplexity(model=str(model)).check(())


def test_no_model_is_refused_with_advice() -> None:
    for ask in (lambda f: f.check(()), lambda f: f.measure(SimpleNamespace(text=PROSE))):
        with pytest.raises(
            ValueError, match=r"no model is named; train one with `gristmill train-lm`"
        ):
            ask(Perplexity())


def refused(model: Path, *, match: str) -> None:
    """By check, and again by a worker that measures."""
    with pytest.raises(ValueError, match=match):
        Perplexity(model=str(model)).check(())
    with pytest.raises(ValueError, match=match):
        Perplexity(model=str(model)).measure(SimpleNamespace(text=PROSE))


def test_missing_model_is_named(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere.bin", match=r"nowhere\.bin: no such file; train one")


def test_model_without_card_is_refused(model: Path) -> None:
    Path(f"{model}.json").unlink()
    refused(model, match=r"m\.bin: no card at .*m\.bin\.json.*gristmill train-lm")


@pytest.mark.parametrize(
    "changes", [{"normalizer": "other-2"}, {"normalizer": None}, {"kind": "fasttext"}]
)
def test_model_of_another_normalizer_or_kind_is_refused(model: Path, changes: dict) -> None:
    edit_card(model, **changes)
    refused(
        model,
        match=rf"{next(iter(changes.values()))}.*needs kind 'kenlm' and normalizer 'ccnet-words-1' or 'ccnet-sp-1'",
    )


@pytest.mark.parametrize("text, what", [("{", "not JSON"), ("[]", "must be an object, is list")])
def test_broken_card_is_refused(model: Path, text: str, what: str) -> None:
    Path(f"{model}.json").write_text(text)
    refused(model, match=what)


def test_model_that_is_not_its_cards_is_refused(model: Path) -> None:
    edit_card(model, sha256="0" * 64)
    with pytest.raises(
        ValueError,
        match=r"the sha256 of .*m\.bin is 54d5c5626ad7…, its card says 000000000000…: one of them",
    ):
        Perplexity(model=str(model)).check(())


def test_model_of_pieces_without_its_sentencepiece_is_refused(model: Path) -> None:
    edit_card(model, normalizer=ccnet.PIECES)
    refused(model, match=r"m\.bin\.spm is missing, which its card names")


def test_altered_sentencepiece_is_refused(model: Path) -> None:
    edit_card(model, normalizer=ccnet.PIECES, sentencepiece={"sha256": "0" * 64})
    Path(f"{model}.spm").write_bytes(b"other")
    refused(model, match=r"sha256 of .*m\.bin\.spm is .*, its card says 000000000000…")


def test_making_the_filter_loads_nothing() -> None:
    Perplexity(model="nowhere.bin")
