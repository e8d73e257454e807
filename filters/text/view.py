"""The view of a document that all filters share: everything is computed once, on first use.

Filters that each tokenize for themselves spend half their time on it. Everything is defined for
every string, including "", lone surrogates and unassigned code points.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from itertools import chain, count
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Unicode's Sentence_Terminal, as the inside of a [...] pattern; FineWeb looks for it at the ends of
# lines. Marks beyond the basic plane (Brahmi, Chakma) are left out: they changed no page of
# wcxb-500.
SENTENCE_TERMINAL = (
    "!.?\u0589\u061d-\u061f\u06d4\u0700-\u0702\u07f9\u0837\u0839\u083d\u083e\u0964\u0965\u104a\u104b\u1362\u1367\u1368\u166e"
    "\u1735\u1736\u17d4\u17d5\u1803\u1809\u1944\u1945\u1aa8-\u1aab\u1b5a\u1b5b\u1b5e\u1b5f\u1b7d\u1b7e\u1c3b\u1c3c\u1c7e\u1c7f"
    "\u203c\u203d\u2047-\u2049\u2e2e\u2e3c\u2e53\u2e54\u3002\ua4ff\ua60e\ua60f\ua6f3\ua6f7\ua876\ua877\ua8ce\ua8cf\ua92f\ua9c8"
    "\ua9c9\uaa5d-\uaa5f\uaaf0\uaaf1\uabeb\ufe52\ufe56\ufe57\uff01\uff0e\uff1f\uff61"
)

# \s and the marks that are never inside a word, as plain ranges: re compiles these to one bitmap,
# but not \s or \w, and \w would cut Indic words at their vowel signs. "_" is a mark at the edge of
# a word and a letter inside it.
_SPACE = r"\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_MARK = (
    r"!-/:-@\[-`{-~\xa1-\xa9\xab-\xb1\xb4\xb6-\xb8\xbb\xbf"
    r"\u055d-\u055f\u0589\u060c\u061b\u061f\u066a\u06d4\u0964\u0965\u2010\u2012-\u2bff"
    r"\u3001-\u3020\u3030\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65\ufffc\ufffd"
    r"\U0001f000-\U0001faff"
)
_RUN = rf"[^{_SPACE}{_MARK}]++"
_CLITIC_END = rf"(?:[stmdSTMD]|re|ve|ll)(?![^{_SPACE}{_MARK}])"

# Like spaCy's English rules, with which datatrove counts words: on web text 99 % of the tokens are
# the same, at a fraction of the cost. Known differences: "don't" is don + 't, not do + n't (the
# same number of tokens and characters); no lists of abbreviations ("Mr."), units ("5km") or
# emoticons; "and/or" and "a=b" are always cut.
_WORD = re.compile(
    rf"""
      (?: (?<! [^{_SPACE}] ) [-/\\~@]++ )?+ {_RUN}          # --help  /etc  ~/x  @name
      (?: (?: (?<=[A-Z])\. | \.(?![A-Z])                    # U.S  example.com  not end.Start
            | ['’](?!{_CLITIC_END})                         # O'Brien
            | [,:/=](?=[0-9]) | (?<![0-9])-(?=[0-9])  # 1,000  10:30  24/7  COVID-19, not 10-20
            | [@&_+|$(\[\\] ) {_RUN}                        # a@b.org  R&D  word(s
        | \. (?: (?<=\.[A-Za-z]\.) | (?<=\b[A-Z]\.) )       # e.g.  J.
        | ://[^{_SPACE}]++ )*+                              # the rest of a URL
    | ['’]{_CLITIC_END} | \.\.+ | --+ | [^{_SPACE}]
    """,
    re.VERBOSE,
)

# A terminal mark, closing quotes or brackets, a gap, and more text; no abbreviation, initial or
# ellipsis before it. Chinese and Japanese leave no gap.
_SENTENCE_BREAK = re.compile(
    rf"""
    [{SENTENCE_TERMINAL}]
    (?<! \b[A-Za-z]\. ) (?<! \.\. )
    (?<! \b(?:Mr|Ms|Dr|St|Jr|Co|vs)\. )
    (?<! \b(?:Mrs|Inc|Ltd|Gen|Sen|Rep|Gov|Jan|Feb|Mar|Apr|Aug|Sep|Oct|Nov|Dec)\. )
    (?: ["'”’»)\]]*+ [^\S\n]++ (?=[^\s{SENTENCE_TERMINAL}])
      | (?<=[。！？｡]) (?=[^\s。！？｡]) )
    """,
    re.VERBOSE,
)


class Repeats(NamedTuple):
    """Repeated parts of a document, without their first occurrences: number and characters."""

    number: int
    chars: int


class Ngrams(NamedTuple):
    """The n-grams that occur at least twice: start of each (ascending, in words), and its id."""

    starts: NDArray[np.int64]
    kinds: NDArray[np.int64]


class TextView:
    """A document with lazily computed properties; treat it as immutable.

    `language` is None if it was not identified.
    """

    def __init__(self, text: str, language: str | None = None) -> None:
        self.text = text
        self.language = language
        self._ngrams: list[Ngrams] = []

    def with_lines(self, lines: Sequence[str | None]) -> "TextView":
        """The document with its lines replaced and stripped; None drops a line.

        `self` if that changes nothing. Unchanged lines are not tokenized again.
        """
        text = "\n".join(line for line in lines if line is not None).strip()
        if text == self.text:
            return self
        edited = TextView(text, self.language)
        edited.line_words = [
            words if new == old.strip() else _WORD.findall(new)
            for old, new, words in zip(self.lines, lines, self.line_words, strict=True)
            if new is not None and not new.isspace() and new
        ]
        return edited

    @cached_property
    def words(self) -> list[str]:
        """Words and punctuation marks, in order, an ellipsis as one mark; without white space."""
        return list(chain.from_iterable(self.line_words))

    @cached_property
    def line_words(self) -> list[list[str]]:
        """The words of each line."""
        return [_WORD.findall(line) for line in self.lines]

    @cached_property
    def vocabulary(self) -> list[str]:
        """The distinct words, in order of first appearance; see `word_counts` for their numbers."""
        return list(self._numbered[0])

    @cached_property
    def word_ids(self) -> NDArray[np.int64]:
        """For each word its position in the vocabulary."""
        return self._numbered[1]

    @cached_property
    def _numbered(self) -> tuple[dict[str, int], NDArray[np.int64]]:
        index: dict[str, int] = defaultdict(count().__next__)  # a new word gets the next number
        return index, np.fromiter(map(index.__getitem__, self.words), np.int64, len(self.words))

    @cached_property
    def word_counts(self) -> NDArray[np.int64]:
        """For each word of the vocabulary its number of occurrences."""
        return np.bincount(self.word_ids, minlength=len(self.vocabulary))

    @cached_property
    def word_lengths(self) -> NDArray[np.int64]:
        """For each word of the vocabulary its length in characters."""
        return np.fromiter(map(len, self.vocabulary), np.int64, len(self.vocabulary))

    @cached_property
    def word_ends(self) -> NDArray[np.int64]:
        """Characters of the first i words, i = 0..number of words: of i..j, ends[j] - ends[i]."""
        return np.concatenate(([0], np.cumsum(self.word_lengths[self.word_ids])))

    @cached_property
    def lines(self) -> list[str]:
        """Lines that are not blank, with the white space at their ends."""
        return [line for line in self.text.splitlines() if line and not line.isspace()]

    @cached_property
    def paragraphs(self) -> list[str]:
        """Parts between blank lines; none in an empty text."""
        text = self.text.strip()
        return re.split(r"\n{2,}", text) if "\n\n" in text else [text] if text else []

    @cached_property
    def repeated_lines(self) -> Repeats:
        return _repeats(self.lines)

    @cached_property
    def repeated_paragraphs(self) -> Repeats:
        return _repeats(self.paragraphs)

    @cached_property
    def sentence_count(self) -> int:
        """Number of sentences; every line starts one."""
        return len(self.lines) + len(_SENTENCE_BREAK.findall(self.text)) if self.lines else 0

    def repeated_ngrams(self, n: int) -> Ngrams:
        """The word n-grams that occur at least twice; exact, without hashing.

        An n-gram can occur twice only if both its (n-1)-grams do, so each n looks only at the
        result for n - 1: of the median web page a tenth at n = 3, a fiftieth at n = 5, nothing at
        n = 10.
        """
        if not self._ngrams:
            twice = self.word_counts[self.word_ids] > 1
            self._ngrams.append(Ngrams(twice.nonzero()[0], self.word_ids[twice]))
        while len(self._ngrams) < n:
            starts, kinds = self._ngrams[-1]
            first = (starts[1:] - starts[:-1] == 1).nonzero()[0]
            # kinds stay below the number of words: a product of two fits 63 bits up to three
            # billion words
            keys = kinds[first] * len(self.words) + kinds[first + 1]
            self._ngrams.append(_occurring_twice(starts[first], keys))
        return self._ngrams[n - 1]

    def top_ngram_chars(self, n: int) -> int:
        """Characters, with inner spaces, of the most frequent n-gram, times its count.

        Of equally frequent n-grams the first.
        """
        if len(self.words) < n:
            return 0
        starts, kinds = self.repeated_ngrams(n)
        start, times = 0, 1
        if len(starts):
            counts = np.bincount(kinds)
            times = int(counts.max())
            start = int(starts[np.argmax(counts[kinds])])
        return int(self.word_ends[start + n] - self.word_ends[start] + n - 1) * times

    def repeated_ngram_chars(self, n: int) -> int:
        """Characters without spaces in repeated n-grams, from left to right, without overlap."""
        starts, kinds = self.repeated_ngrams(n)
        chars = free = 0
        seen: set[int] = set()
        lengths = self.word_ends[starts + n] - self.word_ends[starts]
        for start, kind, length in zip(
            starts.tolist(), kinds.tolist(), lengths.tolist(), strict=True
        ):
            if start < free:
                continue
            if kind in seen:
                chars += length
                free = start + n
            else:
                seen.add(kind)
        return chars


def ratio(part: float, whole: float) -> float:
    """part / whole; 0 if `whole` is 0."""
    return float(part / whole) if whole else 0.0


def _repeats(parts: list[str]) -> Repeats:
    if len(set(parts)) == len(parts):
        return Repeats(0, 0)
    seen: set[str] = set()
    repeated = [part for part in parts if part in seen or seen.add(part)]  # type: ignore[func-returns-value]
    return Repeats(len(repeated), sum(map(len, repeated)))


def _occurring_twice(starts: NDArray[np.int64], keys: NDArray[np.int64]) -> Ngrams:
    """Keep the starts whose key occurs more than once; their keys are renumbered from 0."""
    if not len(keys):
        return Ngrams(starts, keys)
    order = keys.argsort()
    ranked = keys[order]
    kinds = np.empty_like(keys)
    kinds[order[0]] = 0
    kinds[order[1:]] = (ranked[1:] != ranked[:-1]).cumsum()
    kept = np.bincount(kinds)[kinds] > 1
    return Ngrams(starts[kept], kinds[kept])
