"""Runs and trainings with tokenizers of every kind. Without Ray."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from pipeline.__main__ import app
from pipeline.config.load import load
from pipeline.engine.units import in_process
from pipeline.inspect import export
from pipeline.inspect.verify import verify_path
from pipeline.run.execute import RunFailed, execute
from pipeline.run.keys import stage_keys
from stages.formats import mds
from stages.formats.errors import ConfigError
from stages.formats.tokenizer import load_tokenizer
from stages.storage.catalog import read_catalog
from tests.support.inline import Silent, make_config, run_inline
from tests.support.texts import PROSE
from tests.support.tokenizer_files import MANY, TURN

OPTIONS = (
    "input.format=jsonl",
    "input.url_column=url",
    "extract.filters=[]",
    "refine.filters=[]",
    "dedup.enabled=false",
    "language.allowed=[]",
    "language.score=off",
    "pack.seq_len=64",
    "pack.held_out=0.3",
)
TEXTS = [f"{n} {text} </s><|endoftext|>{TURN}" for n, text in enumerate([PROSE, *MANY] * 4)]


def make(folder, path, *overrides):
    rows = [{"text": text, "url": f"https://a.example/{n}"} for n, text in enumerate(TEXTS)]
    file = folder / "input.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make_config(folder, [file], *OPTIONS, f"pack.tokenizer='{path}'", *overrides)


def settings_of(options):
    return [f"pack.{key}={json.dumps(value)}" for key, value in options._asdict().items() if value]


@pytest.mark.parametrize("kind", ["cl100k_base", "ranks", "bpe", "unigram", "sp_bpe"])
def test_rows_are_the_tokens_of_the_documents(kind, tokenizer_files, tmp_path):
    path, options = tokenizer_files[kind]
    begin = kind in ("sp_bpe", "ranks")
    config = make(
        tmp_path, path, *settings_of(options), f"pack.add_begin_of_text={str(begin).lower()}"
    )
    published = run_inline(config).published
    assert verify_path(config.run.directory)[0].faults == []
    tokenizer, manifest = load_tokenizer(path, options), published.manifest
    named = ("vocab_size", "end_of_text", "begin_of_text", "dtype")
    assert {key: manifest[key] for key in named} == {key: getattr(tokenizer, key) for key in named}
    assert manifest["tokenizer"] == Path(path).name
    assert manifest["tokenizer_sha256"] == tokenizer.digest
    corpus = {
        row["doc_id"]: row["text"]
        for table in export.tables(config.run.directory, "corpus")
        for row in table.to_pylist()
    }
    documents = read_documents(published.uri, manifest, np.dtype(tokenizer.dtype))
    expected = tokenizer.encode_documents(list(corpus.values()), begin_of_text=begin)
    assert documents == {id: ids.tolist() for id, ids in zip(corpus, expected, strict=True)}


def read_documents(uri, manifest, dtype):
    """The tokens of each document, put together from the rows of both splits by provenance."""
    pieces = {}
    for folder, split in ((uri, manifest), (f"{uri}/held_out", manifest["held_out"])):
        names = [shard["basename"] for shard in split["shards"]]
        rows = [row["tokens"] for name in names for row in mds.read_shard(f"{folder}/{name}")]
        assert {row.dtype for row in rows} == {dtype}
        for span in pq.read_table(f"{folder}/provenance.parquet").to_pylist():
            ids = rows[span["row"]][span["start"] : span["start"] + span["length"]].tolist()
            pieces.setdefault(span["doc_id"], []).append((span["offset"], ids))
    return {id: [i for _, ids in sorted(found) for i in ids] for id, found in pieces.items()}


@pytest.mark.train
def test_streaming_reads_rows_of_uint16(tokenizer_files, tmp_path):
    pytest.importorskip("torch")
    from trainer.data.order import import_streaming

    published = run_inline(make(tmp_path, tokenizer_files["bpe"][0])).published
    dataset = import_streaming().StreamingDataset(local=published.uri, batch_size=1, shuffle=False)
    rows = [dataset[n]["tokens"] for n in range(len(dataset))]
    assert {row.dtype for row in rows} == {np.dtype("uint16")}
    assert len(rows) == published.manifest["rows"]


def test_a_generation_has_its_tokenizer(tokenizer_files, tmp_path):
    from trainer.data.generations import load_generation_tokenizer

    path = tmp_path / "mine.json"
    shutil.copy(tokenizer_files["bpe"][0], path)
    config = make(tmp_path, path)
    published, run = run_inline(config).published, config.run.directory
    expected = load_tokenizer(str(path))
    path.unlink()
    [entry] = read_catalog(run)
    loaded = load_generation_tokenizer(run, entry)
    assert replace(loaded, file=None) == replace(expected, file=None)
    assert loaded.encode_batch(TEXTS)[0].tolist() == expected.encode_batch(TEXTS)[0].tolist()

    copy = Path(published.uri, "tokenizer", "mine.json")
    copy.write_bytes(copy.read_bytes().replace(b"endoftext", b"endofpage"))
    [fault] = verify_path(run)[0].faults
    assert fault.shard == "tokenizer/mine.json" and fault.what == "sha256 by manifest"
    with pytest.raises(ValueError, match=r"gen-0001: tokenizer/mine.json: sha256 by manifest"):
        load_generation_tokenizer(run, entry)


def test_a_changed_file_repacks_and_a_moved_one_does_not(tokenizer_files, tmp_path):
    def key(path, *overrides):
        return stage_keys(make(tmp_path, path, *overrides), [])["pack"]

    first, second = tmp_path / "a.json", tmp_path / "folder.x" / "a.json"
    second.parent.mkdir()
    for path in (first, second):
        shutil.copy(tokenizer_files["bpe"][0], path)
    before = key(first)
    assert key(second) == before
    second.write_bytes(second.read_bytes().replace(b'"max_length":7', b'"max_length":8') + b"\n")
    assert key(second) != before
    changes = ["pack.add_begin_of_text=true", f"pack.end_of_text='{TURN}'"]
    assert len({before, key("cl100k_base"), *(key(first, change) for change in changes)}) == 4


@pytest.mark.parametrize("when", ["before pack", "before publish"])
def test_a_tokenizer_that_is_replaced_during_a_run_ends_it(when, tokenizer_files, tmp_path):
    path = tmp_path / "mine.json"
    shutil.copy(tokenizer_files["bpe"][0], path)
    original, config = path.read_bytes(), make(tmp_path, path)
    key = stage_keys(config, [])["pack"]

    def run(replaced):
        def units(phase, work, pending, resources):
            if replaced and phase == "pack" and when == "before pack":
                path.write_bytes(original + b"\n")
            yield from in_process(phase, work, pending, resources)
            if replaced and phase == "pack":
                path.write_bytes(original + b"\n")

        return execute(config, Silent(), units)

    with pytest.raises((RunFailed, ValueError)) as raised:
        run(replaced=True)
    assert "mine.json: was replaced during the run" in str(raised.value)
    assert not read_catalog(config.run.directory)
    assert stage_keys(config, [])["pack"] != key
    # the new file has a key of its own, and the old one's has no rows of the new one
    new = run(replaced=False).published
    path.write_bytes(original)
    old = run(replaced=False).published
    for published, data in ((new, original + b"\n"), (old, original)):
        assert published.manifest["tokenizer_sha256"] == hashlib.sha256(data).hexdigest()


def test_pack_keys_of_earlier_runs_stay(tmp_path):
    """What version 2 of the stage hashed: `encoding`, and nothing of files."""
    from pipeline.run.keys import _packing
    from stages.pack.pack import PackConfig
    from stages.storage.digests import digest

    assert digest(_packing(PackConfig(), {})) == "8244d871610b1779"
    assert _packing(PackConfig(tokenizer="r50k_base"), {}) != _packing(PackConfig(), {}) | {
        "encoding": "r50k_base"
    }


def test_the_old_key_still_names_an_encoding(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text(
        '[run]\ndirectory = "r"\n[input]\npaths = ["x"]\n[pack]\nencoding = "o200k_base"\n'
    )
    config = load(file)
    assert config.pack.tokenizer == "o200k_base"
    assert config.origins["pack.tokenizer"] == f"{file}:6"
    # of both names, that of the command line holds
    assert load(file, ["pack.encoding=cl100k_base"]).pack.tokenizer == "cl100k_base"
    assert load(file, ["pack.tokenizer=cl100k_base"]).pack.tokenizer == "cl100k_base"
    file.write_text(file.read_text().replace("encoding =", "tokenizer ="))
    assert load(file, ["pack.encoding=cl100k_base"]).pack.tokenizer == "cl100k_base"
    with pytest.raises(ConfigError, match=r"^command line: pack.encoding is an old name"):
        load(file, ["pack.encoding=cl100k_base", "pack.tokenizer=cl100k_base"])


def test_the_old_key_is_followed_with_a_hint(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text(
        '[run]\ndirectory = "r"\n[input]\npaths = ["x"]\n[pack]\nencoding = "o200k_base"\n'
    )
    result = CliRunner().invoke(app, ["show-config", str(file), "--json"])
    assert json.loads(result.stdout)["pack.tokenizer"]["value"] == '"o200k_base"'
    assert f"{file}:6: pack.encoding is an old name: write pack.tokenizer" in result.stderr


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["pack.end_of_text='<eod>'"],
            "pack.tokenizer: .*has no special token '<eod>'.*set pack.end_of",
        ),
        (["pack.pattern=x"], "pack.tokenizer: .*a pattern belongs to ranks of tiktoken alone"),
        (["pack.tokenizer='s3://b/t.json'"], "must have a local path on every worker"),
        (["pack.tokenizer=''"], "pack.tokenizer = '': String should have at least 1 character"),
    ],
)
def test_wrong_tokenizers_are_refused_before_any_work(
    overrides, message, tokenizer_files, tmp_path
):
    with pytest.raises(ConfigError, match=message):
        make(tmp_path, tokenizer_files["bpe"][0], *overrides)


def test_begin_of_text_is_refused_where_there_is_none(tmp_path, tokenizer_files):
    message = "has no token for the beginning of a text"
    path = tmp_path / "t.json"
    content = Path(tokenizer_files["bpe"][0]).read_text()
    path.write_text(content.replace("<|startoftext|>", "<|start|>"))
    with pytest.raises(ConfigError, match=message):
        make(tmp_path, path, "pack.add_begin_of_text=true")
    with pytest.raises(ConfigError, match=message):
        make(tmp_path, "cl100k_base", "pack.add_begin_of_text=true")


# --- training -------------------------------------------------------------------------------------


def training(folder, *runs, **model):
    from trainer.config import DataConfig, ModelConfig, SourceConfig, TrainConfig

    small = {"dim": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "ffn_dim": 32}
    return TrainConfig(
        directory=str(folder / "train"),
        max_steps=3,
        model=ModelConfig(**small, **{"vocab_size": 0, **model}),
        data=DataConfig(
            sources=tuple(SourceConfig(run) for run in runs),
            global_batch_rows=4,
            micro_batch_rows=4,
            at_end="repeat",
            max_epochs=9,
        ),
    )


@pytest.fixture
def published(tmp_path, tokenizer_files):
    pytest.importorskip("torch")
    config = make(tmp_path, tokenizer_files["bpe"][0])
    run_inline(config)
    return config.run.directory


@pytest.mark.train
def test_a_model_takes_its_vocabulary_from_the_generation(published, tmp_path):
    from tests.support.live_training import run_training

    config = training(tmp_path, published)
    result = run_training(config, device="cpu")
    assert result.steps == 3 and result.loss < np.log(640) + 0.2
    saved = json.loads((tmp_path / "train" / "config.json").read_text())
    assert saved["model"]["vocab_size"] == 640  # 602, up to a multiple of 128
    # and its checkpoints go on without the setting too
    assert run_training(replace(config, max_steps=4), device="cpu").steps == 4


@pytest.mark.train
def test_a_model_of_a_smaller_vocabulary_is_refused_before_it_is_built(published, tmp_path):
    from tests.support.live_training import run_training

    with pytest.raises(ValueError, match=r"at most model.vocab_size = 601 tokens, found 602"):
        run_training(training(tmp_path, published, vocab_size=601), device="cpu")
    assert run_training(training(tmp_path, published, vocab_size=602), device="cpu").steps == 3


@pytest.mark.train
def test_generations_of_two_tokenizers_of_one_name_do_not_mix(published, tmp_path, tokenizer_files):
    from tests.support.live_training import run_training

    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(tokenizer_files["llama"][0], other / "bpe.json")
    config = make(other, other / "bpe.json")
    run_inline(config)
    message = (
        r"expected tokenizer_sha256 \w+, vocab_size 602, .* as in this run so far, "
        r"found tokenizer_sha256 \w+, vocab_size 702"
    )
    with pytest.raises(ValueError, match=message):
        run_training(training(tmp_path, published, config.run.directory), device="cpu")
