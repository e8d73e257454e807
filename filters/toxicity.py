"""Toxic and adult text: word lists per language, and optionally a classifier of your own.

Word lists ignore context, and medicine and law use the same words. So the bound is on their share
of a text, not on their presence: C4 dropped every page with one listed word, and lost much text by
minorities (Dodge et al. 2021, arXiv:2104.08758). It was made for the lists of LDNOOBW (one file per
language, CC BY 4.0).
"""

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from pydantic.dataclasses import dataclass

from filters import STRICT, Bound, File, Measured
from filters.quality import Quality
from filters.text.view import TextView
from filters.text.words import U32, code_points


@dataclass(frozen=True, config=STRICT)
class Toxicity:
    """Keep documents with few listed words that a classifier does not rate as toxic.

    `lists` is a folder with one file per language, named as the language model names it ("en",
    "de"), with one word or phrase per line; `model` is a fastText model with its card beside it,
    whose `label` is the toxic class. Either may be "". `listed_ratio` is the share of letters and
    digits, in [0, 1], in listed words or phrases, `listed_count` the number of these, repeats
    included; both are 0 in a language without a list. `score` is the probability of `label`, in
    [0, 1]; 0 without a model. The note `list` is the language of the list used.
    """

    notes: ClassVar[tuple[str, ...]] = ("list",)
    tallied: ClassVar[tuple[str, ...]] = ("list",)

    lists: File = ""
    model: File = ""
    label: str = "toxic"
    listed_ratio: Bound = (0.0, 0.01)
    listed_count: Bound = None
    score: Bound = (0.0, 0.5)

    def check(self, languages: tuple[str, ...]) -> None:
        """ValueError without lists and model, if a language has no list, or for a wrong model."""
        if not self.lists and not self.model:
            raise ValueError(
                "name a folder of word lists (toxicity.lists), or a classifier (toxicity.model)"
            )
        if self.lists:
            folder = Path(self.lists)
            names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
            missing = [language for language in languages if language not in names]
            if missing:
                raise ValueError(
                    f"lists = {self.lists}: no file named '{missing[0]}' for that language, "
                    f"only {', '.join(names) or 'no file at all'}"
                )
        if self.model:
            Quality(model=self.model, label=self.label).check(languages)

    def measure(self, view: TextView) -> Measured:
        words = _load_list(self.lists, view.language) if self.lists and view.language else None
        ratio, count = _listed(view.text, words) if words else (0.0, 0)
        score = 0.0
        if self.model:
            score = Quality(model=self.model, label=self.label).measure(view)["score"]
        return {
            "listed_ratio": ratio,
            "listed_count": float(count),
            "score": score,
            "list": view.language if words else None,
        }


class _Words(NamedTuple):
    """Automata of the entries that match whole words, and of those that match anywhere; or None."""

    whole: Any
    anywhere: Any


_SPACE = 32
# Thai, Lao, Burmese, Khmer, kana, ideographs: no spaces between words
_NO_SPACES = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]"
)


def _listed(text: str, words: _Words) -> tuple[float, int]:
    """Share of letters and digits in listed words and phrases, and the number of these."""
    text = text.lower()
    spelled, letters = _spelled(text)
    hits = [*_longest(words.whole, spelled), *_longest(words.anywhere, text)]
    listed = sum(map(len, hits))
    return min(1.0, listed / letters) if letters else float(bool(hits)), len(hits)


def _spelled(text: str) -> tuple[str, int]:
    """A text's words, each between single spaces, " " if there are none; and their characters."""
    points = _table().take(code_points(f" {text} "))
    filled = points != _SPACE
    kept: U32 = points[filled | np.append(filled[1:], False)]
    return kept.astype("<u4", copy=False).tobytes().decode("utf-32-le") + " ", int(
        np.count_nonzero(filled)
    )


@lru_cache(maxsize=1)
def _table() -> U32:
    """What each code point becomes, (0x110000,): itself in a word, else a space.

    Words consist of letters, digits and their marks (the vowel signs of Hindi or Thai).
    """
    points = np.arange(0x110000, dtype=np.uint32)
    table = np.where(np.strings.isalnum(points.view("<U1")), points, np.uint32(_SPACE))
    marks = [p for p in range(0x10000) if unicodedata.category(chr(p)).startswith("M")]
    table[marks] = marks
    return table


def _longest(automaton: Any, text: str) -> Iterator[str]:
    """Entries in the text from left to right; of overlapping ones the first, then the longest.

    The automaton's own `iter_long` misses an entry inside the beginning of a longer one.
    """
    if automaton is None:
        return
    free = -1
    matches = ((end - length, -length, entry) for end, (length, entry) in automaton.iter(text))
    for before, negative, entry in sorted(matches):
        if before >= free:
            yield entry
            free = before - negative


@lru_cache(maxsize=64)
def _load_list(folder: str, language: str) -> _Words | None:
    file = Path(folder, language)
    if not file.is_file():
        return None
    entries = {
        " ".join(line.lower().split()) for line in file.read_text(encoding="utf-8").splitlines()
    } - {""}
    anywhere = {entry for entry in entries if _NO_SPACES.search(entry) or not _letters(entry)}
    return _Words(
        whole=_automaton({_spelled(entry)[0] for entry in entries - anywhere}, border=1),
        anywhere=_automaton(anywhere, border=0),
    )


def _letters(entry: str) -> str:
    return _spelled(entry)[0].replace(" ", "")


def _automaton(patterns: set[str], *, border: int) -> Any:
    """An automaton of patterns; adjacent matches may share the last `border` characters."""
    import ahocorasick

    automaton = ahocorasick.Automaton()
    for pattern in sorted(patterns):
        automaton.add_word(pattern, (len(pattern) - border, _letters(pattern) or pattern))
    automaton.make_automaton()
    return automaton if patterns else None
