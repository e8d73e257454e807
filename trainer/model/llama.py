"""A Llama-style decoder (Touvron et al. 2023, arXiv:2307.09288) for packed rows, as plain modules.

B rows, S positions, D dim, H heads, K key/value heads, E dimensions of a head, V vocabulary,
T = B x S.

`documents` (B, S) is the index of each token's document in its row; tokens attend only to their own
document, and rotary positions restart with each. Fill (-1) is treated as one more document, so that
no row of attention is ever empty. `parallel` shards, checkpoints and compiles the model.
"""

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from trainer.config import ModelConfig
from trainer.model.attention import Mask, attend, attention_mask, kernel_of
from trainer.model.loss import Loss, LossKernel, chunked_loss, loss_and_gradient
from trainer.model.packing import IGNORE, document_starts, next_tokens

INIT_STD = 0.02


class Transformer(nn.Module):
    """The model without weights: create it (also on torch.device("meta")), parallelize, `to_empty`,
    then `init_weights`.

    It has no buffers, so only weights are missing on the meta device. A tied head is not a module
    of its own: `to_empty` would separate two parameters that share memory.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        _check_heads(config)
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.head = (
            None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        )
        self.loss_and_gradient: LossKernel = loss_and_gradient  # `parallelize` may compile it
        self.reduces_each_micro_batch = False  # set by `parallelize`, for accumulation

    def forward(self, tokens: Tensor, documents: Tensor | None) -> Tensor:
        """Logits (B, S, V) of the next token, in the precision of the weights.

        Training calls `loss` instead, which never has all of them. `documents` None: each row is
        one document without fill (`packed_documents`), which takes the fastest kernel.
        """
        return F.linear(self._hidden(tokens, documents), self._head_weight())

    def loss(self, tokens: Tensor, documents: Tensor | None) -> Loss:
        """Cross-entropy of the next token within each document, by `chunked_loss`.

        It is a method, not a function of hidden states: under FSDP the head's weight is whole only
        inside a forward method.
        """
        hidden_TD = self._hidden(tokens, documents).flatten(0, 1)
        targets = next_tokens(tokens, documents)
        total, nats = chunked_loss(
            hidden_TD, self._head_weight(), targets.flatten(), self.loss_and_gradient
        )
        return Loss(total, nats.view_as(targets), (targets != IGNORE).sum())

    def init_weights(self, seed: int) -> None:
        """Draw matrices from a normal distribution, set norms to 1 and biases to 0 (as GPT-2).

        The std is 0.02, and 0.02 / sqrt(2 layers) for matrices that write to the residual stream.
        Each parameter is drawn whole, on the CPU, from a generator of (seed, its name), then
        sharded: values depend neither on the number of ranks nor on the device. Takes about 10 s
        per billion parameters, once per run.
        """
        for name, parameter in self.named_parameters():
            values = initial_values(name, parameter.shape, seed, self.config.num_layers)
            _fill_parameter(parameter, values)

    def _hidden(self, tokens: Tensor, documents: Tensor | None) -> Tensor:
        x_BSD = self.embedding(tokens)
        kernel = kernel_of(self.config.attention, tokens.device)
        starts = None if documents is None else document_starts(documents)
        if starts is None and kernel == "flex":
            starts = torch.zeros_like(tokens)  # the same graph as for any other rows
        cos, sin = _rotations(tokens, starts, self.config)
        mask = attention_mask(starts, kernel)
        for block in self.blocks:
            x_BSD = block(x_BSD, cos, sin, mask)
        return self.norm(x_BSD)  # type: ignore[no-any-return]

    def _head_weight(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight


class Block(nn.Module):
    """Attention, then SwiGLU (Shazeer 2020), each of the normed stream and added to it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.mlp = SwiGLU(config.dim, config.ffn_dim)

    def forward(self, x_BSD: Tensor, cos: Tensor, sin: Tensor, mask: Mask) -> Tensor:
        """The residual stream after this block."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), cos, sin, mask)
        return x_BSD + self.mlp(self.mlp_norm(x_BSD))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023): H / K query heads share a key/value head.

    With `qk_norm` queries and keys are normalized before they are rotated, by RMSNorm over the
    dimensions of a head with weights that all heads share (Qwen3; the idea is of Dehghani et al.
    2023, arXiv:2302.05442).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size = config.head_size
        self.head_size, bias = size, config.qkv_bias
        self.query = nn.Linear(config.dim, config.num_heads * size, bias=bias)
        self.key = nn.Linear(config.dim, config.num_kv_heads * size, bias=bias)
        self.value = nn.Linear(config.dim, config.num_kv_heads * size, bias=bias)
        self.out = nn.Linear(config.num_heads * size, config.dim, bias=False)
        self.query_norm = nn.RMSNorm(size, eps=config.norm_eps) if config.qk_norm else None
        self.key_norm = nn.RMSNorm(size, eps=config.norm_eps) if config.qk_norm else None

    def forward(self, x_BSD: Tensor, cos: Tensor, sin: Tensor, mask: Mask) -> Tensor:
        """What attention adds to the residual stream."""
        q_BSHE, k_BSKE, v_BSKE = (
            project(x_BSD).unflatten(-1, (-1, self.head_size))
            for project in (self.query, self.key, self.value)
        )
        if self.query_norm is not None and self.key_norm is not None:
            q_BSHE, k_BSKE = self.query_norm(q_BSHE), self.key_norm(k_BSKE)
        q_BSHE, k_BSKE = _rotate(q_BSHE, cos, sin), _rotate(k_BSKE, cos, sin)
        q_BHSE, k_BKSE, v_BKSE = (x.transpose(1, 2) for x in (q_BSHE, k_BSKE, v_BSKE))
        out_BHSE = attend(q_BHSE, k_BKSE, v_BKSE, mask)
        return self.out(out_BHSE.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, ffn_dim, bias=False)
        self.up = nn.Linear(dim, ffn_dim, bias=False)
        self.down = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """What the MLP adds to the residual stream."""
        return self.down(F.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


def flops_per_token(model: Transformer, context: float) -> float:
    """FLOP of a token's forward and backward pass: 6 N + 12 layers x width of queries x `context`.

    N excludes the embedding, whose lookup multiplies nothing, and includes the head, tied or not.
    `context` is how many positions a token attends to on average (`visible_positions`): what is
    useful work. With the length of a row instead it is PaLM's formula for MFU (Chowdhery et al.
    2022, arXiv:2204.02311, appendix B), which peers report: attention is neither halved for the
    causal mask nor cut at documents. Recomputation by checkpointing does not count.
    """
    config = model.config
    weights = sum(parameter.numel() for parameter in model.parameters())
    if not config.tie_embeddings:
        weights -= model.embedding.weight.numel()
    width = config.num_heads * config.head_size
    return 6 * weights + 12 * config.num_layers * width * context


def _rotations(tokens: Tensor, starts: Tensor | None, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B or 1, S, 1, E / 2) of rotary embedding (Su et al. 2021), float32."""
    frequencies = _frequencies(config, tokens.device)
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    if starts is not None:
        positions = positions - starts
    angles = (positions.float()[..., None] * frequencies)[:, :, None]
    return angles.cos(), angles.sin()


def _frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Radians per position of each pair of dimensions (E / 2,), float32.

    Those that turn rarely within the original context are divided by `rope_factor`, with a linear
    transition: Llama 3.1's, "llama3" in transformers.
    """
    size = config.head_size
    exponents = -torch.arange(0, size, 2, device=device, dtype=torch.float32) / size
    frequencies = config.rope_theta**exponents
    if config.rope_factor == 1:
        return frequencies
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    turns = config.rope_original_positions * frequencies / (2 * math.pi)
    share_kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (share_kept + (1 - share_kept) / config.rope_factor)


def _rotate(x_BSHE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (e, e + E / 2), in float32: bfloat16 merges positions above 256."""
    low, high = x_BSHE.float().chunk(2, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1).to(x_BSHE.dtype)


def initial_values(name: str, shape: torch.Size, seed: int, layers: int) -> Tensor:
    """The initial values of a whole parameter, float32 on the CPU (`Transformer.init_weights`)."""
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    digest = hashlib.sha256(f"{seed}/init/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    writes_to_stream = name.endswith(("attention.out.weight", "mlp.down.weight"))
    return torch.randn(shape, generator=generator) * (
        INIT_STD / (2 * layers) ** 0.5 if writes_to_stream else INIT_STD
    )


@torch.no_grad()
def _fill_parameter(parameter: nn.Parameter, values: Tensor) -> None:
    if parameter.is_meta:
        raise ValueError(
            "the model is on the meta device; call to_empty(device=...) before init_weights"
        )
    if isinstance(parameter, DTensor):
        # every rank drew the same values and keeps its part: nothing is sent
        mesh, placements = parameter.device_mesh, parameter.placements
        values = distribute_tensor(values, mesh, placements, src_data_rank=None)
    parameter.copy_(values)


def _check_heads(config: ModelConfig) -> None:
    divides = config.head_dim > 0 or config.dim % config.num_heads == 0
    if not divides or config.head_size % 2 or config.num_heads % config.num_kv_heads:
        raise ValueError(
            f"model: dim {config.dim}, num_heads {config.num_heads}, num_kv_heads "
            f"{config.num_kv_heads}, head_dim {config.head_dim}; dim must be a multiple of 2 "
            "num_heads or head_dim be even, and num_heads a multiple of num_kv_heads"
        )
    if config.rope_factor > 1 and config.rope_high_freq_factor <= config.rope_low_freq_factor:
        raise ValueError(
            f"model: rope_high_freq_factor {config.rope_high_freq_factor} must exceed "
            f"rope_low_freq_factor {config.rope_low_freq_factor}"
        )
