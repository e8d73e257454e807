"""MinHash band keys of documents: word n-grams and affine permutations, in NumPy.

The permutations are datasketch 2's own. Fed the same shingle hashes, its MinHash gives the same
minima, which a property test checks. Banding: Broder 1997; Leskovec, Rajaraman and Ullman, Mining
of Massive Datasets, 3.4; FineWeb's 14 bands of 8 rows, arXiv:2406.17557.

A document's keys do not depend on its batch. A batch is processed in groups of documents with about
300,000 characters, so the memory beside texts and results stays under 50 MB.

Arrays: W words, S shingles (duplicates kept: they do not change a minimum), D documents, P
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
from filters.text.words import NORMALIZER

Scheme = Literal["affine32", "affine64"]
Uint = npt.NDArray[Any]  # uint32 or uint64, by the scheme

MAX_CHARS = 500_000

# 300,000 characters are about 50,000 English shingles: a row of them stays in the L2 cache, and the
# overhead of a NumPy call is spread over about 100 documents. Documents are not cut, so a group may
# exceed this by MAX_CHARS.
_GROUP_CHARS = 300_000


class Signature(NamedTuple):
    """How band keys are made: bands x rows permutations, drawn by `seed`, over word n-grams."""

    num_bands: int
    rows_per_band: int
    ngram: int
    scheme: Scheme
    seed: int


class Signatures(NamedTuple):
    """Documents that are long enough, by index in the batch (D,), and their minima (P, D)."""

    documents: I64
    minima: Uint


def describe(signature: Signature) -> str:
    """How keys are made, in words. Stored with them: other keys must not be compared with them."""
    permutations = f"{signature.scheme} seed {signature.seed}"
    bands = f"{signature.num_bands} bands of {signature.rows_per_band}"
    return f"{NORMALIZER}, {signature.ngram}-grams, {permutations}, {bands}"


def content_hash(text: str, normalized: str) -> bytes:
    """128-bit hash of the normalized text: case, accents and punctuation make no difference.

    A text without words is hashed unchanged: "***" and "!!!" are not copies.
    """
    return xxhash.xxh3_128_digest((normalized or text).encode("utf-8", "surrogatepass"))


def shingle_hashes(normalized: str, *, ngram: int) -> U64:
    """64-bit hashes of the distinct word n-grams, ascending; empty for fewer than `ngram` words."""
    distinct: U64 = np.unique(_shingles([normalized], ngram=ngram)[0])
    return distinct


def band_keys(normalized: Sequence[str], signature: Signature) -> list[bytes]:
    """Band keys of each document, 8 bytes each, little-endian; b"" below `ngram` words."""
    keys = [b""] * len(normalized)
    documents, columns = signatures(normalized, signature)
    rows = columns.reshape(signature.num_bands, signature.rows_per_band, len(documents))
    mixed = np.zeros((signature.num_bands, len(documents)), np.uint64)
    for row in range(signature.rows_per_band):
        mixed = ngrams.fmix(mixed ^ rows[:, row], bits=64)
    packed, size = mixed.T.astype("<u8").tobytes(), 8 * signature.num_bands
    for i, document in enumerate(documents.tolist()):
        keys[document] = packed[i * size : (i + 1) * size]
    return keys


def signatures(normalized: Sequence[str], signature: Signature) -> Signatures:
    """MinHashes of the documents that have at least `ngram` words."""
    num_perm = signature.num_bands * signature.rows_per_band
    documents, columns = [np.empty(0, np.int64)], [np.empty((num_perm, 0), np.uint32)]
    for start, stop in _groups(normalized):
        shingles, counts = _shingles(normalized[start:stop], ngram=signature.ngram)
        long_enough = np.flatnonzero(counts)
        if len(long_enough):
            documents.append(long_enough + start)
            columns.append(minima(shingles, counts[long_enough], signature))
    return Signatures(np.concatenate(documents), np.concatenate(columns, axis=1))


def minima(shingles: U64, counts: I64, signature: Signature) -> Uint:
    """MinHashes (P, D) of documents with `counts` (D,) shingle hashes each, none of them empty."""
    a, b = permutations(signature)
    # as in datasketch; affine32 keeps the low 32 bits
    mixed = ngrams.fmix(shingles, bits=32 if signature.scheme == "affine32" else 64)
    starts = np.cumsum(counts) - counts
    permuted, least = np.empty_like(mixed), np.empty((len(a), len(counts)), mixed.dtype)
    # one permutation at a time over all documents: long rows keep NumPy's SIMD loops busy
    for k in range(len(a)):
        np.multiply(mixed, a[k], out=permuted)
        np.add(permuted, b[k], out=permuted)
        np.minimum.reduceat(permuted, starts, out=least[k])
    return least


@lru_cache(maxsize=8)
def permutations(signature: Signature) -> tuple[Uint, Uint]:
    """Parameters (a, b), each (P,), of permutations h -> a*h + b modulo 2^32 or 2^64."""
    from datasketch import MinHash  # imports scipy, which takes a second

    num_perm = signature.num_bands * signature.rows_per_band
    a, b = MinHash(num_perm, seed=signature.seed, scheme=signature.scheme).permutations
    return a, b


def _groups(normalized: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Ranges of consecutive documents that hold about _GROUP_CHARS characters each."""
    chars = np.cumsum([min(len(text), MAX_CHARS) for text in normalized])
    group = chars // _GROUP_CHARS
    borders = np.flatnonzero(np.diff(group)) + 1
    yield from pairwise([0, *borders.tolist(), len(normalized)])


def _shingles(normalized: Sequence[str], *, ngram: int) -> tuple[U64, I64]:
    """Hashes of all word n-grams in order of documents (S,), and their number per document (D,)."""
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
    # windows that cross into the next document do not count
    return joined[np.arange(ngram, total + ngram) <= limits], counts
