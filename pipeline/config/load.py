"""Loads the configuration of a run: defaults in code, a TOML file over them, the command line over
that. Every key is checked before any work starts.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filters import available, filter_class, is_path
from pipeline.config.build import ALIASES, build, check_known
from pipeline.config.digests import files_of
from pipeline.config.languages import RawConfig, build_by_language, build_section
from pipeline.config.paths import absolute_path, with_absolute_paths
from pipeline.config.percentiles import check_calibration, read_calibration
from pipeline.config.sections import SECTIONS, Config, RunConfig
from pipeline.config.source import error_at, located, read_source
from stages.formats import mds
from stages.formats.document import score_columns
from stages.formats.errors import ConfigError
from stages.formats.tiktoken_encodings import check_encoding
from stages.pack.pack import tokenizer_of
from stages.storage.files import is_local


def load(
    file: str | Path | None, overrides: Sequence[str] = (), *, calibrated: bool = True
) -> Config:
    """Read a file (None: defaults only), apply `section.key=value` overrides, and check it all.

    Bounds that are percentiles become numbers by the run's calibration; if not `calibrated`, they
    bound nothing. ConfigError for the first problem.
    """
    sections, origins = read_source(file, overrides)
    with located(origins):
        _follow_aliases(sections, origins)
        return _build_config(sections, origins, calibrated=calibrated)


def _follow_aliases(sections: dict[str, Any], origins: dict[str, str]) -> None:
    """Move the values of old keys to the new ones. If both are set, that of the command line holds;
    ConfigError if both are there, or in the file.
    """
    for old, new in ALIASES.items():
        (section, name), (_, new_name) = old.split("."), new.split(".")
        values = sections.get(section)
        if not isinstance(values, dict) or name not in values:
            continue
        value = values.pop(name)
        old_wins, new_wins = (origins.get(key) == "command line" for key in (old, new))
        if new_name in values and old_wins == new_wins:
            raise error_at(old, f" is an old name of {new}, which is set as well; leave it out")
        if new_name in values and new_wins:
            continue
        values[new_name] = value
        origins[new] = origins[old]


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
    _check(config)
    config = with_absolute_paths(config)
    check_calibration(config, raw.calibration, [sections, *raw.per_language.values()])
    return config


# --- checks that span sections --------------------------------------------------------------------


def _check(config: Config) -> None:
    """ConfigError for the first problem that one section alone cannot know of."""
    if not config.run.directory:
        raise ConfigError(
            "run.directory is not set: name the directory of the run, e.g. run.directory=runs/first"
        )
    if not config.input.paths:
        raise ConfigError("input.paths is empty: name files, globs, folders or listings to read")
    _check_chains(config)
    _check_files(config)
    _check_pack(config)
    _check_dedup(config)
    _check_sections(config)


def _check_chains(config: Config) -> None:
    for stage in ("extract", "refine"):
        key, names = f"{stage}.filters", getattr(config, stage).filters
        for name in names:
            check_known(name, config.filters, f"filter (in {key})", at=key)
        if len(set(names)) < len(names):
            raise error_at(key, f" names a filter twice: {list(names)}")
    if twice := {*config.extract.filters} & {*config.refine.filters}:
        raise ConfigError(
            f"filter '{min(twice)}' is in extract.filters and in refine.filters; once is enough"
        )


def _check_pack(config: Config) -> None:
    pack = config.pack
    try:
        if is_path(pack.tokenizer) or pack.add_begin_of_text or any(pack.options):
            tokenizer_of(pack)
        else:  # loading one takes a second
            check_encoding(pack.tokenizer, pack.vocabulary_dir)
    except ValueError as error:
        raise error_at("pack.tokenizer", f": {error}") from error
    hashes = pack.hashes
    if len(set(hashes)) < len(hashes) or not mds.HASHES.keys() >= set(hashes):
        text = f" = {list(hashes)}: give unique names of {sorted(mds.HASHES)}"
        raise error_at("pack.hashes", text)


def _check_dedup(config: Config) -> None:
    dedup = config.dedup
    if absolute_path(config.run.directory) in map(absolute_path, dedup.against):
        text = " names run.directory: a batch cannot be compared with itself"
        raise error_at("dedup.against", text)
    for field, off in (("verify_share", 0.0), ("line_level", "off")):
        if getattr(dedup, field) != off and not config.extract.keep_text:
            text = " needs the texts: set extract.keep_text = true"
            raise error_at(f"dedup.{field}", text)
    if dedup.keep_rule == "newest" and config.input.format in ("jsonl", "parquet"):
        text = f" = 'newest': {config.input.format} inputs have no crawl date; use longest or first"
        raise error_at("dedup.keep_rule", text)
    _, best, column = dedup.keep_rule.partition("best:")
    if best:
        scores = score_columns(config.chain(config.extract.filters))
        kind = f"score (in dedup.keep_rule = '{dedup.keep_rule}')"
        check_known(column, [*scores, "num_chars", "language_score"], kind, at="dedup.keep_rule")


def _check_files(config: Config) -> None:
    for key, path in files_of(config):
        if not is_local(path):
            text = f" = {path}: models and lists must have a local path on every worker"
            raise error_at(key, text)
        if not os.path.exists(path):
            raise error_at(key, f": no such file or folder: {path}")


def _check_sections(config: Config) -> None:
    """Run the sections' own checks of their models and lists for the languages they will see."""
    allowed = config.language.allowed
    for name in (*config.extract.filters, *config.refine.filters):
        named = config.named(name)
        others = tuple(language for language in allowed if language not in dict(named.by_language))
        for language, filter in named.all():
            if language:
                where = f"per_language.{language}.{name}"
                _check_section(where, filter, (language,))
            elif others or not allowed:
                _check_section(name, filter, others)
    _check_section("url_policy", config.url_policy, allowed)
    _check_section("language", config.language, allowed)
    if config.refine.scrub_pii:
        _check_section("pii", config.pii, allowed)
    if config.ner.enabled:
        _check_section("ner", config.ner, allowed)


def _check_section(where: str, section: Any, languages: tuple[str, ...]) -> None:
    if hasattr(section, "check"):
        try:
            section.check(languages)
        except ValueError as error:
            raise error_at(where, f": {error}") from error
