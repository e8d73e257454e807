"""What MFU to expect of the trainer on one H200: a roofline, not a measurement.

    python -m benchmarks.roofline

Each kernel takes the longer of its FLOP at an assumed rate and its bytes at an assumed bandwidth;
what runs at the same time is not counted, nor is any time in which the GPU has nothing to do. Rows
of 2,048 tokens are packed with documents of 700 on average, drawn as by `benchmarks.trainer`.
"""

from typing import NamedTuple

import numpy as np
import torch

from benchmarks.trainer import DOCUMENT_TOKENS, MICRO_TOKENS, draw_documents
from trainer.config import PRESETS, ModelConfig
from trainer.model.attention import BLOCK, block_mask
from trainer.model.llama import Transformer, flops_per_token
from trainer.model.packing import document_starts, visible_positions
from trainer.telemetry.devices import peak_flops

SEQ_LEN, MICRO_BATCHES = 2048, 4
PEAK = peak_flops("NVIDIA H200") or 0.0
# assumptions, as shares of the peak: large products of bfloat16 on an H100, whose clock falls under
# load
MATMUL = 0.72
# FlashAttention 2 reaches 35 % on an H100 (Shah et al. 2024, arXiv:2407.08608); FlexAttention 90 %
# of that forward and 85 % backward (pytorch.org/blog/flexattention, 2024)
ATTENTION_FORWARD, ATTENTION_BACKWARD = 0.35 * 0.90, 0.35 * 0.85
BANDWIDTH = 0.8 * 4.8e12  # bytes/s; "H200" data sheet: 4.8 TB/s


class Roofline(NamedTuple):
    """Seconds of a step by kind of work, and MFU within documents and as PaLM counts it."""

    preset: str
    seconds: dict[str, float]
    tokens_per_second: float
    mfu: float
    mfu_palm: float


def roofline(preset: str, *, recompute: bool) -> Roofline:
    """The step of a preset on one GPU; `recompute` with full activation checkpointing."""
    config, tokens = PRESETS[preset], MICRO_TOKENS.get(preset, 32_768)
    with torch.device("meta"):
        model = Transformer(config)
    weights = sum(parameter.numel() for parameter in model.parameters())
    in_blocks = sum(parameter.numel() for parameter in model.blocks.parameters())
    head = config.vocab_size * config.dim
    rows = tokens // SEQ_LEN
    drawn = draw_documents(np.random.default_rng(0), (rows, SEQ_LEN), DOCUMENT_TOKENS)
    documents = torch.from_numpy(drawn)
    forward, backward = _attention_seconds(config, documents)
    passes = 4 if recompute else 3  # of a forward pass' products
    seconds = {
        "products of blocks": passes * 2 * in_blocks * tokens / (MATMUL * PEAK),
        "head and loss": 3 * 2 * head * tokens / (MATMUL * PEAK) + _loss_seconds(config, tokens),
        "attention": forward * (2 if recompute else 1) + backward,
        "norms, rotations, SwiGLU": passes * _elementwise_seconds(config, tokens),
        # a copy in bfloat16 of each float32 weight, forward and backward; gradients are added up
        "weights and gradients": weights * (2 * 6 + 10) / BANDWIDTH,
    }
    seconds = {name: MICRO_BATCHES * value for name, value in seconds.items()}
    seconds["clipping and AdamW"] = weights * (12 + 28) / BANDWIDTH
    rate = MICRO_BATCHES * tokens / sum(seconds.values())
    context = visible_positions(documents).double().mean().item()
    used = [rate * flops_per_token(model, length) / PEAK for length in (context, SEQ_LEN)]
    return Roofline(preset, seconds, rate, *used)


def _attention_seconds(config: ModelConfig, documents: torch.Tensor) -> tuple[float, float]:
    """Forward and backward over all blocks that are computed, in full."""
    mask = block_mask(document_starts(documents))
    blocks = int(mask.to_dense().sum())
    products = 2 * BLOCK * BLOCK * config.head_size * config.num_heads * blocks * config.num_layers
    # scores and their product with the values; backward computes the scores again, and four more
    return 2 * products / (ATTENTION_FORWARD * PEAK), 5 * products / (ATTENTION_BACKWARD * PEAK)


def _elementwise_seconds(config: ModelConfig, tokens: int) -> float:
    """Seconds of a forward pass' reads and writes in bfloat16 that are no product's."""
    heads = (config.num_heads + config.num_kv_heads) * config.head_size
    numbers = 2 * 2 * config.dim + 2 * 3 * config.dim + 2 * heads + 3 * config.ffn_dim
    return 2 * numbers * tokens * config.num_layers / BANDWIDTH


def _loss_seconds(config: ModelConfig, tokens: int) -> float:
    """Seconds for logits, written and read twice, and their gradient, written and read twice."""
    return 2 * 6 * config.vocab_size * tokens / BANDWIDTH


def main() -> None:
    """Print a line per preset, and where the time of a step goes."""
    for preset in ("125M", "350M", "1B", "3B", "8B"):
        found = roofline(preset, recompute=preset == "8B")
        total = sum(found.seconds.values())
        shares = ", ".join(f"{name} {part / total:.0%}" for name, part in found.seconds.items())
        print(
            f"{preset}: {found.tokens_per_second:,.0f} tokens/s  MFU {found.mfu:.1%} "
            f"(PaLM {found.mfu_palm:.1%})  {shares}"
        )


if __name__ == "__main__":
    main()
