"""Signatures: bit-identical to datasketch, and what the normaliser forgives."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages import minhash
from stages.minhash import Signature, band_keys, content_hash, normalize, shingle_hashes, signature

SCHEME = Signature(num_bands=14, rows_per_band=8, ngram=5, scheme="affine64", seed=1)


@pytest.mark.parametrize("scheme, width", [("affine64", 64), ("affine32", 32)])
@given(values=st.sets(st.integers(0, 2**64 - 1), min_size=1, max_size=600), seed=st.integers(0, 1000))
def test_signature_is_datasketch_s_bit_for_bit(scheme, width, values, seed):
    datasketch = pytest.importorskip("datasketch")
    oracle = datasketch.MinHash(num_perm=24, seed=seed, scheme=scheme, hashfunc=lambda v: v & (2**width - 1))
    oracle.update_batch(sorted(values))
    ours = signature(np.array(sorted(values), np.uint64), num_perm=24, seed=seed, scheme=scheme)
    assert ours.tolist() == oracle.hashvalues.tolist()


@given(st.text())
def test_normalize_is_total_and_idempotent(text):
    once = normalize(text)
    assert normalize(once) == once
    assert len(content_hash(once)) == 16


def test_copies_differing_in_case_digits_and_punctuation_are_one_content():
    assert normalize("Crème — brûlée, 2024!") == normalize("creme brulee 1999") == "creme brulee 0000"


def test_a_text_of_fewer_words_than_a_shingle_has_no_band_keys():
    assert band_keys(normalize("four words only here"), SCHEME) == b""
    assert len(band_keys(normalize("now there are five words"), SCHEME)) == 14 * 8


def test_shingles_beyond_the_cap_do_not_count(monkeypatch):
    monkeypatch.setattr(minhash, "MAX_CHARS", 58)
    head = "one two three four five six seven eight nine ten eleven tw. "
    assert shingle_hashes(head + "x y z" * 50, ngram=5).tolist() == shingle_hashes(head, ngram=5).tolist()


@given(st.lists(st.sampled_from("abcdefgh"), min_size=5, max_size=60))
def test_shingles_are_the_distinct_ngrams(words):
    distinct = {tuple(words[i : i + 5]) for i in range(len(words) - 4)}
    assert len(shingle_hashes(" ".join(words), ngram=5)) == len(distinct)


def test_share_of_equal_minima_estimates_the_jaccard_similarity():
    words = [f"w{i}" for i in range(2000)]
    a, b = shingle_hashes(" ".join(words[:1500]), ngram=5), shingle_hashes(" ".join(words[500:]), ngram=5)
    truth = len(np.intersect1d(a, b)) / len(np.union1d(a, b))
    estimate = np.mean(
        signature(a, num_perm=1024, seed=1, scheme="affine64") == signature(b, num_perm=1024, seed=1, scheme="affine64")
    )
    assert estimate == pytest.approx(truth, abs=0.05)
