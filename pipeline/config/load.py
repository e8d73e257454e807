"""Configuration: defaults in code, a TOML file over them, the command line over that; every key
checked before Ray starts.

The sections are the dataclasses that the stages and filters define themselves; this file only
composes them and says what is wrong where. Paths are relative to the working directory.
"""

import dataclasses
import difflib
import glob
import json
import math
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_type_hints

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as section

from filters import STRICT, available, derived, files, filter_class, off_is_none, rules
from filters.language import Language
from filters.opt_out import OptOut
from filters.pii.ner import Ner
from filters.pii.scrub import Pii
from filters.url_policy import UrlPolicy
from pipeline.config import percentiles
from pipeline.controller.decide import Policy
from stages.dedup.dedup import DedupConfig
from stages.extract.extract import ExtractConfig
from stages.formats import mds, tokens
from stages.formats.document import NamedFilter, score_columns
from stages.pack.pack import PackConfig
from stages.read.fetch import FetchOptions
from stages.read.records import InputConfig
from stages.refine.refine import RefineConfig
from stages.storage.digests import digest, file_sha256
from stages.storage.files import is_local, read_bytes


class ConfigError(ValueError):
    """The configuration is wrong; the message says what, where, and what to do."""


@section(frozen=True, config=STRICT)
class RunConfig:
    """Where a run lives and how it bears failures.

    `directory` is a local path or object-store URI. A stage whose share of failed units exceeds
    `max_failed_share`, in [0, 1], stops the run, and so does one with more failed units than
    `max_failed_units` ("off": any number, within the share). A unit that takes its worker down with
    it `attempts` times has failed, and is set aside until `gristmill retry`. `calibration` is the
    table that percentiles are looked up in, "" the one that `gristmill calibrate` wrote to the
    run's own directory. `catalog` is the directory whose catalog and generations are published to,
    "" the run's own: a batch names its series.
    """

    directory: str = ""
    seed: int = Field(default=0, ge=0, lt=2**63)
    max_failed_share: float = Field(default=0.0, ge=0, le=1)
    max_failed_units: Annotated[int | None, BeforeValidator(off_is_none)] = Field(
        default=None, ge=0
    )
    attempts: int = Field(default=3, gt=0)
    calibration: str = ""
    catalog: str = ""


SECTIONS: dict[str, Any] = {
    "run": RunConfig,
    "schedule": Policy,
    "input": InputConfig,
    "fetch": FetchOptions,
    "extract": ExtractConfig,
    "url_policy": UrlPolicy,
    "opt_out": OptOut,
    "language": Language,
    "dedup": DedupConfig,
    "refine": RefineConfig,
    "pii": Pii,
    "ner": Ner,
    "pack": PackConfig,
}


@dataclass(frozen=True)
class Config:
    """A checked configuration: one attribute per section, `filters` by name, and where each value
    came from.

    `per_language`: by name of a filter (or "language") and by language what takes the filter's
    place for its documents.
    """

    run: RunConfig
    schedule: Policy
    input: InputConfig
    fetch: FetchOptions
    extract: ExtractConfig
    url_policy: UrlPolicy
    opt_out: OptOut
    language: Language
    dedup: DedupConfig
    refine: RefineConfig
    pii: Pii
    ner: Ner
    pack: PackConfig
    filters: dict[str, Any]
    per_language: dict[str, dict[str, Any]]
    origins: dict[str, str]

    def named(self, name: str) -> NamedFilter:
        """A filter, or "language", with its variants."""
        variants = tuple(sorted(self.per_language.get(name, {}).items()))
        return NamedFilter(
            name, self.language if name == "language" else self.filters[name], variants
        )

    def chain(self, names: Sequence[str]) -> tuple[NamedFilter, ...]:
        """The filters of a stage in order."""
        return tuple(self.named(name) for name in names)


def load(
    file: str | Path | None, overrides: Sequence[str] = (), *, calibrated: bool = True
) -> Config:
    """Read (None: nothing but defaults), override, and check a configuration. ConfigError on the
    first thing that is wrong.

    Bounds that are percentiles become the numbers of the run's calibration; if not `calibrated`
    they bound nothing.
    """
    raw, origins = _read_file(Path(file)) if file is not None else ({}, {})
    for override in overrides:
        _apply_override(raw, origins, override)
    known = {**SECTIONS, **{name: filter_class(name) for name in available()}}
    languages = raw.pop("per_language", {})
    for name in raw:
        _check_known(name, {**known, "per_language": None}, "section or stage", origins)
    run = _section("run", RunConfig, raw.get("run", {}), origins)
    source = _Source(
        raw,
        languages,
        origins,
        calibrated,
        _calibration_uri(run),
        _calibration(run) if calibrated else None,
    )
    values = {name: _read(name, cls, source) for name, cls in known.items()}
    config = Config(
        **{name: values[name] for name in SECTIONS},
        filters={name: values[name] for name in known if name not in SECTIONS},
        per_language=_by_language(known, values["language"].allowed, source),
        origins=origins,
    )
    _check(config)
    config = _absolute(config)
    _check_calibration(config, source)
    return config


def show(config: Config, *, used: bool = True) -> Iterator[tuple[str, str, str]]:
    """(section.key, value as TOML, origin) of every key; of the filters only those that a stage
    names, if `used`.
    """
    named = {*config.extract.filters, *config.refine.filters}
    sections = {name: getattr(config, name) for name in SECTIONS}
    sections |= {name: f for name, f in config.filters.items() if name in named or not used}
    for name, value in sections.items():
        for key, leaf in _leaves(name, value):
            yield key, to_toml(leaf), config.origins.get(key, "default")
    for name, by_language in config.per_language.items():
        if name not in sections:
            continue
        base = dict(_leaves("", sections[name]))
        for language, value in by_language.items():
            for key, leaf in _leaves("", value):
                if leaf != base[key]:
                    full = f"per_language.{language}.{name}{key}"
                    yield (
                        full,
                        to_toml(leaf),
                        config.origins.get(full, config.origins.get(f"{name}{key}", "default")),
                    )


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


def _input_path(path: str) -> str:
    """An absolute path; in the working directory of a Ray job a relative one, as each node has a
    copy in a place of its own.
    """
    path = absolute_path(path)
    return os.path.relpath(path) if _in_job_directory(path) else path


def _in_job_directory(path: str) -> bool:
    return os.path.basename(os.getcwd()).startswith("_ray_pkg_") and f"{path}/".startswith(
        f"{os.getcwd()}/"
    )


# --- reading --------------------------------------------------------------------------------------

_HEADER = re.compile(r"^\s*\[([A-Za-z0-9_.-]+)\]")
_KEY = re.compile(r"^\s*([A-Za-z0-9_.-]+)\s*=")


def _read_file(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = (
            ", ".join(str(p) for p in sorted(file.parent.glob("*.toml")))
            if file.parent.is_dir()
            else ""
        )
        raise ConfigError(
            f"no such config file: {file}" + (f"; there are {near}" if near else "")
        ) from None
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
        raise ConfigError(
            f"command line: '{override}' is not section.key=value, e.g. dedup.num_bands=26"
        )
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


# --- languages and percentiles --------------------------------------------------------------------


CALIBRATED = "of `gristmill calibrate`"  # how the origin of such a bound ends


class _Source(NamedTuple):
    """The configuration as written, and the table that its percentiles are looked up in (None: not
    calibrated).
    """

    sections: dict[str, Any]
    per_language: Any
    origins: dict[str, str]
    calibrated: bool
    table_uri: str
    table: percentiles.Table | None


def _calibration_uri(run: RunConfig) -> str:
    return absolute_path(run.calibration) or f"{absolute_path(run.directory)}/calibration.json"


def _calibration(run: RunConfig) -> percentiles.Table | None:
    uri = _calibration_uri(run)
    try:
        return percentiles.parse(read_bytes(uri))
    except FileNotFoundError:
        if run.calibration:
            raise ConfigError(
                f"run.calibration: no such file: {uri}; write it with `gristmill calibrate`"
            ) from None
        return None
    except ValueError as error:
        raise ConfigError(f"{uri}: {error}") from None


def _read(name: str, cls: Any, source: _Source, language: str = percentiles.ALL) -> Any:
    """A section, as it is for documents of a language: what is said for it goes over what is said
    for all.
    """
    raw, own = (
        source.sections.get(name, {}),
        source.per_language[language].get(name, {}) if language else {},
    )
    where = f"per_language.{language}.{name}" if own else name
    if not isinstance(raw, dict) or not isinstance(own, dict):
        return _section(where, cls, own or raw, source.origins)
    if name not in SECTIONS or name == "language":
        raw = _without_percentiles(raw, name, name, cls, language, source)
        own = _without_percentiles(own, where, name, cls, language, source)
    return _section(where, cls, raw | own, source.origins)


def _by_language(
    known: Mapping[str, Any], allowed: Sequence[str], source: _Source
) -> dict[str, dict[str, Any]]:
    """By section and language what takes the section's place: what is said for a language, and each
    language's percentiles.
    """
    _check_languages(known, allowed, source)
    wanted = [
        (name, language) for language, sections in source.per_language.items() for name in sections
    ]
    sampled = [
        lang
        for lang in (source.table.languages if source.table else ())
        if lang in allowed or not allowed
    ]
    calibrated = [
        name
        for name, raw in source.sections.items()
        if isinstance(raw, dict) and percentiles.used(raw)
    ]
    wanted += [(name, language) for name in calibrated for language in sampled]
    for language in sampled:
        source.per_language.setdefault(language, {})
    found: dict[str, dict[str, Any]] = {}
    for name, language in wanted:
        found.setdefault(name, {})[language] = _read(name, known[name], source, language)
    return found


def _check_languages(known: Mapping[str, Any], allowed: Sequence[str], source: _Source) -> None:
    places = {name: None for name in known if name not in SECTIONS or name == "language"}
    for language, sections in _tables("per_language", source.per_language, source.origins):
        if allowed:
            named = {f"per_language.{name}": None for name in allowed}
            _check_known(
                f"per_language.{language}", named, "language (of language.allowed)", source.origins
            )
        for name, keys in _tables(f"per_language.{language}", sections, source.origins):
            prefix = f"per_language.{language}"
            _check_known(
                f"{prefix}.{name}",
                {f"{prefix}.{place}": None for place in places},
                "filter",
                source.origins,
            )
            if name == "language":  # how it is identified cannot depend on what it is
                bounds = {f"{prefix}.language.{rule}": None for rule in rules(Language())}
                for key in keys:
                    _check_known(
                        f"{prefix}.language.{key}", bounds, "bound of a language", source.origins
                    )


def _tables(name: str, value: Any, origins: dict[str, str]) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        raise ConfigError(
            f"{_at(name, origins)}'{name}' is a section: write [per_language.de.perplexity] with keys under it"
        )
    yield from value.items()


def _without_percentiles(
    raw: dict[str, Any], where: str, name: str, cls: Any, language: str, source: _Source
) -> dict[str, Any]:
    numbers = {}
    for key in percentiles.used(raw):
        at = f"{_at(f'{where}.{key}', source.origins)}{where}.{key} = {raw[key]}"
        if len(raw[key]) != 2:
            raise ConfigError(f"{at}: give [low, high]")
        if source.calibrated and source.table is None:
            raise ConfigError(
                f"{at}: percentiles of what? Run `gristmill calibrate` with this config: it writes {source.table_uri}"
            )
        score = f"{name}.{derived(cls).get(key, key)}"
        try:
            numbers[key] = percentiles.bound(raw[key], score, language, source.table)
        except KeyError as error:
            raise ConfigError(f"{at}: {source.table_uri} {error.args[0]}") from None
        except ValueError as error:
            raise ConfigError(f"{at}: {error}") from None
        if source.table is not None:
            written = source.origins.get(f"{where}.{key}", "").partition(", percentiles")[0]
            named = f"percentiles {' to '.join(map(str, raw[key]))} {CALIBRATED}"
            place = f"per_language.{language}.{name}" if language else name
            source.origins[f"{place}.{key}"] = f"{written}, {named}"
    return raw | numbers


def measured_with(config: Config, name: str) -> str:
    """Digest of what a filter's scores depend on: its settings and files, by language, and the
    filters that edit before it.
    """
    chain = [*config.extract.filters, *config.refine.filters]
    before = chain[: chain.index(name)] if name in chain else []
    edits = [[n, config.named(n).settings()] for n in before if hasattr(config.filters[n], "edit")]
    digests = {
        key: found
        for key, found in file_digests(config).items()
        if section_of(key) in (name, *(n for n, _ in edits))
    }
    named = config.named(name)
    return digest([named.settings(without=derived(named.filter)), edits, digests])


def texts_made_with(config: Config) -> str:
    """Digest of what makes the texts that filters measure."""
    engine = config.extract.engine
    return digest(
        [engine, dataclasses.asdict(getattr(config.extract, engine)), config.dedup.line_level]
    )


# what changes no document: what a phase may use, and what it keeps or tells beside its work
UNSEEN_KEYS = frozenset(
    (
        "num_cpus",
        "memory",
        "parallelism",
        "batch_size",
        "recycle_after",
        "keep_text",
        "keep_rejected_text",
        "verify_share",
    )
) | {"alarm_share", "write_index", "documents_per_unit", "partition_bytes", "cluster_memory"}


def chosen_by(config: Config) -> dict[str, str]:
    """The settings that choose the documents that come to refine, as `show` has them."""
    sections = {
        "input",
        "extract",
        "url_policy",
        "opt_out",
        "language",
        "dedup",
        *config.extract.filters,
    }
    return {
        key: value
        for key, value, _ in show(config)
        if section_of(key) in sections and key.rpartition(".")[2] not in UNSEEN_KEYS
    }


def _check_calibration(config: Config, source: _Source) -> None:
    if source.table is None:
        return
    raw = [source.sections, *source.per_language.values()]
    names = {
        name
        for sections in raw
        for name, section in sections.items()
        if isinstance(section, dict) and percentiles.used(section)
    }
    for name in sorted(names & {"language", *config.extract.filters, *config.refine.filters}):
        if source.table.made_with.get(name) != measured_with(config, name):
            raise ConfigError(
                f"{source.table_uri} was measured with other settings or another model of '{name}'; "
                "run `gristmill calibrate` again"
            )
    if names and source.table.made_with.get("texts", found := texts_made_with(config)) != found:
        raise ConfigError(
            f"{source.table_uri} was measured on texts of another extract.engine (or its options) or dedup.line_level; "
            "run `gristmill calibrate` again"
        )


# --- checking -------------------------------------------------------------------------------------


def _section(name: str, cls: Any, raw: Any, origins: dict[str, str]) -> Any:
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{_at(name, origins)}'{name}' is a section: write [{name}] with keys under it, not a value"
        )
    _check_keys(name, cls, raw, origins)
    try:
        return TypeAdapter(cls).validate_python(raw)
    except ValidationError as error:
        first = error.errors()[0]
        path = [
            name,
            *(str(p) for p in first["loc"] if isinstance(p, str) and p in _all_fields(cls)),
        ]
        key = ".".join(path)
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{_at(key, origins)}{key} = {first['input']!r}: {message}") from error


def _check_keys(prefix: str, cls: Any, raw: Mapping[str, Any], origins: dict[str, str]) -> None:
    hints = get_type_hints(cls)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(cls)}
    for key, value in raw.items():
        _check_known(
            f"{prefix}.{key}", {f"{prefix}.{name}": None for name in fields}, "config key", origins
        )
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


# old -> new, of sections and keys
RENAMED_KEYS = {"names": "ner", "dedup.lines": "dedup.line_level"}


def _check_known(name: str, known: Mapping[str, Any], kind: str, origins: dict[str, str]) -> None:
    if name in known:
        return
    if name in RENAMED_KEYS:
        raise ConfigError(f"{_at(name, origins)}'{name}' was renamed: write '{RENAMED_KEYS[name]}'")
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
    """What one section alone cannot know: that named filters exist, that files are there, that
    there is input.
    """
    for stage in ("extract", "refine"):
        names = getattr(config, stage).filters
        for name in names:
            _check_known(
                name,
                config.filters,
                f"filter (in {stage}.filters)",
                {name: config.origins.get(f"{stage}.filters", "")},
            )
        if len(set(names)) < len(names):
            raise ConfigError(
                f"{_at(f'{stage}.filters', config.origins)}{stage}.filters names a filter twice: {list(names)}"
            )
    twice = {*config.extract.filters} & {*config.refine.filters}
    if twice:
        raise ConfigError(
            f"filter '{min(twice)}' is in extract.filters and in refine.filters; once is enough"
        )
    if not config.run.directory:
        raise ConfigError(
            "run.directory is not set: say where the run lives, e.g. run.directory=runs/first"
        )
    if not config.input.paths:
        raise ConfigError("input.paths is empty: name files, globs, folders or listings to read")
    try:
        tokens.check_encoding(config.pack.encoding, config.pack.vocabulary_dir)
    except ValueError as error:
        raise ConfigError(
            f"{_at('pack.encoding', config.origins)}pack.encoding: {error}"
        ) from error
    hashes = config.pack.hashes
    if len(set(hashes)) < len(hashes) or not mds.HASHES.keys() >= set(hashes):
        raise ConfigError(
            f"{_at('pack.hashes', config.origins)}pack.hashes = {list(hashes)}: unique names of {sorted(mds.HASHES)}"
        )
    _check_dedup(config)
    _check_files(config)
    _check_filters(config)


def _check_files(config: Config) -> None:
    for key, path in _files(config):
        if not is_local(path):
            raise ConfigError(
                f"{_at(key, config.origins)}{key} = {path}: models and lists must lie on a path that every worker has"
            )
        if not os.path.exists(path):
            raise ConfigError(f"{_at(key, config.origins)}{key}: no such file or folder: {path}")


def _check_filters(config: Config) -> None:
    """What a section itself asks of its model or lists, and of the languages it will meet."""
    allowed = config.language.allowed
    for name in (*config.extract.filters, *config.refine.filters):
        named = config.named(name)
        others = tuple(language for language in allowed if language not in dict(named.by_language))
        for language, filter in named.all():
            if language or others or not allowed:
                where = f"per_language.{language}.{name}" if language else name
                _ask(filter, (language,) if language else others, where, config.origins)
    _ask(config.language, allowed, "language", config.origins)
    if config.refine.scrub_pii:
        _ask(config.pii, allowed, "pii", config.origins)
    if config.ner.enabled:
        _ask(config.ner, allowed, "ner", config.origins)


def _ask(section: Any, languages: tuple[str, ...], where: str, origins: dict[str, str]) -> None:
    if hasattr(section, "check"):
        try:
            section.check(languages)
        except ValueError as error:
            raise ConfigError(f"{_at(where, origins)}{where}: {error}") from error


def _check_dedup(config: Config) -> None:
    """What dedup asks of the other sections."""
    if absolute_path(config.run.directory) in map(absolute_path, config.dedup.against):
        raise ConfigError(
            f"{_at('dedup.against', config.origins)}dedup.against names run.directory: a batch is no copy of itself"
        )
    needs_text = [
        k
        for k, off in (("verify_share", 0.0), ("line_level", "off"))
        if getattr(config.dedup, k) != off
    ]
    if needs_text and not config.extract.keep_text:
        key = f"dedup.{needs_text[0]}"
        raise ConfigError(
            f"{_at(key, config.origins)}{key} needs the texts: set extract.keep_text = true"
        )
    if config.dedup.keep_rule == "newest" and config.input.format in ("jsonl", "parquet"):
        at = _at("dedup.keep_rule", config.origins)
        raise ConfigError(
            f"{at}dedup.keep_rule = 'newest': {config.input.format} inputs have no crawl date; use longest or first"
        )
    _, best, column = config.dedup.keep_rule.partition("best:")
    columns = [*score_columns(config.chain(config.extract.filters)), "num_chars", "language_score"]
    if best:
        _check_known(
            column,
            dict.fromkeys(columns),
            f"score (in dedup.keep_rule = '{config.dedup.keep_rule}')",
            config.origins,
        )


def _files(config: Config) -> Iterator[tuple[str, str]]:
    """(key, path) of every model and list that this configuration uses."""
    for name in SECTIONS:
        yield from _paths_of(name, getattr(config, name))
    for name in (*config.extract.filters, *config.refine.filters):
        yield from _paths_of(name, config.filters[name])
        for language, variant in config.per_language.get(name, {}).items():
            yield from _paths_of(f"per_language.{language}.{name}", variant)


def _paths_of(prefix: str, section: Any) -> Iterator[tuple[str, str]]:
    for field, paths in files(section).items():
        for path in paths:
            yield f"{prefix}.{field}", path


def section_of(key: str) -> str:
    """The section that a key belongs to: 'perplexity' for 'per_language.de.perplexity.model'."""
    parts = key.split(".")
    return parts[2] if parts[0] == "per_language" else parts[0]


def file_digests(config: Config) -> dict[str, str]:
    """Digest of the content of every model and list in use by key: a stage whose model changed
    under its name must run again.
    """
    digests: dict[str, str] = {}
    for key, path in _files(config):
        root = Path(path)
        # what lies beside a model under its name belongs to it: its card, its SentencePiece
        beside = sorted(root.parent.glob(f"{glob.escape(root.name)}.*"))
        found = (
            sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root, *beside]
        )
        # in a folder names mean something, such as a language
        names = [
            f.relative_to(root).as_posix() if root.is_dir() else f.name.removeprefix(root.name)
            for f in found
        ]
        digests[key] = digest([digests.get(key), *zip(names, map(file_sha256, found), strict=True)])
    for name, variants in config.per_language.items():
        for language, variant in variants.items():
            for field in files(variant):
                digests.setdefault(f"per_language.{language}.{name}.{field}", "")
    # a language whose bounds alone are its own reads what all read: nothing is measured anew for it
    return {key: found for key, found in digests.items() if found != digests.get(for_all(key), "")}


def for_all(key: str) -> str:
    """The key that 'per_language.de.perplexity.model' stands in for; '' for one of all languages."""
    return ".".join(key.split(".")[2:]) if key.startswith("per_language.") else ""


def _absolute(config: Config) -> Config:
    paths: dict[str, Any] = {name: _with_absolute_files(getattr(config, name)) for name in SECTIONS}
    directory, catalog = absolute_path(config.run.directory), absolute_path(config.run.catalog)
    for key, path in (("run.directory", directory), ("run.catalog", catalog)):
        if _in_job_directory(path):
            raise ConfigError(
                f"{_at(key, config.origins)}{key} lies in the job's working directory, which other nodes do not see and Ray "
                "removes with the job; write an absolute path that every node sees, or s3://..."
            )
    paths["run"] = dataclasses.replace(config.run, directory=directory, catalog=catalog)
    paths["input"] = dataclasses.replace(
        config.input, paths=tuple(_input_path(p) for p in config.input.paths)
    )
    paths["dedup"] = dataclasses.replace(
        config.dedup, against=tuple(absolute_path(p) for p in config.dedup.against)
    )
    return dataclasses.replace(
        config,
        **paths,
        filters={name: _with_absolute_files(f) for name, f in config.filters.items()},
        per_language={
            name: {language: _with_absolute_files(f) for language, f in variants.items()}
            for name, variants in config.per_language.items()
        },
    )


def _with_absolute_files(section: Any) -> Any:
    made = {
        name: tuple(map(_input_path, paths))
        if isinstance(getattr(section, name), tuple)
        else _input_path(*paths)
        for name, paths in files(section).items()
        if paths
    }
    return dataclasses.replace(section, **made)


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(value):
        leaf, key = getattr(value, field.name), f"{prefix}.{field.name}"
        if dataclasses.is_dataclass(leaf):
            yield from _leaves(key, leaf)
        else:
            yield key, leaf
