"""MinHash band keys of documents: word n-grams, affine permutations, a batch of documents at a
time, in NumPy only.

The permutations are datasketch 2's, bit for bit (`MinHash(num_perm, seed, scheme="affine32")` fed
the same shingle hashes gives the same minima; kept by a property test). Source of the banding:
Broder 1997; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, 3.4; FineWeb's 14 bands of
8 rows, arXiv:2406.17557.

A document's keys do not depend on the batch it comes in. The batch is worked off in groups of
documents of some 300,000 characters, so that the memory needed beside texts and results stays under
50 MB whatever the batch holds.

Arrays: W words, S shingles (duplicates kept: a minimum does not mind them), D documents, P
permutations.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from filters.text import ngrams
from filters.text.ngrams import I64, U64

Scheme = Literal["affine32", "affine64"]
Uint = npt.NDArray[Any]  # uint32 or uint64, by the scheme

# Stored with the keys: keys made by different normalisers or shingle hashes must never be compared.
NORMALIZER = "nfd-words-2"
MAX_CHARS = 500_000

# 300,000 characters are about 50,000 English shingles: a row of them stays in the second-level
# cache, and the overhead of a NumPy call is spread over about 100 documents. Documents are not cut:
# a group may exceed this by one of MAX_CHARS.
_GROUP_CHARS = 300_000


class Signature(NamedTuple):
    """How band keys are made: bands x rows permutations, drawn by `seed`, over word n-grams."""

    num_bands: int
    rows_per_band: int
    ngram: int
    scheme: Scheme
    seed: int


class Signatures(NamedTuple):
    """MinHashes of the documents that are long enough: their places in the batch (D,), ascending,
    and minima (P, D).
    """

    documents: I64
    minima: Uint


def describe(scheme: Signature) -> str:
    """How keys are made, in words: stored beside them, since keys made in different ways must never
    be compared.
    """
    permutations = f"{scheme.scheme} seed {scheme.seed}"
    return f"{NORMALIZER}, {scheme.ngram}-grams, {permutations}, {scheme.num_bands} bands of {scheme.rows_per_band}"


def normalize(text: str) -> str:
    """Lower-case, digits to 0, punctuation to space, white space collapsed, NFD without combining
    marks.

    A character of Chinese or Japanese, which put no spaces between words, is a word.
    """
    return ngrams.normalize_words(text, ngrams.replacements(digits="zeroed"))


def content_hash(text: str, normalized: str) -> bytes:
    """128-bit hash of the normalised text: equal for copies that differ in case, digits' values or
    punctuation only.

    A text without words is hashed as it stands: "***" and "!!!" are not copies of one another.
    """
    return xxhash.xxh3_128_digest((normalized or text).encode("utf-8", "surrogatepass"))


def shingle_hashes(normalized: str, *, ngram: int) -> U64:
    """64-bit hashes of the distinct word n-grams, ascending; empty when there are fewer than
    `ngram` words.
    """
    distinct: U64 = np.unique(_shingles([normalized], ngram=ngram)[0])
    return distinct


def band_keys(normalized: Sequence[str], scheme: Signature) -> list[bytes]:
    """Per document its band keys, 8 bytes each, little-endian; b"" for a text too short to shingle
    (exact hash only).
    """
    keys = [b""] * len(normalized)
    documents, columns = signatures(normalized, scheme)
    rows = columns.reshape(scheme.num_bands, scheme.rows_per_band, len(documents)).astype(np.uint64)
    mixed = np.zeros((scheme.num_bands, len(documents)), np.uint64)
    for row in range(scheme.rows_per_band):
        mixed = premix(mixed ^ rows[:, row], scheme="affine64")
    packed, size = mixed.T.astype("<u8").tobytes(), 8 * scheme.num_bands
    for i, document in enumerate(documents.tolist()):
        keys[document] = packed[i * size : (i + 1) * size]
    return keys


def signatures(normalized: Sequence[str], scheme: Signature) -> Signatures:
    """MinHashes of the documents that have at least `ngram` words."""
    num_perm = scheme.num_bands * scheme.rows_per_band
    dtype = np.uint32 if scheme.scheme == "affine32" else np.uint64
    documents, columns = [np.empty(0, np.int64)], [np.empty((num_perm, 0), dtype)]
    for start, stop in _groups(normalized):
        shingles, counts = _shingles(normalized[start:stop], ngram=scheme.ngram)
        found = np.flatnonzero(counts)
        if len(found):
            documents.append(found + start)
            columns.append(
                minima(
                    shingles,
                    counts[found],
                    num_perm=num_perm,
                    seed=scheme.seed,
                    scheme=scheme.scheme,
                )
            )
    return Signatures(np.concatenate(documents), np.concatenate(columns, axis=1))


def minima(shingles: U64, counts: I64, *, num_perm: int, seed: int, scheme: Scheme) -> Uint:
    """MinHashes (P, D) of documents that own `counts` (D,) shingle hashes each, one document after
    the other, none empty.
    """
    a, b = permutations(num_perm, seed=seed, scheme=scheme)
    mixed = premix(shingles, scheme=scheme)
    starts = np.cumsum(counts) - counts
    permuted, least = np.empty_like(mixed), np.empty((num_perm, len(counts)), mixed.dtype)
    # one permutation at a time over all documents: long rows keep NumPy's SIMD loops busy and its
    # call overhead small
    for k in range(num_perm):
        np.multiply(mixed, a[k], out=permuted)
        np.add(permuted, b[k], out=permuted)
        np.minimum.reduceat(permuted, starts, out=least[k])
    return least


@lru_cache(maxsize=8)
def permutations(num_perm: int, *, seed: int, scheme: Scheme) -> tuple[Uint, Uint]:
    """Parameters (a, b) of datasketch 2's affine permutations h -> a*h + b modulo 2^32 or 2^64,
    each of shape (P,).
    """
    dtype, width = (np.uint32, 32) if scheme == "affine32" else (np.uint64, 64)
    draw = np.random.RandomState(seed)
    a = draw.randint(0, 1 << (width - 1), num_perm, dtype=dtype) * dtype(2) + dtype(1)
    return a, draw.randint(0, 1 << width, num_perm, dtype=dtype)


def premix(hashes: U64, *, scheme: Scheme) -> Uint:
    """MurmurHash3's finaliser, which datasketch applies once before the permutations; affine32
    keeps the low 32 bits.
    """
    mixed: Uint = ngrams.fmix(hashes, bits=32 if scheme == "affine32" else 64)
    return mixed


def _groups(normalized: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Ranges of consecutive documents that hold about _GROUP_CHARS characters each."""
    chars = np.cumsum([min(len(text), MAX_CHARS) for text in normalized])
    group = chars // _GROUP_CHARS
    borders = np.flatnonzero(np.diff(group)) + 1
    yield from pairwise([0, *borders.tolist(), len(normalized)])


def _shingles(normalized: Sequence[str], *, ngram: int) -> tuple[U64, I64]:
    """Hashes of all word n-grams of all documents in order (S,), and how many each document has
    (D,).
    """
    encoded = [text[:MAX_CHARS].encode("utf-8", "surrogatepass") for text in normalized]
    raw = b" ".join([*encoded, b""])  # every document ends in a space
    starts, ends = ngrams.words(raw)
    num_words = np.diff(
        np.searchsorted(ends, np.cumsum([len(document) + 1 for document in encoded])), prepend=0
    )
    counts = np.maximum(num_words - ngram + 1, 0)
    if not counts.any():
        return np.empty(0, np.uint64), counts
    joined = ngrams.ngram_hashes(ngrams.word_hashes(raw, starts, ends), ngram)
    total = len(joined)
    limits = np.repeat(np.cumsum(num_words), num_words)[:total]
    return joined[
        np.arange(ngram, total + ngram) <= limits
    ], counts  # windows that cross into the next document go
