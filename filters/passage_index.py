"""The index of evaluation sets that documents are compared with: its file, searching it.

A passage is one text of an evaluation item: its question, its context or one of its answers, or
several of them together where all are short. The index, built by `pipeline.models.benchmark_index`,
contains the distinct 13-grams of every passage; a shorter passage is one n-gram of its own length.

Words are those of `text.words`. Numbers are among them: a worked problem with other numbers is not
the test item.

Fingerprints are 48 bits of a 64-bit hash. Any other n-gram is mistaken for one of N in the index
with probability N / 2^48, 1e-8 at N = 2.9 million, and only where its first words pass a bitmap too
(0.4 to 2 % do). Such an error can complete a passage only if that is a single n-gram: 54,000 of 46
sets are. Times 4 lengths (10 to 13 words) that is 54,000 / 2^48 x 4 x 1 % = 8e-12 per word: eight
wrong documents in 10^12 words.

Arrays: W words of a document, G n-grams and P passages of an index, M matches.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from filters.text import ngrams
from filters.text.ngrams import I64, U64
from filters.text.words import NORMALIZER, normalize

MAGIC, VERSION = b"gristmill bench\n", 1
PROBES: tuple[Literal[0, 1], ...] = (0, 1)


class Index(NamedTuple):
    """The content of an index file, mapped into memory: the workers of a machine share it.

    `high` ascends; an n-gram of several passages has a row for each. `ngrams` is the number of rows
    of each passage.
    """

    header: dict[str, Any]
    bitmap: npt.NDArray[np.uint8]  # hashes of the first words of n-grams, two bits each
    high: npt.NDArray[np.uint32]  # (G,) upper 32 bits of the fingerprint
    low: npt.NDArray[np.uint16]  # (G,) lower 16 bits
    passage: npt.NDArray[np.uint32]  # (G,)
    ngrams: npt.NDArray[np.uint32]  # (P,)
    file: npt.NDArray[np.uint32]  # (P,) position in header["files"]
    row: npt.NDArray[np.uint32]  # (P,) row of that file, from 1


# A file is MAGIC, a checksum (XXH3, 64 bits) of everything after it, the header's length (8 bytes),
# the header as JSON, and these arrays, each at a multiple of 8 bytes after the checksum.
# Little-endian.
ARRAYS = {
    **{"bitmap": "<u1", "high": "<u4", "low": "<u2", "passage": "<u4"},
    **{"ngrams": "<u4", "file": "<u4", "row": "<u4"},
}


class Matches(NamedTuple):
    """N-grams of passages in a document: first word, number of words, row in the index; (M,)."""

    words: I64
    lengths: I64
    entries: I64


_NO_MATCHES = Matches(*(np.empty(0, np.int64) for _ in range(3)))


def bitmap_bit(heads: U64, *, size: int, which: Literal[0, 1]) -> tuple[U64, npt.NDArray[np.uint8]]:
    """One of the two bits, as byte and mask, of a hash of first words in a bitmap.

    `size` is the number of bytes of the bitmap, a power of 2.
    """
    # bits from the upper and from the lower end of the hash
    shift = np.uint64(0 if which else 64 - (size.bit_length() + 2))
    bit = (heads >> shift) & np.uint64(8 * size - 1)
    return bit >> np.uint64(3), np.uint8(1) << (bit & np.uint64(7)).astype(np.uint8)


def fingerprints(hashes: U64) -> U64:
    """The 48 bits of n-gram hashes that an index stores."""
    return hashes >> np.uint64(32) << np.uint64(16) | hashes & np.uint64(0xFFFF)


@lru_cache(maxsize=2)
def load_index(path: str) -> Index:
    """An index from its file; ValueError unless it is complete and of this version."""
    how = "build one with `gristmill index-benchmarks FILES... -o INDEX`"
    if not path:
        raise ValueError(f"decontamination.index names no file; {how}")
    if not Path(path).is_file():
        raise ValueError(f"decontamination.index {path}: no such file; {how}")
    with open(path, "rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError(
                f"decontamination.index {path}: not an index of evaluation sets; {how}"
            )
    # a plain array, as each operation on a memmap costs a microsecond more
    raw = np.asarray(np.memmap(path, np.uint8, "r"))
    checksum, rest = raw[len(MAGIC) :][:8].tobytes(), raw[len(MAGIC) + 8 :]
    if checksum != xxhash.xxh3_64_digest(rest.data):
        raise ValueError(
            f"decontamination.index {path}: cut short or damaged, the checksum of its {len(raw):,} "
            "bytes is wrong; copy it again or build it again with `gristmill index-benchmarks`"
        )
    return _parse_index(path, rest)


def _parse_index(path: str, rest: npt.NDArray[np.uint8]) -> Index:
    end = 8 + int.from_bytes(rest[:8].tobytes(), "little")
    header = json.loads(rest[8:end].tobytes())
    made_with = {name: header.get(name) for name in ("version", "normalizer")}
    if made_with != {"version": VERSION, "normalizer": NORMALIZER}:
        raise ValueError(
            f"decontamination.index {path}: it has {made_with}, this filter reads version "
            f"{VERSION} and normalizer '{NORMALIZER}'; "
            "build it again with `gristmill index-benchmarks`"
        )
    arrays = []
    for name, dtype in ARRAYS.items():
        start = end + -end % 8
        end = start + header["lengths"][name] * np.dtype(dtype).itemsize
        arrays.append(rest[start:end].view(dtype))
    return Index(header, *arrays)


def find_matches(text: str, index: Index) -> Matches:
    """All n-grams of the index in a text.

    Most documents contain none: the hash of the first words of every n-gram is looked up in the
    bitmap, and only those found there are extended word by word to the index's lengths.
    """
    shortest, longest = index.header["min_words"], index.header["n"]
    raw = (normalize(text) + " ").encode("utf-8", "surrogatepass")
    starts, ends = ngrams.words(raw)
    if len(starts) < shortest:
        return _NO_MATCHES
    hashes = ngrams.word_hashes(raw, starts, ends)
    heads = ngrams.ngram_hashes(hashes, shortest)
    at = _may_begin(heads, index.bitmap)
    if not len(at):
        return _NO_MATCHES
    joined = heads[at]
    by_length = [(at, joined)]
    for length in range(shortest + 1, longest + 1):
        fits = at + length <= len(hashes)
        at = at[fits]
        joined = ngrams.extended(joined[fits], [hashes[at + (length - 1)]])
        by_length.append((at, joined))
    which, entries = _look_up(np.concatenate([joined for _, joined in by_length]), index)
    numbers = [len(at) for at, _ in by_length]
    lengths = np.repeat(np.arange(shortest, longest + 1), numbers)
    return Matches(np.concatenate([at for at, _ in by_length])[which], lengths[which], entries)


def _may_begin(heads: U64, bitmap: npt.NDArray[np.uint8]) -> I64:
    """Positions of the hashes of which both bits are set."""
    at = np.arange(len(heads))
    for which in PROBES:
        byte, mask = bitmap_bit(heads, size=len(bitmap), which=which)
        is_set = np.flatnonzero(bitmap[byte] & mask)
        at, heads = at[is_set], heads[is_set]
    return at


def _look_up(hashes: U64, index: Index) -> tuple[I64, I64]:
    """(position of a hash, row of the index) for each row that has one of the hashes."""
    keys = fingerprints(hashes)
    high, low = (keys >> np.uint64(16)).astype(np.uint32), keys.astype(np.uint16)
    which, entry = np.arange(len(keys)), np.searchsorted(index.high, high)
    positions, rows = [which[:0]], [entry[:0]]
    while len(which):
        # past the last row `take` repeats it, so the second condition ends the search there
        same = np.flatnonzero(
            (index.high.take(entry, mode="clip") == high[which]) & (entry < len(index.high))
        )
        which, entry = which[same], entry[same]
        equal = index.low[entry] == low[which]
        positions.append(which[equal])
        rows.append(entry[equal])
        entry = entry + 1
    return np.concatenate(positions), np.concatenate(rows)
