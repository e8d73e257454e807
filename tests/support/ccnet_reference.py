"""CCNet's normalization again, a character at a time, as an oracle."""

import re
import unicodedata
from functools import cache

NASTY = [
    "",
    "\n\n",
    "\0",
    "\ud800 lone",
    "a\tb\rc\x0bd\x1ce",
    "１２３。",
    "…'…",
    "<s> </s> <unk>",
    "e\u0301" * 50,
    "x" * 10_000,
    "\u0301a\u0327\u0301",
    "ΟΔΟΣ ΟΔΟΣ. ΑΣ'Α aΣ Σa",
    "don''t 'tis rock 'n' roll o'clock' 's",
    "한국어 हिन्दी ไทย 中文字。文字",
    "İıßŐ",
    "many lines of text\n" * 300,
]


def slow_line(line: str) -> list[str]:
    """CCNet's steps on one line, then words and marks; plain `re` and `unicodedata`."""
    folded = "".join(slow_character(c) for c in decomposed(line))
    return re.findall(r"\w+(?:'\w+)*|[^\w\s]", folded)


def decomposed(line: str) -> str:
    return unicodedata.normalize("NFD", line.lower().encode("utf-8", "replace").decode())


@cache
def slow_character(c: str) -> str:
    if unicodedata.category(c) == "Mn":
        return ""
    if unicodedata.category(c) == "Nd":
        return "0"
    if unicodedata.category(c) == "Cc":
        return " "
    for marks, replacement in PUNCTUATION.items():
        if c in marks:
            return replacement
    return c


# written out from CCNet's table, by what the marks become
PUNCTUATION = {
    "„”“«»」「《》": '"', "´’": "'", "，、": ",", "∶：": ":", "–━►": "-", "。": ".", "．": ". ", "…": "...", "—": " - ",
    "？": "?", "！": "!", "；": ";", "～": "~", "％": "%", "（": "(", "）": ")", "〈": "<", "〉": ">", "【": "[", "】": "]",
}  # fmt: skip
