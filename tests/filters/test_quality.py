"""The bundled classifier tells prose from listings; probabilities are total; wrong cards and labels are refused."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import fasttext
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from filters.quality import BUNDLED, NORMALIZER, Quality, normalize

ODD = ["", " \n", "\0", "\ud800", "__label__hq", "__label__hq __LABEL__lq word", "\u2028", "x " * 50_000, "文字"]
PROSE = (
    "The river rises in the mountains and flows west for two hundred miles before it reaches the sea.\n"
    "Its valley has been settled since the Bronze Age, and most of its towns still hold a weekly market."
)
LISTING = "Home\nUp\nNext\nPrev\nIndex\nModules\n• open()\n• close()\n• read()\nTable of Contents\nShow Source"


def measured(text: str, filter: Quality | None = None) -> float:
    return (filter or Quality()).measure(SimpleNamespace(text=text))["score"]


def test_prose_scores_high_and_listings_low() -> None:
    assert measured(PROSE) > 0.9
    assert measured(LISTING) < 0.1


@pytest.mark.parametrize("text", [PROSE, LISTING, PROSE + LISTING])
def test_score_is_fasttexts_own(text: str) -> None:
    labels, scores = fasttext.load_model(str(BUNDLED)).predict(" ".join(text.lower().split()), k=2)
    assert measured(text) == pytest.approx(dict(zip(labels, scores, strict=True))["__label__hq"], abs=1e-4)


def test_the_labels_of_a_two_class_model_share_one() -> None:
    assert measured(PROSE + LISTING, Quality(label="__label__lq")) == pytest.approx(1 - measured(PROSE + LISTING), abs=1e-3)


@settings(max_examples=200)
@given(st.text() | st.sampled_from(ODD))
def test_measure_is_total_a_probability_or_nan(text: str) -> None:
    value = measured(text)
    assert math.isnan(value) if not normalize(text) else 0 <= value <= 1


def test_model_without_card_is_refused(tmp_path: Path) -> None:
    copy = shutil.copy(BUNDLED, tmp_path / "q.ftz")
    with pytest.raises(ValueError, match=r"q\.ftz: no card at .*gristmill train-classifier"):
        measured(PROSE, Quality(model=str(copy)))


def test_model_of_another_normalizer_is_refused(tmp_path: Path) -> None:
    copy = shutil.copy(BUNDLED, tmp_path / "q.ftz")
    (tmp_path / "q.ftz.json").write_text(json.dumps({"kind": "fasttext", "normalizer": "cased-1"}))
    with pytest.raises(ValueError, match=rf"cased-1.*needs kind 'fasttext' and normalizer '{NORMALIZER}'"):
        measured(PROSE, Quality(model=str(copy)))


def test_label_the_model_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no label '__label__good', only .*__label__hq.*set quality\.label"):
        measured(PROSE, Quality(label="__label__good"))
