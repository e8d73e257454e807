"""Hashes of word n-grams, computed with NumPy and without a Python object per word.

Dedup (`stages.dedup.minhash`) and decontamination share this; each has its own table of characters
that decides which words are equal. The hash of an n-gram is computed word by word, so the hash of
its first k words is an intermediate result.

Arrays: W words.
"""

import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
U32 = npt.NDArray[np.uint32]

# Odd constant of the polynomial that joins word hashes to n-gram hashes (2^64 / golden ratio, as in
# splitmix64).
_JOIN = np.uint64(0x9E3779B97F4A7C15)
_SPACE, _MARK = 32, 0
_PIECE = 1024  # characters
# kana; ideographs: extension A, unified, compatibility, the supplementary planes
WITHOUT_SPACES = [
    (0x3040, 0x30FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
]
_FMIX: dict[int, tuple[Any, list[tuple[int, int]], int]] = {
    32: (np.uint32, [(16, 0x85EBCA6B), (13, 0xC2B2AE35)], 16),
    64: (np.uint64, [(33, 0xFF51AFD7ED558CCD), (33, 0xC4CEB9FE1A85EC53)], 33),
}


def normalize_words(text: str, table: U32) -> str:
    """Lower-case, decompose, replace every code point by `table` (see `replacements`).

    White space is collapsed. A character of Chinese or Japanese, which have no spaces between
    words, is a word.
    """
    canonical = decomposed(text.lower())
    points: U32 = table.take(code_points(canonical))
    if not canonical.isascii() or table[ord("'")] == _MARK:
        points = _spaced(points[points != _MARK])
    keep = points != _SPACE
    keep[1:] |= keep[:-1]  # the first space of each run stays
    kept: U32 = points[keep]
    return kept.astype("<u4", copy=False).tobytes().decode("utf-32-le").strip(" ")


def decomposed(text: str) -> str:
    """NFD piece by piece, as CPython takes quadratic time for a run of combining marks.

    (An hour for a page of nothing else.) Only marks in runs longer than any in real text (30, by
    Unicode's UAX 15) can end up in a different order.
    """
    parts, start = [], 0
    while start < len(text):
        end = start + _PIECE
        while end < min(len(text), start + 2 * _PIECE) and unicodedata.combining(text[end]):
            end += 1
        parts.append(unicodedata.normalize("NFD", text[start:end]))
        start = end
    return "".join(parts)


def code_points(text: str) -> U32:
    """The code points of a text, including lone surrogates."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


@lru_cache(maxsize=2)
def replacements(
    *, digits: Literal["kept", "zeroed"], inside_words: str = "", letters: str = ""
) -> U32:
    """What each code point of a decomposed text becomes, (0x110000,).

    Letters and the characters of `letters` stay; combining marks and the characters of
    `inside_words` are removed (0; "don't" becomes "dont"); decimal digits stay or become '0';
    everything else becomes a space.
    """
    points = np.arange(0x110000, dtype=np.uint32)
    characters = points.view("<U1")
    table = np.where(np.strings.isalnum(characters), points, np.uint32(_SPACE))
    if digits == "zeroed":
        table[np.strings.isdecimal(characters)] = ord("0")
    table[0x300:0x370] = _MARK
    table[[ord(c) for c in inside_words]] = _MARK
    kept = [ord(c) for c in letters]
    table[kept] = kept
    return table


def words(raw: bytes) -> tuple[I64, I64]:
    """Where the words of a normalized text begin and end, each (W,); the text ends in a space."""
    ends = np.flatnonzero(np.frombuffer(raw, np.uint8) == _SPACE)
    starts = np.append(0, ends + 1)[:-1]
    filled = ends > starts  # false in an empty document, or one that was cut after a space
    return starts[filled], ends[filled]


def word_hashes(raw: bytes, starts: I64, ends: I64) -> U64:
    """Hash of each word (W,): the sum of its zero-padded 8-byte blocks, mixed with their index.

    Words of up to 8 bytes never collide, longer ones like 64-bit random numbers. A dict of xxh64 by
    word took 4 times as long.
    """
    blocks = (ends - starts + 7) >> 3
    first = np.cumsum(blocks) - blocks
    place = np.arange(blocks.sum()) - np.repeat(first, blocks)
    at = np.repeat(starts, blocks) + 8 * place
    excess = np.maximum(at + 8 - np.repeat(ends, blocks), 0).astype(np.uint64)
    # the 8 bytes from every position on
    everywhere: U64 = np.ndarray(len(raw), "<u8", raw + bytes(7), strides=(1,))
    values = everywhere[at] & (np.uint64(2**64 - 1) >> (np.uint64(8) * excess))
    mixed = fmix(values ^ (place.astype(np.uint64) * _JOIN), bits=64)
    hashes: U64 = np.add.reduceat(mixed, first)
    return hashes


def ngram_hashes(hashes: U64, n: int) -> U64:
    """Hash of the n-gram that begins at each word, (W - n + 1,); W must be at least n."""
    total = len(hashes) - n + 1
    return extended(hashes[:total].copy(), (hashes[k : k + total] for k in range(1, n)))


def extended(joined: U64, following: Iterable[U64]) -> U64:
    """Extend n-gram hashes, in place, by the hashes of the following words: an array per word."""
    for word in following:
        joined *= _JOIN
        joined ^= joined >> np.uint64(29)
        joined += word
    return joined


def fmix(hashes: U64, *, bits: Literal[32, 64]) -> Any:
    """MurmurHash3's finalizer, on 64 bits or on the low 32."""
    dtype, rounds, last = _FMIX[bits]
    mixed = hashes.astype(dtype)
    for shift, multiplier in rounds:
        mixed ^= mixed >> dtype(shift)
        mixed *= dtype(multiplier)
    mixed ^= mixed >> dtype(last)
    return mixed


def word_places(text: str, table: U32) -> tuple[I64, I64]:
    """Where each word of the normalized text begins and ends in the text itself, each (W,).

    Slower than `normalize_words`.
    """
    distinct, which = np.unique(code_points(text), return_inverse=True)
    lengths = np.array(
        [len(unicodedata.normalize("NFD", chr(point).lower())) for point in distinct.tolist()],
        np.int64,
    )
    points = table.take(code_points(decomposed(text.lower())))
    kept = points != _MARK
    points, origin = points[kept], np.repeat(np.arange(len(text)), lengths[which])[kept]
    borders = _borders(points)
    filled = np.insert(points, borders, _SPACE) != _SPACE
    edges = np.flatnonzero(np.diff(filled, prepend=False, append=False))
    origin = np.insert(origin, borders, 0)
    return origin[edges[::2]], origin[edges[1::2] - 1] + 1


def _spaced(points: U32) -> U32:
    """The text with spaces around every character of a script without spaces."""
    borders = _borders(points)
    return np.insert(points, borders, _SPACE) if len(borders) else points


def _borders(points: U32) -> I64:
    """Positions before and after each character of scripts without spaces, each one once."""
    if not (points >= WITHOUT_SPACES[0][0]).any():
        return np.empty(0, np.int64)
    alone = np.zeros(len(points) + 1, bool)
    for first, last in WITHOUT_SPACES:
        alone[:-1] |= (points >= first) & (points <= last)
    alone[1:] |= alone[:-1]
    return np.flatnonzero(alone)
