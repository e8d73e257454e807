"""Decontamination: drop or trim documents that quote the evaluation sets of a model.

They are found by word n-grams (`passage_index`). The coverage of a passage is the share of its
n-grams that the document contains, in [0, 1].

Others: GPT-3 (Brown et al. 2020, arXiv:2005.14165, appendix C) takes any one common 13-gram for a
collision, cuts 200 characters on each side of it, and drops a document cut into more than ten
pieces; n-grams in more than ten documents of the training set are ignored. NeMo Curator's
TaskDecontamination does the same, with n-grams of 8 to 13 words. Coverage requires a larger part of
an item, so that an idiom or verse that an item quotes does not reject the page, and needs no pass
over the corpus: n-grams common to many items of a set, and those of background text, are left out
when the index is built.
"""

import math
import re
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic.dataclasses import dataclass

from filters import STRICT, Bound, File, Measured
from filters.passage_index import Index, Matches, find_matches, load_index
from filters.text.ngrams import I64
from filters.text.view import SENTENCE_TERMINAL, TextView
from filters.text.words import word_places

# Characters around a match that may be cut with it (GPT-3's window), and that may be between two
# matches of one cut.
_REACH = 200
_BREAK = re.compile(rf"\n|[。！？｡]|[{SENTENCE_TERMINAL}][\"'”’»)\]]*(?=\s|$)")


class Coverage(NamedTuple):
    """Passages with an n-gram in a document, ascending, and the share of their n-grams in it."""

    passages: I64
    shares: npt.NDArray[np.float64]


@dataclass(frozen=True, config=STRICT)
class Decontamination:
    """Drop documents that contain items of evaluation sets, or cut the items out.

    `index` is a file made by `gristmill index-benchmarks`. `coverage` is the largest coverage of
    any one passage: above its upper end the document is contaminated. With `action = "trim"` the
    passages above it are cut, in whole sentences where these end within 200 characters, and
    `coverage` is that of the remaining text. `cut_share` is the share of the document's characters
    that were cut, in [0, 1]: a document of mostly test items is not worth keeping. The notes are on
    the best match before any cut: `evidence` is its file and row and the matching characters, None
    without a match; `benchmark` is its evaluation set, None if the document is neither dropped nor
    cut.
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
        load_index(self.index)
        if self.action == "trim" and self.coverage is None:
            raise ValueError(
                "decontamination.coverage is off, so action = 'trim' has no share above which to "
                "cut; set a bound"
            )

    @property
    def edits_by(self) -> tuple[str, ...]:
        return ("coverage",) if self.action == "trim" else ()

    def measure(self, view: Any) -> Measured:
        return self.edit(view)[1]

    def edit(self, view: Any) -> tuple[Any, Measured]:
        index = load_index(self.index)
        matches = find_matches(view.text, index)
        if not len(matches.entries):
            return view, {"coverage": 0.0, "cut_share": 0.0, "benchmark": None, "evidence": None}
        benchmark, match = _best_match(view.text, matches, index)
        text = view.text
        # a cut can join the parts of another match; this ends, as every round cuts something
        while self.action == "trim" and (spans := _spans(text, matches, index, above=self._limit)):
            text = without(text, spans)
            matches = find_matches(text, index)
        left = float(coverage(matches, index).shares.max(initial=0.0))
        cut_share = 1 - len(text) / len(view.text)
        edited = view if text == view.text else TextView(text, view.language)
        is_contaminated = edited is not view or left > self._limit
        notes = {"benchmark": benchmark if is_contaminated else None, "evidence": match}
        return edited, {"coverage": left, "cut_share": cut_share, **notes}

    @property
    def _limit(self) -> float:
        return math.inf if self.coverage is None else self.coverage[1]


def coverage(matches: Matches, index: Index) -> Coverage:
    """The coverage of each passage; an n-gram that a document repeats counts once."""
    passages, matched = np.unique(index.passage[np.unique(matches.entries)], return_counts=True)
    return Coverage(passages.astype(np.int64), matched / index.ngrams[passages])


def without(text: str, spans: list[tuple[int, int]]) -> str:
    """The text without `spans`, which ascend and do not touch; what remains are paragraphs."""
    edges = [0, *(edge for span in spans for edge in span), len(text)]
    pieces = [text[start:end].strip() for start, end in zip(edges[::2], edges[1::2], strict=True)]
    return "\n\n".join(piece for piece in pieces if piece)


def _best_match(text: str, matches: Matches, index: Index) -> tuple[str, str]:
    """The evaluation set and the place of the passage with the highest coverage, then the longest.

    The place is the passage's file and row, its coverage, and the position in the text. It does not
    quote the text, which is not scrubbed yet.
    """
    passages, shares = coverage(matches, index)
    sizes = index.ngrams[passages]
    best = np.lexsort((-passages, sizes, shares))[-1]
    passage = passages[best]
    source = index.header["files"][index.file[passage]]
    runs = _runs(text, _matches_of(matches, passages[best : best + 1], index))
    start, end = max(runs, key=lambda span: span[1] - span[0])
    return source["benchmark"], (
        f"{source['name']}:{index.row[passage]}, {shares[best]:.2f} of {sizes[best]} n-grams, "
        f"at {start} to {end}"
    )


def _matches_of(matches: Matches, passages: I64, index: Index) -> Matches:
    """The matches of these passages only."""
    chosen = np.isin(index.passage[matches.entries], passages)
    return Matches(*(column[chosen] for column in matches))


def _runs(text: str, matches: Matches) -> list[tuple[int, int]]:
    """(start, end) of the matched parts of the text; adjacent words are one part."""
    starts, ends = word_places(text)
    steps = np.zeros(len(starts) + 1, np.int64)
    np.add.at(steps, matches.words, 1)
    np.subtract.at(steps, matches.words + matches.lengths, 1)
    edges = np.flatnonzero(np.diff(steps.cumsum() > 0, prepend=False))
    return list(zip(starts[edges[::2]].tolist(), ends[edges[1::2] - 1].tolist(), strict=True))


def _spans(text: str, matches: Matches, index: Index, *, above: float) -> list[tuple[int, int]]:
    """What to cut: the sentences that match passages with more than `above` coverage.

    Sentences near each other are one cut.
    """
    passages, shares = coverage(matches, index)
    spans: list[tuple[int, int]] = []
    for start, end in _runs(text, _matches_of(matches, passages[shares > above], index)):
        start, end = _sentence_start(text, start), _sentence_end(text, end)
        if spans and start <= spans[-1][1] + _REACH:
            start, end = spans[-1][0], max(end, spans[-1][1])
            spans.pop()
        spans.append((start, end))
    return spans


def _sentence_start(text: str, place: int) -> int:
    """Start of the sentence or line around a place; of the word, if that is over _REACH away."""
    low = max(0, place - _REACH)
    # with the character at the place: a mark before it ends a sentence only if white space follows
    ends = [match.end() for match in _BREAK.finditer(text[low : place + 1])]
    breaks = [end for end in ends if end <= place - low]
    if breaks:
        return low + breaks[-1]
    word = re.search(r"\S*\Z", text[low:place])
    return 0 if low == 0 or word is None else low + word.start()


def _sentence_end(text: str, place: int) -> int:
    """End of the sentence or line around a place; of the word, if that is over _REACH away."""
    sentence_break = _BREAK.search(text[place : place + _REACH])
    if sentence_break is not None:
        return place + sentence_break.end()
    word = re.match(r"\S*", text[place : place + _REACH])
    return len(text) if place + _REACH >= len(text) or word is None else place + word.end()
