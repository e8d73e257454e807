"""Builds the dataclass of a section from its raw values, or raises an error that names the key."""

import dataclasses
import json
import re
from collections.abc import Collection, Iterator
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

import trainer.config
from filters.suggest import did_you_mean
from pipeline.config.source import error_at, location
from stages.formats.errors import ConfigError

# old -> new
RENAMED_KEYS = {"names": "ner", "dedup.lines": "dedup.line_level", **trainer.config.RENAMED_KEYS}


def build(name: str, cls: Any, raw: Any, origins: dict[str, str]) -> Any:
    """An instance of a pydantic dataclass, which may contain others, from raw TOML values.

    `name` is the section's, "" for a configuration whose keys are at the top level.
    """
    _check_keys(name, cls, raw, origins)
    try:
        # as JSON, since strict dataclasses accept no dicts or lists of Python
        return TypeAdapter(cls).validate_json(json.dumps(raw, default=str))
    except ValidationError as error:
        raise _validation_error(name, error.errors()[0], origins) from error


def check_known(key: str, known: Collection[str], kind: str, origins: dict[str, str]) -> None:
    """ConfigError unless `key` is known; it names the new key of an old one, or a similar one."""
    if key in known:
        return
    problem = f"unknown {kind} '{key}'{did_you_mean(key, known)}"
    if key in RENAMED_KEYS:
        problem = f"'{key}' was renamed: write '{RENAMED_KEYS[key]}'"
    raise ConfigError(f"{location(key, origins)}{problem}")


def _check_keys(name: str, cls: Any, raw: Any, origins: dict[str, str]) -> None:
    if not isinstance(raw, dict):
        text = f" is a section: write [{name}] with keys under it, not a value"
        raise error_at(name, text, origins)
    types = get_type_hints(cls)
    for field, value in raw.items():
        key = _join(name, field)
        check_known(key, [_join(name, known) for known in types], "config key", origins)
        for inner_key, inner, inner_raw in _dataclasses_in(key, types[field], value):
            _check_keys(inner_key, inner, inner_raw, origins)


def _dataclasses_in(key: str, type_: Any, value: Any) -> Iterator[tuple[str, Any, Any]]:
    """(key, dataclass, raw value) of a field that holds a dataclass, or a tuple of them."""
    if dataclasses.is_dataclass(type_):
        yield key, type_, value
    elif get_origin(type_) is tuple and isinstance(value, list):
        for number, item in enumerate(value):
            yield from _dataclasses_in(f"{key}[{number}]", get_args(type_)[0], item)


def _validation_error(name: str, error: ErrorDetails, origins: dict[str, str]) -> ConfigError:
    key = name
    for part in error["loc"]:
        key = f"{key}[{part}]" if isinstance(part, int) else _join(key, part)
    if error["type"] == "missing":
        return error_at(key, " is missing", origins)
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "literal_error" and isinstance(error["input"], str):
        message += did_you_mean(error["input"], re.findall(r"'(.+?)'", error["ctx"]["expected"]))
    value = "" if isinstance(error["input"], dict) else f" = {error['input']!r}"
    return error_at(key, f"{value}: {message}", origins)


def _join(prefix: str, field: str) -> str:
    return f"{prefix}.{field}" if prefix else field
