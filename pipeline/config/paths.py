"""Makes the paths of a configuration independent of the working directory: workers have another."""

import dataclasses
import os
from collections.abc import Callable, Iterable
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


def check_survives_job(key: str, path: str) -> None:
    """ConfigError for a path of outputs inside the working directory of a Ray job."""
    if _in_job_directory(absolute_path(path)):
        text = (
            f" = '{path}' lies in the job's working directory, which other nodes do not see and "
            "Ray removes with the job; write an absolute path that every node sees, or s3://..."
        )
        raise error_at(key, text)


def with_absolute_paths(config: Config) -> Config:
    """The configuration with all its paths absolute."""
    check_survives_job("run.directory", config.run.directory)
    check_survives_job("run.catalog", config.run.catalog)
    sections = {name: _with_absolute_files(getattr(config, name)) for name in SECTIONS}
    sections["run"] = replace_paths(config.run, ("directory", "catalog"))
    sections["dedup"] = replace_paths(config.dedup, ("against",))
    sections["input"] = replace_paths(config.input, ("paths",), _input_path)
    return dataclasses.replace(
        config,
        **sections,
        filters={name: _with_absolute_files(f) for name, f in config.filters.items()},
        per_language={
            name: {language: _with_absolute_files(f) for language, f in variants.items()}
            for name, variants in config.per_language.items()
        },
    )


def replace_paths(
    section: Any, fields: Iterable[str], absolute: Callable[[str], str] = absolute_path
) -> Any:
    """A section with absolute paths in some of its fields, each of one path or a tuple of them."""
    paths = {name: getattr(section, name) for name in fields}
    return dataclasses.replace(
        section,
        **{
            name: tuple(map(absolute, value)) if isinstance(value, tuple) else absolute(value)
            for name, value in paths.items()
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
    return replace_paths(section, files(section), _input_path)
