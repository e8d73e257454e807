"""Decontamination: documents that quote the evaluation sets a model will be judged by, found by
their word n-grams.

A passage is one text of an evaluation item: its question, its context, one of its answers, or,
where all of them are short, some together. The index, which `pipeline.benchmark_index` builds,
holds the distinct 13-grams of every passage (a shorter passage is one n-gram of its own length).
The coverage of a passage is the share of its n-grams that the document holds, in [0, 1].

A word is what is left between white space and punctuation of a text in lower case and without
accents; apostrophes go ("don't" is "dont"), and so do the vowel points of Arabic and Hebrew, which
most texts leave out; vowel signs of India's scripts are part of their words. A character of Chinese
or Japanese is a word; Thai, Lao, Khmer and Burmese, which have no spaces either, are parted at
their signs above and below, into pieces of a word or half a word. Numbers stay as they are, other
than for dedup: items of one template ("Tom has 3 apples, ...") differ in nothing else, and a worked
problem with other numbers is not the test item.

What others do: GPT-3 (Brown et al. 2020, arXiv:2005.14165, appendix C) takes any one common 13-gram
for a collision, cuts 200 characters to each side of it, and drops a document cut into more than ten
pieces; n-grams found in more than ten documents of the training set are ignored. NeMo Curator's
TaskDecontamination does the same, with n-grams of 8 to 13 words. Coverage asks for a larger part of
an item, so that the idiom or verse that an item quotes does not condemn the page, and needs no pass
over the corpus: n-grams common to many items of a set, and those of background text, are left out
when the index is built.

Fingerprints are 48 bits of a 64-bit hash. Any other n-gram is taken for one of N in the index with
probability N / 2^48, 1e-8 at N = 2.9 million, and that only where its first words pass a bitmap too
(0.4 to 2 % do). Such a match makes up a passage only if this is a single n-gram: 54,000 of 46 sets
are. Times 4 lengths (10 to 13 words) that is 54,000 / 2^48 x 4 x 1 % = 8e-12 per word: eight wrong
documents in 10^12 words.

Arrays: W words of a document, G n-grams and P passages of an index, M matches.
"""

import json
import math
import re
import unicodedata
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash
from pydantic.dataclasses import dataclass

from filters import STRICT, Bound, File, Measured
from filters.text import ngrams
from filters.text.ngrams import I64, U64
from filters.text.view import SENTENCE_TERMINAL, TextView

MAGIC, VERSION = b"gristmill bench\n", 1
# Stored in the index. Any change to what `normalize` returns needs a new number.
NORMALIZER = "nfd-words-numbers-2"
PROBES: tuple[Literal[0, 1], ...] = (0, 1)
# Characters around a match that may go with it (GPT-3's window), and that may part two matches of
# one cut.
_REACH = 200
# marks that stand inside words: apostrophes, soft hyphen, Arabic's stretching line, zero-width
# characters
_INSIDE_WORDS = "'’‘\u00ad\u0640\u200b\u200c\u200d\u2060\ufeff"
# blocks whose combining marks are vowels: Thaana, Devanagari to Sinhala, Tibetan, Balinese to
# Lepcha, Syloti Nagri to Meetei Mayek, Brahmi and its kin
_VOWELS = re.compile(
    "[\u0780-\u07bf\u0900-\u0dff\u0f00-\u0fff\u1b00-\u1c4f\ua800-\uabff\U00011000-\U00011fff]"
)
# those that part words: Thai and Lao, Burmese, Khmer, Burmese's extensions
_PARTED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\ua9e0-\ua9ff\uaa60-\uaa7f]")
_BREAK = re.compile(rf"\n|[。！？｡]|[{SENTENCE_TERMINAL}][\"'”’»)\]]*(?=\s|$)")


class Index(NamedTuple):
    """An index as it lies in its file, mapped into memory: workers of one machine share it.

    `high` ascends; an n-gram that several passages hold has a row for each. `ngrams` counts the
    rows of a passage.
    """

    header: dict[str, Any]
    bitmap: npt.NDArray[np.uint8]  # which first words begin an n-gram, two bits each: `probe`
    high: npt.NDArray[np.uint32]  # (G,) upper 32 bits of the fingerprint
    low: npt.NDArray[np.uint16]  # (G,) lower 16 bits
    passage: npt.NDArray[np.uint32]  # (G,)
    ngrams: npt.NDArray[np.uint32]  # (P,)
    file: npt.NDArray[np.uint32]  # (P,) place in header["files"]
    row: npt.NDArray[np.uint32]  # (P,) row of that file, from 1


# A file is MAGIC, a checksum (XXH3, 64 bits) of all behind it, the header's length (8 bytes) and
# JSON, and these arrays, each at a multiple of 8 bytes behind the checksum. Little-endian.
ARRAYS = {
    "bitmap": "<u1",
    "high": "<u4",
    "low": "<u2",
    "passage": "<u4",
    "ngrams": "<u4",
    "file": "<u4",
    "row": "<u4",
}


class Matches(NamedTuple):
    """Where n-grams of passages stand in a document: first word, number of words and row of the
    index, each (M,).
    """

    words: I64
    lengths: I64
    entries: I64


class Coverage(NamedTuple):
    """Passages of which a document holds an n-gram, ascending, and the share of their n-grams that
    it holds.
    """

    passages: I64
    shares: npt.NDArray[np.float64]


@dataclass(frozen=True, config=STRICT)
class Decontamination:
    """Drop documents that hold items of evaluation sets, or cut the items out.

    `index` is a file made by `gristmill index-benchmarks`. `coverage` is the largest coverage of
    any one passage: above its upper end the document is contaminated. With `action = "trim"` the
    passages above it are cut, in whole sentences where these end within 200 characters, and
    `coverage` is of what remains; `cut_share` is the share of the document's characters that went,
    in [0, 1]: what is mostly test items is not worth keeping. The notes tell of the passage matched
    best, before any cut: `evidence` its file and row, and the characters that match, None where
    nothing does; `benchmark` its evaluation set, of documents that are dropped or cut for it.
    """

    index: File = ""
    # a 13-gram survives one changed word in ten with probability 0.9^13 = 0.25; of 492 clean web
    # pages none has any coverage, of 10,033 Wikipedia leads 13 exceed 0.2, all of them paragraphs
    # that BoolQ quotes (benchmarks/decontamination.py)
    coverage: Bound = (0.0, 0.2)
    cut_share: Bound = (0.0, 0.5)
    action: Literal["drop", "trim"] = "drop"

    notes: ClassVar[tuple[str, ...]] = ("benchmark", "evidence")
    tallied: ClassVar[tuple[str, ...]] = ("benchmark",)

    def check(self, languages: tuple[str, ...]) -> None:
        load(self.index)
        if self.action == "trim" and self.coverage is None:
            raise ValueError(
                "decontamination.coverage is off, so action = 'trim' has no share above which to cut; set a bound"
            )

    @property
    def edits_by(self) -> tuple[str, ...]:
        return ("coverage",) if self.action == "trim" else ()

    def measure(self, view: Any) -> Measured:
        return self.edit(view)[1]

    def edit(self, view: Any) -> tuple[Any, Measured]:
        index = load(self.index)
        matches = find(view.text, index)
        if not len(matches.entries):
            return view, {"coverage": 0.0, "cut_share": 0.0, "benchmark": None, "evidence": None}
        benchmark, evidence = _evidence(view.text, matches, index)
        text = view.text
        # what a cut brings together may match anew; every round cuts something
        while self.action == "trim" and (spans := _spans(text, matches, index, above=self._limit)):
            text = without(text, spans)
            matches = find(text, index)
        left = float(coverage(matches, index).shares.max(initial=0.0))
        cut_share = 1 - len(text) / len(view.text)
        edited = view if text == view.text else TextView(text, view.language)
        found = benchmark if edited is not view or left > self._limit else None
        return edited, {
            "coverage": left,
            "cut_share": cut_share,
            "benchmark": found,
            "evidence": evidence,
        }

    @property
    def _limit(self) -> float:
        return math.inf if self.coverage is None else self.coverage[1]


def normalize(text: str) -> str:
    """Lower case, no accents, vowel points or apostrophes, punctuation to space, white space
    collapsed; numbers as they are.
    """
    return ngrams.normalize(text, _table())


def find(text: str, index: Index) -> Matches:
    """All n-grams of the index in a text.

    Most documents hold none, so the first words of every n-gram are looked up in the bitmap, and
    few get any further.
    """
    shortest, longest = index.header["min_words"], index.header["n"]
    raw = (normalize(text) + " ").encode("utf-8", "surrogatepass")
    starts, ends = ngrams.words(raw)
    if len(starts) < shortest:
        return _NO_MATCHES
    hashes = ngrams.word_hashes(raw, starts, ends)
    joined = ngrams.ngram_hashes(hashes, shortest)
    at = _may_begin(joined, index.bitmap)
    if not len(at):
        return _NO_MATCHES
    joined = joined[at]
    grown = [(at, joined)]  # by length
    for length in range(shortest + 1, longest + 1):
        if at[-1] + length > len(hashes):
            fits = at + length <= len(hashes)
            at, joined = at[fits], joined[fits]
            if not len(at):
                break
        joined = ngrams.extended(joined.copy(), [hashes[at + (length - 1)]])
        grown.append((at, joined))
    which, entries = _entries(np.concatenate([joined for _, joined in grown]), index)
    lengths = np.repeat(np.arange(shortest, shortest + len(grown)), [len(at) for at, _ in grown])
    return Matches(np.concatenate([at for at, _ in grown])[which], lengths[which], entries)


def coverage(matches: Matches, index: Index) -> Coverage:
    """An n-gram that a document repeats counts once."""
    passages, held = np.unique(index.passage[np.unique(matches.entries)], return_counts=True)
    return Coverage(passages.astype(np.int64), held / index.ngrams[passages])


def probe(heads: U64, *, size: int, which: Literal[0, 1]) -> tuple[U64, npt.NDArray[np.uint8]]:
    """One of the two bits, as byte and mask, that stand for a hash of first words in a bitmap of
    `size` bytes, a power of 2.
    """
    # bits from the upper and from the lower end of the hash
    place = (heads >> np.uint64(0 if which else 64 - (size.bit_length() + 2))) & np.uint64(
        8 * size - 1
    )
    return place >> np.uint64(3), np.uint8(1) << (place & np.uint64(7)).astype(np.uint8)


def fingerprints(hashes: U64) -> U64:
    """The 48 bits of n-gram hashes that an index keeps."""
    return hashes >> np.uint64(32) << np.uint64(16) | hashes & np.uint64(0xFFFF)


def without(text: str, spans: list[tuple[int, int]]) -> str:
    """The text without these parts, which ascend and do not touch; what is left on either side is a
    paragraph each.
    """
    edges = [0, *(edge for span in spans for edge in span), len(text)]
    pieces = [text[start:end].strip() for start, end in zip(edges[::2], edges[1::2], strict=True)]
    return "\n\n".join(piece for piece in pieces if piece)


@lru_cache(maxsize=2)
def load(path: str) -> Index:
    """An index from its file; ValueError unless it is whole and of this version."""
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
    raw = np.asarray(
        np.memmap(path, np.uint8, "r")
    )  # a plain array: each operation on a memmap costs a microsecond more
    checksum, rest = raw[len(MAGIC) :][:8].tobytes(), raw[len(MAGIC) + 8 :]
    if checksum != xxhash.xxh3_64_digest(rest.data):
        raise ValueError(
            f"decontamination.index {path}: cut short or damaged, its {len(raw):,} bytes do not give the checksum they should; "
            "copy it again or build it anew with `gristmill index-benchmarks`"
        )
    return _parse(path, rest)


def _parse(path: str, rest: npt.NDArray[np.uint8]) -> Index:
    end = 8 + int.from_bytes(rest[:8].tobytes(), "little")
    header = json.loads(rest[8:end].tobytes())
    found = {name: header.get(name) for name in ("version", "normalizer")}
    if found != {"version": VERSION, "normalizer": NORMALIZER}:
        raise ValueError(
            f"decontamination.index {path}: it is of {found}, this filter reads version {VERSION} and "
            f"normalizer '{NORMALIZER}'; build it anew with `gristmill index-benchmarks`"
        )
    arrays = []
    for name, dtype in ARRAYS.items():
        start = end + -end % 8
        end = start + header["lengths"][name] * np.dtype(dtype).itemsize
        arrays.append(rest[start:end].view(dtype))
    return Index(header, *arrays)


_NO_MATCHES = Matches(*(np.empty(0, np.int64) for _ in range(3)))


@lru_cache(maxsize=1)
def _table() -> ngrams.U32:
    points = (
        *range(0x300, 0x20000),
        *range(0xE0100, 0xE01F0),
    )  # there are no combining marks elsewhere
    marks = [
        c
        for c in map(chr, points)
        if unicodedata.category(c).startswith("M") and not _PARTED.match(c)
    ]
    vowels = "".join(filter(_VOWELS.match, marks))
    return ngrams.replacements(
        digits="kept", inside_words=_INSIDE_WORDS + "".join(marks), letters=vowels
    )


def _may_begin(heads: U64, bitmap: npt.NDArray[np.uint8]) -> I64:
    """Places of the hashes whose two bits are set."""
    at = np.arange(len(heads))
    for which in PROBES:
        byte, mask = probe(heads, size=len(bitmap), which=which)
        found = np.flatnonzero(bitmap[byte] & mask)
        at, heads = at[found], heads[found]
    return at


def _entries(hashes: U64, index: Index) -> tuple[I64, I64]:
    """Which of the hashes the index holds, and in which of its rows; a hash with several rows comes
    as often.
    """
    keys = fingerprints(hashes)
    high, low = (
        (keys >> np.uint64(16)).astype(np.uint32),
        (keys & np.uint64(0xFFFF)).astype(np.uint16),
    )
    which, entry = np.arange(len(keys)), np.searchsorted(index.high, high)
    found_which, found_entry = [which[:0]], [entry[:0]]
    while len(which):
        # a place behind the last row gives the last row's bits, and no more rows
        same = np.flatnonzero(
            (index.high.take(entry, mode="clip") == high[which]) & (entry < len(index.high))
        )
        which, entry = which[same], entry[same]
        equal = index.low[entry] == low[which]
        found_which.append(which[equal])
        found_entry.append(entry[equal])
        entry = entry + 1
    return np.concatenate(found_which), np.concatenate(found_entry)


def _evidence(text: str, matches: Matches, index: Index) -> tuple[str, str]:
    """The set of the passage that is matched best, the longer one of equals; its row, how much of
    it, and where in the text.

    Not in words: they would be the page's own, and this is read before it is scrubbed.
    """
    passages, shares = coverage(matches, index)
    sizes = index.ngrams[passages]
    best = np.lexsort((-passages, sizes, shares))[-1]
    passage = passages[best]
    source = index.header["files"][index.file[passage]]
    start, end = max(
        _runs(text, _of(matches, passages[best : best + 1], index)),
        key=lambda span: span[1] - span[0],
    )
    where = f"{source['name']}:{index.row[passage]}"
    return source[
        "benchmark"
    ], f"{where}, {shares[best]:.2f} of {sizes[best]} n-grams, at {start} to {end}"


def _of(matches: Matches, passages: I64, index: Index) -> Matches:
    """The matches of these passages only."""
    chosen = np.isin(index.passage[matches.entries], passages)
    return Matches(*(column[chosen] for column in matches))


def _runs(text: str, matches: Matches) -> list[tuple[int, int]]:
    """Where the matched words stand in the text, words that follow one another together."""
    starts, ends = ngrams.word_places(text, _table())
    held = np.zeros(len(starts) + 1, np.int64)
    np.add.at(held, matches.words, 1)
    np.subtract.at(held, matches.words + matches.lengths, 1)
    edges = np.flatnonzero(np.diff(held.cumsum() > 0, prepend=False))
    return list(zip(starts[edges[::2]].tolist(), ends[edges[1::2] - 1].tolist(), strict=True))


def _spans(text: str, matches: Matches, index: Index, *, above: float) -> list[tuple[int, int]]:
    """What to cut: the matches of passages whose coverage exceeds `above`, in whole sentences, near
    ones together.
    """
    passages, shares = coverage(matches, index)
    spans: list[tuple[int, int]] = []
    for start, end in _runs(text, _of(matches, passages[shares > above], index)):
        start, end = _sentence_start(text, start), _sentence_end(text, end)
        if spans and start <= spans[-1][1] + _REACH:
            start, end = spans[-1][0], max(end, spans[-1][1])
            spans.pop()
        spans.append((start, end))
    return spans


def _sentence_start(text: str, place: int) -> int:
    """Where the sentence or line around a place begins; the word, if that is more than _REACH away."""
    low = max(0, place - _REACH)
    # with the character at the place: a mark before it ends a sentence only if white space follows
    breaks = [
        found.end()
        for found in _BREAK.finditer(text[low : place + 1])
        if found.end() <= place - low
    ]
    if breaks:
        return low + breaks[-1]
    word = re.search(r"\S*\Z", text[low:place])
    return 0 if low == 0 or word is None else low + word.start()


def _sentence_end(text: str, place: int) -> int:
    """Where the sentence or line around a place ends; the word, if that is more than _REACH away."""
    found = _BREAK.search(text[place : place + _REACH])
    if found is not None:
        return place + found.end()
    word = re.match(r"\S*", text[place : place + _REACH])
    return len(text) if place + _REACH >= len(text) or word is None else place + word.end()
