"""Configuration: defaults in code, a TOML file over them, the command line over that; every key checked before Ray starts.

The sections are the dataclasses that the stages and filters define themselves; this file only composes them and says what is
wrong where. Paths are relative to the working directory.
"""

import dataclasses
import difflib
import json
import math
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as section

from filters import STRICT, available, filter_class
from filters.language import Language
from filters.opt_out import OptOut
from filters.pii import Pii
from filters.url_policy import UrlPolicy
from stages import mds, tokens
from stages.dedup import DedupConfig
from stages.document import NamedFilter, score_columns
from stages.extract import ExtractConfig
from stages.fetch import FetchOptions
from stages.ledger import is_local
from stages.pack import PackConfig
from stages.records import InputConfig
from stages.refine import RefineConfig


class ConfigError(ValueError):
    """The configuration is wrong; the message says what, where, and what to do."""


@section(frozen=True, config=STRICT)
class RunConfig:
    """Where a run lives and how it bears failures.

    `directory` is a local path or object-store URI. A stage whose share of failed units exceeds `max_failed_share`, in
    [0, 1], stops the run. A unit that takes its worker down with it `attempts` times is recorded as failed.
    """

    directory: str = ""
    seed: int = Field(default=0, ge=0, lt=2**63)
    max_failed_share: float = Field(default=0.0, ge=0, le=1)
    attempts: int = Field(default=3, gt=0)


SECTIONS: dict[str, Any] = {
    "run": RunConfig,
    "input": InputConfig,
    "fetch": FetchOptions,
    "extract": ExtractConfig,
    "url_policy": UrlPolicy,
    "opt_out": OptOut,
    "language": Language,
    "dedup": DedupConfig,
    "refine": RefineConfig,
    "pii": Pii,
    "pack": PackConfig,
}


@dataclass(frozen=True)
class Config:
    """A checked configuration: one attribute per section, `filters` by name, and where each value came from."""

    run: RunConfig
    input: InputConfig
    fetch: FetchOptions
    extract: ExtractConfig
    url_policy: UrlPolicy
    opt_out: OptOut
    language: Language
    dedup: DedupConfig
    refine: RefineConfig
    pii: Pii
    pack: PackConfig
    filters: dict[str, Any]
    origins: dict[str, str]

    def chain(self, names: Sequence[str]) -> tuple[NamedFilter, ...]:
        """The filters of a stage in order."""
        return tuple(NamedFilter(name, self.filters[name]) for name in names)


def load(file: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read (None: nothing but defaults), override, and check a configuration. ConfigError on the first thing that is wrong."""
    raw, origins = _read_file(Path(file)) if file is not None else ({}, {})
    for override in overrides:
        _apply_override(raw, origins, override)
    known = {**SECTIONS, **{name: filter_class(name) for name in available()}}
    for name in raw:
        _check_known(name, known, "section or stage", origins)
    values = {name: _section(name, cls, raw.get(name, {}), origins) for name, cls in known.items()}
    config = Config(
        **{name: values[name] for name in SECTIONS},
        filters={name: values[name] for name in known if name not in SECTIONS},
        origins=origins,
    )
    _check(config)
    return _absolute(config)


def show(config: Config, *, used: bool = True) -> Iterator[tuple[str, str, str]]:
    """(section.key, value as TOML, origin) of every key; of the filters only those that a stage names, if `used`."""
    named = {*config.extract.filters, *config.refine.filters}
    sections = {name: getattr(config, name) for name in SECTIONS}
    sections |= {name: f for name, f in config.filters.items() if name in named or not used}
    for name, value in sections.items():
        for key, leaf in _leaves(name, value):
            yield key, to_toml(leaf), config.origins.get(key, "default")


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


def absolute_path(path: str) -> str:
    """A path made independent of the working directory, since workers have another one; URIs stay."""
    if not path or not is_local(path):
        return path.rstrip("/")
    return os.path.abspath(path.removeprefix("file://"))


# --- reading ---------------------------------------------------------------------------------------------------------

_HEADER = re.compile(r"^\s*\[([A-Za-z0-9_.-]+)\]")
_KEY = re.compile(r"^\s*([A-Za-z0-9_.-]+)\s*=")


def _read_file(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = ", ".join(str(p) for p in sorted(file.parent.glob("*.toml"))) if file.parent.is_dir() else ""
        raise ConfigError(f"no such config file: {file}" + (f"; there are {near}" if near else "")) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from error
    try:
        return tomllib.loads(text), _line_numbers(file, text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: not valid TOML: {error}") from error


def _line_numbers(file: Path, text: str) -> dict[str, str]:
    # tomllib keeps no positions; a line scan finds the keys of every layout we document
    origins, table = {}, ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.match(line):
            table = header[1] + "."
            origins[header[1]] = f"{file}:{number}"
        elif key := _KEY.match(line):
            origins[table + key[1]] = f"{file}:{number}"
    return origins


def _apply_override(raw: dict[str, Any], origins: dict[str, str], override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or "." not in key:
        raise ConfigError(f"command line: '{override}' is not section.key=value, e.g. dedup.num_bands=26")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    *path, last = key.split(".")
    table = raw
    for part in path:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"command line: '{key}': '{part}' is a value, not a section")
    table[last] = value
    origins[key] = "command line"


# --- checking --------------------------------------------------------------------------------------------------------


def _section(name: str, cls: Any, raw: Any, origins: dict[str, str]) -> Any:
    if not isinstance(raw, dict):
        raise ConfigError(f"{_at(name, origins)}'{name}' is a section: write [{name}] with keys under it, not a value")
    _check_keys(name, cls, raw, origins)
    try:
        return TypeAdapter(cls).validate_python(raw)
    except ValidationError as error:
        first = error.errors()[0]
        path = [name, *(str(p) for p in first["loc"] if isinstance(p, str) and p in _all_fields(cls))]
        key = ".".join(path)
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{_at(key, origins)}{key} = {first['input']!r}: {message}") from error


def _check_keys(prefix: str, cls: Any, raw: Mapping[str, Any], origins: dict[str, str]) -> None:
    hints = get_type_hints(cls)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(cls)}
    for key, value in raw.items():
        _check_known(f"{prefix}.{key}", {f"{prefix}.{name}": None for name in fields}, "config key", origins)
        if isinstance(value, dict) and dataclasses.is_dataclass(fields[key]):
            _check_keys(f"{prefix}.{key}", fields[key], value, origins)


def _all_fields(cls: Any) -> set[str]:
    hints = get_type_hints(cls)
    names = set()
    for field in dataclasses.fields(cls):
        names.add(field.name)
        if dataclasses.is_dataclass(hints[field.name]):
            names |= _all_fields(hints[field.name])
    return names


def _check_known(name: str, known: Mapping[str, Any], kind: str, origins: dict[str, str]) -> None:
    if name in known:
        return
    last = {k.rpartition(".")[2]: k for k in known}
    close = difflib.get_close_matches(name.rpartition(".")[2], last, 1, cutoff=0.5)
    hint = f"; did you mean '{last[close[0]]}'?" if close else f"; known: {', '.join(known)}"
    raise ConfigError(f"{_at(name, origins)}unknown {kind} '{name}'{hint}")


def _at(key: str, origins: dict[str, str]) -> str:
    for name in (key, *(k for k in origins if k.startswith(f"{key}."))):
        if name in origins:
            return f"{origins[name]}: "
    return ""


def _check(config: Config) -> None:
    """What one section alone cannot know: that named filters exist, that files are there, that there is input."""
    for stage in ("extract", "refine"):
        names = getattr(config, stage).filters
        for name in names:
            _check_known(name, config.filters, f"filter (in {stage}.filters)", {name: config.origins.get(f"{stage}.filters", "")})
        if len(set(names)) < len(names):
            raise ConfigError(f"{_at(f'{stage}.filters', config.origins)}{stage}.filters names a filter twice: {list(names)}")
    twice = {*config.extract.filters} & {*config.refine.filters}
    if twice:
        raise ConfigError(f"filter '{min(twice)}' is in extract.filters and in refine.filters; once is enough")
    if not config.run.directory:
        raise ConfigError("run.directory is not set: say where the run lives, e.g. run.directory=runs/first")
    if not config.input.paths:
        raise ConfigError("input.paths is empty: name files, globs, folders or listings to read")
    try:
        tokens.check_encoding(config.pack.encoding, config.pack.vocabulary_dir)
    except ValueError as error:
        raise ConfigError(f"{_at('pack.encoding', config.origins)}pack.encoding: {error}") from error
    hashes = config.pack.hashes
    if len(set(hashes)) < len(hashes) or not mds.HASHES.keys() >= set(hashes):
        raise ConfigError(
            f"{_at('pack.hashes', config.origins)}pack.hashes = {list(hashes)}: unique names of {sorted(mds.HASHES)}"
        )
    _check_dedup(config)
    for key, path in _files(config):
        if path and not is_local(path):
            raise ConfigError(
                f"{_at(key, config.origins)}{key} = {path}: models and lists must lie on a path that every worker has"
            )
        if path and not os.path.exists(path):
            raise ConfigError(f"{_at(key, config.origins)}{key}: no such file or folder: {path}")


def _check_dedup(config: Config) -> None:
    """What dedup asks of the other sections."""
    if absolute_path(config.run.directory) in map(absolute_path, config.dedup.against):
        raise ConfigError(
            f"{_at('dedup.against', config.origins)}dedup.against names run.directory: a batch is no copy of itself"
        )
    needs_text = [k for k, off in (("verify_share", 0.0), ("lines", "off")) if getattr(config.dedup, k) != off]
    if needs_text and not config.extract.keep_text:
        key = f"dedup.{needs_text[0]}"
        raise ConfigError(f"{_at(key, config.origins)}{key} needs the texts: set extract.keep_text = true")
    if config.dedup.keep_rule == "newest" and config.input.format in ("jsonl", "parquet"):
        at = _at("dedup.keep_rule", config.origins)
        raise ConfigError(
            f"{at}dedup.keep_rule = 'newest': {config.input.format} inputs have no crawl date; use longest or first"
        )
    _, best, column = config.dedup.keep_rule.partition("best:")
    columns = [*score_columns(config.chain(config.extract.filters)), "num_chars", "language_score"]
    if best:
        _check_known(column, dict.fromkeys(columns), f"score (in dedup.keep_rule = '{config.dedup.keep_rule}')", config.origins)


def _files(config: Config) -> Iterator[tuple[str, str]]:
    """(key, path) of every model and list that this configuration uses."""
    yield "language.model", config.language.model
    yield "pack.vocabulary_dir", config.pack.vocabulary_dir
    for key in ("blocked_lists", "blocked_words"):
        for path in getattr(config.url_policy, key):
            yield f"url_policy.{key}", path
    for name in (*config.extract.filters, *config.refine.filters):
        filter = config.filters[name]
        if hasattr(filter, "model"):
            if not filter.model:
                raise ConfigError(f"{name}.model is not set: filter '{name}' needs a model file; see gristmill train-lm --help")
            yield f"{name}.model", filter.model


def model_digests(config: Config) -> dict[str, str]:
    """Sha256 of every model and list in use by key: a stage whose model changed under its name must run again."""
    from stages.ledger import digest, file_sha256

    digests: dict[str, str] = {}
    for key, path in _files(config):
        if not path or not is_local(path):
            continue
        root = Path(path)
        files = sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]
        digests[key] = digest([digests.get(key), *(file_sha256(f) for f in files)])
    return digests


def _absolute(config: Config) -> Config:
    def of(value: Any, **paths: Any) -> Any:
        return dataclasses.replace(value, **paths)

    policy = config.url_policy
    return dataclasses.replace(
        config,
        run=of(config.run, directory=absolute_path(config.run.directory)),
        input=of(config.input, paths=tuple(absolute_path(p) for p in config.input.paths)),
        language=of(config.language, model=absolute_path(config.language.model)),
        dedup=of(config.dedup, against=tuple(absolute_path(p) for p in config.dedup.against)),
        pack=of(config.pack, vocabulary_dir=absolute_path(config.pack.vocabulary_dir)),
        url_policy=of(
            policy,
            blocked_lists=tuple(absolute_path(p) for p in policy.blocked_lists),
            blocked_words=tuple(absolute_path(p) for p in policy.blocked_words),
        ),
        filters={name: of(f, model=absolute_path(f.model)) if hasattr(f, "model") else f for name, f in config.filters.items()},
    )


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(value):
        leaf, key = getattr(value, field.name), f"{prefix}.{field.name}"
        if dataclasses.is_dataclass(leaf):
            yield from _leaves(key, leaf)
        else:
            yield key, leaf
