"""Prints a configuration: every key with its value as TOML and its origin."""

import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from pipeline.config.sections import SECTIONS, Config


class Setting(NamedTuple):
    """A key, its value as TOML, and its origin: "FILE:LINE", "command line" or "default"."""

    key: str
    value: str
    origin: str


def show(config: Config, *, used: bool = True) -> Iterator[Setting]:
    """Every key of a configuration; with `used` only those of the filters that a stage names."""
    active = {*config.extract.filters, *config.refine.filters}
    sections = {name: getattr(config, name) for name in SECTIONS}
    sections |= {name: f for name, f in config.filters.items() if name in active or not used}
    for name, section in sections.items():
        for key, value in _leaves(name, section):
            yield Setting(key, to_toml(value), config.origins.get(key, "default"))
    for name, variants in config.per_language.items():
        if name in sections:
            for language, variant in variants.items():
                yield from _overridden(config, name, sections[name], language, variant)


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


def _overridden(
    config: Config, name: str, section: Any, language: str, variant: Any
) -> Iterator[Setting]:
    """The settings that a language has other than all languages."""
    general = dict(_leaves(name, section))
    for key, value in _leaves(name, variant):
        if value != general[key]:
            full = f"per_language.{language}.{key}"
            origin = config.origins.get(full, config.origins.get(key, "default"))
            yield Setting(full, to_toml(value), origin)


def _leaves(prefix: str, section: Any) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(section):
        value, key = getattr(section, field.name), f"{prefix}.{field.name}"
        if dataclasses.is_dataclass(value):
            yield from _leaves(key, value)
        else:
            yield key, value
