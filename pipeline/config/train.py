"""Loads the configuration of a training: a TOML file over defaults, the command line over that."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from filters.suggest import did_you_mean
from pipeline.config.build import build
from pipeline.config.paths import check_survives_job, replace_paths
from pipeline.config.source import error_at, located, read_source
from trainer.config import PRESETS, TrainConfig
from trainer.model.layouts import disagreements, model_settings


def load_training(file: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a TOML file and `section.key=value` overrides; ConfigError for the first problem.

    `model.preset` names one of PRESETS, which the section's other keys override. Without
    `model.vocab_size` that of the data is taken. Paths are made absolute.
    """
    values, origins = read_source(file, overrides)
    with located(origins):
        return _build_config(values)


def _build_config(values: dict[str, Any]) -> TrainConfig:
    model = values.setdefault("model", {"preset": "tiny"})
    from_data = {"vocab_size": 0}
    if isinstance(model, dict) and isinstance(model.get("init"), str) and model["init"]:
        values["model"] = _model_of_init(model["init"], model)
    elif isinstance(model, dict) and "preset" in model:
        preset = model.pop("preset")
        if preset not in PRESETS:
            text = f" = {preset!r}: there is no such preset{did_you_mean(str(preset), PRESETS)}"
            raise error_at("model.preset", text)
        values["model"] = dataclasses.asdict(PRESETS[preset]) | from_data | model
    elif isinstance(model, dict):
        values["model"] = from_data | model
    config = cast(TrainConfig, build("", TrainConfig, values))
    check_survives_job("directory", config.directory)
    check_survives_job("checkpoint.folder", config.checkpoint.folder)
    config = _with_absolute_paths(config)
    runs = [source.run for source in config.data.sources]
    if twice := [run for run in runs if runs.count(run) > 1]:
        text = f" names {twice[0]} twice; set its weight instead"
        raise error_at("data.sources", text)
    for name, rows in config.evaluation.held_out.items():
        if rows.split == "training" and rows.run in runs:
            text = ' = "training": this run is trained on; only its split "held_out" is not'
            raise error_at(f"evaluation.held_out.{name}.split", text)
    return config


def _model_of_init(init: str, given: dict[str, Any]) -> dict[str, Any]:
    """The section [model] of a training that starts from a Hugging Face checkpoint."""
    if "preset" in given:
        raise error_at("model.preset", ": model.init has the sizes of a model; leave it out")
    try:
        settings, different = model_settings(init), disagreements(given, init)
    except (OSError, ValueError) as error:
        raise error_at("model.init", f": {error}") from None
    for key, value in different.items():
        text = f" = {given[key]!r}: {init} has {value!r}; leave the key out"
        raise error_at(f"model.{key}", text)
    return settings | given


def _with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Workers may run in another folder, and a source is known by its path."""
    replace = dataclasses.replace
    sources = tuple(replace_paths(source, ["run"]) for source in config.data.sources)
    cache_dir = config.data.cache_dir or f"{config.directory}/cache"
    data = replace(config.data, sources=sources, cache_dir=cache_dir)
    held_out = {
        name: replace_paths(rows, ["run"]) for name, rows in config.evaluation.held_out.items()
    }
    evaluation = replace(config.evaluation, held_out=held_out)
    config = replace(
        config,
        model=replace_paths(config.model, ["init"]),
        data=replace_paths(data, ["cache_dir"]),
        checkpoint=replace_paths(config.checkpoint, ["folder"]),
        evaluation=replace_paths(evaluation, ["cloze"]),
        telemetry=replace_paths(config.telemetry, ["feedback"]),
    )
    return cast(TrainConfig, replace_paths(config, ["directory", "branch"]))
