"""Gopher's rules for documents that read like prose."""

from math import inf

import numpy as np
from pydantic.dataclasses import dataclass

from filters import STRICT, Bound
from filters.text.view import TextView, ratio


@dataclass(frozen=True, config=STRICT)
class GopherQuality:
    """Keep prose-like documents (Rae et al. 2021, arXiv:2112.11446, A1.1).

    Lengths are in characters, ratios per word or per line; blank lines do not count. Every score of
    "" is 0. Words are `TextView.words`; one without letter or digit is a symbol, which the paper
    does not define.
    """

    word_count: Bound = (50, 100_000)  # symbols not counted
    mean_word_length: Bound = (3, 10)  # of the words that are not symbols
    hash_ratio: Bound = (0, 0.1)  # "#" per word, symbols included in the words
    ellipsis_ratio: Bound = (0, 0.1)  # "..." and "…" per word, symbols included
    bullet_line_ratio: Bound = (0, 0.9)  # lines that start with "•" or "-"
    ellipsis_line_ratio: Bound = (0, 0.3)  # lines that end in "..." or "…"
    # paper: 80 % of the words have a letter. Over all tokens, as datatrove and so FineWeb do it, a
    # comma is a word without one, and the rule is stricter than the paper's; we keep FineWeb's.
    alpha_word_ratio: Bound = (0.8, 1)
    stop_word_count: Bound = (2, inf)  # number of different ones
    # compared as written: 'The' is not a stop word
    stop_words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")

    def measure(self, view: TextView) -> dict[str, float]:
        text, lines, words, counts = view.text, view.lines, view.vocabulary, view.word_counts
        plain = np.array([w.isalnum() or any(map(str.isalnum, w)) for w in words], bool)
        alpha = np.array([w.isalpha() or any(map(str.isalpha, w)) for w in words], bool)
        word_count = counts[plain].sum()
        return {
            "word_count": float(word_count),
            "mean_word_length": ratio((counts * view.word_lengths)[plain].sum(), word_count),
            "hash_ratio": ratio(text.count("#"), len(view.words)),
            "ellipsis_ratio": ratio(text.count("...") + text.count("…"), len(view.words)),
            "bullet_line_ratio": ratio(
                sum(line.lstrip().startswith(("•", "-")) for line in lines), len(lines)
            ),
            "ellipsis_line_ratio": ratio(
                sum(line.rstrip().endswith(("...", "…")) for line in lines), len(lines)
            ),
            "alpha_word_ratio": ratio(counts[alpha].sum(), len(view.words)),
            "stop_word_count": float(len(set(self.stop_words).intersection(words))),
        }
