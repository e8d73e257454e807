"""Text as CCNet normalises it before a language model scores it (Wenzek et al. 2019,
arXiv:1911.00359), a document at a time.

The steps, in order; a line is what "\\n" parts:

    1  lower case
    2  accents off: canonical decomposition (NFD), then marks of category Mn go
    3  every decimal digit of any script becomes 0
    4  Unicode punctuation becomes ASCII: „“”«» are ", ’ is ', … is three full stops (CCNet's table, `_PUNCTUATION`)
    5  control characters become spaces
    6  WORDS: cut into words and marks, "don't" being one word.   PIECES: cut at white space, then by SentencePiece

What differs from CCNet, and why: it deletes control characters (5), which glues the words around a
tab together; its table has an entry for the full-width 1, a slip that can never apply, since digits
are replaced first; it knows no WORDS, but they need no second model and are four times as fast. In
PIECES a word's pieces do not depend on its neighbours, so that a word seen before is looked up;
SentencePiece on whole lines gives the same but for ties, pieces never going across words.

No step looks past the end of a line, so a whole text is normalised at once, as bytes, by a dozen
passes in C: `re` is ten times slower. Only runs of characters beyond ASCII come to Python, each
kind of run once.
"""

import codecs
import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from filters.text.ngrams import decomposed

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
# per byte: capitals, digits, controls but for "\n"
_ASCII = bytes(
    c + 32
    if chr(c).isupper() and c < 128
    else 48
    if 48 <= c < 58
    else 32
    if (c < 32 and c != 10) or c == 127
    else c
    for c in range(256)
)
_MARKS = {
    c: (bytes([c]), b" %c " % c)
    for c in range(33, 127)
    if not chr(c).isalnum() and chr(c) not in "_'"
}
_NO_MARKS = bytes(set(range(256)) - _MARKS.keys())
# bytes above 127 are letters here: `_Characters` has put spaces around what is none
_LONE_APOSTROPHE = re.compile(rb"'(?:(?<![\w\x80-\xff]')|(?![\w\x80-\xff]))")

_MAX_CACHED = 200_000  # runs or words remembered; some 20 MB
_LONG = 24  # longer runs, those of Chinese or Thai, seldom come again
_SHORT = 2000  # bytes; from here on counting in NumPy is worth its fixed cost


class Lines(NamedTuple):
    """The lines of a text in UTF-8, tokens parted by spaces, one or more; and how many tokens each
    has, none maybe.
    """

    lines: list[bytes]
    tokens: list[int]


Normalizer = Callable[[str], Lines]


def normalize_line(line: str) -> str:
    """A line in WORDS, parted by single spaces."""
    return " ".join(b" ".join(words(line.replace("\n", " ")).lines).decode().split())


def words(text: str) -> Lines:
    """A text in WORDS; total: lone surrogates become question marks."""
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
    """The pieces of a word by a SentencePiece model, parted by spaces; words are remembered."""

    def __init__(self, model: str) -> None:
        import sentencepiece

        super().__init__()
        self._processor = sentencepiece.SentencePieceProcessor(model_file=model)

    def __missing__(self, word: bytes) -> bytes:
        found: list[str] = self._processor.encode(word.decode(), out_type=str)
        cut = " ".join(_SYMBOLS.get(piece, piece) for piece in found).encode()
        if len(self) >= _MAX_CACHED:
            self.clear()
        self[word] = cut
        return cut


# KenLM takes these for its own: lmplz refuses them
_SYMBOLS = {"<s>": "< s >", "</s>": "< / s >", "<unk>": "< unk >"}


def _folded(text: str, kind: str) -> bytes:
    """Steps 1 to 5, in UTF-8; for WORDS, marks beyond ASCII already stand between spaces."""
    if "Σ" in text:
        text = text.lower()  # at the end of a word it is ς, and a run may end within a word
    return text.encode("ascii", _error_handler(kind)).translate(_ASCII)


@lru_cache(maxsize=2)
def _error_handler(kind: str) -> str:
    """`str.encode` finds the runs beyond ASCII, several times as fast as `re`; this name tells it
    to replace them by `_Runs`.
    """
    runs = _Runs(kind)

    def fold(error: UnicodeError) -> tuple[bytes, int]:
        assert isinstance(error, UnicodeEncodeError)
        return runs[error.object[error.start : error.end]], error.end

    name = f"gristmill.{kind}"
    codecs.register_error(name, fold)
    return name


class _Runs(dict[str, bytes]):
    """Runs of characters beyond ASCII as normalised. NFD needs no more context: an ASCII character
    ends every sequence.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._characters = _Characters(kind)

    def __missing__(self, run: str) -> bytes:
        # lone surrogates cannot be encoded for KenLM
        canonical = decomposed(run.lower().encode("utf-8", "replace").decode())
        folded = canonical.translate(self._characters).encode()
        if len(run) <= _LONG:
            if len(self) >= _MAX_CACHED:
                self.clear()
            self[run] = folded
        return folded


class _Characters(dict[int, str]):
    """What becomes of a character of a decomposed run: a table for `str.translate` that fills
    itself.
    """

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
