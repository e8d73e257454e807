"""Builds the dataclass of a section from its raw values, or raises an error that names the key."""

import json
import re
from collections.abc import Collection
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

import trainer.config
from filters.suggest import did_you_mean
from pipeline.config.source import KeyProblem, error_at

# old -> new
RENAMED_KEYS = {"names": "ner", "dedup.lines": "dedup.line_level", **trainer.config.RENAMED_KEYS}
# old -> new: still read, with a hint
ALIASES = {"pack.encoding": "pack.tokenizer"}
_UNKNOWN = "unexpected_keyword_argument"


def build(name: str, cls: Any, raw: Any) -> Any:
    """An instance of a pydantic dataclass, which may contain others, from raw TOML values.

    `name` is the section's, "" for a configuration whose keys are at the top level.
    """
    try:
        # as JSON, since strict dataclasses accept no dicts or lists of Python
        return TypeAdapter(cls).validate_json(json.dumps(raw, default=str))
    except ValidationError as error:
        # unknown keys first: if a key is missing, one of them is a misspelling of it
        first = min(error.errors(), key=lambda details: details["type"] != _UNKNOWN)
        _raise_problem(name, cls, first)


def check_known(key: str, known: Collection[str], kind: str, *, at: str = "") -> None:
    """KeyProblem unless `key` is known; it names the new key of an old one, or a similar one.

    `at` is the key whose value names it, if it is no key itself.
    """
    if key in known:
        return
    message = f"unknown {kind} '{key}'{did_you_mean(key, known)}"
    if key in RENAMED_KEYS:
        message = f"'{key}' was renamed: write '{RENAMED_KEYS[key]}'"
    raise KeyProblem(message, at or key)


def _raise_problem(name: str, cls: Any, error: ErrorDetails) -> NoReturn:
    key, parent = name, ""
    for part in error["loc"]:
        if isinstance(part, int):
            key = f"{key}[{part}]"
        else:
            key, parent = _join(key, part), key
    if error["type"] == _UNKNOWN:
        for part in error["loc"][:-1]:
            cls = _type_at(cls, part)
        check_known(key, [_join(parent, field) for field in get_type_hints(cls)], "config key")
    if error["type"] == "dataclass_type":
        text = f" is a section: write [{key}] with keys under it, not a value"
        raise error_at(key, text)
    if error["type"] == "missing":
        raise error_at(key, " is missing")
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "literal_error" and isinstance(error["input"], str):
        message += did_you_mean(error["input"], re.findall(r"'(.+?)'", error["ctx"]["expected"]))
    value = "" if isinstance(error["input"], dict) else f" = {error['input']!r}"
    raise error_at(key, f"{value}: {message}")


def _type_at(cls: Any, part: int | str) -> Any:
    """The type of an item of a tuple, of a value of a dict, or of a field."""
    if get_origin(cls) is dict:
        return get_args(cls)[1]
    return get_args(cls)[0] if isinstance(part, int) else get_type_hints(cls)[part]


def _join(prefix: str, field: str) -> str:
    return f"{prefix}.{field}" if prefix else field
