"""Signatures: bit-identical to datasketch, the same alone and in any batch; and contents."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.text.words import normalize
from stages.dedup import minhash
from stages.dedup.minhash import (
    Signature,
    band_keys,
    content_hash,
    minima,
    shingle_hashes,
    signatures,
)

SCHEME = Signature(num_bands=14, rows_per_band=8, ngram=5, scheme="affine32", seed=1)
WIDTHS = {"affine32": 32, "affine64": 64}
NASTY = [
    "",
    " ",
    "***",
    "—",
    "İΣΣ ǅ",
    "e\u0301\u0345",
    " \u0301 ",
    "a\u0301\x00b",
    "\ud800x",
    "１２３ ٣ ²",
    "각 नमस्ते",
    "_a__b_",
    "東京はabc日本1",
    "\U0001d7d9z",
]
TEXTS = (
    st.text()
    | st.sampled_from(NASTY)
    | st.lists(st.sampled_from([*"abcdefg", "é", "internationalization"])).map(" ".join)
)
BATCHES = st.lists(TEXTS.map(normalize), max_size=12)


def datasketch_minima(hashes, *, num_perm, seed, scheme):
    datasketch = pytest.importorskip("datasketch")
    oracle = datasketch.MinHash(
        num_perm, seed=seed, scheme=scheme, hashfunc=lambda v: v & (2 ** WIDTHS[scheme] - 1)
    )
    oracle.update_batch(sorted(hashes))
    return oracle.hashvalues.tolist()


def slow_fmix64(x):
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53, 1):
        x = (x ^ x >> 33) * multiplier % 2**64
    return x


def slow_shingle(words):
    total = 0
    for word in words:
        raw = word.encode()
        blocks = [int.from_bytes(raw[i : i + 8], "little") for i in range(0, len(raw), 8)]
        hashed = (
            sum(
                slow_fmix64(block ^ place * 0x9E3779B97F4A7C15 % 2**64)
                for place, block in enumerate(blocks)
            )
            % 2**64
        )
        total = total * 0x9E3779B97F4A7C15 % 2**64
        total = ((total ^ total >> 29) + hashed) % 2**64
    return total


# --- signatures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", WIDTHS)
@given(
    sets=st.lists(
        st.sets(st.integers(0, 2**64 - 1), min_size=1, max_size=200), min_size=1, max_size=5
    ),
    seed=st.integers(0, 1000),
)
def test_minima_are_datasketch_s_bit_for_bit(scheme, sets, seed):
    hashes = np.array([value for values in sets for value in values], np.uint64)
    signature = Signature(num_bands=3, rows_per_band=8, ngram=1, scheme=scheme, seed=seed)
    ours = minima(hashes, np.array([len(values) for values in sets]), signature)
    assert ours.T.tolist() == [
        datasketch_minima(values, num_perm=24, seed=seed, scheme=scheme) for values in sets
    ]


@pytest.mark.parametrize("scheme", WIDTHS)
@given(batch=BATCHES, group_chars=st.integers(1, 200))
def test_signatures_of_a_batch_are_datasketch_s_of_each_document(scheme, batch, group_chars):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minhash, "_GROUP_CHARS", group_chars)
        documents, ours = signatures(batch, Signature(3, 4, 2, scheme, seed=7))
    sets = [shingle_hashes(text, ngram=2).tolist() for text in batch]
    assert documents.tolist() == [i for i, hashes in enumerate(sets) if hashes]
    assert ours.T.tolist() == [
        datasketch_minima(hashes, num_perm=12, seed=7, scheme=scheme) for hashes in sets if hashes
    ]


def test_share_of_equal_minima_estimates_the_jaccard_similarity():
    words = [f"w{i}" for i in range(2000)]
    texts = [" ".join(words[:1500]), " ".join(words[500:])]
    a, b = (shingle_hashes(text, ngram=5) for text in texts)
    truth = len(np.intersect1d(a, b)) / len(np.union1d(a, b))
    for scheme in WIDTHS:
        _, columns = signatures(texts, Signature(128, 8, 5, scheme, seed=1))
        assert np.mean(columns[:, 0] == columns[:, 1]) == pytest.approx(truth, abs=0.05)


# --- band keys ------------------------------------------------------------------------------------


@given(batch=BATCHES, group_chars=st.integers(1, 200))
def test_a_document_has_the_same_keys_alone_and_in_any_batch(batch, group_chars):
    scheme = SCHEME._replace(ngram=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minhash, "_GROUP_CHARS", group_chars)
        together = band_keys(batch, scheme)
    assert together == [band_keys([text], scheme)[0] for text in batch]


@pytest.mark.parametrize("scheme", WIDTHS)
@given(batch=BATCHES)
def test_band_keys_mix_the_rows_of_a_band_in_order(scheme, batch):
    scheme = Signature(3, 4, 2, scheme, seed=7)
    documents, columns = signatures(batch, scheme)
    expected = [b""] * len(batch)
    for document, column in zip(documents.tolist(), columns.T.tolist(), strict=True):
        for band in range(3):
            key = 0
            for value in column[4 * band : 4 * band + 4]:
                key = slow_fmix64(key ^ value)
            expected[document] += key.to_bytes(8, "little")
    assert band_keys(batch, scheme) == expected


def test_band_keys_of_nothing_are_nothing():
    assert band_keys([], SCHEME) == []
    assert band_keys(["", ""], SCHEME) == [b"", b""]


def test_a_text_of_fewer_words_than_a_shingle_has_no_band_keys():
    short, enough = band_keys(["four words only here", "now there are five words"], SCHEME)
    assert short == b"" and len(enough) == 14 * 8


def test_memory_does_not_grow_with_the_batch():
    batch = ["a " * (minhash.MAX_CHARS // 2)] * 6 + ["é" * minhash.MAX_CHARS] * 6
    tracemalloc.start()
    keys = band_keys(batch, SCHEME._replace(num_bands=1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [len(k) for k in keys] == [8] * 6 + [0] * 6
    assert peak < 60_000_000  # one group; all twelve at once would take six times as much


# --- shingles -------------------------------------------------------------------------------------


@given(text=TEXTS.map(normalize), ngram=st.integers(1, 6))
def test_shingle_hashes_are_those_of_the_slow_way(text, ngram):
    words = text.split()
    assert shingle_hashes(text, ngram=ngram).tolist() == sorted(
        {slow_shingle(words[i : i + ngram]) for i in range(len(words) - ngram + 1)}
    )


@given(st.lists(st.sampled_from("abcdefgh"), min_size=5, max_size=60))
def test_shingles_are_the_distinct_ngrams(words):
    distinct = {tuple(words[i : i + 5]) for i in range(len(words) - 4)}
    assert len(shingle_hashes(" ".join(words), ngram=5)) == len(distinct)


def test_shingles_beyond_the_cap_do_not_count(monkeypatch):
    monkeypatch.setattr(minhash, "MAX_CHARS", 60)
    head = "one two three four five six seven eight nine ten eleven tw. "
    assert len(head) == 60
    assert (
        shingle_hashes(head + "x y z" * 50, ngram=5).tolist()
        == shingle_hashes(head, ngram=5).tolist()
    )
    assert band_keys([head + "x y z" * 50, head], SCHEME) == band_keys([head, head], SCHEME)


# --- contents -------------------------------------------------------------------------------------


def test_copies_differing_in_case_accents_and_punctuation_are_one_content():
    a, b = "Crème — brûlée, 2024!", "creme brulee 2024"
    assert content_hash(a, normalize(a)) == content_hash(b, normalize(b))


def test_texts_without_words_are_one_content_only_when_equal():
    texts = ["", "***", "!!!", "\ud800"]
    assert [normalize(text) for text in texts] == [""] * 4
    assert len({content_hash(text, "") for text in texts}) == 4
