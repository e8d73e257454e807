"""Gopher's rules against documents that repeat themselves."""

from pydantic.dataclasses import dataclass

from filters import STRICT, Bound
from filters.text.view import TextView, ratio


@dataclass(frozen=True, config=STRICT)
class GopherRepetition:
    """Drop repetitive documents (Rae et al. 2021, arXiv:2112.11446, A1.1 and Table A1).

    A part is a duplicate from its second occurrence on. Shares of characters are of all characters,
    white space included. The most frequent n-gram may overlap itself ("a a a a"), so its share may
    exceed 1; it counts even if it occurs once, which matters in very short texts only. Every score
    of "" is 0.
    """

    duplicate_line_ratio: Bound = (0, 0.30)
    duplicate_paragraph_ratio: Bound = (0, 0.30)
    duplicate_line_char_ratio: Bound = (0, 0.20)
    duplicate_paragraph_char_ratio: Bound = (0, 0.20)
    top_2gram_char_ratio: Bound = (0, 0.20)
    top_3gram_char_ratio: Bound = (0, 0.18)
    top_4gram_char_ratio: Bound = (0, 0.16)
    duplicate_5gram_char_ratio: Bound = (0, 0.15)
    duplicate_6gram_char_ratio: Bound = (0, 0.14)
    duplicate_7gram_char_ratio: Bound = (0, 0.13)
    duplicate_8gram_char_ratio: Bound = (0, 0.12)
    duplicate_9gram_char_ratio: Bound = (0, 0.11)
    duplicate_10gram_char_ratio: Bound = (0, 0.10)

    def measure(self, view: TextView) -> dict[str, float]:
        chars = len(view.text)
        lines, paragraphs = view.repeated_lines, view.repeated_paragraphs
        return {
            "duplicate_line_ratio": ratio(lines.number, len(view.lines)),
            "duplicate_paragraph_ratio": ratio(paragraphs.number, len(view.paragraphs)),
            "duplicate_line_char_ratio": ratio(lines.chars, chars),
            "duplicate_paragraph_char_ratio": ratio(paragraphs.chars, chars),
            **{f"top_{n}gram_char_ratio": ratio(view.top_ngram_chars(n), chars) for n in (2, 3, 4)},
            **{
                f"duplicate_{n}gram_char_ratio": ratio(view.repeated_ngram_chars(n), chars)
                for n in range(5, 11)
            },
        }
