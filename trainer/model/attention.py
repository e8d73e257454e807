"""Attention within documents: what is visible, and the kernels that use it.

B rows, S positions, H query heads, K key/value heads, E dimensions of a head. Each row is a
sequence of documents without gaps, so one number says what a position sees: itself and every
earlier position down to the first of its document.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128  # positions; FlexAttention skips blocks of BLOCK x BLOCK scores
Mask = Tensor | BlockMask | None
Kernel = Literal["sdpa", "flex"]


def kernel_of(setting: Literal["auto", "sdpa", "flex"], device: torch.device) -> Kernel:
    """The kernel for a device: for packed rows FlexAttention on GPUs, as SDPA would take cuDNN with
    a dense bias there; SDPA on CPUs, where FlexAttention has no backward pass.
    """
    if setting == "auto":
        return "flex" if device.type == "cuda" else "sdpa"
    return setting


def attention_mask(starts_BS: Tensor | None, kernel: Kernel) -> Mask:
    """The mask that all blocks share; None for plain causal attention.

    `starts_BS` is the first position of each position's document, int64 (`document_starts`).
    "sdpa" takes a dense mask of B x S x S, for CPUs; "flex" a mask of blocks, whose shape does not
    depend on the documents, so nothing is compiled again.
    """
    if starts_BS is None:
        return None
    return _dense_mask(starts_BS) if kernel == "sdpa" else block_mask(starts_BS)


def _dense_mask(starts_BS: Tensor) -> Tensor:
    position = torch.arange(starts_BS.shape[1], device=starts_BS.device)
    is_causal = position[:, None] >= position
    return (is_causal & (position >= starts_BS[:, :, None]))[:, None]


def block_mask(starts_BS: Tensor) -> BlockMask:
    """The blocks of scores to compute, from the documents' starts: (S / BLOCK)^2 work per row.

    A query block sees the key blocks from its first query's document on, up to its own. Of these a
    key block needs no mask inside if it ends before the query block and does not begin before the
    last query's document. Starts never fall along a row, so both ends of a block tell.
    """
    length = starts_BS.shape[1]
    # what is beyond the last position of a short last block is cut off by the kernel
    firsts_BN = starts_BS[:, ::BLOCK]
    lasts = torch.arange(BLOCK - 1, length + BLOCK - 1, BLOCK, device=starts_BS.device)
    lasts_BN = starts_BS[:, lasts.clamp(max=length - 1)]
    block = torch.arange(firsts_BN.shape[1], device=starts_BS.device)
    is_earlier = block[:, None] > block
    is_seen = (block >= firsts_BN[:, :, None] // BLOCK) & (block[:, None] >= block)
    is_full = is_earlier & (block * BLOCK >= lasts_BN[:, :, None])

    def is_visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (key >= starts_BS[row, query])

    return BlockMask.from_kv_blocks(
        *_listed(is_seen & ~is_full),
        *_listed(is_full),
        BLOCK_SIZE=BLOCK,
        mask_mod=is_visible,
        seq_lengths=(length, length),
    )


def _listed(is_wanted_BNN: Tensor) -> tuple[Tensor, Tensor]:
    """Number of wanted key blocks of each query block, and their indices first; (B, 1, N[, N])."""
    counts = is_wanted_BNN.sum(-1, dtype=torch.int32)
    indices = is_wanted_BNN.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return counts[:, None], indices.to(torch.int32)[:, None].contiguous()


def attend(q_BHSE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask: Mask) -> Tensor:
    """Attention of H query heads to K key/value heads, (B, H, S, E)."""
    grouped = q_BHSE.shape[1] != k_BKSE.shape[1]
    if not isinstance(mask, BlockMask):
        return F.scaled_dot_product_attention(
            q_BHSE, k_BKSE, v_BKSE, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
        )
    # uncompiled it materializes all scores: acceptable on CPUs, where only tests do it; a compiled
    # block compiles it anyway
    plain = torch.compiler.is_compiling() or q_BHSE.device.type == "cpu"
    kernel: Any = flex_attention if plain else compiled(flex_attention)
    return kernel(q_BHSE, k_BKSE, v_BKSE, block_mask=mask, enable_gqa=grouped)  # type: ignore[no-any-return]


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile, once per function."""
    return torch.compile(function, dynamic=False)
