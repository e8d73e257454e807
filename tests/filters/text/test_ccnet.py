"""Whole texts in a few passes give what CCNet's steps give, a character at a time."""

import re
import unicodedata
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from filters.text import ccnet
from tests.support.ccnet_reference import NASTY, decomposed, slow_character, slow_line

# letters of several scripts, marks that words may hold, marks that they may not, every kind of
# space
TEXTS = (
    st.text(
        alphabet="abÉzΣς 19٣_.,'’“”—…«»–，。\t\n\x85\u2028\u00a0\u0301\u0327\u302e\u200b한漢हि€İ\ud800"
    )
    | st.text()
)


def tokens(found: ccnet.Lines) -> list[list[str]]:
    return [line.decode().split(" ") for line in map(_single_spaced, found.lines)]


def _single_spaced(line: bytes) -> bytes:
    return re.sub(rb" +", b" ", line).strip(b" ")


@given(TEXTS | st.sampled_from(NASTY))
def test_words_are_those_of_the_slow_steps_line_by_line(text: str) -> None:
    expected = [slow_line(line) for line in text.split("\n")]
    found = ccnet.words(text)
    assert [[t for t in line if t] for line in tokens(found)] == expected
    assert found.tokens == [len(line) for line in expected]


def test_every_assigned_character_is_normalised_as_by_the_slow_steps() -> None:
    assigned = [
        c
        for c in map(chr, range(0x110000))
        if unicodedata.category(c) not in ("Cn", "Co") and c != "\n"
    ]
    lines = [f"A{c}\u0301b" for c in assigned]
    found = ccnet.words("\n".join(lines))
    for line, normalized in zip(lines, found.lines, strict=True):
        assert normalized.decode().split() == slow_line(line), ascii(line)


@given(TEXTS | st.sampled_from(NASTY))
def test_plain_text_keeps_white_spaced_words_whole(text: str) -> None:
    expected = ["".join(map(slow_character, decomposed(line))).split() for line in text.split("\n")]
    found = ccnet.plain(text)
    assert [line.decode().split() for line in found.lines] == expected
    assert found.tokens == [len(line) for line in expected]


@pytest.mark.parametrize(
    "line, normalized",
    [
        ("Café «Zürich», 1984!", 'cafe " zurich " , 0000 !'),
        ("don’t stop—now…", "don't stop - now . . ."),
        ("１２３．４", "000 . 0"),
        ("one\ttwo\x85three\u00a0four", "one two three four"),
        ("“Ça va？” （oui）", '" ca va ? " ( oui )'),
        ("5€ x_y", "0 € x_y"),
        (" \t ", ""),
    ],
)
def test_normalize(line: str, normalized: str) -> None:
    assert ccnet.normalize_line(line) == normalized


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("spm") / "m"
    lines = [
        f"the river {a}s west and the {b} is {a}ing"
        for a in ("flow", "turn", "lead")
        for b in ("town", "hill")
    ] * 5
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(path), vocab_size=60, hard_vocab_limit=False, num_threads=1,
        normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    return f"{path}.model"


@given(text=st.text(alphabet="the rivrflowstnguE.,1é漢\n") | st.sampled_from(NASTY))
def test_pieces_are_sentencepieces_own_of_each_word(text: str, spm: str) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=spm)
    found = ccnet.pieces(text, ccnet.Splitter(spm))
    plain = ["".join(map(slow_character, decomposed(line))).split() for line in text.split("\n")]
    expected = [
        [piece for word in line for piece in processor.encode(word, out_type=str)] for line in plain
    ]
    symbols = {"<s>": ["<", "s", ">"], "</s>": ["<", "/", "s", ">"], "<unk>": ["<", "unk", ">"]}
    expected = [[p for piece in line for p in symbols.get(piece, [piece])] for line in expected]
    assert [
        line.decode().split(" ") if line else [] for line in map(_single_spaced, found.lines)
    ] == expected
    assert found.tokens == list(map(len, expected))


def test_no_piece_is_a_symbol_of_kenlm(spm: str) -> None:
    found = ccnet.pieces("a <s> </s> <unk> <s></s>", ccnet.Splitter(spm))
    assert not {b"<s>", b"</s>", b"<unk>"} & set(found.lines[0].split())


def test_memory_of_words_is_bounded(spm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ccnet, "_MAX_CACHED", 3)
    splitter = ccnet.Splitter(spm)
    once = [splitter[word] for word in (b"one", b"two", b"three", b"four", b"five")]
    assert len(splitter) <= 3
    assert once == [splitter[word] for word in (b"one", b"two", b"three", b"four", b"five")]


@pytest.mark.corpus
def test_words_of_real_pages(corpus: Path) -> None:
    from benchmarks.texts import web_pages

    for text in web_pages(corpus)[:40]:
        expected = [slow_line(line) for line in text.split("\n")]
        found = ccnet.words(text)
        assert [[t for t in line if t] for line in tokens(found)] == expected
        assert found.tokens == [len(line) for line in expected]
