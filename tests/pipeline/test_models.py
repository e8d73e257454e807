"""Training is deterministic, its cards true, and bad input said plainly."""

import gzip
import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from filters import perplexity, quality
from pipeline import models
from pipeline.models import documents, train_classifier, train_lm

ROOT = Path(__file__).parents[2]

# Darwin, On the Origin of Species (1859; public domain), and lines as they stand at the edges of pages
PROSE = """\
When on board H.M.S. Beagle, as naturalist, I was much struck with certain facts in the distribution of the inhabitants.

These facts seemed to me to throw some light on the origin of species, that mystery of mysteries.

On my return home, it occurred to me that something might perhaps be made out on this question.

After five years' work I allowed myself to speculate on the subject, and drew up some short notes.

I hope that I may be excused for entering on these personal details, as I give them to show that I have not been hasty.

My work is now nearly finished, but as it will take me two or three more years to complete it, and as my
health is far from strong, I have been urged to publish.

This Abstract, which I now publish, must necessarily be imperfect.

I cannot here give references and authorities for my several statements.
"""
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
NAMES = {"licence": "CC0-1.0", "held_out": 0.3}

has_lmplz = pytest.mark.skipif(
    not (shutil.which("lmplz", path=str(ROOT / ".kenlm" / "bin")) or shutil.which("lmplz")),
    reason="KenLM's lmplz is not there: make kenlm",
)


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("prose.txt").write_text(PROSE)
    Path("listing.txt").write_text(LISTING)
    return tmp_path


def train_small(output: str) -> dict:
    return train_classifier([Path("prose.txt")], [Path("listing.txt")], output=Path(output), buckets=1000, **NAMES)


@pytest.mark.parametrize("name", ["q.ftz", "q.bin"])
def test_classifier_is_the_same_bytes_twice(texts: Path, name: str) -> None:
    first = train_small(name)
    model, card = Path(name).read_bytes(), Path(f"{name}.json").read_bytes()
    assert train_small(name) == first
    assert (Path(name).read_bytes(), Path(f"{name}.json").read_bytes()) == (model, card)
    assert {p.name for p in texts.iterdir()} == {"prose.txt", "listing.txt", name, f"{name}.json"}


def test_classifiers_card_describes_it(texts: Path) -> None:
    card = train_small("q.ftz")
    assert json.loads(Path("q.ftz.json").read_text()) == card
    assert card["sha256"] == hashlib.sha256(Path("q.ftz").read_bytes()).hexdigest()
    assert (card["kind"], card["normalizer"], card["licence"]) == ("fasttext", quality.NORMALIZER, "CC0-1.0")
    assert card["positive"] == [
        {
            "path": "prose.txt",
            "sha256": hashlib.sha256(PROSE.encode()).hexdigest(),
            "documents": 8,
            "words": len(PROSE.split()),
        }
    ]
    assert card["held_out"].keys() == {"positive", "negative", "precision", "recall"}
    assert card["command"].startswith("gristmill train-classifier --positive prose.txt --negative listing.txt")
    assert 0 <= quality.Quality(model="q.ftz").measure(SimpleNamespace(text=PROSE))["score"] <= 1


def test_failed_training_leaves_the_old_model_and_card(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = train_small("q.ftz")

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("disk full")

    monkeypatch.setattr(models, "_precision_and_recall", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        train_small("q.ftz")
    assert json.loads(Path("q.ftz.json").read_text()) == card
    assert {p.name for p in texts.iterdir()} == {"prose.txt", "listing.txt", "q.ftz", "q.ftz.json"}


@pytest.mark.lmplz
@has_lmplz
def test_language_model_is_the_same_bytes_twice_and_scores(texts: Path) -> None:
    made = []
    for _ in range(2):
        card = train_lm([Path("prose.txt")], output=Path("m.bin"), kenlm_bin=_kenlm_bin(), memory="64M", **NAMES)
        made.append((Path("m.bin").read_bytes(), Path("m.bin.json").read_bytes()))
    assert made[0] == made[1]
    assert card["normalizer"] == perplexity.NORMALIZER
    assert card["command"].startswith("gristmill train-lm prose.txt --output m.bin")
    assert "--prune 0,0,1" in card["command"]
    assert card["held_out"]["documents"] > 0 and card["held_out"]["perplexity"]["50"] > 1
    score = perplexity.Perplexity(model="m.bin").measure(SimpleNamespace(text=PROSE))["perplexity"]
    assert score < card["held_out"]["perplexity"]["50"]


@pytest.mark.lmplz
@has_lmplz
def test_lmplz_own_complaint_is_passed_on(texts: Path) -> None:
    with pytest.raises(ValueError, match=r"lmplz ended with status \d+"):
        train_lm([Path("prose.txt")], output=Path("m.bin"), kenlm_bin=_kenlm_bin(), memory="none", **NAMES)
    assert not Path("m.bin").exists()


def _kenlm_bin() -> Path | None:
    return ROOT / ".kenlm" / "bin" if (ROOT / ".kenlm" / "bin" / "lmplz").exists() else None


def test_missing_lmplz_says_how_to_get_it(texts: Path) -> None:
    with pytest.raises(ValueError, match=r"not found in .*empty.*make kenlm.*GRISTMILL_KENLM_BIN"):
        train_lm([Path("prose.txt")], output=Path("m.bin"), kenlm_bin=texts / "empty", **NAMES)


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    found = ["one two\nthree", "four"]
    lines = "".join(json.dumps({"text": d, "n": 1}) + "\n" for d in found).encode()
    blocks = b"\n\none two\nthree\n \n\nfour\n"
    files = {
        "a.txt": blocks,
        "a.txt.gz": gzip.compress(blocks),
        "a.jsonl": lines,
        "a.jsonl.gz": gzip.compress(lines),
        "a.jsonl.zst": zstandard.compress(lines),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    pq.write_table(pa.table({"text": found, "n": [1, 2]}), tmp_path / "a.parquet")
    for name in [*files, "a.parquet"]:
        assert [d.strip() for d in documents(tmp_path / name)] == found, name


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("a.txt", b" \n\n", "a.txt: 0 documents without a word"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n', r"a.jsonl, line 2: no text in column 'text', only \['body'\]"),
        ("a.jsonl", b'{"text": null}\n', "line 1: no text in column 'text'"),
        ("a.jsonl", b"[1]\n", "line 1: no text in column 'text', only list"),
        ("a.jsonl", b"{", "a.jsonl, line 1: not JSON"),
        ("a.csv", b"text\na\n", "a.csv: must be .txt, .jsonl"),
        ("a.txt", b"one\n", "of 2 documents 0 are held out"),
    ],
)
def test_bad_source_is_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        train_classifier([tmp_path / name], [tmp_path / name], output=tmp_path / "q.ftz", licence="CC0-1.0", held_out=1e-9)


def test_parquet_without_the_column_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: no column 'text', only \['body'\]"):
        list(documents(tmp_path / "a.parquet"))


def test_missing_source_and_bad_suffix_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.txt: no such file"):
        list(documents(tmp_path / "gone.txt"))
    with pytest.raises(ValueError, match=r"q\.model: must end in \.ftz"):
        train_classifier([], [], output=tmp_path / "q.model", licence="CC0-1.0")


@pytest.mark.parametrize("name", ["wiki-en.5gram.bin", "quality-en.ftz"])
def test_bundled_cards_name_the_bundled_models(name: str) -> None:
    path = ROOT / "models" / name
    card = json.loads(path.with_name(name + ".json").read_text())
    assert (card["name"], card["sha256"]) == (name, hashlib.sha256(path.read_bytes()).hexdigest())
    assert card["sha256"] in (ROOT / "models" / "README.md").read_text()
