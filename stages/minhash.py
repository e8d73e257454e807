"""MinHash band keys of documents: word n-grams, affine permutations, a batch of documents at a time, in NumPy only.

The permutations are datasketch 2's, bit for bit (`MinHash(num_perm, seed, scheme="affine32")` fed the same shingle hashes
gives the same minima; kept by a property test). Source of the banding: Broder 1997; Leskovec, Rajaraman and Ullman, Mining
of Massive Datasets, 3.4; FineWeb's 14 bands of 8 rows, arXiv:2406.17557.

A document's keys do not depend on the batch it comes in. The batch is worked off in groups of documents of some 300,000
characters, so that the memory needed beside texts and results stays under 50 MB whatever the batch holds.

Arrays: W words, S shingles (duplicates kept: a minimum does not mind them), D documents, P permutations.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

Scheme = Literal["affine32", "affine64"]
U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
Uint = npt.NDArray[Any]  # uint32 or uint64, by the scheme

# Stored with the keys: keys made by different normalisers or shingle hashes must never be compared.
NORMALIZER = "nfd-words-2"
MAX_CHARS = 500_000

# 300,000 characters are about 50,000 English shingles: a row of them stays in the second-level cache, and the overhead of
# a NumPy call is spread over about 100 documents. Documents are not cut: a group may exceed this by one of MAX_CHARS.
_GROUP_CHARS = 300_000
# Odd constant of the polynomial that joins word hashes to shingle hashes (2^64 / golden ratio, as in splitmix64).
_JOIN = np.uint64(0x9E3779B97F4A7C15)
_SPACE, _MARK = 32, 0
# kana; ideographs: extension A, unified, compatibility, the supplementary planes
_WITHOUT_SPACES = [(0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF)]
_FMIX: dict[str, tuple[Any, list[tuple[int, int]], int]] = {
    "affine32": (np.uint32, [(16, 0x85EBCA6B), (13, 0xC2B2AE35)], 16),
    "affine64": (np.uint64, [(33, 0xFF51AFD7ED558CCD), (33, 0xC4CEB9FE1A85EC53)], 33),
}


class Signature(NamedTuple):
    """How band keys are made: bands x rows permutations, drawn by `seed`, over word n-grams."""

    num_bands: int
    rows_per_band: int
    ngram: int
    scheme: Scheme
    seed: int


class Signatures(NamedTuple):
    """MinHashes of the documents that are long enough: their places in the batch (D,), ascending, and minima (P, D)."""

    documents: I64
    minima: Uint


def describe(scheme: Signature) -> str:
    """How keys are made, in words: stored beside them, since keys made in different ways must never be compared."""
    permutations = f"{scheme.scheme} seed {scheme.seed}"
    return f"{NORMALIZER}, {scheme.ngram}-grams, {permutations}, {scheme.num_bands} bands of {scheme.rows_per_band}"


def normalize(text: str) -> str:
    """Lower-case, digits to 0, punctuation to space, white space collapsed, NFD without combining marks.

    A character of Chinese or Japanese, which put no spaces between words, is a word.
    """
    decomposed = unicodedata.normalize("NFD", text.lower())
    points: npt.NDArray[np.uint32] = _replacements().take(np.frombuffer(decomposed.encode("utf-32-le", "surrogatepass"), "<u4"))
    if not decomposed.isascii():
        points = _spaced(points[points != _MARK])
    keep = points != _SPACE
    keep[1:] |= keep[:-1]  # the first space of each run stays
    kept: npt.NDArray[np.uint32] = points[keep]
    return kept.astype("<u4", copy=False).tobytes().decode("utf-32-le").strip(" ")


def content_hash(text: str, normalized: str) -> bytes:
    """128-bit hash of the normalised text: equal for copies that differ in case, digits' values or punctuation only.

    A text without words is hashed as it stands: "***" and "!!!" are not copies of one another.
    """
    return xxhash.xxh3_128_digest((normalized or text).encode("utf-8", "surrogatepass"))


def shingle_hashes(normalized: str, *, ngram: int) -> U64:
    """64-bit hashes of the distinct word n-grams, ascending; empty when there are fewer than `ngram` words."""
    distinct: U64 = np.unique(_shingles([normalized], ngram=ngram)[0])
    return distinct


def band_keys(normalized: Sequence[str], scheme: Signature) -> list[bytes]:
    """Per document its band keys, 8 bytes each, little-endian; b"" for a text too short to shingle (exact hash only)."""
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
    documents, columns = [np.empty(0, np.int64)], [np.empty((num_perm, 0), _FMIX[scheme.scheme][0])]
    for start, stop in _groups(normalized):
        shingles, counts = _shingles(normalized[start:stop], ngram=scheme.ngram)
        found = np.flatnonzero(counts)
        if len(found):
            documents.append(found + start)
            columns.append(minima(shingles, counts[found], num_perm=num_perm, seed=scheme.seed, scheme=scheme.scheme))
    return Signatures(np.concatenate(documents), np.concatenate(columns, axis=1))


def minima(shingles: U64, counts: I64, *, num_perm: int, seed: int, scheme: Scheme) -> Uint:
    """MinHashes (P, D) of documents that own `counts` (D,) shingle hashes each, one document after the other, none empty."""
    a, b = permutations(num_perm, seed=seed, scheme=scheme)
    mixed = premix(shingles, scheme=scheme)
    starts = np.cumsum(counts) - counts
    permuted, least = np.empty_like(mixed), np.empty((num_perm, len(counts)), mixed.dtype)
    # one permutation at a time over all documents: long rows keep NumPy's SIMD loops busy and its call overhead small
    for k in range(num_perm):
        np.multiply(mixed, a[k], out=permuted)
        np.add(permuted, b[k], out=permuted)
        np.minimum.reduceat(permuted, starts, out=least[k])
    return least


@lru_cache(maxsize=8)
def permutations(num_perm: int, *, seed: int, scheme: Scheme) -> tuple[Uint, Uint]:
    """Parameters (a, b) of datasketch 2's affine permutations h -> a*h + b modulo 2^32 or 2^64, each of shape (P,)."""
    dtype, width = (np.uint32, 32) if scheme == "affine32" else (np.uint64, 64)
    draw = np.random.RandomState(seed)
    a = draw.randint(0, 1 << (width - 1), num_perm, dtype=dtype) * dtype(2) + dtype(1)
    return a, draw.randint(0, 1 << width, num_perm, dtype=dtype)


def premix(hashes: U64, *, scheme: Scheme) -> Uint:
    """MurmurHash3's finaliser, which datasketch applies once before the permutations; affine32 keeps the low 32 bits."""
    dtype, rounds, last = _FMIX[scheme]
    mixed = hashes.astype(dtype)
    for shift, multiplier in rounds:
        mixed ^= mixed >> dtype(shift)
        mixed *= dtype(multiplier)
    mixed ^= mixed >> dtype(last)
    return mixed


def _spaced(points: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """The text with a space before and after every character of a script that has none."""
    if not (points >= _WITHOUT_SPACES[0][0]).any():
        return points
    alone = np.zeros(len(points) + 1, bool)
    for first, last in _WITHOUT_SPACES:
        alone[:-1] |= (points >= first) & (points <= last)
    alone[1:] |= alone[:-1]
    return np.insert(points, np.flatnonzero(alone), _SPACE)


@lru_cache(maxsize=1)
def _replacements() -> npt.NDArray[np.uint32]:
    """What each code point of a decomposed text becomes, (0x110000,): itself, 0 for a digit, space, or _MARK to drop it."""
    points = np.arange(0x110000, dtype=np.uint32)
    characters = points.view("<U1")
    table = np.where(np.strings.isalnum(characters), points, np.uint32(_SPACE))
    table[np.strings.isdecimal(characters)] = ord("0")
    table[0x300:0x370] = _MARK
    return table


def _groups(normalized: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Ranges of consecutive documents that hold about _GROUP_CHARS characters each."""
    chars = np.cumsum([min(len(text), MAX_CHARS) for text in normalized])
    group = chars // _GROUP_CHARS
    borders = np.flatnonzero(np.diff(group)) + 1
    yield from pairwise([0, *borders.tolist(), len(normalized)])


def _shingles(normalized: Sequence[str], *, ngram: int) -> tuple[U64, I64]:
    """Hashes of all word n-grams of all documents in order (S,), and how many each document has (D,)."""
    encoded = [text[:MAX_CHARS].encode("utf-8", "surrogatepass") for text in normalized]
    raw = b" ".join([*encoded, b""])  # every document ends in a space
    starts, ends = _words(raw)
    num_words = np.diff(np.searchsorted(ends, np.cumsum([len(document) + 1 for document in encoded])), prepend=0)
    counts = np.maximum(num_words - ngram + 1, 0)
    if not counts.any():
        return np.empty(0, np.uint64), counts
    words = _word_hashes(raw, starts, ends)
    total = len(words) - ngram + 1
    joined = words[:total].copy()
    for k in range(1, ngram):
        joined *= _JOIN
        joined ^= joined >> np.uint64(29)
        joined += words[k : k + total]
    limits = np.repeat(np.cumsum(num_words), num_words)[:total]
    return joined[np.arange(ngram, total + ngram) <= limits], counts  # windows that cross into the next document go


def _words(raw: bytes) -> tuple[I64, I64]:
    """Places where the words of a text begin and end, each (W,); the text ends in a space."""
    ends = np.flatnonzero(np.frombuffer(raw, np.uint8) == _SPACE)
    starts = np.append(0, ends + 1)[:-1]
    filled = ends > starts  # not so in an empty document, or one that the cap cut behind a space
    return starts[filled], ends[filled]


def _word_hashes(raw: bytes, starts: I64, ends: I64) -> U64:
    """Hash of each word (W,): the sum of its blocks of 8 bytes, the last one filled up with zeros, mixed with their places.

    Words of up to 8 bytes never collide, longer ones as 64-bit random numbers do. A dict of xxh64 by word took 4 times as long.
    """
    blocks = (ends - starts + 7) >> 3
    first = np.cumsum(blocks) - blocks
    place = np.arange(blocks.sum()) - np.repeat(first, blocks)
    at = np.repeat(starts, blocks) + 8 * place
    excess = np.maximum(at + 8 - np.repeat(ends, blocks), 0).astype(np.uint64)
    everywhere: U64 = np.ndarray(len(raw), "<u8", raw + bytes(7), strides=(1,))  # the 8 bytes from every place on
    values = everywhere[at] & (np.uint64(2**64 - 1) >> (np.uint64(8) * excess))
    mixed = premix(values ^ (place.astype(np.uint64) * _JOIN), scheme="affine64")
    hashes: U64 = np.add.reduceat(mixed, first)
    return hashes
