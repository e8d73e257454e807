"""A Llama-style decoder (Touvron et al. 2023, arXiv:2307.09288) for packed rows: plain modules,
parallelised from outside.

Shapes: B rows, S positions, D dim, H heads, K key/value heads, E = D / H, V vocabulary, T = B x S
positions of a batch. `documents` (B, S) says which document of its row a token belongs to; no token
attends to another document's, and rotary positions restart with each. Fill (-1) is treated as one
more document, so that no row of attention is ever empty.
"""

import hashlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from trainer.config import ModelConfig

IGNORE = -100  # target of a position that predicts nothing
# float32 logits that exist at once: 4,096 positions of 100,352 words; on a CPU what its allocator
# gives again, as it maps anew, page by page, what is above 32 MiB: a third of the time of a small
# model's step
LOGITS_BYTES = {"cuda": 4096 * 100_352 * 4, "cpu": 24 << 20}
INIT_STD = 0.02

Mask = Tensor | BlockMask | None


class Loss(NamedTuple):
    """Cross-entropy in nats, float32, summed over all targets (0-dim) and over those of each row
    (B,), which has no gradient.

    `targets`: how many there are in all, int64, 0-dim.
    """

    sum: Tensor
    rows: Tensor
    targets: Tensor


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
        (see `unless_whole`).
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


def unless_whole(documents: Tensor) -> Tensor | None:
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


def loss_and_gradient(logits_TV: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy (T,), float32, 0 without a target, and its gradient by the logits: softmax -
    one-hot, in their precision.

    The gradient takes the place of float32 logits.
    """
    x_TV = logits_TV.float()
    valid = targets != IGNORE
    target = targets.clamp(min=0)[:, None]
    log_total = x_TV.logsumexp(-1)
    nats = log_total - x_TV.gather(1, target).squeeze(1)
    # exp(x - inf) = 0: a position without a target gives no gradient
    p_TV = x_TV.sub_(log_total.masked_fill(~valid, float("inf"))[:, None]).exp_()
    p_TV.scatter_add_(1, target, -valid.to(p_TV.dtype)[:, None])
    return nats.masked_fill(~valid, 0.0), p_TV.to(logits_TV.dtype)


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


class _ChunkedLoss(torch.autograd.Function):
    """Cross-entropy of hidden states (T, D) against a head (V, D), in chunks: its sum, and that of
    each position (T,).

    The gradient of the sum is computed in the forward pass, where the logits are: backward only
    scales it, and nothing is computed twice (checkpointing each chunk would multiply by the head
    four times in place of three). Between the passes it holds T D + V D numbers in the precision of
    the weights. The head's gradient is summed over chunks in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets: Tensor,
        kernel: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        nats = []
        by_hidden = torch.empty_like(hidden_TD)
        by_weight = torch.zeros_like(weight_VD, dtype=torch.float32)
        chunks = _chunks(hidden_TD, targets, vocabulary=len(weight_VD))
        for (hidden, target), out in zip(chunks, _split(by_hidden, len(weight_VD)), strict=True):
            found, by_logits = kernel(hidden @ weight_VD.T, target)
            nats.append(found)
            out.copy_(by_logits @ weight_VD)
            if by_logits.dtype == by_weight.dtype:
                by_weight.addmm_(
                    by_logits.T, hidden
                )  # without a second V D, which on a CPU costs a tenth of the step
            else:
                by_weight += by_logits.T @ hidden
        ctx.save_for_backward(by_hidden, by_weight.to(weight_VD.dtype))
        each = torch.cat(nats)
        ctx.mark_non_differentiable(each)
        return each.sum(), each

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        by_hidden, by_weight = ctx.saved_tensors
        return by_hidden * scale, by_weight * scale, None, None


def _split(states: Tensor, vocabulary: int) -> tuple[Tensor, ...]:
    """Cut along positions, so that the logits of a part fit in LOGITS_BYTES."""
    room = LOGITS_BYTES.get(states.device.type, LOGITS_BYTES["cuda"])
    return torch.split(states, max(1, room // (4 * vocabulary)))


def _chunks(states: Tensor, targets: Tensor, *, vocabulary: int) -> Iterator[tuple[Tensor, Tensor]]:
    parts = _split(states, vocabulary)
    return zip(parts, torch.split(targets, len(parts[0])), strict=True)


def _nats(logits_TV: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits_TV.float(), targets, ignore_index=IGNORE, reduction="none")


def _has_next(documents: Tensor) -> Tensor:
    """(B, S - 1): whether a position and the next are of one document."""
    return (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] >= 0)


def _positions(documents: Tensor) -> Tensor:
    """(B, S): the place of each token in its document."""
    place = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    starts = torch.zeros_like(place)
    starts[:, 1:] = place[:, 1:] * (documents[:, 1:] != documents[:, :-1])
    return place - starts.cummax(1).values


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


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


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
