"""Other ways to write the characters of values, folded before values are searched.

Pages print card numbers with non-breaking spaces and hyphens, forms send full-width digits, word
processors put direction marks around telephone numbers, and links encode the @ of an address.
"""

import re
from bisect import bisect_right
from typing import NamedTuple

from filters.pii.spans import Hit

_SPACES = "\xa0\u1680\u2000-\u200a\u202f\u205f\u3000"
_HYPHENS = "\u2010\u2011\ufe63\uff0d"
# these also mean 'to': a range of pages or years stays
_DASHES = "\u2012-\u2015\u2212"
_FULL_WIDTH = "\uff10-\uff19\uff21-\uff3a\uff41-\uff5a\uff0b\uff0e\uff20"
_INVISIBLE = "\xad\u200b-\u200f\u2060-\u2064\u202a-\u202e\u2066-\u2069\ufeff"
_IS_INVISIBLE = re.compile(f"[{_INVISIBLE}]")
_BESIDE = "0-9A-Za-z@.+() -"
_D = f"[-{_DASHES}]"
# A class of first characters, which makes the search fast; then what must be around them. A dash is
# one of a number only between the blocks of a card or account, or of a social security number.
_FOLDED = re.compile(
    rf"""[{_SPACES}{_HYPHENS}{_FULL_WIDTH}{_INVISIBLE}{_DASHES}%&](?:
      (?<=[{_SPACES}{_HYPHENS}{_FULL_WIDTH}])
    | (?<=[{_INVISIBLE}])(?<=[{_BESIDE}].)[{_INVISIBLE}]*(?=[{_BESIDE}])
    | (?<=[{_DASHES}])(?:
          (?<=[\dA-Z]{{4}}.)(?=[\dA-Z]{{4}}{_D}[\dA-Z]|\d{{6}}{_D}\d{{4}})
        | (?<=[\dA-Z]{{4}}{_D}[\dA-Z]{{4}}.)(?=[\dA-Z])
        | (?<=\d{{4}}{_D}\d{{6}}.)(?=\d{{4}})
        | (?<=\d{{3}}.)(?=\d{{2}}{_D}\d{{4}}(?!\d))
        | (?<=\d{{3}}{_D}\d{{2}}.)(?=\d{{4}}(?!\d)))
    | (?<=%)(?:(?<=[\w.+-].)40(?=\w)|2[Bb](?=[0-9]{{7}}))
    | (?<=&)(?<=[\w.+-].)(?:\#64|\#[xX]40|commat);(?=\w))""",
    re.VERBOSE,
)
_ENCODED = ("%40", "%2", "&#", "&c")  # in ASCII nothing else is folded
_TO_ASCII = {
    **{ord(c): "-" for c in "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe63\uff0d"},
    **{c: chr(c - 0xFEE0) for c in range(0xFF01, 0xFF5F) if c != 0xFF0D},
}


class Shift(NamedTuple):
    """Where the folded text continues after a part of another length, and where the original."""

    folded: int
    original: int


class Folded(NamedTuple):
    """A folded text, and what leads back to positions in the original."""

    text: str
    shifts: list[Shift]

    def original(self, hit: Hit) -> Hit:
        """The hit at its place in the original text."""
        if not self.shifts:
            return hit
        return hit._replace(start=self._at(hit.start), end=self._at(hit.end - 1) + 1)

    def _at(self, position: int) -> int:
        i = bisect_right(self.shifts, position, key=lambda shift: shift.folded)
        if not i:
            return position
        folded, original = self.shifts[i - 1]
        return original + position - folded


def fold(text: str) -> Folded:
    """The text with spaces, hyphens, digits and @ of values as in ASCII."""
    if text.isascii() and not any(sign in text for sign in _ENCODED):
        return Folded(text, [])
    parts: list[str] = []
    shifts: list[Shift] = []
    end = size = 0
    for match in _FOLDED.finditer(text):
        parts += [text[end : match.start()], _ascii(match[0])]
        size += match.start() - end + len(parts[-1])
        end = match.end()
        if len(parts[-1]) != len(match[0]):
            shifts.append(Shift(size, end))
    return Folded("".join([*parts, text[end:]]), shifts) if parts else Folded(text, [])


def _ascii(part: str) -> str:
    """What a match of `_FOLDED` becomes."""
    if part[0] in "%&":
        return "+" if part[0] == "%" and part[1] == "2" else "@"
    if _IS_INVISIBLE.match(part):
        return ""
    return _TO_ASCII.get(ord(part), " ")
