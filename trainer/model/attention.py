"""Attention within documents: the mask, and the kernel for it.

B rows, S positions, H query heads, K key/value heads, E dimensions of a head.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

Mask = Tensor | BlockMask | None


def attention_mask(documents: Tensor | None, kind: str) -> Mask:
    """The causal mask within documents, shared by all blocks; None for plain causal attention.

    `kind` is "sdpa" or "flex".
    """
    if documents is None:
        return None
    rows, length = documents.shape
    if kind == "sdpa":
        causal = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
        return (documents[:, None, :, None] == documents[:, None, None, :]) & causal

    def is_visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents[row, query] == documents[row, key])

    make = create_block_mask if documents.device.type == "cpu" else compiled(create_block_mask)
    return make(is_visible, rows, None, length, length, device=documents.device)


def attend(q_BHSE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask: Mask) -> Tensor:
    """Attention of H query heads to K key/value heads, (B, H, S, E)."""
    grouped = q_BHSE.shape[1] != k_BKSE.shape[1]
    if mask is None:
        return F.scaled_dot_product_attention(
            q_BHSE, k_BKSE, v_BKSE, is_causal=True, enable_gqa=grouped
        )
    if isinstance(mask, Tensor):
        # on CUDA the only kernel for both a mask and grouped heads materializes all scores: repeat
        # the heads instead
        repeats = q_BHSE.shape[1] // k_BKSE.shape[1]
        k_BHSE, v_BHSE = k_BKSE.repeat_interleave(repeats, 1), v_BKSE.repeat_interleave(repeats, 1)
        return F.scaled_dot_product_attention(q_BHSE, k_BHSE, v_BHSE, attn_mask=mask)
    # uncompiled it materializes all scores: acceptable on CPUs, which only have its forward pass;
    # a compiled block compiles it anyway
    plain = torch.compiler.is_compiling() or q_BHSE.device.type == "cpu"
    kernel: Any = flex_attention if plain else compiled(flex_attention)
    return kernel(q_BHSE, k_BKSE, v_BKSE, block_mask=mask, enable_gqa=grouped)  # type: ignore[no-any-return]


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile, once per function."""
    return torch.compile(function)
