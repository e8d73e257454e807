"""Builds sections from raw values: for all documents, and for the documents of one language.

A key of [per_language.de.perplexity] overrides that of [perplexity] for German documents. Bounds
that are percentiles become numbers here, those of each language where it was sampled.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from filters import derived, rules
from filters.language import Language
from pipeline.config import percentiles
from pipeline.config.build import build, check_known
from pipeline.config.calibration import CALIBRATED, Calibration
from pipeline.config.sections import varies_by_language
from pipeline.config.source import error_at


class RawConfig(NamedTuple):
    """The configuration as written, and the calibration of its percentiles."""

    sections: dict[str, Any]
    per_language: Any
    origins: dict[str, str]
    calibration: Calibration


def build_section(name: str, cls: Any, raw: RawConfig, language: str = percentiles.ALL) -> Any:
    """A section as it is for the documents of a language."""
    general = raw.sections.get(name, {})
    special = raw.per_language[language].get(name, {}) if language else {}
    where = f"per_language.{language}.{name}" if special else name
    if isinstance(general, dict) and isinstance(special, dict):
        if varies_by_language(name):
            general = _without_percentiles(general, name, name, cls, language, raw)
            special = _without_percentiles(special, where, name, cls, language, raw)
        return build(where, cls, general | special, raw.origins)
    return build(where, cls, special or general, raw.origins)  # raises: this is no section


def build_by_language(
    classes: Mapping[str, Any], allowed: Collection[str], raw: RawConfig
) -> dict[str, dict[str, Any]]:
    """By section and language the instance that replaces the section's: where the configuration
    names the language, or where it uses percentiles and the language was sampled.
    """
    _check_languages(classes, allowed, raw)
    pairs = [
        (name, language) for language, sections in raw.per_language.items() for name in sections
    ]
    sampled = [name for name in raw.calibration.languages if name in allowed or not allowed]
    for name, section in raw.sections.items():
        if isinstance(section, dict) and percentiles.keys_with_percentiles(section):
            pairs += [(name, language) for language in sampled]
    for language in sampled:
        raw.per_language.setdefault(language, {})
    sections: dict[str, dict[str, Any]] = {}
    for name, language in pairs:
        sections.setdefault(name, {})[language] = build_section(name, classes[name], raw, language)
    return sections


def _check_languages(classes: Collection[str], allowed: Collection[str], raw: RawConfig) -> None:
    for language, sections in _items("per_language", raw.per_language, raw.origins):
        at = f"per_language.{language}"
        if allowed:
            known = [f"per_language.{name}" for name in allowed]
            check_known(at, known, "language (of language.allowed)", raw.origins)
        for name, keys in _items(at, sections, raw.origins):
            known = [f"{at}.{other}" for other in classes if varies_by_language(other)]
            check_known(f"{at}.{name}", known, "filter", raw.origins)
            if name == "language":  # how a language is identified cannot depend on the language
                known = [f"{at}.language.{rule}" for rule in rules(Language())]
                for key in keys:
                    kind = "bound of a language"
                    check_known(f"{at}.language.{key}", known, kind, raw.origins)


def _items(name: str, value: Any, origins: dict[str, str]) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        text = " is a section: write [per_language.de.perplexity] with keys under it"
        raise error_at(name, text, origins)
    yield from value.items()


def _without_percentiles(
    values: dict[str, Any], where: str, name: str, cls: Any, language: str, raw: RawConfig
) -> dict[str, Any]:
    """The values of a section with percentiles replaced by numbers."""
    numbers = {}
    for key in percentiles.keys_with_percentiles(values):
        score = f"{name}.{derived(cls).get(key, key)}"
        try:
            numbers[key] = _resolve(values[key], score, language, raw.calibration)
        except ValueError as error:
            text = f" = {values[key]}: {error}"
            raise error_at(f"{where}.{key}", text, raw.origins) from None
        if raw.calibration.table is not None:
            origin = raw.origins.get(f"{where}.{key}", "").partition(", percentiles")[0]
            limits = " to ".join(map(str, values[key]))
            full = f"per_language.{language}.{name}.{key}" if language else f"{name}.{key}"
            raw.origins[full] = f"{origin}, percentiles {limits} {CALIBRATED}"
    return values | numbers


def _resolve(limits: Any, score: str, language: str, calibration: Calibration) -> list[Any]:
    if len(limits) != 2:
        raise ValueError("give [low, high]")
    if calibration.required and calibration.table is None:
        raise ValueError(
            "there is no table of percentiles: run `gristmill calibrate` with this config, which "
            f"writes {calibration.uri}"
        )
    try:
        return percentiles.resolve(limits, score, language, calibration.table)
    except LookupError as error:
        raise ValueError(f"{calibration.uri} {error}") from None
