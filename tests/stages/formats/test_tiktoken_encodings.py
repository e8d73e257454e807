"""Encodings of tiktoken without a network, and texts that are too much for its expressions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.formats import tiktoken_encodings
from stages.formats.tiktoken_encodings import encode_in_python, encode_text, load_encoding


@pytest.mark.parametrize("name, eot", [("cl100k_base", 100257), ("o200k_base", 199999)])
def test_shipped_vocabularies_work_offline(name, eot, monkeypatch, tmp_path):
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.setattr(tiktoken_encodings.tempfile, "tempdir", str(tmp_path))
    load_encoding.cache_clear()
    encoding = load_encoding(name)
    ids = encode_text("Hello <|endoftext|> wörld", encoding).tolist()
    assert encoding.eot_token == eot and eot not in ids
    assert encoding.decode(ids) == "Hello <|endoftext|> wörld"


# what patterns of tokens tell apart: kinds of white space, letters, marks, numbers, quotes
PIECES = [
    *(" ", "  ", "\t", "\n", "\r\n", "\x0b", "\x1c", "\x1f", "\x85", "\xa0", "\u180e", "\u2003"),
    *("\u2028", "\u200b", "\ufeff", "\u3000", "a", "B", "é", "中", "ก", "\u0301", "1", "٣", "½"),
    *("!", "'s", "'S", "'ſ", "/", "😀", "\0", "ǅ", "ʰ", "K", "\u0378", "\ue000", "\ud800", "क्ष"),
]


@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base"])
@given(text=st.text() | st.lists(st.sampled_from(PIECES)).map("".join))
def test_python_gives_the_tokens_of_tiktoken(name, text):
    encoding = load_encoding(name)
    expected = encoding.encode_ordinary(text)
    assert encode_in_python(text, encoding) == expected
    if "\ud800" not in text:
        assert encode_text(text, encoding).tolist() == expected


@pytest.mark.parametrize("blank", [" ", "\t", "\xa0", " \t"])
@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base"])
def test_a_text_of_a_million_blanks_has_tokens(name, blank):
    encoding = load_encoding(name)
    text = "one" + blank * 1_000_000 + "two"
    with pytest.raises(ValueError, match="Max stack size"):  # or else the detour can go
        encoding.encode_to_numpy(text, disallowed_special=())
    assert encoding.decode(encode_text(text, encoding).tolist()) == text
    assert encode_text("as before", encoding).tolist() == encoding.encode_ordinary("as before")


def test_an_encoding_that_does_not_ship_says_how_to_get_it(monkeypatch):
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    with pytest.raises(ValueError, match=r"set pack\.vocabulary_dir"):
        load_encoding("p50k_base")
    with pytest.raises(ValueError, match="unknown encoding 'nope'"):
        load_encoding("nope")
