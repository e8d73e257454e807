"""What makes two words equal, in every script, against a slow normalizer."""

import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from filters.text import words
from filters.text.words import normalize, word_places
from tests.support.words_reference import is_known, slow_normalize

NASTY = [
    *("", " ", "***", "—", "İΣΣ ǅ", "e\u0301\u0345", " \u0301 ", "a\u0301\x00b", "\ud800x"),
    *(
        "１２３ ٣ ²",
        "각 नमस्ते",
        "_a__b_",
        "東京はabc日本1",
        "\U0001d7d9z",
        "ﷺ ﬁ ㋿",
        "\u3099",
        "ก\u200bิน",
    ),
]
ALPHABET = "aΣİé'’أَिำิ. \u0301\u200b\u00ad東ーが각ﾊﾞᅠ1२２-_\n\u1039"
TEXTS = (
    st.text().filter(lambda text: all(map(is_known, unicodedata.normalize("NFKD", text))))
    | st.text(alphabet=ALPHABET)
    | st.sampled_from(NASTY)
)


@given(TEXTS)
def test_normalize_equals_the_slow_way(text):
    assert normalize(text) == slow_normalize(text)


def test_normalize_equals_the_slow_way_on_every_code_point():
    """All but the second plane's scripts related to Brahmi and marks of minor scripts; one in 97
    ideographs and unassigned code points.
    """
    points = map(chr, (*range(0x11000), *range(0x12000, 0x20000), *range(0x20000, 0x110000, 97)))
    text = "".join(f"{c}x {c} " for c in points if is_known(c))
    assert normalize(text) == slow_normalize(text)


@given(st.text() | TEXTS)
def test_normalize_is_total_and_idempotent(text):
    once = normalize(text)
    assert normalize(once) == once == once.strip()


@given(TEXTS)
def test_word_places_match_the_words(text):
    forms = [unicodedata.normalize("NFKD", part) for part in (text, *text)]
    assume(forms[0] == "".join(forms[1:]))
    starts, ends = map(np.ndarray.tolist, word_places(text))
    # one character may be several words: 'ำ' is two
    for word, start, end in zip(normalize(text).split(), starts, ends, strict=True):
        assert word in normalize(text[start:end]).split()


HINDI = "आज प्रधान मंत्री नरेंद्र मोदी ने कहा"
ARABIC = "بِسْمِ اللَّهِ الرَّحْمٰنِ الرَّحِيمِ الحمد لله"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Crème — brûlée, 2024!", "creme brulee 2024"),
        ("don't don’t", "dont dont"),
        ("我们在2024年，使用Ray。", "我 们 在 2024 年 使 用 ray"),
        (HINDI, HINDI),
        ("বাংলা ভাষা তুমি", "বাংলা ভাষা তুমি"),
        ("தமிழ் மொழி", "தமிழ் மொழி"),
        (ARABIC, "بسم الله الرحمن الرحيم الحمد لله"),
        ("بـــسم أُمّة ٱلله", "بسم امة الله"),
        ("בְּרֵאשִׁית בָּרָא", "בראשית ברא"),
        ("❤\ufe0f 1\ufe0f\u20e3 е\ufe2eр", "1 ер"),
        ("が\u200bある", "が あ る"),
        ("ภราดรภาพ และสิทธิ", "ภราดรภาพ และสิ ทธิ"),
        ("in\u00adter\u200bna\u2060tion\u200dal \u200frtl\u200e", "international rtl"),
        ("１２ Ａｂ ﬁn १२ ٣", "12 ab fin 12 3"),
    ],
)
def test_words_of_a_script(text, expected):
    assert normalize(text) == unicodedata.normalize("NFD", expected)


@pytest.mark.parametrize("text", ["각하 한국어", "कि क़लम", "ো য়", "தொகை", "น้ำ", "が ﾊﾟ", "é", "आ ऑ"])
def test_all_normal_forms_of_a_text_are_equal(text):
    forms = [unicodedata.normalize(form, text) for form in ("NFC", "NFD", "NFKC", "NFKD")]
    assert len({normalize(form) for form in [text, *forms]}) == 1


@pytest.mark.parametrize(
    "one, other",
    [
        ("दिल", "दाल"),
        ("কি", "কা"),
        ("கல்", "கால்"),
        ("กิน", "กัน"),
        ("ກິນ", "ກັນ"),
        ("ကို", "ကား"),
        ("かき", "がき"),
        ("ハリ", "パリ"),
        ("69 mm", "70 mm"),
    ],
)
def test_words_that_differ_in_a_vowel_a_voice_or_a_number_are_different(one, other):
    assert normalize(one) != normalize(other)


def test_a_page_of_combining_marks_is_normalized_piece_by_piece(monkeypatch):
    longest = []
    normalize_form = unicodedata.normalize

    def recorded(form, text):
        longest.append(len(text))
        return normalize_form(form, text)

    functions = {**vars(unicodedata), "normalize": recorded}
    monkeypatch.setattr(words, "unicodedata", SimpleNamespace(**functions))
    text = "a" + "\u0301\u0316" * 20_000 + " Ünïcode \u1100\u1161 end"
    assert words.decomposed("é" * 5000) == normalize_form("NFD", "é" * 5000)
    assert normalize(text).startswith("a unicode")
    assert max(longest) <= 2048
