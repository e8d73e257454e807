"""Loads the configuration of a training: a TOML file over defaults, the command line over that."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from filters.suggest import did_you_mean
from pipeline.config.build import build
from pipeline.config.paths import absolute_path, check_survives_job
from pipeline.config.source import error_at, read_source
from trainer.config import PRESETS, TrainConfig


def load_training(file: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a TOML file and `section.key=value` overrides; ConfigError for the first problem.

    `model.preset` names one of PRESETS, which the section's other keys override. Paths are made
    absolute.
    """
    values, origins = read_source(file, overrides)
    model = values.get("model", {})
    if isinstance(model, dict) and "preset" in model:
        preset = model.pop("preset")
        if preset not in PRESETS:
            text = f" = {preset!r}: there is no such preset{did_you_mean(str(preset), PRESETS)}"
            raise error_at("model.preset", text, origins)
        values["model"] = dataclasses.asdict(PRESETS[preset]) | model
    config = cast(TrainConfig, build("", TrainConfig, values, origins))
    check_survives_job("directory", config.directory, origins)
    check_survives_job("checkpoint.folder", config.checkpoint.folder, origins)
    config = _with_absolute_paths(config)
    runs = [source.run for source in config.data.sources]
    if twice := [run for run in runs if runs.count(run) > 1]:
        text = f" names {twice[0]} twice; set its weight instead"
        raise error_at("data.sources", text, origins)
    return config


def _with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Workers may run in another folder, and a source is known by its path."""
    replace = dataclasses.replace
    sources = tuple(
        replace(source, run=absolute_path(source.run)) for source in config.data.sources
    )
    cache_dir = absolute_path(config.data.cache_dir or f"{config.directory}/cache")
    cloze = tuple(map(absolute_path, config.evaluation.cloze))
    return replace(
        config,
        directory=absolute_path(config.directory),
        data=replace(config.data, sources=sources, cache_dir=cache_dir),
        checkpoint=replace(config.checkpoint, folder=absolute_path(config.checkpoint.folder)),
        evaluation=replace(config.evaluation, cloze=cloze),
        telemetry=replace(config.telemetry, feedback=absolute_path(config.telemetry.feedback)),
    )
