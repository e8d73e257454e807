"""Packing: nothing lost, nothing invented, every span traceable; and vocabularies without a
network.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.formats import tokens
from stages.formats.tokens import (
    best_fit,
    concatenate_and_chunk,
    load_encoding,
    tokenize,
    tokenize_in_python,
)

FILL = 999
documents = st.lists(st.integers(1, 40), max_size=20).map(
    lambda sizes: [np.arange(size, dtype=np.uint32) + 1000 * n for n, size in enumerate(sizes, 1)]
)


@pytest.mark.parametrize("pack", [concatenate_and_chunk, best_fit])
@given(docs=documents, seq_len=st.integers(2, 17))
def test_every_token_of_every_document_is_in_one_span(pack, docs, seq_len):
    rows = list(pack(docs, seq_len=seq_len, fill=FILL))
    rebuilt = {n: {} for n in range(len(docs))}
    for row in rows:
        covered = sum(s.length for s in row.spans)
        assert row.tokens.shape == (seq_len,)
        assert [s.start for s in row.spans] == np.cumsum([0, *(s.length for s in row.spans)])[
            :-1
        ].tolist()
        assert (row.tokens[covered:] == FILL).all()
        for span in row.spans:
            for i in range(span.length):
                assert span.offset + i not in rebuilt[span.document]
                rebuilt[span.document][span.offset + i] = row.tokens[span.start + i]
    assert [[d[k] for k in sorted(d)] for d in rebuilt.values()] == [list(d) for d in docs]


@given(docs=documents, seq_len=st.integers(2, 17))
def test_concatenation_fills_only_the_last_row(docs, seq_len):
    rows = list(concatenate_and_chunk(docs, seq_len=seq_len, fill=FILL))
    assert all(sum(s.length for s in row.spans) == seq_len for row in rows[:-1])


@given(docs=documents, seq_len=st.integers(2, 17))
def test_best_fit_cuts_no_document_that_fits_a_row(docs, seq_len):
    pieces = {}
    for row in best_fit(docs, seq_len=seq_len, fill=FILL):
        for span in row.spans:
            pieces[span.document] = pieces.get(span.document, 0) + 1
    assert all(pieces[n] == -(-len(d) // seq_len) for n, d in enumerate(docs))


@pytest.mark.parametrize("name, eot", [("cl100k_base", 100257), ("o200k_base", 199999)])
def test_shipped_vocabularies_work_offline(name, eot, monkeypatch, tmp_path):
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.setattr(tokens.tempfile, "tempdir", str(tmp_path))
    tokens.load_encoding.cache_clear()
    encoding = load_encoding(name)
    ids = tokenize("Hello <|endoftext|> wörld", encoding).tolist()
    assert ids[-1] == eot and ids.count(eot) == 1
    assert encoding.decode(ids[:-1]) == "Hello <|endoftext|> wörld"


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
    assert tokenize_in_python(text, encoding) == encoding.encode_ordinary(text)


@pytest.mark.parametrize("blank", [" ", "\t", "\xa0", " \t"])
@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base"])
def test_a_text_of_a_million_blanks_has_tokens(name, blank):
    encoding = load_encoding(name)
    text = "one" + blank * 1_000_000 + "two"
    with pytest.raises(BaseException, match="StackOverflow"):  # or else the detour can go
        encoding.encode_ordinary(text)
    ids = tokenize(text, encoding)
    assert encoding.decode(ids[:-1].tolist()) == text
    assert tokenize("as before", encoding).tolist()[:-1] == encoding.encode_ordinary("as before")


def test_an_encoding_that_does_not_ship_says_how_to_get_it(monkeypatch):
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    with pytest.raises(ValueError, match=r"set pack\.vocabulary_dir"):
        load_encoding("p50k_base")
    with pytest.raises(ValueError, match="unknown encoding 'nope'"):
        load_encoding("nope")
