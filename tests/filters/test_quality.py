"""The bundled classifier tells prose from listings; probabilities are total; wrong cards and labels
are refused.
"""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import fasttext
import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.quality import (
    BUNDLED,
    NORMALIZER,
    Quality,
    load,
    normalize_for_fasttext,
    predict,
    probabilities,
)

ODD = [
    "",
    " \n",
    "\0",
    "\ud800",
    "__label__hq",
    "__label__hq __LABEL__lq word",
    "\u2028",
    "x " * 50_000,
    "文字",
]
PROSE = (
    "The river rises in the mountains and flows west for two hundred miles before it reaches the sea.\n"
    "Its valley has been settled since the Bronze Age, and most of its towns still hold a weekly market."
)
LISTING = "Home\nUp\nNext\nPrev\nIndex\nModules\n• open()\n• close()\n• read()\nTable of Contents\nShow Source"
MODEL = str(BUNDLED)


def measured(text: str, **fields: str) -> dict:
    return Quality(**({"model": MODEL} | fields)).measure(SimpleNamespace(text=text))


def test_prose_scores_high_and_listings_low() -> None:
    assert measured(PROSE)["score"] > 0.9 and measured(PROSE)["likeliest"] == "hq"
    assert measured(LISTING)["score"] < 0.1 and measured(LISTING)["likeliest"] == "lq"


@pytest.mark.parametrize("text", [PROSE, LISTING, PROSE + LISTING])
def test_score_is_fasttexts_own(text: str) -> None:
    labels, scores = fasttext.load_model(MODEL).predict(" ".join(text.lower().split()), k=2)
    assert measured(text)["score"] == pytest.approx(
        dict(zip(labels, scores, strict=True))["__label__hq"], abs=1e-4
    )


def test_the_labels_of_a_two_class_model_share_one() -> None:
    (found,) = predict([PROSE + LISTING], load(MODEL))
    assert sum(found.values()) == pytest.approx(1.0, abs=1e-12)
    assert measured(PROSE + LISTING, label="lq")["score"] == found["lq"]


def test_good_pages_are_told_apart_where_fasttext_says_one() -> None:
    better, best = (
        PROSE,
        "\n".join([PROSE] * 3)
        + " The town was founded in the nineteenth century and is known for its market.",
    )
    bare = fasttext.load_model(MODEL).predict(
        [normalize_for_fasttext(better), normalize_for_fasttext(best)], k=1
    )[1]
    assert [float(p) >= 1.0 for (p,) in bare] == [True, True]
    assert measured(better)["score"] != measured(best)["score"]


@given(st.text() | st.sampled_from(ODD))
def test_measure_is_total_a_probability_or_nan(text: str) -> None:
    found = measured(text)
    assert list(found) == ["score", "likeliest"]
    if any(
        len(load(MODEL).get_subwords(word)[1])
        for word in normalize_for_fasttext(text).split()
        if word != "</s>"
    ):
        assert 0 <= found["score"] <= 1 and found["likeliest"] == (
            "hq" if found["score"] > 0.5 else "lq"
        )
    else:
        assert math.isnan(found["score"]) and found["likeliest"] is None


@given(st.lists(st.text() | st.sampled_from([*ODD, PROSE, LISTING]), max_size=5))
def test_a_batch_scores_as_its_texts_do(texts: list[str]) -> None:
    expected = [measured(text)["score"] for text in texts]
    assert probabilities(texts, load(MODEL), label="hq") == pytest.approx(
        expected, nan_ok=True, abs=0
    )


def test_a_text_of_which_the_model_knows_nothing_has_no_score() -> None:
    unknown = ["zzzzqqqq", "这是一个关于数据的网页。", "aGVsbG8gd29ybGQ= " * 9, ""]
    # what fastText says of an empty line is the best score there is
    assert float(fasttext.load_model(MODEL).predict([unknown[0]], k=1)[1][0][0]) > 0.99
    # fastText's own word for the end of a line
    assert predict([*unknown, "</s> </s>"], load(MODEL)) == [{}] * 5
    assert math.isnan(probabilities(unknown[:1], load(MODEL), label="hq")[0])


# --- what is refused ------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the bundled model, with its card."""
    shutil.copy(f"{BUNDLED}.json", tmp_path / "q.ftz.json")
    return Path(shutil.copy(BUNDLED, tmp_path / "q.ftz"))


def refused(model: Path | str, *, match: str) -> None:
    """By check, and again by a worker that measures."""
    with pytest.raises(ValueError, match=match):
        Quality(model=str(model)).check(())
    with pytest.raises(ValueError, match=match):
        measured(PROSE, model=str(model))


def test_the_bundled_model_passes(model: Path) -> None:
    Quality(model=MODEL).check(("en",))
    Quality(model=str(model), label="lq").check(())


def test_no_model_is_refused_with_advice() -> None:
    refused("", match=r"no model is named; train one with `gristmill train-classifier`")


def test_model_without_card_is_refused(model: Path) -> None:
    Path(f"{model}.json").unlink()
    refused(model, match=r"q\.ftz: no card at .*gristmill train-classifier")


def test_model_of_another_normalizer_is_refused(model: Path) -> None:
    Path(f"{model}.json").write_text(json.dumps({"kind": "fasttext", "normalizer": "cased-1"}))
    refused(model, match=rf"cased-1.*needs kind 'fasttext' and normalizer '{NORMALIZER}'")


def test_model_that_is_not_its_cards_is_refused(model: Path) -> None:
    card = Path(f"{model}.json")
    card.write_text(json.dumps(json.loads(card.read_text()) | {"sha256": "0" * 64}))
    with pytest.raises(
        ValueError, match=r"the sha256 of .*q\.ftz is .*, its card says 000000000000…"
    ):
        Quality(model=str(model)).check(())


def test_label_the_model_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no label 'good', only hq, lq"):
        Quality(model=MODEL, label="good").check(())
