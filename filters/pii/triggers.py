"""Triggers: cheap patterns that decide whether a line is given to the recognizer of an entity."""

import re
from collections.abc import Iterable

from filters.pii import phones

# Every accepted value of an entity contains one of its triggers, so a line without them contains no
# value. No trigger looks beyond the ends of words: what is found in a value is found in its line.
# Each starts with a digit, a sign or a literal, for speed. (`secrets` has its own.) CJK letters may
# touch a value, hence ASCII's \b.
TRIGGERS = {
    "CREDIT_CARD": (
        re.compile(
            r"[1-68](?<!(?a:\w).)\d{3}"
            r"(?:[- ]?\d{4}[- ]?\d{4}|[- ]?\d{3,4}[- ]?\d{3,4}[- ]?\d{3,5})(?:[- ]?\d{3,4})?(?a:\b)"
        ),
    ),
    "CRYPTO": (re.compile(r"[13][a-zA-Z0-9]{25}"),),
    "EMAIL_ADDRESS": (re.compile(r"@\w"),),
    "IBAN_CODE": (re.compile(r"[0-9](?<=[A-Za-z].)[0-9](?<=[A-Za-z]{2}..)[ -]?[A-Za-z0-9]{4}"),),
    # the last three of four numbers, without a fifth, which would make an OID; or two colons
    "IP_ADDRESS": (
        re.compile(
            r"\.(?<=\d.)(?<!\d\.\d.)(?<!\d\.\d\d.)(?<!\d\.\d{3}.)\d{1,3}\.\d{1,3}\.\d{1,3}(?!\.?\d)"
        ),
        re.compile(r":[0-9A-Fa-f]{0,4}:[0-9A-Fa-f]{0,4}:"),
    ),
    "PHONE_NUMBER": (phones.SEVEN_DIGITS,),
    "US_SSN": (
        re.compile(
            r"[0-9](?<!(?a:\w).)[0-9]{2}"
            r"(?:[- .][0-9]{2}[- .][0-9]{4}|[0-9]{2}-?[0-9]{4}|-[0-9]{6})(?a:\b)"
        ),
    ),
}
# Values of these entities need a context word near them unless they match this.
UNAMBIGUOUS = {
    "CREDIT_CARD": re.compile(
        r"[1-68](?<!(?a:\w).)"
        r"(?:\d{13,15}|\d{3}([ -])(?:\d{4}\1\d{4}\1\d{3,4}|\d{6}\1\d{4,5}))(?a:\b)"
    ),
    "PHONE_NUMBER": phones.PHONE_FORMAT,
    "US_SSN": re.compile(r"[0-9](?<!(?a:\w).)[0-9]{2}[- .][0-9]{2}[- .][0-9]{4}(?a:\b)"),
}
# their triggers contain phones.SEVEN_DIGITS
_LONG_NUMBERS = ("CREDIT_CARD", "PHONE_NUMBER", "US_SSN")

# Byte classes, for `bytes.translate`: `in` finds a run of one class ten times as fast as `re`.
# _ALNUM maps letters and digits to 'a', _LETTER_DIGIT letters to 'a' and digits to '0'.
_ALNUM = bytes(97 if chr(c).isalnum() and c < 128 else 32 for c in range(256))
_LETTER_DIGIT = bytes(48 if 48 <= c < 58 else _ALNUM[c] for c in range(256))
# _DIGITS maps digits to '0': in UTF-8 a decimal digit beyond ASCII starts with one of these bytes.
# _NOT_DIGITS are removed: the punctuation that may stand between digits (phones.BETWEEN), and all
# other bytes beyond ASCII, as some of that punctuation is among them.
DIGIT_LEAD_BYTES = b"\xd9\xdb\xdf\xe0\xe1\xea\xef\xf0"
_DIGITS = bytes(48 if 48 <= c < 58 or c in DIGIT_LEAD_BYTES else 32 for c in range(256))
_NOT_DIGITS = b"-x ().[]/~" + bytes(c for c in range(128, 256) if c not in DIGIT_LEAD_BYTES)


def hinted_entities(text: str) -> set[str]:
    """A superset of the entities whose trigger is in a text: a first, fast look at a whole text."""
    raw = text.encode("utf-8", "surrogatepass")
    hints = {"IP_ADDRESS"}  # its triggers begin with a rare character and are as fast as this
    if b"@" in raw:
        hints.add("EMAIL_ADDRESS")
    if b"aa00" in raw.translate(_LETTER_DIGIT):
        hints.add("IBAN_CODE")
    if b"a" * 26 in raw.translate(_ALNUM):
        hints.add("CRYPTO")
    if b"0" * 7 in raw.translate(_DIGITS, _NOT_DIGITS):
        hints.update(_LONG_NUMBERS)
    return hints


def is_triggered(entity: str, text: str) -> bool:
    """Whether the text contains a trigger of the entity."""
    return any(trigger.search(text) for trigger in TRIGGERS[entity])


def triggered_lines(text: str, entities: Iterable[str]) -> list[int]:
    """The numbers, from 0, of the lines that contain a trigger of one of the entities, in order."""
    numbers = set[int]()
    for trigger in (trigger for entity in entities for trigger in TRIGGERS[entity]):
        line = start = 0  # `start` is where the line begins
        while match := trigger.search(text, start):
            line += text.count("\n", start, match.start())
            numbers.add(line)
            line, start = line + 1, text.find("\n", match.end()) + 1
            if not start:
                break
    return sorted(numbers)
