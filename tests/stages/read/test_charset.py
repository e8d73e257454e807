"""Which charset wins, what happens when it lies, and that any bytes give a text that Arrow takes."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.read.charset import decode_html

GERMAN = "<p>Die Bäume wachsen über das Haus, größer als früher. Schöne Grüße aus Köln!</p>"
RUSSIAN = "<p>Привет, как дела? Сегодня хорошая погода, и мы идём гулять в парк у реки.</p>"


def meta(charset: str, text: str) -> str:
    return f"<html><head><meta charset='{charset}'></head><body>{text}</body></html>"


@pytest.mark.parametrize(
    "payload, content_type, charset, source",
    [
        (GERMAN.encode(), "text/html; charset=utf-8", "utf-8", "header"),
        (GERMAN.encode("cp1252"), 'text/html; Charset = "ISO-8859-1"', "cp1252", "header"),
        (b"\xef\xbb\xbf" + GERMAN.encode(), "text/html; charset=iso-8859-1", "utf-8", "bom"),
        (GERMAN.encode("utf-16"), None, "utf-16-le", "bom"),
        (b"\xfe\xff" + GERMAN.encode("utf-16-be"), "text/html", "utf-16-be", "bom"),
        (GERMAN.encode("utf-16-le"), "text/html; charset=utf-16", "utf-16-le", "header"),
        (meta("koi8-r", RUSSIAN).encode("koi8-r"), "text/html", "koi8-r", "meta"),
        (meta("utf-16", GERMAN).encode(), None, "utf-8", "meta"),
        (
            b"<?xml version='1.0' encoding='windows-1251'?>" + RUSSIAN.encode("cp1251"),
            None,
            "cp1251",
            "meta",
        ),
        (meta("utf-8", RUSSIAN).encode(), "text/html; charset=nonsense", "utf-8", "meta"),
        (meta("latin1", GERMAN).encode("cp1252"), "text/html; charset=utf-8", "cp1252", "meta"),
        (RUSSIAN.encode("cp1251"), "text/html", "cp1251", "detector"),
        (RUSSIAN.encode(), "text/html", "utf-8", "detector"),
        (b"", None, "utf-8", "detector"),
        ("<p>㈱①".encode("cp932"), "text/html; charset=Shift_JIS", "cp932", "header"),
        ("<p>€䶮".encode("gb18030"), "text/html; charset=gb2312", "gb18030", "header"),
    ],
)
def test_the_first_charset_that_fits_wins(payload, content_type, charset, source):
    decoded = decode_html(payload, content_type)
    assert (decoded.charset, decoded.source) == (charset, source)
    assert decoded.text == payload.decode(charset).removeprefix("\ufeff")


def test_a_meta_behind_two_thousand_bytes_is_not_seen():
    payload = b" " * 2048 + meta("koi8-r", "plain").encode()
    assert decode_html(payload, None).source == "detector"


def test_one_broken_byte_does_not_garble_a_page_of_utf8():
    payload = GERMAN.encode() * 3 + b"\xe4\xff" + GERMAN.encode()
    decoded = decode_html(payload, "text/html; charset=utf-8")
    assert (decoded.charset, decoded.source) == ("utf-8", "header")
    assert decoded.text.count("größer") == 4
    assert decoded.text.count("�") == 2


def test_a_character_cut_off_at_the_end_is_dropped():
    payload = RUSSIAN.encode()
    assert decode_html(payload + "я".encode()[:1], "text/html; charset=utf-8").text == RUSSIAN


def test_when_nothing_fits_the_first_known_charset_replaces():
    payload = meta("euc-jp", "").encode() + b"\x81\x8d\xff \xa4"
    decoded = decode_html(payload, "text/html; charset=big5")
    assert (decoded.charset, decoded.source) == ("big5hkscs", "header")
    assert "�" in decoded.text


def test_nuls_are_dropped():
    assert decode_html(b"a\0b", "text/html; charset=utf-8").text == "ab"


LABELS = [
    "utf-8",
    "utf-16",
    "gbk",
    "big5",
    "shift_jis",
    "iso-2022-jp",
    "euc-kr",
    "utf-7",
    "idna",
    "",
    "\0",
]


@given(
    st.binary() | st.binary(max_size=50).map(lambda tail: b"<meta charset=big5>" + tail),
    st.none() | st.sampled_from(LABELS).map("text/html; charset={}".format) | st.text(),
)
def test_any_bytes_give_a_text_that_arrow_takes(payload, content_type):
    text = decode_html(payload, content_type).text
    assert "\0" not in text
    assert pa.array([text], pa.large_string()).to_pylist() == [text]


@given(st.text(st.characters(exclude_characters="\0\ufeff", exclude_categories=["Cs"])))
def test_utf8_comes_back_as_it_was(text):
    assert decode_html(text.encode(), "text/html; charset=UTF-8").text == text
