"""Policy over text: what a filter is, how its bounds are checked, and how one is found by name.

A filter is a frozen dataclass in `filters/<name>.py`, called <Name> in CamelCase. Every field of
type `Bound` is a rule: its name is at once the score that `measure` returns, the Arrow column, the
reject reason, the report row, the TOML key and the command-line override
(`gopher_quality.word_count`). Adding a filter is one file and one word in a config.

What a filter may have besides: fields of type `File` (models, lists: known by their content, not by
their path), `notes` (names of text columns that `measure` fills), `edit` (it changes the text too;
`edits_by` names the bounds that say how), `check` (what must hold before a run starts).
"""

import dataclasses
import importlib
import math
import pkgutil
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple, Protocol

from pydantic import AfterValidator, BeforeValidator, ConfigDict

from filters.suggest import did_you_mean

# defaults are validated too, so that 5 written out and 5 by default are the same bound and give the
# same stage key
STRICT = ConfigDict(extra="forbid", validate_default=True)


def off_is_none(value: Any) -> Any:
    """TOML has no null: "off" stands for it."""
    return None if isinstance(value, str) and value == "off" else value


def _low_to_high(value: tuple[float, float] | None) -> tuple[float, float] | None:
    if value is not None and not value[0] <= value[1]:
        raise ValueError(f"low must not exceed high, got [{value[0]}, {value[1]}]")
    return value


# [low, high], both inclusive; inf and -inf leave a side open; "off" (None) measures without
# rejecting.
Bound = Annotated[
    tuple[float, float] | None, BeforeValidator(off_is_none), AfterValidator(_low_to_high)
]


# Paths to files or folders that every worker can read; "" when none is named.
File = Annotated[str, "file"]
Files = Annotated[tuple[str, ...], "files"]

Measured = dict[str, Any]  # a float per rule, then a string or None per note


class Filter(Protocol):
    """What every filter has. The names of `notes` and of `tallied`, those of them whose values are
    few enough to be counted, are class variables; both are () for a filter that lacks them.
    """

    def measure(self, view: Any) -> Measured:
        """Score a document; total: defined for every string, one score per Bound field, in field
        order, then the notes.
        """
        ...


def apply(filter: Any, view: Any) -> tuple[Any, Measured]:
    """The document as the filter hands it on, and what it measured.

    Only filters with a method `edit` change a document.
    """
    if hasattr(filter, "edit"):
        edited: tuple[Any, Measured] = filter.edit(view)
        return edited
    return view, filter.measure(view)


class Rejection(NamedTuple):
    """Why a document was dropped: `rule` is '<filter>.<score>', `bound` the limits that `value`
    fell outside.
    """

    rule: str
    value: float
    bound: tuple[float, float]


def rules(filter: Any) -> dict[str, tuple[float, float] | None]:
    """The rules of a filter in the order in which they are checked."""
    return {f.name: getattr(filter, f.name) for f in dataclasses.fields(filter) if f.type is Bound}


def settings(filter: Any) -> dict[str, Any]:
    """The fields of a filter that change what is measured, as opposed to where the limits lie;
    files not, see `files`.

    Limits by which a filter edits, its `edits_by`, decide what it and all filters after it measure.
    """
    kept = getattr(filter, "edits_by", ())
    return {
        f.name: getattr(filter, f.name)
        for f in dataclasses.fields(filter)
        if f.name in kept or f.type not in (Bound, File, Files)
    }


def files(section: Any) -> dict[str, tuple[str, ...]]:
    """The paths that a filter, or any other section, reads by the names of their fields."""
    paths = {
        f.name: getattr(section, f.name)
        for f in dataclasses.fields(section)
        if f.type in (File, Files)
    }
    return {
        name: found if isinstance(found, tuple) else (found,) * bool(found)
        for name, found in paths.items()
    }


def derived(filter: Any) -> dict[str, str]:
    """The settings that only sort documents by a score, with that score: no score changes with
    them. As percentiles allowed.
    """
    return dict(getattr(filter, "percentiles_of", {}))


def notes(filter: Any) -> tuple[str, ...]:
    """Names of the text columns that a filter fills besides its scores."""
    return tuple(getattr(filter, "notes", ()))


def first_failure(name: str, filter: Any, scores: Mapping[str, float]) -> Rejection | None:
    """The first rule that `scores` breaks. NaN breaks every rule: a score that cannot be had is no
    pass.
    """
    for rule, bound in rules(filter).items():
        if bound is None:
            continue
        value = scores[rule]
        if math.isnan(value) or not bound[0] <= value <= bound[1]:
            return Rejection(f"{name}.{rule}", value, bound)
    return None


def available() -> list[str]:
    """Names of the modules in this package that hold a filter, that is, a class of their own name."""
    modules = (m.name for m in pkgutil.iter_modules(__path__) if m.name not in _SECTIONS)
    return sorted(
        name
        for name in modules
        if hasattr(importlib.import_module(f"filters.{name}"), _class_name(name))
    )


# policy that has a place of its own in the pipeline, and is no link of a stage's chain
_SECTIONS = {"url_policy", "opt_out", "language", "pii", "names"}


def filter_class(name: str) -> Any:
    """The dataclass of filter `name`; ValueError names the nearest filter when there is none."""
    if name not in available():
        raise ValueError(f"unknown filter '{name}'{did_you_mean(name, available())}")
    return getattr(importlib.import_module(f"filters.{name}"), _class_name(name))


def _class_name(module: str) -> str:
    return "".join(part.title() for part in module.split("_"))
