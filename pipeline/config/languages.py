"""Builds sections from raw values: for all documents, and for the documents of one language.

A key of [per_language.de.perplexity] overrides that of [perplexity] for German documents. Bounds
that are percentiles become numbers here, those of each language where it was sampled.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from filters import derived, rules
from filters.language import Language
from pipeline.config.build import build, check_known
from pipeline.config.percentiles import ALL, CALIBRATED, Calibration, keys_with_percentiles
from pipeline.config.sections import varies_by_language
from pipeline.config.source import error_at


class RawConfig(NamedTuple):
    """The configuration as written, and the calibration of its percentiles."""

    sections: dict[str, Any]
    per_language: Any
    origins: dict[str, str]
    calibration: Calibration


def build_section(name: str, cls: Any, raw: RawConfig, language: str = ALL) -> Any:
    """A section as it is for the documents of a language."""
    general = raw.sections.get(name, {})
    special = raw.per_language[language].get(name, {}) if language else {}
    where = f"per_language.{language}.{name}" if special else name
    if not (isinstance(general, dict) and isinstance(special, dict)):
        return build(where, cls, special or general)  # raises: this is no section
    values = general | special
    for key in keys_with_percentiles(values) if varies_by_language(name) else ():
        at = f"{where if key in special else name}.{key}"
        limits, score = values[key], f"{name}.{derived(cls).get(key, key)}"
        try:
            values[key] = raw.calibration.resolve(limits, score, language)
        except ValueError as error:
            raise error_at(at, f" = {limits}: {error}") from None
        if raw.calibration.table is not None:
            origin = raw.origins.get(at, "").partition(", percentiles")[0]
            full = f"per_language.{language}.{name}.{key}" if language else at
            shown = " to ".join(map(str, limits))
            raw.origins[full] = f"{origin}, percentiles {shown} {CALIBRATED}"
    return build(where, cls, values)


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
        if isinstance(section, dict) and keys_with_percentiles(section):
            pairs += [(name, language) for language in sampled]
    for language in sampled:
        raw.per_language.setdefault(language, {})
    sections: dict[str, dict[str, Any]] = {}
    for name, language in pairs:
        sections.setdefault(name, {})[language] = build_section(name, classes[name], raw, language)
    return sections


def _check_languages(classes: Collection[str], allowed: Collection[str], raw: RawConfig) -> None:
    for language, sections in _items("per_language", raw.per_language):
        at = f"per_language.{language}"
        if allowed:
            known = [f"per_language.{name}" for name in allowed]
            check_known(at, known, "language (of language.allowed)")
        for name, keys in _items(at, sections):
            known = [f"{at}.{other}" for other in classes if varies_by_language(other)]
            check_known(f"{at}.{name}", known, "filter")
            if name == "language":  # how a language is identified cannot depend on the language
                known = [f"{at}.language.{rule}" for rule in rules(Language())]
                for key in keys:
                    check_known(f"{at}.language.{key}", known, "bound of a language")


def _items(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        text = " is a section: write [per_language.de.perplexity] with keys under it"
        raise error_at(name, text)
    yield from value.items()
