"""Perplexity against a bare KenLM loop in CCNet's manner, and what cards are refused."""

import json
import math
import re
import shutil
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import kenlm
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from filters.perplexity import BUNDLED, NORMALIZER, Perplexity, normalize

ODD = [
    "",
    "\n\n",
    "\0",
    "\ud800 lone",
    "a\tb",
    "１２３。",
    "…",
    "<s> </s> <unk>",
    "e\u0301" * 50,
    "x" * 100_000,
    "\u0301",
]
PROSE = "The city is the capital of the province.\nIt was founded in 1850, and has been growing ever since."


def measured(text: str, filter: Perplexity | None = None) -> float:
    return (filter or Perplexity()).measure(SimpleNamespace(text=text))["perplexity"]


@pytest.mark.parametrize(
    "line, normalized",
    [
        ("Café «Zürich», 1984!", 'cafe " zurich " , 0000 !'),
        ("don’t stop—now…", "don't stop - now . . ."),
        ("１２３．４", "000 . 0"),
        ("one\ttwo\x85three\u00a0four", "one two three four"),
        ("“Ça va？” （oui）", '" ca va ? " ( oui )'),
        (" \t ", ""),
    ],
)
def test_normalize(line: str, normalized: str) -> None:
    assert normalize(line) == normalized


# CCNet's steps one character at a time, then words and marks; written from its description, slow and plain
PUNCTUATION = {"’": "'", "“": '"', "”": '"', "—": " - ", "…": "...", "«": '"', "»": '"', "–": "-", "，": ",", "。": "."}


def slow_normalize(line: str) -> list[str]:
    out = []
    for c in unicodedata.normalize("NFD", line.strip().lower()):
        if unicodedata.category(c) == "Mn":
            continue
        out.append("0" if c.isdecimal() else " " if unicodedata.category(c) == "Cc" else PUNCTUATION.get(c, c))
    return re.findall(r"\w+(?:'\w+)*|[^\w\s]", "".join(out))


@given(st.lists(st.text(alphabet="abcÉz 19.,'’“”—…«»–，。\t", min_size=1), min_size=1))
def test_score_is_that_of_ccnets_loop(lines: list[str]) -> None:
    lm = kenlm.Model(str(BUNDLED))
    log_score, length = 0.0, 0
    for tokens in filter(None, map(slow_normalize, lines)):
        log_score += lm.score(" ".join(tokens))
        length += len(tokens) + 1
    expected = 10.0 ** (-log_score / length) if length else math.nan
    assert measured("\n".join(lines)) == pytest.approx(expected, nan_ok=True)


@settings(max_examples=200)
@given(st.text() | st.sampled_from(ODD))
def test_measure_is_total_finite_or_nan(text: str) -> None:
    value = measured(text)
    assert math.isnan(value) == (not any(map(normalize, text.split("\n"))))
    assert math.isnan(value) or 0 < value < math.inf


def test_blank_lines_do_not_count() -> None:
    assert measured(PROSE.replace("\n", "\n\n \n")) == measured(PROSE)


def test_prose_is_likelier_than_shuffled_or_french() -> None:
    shuffled = " ".join(sorted(PROSE.split()))
    french = "La ville est la capitale de la province. Elle a été fondée en 1850."
    assert measured(PROSE) < measured(shuffled) < measured(french)


def test_model_without_card_is_refused(tmp_path: Path) -> None:
    copy = shutil.copy(BUNDLED, tmp_path / "m.bin")
    with pytest.raises(ValueError, match=r"m\.bin: no card at .*m\.bin\.json.*gristmill train-lm"):
        measured(PROSE, Perplexity(model=str(copy)))


def test_model_of_another_normalizer_is_refused(tmp_path: Path) -> None:
    copy = shutil.copy(BUNDLED, tmp_path / "m.bin")
    (tmp_path / "m.bin.json").write_text(json.dumps({"kind": "kenlm", "normalizer": "other-2"}))
    with pytest.raises(ValueError, match=rf"other-2.*needs kind 'kenlm' and normalizer '{NORMALIZER}'.*retrain"):
        measured(PROSE, Perplexity(model=str(copy)))


def test_missing_model_is_named() -> None:
    with pytest.raises(ValueError, match=r"nowhere\.bin: no such file"):
        measured(PROSE, Perplexity(model="nowhere.bin"))


def test_making_the_filter_loads_nothing() -> None:
    Perplexity(model="nowhere.bin")
