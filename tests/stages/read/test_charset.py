"""Which charset wins, what happens when it lies, and that any bytes give a text that Arrow takes."""

import struct
from itertools import product
from typing import get_args

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.read.charset import _decode, decode_html
from tests.support.charset_pages import ENCODINGS, Damage, pages

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


def test_a_meta_behind_two_thousand_bytes_is_seen():
    payload = b"<style>" + b" " * 70_000 + b"</style>" + meta("koi8-r", RUSSIAN).encode("koi8-r")
    assert decode_html(payload, None)[1:] == ("koi8-r", "meta")


def test_an_undeclared_page_in_utf16_is_read():
    assert decode_html(RUSSIAN.encode("utf-16-be"), None)[:2] == (RUSSIAN, "utf-16-be")


def test_a_header_cannot_make_ascii_utf16():
    assert decode_html(GERMAN.encode("cp1252"), "text/html; charset=utf-16").text == GERMAN


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


JAPANESE = "秋になると、山の色が少しずつ変わり、朝の空気も冷たくなります。"
# label, Python's codec, a text in it
LEGACY = [
    ("euc-jp", "euc_jp", JAPANESE),
    ("shift_jis", "cp932", JAPANESE),
    ("iso-2022-jp", "iso2022_jp", JAPANESE),
    ("gb2312", "gb2312", "北京的秋天总是来得很快，街道两旁的银杏树在一夜之间变成金黄色。"),
    ("hz-gb-2312", "hz", "北京的秋天总是来得很快，街道两旁的银杏树在一夜之间变成金黄色。"),
    ("big5", "big5", "北京的秋天總是來得很快，街道兩旁的銀杏樹在一夜之間變成金黃色。"),
    ("euc-kr", "euc_kr", "가을이 되면 산의 색이 조금씩 변하고 아침 공기도 차가워집니다."),
    ("iso-2022-kr", "iso2022_kr", "가을이 되면 산의 색이 조금씩 변하고 아침 공기도 차가워집니다."),
    ("windows-1255", "cp1255", "בסתיו משתנים צבעי ההרים לאט לאט והאוויר בבוקר נעשה קר."),
    ("windows-1253", "cp1253", "Το φθινόπωρο τα χρώματα των βουνών αλλάζουν σιγά σιγά."),
    ("windows-874", "cp874", "ในฤดูฝนชาวนาในหมู่บ้านจะเริ่มปลูกข้าวตั้งแต่เช้ามืด"),
    ("x-mac-cyrillic", "mac-cyrillic", "Осенью цвета гор понемногу меняются."),
    ("utf-8", "utf-8", JAPANESE),
]


@pytest.mark.parametrize("label, codec, text", LEGACY, ids=[row[0] for row in LEGACY])
@given(data=st.data(), stray=st.integers(0x80, 0xFF), in_header=st.booleans())
def test_one_bad_byte_damages_one_paragraph(label, codec, text, data, stray, in_header):
    text = text.replace("，", "") if codec == "big5" else text
    paragraphs = [f"<p>{text}</p>\n".encode(codec) for _ in range(4)]
    at = data.draw(st.integers(3, len(paragraphs[1]) - 5))
    paragraphs[1] = paragraphs[1][:at] + bytes([stray]) + paragraphs[1][at:]
    declaration = "" if in_header else f"<meta charset={label}>"
    page = b"".join([declaration.encode(), b"<title>t</title>\n", *paragraphs])
    decoded = decode_html(page, f"text/html; charset={label}" if in_header else "text/html")
    assert decoded.text.count(f"<p>{text}</p>\n") >= 3
    assert decoded.source == ("header" if in_header else "meta")


@pytest.mark.parametrize("label, codec, text", LEGACY, ids=[row[0] for row in LEGACY])
def test_a_title_cut_at_any_byte_does_not_garble_the_page(label, codec, text):
    title, body = text.encode(codec), f"</title><p>{text}</p>".encode(codec)
    for cut in range(2, len(title)):
        page = b"<title>" + title[:cut] + body
        assert decode_html(page, f"text/html; charset={label}").text.endswith(
            f"</title><p>{text}</p>"
        )


@pytest.mark.parametrize("codec", ["euc_jp", "iso2022_jp_ext"])
def test_every_character_of_jis_is_decoded_as_in_cp932(codec):
    rows = range(0x21, 0x7F)
    missing = 0
    for row, cell in product(rows, rows):
        lead, odd = divmod(row - 0x21, 2)
        trail = cell + 0x7E if odd else cell + (0x20 if cell > 0x5F else 0x1F)
        expected = bytes([lead + (0x81 if lead < 31 else 0xC1), trail]).decode("cp932", "replace")
        pair = bytes([row | 0x80, cell | 0x80])
        if codec == "iso2022_jp_ext":
            pair = b"\x1b$B" + bytes([row, cell]) + b"\x1b(B"
        text = _decode(pair, codec)[0]
        if "\ue000" <= expected[0] <= "\uf8ff" or expected[0] == "�" or len(expected) > 1:
            continue
        assert text == expected or text in "〜‖−¢£¬\\", (row, cell)  # two names of one character
        missing += text == "�"
    assert missing == 0


@pytest.mark.parametrize(
    "label, codec",
    [("iso-2022-jp", "iso2022_jp"), ("hz-gb-2312", "hz"), ("iso-2022-kr", "iso2022_kr")],
)
def test_escape_sequences_decide_whatever_is_declared(label, codec):
    text = next(text for name, _, text in LEGACY if name == label)
    for content_type in ("text/html", "text/html; charset=utf-8", "text/html; charset=euc-kr"):
        assert decode_html(text.encode(codec), content_type).text == text


def test_utf8_is_utf8_whatever_is_declared():
    page = meta("iso-8859-1", "It’s open").encode()
    assert decode_html(page, "text/html; charset=iso-8859-1").charset == "utf-8"
    # two characters of GBK that are valid UTF-8 by chance
    assert decode_html("联通".encode("gbk"), "text/html; charset=gbk").text == "联通"


def test_a_stray_byte_is_no_character_of_python():
    page = meta("shift_jis", JAPANESE).encode("cp932") + b"\xff<p>"
    assert decode_html(page, None).text.endswith("\ufffd<p>")
    wide = meta("gb2312", "北京").encode("gbk") + b"\xa3\xa0"
    assert decode_html(wide, None).text.endswith("\u3000")


def test_surrogates_in_utf8_become_the_character():
    emoji = "😀".encode("utf-16-be").decode("utf-16-be")
    cesu8 = b"".join(
        chr(unit).encode("utf-8", "surrogatepass")
        for unit in struct.unpack(">2H", "😀".encode("utf-16-be"))
    )
    assert decode_html(b"<p>open " + cesu8, "text/html; charset=utf-8").text == f"<p>open {emoji}"


def test_few_good_characters_are_enough_for_utf8_that_is_declared_twice():
    page = meta("utf-8", "It’s the ").encode() + b"caf\xe9, the r\xf4le of cr\xe8me"
    decoded = decode_html(page, "text/html; charset=utf-8")
    assert "It’s the" in decoded.text and decoded.text.count("�") == 3
    none = meta("utf-8", "The ").encode() + b"caf\xe9."
    assert decode_html(none, "text/html; charset=utf-8").text.endswith("café.")


@pytest.mark.corpus
@pytest.mark.parametrize("label, codec, languages", ENCODINGS, ids=[row[0] for row in ENCODINGS])
def test_no_declared_page_is_garbled(corpus, label, codec, languages):
    for declared, damage in product(("both", "header", "meta"), get_args(Damage)):
        made = pages(label, codec, languages, declared=declared, damage=damage, number=5)
        assert not any(page.garbled() for page in made)


def test_nuls_are_dropped():
    assert decode_html(b"a\0b", "text/html; charset=utf-8").text == "ab"


LABELS = [label for label, _, _ in ENCODINGS] + ["utf-16", "utf-7", "idna", "", "\0"]
PIECES = [
    b"\x1b$B",
    b"\x1b(B",
    b"\x1b",
    b"\x1b$)C",
    b"\x0e",
    b"\x0f",
    b"~{",
    b"~}",
    b"</p>",
    b'$"=',
]


@given(
    st.lists(st.binary(max_size=9) | st.sampled_from(PIECES)).map(b"".join),
    st.none() | st.sampled_from(LABELS),
    st.none() | st.sampled_from(LABELS).map("text/html; charset={}".format) | st.text(),
)
def test_any_bytes_give_a_text_that_arrow_takes(payload, label, content_type):
    declaration = b"" if label is None else f"<meta charset={label}>".encode()
    text = decode_html(declaration + payload, content_type).text
    assert "\0" not in text
    assert pa.array([text], pa.large_string()).to_pylist() == [text]


@given(st.text(st.characters(exclude_characters="\0\ufeff", exclude_categories=["Cs"])))
def test_utf8_comes_back_as_it_was(text):
    assert decode_html(text.encode(), "text/html; charset=UTF-8").text == text
