"""Loads the configuration of a run: defaults in code, a TOML file over them, the command line over
that. Every key is checked before any work starts.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filters import available, filter_class
from pipeline.config.build import build, check_known
from pipeline.config.check import check
from pipeline.config.languages import RawConfig, build_by_language, build_section
from pipeline.config.paths import with_absolute_paths
from pipeline.config.percentiles import check_calibration, read_calibration
from pipeline.config.sections import SECTIONS, Config, RunConfig
from pipeline.config.source import located, read_source


def load(
    file: str | Path | None, overrides: Sequence[str] = (), *, calibrated: bool = True
) -> Config:
    """Read a file (None: defaults only), apply `section.key=value` overrides, and check it all.

    Bounds that are percentiles become numbers by the run's calibration; if not `calibrated`, they
    bound nothing. ConfigError for the first problem.
    """
    sections, origins = read_source(file, overrides)
    with located(origins):
        return _build_config(sections, origins, calibrated=calibrated)


def _build_config(sections: dict[str, Any], origins: dict[str, str], *, calibrated: bool) -> Config:
    per_language = sections.pop("per_language", {})
    classes = {**SECTIONS, **{name: filter_class(name) for name in available()}}
    for name in sections:
        check_known(name, [*classes, "per_language"], "section or stage")
    run = build("run", RunConfig, sections.get("run", {}))
    raw = RawConfig(sections, per_language, origins, read_calibration(run, required=calibrated))
    built = {name: build_section(name, cls, raw) for name, cls in classes.items()}
    config = Config(
        **{name: built[name] for name in SECTIONS},
        filters={name: built[name] for name in classes if name not in SECTIONS},
        per_language=build_by_language(classes, built["language"].allowed, raw),
        origins=origins,
    )
    check(config)
    config = with_absolute_paths(config)
    check_calibration(config, raw.calibration, [sections, *raw.per_language.values()])
    return config
