"""A Llama-style decoder (Touvron et al. 2023, arXiv:2307.09288) for packed rows: plain modules,
parallelised from outside.

Shapes: B rows, S positions, D dim, H heads, K key/value heads, E = D / H, V vocabulary, T = B x S
positions of a batch. `documents` (B, S) says which document of its row a token belongs to; no token
attends to another document's, and rotary positions restart with each. Fill (-1) is treated as one
more document, so that no row of attention is ever empty.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention.flex_attention import flex_attention

from trainer.config import ModelConfig
from trainer.model.loss import (
    IGNORE,
    Loss,
    _ChunkedLoss,
    _chunks,
    _nats,
    loss_and_gradient,
)
from trainer.model.packing import Mask, _compiled, _mask, _positions, next_tokens

INIT_STD = 0.02


class Transformer(nn.Module):
    """The model, uninitialised: build it under torch.device("meta") or not, `to_empty`,
    parallelize, then `init_weights`.

    It has no buffers, so nothing but weights is lost on the meta device. A tied head is no module
    of its own: `to_empty` would part two parameters that share memory.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        _check(config)
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.head = (
            None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        )
        self.loss_and_gradient: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = (
            loss_and_gradient  # to compile, if wanted
        )

    def forward(self, tokens: Tensor, documents: Tensor | None) -> Tensor:
        """Logits (B, S, V) of the next token, in the precision of the weights. Training calls
        `loss`, which never holds them.

        `documents` None: each row is one document and has no fill, which takes the fastest kernel
        (see `packed_documents`).
        """
        return F.linear(self._hidden(tokens, documents), self._head_weight())

    def loss(self, tokens: Tensor, documents: Tensor | None) -> Loss:
        """Cross-entropy of the next token within each document, without more than LOGITS_BYTES of
        logits in memory.

        With gradients enabled the gradient is computed on the way (see _ChunkedLoss). A forward
        method of its own, and no function of hidden states: under FSDP the head's weight is whole
        only inside one.
        """
        hidden_TD = self._hidden(tokens, documents).flatten(0, 1)
        targets = next_tokens(tokens, documents)
        weight = self._head_weight()
        if torch.is_grad_enabled() and hidden_TD.requires_grad:
            total, nats = _ChunkedLoss.apply(
                hidden_TD, weight, targets.flatten(), self.loss_and_gradient
            )  # type: ignore[no-untyped-call]
        else:
            parts = _chunks(hidden_TD, targets.flatten(), vocabulary=len(weight))
            nats = torch.cat([_nats(F.linear(hidden, weight), target) for hidden, target in parts])
            total = nats.sum()
        return Loss(total, nats.view_as(targets).sum(1), (targets != IGNORE).sum())

    def init_weights(self, seed: int) -> None:
        """Matrices normal (std 0.02, those that write to the residual stream / sqrt(2 layers),
        GPT-2), norms 1.

        Each parameter is drawn whole, on the CPU, from a generator of (seed, its name), then
        sharded: the values depend on neither the number of ranks nor the device. Costs about 10 s
        per billion parameters, once per run.
        """
        for name, parameter in self.named_parameters():
            _fill(parameter, _initial(name, parameter.shape, seed, self.config.num_layers))

    def _hidden(self, tokens: Tensor, documents: Tensor | None) -> Tensor:
        x_BSD = self.embedding(tokens)
        cos, sin = _rotations(tokens, documents, self.config)
        mask = _mask(documents, self.config.attention)
        for block in self.blocks:
            x_BSD = block(x_BSD, cos, sin, mask)
        return self.norm(x_BSD)  # type: ignore[no-any-return]

    def _head_weight(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight


class Block(nn.Module):
    """Attention, then SwiGLU (Shazeer 2020), each normed before and added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.mlp = SwiGLU(config.dim, config.ffn_dim)

    def forward(self, x_BSD: Tensor, cos: Tensor, sin: Tensor, mask: Mask) -> Tensor:
        """The stream after this block."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), cos, sin, mask)
        return x_BSD + self.mlp(self.mlp_norm(x_BSD))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023): H / K query heads share a key/value head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_heads, config.num_kv_heads
        kv_dim = config.num_kv_heads * config.dim // config.num_heads
        self.query = nn.Linear(config.dim, config.dim, bias=False)
        self.key = nn.Linear(config.dim, kv_dim, bias=False)
        self.value = nn.Linear(config.dim, kv_dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x_BSD: Tensor, cos: Tensor, sin: Tensor, mask: Mask) -> Tensor:
        """What attention adds to the stream."""
        q_BSHE = _rotate(self.query(x_BSD).unflatten(-1, (self.heads, -1)), cos, sin)
        k_BSKE = _rotate(self.key(x_BSD).unflatten(-1, (self.kv_heads, -1)), cos, sin)
        v_BSKE = self.value(x_BSD).unflatten(-1, (self.kv_heads, -1))
        out_BHSE = _attend(
            q_BSHE.transpose(1, 2), k_BSKE.transpose(1, 2), v_BSKE.transpose(1, 2), mask
        )
        return self.out(out_BHSE.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, ffn_dim, bias=False)
        self.up = nn.Linear(dim, ffn_dim, bias=False)
        self.down = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """What the MLP adds to the stream."""
        return self.down(F.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


def num_parameters(config: ModelConfig) -> int:
    """Weights of the model, a tied head counted once."""
    kv_dim = config.num_kv_heads * config.dim // config.num_heads
    block = (
        2 * config.dim * (config.dim + kv_dim) + 3 * config.dim * config.ffn_dim + 2 * config.dim
    )
    words = config.vocab_size * config.dim
    return (1 if config.tie_embeddings else 2) * words + config.num_layers * block + config.dim


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Floating-point operations of a token's forward and backward pass: 6 N + 12 layers dim
    seq_len.

    PaLM's formula for MFU (Chowdhery et al. 2022, arXiv:2204.02311, appendix B). N is without the
    embedding's lookup, which multiplies nothing, and with the head, tied or not. Attention is
    counted whole, as there and as in our peers' figures: not halved for the causal mask, nor cut at
    documents. What checkpointing computes again does not count.
    """
    looked_up = 0 if config.tie_embeddings else config.vocab_size * config.dim
    return 6 * (num_parameters(config) - looked_up) + 12 * config.num_layers * config.dim * seq_len


def _rotations(
    tokens: Tensor, documents: Tensor | None, config: ModelConfig
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B or 1, S, 1, E / 2) of rotary embedding (Su et al. 2021), always float32."""
    head_dim = config.dim // config.num_heads
    frequencies = config.rope_theta ** (
        -torch.arange(0, head_dim, 2, device=tokens.device, dtype=torch.float32) / head_dim
    )
    positions = _positions(torch.zeros_like(tokens[:1]) if documents is None else documents)
    angles = (positions.float()[..., None] * frequencies)[:, :, None]
    return angles.cos(), angles.sin()


def _rotate(x_BSHE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (e, e + E / 2), computed in float32: bfloat16 cannot tell positions beyond
    256 apart.
    """
    low, high = x_BSHE.float().chunk(2, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1).to(x_BSHE.dtype)


def _attend(q_BHSE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask: Mask) -> Tensor:
    grouped = q_BHSE.shape[1] != k_BKSE.shape[1]
    if mask is None:
        return F.scaled_dot_product_attention(
            q_BHSE, k_BKSE, v_BKSE, is_causal=True, enable_gqa=grouped
        )
    if isinstance(mask, Tensor):
        # on CUDA no kernel takes both a mask and grouped heads except the one that holds all
        # scores: repeat the heads instead
        repeats = q_BHSE.shape[1] // k_BKSE.shape[1]
        k_BHSE, v_BHSE = k_BKSE.repeat_interleave(repeats, 1), v_BKSE.repeat_interleave(repeats, 1)
        return F.scaled_dot_product_attention(q_BHSE, k_BHSE, v_BHSE, attn_mask=mask)
    # uncompiled it holds all scores; on CPUs, which have its forward pass alone, that serves; a
    # compiled block compiles it anyway
    plain = torch.compiler.is_compiling() or q_BHSE.device.type == "cpu"
    attend: Any = flex_attention if plain else _compiled(flex_attention)
    return attend(q_BHSE, k_BKSE, v_BKSE, block_mask=mask, enable_gqa=grouped)  # type: ignore[no-any-return]


def _initial(name: str, shape: torch.Size, seed: int, layers: int) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape)
    drawn_by = hashlib.sha256(f"{seed}/init/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(drawn_by[:8], "little") >> 1)
    writes_to_stream = name.endswith(("attention.out.weight", "mlp.down.weight"))
    return torch.randn(shape, generator=generator) * (
        INIT_STD / (2 * layers) ** 0.5 if writes_to_stream else INIT_STD
    )


@torch.no_grad()
def _fill(parameter: nn.Parameter, whole: Tensor) -> None:
    if parameter.is_meta:
        raise ValueError(
            "the model is on the meta device; call to_empty(device=...) before init_weights"
        )
    if isinstance(
        parameter, DTensor
    ):  # every rank drew the same: each cuts out its part, nothing is sent
        whole = distribute_tensor(
            whole, parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    parameter.copy_(whole)


def _check(config: ModelConfig) -> None:
    if (
        config.dim % config.num_heads
        or config.num_heads % config.num_kv_heads
        or config.dim // config.num_heads % 2
    ):
        raise ValueError(
            f"model: dim {config.dim}, num_heads {config.num_heads}, num_kv_heads "
            f"{config.num_kv_heads}; dim must be a multiple of 2 num_heads, and num_heads of "
            "num_kv_heads"
        )
