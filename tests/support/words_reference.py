"""The words of a text as `filters.text.words` gives them, slowly: character by character."""

import re
import unicodedata

# scripts with vowel signs that belong to their words; scripts without spaces, whose signs end words
SIGNS = [
    *("THAANA", "DEVANAGARI", "BENGALI", "GURMUKHI", "GUJARATI", "ORIYA", "TAMIL", "TELUGU"),
    *("KANNADA", "MALAYALAM", "SINHALA", "TIBETAN", "BALINESE", "JAVANESE"),
]
PARTED = ["THAI", "LAO", "KHMER", "MYANMAR", "KATAKANA-HIRAGANA"]
OTHERS = ["COMBINING", "ARABIC", "HEBREW", "CYRILLIC", "SYRIAC", "VARIATION"]
ALONE = "[\u3040-\u3098\u309b-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
_INVISIBLE = (
    "['’‘\u00ad\u0640\u06e5\u06e6\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    "\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\U000e0000-\U000e0fff]"
)


def slow_normalize(text: str) -> str:
    text = unicodedata.normalize("NFKD", text).lower().replace("ς", "σ").replace("\u0671", "\u0627")
    cut = ""
    for c in re.sub(_INVISIBLE, "", text):
        word = slow_character(c)
        if word and is_parting(c):
            cut = cut.removesuffix(" \0") + word + " \0"  # marks join what is before them
        elif re.match(ALONE, word):
            cut += f" {word} \0"
        elif word:
            cut += word
    return " ".join(cut.replace("\0", "").split())


def is_parting(c: str) -> bool:
    return unicodedata.category(c).startswith("M") and _script(c) in PARTED


def slow_character(c: str) -> str:
    if unicodedata.category(c).startswith("M"):
        return c if _script(c) in [*SIGNS, *PARTED] else ""
    if c.isdecimal():
        return str(unicodedata.decimal(c))
    return c if c.isalnum() else " "


def is_known(c: str) -> bool:
    """Whether it is no mark, or one of a script above."""
    return unicodedata.category(c)[0] != "M" or _script(c) in [*SIGNS, *PARTED, *OTHERS]


def _script(c: str) -> str:
    return unicodedata.name(c).removeprefix("COMBINING ").split()[0]
