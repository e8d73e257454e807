"""Toxicity: listed words and phrases, scripts without spaces, and the slow way as the oracle."""

import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters import first_failure
from filters.text.view import TextView
from filters.toxicity import Toxicity, _spelled

LISTS = {
    "en": "darn\nbloody hell\ng-spot\n🖕\nhell\n",
    "ja": "くそ\nsm\n",
    "xx": "\n",
    "hi": "चूत\n",
    "zz": "b d a\nd\n",
}


@pytest.fixture(scope="module")
def lists(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("lists")
    for name, text in LISTS.items():
        (folder / name).write_text(text, encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize(
    "text, language, count, ratio",
    [
        ("Darn it, DARN!", "en", 2, 8 / 10),
        ("darned darning", "en", 0, 0.0),  # whole words only
        (
            "oh bloody  hell, hell",
            "en",
            2,
            14 / 16,
        ),  # the phrase, then the word; not the word within the phrase
        ("bloody-hell", "en", 1, 1.0),
        ("the g-spot", "en", 1, 5 / 8),
        ("fine 🖕", "en", 1, 1 / 4),
        ("🖕", "en", 1, 1.0),
        ("これはくそだ sm smart", "ja", 2, 4 / 13),  # inside a run of kana, but "sm" only as a word
        ("darn", "de", 0, 0.0),  # no list of that language
        ("darn", None, 0, 0.0),
        ("darn", "xx", 0, 0.0),  # an empty list
        ("", "en", 0, 0.0),
        ("bloody bloody hell darn", "en", 2, 14 / 20),
        ("चेतना चित्त", "hi", 0, 0.0),  # vowel signs belong to the word
        ("चूत", "hi", 1, 1.0),
        ("e e d e b d", "zz", 2, 2 / 6),  # one stands within the beginning of another
    ],
)
def test_what_is_listed(
    lists: str, text: str, language: str | None, count: int, ratio: float
) -> None:
    scores = Toxicity(lists=lists).measure(TextView(text, language))
    assert (scores["listed_count"], scores["listed_ratio"]) == (count, pytest.approx(ratio))
    assert scores["list"] == (language if language in LISTS else None)


def test_share_of_listed_letters_rejects(lists: str) -> None:
    filter = Toxicity(lists=lists)
    failure = first_failure("toxicity", filter, filter.measure(TextView("darn it", "en")))
    assert failure is not None and failure.rule == "toxicity.listed_ratio"
    assert (
        first_failure("toxicity", filter, filter.measure(TextView("well " * 200 + "darn", "en")))
        is None
    )


@given(
    st.lists(
        st.sampled_from(["darn", "hell", "bloody", "it", "Darn", ",", "-", "\n", "x"]), max_size=12
    ).map(" ".join)
)
def test_same_as_trying_every_entry_at_every_word(text: str) -> None:
    entries = [["bloody", "hell"], ["darn"], ["hell"]]  # longest first
    words, at, count = re.findall(r"[a-z]+", text.lower()), 0, 0
    while at < len(words):
        taken = next((len(e) for e in entries if words[at : at + len(e)] == e), 0)
        count, at = count + (taken > 0), at + max(1, taken)
    assert Toxicity(lists=str(FOLDER)).measure(TextView(text, "en"))["listed_count"] == count


FOLDER = Path(__file__).parent / "lists"


@given(st.text() | st.text("aB1_- \n.é\u0301\u0942चわ\ud800\0İ"))
def test_words_are_spelled_as_a_slow_search_finds_them(text: str) -> None:
    words, letters = [""], 0
    for c in text:
        is_letter = c.isalnum() or (ord(c) < 0x10000 and unicodedata.category(c)[0] == "M")
        letters += is_letter
        words = [*words[:-1], words[-1] + c] if is_letter else [*words, ""]
    assert _spelled(text) == (" ".join(["", *filter(None, words), ""]), letters)


@given(st.text())
def test_total_on_every_string(text: str) -> None:
    scores = Toxicity(lists=str(FOLDER)).measure(TextView(text, "en"))
    assert 0 <= scores["listed_ratio"] <= 1 and scores["listed_count"] >= 0


@pytest.mark.parametrize(
    "settings, languages, message",
    [
        ({}, ("en",), "name a folder of word lists"),
        (
            {"lists": "nowhere"},
            ("en",),
            "no file named 'en' for that language, only no file at all",
        ),
        ({"lists": str(FOLDER)}, ("en", "de"), "no file named 'de' for that language, only en"),
    ],
)
def test_lists_that_are_missing_stop_the_run(
    settings: dict, languages: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Toxicity(**settings).check(languages)


def test_lists_that_are_there_pass(lists: str) -> None:
    Toxicity(lists=lists).check(("en", "ja"))


@pytest.mark.corpus
def test_ldnoobw_files_load(corpus: Path) -> None:
    folder = corpus / "lists" / "badwords"
    for language in ("en", "de", "ja", "zh", "ru"):
        entry = next(
            line
            for line in (folder / language).read_text(encoding="utf-8").splitlines()
            if line.strip()
        )
        assert (
            Toxicity(lists=str(folder)).measure(TextView(f"{entry} .", language))["listed_count"]
            >= 1
        )
