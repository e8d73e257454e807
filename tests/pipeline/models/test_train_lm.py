"""Language models are the same bytes twice, score as KenLM's own query says, and their cards are
true.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from filters import perplexity
from filters.perplexity import Perplexity
from filters.text import ccnet
from pipeline.__main__ import app
from pipeline.models.model_card import is_held_out, replacing
from pipeline.models.options import LmOptions
from pipeline.models.train_lm import find_kenlm, sample_lines, train_lm
from pipeline.models.training_texts import documents
from tests.support.paths import ROOT
from tests.support.texts import DARWIN

KENLM = ROOT / ".kenlm" / "bin"


has_lmplz = pytest.mark.skipif(
    not (shutil.which("lmplz", path=str(KENLM)) or shutil.which("lmplz")),
    reason="KenLM's lmplz is not there: make kenlm",
)


@pytest.fixture
def prose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = Path("prose.txt")
    path.write_text(DARWIN)
    return path


@pytest.fixture(autouse=True)
def kenlm_bin(monkeypatch: pytest.MonkeyPatch) -> None:
    if KENLM.is_dir():
        monkeypatch.setenv("GRISTMILL_KENLM_BIN", str(KENLM))


def train(path: Path, output: str = "m.bin", **options: object) -> dict:
    given = {"licence": "CC0-1.0", "held_out": 0.3, "memory": "64M"}
    return train_lm(LmOptions(sources=[str(path)], output=Path(output), **(given | options)))


def score_of(model: str, text: str = DARWIN) -> float:
    # as the config does: by its absolute path a model is loaded once per process
    return Perplexity(model=str(Path(model).absolute())).measure(SimpleNamespace(text=text))[
        "perplexity"
    ]


@pytest.mark.lmplz
@has_lmplz
@pytest.mark.parametrize(
    "options, normalizer", [({}, ccnet.WORDS), ({"sentencepiece": 60}, ccnet.PIECES)]
)
def test_language_model_is_the_same_bytes_twice_and_scores(
    prose: Path, options: dict, normalizer: str
) -> None:
    made = []
    for _ in range(2):
        card = train(prose, **options)
        made.append({path.name: path.read_bytes() for path in Path().iterdir()})
    assert made[0] == made[1]
    assert made[0].keys() == {"prose.txt", "m.bin", "m.bin.json"} | (
        {"m.bin.spm"} if options else set()
    )
    assert json.loads(Path("m.bin.json").read_text()) == card
    assert card["normalizer"] == normalizer
    assert card["sha256"] == hashlib.sha256(Path("m.bin").read_bytes()).hexdigest()
    assert card["sources"][0]["sha256"] == hashlib.sha256(DARWIN.encode()).hexdigest()
    assert card["train"]["documents"] + card["held_out"]["documents"] == 8
    assert card["held_out"]["perplexity"] > 1 and card["held_out"]["percentiles"]["50"] > 1
    Perplexity(model="m.bin").check(())
    assert score_of("m.bin") < card["held_out"]["percentiles"]["50"]


@pytest.mark.lmplz
@has_lmplz
def test_the_cards_command_makes_the_same_model(prose: Path) -> None:
    card = train(prose, lmplz_option=["--vocab_estimate", "1000"], prune="0,1", order=3)
    assert card["command"] == (
        "gristmill train-lm prose.txt --output m.bin --licence CC0-1.0 --order 3 --prune 0,1 --memory 64M --bits 8 "
        "--lmplz-option --vocab_estimate --lmplz-option 1000 --held-out 0.3 --text-column text"
    )
    assert card["lmplz"]["options"][-2:] == ["--vocab_estimate", "1000"]


@pytest.mark.lmplz
@has_lmplz
@pytest.mark.parametrize("pieces", [0, 60])
def test_held_out_perplexity_is_that_of_kenlms_query(
    prose: Path, tmp_path: Path, pieces: int
) -> None:
    query = shutil.which("query", path=str(KENLM)) or shutil.which("query")
    card = train(prose, bits=0, sentencepiece=pieces)
    held = [d for d in documents(prose) if is_held_out(d, share=0.3)]
    normalize = perplexity.load(str(Path("m.bin").absolute())).normalize
    lines = [line for d in held for line, tokens in zip(*normalize(d), strict=True) if tokens]
    done = subprocess.run(
        [query, "-v", "summary", "m.bin"],
        input=b"\n".join(lines) + b"\n",
        capture_output=True,
        check=True,
    )
    expected = float(re.search(rb"including OOVs:\s*([\d.e+]+)", done.stdout + done.stderr)[1])
    assert card["held_out"]["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert card["held_out"]["lines"] == len(lines)


@pytest.mark.lmplz
@has_lmplz
def test_a_given_sentencepiece_model_is_copied_and_used(prose: Path) -> None:
    first = train(prose, "a.bin", sentencepiece=60)
    second = train(prose, "b.bin", sentencepiece_model=Path("a.bin.spm"))
    assert Path("b.bin.spm").read_bytes() == Path("a.bin.spm").read_bytes()
    assert (second["sha256"], second["sentencepiece"]) == (first["sha256"], first["sentencepiece"])
    assert score_of("b.bin") == score_of("a.bin")


@pytest.mark.lmplz
@has_lmplz
def test_a_model_of_words_takes_the_old_sentencepiece_away(prose: Path) -> None:
    train(prose, sentencepiece=60)
    train(prose)
    assert not Path("m.bin.spm").exists()


@pytest.mark.lmplz
@has_lmplz
def test_lmplz_own_complaint_is_passed_on_and_the_old_model_stays(prose: Path) -> None:
    train(prose)
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    with pytest.raises(ValueError, match=r"lmplz ended with status \d+"):
        train(prose, memory="none")
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == before


def test_missing_lmplz_says_how_to_get_it(prose: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRISTMILL_KENLM_BIN", "empty")
    with pytest.raises(ValueError, match=r"not found in .*empty.*make kenlm.*GRISTMILL_KENLM_BIN"):
        train(prose)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"sentencepiece": 10, "sentencepiece_model": Path("a.spm")},
            "train one or give one, not both",
        ),
        ({"bits": 26}, r"bits = 26: must be 0 \(not quantized\) to 25"),
        ({"order": 1}, "order = 1: must be from 2 to 6"),
        ({"order": 7}, "order = 7: must be from 2 to 6"),
        ({"order": 2, "prune": "0,0,1"}, "prune = 0,0,1: must be 1 to 2 counts for order = 2"),
        ({"prune": ""}, "--prune : write whole numbers"),
        ({"prune": "0,-1"}, "--prune 0,-1: .*0 or more"),
        (
            {"where": "x > 1"},
            r"where x > 1: selects rows of a run, .*: prose\.txt; name one as RUN",
        ),
        ({"prune": "0,2,1"}, "prune = 0,2,1: .*none below the one before"),
    ],
)
def test_bad_options_are_named(prose: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(prose, **options)


@pytest.mark.lmplz
@has_lmplz
@pytest.mark.parametrize(
    "options, message",
    [
        ({"sentencepiece_model": Path("gone.spm")}, "sentencepiece_model gone.spm: no such file"),
        ({"sentencepiece": 1}, "sentencepiece = 1: "),
        ({"held_out": 1.0}, "of 8 documents 8 are held out and 0 left to train on"),
    ],
)
def test_what_cannot_be_trained_is_named(prose: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(prose, **options)


@pytest.mark.lmplz
@has_lmplz
def test_the_default_prune_is_cut_to_the_order(prose: Path) -> None:
    assert "--order 2 --prune 0,0 " in train(prose, order=2)["command"]
    Perplexity(model="m.bin").check(())


@pytest.mark.parametrize("prune", ["0,0,0.9", "inf", "nan", "0,-1", "", "0,,1"])
def test_prune_takes_whole_numbers_only(prose: Path, prune: str) -> None:
    result = CliRunner().invoke(
        app, ["train-lm", str(prose), "-o", "m.bin", "--licence", "CC0-1.0", "--prune", prune]
    )
    assert result.exit_code == 2
    assert f"--prune {prune}: write whole numbers, 0 or more, separated by commas" in result.stderr


@pytest.mark.parametrize("name, has_hint", [("prose.txt", True), ("prose.jsonl", False)])
def test_the_error_for_one_document_says_what_separates_them(
    fake_kenlm: Path, name: str, has_hint: bool
) -> None:
    text = "one\ntwo\nthree\n" if has_hint else '{"text": "one"}\n'
    Path(name).write_text(text)
    with pytest.raises(
        ValueError, match=r"of 1 documents . are held out and . left to train on"
    ) as error:
        train(Path(name))
    assert ("; documents in .txt are separated by blank lines" in str(error.value)) == has_hint


# --- what a model may replace, and what is left of one that was stopped ---------------------------


@pytest.fixture
def fake_kenlm(prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An lmplz that takes long and says so in the file `started`."""
    folder = tmp_path / "kenlm"
    folder.mkdir()
    for name in ("lmplz", "build_binary"):
        (folder / name).write_text(
            f"#!/bin/sh\necho $$ > {tmp_path}/starting\n"
            # until Popen has returned, the parent cannot kill this process
            f"sleep 0.5\nmv {tmp_path}/starting {tmp_path}/started\nexec sleep 600\n"
        )
        (folder / name).chmod(0o755)
    monkeypatch.setenv("GRISTMILL_KENLM_BIN", str(folder))
    return folder


@pytest.mark.parametrize(
    "output, message",
    [
        (
            "prose.txt",
            "output prose.txt: is the source prose.txt, which it would replace; choose another name",
        ),
        ("link.txt", "output link.txt: is the source prose.txt"),
        (
            "notes.md",
            "output notes.md: exists, and is not a model with a card of ours; remove it or choose another name",
        ),
        ("data", r"output data\.json: exists, and is not a model with a card"),
        ("with", r"output with\.spm: exists, and is not a model with a card"),
        ("folder", "output folder: is a folder; name a file in it"),
        (".", r"output \.: is a folder"),
        (
            "s3://bucket/lm.bin",
            "output s3://bucket/lm.bin: is a URL; filters read it from a path that every worker has",
        ),
    ],
)
def test_a_model_replaces_nothing_but_a_model(fake_kenlm: Path, output: str, message: str) -> None:
    Path("link.txt").symlink_to("prose.txt")
    for name, text in {
        "notes.md": "x",
        "data.json": '{"kind": "mine"}',
        "with.spm": "x",
        "with.json": '{"kind": "kenlm"}',
    }.items():
        Path(name).write_text(text)
    Path("folder").mkdir()
    Path("folder.json").write_text("{}")
    before = {path: path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}
    with pytest.raises(ValueError, match=message):
        train(Path("prose.txt"), output)
    assert {
        path: path.read_bytes() if path.is_file() else None for path in Path().rglob("*")
    } == before


def test_a_model_with_its_card_is_replaced_unless_it_is_a_source(prose: Path) -> None:
    for name in ("m.bin", "m.bin.spm"):
        Path(name).write_text("old")
    Path("m.bin.json").write_text('{"kind": "kenlm", "sentencepiece": {}}')
    with (
        pytest.raises(ValueError, match=r"output m\.bin\.spm: is the source m\.bin\.spm"),
        replacing(Path("m.bin"), Path("m.bin.spm"), sources=["m.bin.spm"]),
    ):
        pass
    with replacing(Path("m.bin"), Path("m.bin.spm"), sources=[prose]) as (model, _):
        model.write_text("new")
    assert Path("m.bin").read_text() == "new"
    assert {path.name for path in Path().iterdir()} == {"prose.txt", "m.bin"}


def test_sigterm_leaves_no_scratch_files(fake_kenlm: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    environment = os.environ | {"TMPDIR": str(scratch), "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "-m",
        "pipeline",
        "train-lm",
        "prose.txt",
        "-o",
        "m.bin",
        "--licence",
        "x",
        "--held-out",
        "0.3",
    ]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 300
            while (
                not Path("started").exists()
                and process.poll() is None
                and time.monotonic() < deadline
            ):
                time.sleep(0.05)
            assert any(scratch.iterdir())
            process.send_signal(signal.SIGTERM)
            assert (process.wait(300), process.stderr.read()) == (143, "")
        finally:
            process.kill()
    assert list(scratch.iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {
        "prose.txt",
        "kenlm",
        "scratch",
        "started",
    }
    with pytest.raises(ProcessLookupError):
        os.kill(int(Path("started").read_text()), 0)


def test_find_kenlm_looks_where_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("lmplz", "build_binary"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("GRISTMILL_KENLM_BIN", str(tmp_path))
    assert find_kenlm() == [str(tmp_path / "lmplz"), str(tmp_path / "build_binary")]


@pytest.mark.parametrize("lines", [1, 7, 50, 400])
def test_a_sample_is_all_or_about_half_at_least_and_the_same_twice(
    tmp_path: Path, lines: int
) -> None:
    text = tmp_path / "text"
    text.write_text("".join(f"line {i}\n" for i in range(300)))
    found = sample_lines(text, limit=lines)
    assert found == sample_lines(text, limit=lines)
    assert len(found) == 300 if lines >= 300 else len(found) <= lines
    assert [int(line.split()[1]) for line in found] == sorted(
        {int(line.split()[1]) for line in found}
    )
    if lines == 50:
        assert len(found) >= 20


@pytest.mark.parametrize("name", ["wiki-en.5gram.bin", "quality-en.ftz"])
def test_bundled_cards_name_the_bundled_models(name: str) -> None:
    path = ROOT / "models" / name
    card = json.loads(path.with_name(name + ".json").read_text())
    assert (card["name"], card["sha256"]) == (name, hashlib.sha256(path.read_bytes()).hexdigest())
    assert card["sha256"] in (ROOT / "models" / "README.md").read_text()
