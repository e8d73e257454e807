"""FineWeb's own rules, found by comparing crawls of high and low quality."""

import re

from pydantic.dataclasses import dataclass

from filters import STRICT, Bound
from filters.text.view import SENTENCE_TERMINAL, TextView, ratio

_ENDS_SENTENCE = re.compile(rf"[{SENTENCE_TERMINAL}]\Z")


@dataclass(frozen=True, config=STRICT)
class Fineweb:
    """Drop lists, menus and boilerplate (Penedo et al. 2024, arXiv:2406.17557).

    Blank lines do not count. The paper drops documents at equality, too; the code that made the
    data set does not, and we follow it. Every score of "" is 0, so it fails line_punct_ratio.
    """

    line_punct_ratio: Bound = (0.12, 1)  # lines that end in a sentence-terminal mark (not a quote)
    short_line_ratio: Bound = (0, 0.67)  # lines of at most short_line_length characters
    # Characters of repeated lines per character other than newline. Paper: 0.1; the code: 0.01.
    duplicate_line_char_ratio: Bound = (0, 0.01)
    newline_ratio: Bound = (0, 0.3)  # newlines per word or symbol; in the code, not in the paper
    short_line_length: int = 30

    def measure(self, view: TextView) -> dict[str, float]:
        lines, newlines = view.lines, view.text.count("\n")
        ended = sum(_ENDS_SENTENCE.search(line[-1]) is not None for line in lines)
        short = sum(len(line) <= self.short_line_length for line in lines)
        chars = len(view.text) - newlines
        return {
            "line_punct_ratio": ratio(ended, len(lines)),
            "short_line_ratio": ratio(short, len(lines)),
            "duplicate_line_char_ratio": ratio(view.repeated_lines.chars, chars),
            "newline_ratio": ratio(newlines, len(view.words)),
        }
