"""Training a tokenizer: the same bytes each time, a card that is true, and one that pack takes."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.__main__ import app
from pipeline.models.model_card import is_held_out
from pipeline.models.options import BpeOptions
from pipeline.models.train_tokenizer import train_tokenizer
from stages.formats.tokenizer import load_tokenizer
from tests.support.inline import make_config, run_inline
from tests.support.paths import ROOT
from tests.support.texts import PROSE
from tests.support.tokenizer_files import MANY

LINES = (ROOT / "CHANGELOG.md").read_text().splitlines()
TEXTS = [f"{n}. {text}" for n, text in enumerate([PROSE, *MANY, *filter(None, LINES)])]


@pytest.fixture
def options(tmp_path):
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return BpeOptions(
        sources=[str(source)],
        output=tmp_path / "t.json",
        licence="CC0-1.0",
        vocab_size=700,
        held_out=0.1,
    )


def test_the_card_says_what_was_learned_from_and_how_good_it_is(options):
    card = train_tokenizer(options)
    assert card == json.loads(Path(f"{options.output}.json").read_text())
    held_out = [text for text in TEXTS if is_held_out(text, share=0.1)]
    tokens = sum(map(len, load_tokenizer(str(options.output)).encode_batch(held_out)))
    size = sum(len(text.encode()) for text in held_out)
    assert card["train"]["documents"] == len(TEXTS) - len(held_out)
    assert card["held_out"] == {
        "documents": len(held_out),
        "bytes": size,
        "words": sum(len(text.split()) for text in held_out),
        "tokens": tokens,
        "bytes_per_token": round(size / tokens, 4),
        "tokens_per_word": round(tokens / sum(len(text.split()) for text in held_out), 4),
    }
    assert card["sha256"] == hashlib.sha256(options.output.read_bytes()).hexdigest()
    assert card["vocab_size"] == 700 and card["end_of_text"] == "<|endoftext|>"
    assert card["command"].startswith("gristmill train-tokenizer ")


@pytest.mark.parametrize("threads", ["1", "2", "5"])
def test_the_same_texts_make_the_same_bytes_on_any_number_of_threads(options, threads):
    train_tokenizer(options)
    again = options.output.with_name("again.json")
    environment = os.environ | {"RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"}
    command = ["train-tokenizer", options.sources[0], "-o", str(again), "--license", "CC0-1.0"]
    subprocess.run(
        [sys.executable, "-m", "pipeline", *command, "--vocab-size=700", "--held-out=0.1"],
        env=environment,
        check=True,
        cwd=ROOT,
        capture_output=True,
    )
    assert again.read_bytes() == options.output.read_bytes()


def test_any_text_comes_back_whole(options):
    special = ["<|user|>", "<|assistant|>"]
    train_tokenizer(replace(options, begin_of_text="<|begin_of_text|>", special=special))
    tokenizer = load_tokenizer(str(options.output))
    assert (tokenizer.end_of_text, tokenizer.begin_of_text) == (0, 1)
    content = json.loads(options.output.read_text())
    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    assert added == {"<|endoftext|>": 0, "<|begin_of_text|>": 1, "<|user|>": 2, "<|assistant|>": 3}
    for text in (*MANY, "<|user|>\0 x", "\u0600\U0010ffff", "12345"):
        [ids] = tokenizer.encode_batch([text])
        assert tokenizer.library.decode(ids.tolist()) == text and ids.min(initial=9) > 3
    assert len(tokenizer.encode_batch(["1234567"])[0]) >= 3  # no token of four digits


def test_a_sample_is_learned_from_and_repeated(options):
    card = train_tokenizer(replace(options, sample_bytes=20_000))
    size = sum(len(text.encode()) for text in TEXTS)
    assert card["sample_share"] == pytest.approx(20_000 / size, abs=1e-6)
    assert 10_000 < card["train"]["bytes"] < 30_000
    first = options.output.read_bytes()
    train_tokenizer(replace(options, sample_bytes=20_000))
    assert options.output.read_bytes() == first


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"vocab_size": 200}, "vocab_size = 200: must be 257 or more"),
        ({"held_out": 0.0}, "held_out = 0.0: .* 0 are held out"),
        ({"sources": ["absent.jsonl"]}, "source absent.jsonl: no such file"),
        ({"sources": ["s3://b/x.jsonl"]}, "source s3://b/x.jsonl: no such file"),
    ],
)
def test_what_cannot_be_trained_leaves_no_file(options, changed, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(replace(options, **changed))
    assert not options.output.exists()


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"vocab_size": 256}, "vocab_size = 256: must be 257 or more"),
        ({"sample_bytes": 0}, "sample_bytes = 0: must be 1 or more"),
        ({"end_of_text": ""}, "end_of_text is empty"),
        ({"end_of_text": "x"}, "special tokens x: give each once"),
        ({"special": ["<a>", "<a>"]}, "special tokens <.endoftext.>, <a>, <a>: give each once"),
        ({"begin_of_text": "<|endoftext|>"}, "give each once"),
        ({"end_of_text": "<0x0A>"}, r"/t.json: has no special token '<0x0A>'"),
        ({"special": ["<s>", "<bos>"]}, r"/t.json: has several special .*; set pack.begin_of"),
    ],
)
def test_wrong_options_are_refused_before_a_source_is_read(options, changed, message):
    changed = {"sources": ["absent.jsonl"], **changed}
    with pytest.raises(ValueError, match=message) as raised:
        train_tokenizer(replace(options, **changed))
    assert "gristmill-tokenizer" not in str(raised.value)


def test_from_the_corpus_of_a_run_to_a_run_with_it_and_a_comparison(tmp_path, monkeypatch):
    rows = [{"text": text, "url": f"https://a.example/{n}"} for n, text in enumerate(TEXTS)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["input.format=jsonl", "input.url_column=url", "extract.filters=[]"]
    settings += ["refine.filters=[]", "dedup.enabled=false", "language.score=off"]
    settings += ["language.allowed=[]", "pack.seq_len=64"]
    run_inline(make_config(tmp_path, [tmp_path / "in.jsonl"], *settings))
    run, output = str(tmp_path / "run"), str(tmp_path / "mine.json")
    trained = cli(
        "train-tokenizer", run, "-o", output, "--vocab-size=900", "--held-out=0.1", "--license=CC0"
    )
    assert "mine.json: 900 tokens from" in trained
    packed = run_inline(
        make_config(tmp_path, [tmp_path / "in.jsonl"], *settings, f"pack.tokenizer='{output}'")
    )
    manifest = packed.published.manifest
    assert (manifest["vocab_size"], manifest["dtype"]) == (900, "uint16")

    compared = json.loads(cli("tokenizers", run, output, "cl100k_base", "--seq-len=64", "--json"))
    mine, theirs = compared["tokenizers"]
    assert compared["share"] == 1 and (mine["vocab_size"], theirs["vocab_size"]) == (900, 100_277)
    everything = mine["groups"][0]
    # a document's tokens, and its end-of-text
    assert everything["tokens"] + everything["documents"] == manifest["tokens"]
    assert everything["rows"] == manifest["rows"]
    for tokenizer in (mine, theirs):
        for kind in ("language", "file"):
            of_kind = [group for group in tokenizer["groups"] if group["kind"] == kind]
            for key in ("documents", "bytes", "words", "tokens"):
                assert sum(g[key] for g in of_kind) == tokenizer["groups"][0][key]
    assert theirs["groups"][0]["bytes_per_token"] > everything["bytes_per_token"] > 1
    assert mine["name"] == output
    (tmp_path / "other").mkdir()
    shutil.copy(output, tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    names = ("./mine.json", "other/mine.json", "cl100k_base")
    table = cli("tokenizers", run, *names, "--sample-chars=5000")
    assert all(f"{name} (" in table for name in names) and "in.jsonl" in table


def cli(*arguments):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout
