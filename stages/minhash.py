"""MinHash band keys of documents: word 5-grams, affine permutations, computed in batches of NumPy.

The permutations are datasketch 2's, bit for bit (`MinHash(num_perm, seed, scheme="affine64")` fed the same 64-bit shingle
hashes gives the same signature; kept by a property test). Source of the banding: Broder 1997; Leskovec, Rajaraman and
Ullman, Mining of Massive Datasets, 3.4; FineWeb's 14 bands of 8 rows, arXiv:2406.17557.
"""

import re
import unicodedata
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

Scheme = Literal["affine32", "affine64"]
U64 = npt.NDArray[np.uint64]

# Stored with the keys: keys made by different normalisers must never be compared.
NORMALIZER = "nfd-words-1"
MAX_CHARS = 500_000

_NOT_WORD = re.compile(r"[\W_]+")
_DIGIT = re.compile(r"\d")
_MARK = re.compile("[\u0300-\u036f]")
# Odd constant of the polynomial that joins word hashes to shingle hashes (2^64 / golden ratio, as in splitmix64).
_JOIN = np.uint64(0x9E3779B97F4A7C15)
_FMIX: dict[str, list[tuple[Any, int, int]]] = {
    "affine32": [(np.uint32, 16, 0x85EBCA6B), (np.uint32, 13, 0xC2B2AE35), (np.uint32, 16, 1)],
    "affine64": [(np.uint64, 33, 0xFF51AFD7ED558CCD), (np.uint64, 33, 0xC4CEB9FE1A85EC53), (np.uint64, 33, 1)],
}
_CHUNK = 256  # shingles a time: 112 permutations x 256 x 8 bytes stay in the second-level cache


class Signature(NamedTuple):
    """How band keys are made: bands x rows permutations, drawn by `seed`, over word n-grams."""

    num_bands: int
    rows_per_band: int
    ngram: int
    scheme: Scheme
    seed: int


def normalize(text: str) -> str:
    """Lower-case, digits to 0, punctuation to space, white space collapsed, NFD without combining marks."""
    text = text.lower()
    if not text.isascii():
        text = _MARK.sub("", unicodedata.normalize("NFD", text))
    return _NOT_WORD.sub(" ", _DIGIT.sub("0", text)).strip()


def content_hash(normalized: str) -> bytes:
    """128-bit hash of the normalised text: equal for copies that differ in case, digits' values or punctuation only."""
    return xxhash.xxh3_128_digest(normalized.encode("utf-8", "surrogatepass"))


def shingle_hashes(normalized: str, *, ngram: int) -> U64:
    """64-bit hashes of the distinct word n-grams, ascending; empty when there are fewer than `ngram` words."""
    words = normalized[:MAX_CHARS].split()
    if len(words) < ngram:
        return np.empty(0, np.uint64)
    vocabulary: dict[str, int] = {}
    ids = np.fromiter((vocabulary.setdefault(w, len(vocabulary)) for w in words), np.int64, len(words))
    hashes = np.fromiter(
        (xxhash.xxh64_intdigest(w.encode("utf-8", "surrogatepass")) for w in vocabulary), np.uint64, len(vocabulary)
    )[ids]
    count = len(words) - ngram + 1
    joined = hashes[:count].copy()
    for k in range(1, ngram):
        joined *= _JOIN
        joined ^= joined >> np.uint64(29)
        joined += hashes[k : k + count]
    distinct: U64 = np.unique(joined)
    return distinct


@lru_cache(maxsize=8)
def permutations(num_perm: int, *, seed: int, scheme: Scheme) -> tuple[npt.NDArray, npt.NDArray]:
    """Parameters (a, b) of datasketch 2's affine permutations h -> a*h + b modulo 2^32 or 2^64, each of shape (num_perm,)."""
    dtype, width = (np.uint32, 32) if scheme == "affine32" else (np.uint64, 64)
    draw = np.random.RandomState(seed)
    a = draw.randint(0, 1 << (width - 1), num_perm, dtype=dtype) * dtype(2) + dtype(1)
    return a, draw.randint(0, 1 << width, num_perm, dtype=dtype)


def premix(hashes: U64, *, scheme: Scheme) -> npt.NDArray:
    """MurmurHash3's finaliser, which datasketch applies once before the permutations; affine32 keeps the low 32 bits."""
    mixed = hashes.astype(np.uint32 if scheme == "affine32" else np.uint64)
    for dtype, shift, multiplier in _FMIX[scheme]:
        mixed = (mixed ^ (mixed >> dtype(shift))) * dtype(multiplier)
    return mixed


def signature(shingles: U64, *, num_perm: int, seed: int, scheme: Scheme) -> npt.NDArray:
    """MinHash of a non-empty set of shingle hashes, shape (num_perm,)."""
    a, b = permutations(num_perm, seed=seed, scheme=scheme)
    mixed = premix(shingles, scheme=scheme)
    minima = np.full(num_perm, np.iinfo(mixed.dtype).max, mixed.dtype)
    for start in range(0, len(mixed), _CHUNK):
        permuted = a[:, None] * mixed[None, start : start + _CHUNK]
        permuted += b[:, None]
        np.minimum(minima, permuted.min(axis=1), out=minima)
    return minima


def band_keys(normalized: str, scheme: Signature) -> bytes:
    """The document's band keys, 8 bytes each, little-endian; b"" for a text too short to shingle (exact hash only)."""
    shingles = shingle_hashes(normalized, ngram=scheme.ngram)
    if not len(shingles):
        return b""
    num_perm = scheme.num_bands * scheme.rows_per_band
    minima = signature(shingles, num_perm=num_perm, seed=scheme.seed, scheme=scheme.scheme)
    bands = minima.reshape(scheme.num_bands, scheme.rows_per_band)
    return b"".join(xxhash.xxh64_digest(row.tobytes())[::-1] for row in bands)
