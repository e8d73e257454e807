"""The configuration of a training: sizes, precision, optimizer, data, checkpoints.

Each section is a strict dataclass; `pipeline.config.train` builds them from a TOML file.
"""

import re
from dataclasses import field, replace
from typing import Annotated, Literal

from pydantic import (
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)

Positive = Annotated[int, Field(ge=1)]
Sink = Literal["console", "jsonl", "tensorboard", "wandb", "mlflow"]

# files in a training's directory: its config when it last started; asks it to save and end
CONFIG, STOP = "config.json", "stop"

# old -> new: checkpoints saved with an old name still load, a config with one is refused
RENAMED_KEYS = {
    "model.layers": "model.num_layers",
    "model.heads": "model.num_heads",
    "model.kv_heads": "model.num_kv_heads",
    "model.hidden_dim": "model.ffn_dim",
    "model.tied": "model.tie_embeddings",
    "parallel.checkpointing": "parallel.activation_checkpointing",
    "data.when_empty": "data.at_end",
}


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """A Llama-style decoder (Touvron et al. 2023).

    `num_heads` is a multiple of `num_kv_heads`. A head has `head_dim` dimensions (0: `dim` /
    `num_heads`). `ffn_dim` is the width of the feed-forward layers; with `tie_embeddings` the
    output layer shares the embedding's weights. `vocab_size` may exceed the tokenizer's, as
    multiples of 128 are faster; 0, the default in a file, takes it from the generations. `qkv_bias`
    adds a bias to queries, keys and values (Qwen2); `qk_norm` normalizes each head of queries and
    keys (Qwen3). `attention`: "auto" is "flex" (FlexAttention) on GPUs, which skips what lies
    between documents, and "sdpa" on CPUs, for which FlexAttention has no backward pass.

    A `rope_factor` above 1 stretches the slow rotations of the rotary embedding for longer
    contexts, as Llama 3.1: by the factor for those that turn less than `rope_low_freq_factor` times
    in `rope_original_positions`, not at all above `rope_high_freq_factor` times.

    `init` is a Hugging Face checkpoint to start from, a folder or URL with config.json and
    safetensors in the layout of Llama 2 or 3, Qwen2 or Qwen3. The other settings are read from
    there, also when a training resumes; only `vocab_size` may be larger. "" draws the weights from
    the seed.
    """

    vocab_size: NonNegativeInt = 100_352
    dim: Positive = 768
    num_layers: Positive = 12
    num_heads: Positive = 12
    num_kv_heads: Positive = 12
    ffn_dim: Positive = 2048
    rope_theta: NonNegativeFloat = 500_000.0
    norm_eps: NonNegativeFloat = 1e-5
    tie_embeddings: bool = True
    attention: Literal["auto", "sdpa", "flex"] = "auto"
    head_dim: NonNegativeInt = 0
    qkv_bias: bool = False
    qk_norm: bool = False
    rope_factor: Annotated[float, Field(ge=1)] = 1.0
    rope_low_freq_factor: PositiveFloat = 1.0
    rope_high_freq_factor: PositiveFloat = 4.0
    rope_original_positions: Positive = 8192
    init: str = ""

    @property
    def head_size(self) -> int:
        """Dimensions of a head."""
        return self.head_dim or self.dim // self.num_heads


PRESETS = {
    "tiny": ModelConfig(dim=64, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=192),
    "125M": ModelConfig(),
    "350M": ModelConfig(dim=1024, num_layers=24, num_heads=16, num_kv_heads=16, ffn_dim=2816),
    # 1B, 3B and 8B have the shapes of Llama 3.2 and 3.1
    "1B": ModelConfig(dim=2048, num_layers=16, num_heads=32, num_kv_heads=8, ffn_dim=8192),
    "3B": ModelConfig(dim=3072, num_layers=28, num_heads=24, num_kv_heads=8, ffn_dim=8192),
    "8B": ModelConfig(
        dim=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        ffn_dim=14_336,
        tie_embeddings=False,
    ),
}


@dataclass(frozen=True, config=STRICT)
class ParallelConfig:
    """How the model is spread over ranks, and what it computes in.

    `shard_size` ranks hold one copy of the model between them (0: all; fewer: HSDP, copies are kept
    equal by all-reduce). Weights and reductions are float32 in either precision; "bf16" is what
    blocks compute in. `compile`: "auto" compiles on GPUs.

    `gradient_reduction`: micro-batches of a step are reduced over ranks one by one
    ("each_micro_batch"), or are summed unsharded on each rank, 4 bytes a parameter, and reduced
    once ("last_micro_batch"); "auto" is the latter if that takes a tenth of the GPU's memory or
    less. A rank that waits for another longer than `timeout_seconds` ends the attempt.
    """

    precision: Literal["bf16", "fp32"] = "bf16"
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    compile: Literal["auto"] | bool = "auto"
    gradient_reduction: Literal["auto", "each_micro_batch", "last_micro_batch"] = "auto"
    shard_size: NonNegativeInt = 0
    timeout_seconds: PositiveFloat = 600.0


@dataclass(frozen=True, config=STRICT)
class OptimizerConfig:
    """The optimizer. `clip_norm` limits the global gradient norm, 0 for no limit.

    Only matrices have weight decay. "muon" is Muon for the matrices of blocks and AdamW for the
    rest. `state_dtype` is how AdamW keeps its moments: "bf16" halves them, and takes betas up to
    0.99. `z_loss` times log(Z)^2, the squared log of the softmax's denominator, is added to the
    loss that is minimized, not to the one that is reported (PaLM: 1e-4).
    """

    name: Literal["adamw", "muon", "adafactor", "sgd"] = "adamw"
    lr: NonNegativeFloat = 3e-4
    betas: tuple[NonNegativeFloat, NonNegativeFloat] = (0.9, 0.95)
    eps: NonNegativeFloat = 1e-8
    momentum: NonNegativeFloat = 0.0
    weight_decay: NonNegativeFloat = 0.1
    clip_norm: NonNegativeFloat = 1.0
    state_dtype: Literal["fp32", "bf16"] = "fp32"
    z_loss: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _state_fits(self) -> "OptimizerConfig":
        if self.state_dtype == "bf16" and self.name != "adamw":
            raise ValueError(f'state_dtype = "bf16" is for adamw, not {self.name}')
        if self.state_dtype == "bf16" and max(self.betas) > 0.99:
            raise ValueError(
                f"betas = {list(self.betas)}: in bf16 a moment that moves by less than 1/256 a "
                "step stands still; take 0.99 at most"
            )
        return self


@dataclass(frozen=True, config=STRICT)
class ScheduleConfig:
    """Learning rate: up in `warmup_steps`, then down to `min_ratio` of it; "wsd" only in the last
    `decay_share` of the steps.
    """

    name: Literal["cosine", "wsd", "linear"] = "cosine"
    warmup_steps: NonNegativeInt = 100
    decay_share: NonNegativeFloat = 0.2
    min_ratio: NonNegativeFloat = 0.1


@dataclass(frozen=True, config=STRICT)
class SourceConfig:
    """A run of the pipeline, a folder or URL, whose catalog lists generations.

    `weight` is its share of the rows relative to the other sources. `generations` names those to
    read, in order; () reads all that no other supersedes, and each new one once it is published.
    """

    run: str
    weight: PositiveFloat = 1.0
    generations: tuple[str, ...] = ()


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """The rows of a step: `global_batch_rows` over all ranks, in micro-batches of
    `micro_batch_rows` per rank, read by `workers` loader processes per rank.

    The order of rows depends on `shuffle_seed`, `canonical_nodes` and the global batch, and not on
    the number of ranks. When generations end (`at_end`): stop, wait for the next up to
    `wait_seconds`, or repeat up to `max_epochs`.

    Sources on an object store (s3://BUCKET/RUN) are copied by each node to `cache_dir`. It must
    belong to this training alone and have room for two unpacked generations per source, or for all
    if they are repeated; "" is `cache/` of the training's directory. If that lies on a file system
    that nodes share, name a local disk of each node instead.
    """

    sources: tuple[SourceConfig, ...] = ()
    global_batch_rows: Positive = 8
    micro_batch_rows: Positive = 8
    workers: NonNegativeInt = 0
    shuffle_seed: NonNegativeInt = 0
    canonical_nodes: Positive = 64
    batch_timeout_seconds: PositiveFloat = 60.0
    at_end: Literal["stop", "wait", "repeat"] = "stop"
    max_epochs: Positive = 1
    wait_seconds: NonNegativeFloat = 3600.0
    verify: Literal["full", "quick"] = "full"
    cache_dir: str = ""

    @field_validator("cache_dir")
    @classmethod
    def _cache_is_local(cls, path: str) -> str:
        if "://" in path:
            raise ValueError("give a local folder")
        return path


@dataclass(frozen=True, config=STRICT)
class CheckpointConfig:
    """A checkpoint every `every_steps`; the last `keep_last` stay, and the `keep_best` with the
    lowest held-out loss among those whose step was evaluated: over the sources, or over the named
    sets where no source has one.

    `folder` is a disk that every rank sees or a URL (s3://BUCKET/RUN); "" is `checkpoints/` of the
    training's directory. Where `asynchronous`, a process beside each rank writes while training
    goes on; the memory for it, as large as the rank's weights and optimizer, stays allocated.
    """

    folder: str = ""
    every_steps: Positive = 100
    keep_last: Positive = 2
    keep_best: NonNegativeInt = 1
    asynchronous: bool = True


@dataclass(frozen=True, config=STRICT)
class TelemetryConfig:
    """Where metrics go besides metrics.jsonl, which is always written, and every how many seconds
    feedback is written for the pipeline.

    `feedback` is the folder that the pipeline reads; "" is `feedback/` of the first source's run.
    `name` identifies the trainer there and must be unique; "" is the name of the training's
    directory. After a warm-up `profile_steps` steps of rank 0 are profiled into `profile/` of the
    training's directory.
    """

    sinks: tuple[Sink, ...] = ("console", "jsonl")
    feedback: str = ""
    name: str = ""
    every_seconds: PositiveFloat = 30.0
    profile_steps: NonNegativeInt = 0


@dataclass(frozen=True, config=STRICT)
class HeldOutConfig:
    """A named set of rows to evaluate on: the first `rows` of a run, a folder or URL.

    `split` is "held_out", what `pack.held_out` has set aside, or "training", the rows of the
    generation itself, of a run that is not trained on: rank 0 verifies all of it before the first
    evaluation, so it should be small. They come from the first of `generations`
    that has any; () is those that no other supersedes. With `hosts`, only documents from these
    hosts and those below them count, as many as fill `rows` rows.
    """

    run: str
    split: Literal["held_out", "training"] = "held_out"
    generations: tuple[str, ...] = ()
    rows: Positive = 256
    hosts: tuple[str, ...] = ()


@dataclass(frozen=True, config=STRICT)
class EvaluationConfig:
    """Every `every_steps` (0: never) the loss on the rows that `pack` held out, and multiple-choice
    questions.

    Of each source the first `held_out_rows` rows (0 for none) of the first generation that has any,
    so that losses stay comparable as data is added. `held_out` are more sets, by name. `cloze` are
    files in the format of HellaSwag or ARC, of which the first `cloze_questions` are used.
    """

    every_steps: NonNegativeInt = 0
    held_out_rows: NonNegativeInt = 256
    held_out: dict[Annotated[str, Field(pattern=r"^[\w.-]{1,100}$")], HeldOutConfig] = field(
        default_factory=dict
    )
    cloze: tuple[str, ...] = ()
    cloze_questions: Positive = 500

    @model_validator(mode="after")
    def _something_is_evaluated(self) -> "EvaluationConfig":
        if "sources" in self.held_out:
            raise ValueError('held_out.sources: "sources" is the set of all sources; rename it')
        if self.every_steps and not (self.held_out_rows or self.held_out or self.cloze):
            raise ValueError(
                "every_steps is set, but neither held_out_rows, held_out nor cloze: nothing to "
                "evaluate"
            )
        return self


@dataclass(frozen=True, config=STRICT)
class RayConfig:
    """Workers of Ray Train, one per GPU where there are any: from `min_workers` (0: as many as
    `workers`) to `workers`, of which only counts that divide the global batch are used.

    `cpus_per_worker` are reserved for a worker and its loaders. `gpus`: whether each worker takes a
    GPU; "auto" looks at the GPUs that the cluster has now, and would miss those of machines that it
    starts on demand. If a worker dies, all restart from the last checkpoint, up to `max_failures`
    times (-1: always); a preempted node does not count.
    """

    workers: Positive = 1
    min_workers: NonNegativeInt = 0
    gpus: Literal["auto", "yes", "no"] = "auto"
    cpus_per_worker: NonNegativeFloat = 1.0
    max_failures: Annotated[int, Field(ge=-1)] = 3

    @model_validator(mode="after")
    def _range_is_not_empty(self) -> "RayConfig":
        if self.min_workers > self.workers:
            raise ValueError(f"min_workers = {self.min_workers} exceeds workers = {self.workers}")
        return self


@dataclass(frozen=True, config=STRICT)
class TrainConfig:
    """A training in the local folder `directory`, of `max_steps` steps (0: until the data ends).

    A step whose loss spikes, 6 sigma above the last 128, is logged with its rows; with
    `skip_spikes` it does not change the weights.

    `branch` = "RUN@STEP" starts it from a checkpoint of another training: RUN is that one's
    directory, or the folder or URL of its checkpoints. The schedule goes on from the rate that was
    reached there, and `max_steps` counts the parent's steps too.
    """

    directory: str
    seed: NonNegativeInt = 0
    max_steps: NonNegativeInt = 0
    skip_spikes: bool = False
    branch: str = ""
    model: ModelConfig = PRESETS["tiny"]
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    data: DataConfig = DataConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    ray: RayConfig = RayConfig()
    telemetry: TelemetryConfig = TelemetryConfig()

    @field_validator("directory")
    @classmethod
    def _directory_is_local(cls, path: str) -> str:
        if not path or "://" in path:
            raise ValueError("give a local folder; checkpoint.folder may be a URL")
        return path

    @field_validator("branch")
    @classmethod
    def _branch_names_a_step(cls, branch: str) -> str:
        if branch and not re.fullmatch(r".+@\d+", branch):
            raise ValueError("write RUN@STEP, the directory of a training and a step")
        return branch


def with_vocab_size(config: TrainConfig, vocab_size: int | None) -> TrainConfig:
    """A configuration whose model has as many tokens as the data, up to a multiple of 128, unless
    it names their number. While nothing is published it is 100,352: room for cl100k_base. What a
    checkpoint has stays.
    """
    if config.model.vocab_size:
        return config
    size = 100_352 if vocab_size is None else -(-vocab_size // 128) * 128
    return replace(config, model=replace(config.model, vocab_size=size))
