"""Targets, positions and attention masks of rows that several documents share."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from trainer.model.loss import IGNORE

Mask = Tensor | BlockMask | None


def packed_documents(documents: Tensor) -> Tensor | None:
    """None when every row is one document without fill, else `documents`. Looks at the values: call
    it on the CPU's copy.
    """
    return None if bool((documents == 0).all()) else documents


def next_tokens(tokens: Tensor, documents: Tensor | None) -> Tensor:
    """Targets (B, S): the next token of the same document, IGNORE at its last token and in fill."""
    targets = torch.full_like(tokens, IGNORE)
    targets[:, :-1] = (
        tokens[:, 1:]
        if documents is None
        else tokens[:, 1:].masked_fill(~_has_next(documents), IGNORE)
    )
    return targets


def row_targets(documents: Tensor) -> Tensor:
    """How many positions of each row predict a token, int64 (B,)."""
    return _has_next(documents).sum(1)


def num_targets(documents: Tensor) -> int:
    """How many positions of the batch predict a token; what the step's loss is divided by, summed
    over ranks.
    """
    return int(row_targets(documents).sum())


def _has_next(documents: Tensor) -> Tensor:
    """(B, S - 1): whether a position and the next are of one document."""
    return (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] >= 0)


def _positions(documents: Tensor) -> Tensor:
    """(B, S): the place of each token in its document."""
    place = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    starts = torch.zeros_like(place)
    starts[:, 1:] = place[:, 1:] * (documents[:, 1:] != documents[:, :-1])
    return place - starts.cummax(1).values


def _mask(documents: Tensor | None, attention: str) -> Mask:
    """Causal within documents, made once for all blocks; None for plain causal attention."""
    if documents is None:
        return None
    if attention == "sdpa":
        causal = torch.ones(
            documents.shape[1], documents.shape[1], dtype=torch.bool, device=documents.device
        ).tril()
        return (documents[:, None, :, None] == documents[:, None, None, :]) & causal

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents[row, query] == documents[row, key])

    rows, length = documents.shape
    make = create_block_mask if documents.device.type == "cpu" else _compiled(create_block_mask)
    return make(sees, rows, None, length, length, device=documents.device)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)
