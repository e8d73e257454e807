"""C4's rules: drop lines that are not prose, then documents with too little text left."""

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
    overlong words, policy notices and citation marks. Scores are those of the edited text: a page
    whose only "{" or "lorem ipsum" is in a line that `edit` drops is kept.
    """

    # FineWeb: 5, with lines of 3 words; c4_utils.py: 3, with lines of 5 words
    sentence_count: Bound = (5, inf)
    lorem_ipsum_count: Bound = (0, 0)
    curly_bracket_count: Bound = (0, 0)
    min_line_words: int = 3  # separated by white space, citation marks included
    max_word_length: int = 1000
    # C4: true; FineWeb: false, as it costs 30 % of the tokens
    require_terminal_punctuation: bool = False
    # lines that contain one of these in any case are dropped
    line_phrases: tuple[str, ...] = (
        *("javascript", "terms of use", "privacy policy", "cookie policy"),
        *("uses cookies", "use of cookies", "use cookies"),
    )

    def edit(self, view: TextView) -> tuple[TextView, Measured]:
        """Drop lines and citation marks, and score the rest; `view` itself if nothing changes.

        White space at the ends of lines and blank lines are removed, and so are paragraph breaks,
        as in C4 itself.
        """
        lower = view.text.lower()  # few texts contain any phrase: search once, not per line
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
