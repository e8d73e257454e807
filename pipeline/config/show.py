"""Prints a configuration: every key with its value as TOML and its origin."""

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from pipeline.config.sections import Config, general_key


class Setting(NamedTuple):
    """A key, its value as TOML, and its origin: "FILE:LINE", "command line" or "default"."""

    key: str
    value: str
    origin: str


def show(config: Config) -> Iterator[Setting]:
    """Every key of the sections and filters in use; for a language only those that differ."""
    for key, value, origin in settings(config):
        yield Setting(key, to_toml(value), origin)


def settings(config: Config) -> Iterator[tuple[str, Any, str]]:
    """As `show`, with the values themselves."""
    values: dict[str, Any] = {}
    for name, section in config.in_use():
        for key, value in _leaves(name, section):
            general = general_key(key)
            if general not in values or value != values[general]:
                values[key] = value
                yield key, value, config.origins.get(key, config.origins.get(general, "default"))


def by_key(settings: Iterable[Setting]) -> dict[str, dict[str, str]]:
    """The value and origin of each key."""
    return {key: {"value": value, "origin": origin} for key, value, origin in settings}


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Keys that both have, with their different values, in order of keys.

    A language without a value of its own has the value for all.
    """
    for key in sorted({*before, *now}):
        old, new = (values.get(key, values.get(general_key(key))) for values in (before, now))
        if old is not None and new is not None and old != new:
            yield key, old, new


def to_toml(value: Any) -> str:
    """A value as TOML; None is written "off"."""
    if value is None:
        return '"off"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return {math.inf: "inf", -math.inf: "-inf"}.get(value, repr(value))
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return f"[{', '.join(to_toml(v) for v in value)}]"


def _leaves(prefix: str, section: Any) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(section):
        value, key = getattr(section, field.name), f"{prefix}.{field.name}"
        if dataclasses.is_dataclass(value):
            yield from _leaves(key, value)
        else:
            yield key, value
