"""Numbers for every block of every page, and what of the page each depends on."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.extract.blocks.features import (
    NAMES,
    Lexicon,
    features,
    name_words,
    word_counts,
    words_in,
)
from stages.extract.blocks.walk import walk
from tests.stages.extract.blocks.pages import pages
from tests.support.texts import NASTY

LEXICON = Lexicon(
    words={"one": 1.5, "two": -0.5, "漢字": 2.0, "\ud800": 7.0},
    names={"linen": 1.0, "x": -2.0},
    tags={"p": 0.5, "li": -1.0},
)
PAGES = pages() | st.text() | st.sampled_from(NASTY)
URLS = st.text() | st.sampled_from(["", "http://[", "https://mill.example/a-b/2024/x.html?q=1#f"])


def row(columns, name):
    return columns[NAMES.index(name)]


@given(PAGES, URLS)
def test_features_are_finite_for_every_page_and_url(html, url):
    page = walk(html)
    columns = features(page, url, LEXICON)
    assert columns.shape == (len(NAMES), len(page.texts))
    assert columns.dtype == np.float32
    assert np.isfinite(columns).all()
    assert (columns == features(page, url, LEXICON)).all()


def test_names_are_unique():
    assert len(set(NAMES)) == len(NAMES)


@given(PAGES)
def test_shares_are_between_0_and_1(html):
    columns = features(walk(html), "", LEXICON)
    for name in ("title_share", "title_recall", "link_share", "strong_share", "words_before"):
        assert ((row(columns, name) >= 0) & (row(columns, name) <= 1)).all(), name
    for name in (name for name in NAMES if "_share" in name):
        assert ((row(columns, name) >= 0) & (row(columns, name) <= 1.0001)).all(), name


# of a block these depend on nothing but itself, its elements and what is before it
OF_THE_BLOCK = (
    *("words", "chars", "lines", "sentence_marks", "score", "score_sum", "title_share"),
    *("title_recall", "link_share", "strong_share", "ends_sentence", "heading", "depth"),
    *("lowest_name", "highest_name", "sum_of_names", "index", "from_heading", "heading_words"),
    *("from_long", "words_before_3", "links_before_8", "score_before_20"),
    *(name for name in NAMES if name.startswith("in_")),
)


@given(PAGES, st.sampled_from(["one two three", "漢字", "# x"]))
def test_a_block_behind_changes_nothing_of_a_block_itself(html, text):
    page = walk(html)
    longer = replace(
        page,
        texts=[*page.texts, text],
        owners=[*page.owners, 0],
        links=[*page.links, 0],
        link_chars=[*page.link_chars, 1],
        strong_chars=[*page.strong_chars, 0],
        end_block=[len(page.texts) + 1, *page.end_block[1:]],
    )
    before, after = features(page, "", LEXICON), features(longer, "", LEXICON)
    for name in OF_THE_BLOCK:
        assert row(after, name)[:-1] == pytest.approx(row(before, name), abs=1e-4), name


@given(PAGES)
def test_words_and_scores_are_those_of_each_text_alone(html):
    page = walk(html)
    columns = features(page, "", LEXICON)
    assert row(columns, "words").tolist() == word_counts(page).tolist()
    for i, text in enumerate(page.texts):
        words = words_in(text.replace("\ud800", " "))
        score = sum(LEXICON.words.get(word.decode("utf-8", "surrogatepass"), 0) for word in words)
        assert row(columns, "score_sum")[i] == pytest.approx(score, abs=1e-4)
        assert row(columns, "words")[i] >= len(words)
        assert row(columns, "chars")[i] == len(text)
        assert row(columns, "lines")[i] == text.count("\n")
        assert row(columns, "copies")[i] == page.texts.count(text)


@given(PAGES, st.integers(1, 20))
def test_the_parts_of_long_pages_change_nothing(html, size):
    page = walk(html)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.extract.blocks.features._PART", size)
        in_parts = features(page, "", LEXICON)
    assert in_parts == pytest.approx(features(page, "", LEXICON), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(
    "name, words",
    [
        ("postBody-2", {"post", "body"}),
        ("HTMLPage x_y", {"html", "page", "x", "y"}),
        ("12 -", set()),
    ],
)
def test_words_of_names(name, words):
    assert set(name_words(name)) == words


def test_flags_and_positions_of_an_example():
    html = "<title>Mill</title><nav><a href=x>Menu</a></nav><main><h1>The Mill</h1><p>It turns. It turns."
    columns = features(walk(html), "https://mill.example/a/b-2024", Lexicon())
    assert row(columns, "in_nav").tolist() == [1, 0, 0]
    assert row(columns, "in_main").tolist() == [0, 1, 1]
    assert row(columns, "link_share").tolist() == [1, 0, 0]
    assert row(columns, "heading").tolist() == [0, 1, 0]
    assert row(columns, "from_title").tolist() == [-1, 0, 1]
    assert row(columns, "sentence_marks").tolist() == [0, 0, 2]
    assert row(columns, "words").tolist() == [1, 2, 4]
    assert row(columns, "page_words").tolist() == [7] * 3
    assert row(columns, "url_parts").tolist() == [2] * 3
    assert row(columns, "url_digits").tolist() == [4] * 3
