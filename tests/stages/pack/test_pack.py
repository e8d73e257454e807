"""Stage pack: which documents are set aside for evaluation, and that nothing else changes for it."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from stages.formats import mds
from stages.formats.tiktoken_encodings import load_encoding
from stages.formats.tokenizer import load_tokenizer
from stages.pack.pack import (
    HELD_OUT,
    TRAINING,
    CorpusPart,
    PackConfig,
    PackPlan,
    PackResult,
    PackTask,
    _stored,
    is_held_out,
    pack_unit,
)
from stages.read.warc import ReadStats, read_records
from stages.storage.digests import digest
from stages.storage.ledger import Store, Unit
from tests.support.examples import at_most
from tests.support.paths import ROOT

TEXTS = [f"Document {n} of the mill: " + "it grinds wheat, " * (n % 9) for n in range(40)]


def pack(folder, texts, *, unit="00000", seed=0, **settings):
    """One unit over one corpus part of these texts, whose ids are their places; its commit and
    store.
    """
    folder.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([("doc_id", pa.uint64()), ("url", pa.string()), ("text", pa.large_string())])
    urls = [url_of(number) for number in range(len(texts))]
    pq.write_table(
        pa.table([list(range(len(texts))), urls, texts], schema=schema), folder / "corpus.parquet"
    )
    store = Store(str(folder / "pack"))
    plan = PackPlan(PackConfig(seq_len=32, shard_bytes=2048, **settings), seed)
    task = PackTask((CorpusPart("000000", str(folder / "corpus.parquet"), 1, ""),))
    return pack_unit(Unit(unit, "f", task), plan, store), store


def url_of(number):
    return f"https://mill.example/{number}" if number % 5 else None  # not every input has them


def shards(commit, kind):
    """Path and sha256 of what a unit wrote of a kind."""
    return [[o.path, o.sha256] for o in commit.outputs if o.kind == kind]


def texts_of(commit, store, side):
    """Texts of one side, put together from its shards by its provenance, by id; a document is there
    whole or not at all.
    """
    encoding, pieces = load_encoding("cl100k_base"), {}
    names = [path for path, _ in shards(commit, side.parts) if path.endswith(".mds")]
    rows = [row["tokens"] for name in names for row in mds.read_shard(store.uri(name))]
    for span in pq.read_table(store.uri(side.provenance, f"{commit.unit}.parquet")).to_pylist():
        ids = rows[span["row"]][span["start"] : span["start"] + span["length"]].tolist()
        assert span["url"] == url_of(span["doc_id"])
        pieces.setdefault(span["doc_id"], []).append((span["offset"], ids))
    return {
        doc: encoding.decode([i for _, ids in sorted(found) for i in ids][:-1])
        for doc, found in pieces.items()
    }


def drawn_slowly(text, share, seed):
    draw = xxhash.xxh64(
        text.encode(), seed=xxhash.xxh64_intdigest(f"{seed}/pack.held_out/".encode())
    ).intdigest()
    return Fraction(draw, 2**64) < Fraction(share)


@pytest.mark.parametrize(
    "packing, expected",
    [("concatenate", ("fe4d9b785bad936b", 35)), ("best_fit", ("f66dd225708ce274", 36))],
)
def test_without_a_share_the_bytes_are_those_of_before_there_was_one(tmp_path, packing, expected):
    commit, store = pack(tmp_path, TEXTS, packing=packing)
    assert (digest(shards(commit, "parts")), commit.rows_out) == expected
    assert commit.counts == {"kept": 40} and commit.result == PackResult(1110)
    assert not Path(store.uri("held_out")).exists()


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_every_document_is_whole_on_one_side(tmp_path, packing):
    commit, store = pack(tmp_path, TEXTS, packing=packing, held_out=0.3)
    training, held_out = (texts_of(commit, store, side) for side in (TRAINING, HELD_OUT))
    assert training | held_out == dict(enumerate(TEXTS)) and not training.keys() & held_out.keys()
    assert (
        commit.counts == {"kept": len(training), "pack.held_out": len(held_out)}
        and commit.rows_in == 40
    )
    assert commit.result.tokens + commit.result.held_out_tokens == 1110
    kept = [text for text in TEXTS if text in training.values()]
    alone, _ = pack(tmp_path / "alone", kept, packing=packing)
    assert (alone.rows_out, alone.result.tokens) == (commit.rows_out, commit.result.tokens)


@given(
    texts=st.lists(st.text(max_size=20) | st.sampled_from(TEXTS), min_size=1, max_size=12),
    share=st.floats(0, 1, exclude_max=True),
    unit=st.from_regex(r"\d{5}", fullmatch=True),
    seed=st.integers(0, 3),
)
@at_most(25)
def test_the_text_alone_decides_in_whatever_unit(tmp_path_factory, texts, share, unit, seed):
    commit, store = pack(tmp_path_factory.mktemp("u"), texts, unit=unit, seed=seed, held_out=share)
    expected = {n for n, text in enumerate(texts) if drawn_slowly(text, share, seed)}
    for side, ids in ((HELD_OUT, expected), (TRAINING, set(range(len(texts))) - expected)):
        path = Path(store.uri(side.provenance, f"{unit}.parquet"))
        assert {*pq.read_table(path)["doc_id"].to_pylist()} == ids if path.exists() else not ids
    assert ("pack.held_out" in commit.counts) == bool(expected)


@pytest.mark.parametrize("share", [0.002, 0.05, 0.5])
def test_of_real_pages_about_the_share_is_drawn_and_a_larger_one_draws_the_same_and_more(share):
    files = sorted((ROOT / "samples").glob("*.warc.gz"))
    records = [
        r for f in files for r in read_records(str(f), max_payload_bytes=10**7, stats=ReadStats())
    ]
    pages = {r.payload for r in records if r.skipped is None}
    for seed in range(8):
        drawn = {page for page in pages if is_held_out(page, share=share, seed=seed)}
        # 4 standard deviations of as many independent draws
        assert abs(len(drawn) - share * len(pages)) < 4 * (share * (1 - share) * len(pages)) ** 0.5
        assert drawn <= {page for page in pages if is_held_out(page, share=1.5 * share, seed=seed)}
    assert not any(is_held_out(page, share=0.0, seed=0) for page in pages)


@pytest.mark.parametrize("share", [1.0, -0.01, float("nan"), "off", True])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValidationError, match="held_out"):
        PackConfig(held_out=share)


def test_what_an_attempt_that_died_left_behind_is_no_part_of_the_unit(tmp_path):
    commit, store = pack(tmp_path, TEXTS, held_out=0.9)
    again, _ = pack(tmp_path, TEXTS[:3])
    assert again.counts == {"kept": 3} and not Path(store.uri("held_out", "00000")).exists()
    assert {p.name for p in Path(store.uri("parts", "00000")).iterdir()} == {
        p.split("/")[-1] for p, _ in shards(again, "parts")
    }


def test_an_id_outside_of_the_vocabulary_is_refused():
    tokenizer = replace(load_tokenizer("cl100k_base"), vocab_size=60_000)
    ids = np.array([0, 59_999], np.uint32)
    assert _stored(ids, tokenizer).dtype == np.uint16 and _stored(ids, tokenizer).tolist() == [
        0,
        59_999,
    ]
    for id in (60_000, 65_536):
        with pytest.raises(ValueError, match=f"cl100k_base: gave the id {id}, and has 60000"):
            _stored(np.array([0, id], np.uint32), tokenizer)
