"""The words of a text, the same however it is written: for dedup and for decontamination.

NFKD, lower case, no accents. Punctuation separates words; apostrophes, soft hyphens and other
invisible characters are removed ("don't" is "dont"), and so are the vowel points of Arabic and
Hebrew, which most texts omit. Vowel signs of India's scripts are part of their words, the voicing
marks of kana part of theirs. A character of Chinese or Japanese is a word. Thai, Lao, Khmer and
Burmese, which have no spaces either, are cut after their signs above, below and beside the letters,
into pieces of a word or half a word. Digits of all scripts become those of ASCII.

Numbers are kept: tables of one template ("rainfall in May: 69 mm") and items of one template ("Tom
has 3 apples, ...") differ in nothing else.
"""

import string
import unicodedata
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]

# Stored with keys and indexes: of two normalizers they must not be compared. Any change to what
# `normalize` returns needs a new number.
NORMALIZER = "nfkd-words-1"

U32 = npt.NDArray[np.uint32]
_SPACE, _REMOVED = 32, 0
_PIECE = 1024  # characters
# kana; ideographs: extension A, unified, compatibility, the supplementary planes
WITHOUT_SPACES = [
    (0x3040, 0x30FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
]
_CUT_BEFORE, _CUT_AFTER, _JOINS = 1, 2, 4  # bits of `_cuts`
_FIRST_CUT = 0xE00
# marks that follow a letter and end a word: of Thai and Lao, Burmese, Khmer, Burmese's extensions,
# and the voicing marks of kana
_PARTING_MARKS = [
    (0xE00, 0xEFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0xA9E0, 0xA9FF),
    (0xAA60, 0xAA7F),
    (0x3099, 0x309A),
]
# blocks whose marks are vowels: Thaana, Devanagari to Sinhala, Tibetan, Balinese to Lepcha, Syloti
# Nagri to Meetei Mayek, Brahmi and related scripts
_VOWEL_MARKS = [
    (0x780, 0x7BF),
    (0x900, 0xDFF),
    (0xF00, 0xFFF),
    (0x1B00, 0x1C4F),
    (0xA800, 0xABFF),
    (0x11000, 0x11FFF),
]
# characters inside words that are no part of them: apostrophes, Arabic's tatweel and small letters
# of recitation, and what Unicode calls default ignorable (soft hyphen, zero-width characters,
# direction marks, fillers of Hangul, variation selectors)
_INSIDE_WORDS = [
    *((ord(c), ord(c)) for c in "'’‘\u00ad\u0640\u06e5\u06e6\u061c\ufeff\uffa0\u3164"),
    *((0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F), (0x200B, 0x200F), (0x202A, 0x202E)),
    *((0x2060, 0x206F), (0xFE00, 0xFE0F), (0xE0000, 0xE0FFF)),
]
# one letter in two forms: alef with and without wasla, sigma at the end of a word and elsewhere
_SAME = {"\u0671": "\u0627", "ς": "σ"}
_ASCII_WORDS = bytes(
    ord(c.lower()) if c.isascii() and c.isalnum() else _SPACE for c in map(chr, range(256))
)


def normalize(text: str) -> str:
    """The words of a text, separated by single spaces."""
    if text.isascii():
        raw = text.encode().translate(_ASCII_WORDS, b"'")
        return _collapsed(np.frombuffer(raw, np.uint8)).tobytes().decode().strip(" ")
    points = _table().take(code_points(decomposed(text)))
    points = points[points != _REMOVED]
    borders = _borders(points)
    if len(borders):
        counts = np.ones(len(points), np.uint8)
        counts[borders] = 2  # faster than np.insert
        points = points.repeat(counts)
        points[borders + np.arange(len(borders))] = _SPACE
    return _collapsed(points).astype("<u4", copy=False).tobytes().decode("utf-32-le").strip(" ")


def _collapsed(points: npt.NDArray[Any]) -> npt.NDArray[Any]:
    keep = points != _SPACE
    keep[1:] |= keep[:-1]  # the first space of each run stays
    kept: npt.NDArray[Any] = points[keep]
    return kept


def word_places(text: str) -> tuple[I64, I64]:
    """Where each word of the normalized text begins and ends in the text itself, each (W,).

    Slower than `normalize`. Of marks that are not in canonical order, a place may miss the last.
    """
    distinct, which = np.unique(code_points(text), return_inverse=True)
    lengths = np.array([len(decomposed(chr(point))) for point in distinct.tolist()], np.int64)
    points = _table().take(code_points(decomposed(text)))
    kept = points != _REMOVED
    points, origin = points[kept], np.repeat(np.arange(len(text)), lengths[which])[kept]
    borders = _borders(points)
    filled = np.insert(points, borders, _SPACE) != _SPACE
    edges = np.flatnonzero(np.diff(filled, prepend=False, append=False))
    origin = np.insert(origin, borders, 0)
    return origin[edges[::2]], origin[edges[1::2] - 1] + 1


def decomposed(text: str, form: Literal["NFD", "NFKD"] = "NFKD") -> str:
    """A normal form, piece by piece, as CPython takes quadratic time for a run of marks.

    (An hour for a page of nothing else.) Only marks in runs longer than any in real text (30, by
    Unicode's UAX 15) can end up in a different order.
    """
    parts, start = [], 0
    while start < len(text):
        end = start + _PIECE
        while end < min(len(text), start + 2 * _PIECE) and unicodedata.combining(text[end]):
            end += 1
        parts.append(unicodedata.normalize(form, text[start:end]))
        start = end
    return "".join(parts)


def code_points(text: str) -> U32:
    """The code points of a text, including lone surrogates."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


@lru_cache(maxsize=1)
def _table() -> U32:
    """What each code point of a decomposed text becomes, (0x110000,)."""
    points = np.arange(0x110000, dtype=np.uint32)
    characters = points.view("<U1")
    table = np.where(np.strings.isalnum(characters), _lower(points), np.uint32(_SPACE))
    for point in np.flatnonzero(np.strings.isdecimal(characters)).tolist():
        table[point] = ord(string.digits[unicodedata.decimal(chr(point))])
    marks = _marks()
    is_letter = _within(_VOWEL_MARKS, marks) | _within(_PARTING_MARKS, marks)
    table[marks] = np.where(is_letter, marks, _REMOVED)
    table[_within(_INSIDE_WORDS, points)] = _REMOVED
    for variant, letter in _SAME.items():
        table[ord(variant)] = ord(letter)
    return table


@lru_cache(maxsize=1)
def _cuts() -> npt.NDArray[np.uint8]:
    """Whether words begin before and end after a code point, or it joins the one before."""
    cuts = np.zeros(0x110000, np.uint8)
    cuts[_within(WITHOUT_SPACES, np.arange(0x110000))] = _CUT_BEFORE | _CUT_AFTER
    marks = _marks()
    cuts[marks[_within(_PARTING_MARKS, marks)]] = _JOINS | _CUT_AFTER
    return cuts


def _lower(points: U32) -> U32:
    """Letters in lower case; the only one that becomes two, \u0130, has been decomposed."""
    return np.strings.lower(points.view("<U1")).view(np.uint32)


def _marks() -> I64:
    # no combining marks elsewhere
    points = (*range(0x300, 0x20000), *range(0xE0100, 0xE01F0))
    return np.array([p for p in points if unicodedata.category(chr(p)).startswith("M")])


def _within(ranges: list[tuple[int, int]], points: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    inside = np.zeros(points.shape, bool)
    for first, last in ranges:
        inside |= (points >= first) & (points <= last)
    return inside


def _borders(points: U32) -> I64:
    """Positions between the words of scripts without spaces, each one once."""
    if points.max(initial=0) < _FIRST_CUT:
        return np.empty(0, np.int64)
    cuts = _cuts().take(points)
    before = cuts & _CUT_BEFORE
    before[1:] |= cuts[:-1] & _CUT_AFTER
    return np.flatnonzero((before > 0) & (cuts & _JOINS == 0))
