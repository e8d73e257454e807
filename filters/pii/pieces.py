"""Cut long lines into pieces: recognizers are slower than linear on them (e-mail: quadratic)."""

import re
from typing import NamedTuple

MAX_PIECE = 2000  # characters
WORD_GAP = re.compile(r"[^\W\d_]{2} (?=[^\W\d_]{2})")
_MARGIN = 220  # characters on each side of a piece in which context is searched


class Piece(NamedTuple):
    """line[start:end], searched for values; line[low:high] around it is searched for context."""

    line: str
    start: int
    end: int
    low: int
    high: int

    def alone(self) -> "Piece":
        """The piece with no more of its line than is searched for context."""
        line, start, end, low, high = self
        near = line[low:high]
        return Piece(near, start - low, end - low, 0, len(near))

    def blanked(self, start: int, end: int) -> "Piece":
        """The piece without the characters line[start:end]; all others keep their positions."""
        return self._replace(line=f"{self.line[:start]}{chr(0) * (end - start)}{self.line[end:]}")

    @property
    def is_between_words(self) -> bool:
        """Whether the piece ends where no value can continue."""
        line, end = self.line, self.end
        return (
            end == len(line) or line[end - 1] in "<>" or WORD_GAP.match(line, end - 3) is not None
        )


def cut_piece(line: str, start: int) -> Piece:
    """The piece of a line that begins at `start`, of at most MAX_PIECE characters.

    It ends after the last < or >, else between two words, else (not prose) after a comma, semicolon
    or quote, else anywhere. Angle brackets come first because placeholders bring them: the cut then
    depends on the nearest bracket and not on the length of all text before it, which changes with
    each round of replacements. Otherwise each round would cut elsewhere and find more.
    """
    end = start + MAX_PIECE
    if end >= len(line):
        end = len(line)
    elif angle := max(line.rfind("<", start, end), line.rfind(">", start, end)) + 1:
        end = angle
    elif gap := WORD_GAP.search(line, start + MAX_PIECE // 2, end):
        end = gap.end()
    else:
        end = max(line.rfind(mark, start + MAX_PIECE // 2, end) for mark in ',;"') + 1 or end
    return Piece(line, start, end, max(0, start - _MARGIN), end + _MARGIN)
