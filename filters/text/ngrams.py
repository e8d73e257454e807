"""Hashes of word n-grams: a text normalised, cut into words and hashed with NumPy, without a Python
object per word.

Dedup (`stages.minhash`) and decontamination share it; what counts as the same word differs, and is
a table for each. The hash of an n-gram grows by a word at a time, so that of its first k words is
met on the way to it.

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
    """Lower-case, NFD, every code point exchanged by `table` (`replacements`), white space
    collapsed.

    A character of Chinese or Japanese, which put no spaces between words, is a word.
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
    """NFD piece by piece: CPython sorts a run of combining marks in quadratic time, an hour for a
    page of nothing else.

    Only marks in runs longer than any in writing (Unicode's UAX 15 says 30) can end up in another
    order.
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
    """The code points of a text, lone surrogates among them."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


@lru_cache(maxsize=2)
def replacements(
    *, digits: Literal["kept", "zeroed"], inside_words: str = "", letters: str = ""
) -> U32:
    """What each code point of a decomposed text becomes, (0x110000,).

    A letter stays, a combining mark goes (0), a decimal digit stays or becomes 0 by `digits`, the
    characters of `inside_words` go too ("don't" is "dont"), those of `letters` stay, and everything
    else is a space.
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
    """Places where the words of a normalised text begin and end, each (W,); the text ends in a
    space.
    """
    ends = np.flatnonzero(np.frombuffer(raw, np.uint8) == _SPACE)
    starts = np.append(0, ends + 1)[:-1]
    filled = ends > starts  # not so in an empty document, or one that was cut behind a space
    return starts[filled], ends[filled]


def word_hashes(raw: bytes, starts: I64, ends: I64) -> U64:
    """Hash of each word (W,): the sum of its blocks of 8 bytes, the last one filled up with zeros,
    mixed with their places.

    Words of up to 8 bytes never collide, longer ones as 64-bit random numbers do. A dict of xxh64
    by word took 4 times as long.
    """
    blocks = (ends - starts + 7) >> 3
    first = np.cumsum(blocks) - blocks
    place = np.arange(blocks.sum()) - np.repeat(first, blocks)
    at = np.repeat(starts, blocks) + 8 * place
    excess = np.maximum(at + 8 - np.repeat(ends, blocks), 0).astype(np.uint64)
    everywhere: U64 = np.ndarray(
        len(raw), "<u8", raw + bytes(7), strides=(1,)
    )  # the 8 bytes from every place on
    values = everywhere[at] & (np.uint64(2**64 - 1) >> (np.uint64(8) * excess))
    mixed = fmix(values ^ (place.astype(np.uint64) * _JOIN), bits=64)
    hashes: U64 = np.add.reduceat(mixed, first)
    return hashes


def ngram_hashes(hashes: U64, n: int) -> U64:
    """Hash of the n-gram that begins at each word, (W - n + 1,); W must be at least n."""
    total = len(hashes) - n + 1
    return extended(hashes[:total].copy(), (hashes[k : k + total] for k in range(1, n)))


def extended(joined: U64, following: Iterable[U64]) -> U64:
    """Hashes of n-grams, made longer in place by the word hashes that follow, one array for each
    further word.
    """
    for word in following:
        joined *= _JOIN
        joined ^= joined >> np.uint64(29)
        joined += word
    return joined


def fmix(hashes: U64, *, bits: Literal[32, 64]) -> Any:
    """MurmurHash3's finaliser, on 64 bits or on the low 32."""
    dtype, rounds, last = _FMIX[bits]
    mixed = hashes.astype(dtype)
    for shift, multiplier in rounds:
        mixed ^= mixed >> dtype(shift)
        mixed *= dtype(multiplier)
    mixed ^= mixed >> dtype(last)
    return mixed


def word_places(text: str, table: U32) -> tuple[I64, I64]:
    """Where each word of `normalize(text, table)` begins and ends in the text itself, each (W,);
    slower than normalising.
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
    """The text with a space before and after every character of a script that has none."""
    borders = _borders(points)
    return np.insert(points, borders, _SPACE) if len(borders) else points


def _borders(points: U32) -> I64:
    """Places before and behind characters of scripts without spaces; a place between two of them
    once.
    """
    if not (points >= WITHOUT_SPACES[0][0]).any():
        return np.empty(0, np.int64)
    alone = np.zeros(len(points) + 1, bool)
    for first, last in WITHOUT_SPACES:
        alone[:-1] |= (points >= first) & (points <= last)
    alone[1:] |= alone[:-1]
    return np.flatnonzero(alone)
