"""Pack tokenized documents into rows of a fixed length, with the documents' spans."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.uint32]


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
