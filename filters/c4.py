"""C4's rules: drop lines that are no prose, then documents with too little left."""

import re
from math import inf

from pydantic.dataclasses import dataclass

from filters import STRICT, Bound, Measured
from filters.text.view import TextView

_CITATION = re.compile(r"\[[0-9]*\]|\[edit\]|\[citation needed\]")
_TERMINAL = (".", "?", "!", '"', "'")


@dataclass(frozen=True, config=STRICT)
class C4:
    """Drop unwanted lines, then short, filler and code-like pages (Raffel et al. 2019,
    arXiv:1910.10683, 2.2).

    The line rules follow the published code (tensorflow_datasets, c4_utils.py), which also drops
    overlong words, policy notices and citation marks. `edit` first, then `measure`: the scores are
    those of the text they are given. A page whose only "{" or "lorem ipsum" stands in a line that
    `edit` drops is therefore kept.
    """

    sentence_count: Bound = (
        5,
        inf,
    )  # FineWeb: 5, with lines of 3 words; c4_utils.py: 3, with lines of 5 words
    lorem_ipsum_count: Bound = (0, 0)
    curly_bracket_count: Bound = (0, 0)
    min_line_words: int = 3  # words between white space, counted before citation marks go
    max_word_length: int = 1000
    require_terminal_punctuation: bool = (
        False  # C4: true; FineWeb: false, it costs 30 % of the tokens
    )
    line_phrases: tuple[str, ...] = (  # a line with one of these goes, in whatever case
        "javascript",
        "terms of use",
        "privacy policy",
        "cookie policy",
        "uses cookies",
        "use of cookies",
        "use cookies",
    )

    def edit(self, view: TextView) -> tuple[TextView, Measured]:
        """The text without the lines that C4 drops and without citation marks, and its scores;
        `view` if all of it stays.

        Lines lose the white space at their ends, and blank lines go: paragraph breaks with them, as
        in C4 itself.
        """
        lower = view.text.lower()  # few texts hold any phrase: ask once, not per line
        phrases = [phrase for phrase in self.line_phrases if phrase in lower]
        edited = view.with_lines([self._edit_line(line, phrases) for line in view.lines])
        return edited, self.measure(edited)

    def measure(self, view: TextView) -> Measured:
        return {
            "sentence_count": float(view.sentence_count),
            "lorem_ipsum_count": float(view.text.lower().count("lorem ipsum")),
            "curly_bracket_count": float(view.text.count("{")),
        }

    def _edit_line(self, line: str, phrases: list[str]) -> str | None:
        line = line.strip()
        words = line.split()
        if len(words) < self.min_line_words:
            return None
        if len(line) > self.max_word_length and max(map(len, words)) > self.max_word_length:
            return None
        if "[" in line:
            line = _CITATION.sub("", line)
        if self.require_terminal_punctuation and (
            not line.endswith(_TERMINAL) or line.endswith("...")
        ):
            return None
        if phrases and any(phrase in line.lower() for phrase in phrases):
            return None
        return line
