"""The cost of scrubbing grows with the text: of thousands of values in a row, none waits for the one
before. Counted in characters read and numbers parsed, not in seconds.
"""

import random

import phonenumbers.phonenumbermatcher as matcher
import pytest

from filters.pii import pieces
from filters.pii.scrub import Pii

LENGTH = 6_000
NUMBERS = [random.Random(0).randrange(10**10) for _ in range(1_000)]


def cards():
    """Numbers with a valid last digit by Luhn's test."""
    for number in NUMBERS:
        digits = [4, 2, 9, 1, 4, *map(int, f"{number:010}")]
        doubled = sum(sum(divmod(2 * digit, 10)) for digit in digits[::2])
        yield "".join(map(str, digits)) + str(-(doubled + sum(digits[1::2])) % 10)


MANY = {
    "cards": list(cards()),
    "grouped cards": [f"{c[:4]} {c[4:8]} {c[8:12]} {c[12:]}" for c in cards()],
    "US": [f"{212 + n % 700}-555-{n % 10_000:04}" for n in NUMBERS],
    "(US)": [f"({212 + n % 700}) 555-{n % 10_000:04}" for n in NUMBERS],
    "FR": [
        "0{} {} {} {} {}".format(1 + n % 9, *(10 + n // 10**k % 90 for k in range(4)))
        for n in NUMBERS
    ],
    "GB": [f"+44 20 {7000 + n % 3000} {n // 10**6:04}" for n in NUMBERS],
    "labeled": [f"tel: {n % 900 + 100} {n // 10**6:04}" for n in NUMBERS],
    "addresses": [f"a{n}@b{n % 1000}.org" for n in NUMBERS],
    "IP": [f"93.{184 + n % 70}.{n % 256}.{10 + n % 200}" for n in NUMBERS],
    "SSN": [f"{100 + n % 500}-{10 + n % 89}-{1000 + n % 8999}" for n in NUMBERS],
    "ZIP": [f"{n % 90_000 + 10_000}-{1000 + n % 8999}" for n in NUMBERS],
}


@pytest.mark.parametrize("separator", [" ", "", ", ", "-", "/", "\xa0"])
@pytest.mark.parametrize("kind", MANY)
def test_values_in_a_row_are_read_a_few_times(kind, separator, monkeypatch):
    read = parsed = 0
    cut_piece, parse = pieces.cut_piece, matcher.PhoneNumberMatcher._parse_and_verify

    def counted_piece(line, start):
        nonlocal read
        piece = cut_piece(line, start)
        read += piece.end - start
        return piece

    def counted_parse(self, candidate, offset):
        nonlocal parsed
        parsed += 1
        return parse(self, candidate, offset)

    monkeypatch.setattr(pieces, "cut_piece", counted_piece)
    monkeypatch.setattr(matcher.PhoneNumberMatcher, "_parse_and_verify", counted_parse)
    Pii().scrub(separator.join(MANY[kind])[:LENGTH])
    assert read <= 12 * LENGTH and parsed <= 2 * LENGTH


@pytest.mark.parametrize("separator", [" ", "-", "/"])
def test_all_cards_in_a_row_are_replaced(separator):
    scrubbed = Pii().scrub(separator.join(MANY["cards"][:200]))
    assert scrubbed.text == separator.join(["<CREDIT_CARD>"] * 200)
