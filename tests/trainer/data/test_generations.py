"""Verification of generations: every kind of damage is named, with its file and what to do; nothing
here needs torch.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.run import publish as publishing
from stages.formats.mds import MDSWriter, columns_of_rows
from stages.formats.tokenizer import load_tokenizer
from stages.pack.pack import PROVENANCE, PackConfig, PackResult
from stages.storage.catalog import GenerationError, read_catalog
from stages.storage.files import scratch_folder
from stages.storage.ledger import Commit, Store
from tests.support.damages import FULL, QUICK, SHARD, flipped_byte, folder
from tests.support.shards import SEQ_LEN, publish, write_manifest
from trainer.data import generations
from trainer.data.generations import (
    Document,
    documents_of,
    folder_of,
    load_generation_tokenizer,
    verify_generation,
)


@pytest.fixture
def run(tmp_path) -> Path:
    publish(tmp_path, 20)
    return tmp_path


def verified(run: Path, mode: str) -> generations.Manifest:
    return verify_generation(str(run), read_catalog(str(run))[0], mode=mode)


@pytest.mark.parametrize(
    "mode, damage, message",
    [("quick", *f) for f in QUICK.items()] + [("full", *f) for f in FULL.items()],
)
def test_damage_is_named_with_its_file_and_what_to_do(run, mode, damage, message):
    damage(run)
    with pytest.raises(
        GenerationError, match=f"^generation gen-0001: .*{message}.*; restore the generation"
    ):
        verified(run, mode)


@pytest.mark.parametrize("mode", ["quick", "full"])
@pytest.mark.parametrize("options", [{}, {"compression": "zstd"}])
def test_a_whole_generation_passes(tmp_path, mode, options):
    publish(tmp_path, 20, **options)
    manifest = verified(tmp_path, mode)
    assert (manifest.name, manifest.rows, manifest.seq_len, manifest.shard_rows) == (
        "gen-0001",
        20,
        SEQ_LEN,
        (8, 8, 4),
    )


def test_quick_does_not_see_a_flipped_byte_and_full_hashes_only_once(run):
    verified(run, "full")
    flipped_byte(run)
    verified(run, "quick")
    verified(run, "full")  # remembered: this process has hashed it
    generations._hashed.clear()
    with pytest.raises(GenerationError, match="sha256"):
        verified(run, "full")


def test_a_generation_published_again_under_its_name_is_hashed_again(run):
    verified(run, "full")
    flipped_byte(run)
    write_manifest(run, "gen-0001")  # other bytes, another manifest
    (folder(run) / SHARD).write_bytes((folder(run) / SHARD).read_bytes()[::-1])
    with pytest.raises(GenerationError, match=rf"{SHARD}: sha256 by manifest"):
        verified(run, "full")


def test_the_folder_of_a_local_generation_is_its_own_that_of_a_remote_one_is_in_the_cache():
    assert folder_of("file:///a/run", "gen-0001", "/cache") == Path("/a/run/generations/gen-0001")
    copies = {
        folder_of(run, name, "/cache")
        for run in ("s3://a/b", "s3://a/c")
        for name in ("gen-0001", "gen-0001/held_out")
    }
    assert len(copies) == 4 and {copy.parent.parent for copy in copies} == {Path("/cache")}
    assert folder_of("s3://a/b/", "gen-0001", "/cache") in copies


def test_documents_come_in_the_order_of_rows_and_spans(run):
    spans = [
        (0, 7, 0, 9, 0, "a"),
        (1, 5, 8, 4, 0, "b"),
        (1, 7, 0, 8, 9, "a"),
        (2, 3, 0, 16, 0, "c"),
        (9, 1, 0, 2, 0, "d"),
    ]
    table = pa.table([list(column) for column in zip(*spans, strict=True)], schema=PROVENANCE)
    pq.write_table(table, folder(run) / "provenance.parquet")
    expected = [
        Document(1, 7, 0, 8, 9, "a"),
        Document(1, 5, 8, 4, 0, "b"),
        Document(2, 3, 0, 16, 0, "c"),
    ]
    assert documents_of(str(run), "gen-0001", [2, 1, 1]) == expected
    assert documents_of(str(run), "gen-0001", []) == []


def pack_by_hand(store: Store, unit: str, rows: int) -> Commit:
    """What stage pack leaves for a unit of `rows` rows, each of one document of nine tokens."""
    commit = Commit(
        unit,
        "fingerprint",
        rows_in=rows,
        rows_out=rows,
        counts={"kept": rows},
        result=PackResult(9 * rows),
    )
    with scratch_folder("pack") as folder:
        with MDSWriter(
            folder / "part", columns=columns_of_rows(SEQ_LEN), hashes=["sha1"]
        ) as writer:
            for row in range(rows):
                writer.write(
                    {"tokens": np.full(SEQ_LEN, row, np.uint32), "spans": np.array([9], np.uint32)}
                )
        for file in (folder / "part").iterdir():
            with store.create("parts", unit, file.name, outputs=commit.outputs) as path:
                path.write_bytes(file.read_bytes())
    spans = [(row, 100 * int(unit) + row, 0, 9, 3, "https://a.example/") for row in range(rows)]
    with store.create("provenance", f"{unit}.parquet", outputs=commit.outputs) as path:
        pq.write_table(
            pa.table([list(column) for column in zip(*spans, strict=True)], schema=PROVENANCE), path
        )
    return commit


def test_what_the_pipeline_publishes_is_read_and_verified(tmp_path):
    store = Store(str(tmp_path / "pack" / "key"))
    commits = [pack_by_hand(store, unit, rows) for unit, rows in (("00000", 3), ("00001", 4))]
    published = publishing.publish(
        str(tmp_path), store, commits, PackConfig(seq_len=SEQ_LEN), sources={}
    )
    manifest = verified(tmp_path, "full")
    assert (manifest.name, manifest.rows) == (published.name, 7)
    shape, tokenizer = manifest.shape, load_tokenizer("cl100k_base")
    assert (manifest.shard_rows, shape.tokenizer) == ((3, 4), "cl100k_base")
    assert (shape.tokenizer_sha256, shape.vocab_size) == (tokenizer.digest, tokenizer.vocab_size)
    [entry] = read_catalog(str(tmp_path))
    assert load_generation_tokenizer(str(tmp_path), entry) == tokenizer
    url = "https://a.example/"
    assert documents_of(str(tmp_path), published.name, [1, 4]) == [
        Document(1, 1, 0, 9, 3, url),
        Document(4, 101, 0, 9, 3, url),
    ]


@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base"])
def test_vocabularies_of_manifests_that_do_not_say_are_those_of_tiktoken(name):
    assert generations._VOCAB_SIZES[name] == load_tokenizer(name).vocab_size


@pytest.mark.corpus
@pytest.mark.parametrize("name", ["r50k_base", "p50k_base"])
def test_small_vocabularies_of_earlier_manifests_are_those_of_tiktoken(name, corpus):
    folder = str(corpus / "models" / "tiktoken_cache")
    tokenizer = load_tokenizer(name, vocabulary_dir=folder)
    assert generations._VOCAB_SIZES[name] == tokenizer.vocab_size and tokenizer.dtype == "uint16"
