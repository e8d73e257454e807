"""Normalize text as CCNet does before a language model scores it.

After Wenzek et al. 2019 (arXiv:1911.00359), a document at a time. The steps, in order; lines end at
"\\n":

    1  lower case
    2  remove accents: canonical decomposition (NFD), then without marks of category Mn
    3  every decimal digit of any script becomes 0
    4  Unicode punctuation becomes ASCII (CCNet's table, `_PUNCTUATION`): „“”«» become ", ’
       becomes ', … becomes three full stops
    5  control characters become spaces
    6  WORDS: cut into words and marks ("don't" is one word)
       PIECES: cut at white space, then by SentencePiece

Differences from CCNet: it deletes control characters (5), which joins the words around a tab; its
table has an entry for the full-width 1 that never applies, as digits are replaced first; it has no
WORDS, but they need no second model and are four times as fast. In PIECES the pieces of a word do
not depend on its neighbors, so they can be cached; SentencePiece on whole lines gives the same
except for ties, as pieces never cross words.

No step looks past the end of a line, so a whole text is normalized at once, as bytes, by a dozen
passes in C: `re` is ten times slower. Only runs of characters beyond ASCII are handled in Python,
each distinct run once.
"""

import codecs
import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from filters.text.words import decomposed

# Stored on the card of every model. Any change to what is returned under a name needs a new number.
WORDS = "ccnet-words-1"
PIECES = "ccnet-sp-1"

_PUNCTUATION = str.maketrans(
    dict.fromkeys("„”“«»」「《》", '"')
    | dict.fromkeys("´’", "'")
    | dict.fromkeys("，、", ",")
    | dict.fromkeys("∶：", ":")
    | dict.fromkeys("–━►", "-")
    | {
        "。": ".",
        "．": ". ",
        "…": "...",
        "—": " - ",
        "？": "?",
        "！": "!",
        "；": ";",
        "～": "~",
        "％": "%",
    }
    | {"（": "(", "）": ")", "〈": "<", "〉": ">", "【": "[", "】": "]"}
    | dict.fromkeys(range(127, 160), " ")
)
# per byte: lower case, digits to 0, control characters except "\n" to spaces
_ASCII = bytes.maketrans(
    b"ABCDEFGHIJKLMNOPQRSTUVWXYZ" + b"0123456789" + bytes({*range(32), 127} - {10}),
    b"abcdefghijklmnopqrstuvwxyz" + b"0" * 10 + b" " * 32,
)
_MARKS = {
    c: (bytes([c]), b" %c " % c)
    for c in range(33, 127)
    if not chr(c).isalnum() and chr(c) not in "_'"
}
_NO_MARKS = bytes(set(range(256)) - _MARKS.keys())
# bytes above 127 are letters here: `_Characters` has put spaces around all other characters
_LONE_APOSTROPHE = re.compile(rb"'(?:(?<![\w\x80-\xff]')|(?![\w\x80-\xff]))")

_MAX_CACHED = 200_000  # runs or words in a cache; about 20 MB
_LONG = 24  # longer runs, as of Chinese or Thai, are rarely repeated
_SHORT = 2000  # bytes; for longer texts NumPy counts faster


class Lines(NamedTuple):
    """The lines of a text in UTF-8, their tokens separated by spaces, and the numbers of tokens."""

    lines: list[bytes]
    tokens: list[int]


Normalizer = Callable[[str], Lines]


def normalize_line(line: str) -> str:
    """A line in WORDS, separated by single spaces."""
    return " ".join(b" ".join(words(line.replace("\n", " ")).lines).decode().split())


def words(text: str) -> Lines:
    """A text in WORDS; lone surrogates become question marks."""
    raw = _folded(text, WORDS)
    for mark in set(raw.translate(None, _NO_MARKS)):
        raw = raw.replace(*_MARKS[mark])
    if b"'" in raw:
        raw = _LONE_APOSTROPHE.sub(b" ' ", raw)
    return _counted(raw)


def pieces(text: str, splitter: "Splitter") -> Lines:
    """A text in PIECES."""
    cut = splitter.__getitem__
    return _counted(
        b"\n".join(
            [b" ".join(map(cut, line.split())) for line in _folded(text, PIECES).split(b"\n")]
        )
    )


def plain(text: str) -> Lines:
    """A text after the steps before cutting: what SentencePiece is trained on."""
    return _counted(_folded(text, PIECES))


class Splitter(dict[bytes, bytes]):
    """A cache of the pieces of words by a SentencePiece model, separated by spaces."""

    def __init__(self, model: str) -> None:
        import sentencepiece

        super().__init__()
        self._processor = sentencepiece.SentencePieceProcessor(model_file=model)

    def __missing__(self, word: bytes) -> bytes:
        pieces: list[str] = self._processor.encode(word.decode(), out_type=str)
        cut = " ".join(_SYMBOLS.get(piece, piece) for piece in pieces).encode()
        if len(self) >= _MAX_CACHED:
            self.clear()
        self[word] = cut
        return cut


# KenLM's own symbols, which lmplz refuses in text
_SYMBOLS = {"<s>": "< s >", "</s>": "< / s >", "<unk>": "< unk >"}


def _folded(text: str, kind: str) -> bytes:
    """Steps 1 to 5, in UTF-8; for WORDS, with spaces around marks beyond ASCII."""
    if "Σ" in text:
        text = text.lower()  # at the end of a word it is ς, and a run may end within a word
    return text.encode("ascii", _error_handler(kind)).translate(_ASCII)


@lru_cache(maxsize=2)
def _error_handler(kind: str) -> str:
    """The name of an error handler with which `str.encode` replaces runs beyond ASCII by `_Runs`.

    Several times as fast as `re`.
    """
    runs = _Runs(kind)

    def fold(error: UnicodeError) -> tuple[bytes, int]:
        assert isinstance(error, UnicodeEncodeError)
        return runs[error.object[error.start : error.end]], error.end

    name = f"gristmill.{kind}"
    codecs.register_error(name, fold)
    return name


class _Runs(dict[str, bytes]):
    """A cache of runs of characters beyond ASCII, normalized.

    NFD needs no more context, as an ASCII character ends every sequence.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._characters = _Characters(kind)

    def __missing__(self, run: str) -> bytes:
        # lone surrogates cannot be encoded for KenLM
        canonical = decomposed(run.lower().encode("utf-8", "replace").decode(), "NFD")
        folded = canonical.translate(self._characters).encode()
        if len(run) <= _LONG:
            if len(self) >= _MAX_CACHED:
                self.clear()
            self[run] = folded
        return folded


class _Characters(dict[int, str]):
    """A table for `str.translate` of the characters of decomposed runs; filled on demand."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._mark = " {} " if kind == WORDS else "{}"

    def __missing__(self, code: int) -> str:
        c = _character(chr(code))
        self[code] = c if c.isascii() or c.isalnum() else self._mark.format(c)
        return self[code]


def _character(c: str) -> str:
    if unicodedata.category(c) == "Mn":
        return ""
    if c.isdecimal():
        return "0"
    return " " if c.isspace() else c.translate(_PUNCTUATION)


def _counted(raw: bytes) -> Lines:
    lines = raw.split(b"\n")
    if len(raw) < _SHORT:
        return Lines(lines, [len(line.split()) for line in lines])
    import numpy as np

    spaced = np.frombuffer(b"\n%b\n" % raw, np.uint8)
    ink = spaced > 32
    begins = ink[1:] > ink[:-1]
    ends = np.flatnonzero(spaced[:-1] == 10)
    return Lines(lines, np.add.reduceat(begins, ends, dtype=np.int64).tolist())
