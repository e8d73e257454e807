"""URL policy, opt-out signals, language, and the rules that all filters share."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from filters import apply, available, files, filter_class, first_failure, rules, settings
from filters.c4 import C4
from filters.gopher_quality import GopherQuality
from filters.language import Language
from filters.license import License
from filters.opt_out import in_headers, in_metas
from filters.text.view import TextView
from filters.url_lists import host_of
from filters.url_policy import UrlPolicy

NASTY = [
    "",
    "http://[",
    "//",
    "http://a\udcff.com/",
    "https://user@HOST.com:80/x",
    "http://" + "a." * 500,
]


@pytest.fixture
def policy(tmp_path):
    (tmp_path / "adult").mkdir()
    (tmp_path / "adult" / "domains").write_text("Bad.example\n# a comment\n")
    (tmp_path / "adult" / "urls").write_text("blog.example/dark\nhost.example/a/b\n")
    (tmp_path / "words").write_text("casino\nfree money\n")
    return UrlPolicy(
        blocked_lists=(str(tmp_path / "adult"),), blocked_words=(str(tmp_path / "words"),)
    )


@pytest.mark.parametrize(
    "url, expected",
    [
        ("https://bad.example/", ("host", "bad.example")),
        ("https://WWW.Sub.Bad.Example:8080/x", ("host", "bad.example")),
        ("https://notbad.example/", None),
        ("https://blog.example/dark", ("url", "blog.example/dark")),
        ("https://www.blog.example/Dark/page?x=1", ("url", "blog.example/dark")),
        ("https://blog.example/darkness", None),
        ("https://host.example/a/bc", None),
        ("https://host.example/a/b#top", ("url", "host.example/a/b")),
        ("https://ok.example/best-CASINO-here", ("word", "casino")),
        ("https://ok.example/casinos", None),
        ("https://ok.example/free/money", ("word", "free money")),
    ],
)
def test_lists_block_hosts_prefixes_and_whole_words(policy, url, expected):
    blocked = policy.blocked_by(url)
    assert (blocked and tuple(blocked)) == expected


@given(st.text() | st.sampled_from(NASTY))
def test_url_policy_is_total(url):
    UrlPolicy().blocked_by(url)
    assert isinstance(host_of(url), str)


def test_a_list_that_is_not_there_says_so():
    with pytest.raises(ValueError, match="no such file or folder: /nowhere"):
        UrlPolicy(blocked_lists=("/nowhere",)).blocked_by("https://a.example/")


@pytest.mark.parametrize(
    "headers, expected",
    [
        ({"x-robots-tag": "noindex, NoAI"}, "x-robots-tag: noai"),
        ({"x-robots-tag": "otherbot: noai"}, "x-robots-tag: noai"),
        ({"x-robots-tag": "noindex"}, None),
        ({"tdm-reservation": "1"}, "tdm-reservation: 1"),
        ({"tdm-reservation": "0"}, None),
        ({"tdm-reservation": "1, 0"}, "tdm-reservation: 1"),
        ({"x-robots-tag": "noai noimageai"}, "x-robots-tag: noai"),
        ({"x-robots-tag": "noimageai;noai"}, "x-robots-tag: noai"),
        ({"x-robots-tag": "noml"}, "x-robots-tag: noml"),
        ({"x-robots-tag": "noimageai"}, None),
        ({}, None),
    ],
)
def test_opt_out_headers(headers, expected):
    assert in_headers(headers) == expected


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("Robots", "NOAI", "meta robots: noai"),
        (" robots ", "noimageai, noai", "meta robots: noai"),
        ("robots", "noindex", None),
        ("tdm-reservation", "1", "meta tdm-reservation: 1"),
        ("tdm-reservation", "0", None),
        ("description", "noai", None),
        ("GPTBot", "noindex; noai", "meta gptbot: noai"),
        ("anthropic-ai", "noml", "meta anthropic-ai: noml"),
        ("X-Robots-Tag", "noai", "meta x-robots-tag: noai"),
        ("", "noai", None),
    ],
)
def test_opt_out_metas(name, content, expected):
    assert in_metas([("robots", "index"), (name, content), ("viewport", "")]) == expected


@given(st.lists(st.tuples(st.text(), st.text())))
def test_opt_out_metas_are_total(metas):
    in_metas(metas)


@pytest.mark.parametrize(
    "allowed, license, kept",
    [
        ((), None, True),
        (("cc-by-4.0",), None, False),
        (("cc-by-4.0",), "", False),
        (("cc-by-4.0", "cc0-*"), "cc0-1.0", True),
        (("CC-BY-*",), "cc-by-nc-4.0", True),
        (("cc-by-4.0",), "cc-by-4.0-x", False),
        (("cc-by-[0-9]*",), "cc-by-4.0", True),
        (("cc-by-[0-9]*",), "cc-by-nc-4.0", False),
        (("*",), "https://mill.example/terms", True),
        (("*",), None, False),
    ],
)
def test_licenses_match_patterns(allowed, license, kept):
    assert License(allowed=allowed).allows(license) is kept


@pytest.mark.parametrize(
    "text, language",
    [
        ("The house on the hill has been empty for a very long time.", "en"),
        ("Das Haus auf dem Hügel steht schon sehr lange leer.", "de"),
        ("", "und"),
        ("   \n ", "und"),
    ],
)
def test_language_of_plain_sentences(text, language):
    assert Language().guess(text).language == language


@given(st.text() | st.sampled_from(["\udcff", "\0", "\n" * 99]))
def test_language_is_total_and_a_probability(text):
    guess = Language().guess(text)
    assert 0.0 <= guess.score <= 1.0
    assert 0.0 <= Language().probability_allowed(Language().guesses(text, k=10)) <= 1.0


@pytest.mark.parametrize("name", available())
def test_every_filter_measures_exactly_its_rules(name):
    cls = filter_class(name)
    declared = {*rules(cls()), *settings(cls()), *files(cls())}
    assert rules(cls()) and declared == {f.name for f in dataclasses.fields(cls)}


def test_an_unknown_filter_names_the_nearest():
    with pytest.raises(
        ValueError, match="unknown filter 'gofer_quality'; did you mean 'gopher_quality'"
    ):
        filter_class("gofer_quality")


def test_nan_breaks_a_rule_and_off_does_not():
    scores = dict.fromkeys(rules(GopherQuality()), math.nan)
    assert (
        first_failure("gopher_quality", GopherQuality(), scores).rule == "gopher_quality.word_count"
    )
    off = TypeAdapter(GopherQuality).validate_python(dict.fromkeys(scores, "off"))
    assert first_failure("gopher_quality", off, scores) is None


def test_bounds_are_inclusive_and_in_order():
    filter = GopherQuality(word_count=(3, 5))
    good = {rule: bound[0] if bound else 0.0 for rule, bound in rules(filter).items()}
    assert first_failure("g", filter, good | {"word_count": 5.0}) is None
    assert first_failure("g", filter, good | {"word_count": 5.1}).bound == (3.0, 5.0)
    with pytest.raises(ValidationError, match="low must not exceed high"):
        TypeAdapter(GopherQuality).validate_python({"word_count": [5, 3]})


ENGLISH = "The miller opened the sluice before the sun had risen over the hill."
GERMAN = "Der Müller öffnete das Wehr, bevor die Sonne über dem Hügel aufgegangen war."


@pytest.mark.parametrize(
    "lines, share",
    [
        ([ENGLISH], 1.0),
        ([ENGLISH, GERMAN], 0.5),
        ([ENGLISH, "Foo", "", GERMAN, ENGLISH, ENGLISH], 0.75),  # too short to tell
        ([GERMAN], 0.0),
        (["Foo", "12"], 1.0),  # nothing speaks against it
        ([], 1.0),
    ],
)
def test_share_of_lines_in_a_language(lines, share):
    assert Language().line_share_of("\n".join(lines), "en") == share


@pytest.mark.parametrize(
    "lines",
    [
        ["-" * 80],
        ["12.5 13.7 88.1 14.2 99.0 12.1 11.2 13.4 15.6"],
        ["2021-03-29 10:15:00 " * 3],
        ["🙂" * 20],
    ],
)
def test_lines_without_a_letter_are_in_no_language(lines):
    german = "Der Müller öffnete das Wehr, bevor die Sonne über dem Hügel stand."
    assert Language().line_share_of("\n".join([german, *lines]), "de") == 1.0
    assert Language().guess(lines[0]) == ("und", 0.0)


def test_a_line_of_chinese_needs_fewer_characters():
    chinese = "今天天气很好，我们一起去公园散步吧。孩子们都非常高兴。"
    english = "Nobody in the village remembered when the wheel had last been mended."
    assert Language().line_share_of("\n".join([chinese] * 5 + [english]), "zh") == pytest.approx(
        5 / 6
    )


@given(st.text())
def test_share_of_lines_is_total(text):
    assert 0 <= Language().line_share_of(text, "en") <= 1


def test_filters_apply_with_what_they_hand_on():
    view = TextView(f"{ENGLISH}\ntoo short", "en")
    edited, measured = apply(C4(), view)
    assert edited.text == ENGLISH and edited.language == "en" and measured["sentence_count"] == 1
    same, measured = apply(GopherQuality(), view)
    assert same is view and measured["word_count"] > 0
