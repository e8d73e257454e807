"""Classifiers are the same bytes twice, trained on no near-duplicates, and their cards are true."""

import hashlib
import json
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from filters import quality
from pipeline.__main__ import app
from pipeline.models import train_classifier as module
from pipeline.models.labeled_texts import distinct, write_texts
from pipeline.models.options import ClassifierOptions
from pipeline.models.train_classifier import auc, curve, threshold, train_classifier
from pipeline.models.training_texts import Source
from tests.support.texts import DARWIN

# lines as they stand at the edges of pages
LISTING = """\
Home | About | Contact | Sitemap | Login

Next Previous Up Index Contents Search

Print this page | Share | Subscribe

Contents 1 2 3 4 5 6 7 8 9 10 Next

Modules Functions Classes Index Search Page

All rights reserved | Privacy | Terms | Contact

Index A B C D E F G H I J K L M

Login Register Forgot password Help
"""
CODE = "\n\n".join(
    f"def function_{name}(self, value): return self.{name} + value" for name in "abcdefgh"
)
FILES = {"prose.txt": DARWIN, "listing.txt": LISTING, "code.txt": CODE}
LONG = "the quick brown fox jumps over the lazy dog while seventeen other animals watch from the hill beyond the river and cheer"


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        Path(name).write_text(text)
    return tmp_path


TWO = {"hq": ["prose.txt"], "lq": ["listing.txt"]}
THREE = {"prose": ["prose.txt"], "lists": ["listing.txt"], "code": ["code.txt"]}


def train(sources: dict | None = None, output: str = "q.ftz", **options: object) -> dict:
    given = {"licence": "CC0-1.0", "held_out": 0.3, "buckets": 1000}
    sources = sources or TWO
    if [*sources] == ["hq", "lq"]:
        given |= {"positive": sources["hq"], "negative": sources["lq"]}
    else:
        given["source"] = [f"{label}={n}" for label, names in sources.items() for n in names]
    return train_classifier(ClassifierOptions(output=Path(output), **(given | options)))


@pytest.mark.parametrize("sources, name", [*product([TWO, THREE], ["q.ftz", "q.bin"])])
def test_classifier_is_the_same_bytes_twice(texts: Path, sources: dict, name: str) -> None:
    first = train(sources, name)
    model, card = Path(name).read_bytes(), Path(f"{name}.json").read_bytes()
    assert train(sources, name) == first
    assert (Path(name).read_bytes(), Path(f"{name}.json").read_bytes()) == (model, card)
    assert {p.name for p in texts.iterdir()} == {*FILES, name, f"{name}.json"}


def test_classifiers_card_describes_it(texts: Path) -> None:
    card = train()
    assert json.loads(Path("q.ftz.json").read_text()) == card
    assert card["sha256"] == hashlib.sha256(Path("q.ftz").read_bytes()).hexdigest()
    assert (card["kind"], card["normalizer"], card["licence"]) == (
        "fasttext",
        quality.NORMALIZER,
        "CC0-1.0",
    )
    assert card["labels"] == ["hq", "lq"]
    sha256 = hashlib.sha256(DARWIN.encode()).hexdigest()
    entry = {"path": "prose.txt", "sha256": sha256, "documents": 8, "words": len(DARWIN.split())}
    assert card["sources"]["hq"] == [entry]
    assert card["train"]["hq"] + card["held_out"]["hq"]["documents"] == 8
    assert card["held_out"].keys() == {"hq"}  # of two labels the other one mirrors it
    assert {
        len(card["held_out"]["hq"][name]) for name in ("thresholds", "kept", "precision", "recall")
    } == {99}
    assert card["command"].startswith(
        "gristmill train-classifier --positive prose.txt --negative listing.txt --output q.ftz"
    )
    assert "calibration" not in card


def test_any_labels_make_a_filter(texts: Path) -> None:
    card = train(THREE)
    assert card["command"].startswith(
        "gristmill train-classifier --source prose=prose.txt --source lists=listing.txt"
    )
    assert card["held_out"].keys() == set(THREE)
    filter = quality.Quality(model=str(texts / "q.ftz"), label="code")
    filter.check(())
    found = filter.measure(SimpleNamespace(text=CODE))
    assert 0 <= found["score"] <= 1 and found["likeliest"] in THREE


def test_failed_training_leaves_the_old_model_and_card(
    texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = train()

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("disk full")

    monkeypatch.setattr(module, "_curves", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        train()
    assert json.loads(Path("q.ftz.json").read_text()) == card
    assert {p.name for p in texts.iterdir()} == {*FILES, "q.ftz", "q.ftz.json"}


def test_thresholds_keep_what_they_say_of_the_sample(texts: Path) -> None:
    Path("sample.txt").write_text(DARWIN + "\n" + LISTING)
    card = train(sample="sample.txt", keep_best="25,50")
    assert card["calibration"]["sample"]["documents"] == 16
    filter = quality.Quality(model=str(texts / "q.ftz"))
    scores = [
        filter.measure(SimpleNamespace(text=t))["score"]
        for t in (DARWIN + "\n" + LISTING).split("\n\n")
        if t.strip()
    ]
    for row in card["calibration"]["thresholds"]["hq"]:
        kept = sum(score >= row["threshold"] for score in scores) / 16 * 100
        assert kept == pytest.approx(row["kept"], abs=0.01) and kept >= row["percent"]


# --- near-duplicates ------------------------------------------------------------------------------


def distinct_of(folder: Path, **texts: list[str]):
    for label, found in texts.items():
        (folder / f"{label}.jsonl").write_text(
            "".join(json.dumps({"text": t}) + "\n" for t in found)
        )
    read = write_texts(
        {label: [Source(folder / f"{label}.jsonl")] for label in texts},
        folder / "t",
        held_out=0.5,
    )
    found = distinct(read)
    return read, found, list(read.lines(found.kept))


def test_one_copy_of_a_cluster_stays(tmp_path: Path) -> None:
    near = LONG.replace("cheer", "clap")
    _, found, kept = distinct_of(tmp_path, a=[LONG, near, "one", "ONE!", "two"], b=["three"])
    assert kept == [LONG, "one", "two", "three"]
    assert (found.copies, found.shared) == (2, [])


def test_a_cluster_of_several_labels_goes_from_all_of_them(tmp_path: Path) -> None:
    near = LONG.replace("cheer", "clap")
    _, found, kept = distinct_of(
        tmp_path, a=[LONG, "one"], b=[near, near.upper(), "two"], c=["TWO", "four"]
    )
    assert kept == ["one", "four"]
    assert found.shared == [
        {"clusters": 1, "documents": {"a": 1, "b": 2}, "share": {"a": 0.5, "b": 0.666667}},
        {"clusters": 1, "documents": {"b": 1, "c": 1}, "share": {"b": 0.333333, "c": 0.5}},
    ]


@given(
    st.lists(
        st.lists(st.sampled_from(["x", "X!", "y", "z z", "", LONG, LONG.upper()]), min_size=1),
        min_size=2,
        max_size=3,
    )
)
def test_copies_are_dropped_as_a_slow_loop_over_clusters_says(
    tmp_path_factory: pytest.TempPathFactory, texts: list
) -> None:
    named = {label: [*found, f"only {label}"] for label, found in zip("abc", texts, strict=False)}
    clusters: dict[str, list[tuple[str, str]]] = {}
    for label, found in named.items():
        for text in filter(None, found):
            clusters.setdefault(text.lower().strip("!"), []).append((label, text))
    expected = [c[0][1].lower() for c in clusters.values() if len({label for label, _ in c}) == 1]
    _, _, kept = distinct_of(tmp_path_factory.mktemp("texts"), **named)
    assert sorted(kept) == sorted(expected)


def test_leaking_sources_are_warned_about_and_stand_on_the_card(texts: Path) -> None:
    Path("both.txt").write_text(
        LISTING
        + "\nOne that only this one has: "
        + LONG
        + "\n\nanother of its own\n\nand a third\n\n"
    )
    positive = ("--positive", "prose.txt", "--positive", "both.txt")
    negative = ("--negative", "listing.txt", "--negative", "code.txt")
    options = ("-o", "q.ftz", "--licence", "x", "--held-out", "0.3", "--buckets", "1000")
    result = CliRunner().invoke(app, ["train-classifier", *positive, *negative, *options])
    assert (
        "warning: 8 texts of 'hq' (42.1%) and 8 texts of 'lq' (50.0%) are near-duplicates"
        in result.stderr
    )
    card = json.loads(Path("q.ftz.json").read_text())
    assert card["near_duplicates"]["shared"][0]["documents"] == {"hq": 8, "lq": 8}
    assert (
        sum(card["train"].values())
        + sum(card["held_out"]["hq"][k] for k in ("documents", "others"))
        == 11 + 8
    )


# --- figures --------------------------------------------------------------------------------------

SCORES = st.lists(
    st.sampled_from([0.0, 0.1, 0.5, 0.5000001, 0.9, 1.0]), min_size=1, max_size=30
).map(np.array)


@given(SCORES, SCORES)
def test_auc_is_the_share_of_pairs_in_order(higher: np.ndarray, lower: np.ndarray) -> None:
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in product(higher, lower)]
    assert auc(higher, lower) == pytest.approx(sum(pairs) / len(pairs))


@given(SCORES, SCORES)
def test_curve_is_that_of_counting(right: np.ndarray, wrong: np.ndarray) -> None:
    scores, truth = np.append(right, wrong), np.arange(len(right) + len(wrong)) < len(right)
    found = curve(scores, truth)
    for limit, kept, precision, recall in zip(
        *(found[k] for k in ("thresholds", "kept", "precision", "recall")), strict=True
    ):
        hits = truth[scores >= limit]
        assert kept == pytest.approx(len(hits) / len(scores), abs=1e-4)
        assert precision == pytest.approx(hits.mean(), abs=1e-4)
        assert recall == pytest.approx(hits.sum() / len(right), abs=1e-4)


@given(
    st.lists(st.floats(0, 1) | st.just(np.nan), min_size=1).filter(lambda s: not np.isnan(s).all()),
    st.floats(0.1, 100),
)
def test_threshold_is_the_highest_that_keeps_enough(scores: list[float], percent: float) -> None:
    found = threshold(np.array(scores), percent)
    wanted = min(max(1, round(len(scores) * percent / 100)), sum(not np.isnan(s) for s in scores))
    assert (
        sum(s >= found["threshold"] for s in scores)
        >= wanted
        > sum(s > found["threshold"] for s in scores)
    )
    assert found["threshold"] in scores


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sources, options, message",
    [
        (TWO, {"output": "q.model"}, r"q\.model: must end in \.ftz"),
        (
            TWO,
            {"output": "s3://b/q.ftz"},
            "output s3://b/q.ftz: is a URL; filters read it from a path",
        ),
        (
            {"hq": ["prose.txt"], "lq": ["mine.bin"]},
            {"output": "mine.bin"},
            "output mine.bin: is the source mine.bin",
        ),
        (
            TWO,
            {"output": "mine.bin", "sample": "mine.bin"},
            "output mine.bin: is the source mine.bin",
        ),
        (
            TWO,
            {"output": "mine.bin"},
            "output mine.bin: exists, and is not a model with a card of ours",
        ),
        ({"hq": ["prose.txt"]}, {}, "labels: only hq; a classifier needs two or more"),
        ({"hq": ["prose.txt"], "a b": ["listing.txt"]}, {}, "label 'a b': must be letters"),
        (
            {"hq": ["prose.txt"], "__label__lq": ["listing.txt"]},
            {},
            "label '__label__lq': .*named without __label__",
        ),
        (TWO, {"keep_best": "0"}, "must be percentages"),
        (TWO, {"epochs": 0}, "epochs = 0: must be 1 or more"),
        (TWO, {"learning_rate": float("nan")}, "learning_rate = nan: must be above 0"),
        (TWO, {"seed": 99_999_999_999}, "seed = 99999999999: must be from 0"),
        (
            TWO,
            {"held_out": 1e-9},
            "of label 'hq' that no other label has 0 are held out and 8 left .* in .txt are separated by blank lines",
        ),
        (
            {"hq": ["prose.txt"], "lq": ["prose.txt"]},
            {},
            "of 0 documents of label 'hq' that no other label has",
        ),
        ({"hq": ["prose.txt"], "lq": ["gone.txt"]}, {}, "gone.txt: no such file"),
        (TWO, {"where": ["language='en'"]}, "language='en': no label 'language'; known: hq, lq"),
        (TWO, {"where": ["lq=x > 1"]}, "where x > 1: selects rows of a run, and no source is"),
        (
            TWO,
            {"sample": "prose.txt", "sample_where": "x"},
            "where x: selects rows of a run, and no source is one: prose.txt",
        ),
    ],
)
def test_bad_sources_are_named(texts: Path, sources: dict, options: dict, message: str) -> None:
    Path("mine.bin").write_text("mine")
    with pytest.raises(ValueError, match=message):
        train(sources, **options)
    assert {p.name for p in texts.iterdir()} == {*FILES, "mine.bin"}
