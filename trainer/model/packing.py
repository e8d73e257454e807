"""Targets and document bounds of rows into which several documents are packed.

B rows, S positions. `documents` (B, S) is the index of each token's document in its row, -1 for
fill.
"""

import torch
from torch import Tensor

IGNORE = -100  # target of a position that predicts nothing


def packed_documents(documents: Tensor) -> Tensor | None:
    """`documents`, or None if every row is one document without fill.

    It looks at the values: call it on a tensor on the CPU.
    """
    return None if bool((documents == 0).all()) else documents


def next_tokens(tokens: Tensor, documents: Tensor | None) -> Tensor:
    """Targets (B, S): the next token of the same document; IGNORE at its last token and in fill."""
    targets = torch.full_like(tokens, IGNORE)
    targets[:, :-1] = tokens[:, 1:]
    if documents is not None:
        targets[:, :-1].masked_fill_(~_has_next(documents), IGNORE)
    return targets


def row_targets(documents: Tensor) -> Tensor:
    """How many positions of each row predict a token, int64 (B,)."""
    return _has_next(documents).sum(1)


def num_targets(documents: Tensor) -> int:
    """How many positions of a batch predict a token; summed over ranks it divides a step's loss."""
    return int(row_targets(documents).sum())


def document_starts(documents: Tensor) -> Tensor:
    """(B, S): the first position of each position's document."""
    position = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    starts = torch.zeros_like(position)
    starts[:, 1:] = position[:, 1:] * (documents[:, 1:] != documents[:, :-1])
    return starts.cummax(1).values


def visible_positions(documents: Tensor) -> Tensor:
    """(B, S): how many positions a token attends to, itself included; 0 for fill."""
    position = torch.arange(documents.shape[1], device=documents.device)
    return (position - document_starts(documents) + 1) * (documents >= 0)


def _has_next(documents: Tensor) -> Tensor:
    """(B, S - 1): whether a position and the next one are in the same document."""
    return (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] >= 0)
