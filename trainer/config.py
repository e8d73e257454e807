"""What a training run is made of: sizes, precision, optimiser, data, checkpoints.

Plain values, read without torch or Ray.
"""

import difflib
import math
import os
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

Sink = Literal["console", "jsonl", "tensorboard", "wandb", "mlflow"]
STOP = (
    "stop"  # a file in the training's folder that asks it to save and end, wherever its ranks run
)


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-style decoder (Touvron et al. 2023).

    `num_heads` is a multiple of `num_kv_heads`, `dim` of `num_heads`. `ffn_dim` is the width of the
    feed-forward layers; with `tie_embeddings` the output layer shares the embedding's weights.

    `vocab_size` may exceed the tokenizer's (100,277 of cl100k_base), as multiples of 128 are
    faster.
    """

    vocab_size: int = 100_352
    dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    num_kv_heads: int = 12
    ffn_dim: int = 2048
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    attention: Literal["sdpa", "flex"] = "sdpa"


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

PRESETS = {
    "tiny": ModelConfig(dim=64, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=192),
    "125M": ModelConfig(),
    "350M": ModelConfig(dim=1024, num_layers=24, num_heads=16, num_kv_heads=16, ffn_dim=2816),
    # 1B, 3B and 8B have the shapes of Llama 3.2 and 3.1
    "1B": ModelConfig(dim=2048, num_layers=16, num_heads=32, num_kv_heads=8, ffn_dim=8192),
    "3B": ModelConfig(dim=3072, num_layers=28, num_heads=24, num_kv_heads=8, ffn_dim=8192),
    "8B": ModelConfig(
        dim=4096, num_layers=32, num_heads=32, num_kv_heads=8, ffn_dim=14_336, tie_embeddings=False
    ),
}


@dataclass(frozen=True)
class ParallelConfig:
    """`shard_size` ranks hold one copy of the model between them (0: all; fewer: HSDP, copies are
    kept equal by all-reduce).

    Weights and reductions are float32 in either precision; "bf16" is what blocks compute in.
    """

    precision: Literal["bf16", "fp32"] = "bf16"
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    compile: bool = False
    shard_size: int = 0


@dataclass(frozen=True)
class OptimizerConfig:
    """`clip_norm` bounds the global gradient norm, 0 for no bound.

    Weight decay is of matrices alone.
    """

    name: Literal["adamw", "adafactor", "sgd"] = "adamw"
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    momentum: float = 0.0
    weight_decay: float = 0.1
    clip_norm: float = 1.0


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate: up in `warmup_steps`, then down to `min_ratio` of it; "wsd" only in the last
    `decay_share` of the steps.
    """

    name: Literal["cosine", "wsd", "linear"] = "cosine"
    warmup_steps: int = 100
    decay_share: float = 0.2
    min_ratio: float = 0.1


@dataclass(frozen=True)
class SourceConfig:
    """A run of the pipeline, a folder or URL, whose catalog lists generations; `weight` is its
    share of the rows against others'.

    `generations` names those to read, in order; () is all, and each new one when it is published.
    """

    run: str
    weight: float = 1.0
    generations: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataConfig:
    """`global_batch_rows` a step over all ranks, in micro-batches of `micro_batch_rows` a rank.
    `workers` are loaders a rank.

    The order of rows depends on `shuffle_seed`, `canonical_nodes` and the global batch, and not on
    the number of ranks. When generations end: stop, wait for the next up to `wait_seconds`, or
    repeat up to `max_epochs`.

    What lies on an object store (s3://BUCKET/RUN) is copied by each node to `cache_dir`, which is
    this training's alone and has room for two generations of a source at a time, unpacked, or all
    if they are repeated; "" is `cache/` of the training's directory. Where that lies on a file
    system that nodes share, name a disk that each has for itself.
    """

    sources: tuple[SourceConfig, ...] = ()
    global_batch_rows: int = 8
    micro_batch_rows: int = 8
    workers: int = 0
    shuffle_seed: int = 0
    canonical_nodes: int = 64
    batch_timeout_seconds: float = 60.0
    at_end: Literal["stop", "wait", "repeat"] = "stop"
    max_epochs: int = 1
    wait_seconds: float = 3600.0
    verify: Literal["full", "quick"] = "full"
    cache_dir: str = ""


@dataclass(frozen=True)
class CheckpointConfig:
    """A checkpoint every `every_steps`, the last `keep_last` and the best `keep_best` by held-out
    loss kept.

    The best are of those steps that were evaluated. `folder` is a disk that every rank sees or a
    URL (s3://BUCKET/RUN); "" is `checkpoints/` of the training's directory.
    """

    folder: str = ""
    every_steps: int = 100
    keep_last: int = 2
    keep_best: int = 1
    asynchronous: bool = True


@dataclass(frozen=True)
class TelemetryConfig:
    """Where figures go, besides metrics.jsonl, which is always written; and how often the pipeline
    is told, in seconds.

    `feedback` is the folder that the pipeline reads; "" is `feedback/` of the first source's run.
    `name` is the trainer's in it, and must be its own; "" is that of the training's directory.
    """

    sinks: tuple[Sink, ...] = ("console", "jsonl")
    feedback: str = ""
    name: str = ""
    every_seconds: float = 30.0


@dataclass(frozen=True)
class EvaluationConfig:
    """Every `every_steps` (0: never) the loss on what `pack` held out, and multiple-choice
    questions.

    Of each source the first `held_out_rows` rows held out in the first generation that has any, so
    that figures compare as the supply grows; 0 for none. `cloze` are files in the format of
    HellaSwag or ARC; the first `cloze_questions` are asked.
    """

    every_steps: int = 0
    held_out_rows: int = 256
    cloze: tuple[str, ...] = ()
    cloze_questions: int = 500


@dataclass(frozen=True)
class RayConfig:
    """Workers of Ray Train, one a GPU where there are any: from `min_workers` (0: as many as
    `workers`) to `workers`.

    Only counts that divide the global batch are taken. `cpus_per_worker` are reserved for each with
    its loaders. `gpus`: whether workers take one each; "auto" looks at what the cluster has now,
    and would miss machines that it starts on demand. A worker that dies restarts all from the last
    checkpoint, `max_failures` times (-1: always); a preempted node does not count.
    """

    workers: int = 1
    min_workers: int = 0
    gpus: Literal["auto", "yes", "no"] = "auto"
    cpus_per_worker: float = 1.0
    max_failures: int = 3


@dataclass(frozen=True)
class TrainConfig:
    """A training run in the local folder `directory`, of `max_steps` steps (0: until the data
    ends).

    A step whose loss is a spike, 6 sigma above the last 128, is logged with its rows, and left out
    with `skip_spikes`.
    """

    directory: str
    seed: int = 0
    max_steps: int = 0
    skip_spikes: bool = False
    model: ModelConfig = field(default_factory=lambda: PRESETS["tiny"])
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)


class ConfigError(ValueError):
    """The configuration is wrong; the message says where and what to do."""


def load(file: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a TOML file and section.key=value overrides. ConfigError on the first thing that is
    wrong.

    `model.preset` names one of PRESETS, over which the section's other keys are laid. Paths are
    made absolute.
    """
    try:
        raw = tomllib.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: {error}") from None
    for override in overrides:
        _override(raw, override)
    model = raw.get("model", {})
    if isinstance(model, dict) and "preset" in model:
        name = model.pop("preset")
        _known(name, PRESETS, "model.preset")
        raw["model"] = asdict(PRESETS[name]) | model
    config = cast(TrainConfig, _build(TrainConfig, raw, ""))
    _check(config)
    return _absolute(config)


def _check(config: TrainConfig) -> None:
    """What one section asks of another, or of the world."""
    if not config.directory or "://" in config.directory:
        raise ConfigError(
            f"directory = '{config.directory}': a local folder is wanted; checkpoint.folder may be a URL"
        )
    for key, folder in (
        ("directory", config.directory),
        ("checkpoint.folder", config.checkpoint.folder),
    ):
        inside = f"{os.path.abspath(folder)}/".startswith(f"{os.getcwd()}/")
        if (
            folder
            and "://" not in folder
            and inside
            and os.path.basename(os.getcwd()).startswith("_ray_pkg_")
        ):
            said = f"{key} = '{folder}' lies in the job's working directory, which Ray removes with the job"
            raise ConfigError(f"{said}: write an absolute path that every node sees")
    if "://" in config.data.cache_dir:
        raise ConfigError(f"data.cache_dir = '{config.data.cache_dir}': a local folder is wanted")
    runs = [os.path.abspath(source.run) for source in config.data.sources]
    if twice := [run for run in runs if runs.count(run) > 1]:
        raise ConfigError(f"data.sources names {twice[0]} twice; set its weight instead")
    if config.evaluation.every_steps and not (
        config.evaluation.held_out_rows or config.evaluation.cloze
    ):
        raise ConfigError(
            "evaluation.every_steps is set, but neither held_out_rows nor cloze: there is nothing to evaluate"
        )
    if config.ray.min_workers > config.ray.workers:
        raise ConfigError(
            f"ray.min_workers = {config.ray.min_workers} exceeds ray.workers = {config.ray.workers}"
        )


def _absolute(config: TrainConfig) -> TrainConfig:
    """Workers may run in another folder, and a source is known by its path."""

    def path(name: str) -> str:
        return name if "://" in name or not name else os.path.abspath(name)

    sources = tuple(replace(source, run=path(source.run)) for source in config.data.sources)
    cache = path(config.data.cache_dir or f"{config.directory}/cache")
    return replace(
        config,
        directory=path(config.directory),
        data=replace(config.data, sources=sources, cache_dir=cache),
        checkpoint=replace(config.checkpoint, folder=path(config.checkpoint.folder)),
        evaluation=replace(config.evaluation, cloze=tuple(map(path, config.evaluation.cloze))),
        telemetry=replace(config.telemetry, feedback=path(config.telemetry.feedback)),
    )


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise ConfigError(f"'{override}': write section.key=value")
    *sections, last = key.split(".")
    for name in sections:
        raw = raw.setdefault(name, {})
        if not isinstance(raw, dict):
            raise ConfigError(f"'{override}': {name} is no section")
    try:
        raw[last] = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        raw[last] = value  # a word needs no quotes


def _build(cls: type[Any], raw: Any, at: str) -> Any:
    """A dataclass from a table, every key and type checked."""
    if not isinstance(raw, dict):
        raise ConfigError(f"{at} is a section, found {raw!r}")
    hints = get_type_hints(cls)
    for key in raw:
        _known(key, hints, f"{at}.{key}".lstrip("."))
    required = [
        f.name
        for f in fields(cls)
        if f.default is MISSING and f.default_factory is MISSING and f.name not in raw
    ]
    if required:
        raise ConfigError(f"{f'{at}.{required[0]}'.lstrip('.')} is missing")
    return cls(
        **{key: _value(hints[key], value, f"{at}.{key}".lstrip(".")) for key, value in raw.items()}
    )


def _value(wanted: Any, value: Any, at: str) -> Any:
    if is_dataclass(wanted):
        return _build(cast(type[Any], wanted), value, at)
    if get_origin(wanted) is Literal:
        _known(value, get_args(wanted), at)
        return value
    if get_origin(wanted) is tuple:
        inner, *others = get_args(wanted)
        if not isinstance(value, list | tuple) or (
            ... not in others and len(value) != 1 + len(others)
        ):
            number = "" if ... in others else f" of {1 + len(others)}"
            raise ConfigError(f"{at} = {value!r}: a list{number} is wanted")
        return tuple(_value(inner, item, f"{at}[{i}]") for i, item in enumerate(value))
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not wanted:
        raise ConfigError(
            f"{at} = {value!r}: {wanted.__name__} is wanted, found {type(value).__name__}"
        )
    least = _LEAST.get(at, 0)
    if wanted in (int, float) and not (least <= value < math.inf):
        raise ConfigError(f"{at} = {value!r}: a number from {least} on is wanted")
    return value


# the least that a number may be, where that is not 0
_LEAST = {
    **{
        f"model.{key}": 1
        for key in ("vocab_size", "dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim")
    },
    **{
        f"data.{key}": 1
        for key in ("global_batch_rows", "micro_batch_rows", "canonical_nodes", "max_epochs")
    },
    **{"checkpoint.every_steps": 1, "checkpoint.keep_last": 1, "evaluation.cloze_questions": 1},
    **{
        "ray.workers": 1,
        "ray.max_failures": -1,
        "telemetry.every_seconds": 0.001,
        "data.batch_timeout_seconds": 0.001,
    },
}


def _known(name: Any, known: Iterable[str], at: str) -> None:
    if name not in (names := list(known)):
        if at in RENAMED_KEYS:
            raise ConfigError(f"'{at}' was renamed: write '{RENAMED_KEYS[at]}'")
        close = difflib.get_close_matches(str(name), names, 1)
        hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(map(str, names))}"
        raise ConfigError(f"unknown '{name}' ({at}); {hint}")
