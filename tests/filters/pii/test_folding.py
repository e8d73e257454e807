"""Folding: values as pages print them are found, and only they are replaced."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.pii.folding import fold
from filters.pii.scrub import Pii
from filters.pii.spans import Hit

CHARACTERS = "0123aZ -+.@()\xa0\u2009\u2011\u2013\u2212\xad\u200b\u202a１Ａ＠．日é\n%&"
TEXTS = st.lists(st.sampled_from([*CHARACTERS, "%40", "&#64;", "%2B1234567"])).map("".join)


@given(TEXTS | st.text())
def test_folded_characters_lead_back_to_theirs(text):
    folded = fold(text)
    places = [folded.original(Hit("", i, i + 1, 1.0)) for i in range(len(folded.text))]
    assert all(a.end <= b.start for a, b in pairwise(places))
    for character, place in zip(folded.text, places, strict=True):
        original = text[place.start : place.end]
        assert (
            character == original
            or character in " -"
            or fold(f"a{original}").text != f"a{original}"
            or original in "%&"
        )


@given(st.text(alphabet="0123456789aZ -.,:/()#x\n"))
def test_ascii_is_not_folded(text):
    assert fold(text).text == text


@pytest.mark.parametrize(
    "text, expected",
    [
        ("IBAN DE89\xa03704\xa00044\xa00532\xa00130\xa000!", "IBAN <IBAN_CODE>!"),
        ("DE89\u20093704\u20090044\u20090532\u20090130\u200900", "<IBAN_CODE>"),
        ("DE89–3704–0044–0532–0130–00", "<IBAN_CODE>"),
        ("4111\u202f1111\u202f1111\u202f1111", "<CREDIT_CARD>"),
        ("4111‑1111‑1111‑1111", "<CREDIT_CARD>"),
        ("3782—822463—10005", "<CREDIT_CARD>"),
        ("４１１１ １１１１ １１１１ １１１１", "<CREDIT_CARD>"),
        ("4111\xad1111\u200b11111111", "<CREDIT_CARD>"),
        ("SSN: 536‑22‑1234, 536–22–1234", "SSN: <US_SSN>, <US_SSN>"),
        ("５３６−２２−１２３４", "<US_SSN>"),
        ("Tel.:\xa0030\u2009901820", "Tel.:\xa0<PHONE_NUMBER>"),
        ("call \u202a+1\u202f212\u202f555\u202f0147\u202c now", "call \u202a<PHONE_NUMBER>\u202c now"),
        ("☎ ＋４９ ３０ ９０１８２０", "☎ <PHONE_NUMBER>"),
        ("jane＠doe-inc．com", "<EMAIL_ADDRESS>"),
        ("jane&#64;doe-inc.com", "<EMAIL_ADDRESS>"),
        ("mailto:jane%40doe-inc.com?subject=hi", "mailto:<EMAIL_ADDRESS>?subject=hi"),
        ("/u?email=jane.doe%40mail.org&x=1", "/u?email=<EMAIL_ADDRESS>&x=1"),
        ("https://a.example/u?email=jane@doe.org&x=1", "https://a.example/u?email=<EMAIL_ADDRESS>&x=1"),
        ("https://wa.me/12125550187", "https://wa.me/<PHONE_NUMBER>"),
        ("tel:%2B12125550187", "tel:<PHONE_NUMBER>"),
        ("é\xa0à 1939–1945, 100%40x", "é\xa0à 1939–1945, 100%40x"),
    ],
)  # fmt: skip
def test_a_value_is_found_however_it_is_printed(text, expected):
    assert Pii().scrub(text).text == expected
    assert Pii().scrub(expected).text == expected


def test_a_value_has_one_surrogate_in_all_its_forms(tmp_path):
    (tmp_path / "key").write_bytes(b"0123456789abcdef")
    pii = Pii(mode="surrogate", key_file=str(tmp_path / "key"))
    forms = (
        "4111 1111 1111 1111",
        "4111\xa01111\xa01111\xa01111",
        "４１１１１１１１１１１１１１１１",
    )
    assert len({pii.scrub(form).text for form in forms}) == 1
