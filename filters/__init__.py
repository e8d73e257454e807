"""Policy over text: what a filter is, how its bounds are checked, and how to get one by name.

A filter is a frozen dataclass in `filters/<name>.py`, called <Name> in CamelCase. Every field of
type `Bound` is a rule: its name is at once the score that `measure` returns, the Arrow column, the
reject reason, the report row, the TOML key and the command-line override
(`gopher_quality.word_count`). Adding a filter is one file and one word in a config.

A filter may also have fields of type `File` (models and lists, identified by their content and not
by their path), `notes` (names of text columns that `measure` fills), `edit` (it also changes the
text; `edits_by` names the bounds that control this) and `check` (called before a run starts).
"""

import dataclasses
import importlib
import math
import pkgutil
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple, Protocol, TypeVar, dataclass_transform

import pydantic.dataclasses
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

from filters.suggest import did_you_mean

# defaults are validated too, so that an explicit 5 and a default 5 give the same bound and the same
# stage key
STRICT = ConfigDict(extra="forbid", validate_default=True)

T = TypeVar("T")


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, Field))
def validated(cls: type[T]) -> type[T]:
    """Make a class a frozen dataclass whose fields are checked when it is built."""
    return pydantic.dataclasses.dataclass(cls, frozen=True, config=STRICT)  # type: ignore[return-value]


def off_is_none(value: Any) -> Any:
    """Convert "off" to None, as TOML has no null."""
    return None if isinstance(value, str) and value == "off" else value


def _low_to_high(value: tuple[float, float] | None) -> tuple[float, float] | None:
    if value is not None and not value[0] <= value[1]:
        raise ValueError(f"low must not exceed high, got [{value[0]}, {value[1]}]")
    return value


# [low, high], both inclusive; inf and -inf for no limit; "off" (None) measures without rejecting
Bound = Annotated[
    tuple[float, float] | None, BeforeValidator(off_is_none), AfterValidator(_low_to_high)
]


# Paths to files or folders that every worker can read; "" for none
File = Annotated[str, "file"]
Files = Annotated[tuple[str, ...], "files"]
# a path with a dot or a slash in it, or the name of something that needs no file
FileOrName = Annotated[str, "file or name"]

Measured = dict[str, Any]  # a float per rule, then a string or None per note


class Filter(Protocol):
    """The method that every filter has.

    Optional class variables are `notes`, and `tallied`: the notes with few enough values to count.
    """

    def measure(self, view: Any) -> Measured:
        """One score per Bound field, in field order, then the notes; defined for every string."""
        ...


def apply(filter: Any, view: Any) -> tuple[Any, Measured]:
    """The document after the filter, and its scores; only filters with `edit` change a document."""
    if hasattr(filter, "edit"):
        edited: tuple[Any, Measured] = filter.edit(view)
        return edited
    return view, filter.measure(view)


class Rejection(NamedTuple):
    """Why a document was dropped: the `value` of `rule`, '<filter>.<score>', is outside `bound`."""

    rule: str
    value: float
    bound: tuple[float, float]


def rules(filter: Any) -> dict[str, tuple[float, float] | None]:
    """The rules of a filter in the order in which they are checked."""
    return {f.name: getattr(filter, f.name) for f in dataclasses.fields(filter) if f.type is Bound}


def settings(filter: Any) -> dict[str, Any]:
    """The fields of a filter that change what it or later filters measure.

    These are all fields but bounds and files (see `files`), and the bounds that control edits.
    """
    edits_by = getattr(filter, "edits_by", ())
    return {
        f.name: getattr(filter, f.name)
        for f in dataclasses.fields(filter)
        if f.name in edits_by or f.type not in (Bound, File, Files)
    }


def files(section: Any) -> dict[str, tuple[str, ...]]:
    """The paths that a filter, or any other section, reads, by field; no field with a name."""
    paths: dict[str, tuple[str, ...]] = {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if field.type == Files:
            paths[field.name] = value
        elif field.type == File:
            paths[field.name] = (value,) if value else ()
        elif field.type == FileOrName and is_path(value):
            paths[field.name] = (value,)
    return paths


def is_path(value: str) -> bool:
    """Whether a FileOrName is a path."""
    return "/" in value or "." in value


def derived(filter: Any) -> dict[str, str]:
    """The settings that only group documents by a score, with that score.

    They may be given as percentiles, as they change no score.
    """
    return dict(getattr(filter, "percentiles_of", {}))


def notes(filter: Any) -> tuple[str, ...]:
    """Names of the text columns that a filter fills besides its scores."""
    return tuple(getattr(filter, "notes", ()))


def first_failure(name: str, filter: Any, scores: Mapping[str, float]) -> Rejection | None:
    """The first rule that `scores` break; NaN breaks every rule."""
    for rule, bound in rules(filter).items():
        if bound is None:
            continue
        value = scores[rule]
        if math.isnan(value) or not bound[0] <= value <= bound[1]:
            return Rejection(f"{name}.{rule}", value, bound)
    return None


def available() -> list[str]:
    """Names of the filters: modules of this package with a class of the same name."""
    modules = (m.name for m in pkgutil.iter_modules(__path__) if m.name not in _SECTIONS)
    return sorted(
        name
        for name in modules
        if hasattr(importlib.import_module(f"filters.{name}"), _class_name(name))
    )


# policies with a fixed place in the pipeline, which cannot be listed in a stage's filters
_SECTIONS = {"url_policy", "opt_out", "language", "license", "pii"}


def filter_class(name: str) -> Any:
    """The dataclass of a filter; ValueError suggests a name if there is none."""
    if name not in (names := available()):
        raise ValueError(f"unknown filter '{name}'{did_you_mean(name, names)}")
    return getattr(importlib.import_module(f"filters.{name}"), _class_name(name))


def _class_name(module: str) -> str:
    return "".join(part.title() for part in module.split("_"))
