"""Reads a configuration as written: a TOML file, and command-line overrides over it.

Every key's origin is kept ("c.toml:6" or "command line"), so that errors can name it.
"""

import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from stages.formats.errors import ConfigError

_HEADER = re.compile(r"^\s*(\[{1,2})([A-Za-z0-9_.-]+)\]")
_KEY = re.compile(r"^\s*([A-Za-z0-9_.-]+)\s*=")
_INDEX = re.compile(r"\[\d+\]")


class Source(NamedTuple):
    """A configuration as written, and the origin of each key."""

    values: dict[str, Any]
    origins: dict[str, str]


def read_source(file: str | Path | None, overrides: Sequence[str] = ()) -> Source:
    """Read a TOML file (None: nothing) and lay `section.key=value` overrides over it."""
    source = _read_toml(Path(file)) if file is not None else Source({}, {})
    for override in overrides:
        _apply_override(source, override)
    return source


class KeyProblem(ConfigError):
    """A ConfigError about a key; `located` begins its message with the key's origin."""

    def __init__(self, message: str, key: str) -> None:
        super().__init__(message)
        self.key = key


def error_at(key: str, text: str) -> KeyProblem:
    """The usual form of a KeyProblem: 'KEY TEXT'."""
    return KeyProblem(f"{key}{text}", key)


@contextmanager
def located(origins: dict[str, str]) -> Iterator[None]:
    """Begin the message of a KeyProblem with the origin of its key, if it has one: 'c.toml:6: '."""
    try:
        yield
    except KeyProblem as error:
        raise ConfigError(f"{_location(error.key, origins)}{error}") from error


def _location(key: str, origins: dict[str, str]) -> str:
    """Where a key was set, as the start of a message; "" if nowhere.

    If the key has no origin of its own, that of the first key under it, or of a section around it.
    """
    plain = _INDEX.sub("", key)
    children = [name for name in origins if name.startswith(f"{plain}.")]
    parents = [plain[: dot.start()] for dot in re.finditer(r"\.", plain)]
    for name in (key, plain, *children, *reversed(parents)):
        if name in origins:
            return f"{origins[name]}: "
    return ""


def _read_toml(file: Path) -> Source:
    try:
        text = file.read_text(encoding="utf-8")
        return Source(tomllib.loads(text), _line_numbers(file, text))
    except FileNotFoundError:
        neighbors = ", ".join(map(str, sorted(file.parent.glob("*.toml"))))
        hint = f"; there are {neighbors}" if neighbors else ""
        raise ConfigError(f"no such config file: {file}{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: not valid TOML: {error}") from error


def _line_numbers(file: Path, text: str) -> dict[str, str]:
    """'FILE:LINE' by key; an entry of an array of tables is named as in 'data.sources[0].run'."""
    # tomllib keeps no positions; a line scan finds the keys of every layout we document
    origins: dict[str, str] = {}
    entries: Counter[str] = Counter()
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.match(line):
            table = name = header[2]
            if header[1] == "[[":
                table = f"{name}[{entries[name]}]"
                entries[name] += 1
            origins[table] = f"{file}:{number}"
        elif key := _KEY.match(line):
            origins[f"{table}.{key[1]}".lstrip(".")] = f"{file}:{number}"
    return origins


def _apply_override(source: Source, override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals:
        raise ConfigError(
            f"command line: '{override}' is not section.key=value, e.g. dedup.num_bands=26"
        )
    *path, last = key.split(".")
    table = source.values
    for part in path:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"command line: '{key}': '{part}' is a value, not a section")
    table[last] = _parse_value(text)
    for name in [name for name in source.origins if name.startswith((f"{key}.", f"{key}["))]:
        del source.origins[name]  # of values that are replaced
    source.origins[key] = "command line"


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word is a string
