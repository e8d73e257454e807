"""Hashes of word n-grams, computed with NumPy and without a Python object per word.

Dedup (`stages.dedup.minhash`) and decontamination share this; `text.words` decides which words are
equal. The hash of an n-gram is computed word by word, so the hash of its first k words is an
intermediate result.

Arrays: W words.
"""

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

# Odd constant of the polynomial that joins word hashes to n-gram hashes (2^64 / golden ratio, as in
# splitmix64).
_JOIN = np.uint64(0x9E3779B97F4A7C15)
_SPACE = 32
_FMIX: dict[int, tuple[Any, list[tuple[int, int]], int]] = {
    32: (np.uint32, [(16, 0x85EBCA6B), (13, 0xC2B2AE35)], 16),
    64: (np.uint64, [(33, 0xFF51AFD7ED558CCD), (33, 0xC4CEB9FE1A85EC53)], 33),
}


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
