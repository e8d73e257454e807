"""Makes the paths of a configuration independent of the working directory: workers have another."""

import dataclasses
import os
from typing import Any

from filters import files
from pipeline.config.sections import SECTIONS, Config
from pipeline.config.source import error_at
from stages.storage.files import is_local


def absolute_path(path: str) -> str:
    """A local path made absolute; URIs stay as they are."""
    if not path or not is_local(path):
        return path.rstrip("/")
    return os.path.abspath(path.removeprefix("file://"))


def check_survives_job(key: str, path: str, origins: dict[str, str]) -> None:
    """ConfigError for a path of outputs inside the working directory of a Ray job."""
    if _in_job_directory(absolute_path(path)):
        text = (
            f" = '{path}' lies in the job's working directory, which other nodes do not see and "
            "Ray removes with the job; write an absolute path that every node sees, or s3://..."
        )
        raise error_at(key, text, origins)


def with_absolute_paths(config: Config) -> Config:
    """The configuration with all its paths absolute."""
    run, dedup = config.run, config.dedup
    check_survives_job("run.directory", run.directory, config.origins)
    check_survives_job("run.catalog", run.catalog, config.origins)
    directory, catalog = absolute_path(run.directory), absolute_path(run.catalog)
    sections = {name: _with_absolute_files(getattr(config, name)) for name in SECTIONS}
    sections["run"] = dataclasses.replace(run, directory=directory, catalog=catalog)
    inputs = tuple(map(_input_path, config.input.paths))
    sections["input"] = dataclasses.replace(config.input, paths=inputs)
    against = tuple(map(absolute_path, dedup.against))
    sections["dedup"] = dataclasses.replace(dedup, against=against)
    return dataclasses.replace(
        config,
        **sections,
        filters={name: _with_absolute_files(f) for name, f in config.filters.items()},
        per_language={
            name: {language: _with_absolute_files(f) for language, f in variants.items()}
            for name, variants in config.per_language.items()
        },
    )


def _input_path(path: str) -> str:
    """An absolute path, but a relative one inside the working directory of a Ray job: each node has
    a copy of that in another folder.
    """
    path = absolute_path(path)
    return os.path.relpath(path) if _in_job_directory(path) else path


def _in_job_directory(path: str) -> bool:
    directory = os.getcwd()
    return os.path.basename(directory).startswith("_ray_pkg_") and f"{path}/".startswith(
        f"{directory}/"
    )


def _with_absolute_files(section: Any) -> Any:
    absolute = {
        name: tuple(map(_input_path, paths))
        if isinstance(getattr(section, name), tuple)
        else _input_path(*paths)
        for name, paths in files(section).items()
        if paths
    }
    return dataclasses.replace(section, **absolute)
