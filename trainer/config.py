"""What a training run is made of: sizes, precision, optimiser, data, checkpoints. Plain values, read without torch or Ray."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-style decoder (Touvron et al. 2023). `heads` is a multiple of `kv_heads`, `dim` of `heads`.

    `vocab_size` may exceed the tokenizer's (100,277 of cl100k_base), as multiples of 128 are faster.
    """

    vocab_size: int = 100_352
    dim: int = 768
    layers: int = 12
    heads: int = 12
    kv_heads: int = 12
    hidden_dim: int = 2048
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-5
    tied: bool = True
    attention: Literal["sdpa", "flex"] = "sdpa"


PRESETS = {
    "tiny": ModelConfig(dim=64, layers=2, heads=4, kv_heads=2, hidden_dim=192),
    "125M": ModelConfig(),
    "350M": ModelConfig(dim=1024, layers=24, heads=16, kv_heads=16, hidden_dim=2816),
    # 1B, 3B and 8B have the shapes of Llama 3.2 and 3.1
    "1B": ModelConfig(dim=2048, layers=16, heads=32, kv_heads=8, hidden_dim=8192),
    "3B": ModelConfig(dim=3072, layers=28, heads=24, kv_heads=8, hidden_dim=8192),
    "8B": ModelConfig(dim=4096, layers=32, heads=32, kv_heads=8, hidden_dim=14_336, tied=False),
}


@dataclass(frozen=True)
class ParallelConfig:
    """`shard_size` ranks hold one copy of the model between them (0: all; fewer: HSDP, copies are kept equal by all-reduce).

    Weights and reductions are float32 in either precision; "bf16" is what blocks compute in.
    """

    precision: Literal["bf16", "fp32"] = "bf16"
    checkpointing: Literal["none", "selective", "full"] = "none"
    compile: bool = False
    shard_size: int = 0


@dataclass(frozen=True)
class OptimizerConfig:
    """`clip_norm` bounds the global gradient norm, 0 for no bound. Weight decay is of matrices alone."""

    name: Literal["adamw", "adafactor", "sgd"] = "adamw"
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    momentum: float = 0.0
    weight_decay: float = 0.1
    clip_norm: float = 1.0


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate: up in `warmup_steps`, then down to `min_ratio` of it; "wsd" only in the last `decay_share` of the steps."""

    name: Literal["cosine", "wsd", "linear"] = "cosine"
    warmup_steps: int = 100
    decay_share: float = 0.2
    min_ratio: float = 0.1


@dataclass(frozen=True)
class SourceConfig:
    """A run of the pipeline, whose catalog lists generations; `weight` is its share of the rows against other sources'.

    `generations` names those to read, in order; () is all, and each new one when it is published.
    """

    run: str
    weight: float = 1.0
    generations: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataConfig:
    """`global_batch_rows` a step over all ranks, in micro-batches of `micro_batch_rows` a rank. `workers` are loaders a rank.

    The order of rows depends on `shuffle_seed`, `canonical_nodes` and the global batch, and not on the number of ranks.
    When generations end: stop, wait for the next up to `wait_seconds`, or repeat up to `max_epochs`.
    """

    sources: tuple[SourceConfig, ...] = ()
    global_batch_rows: int = 8
    micro_batch_rows: int = 8
    workers: int = 0
    shuffle_seed: int = 0
    canonical_nodes: int = 64
    batch_timeout_seconds: float = 60.0
    when_empty: Literal["stop", "wait", "repeat"] = "stop"
    max_epochs: int = 1
    wait_seconds: float = 3600.0
    verify: Literal["full", "quick"] = "full"


@dataclass(frozen=True)
class CheckpointConfig:
    """A checkpoint every `every_steps`, the last `keep_last` and the best `keep_best` by held-out loss kept."""

    every_steps: int = 100
    keep_last: int = 2
    keep_best: int = 1
    asynchronous: bool = True


@dataclass(frozen=True)
class TrainConfig:
    """A training run in `directory`, of `max_steps` steps (0: until the data ends)."""

    directory: str
    seed: int = 0
    max_steps: int = 0
    model: ModelConfig = PRESETS["tiny"]
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = CheckpointConfig()
