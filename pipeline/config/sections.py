"""The sections of a pipeline configuration: the dataclasses that stages and filters define."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass as section

from filters import STRICT, off_is_none
from filters.language import Language
from filters.license import License
from filters.opt_out import OptOut
from filters.pii.ner import Ner
from filters.pii.scrub import Pii
from filters.url_policy import UrlPolicy
from pipeline.controller.policy import Policy
from stages.dedup.config import DedupConfig
from stages.extract.config import ExtractConfig
from stages.formats.document import NamedFilter
from stages.pack.pack import PackConfig
from stages.read.fetch import FetchOptions
from stages.read.records import InputConfig
from stages.refine.refine import RefineConfig


@section(frozen=True, config=STRICT)
class RunConfig:
    """The directory of a run, and how many failures it tolerates.

    `directory` is a local path or object-store URI. A stage stops the run if its share of failed
    units exceeds `max_failed_share`, in [0, 1], or their number `max_failed_units` ("off": any
    number, within the share). A unit that crashes its worker `attempts` times has failed, and is
    quarantined until `gristmill retry`; a worker lost with its node is no crash. `calibration` is
    the table of percentiles, "" for the one that `gristmill calibrate` wrote to the run's own
    directory. `catalog` is the directory that generations are published to, "" for the run's own: a
    batch names its series.
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


@dataclass(frozen=True)
class Config:
    """A checked configuration: a field per section, `filters` by name, and each key's origin.

    `per_language`: by name of a filter (or "language") and by language, the instance that replaces
    the filter for documents of that language.
    """

    run: RunConfig
    schedule: Policy
    input: InputConfig
    fetch: FetchOptions
    extract: ExtractConfig
    url_policy: UrlPolicy
    opt_out: OptOut
    language: Language
    license: License
    dedup: DedupConfig
    refine: RefineConfig
    pii: Pii
    ner: Ner
    pack: PackConfig
    filters: dict[str, Any]
    per_language: dict[str, dict[str, Any]]
    origins: dict[str, str]

    def named(self, name: str) -> NamedFilter:
        """A filter, or "language", with its variants per language."""
        variants = tuple(sorted(self.per_language.get(name, {}).items()))
        filter = self.language if name == "language" else self.filters[name]
        return NamedFilter(name, filter, variants)

    def chain(self, names: Sequence[str]) -> tuple[NamedFilter, ...]:
        """The filters of a stage in order."""
        return tuple(self.named(name) for name in names)

    def in_use(self) -> Iterator[tuple[str, Any]]:
        """(name, instance) of every section and of the filters that a stage names; then of what
        replaces them for a language, named as in 'per_language.de.c4'.
        """
        names = (*SECTIONS, *self.extract.filters, *self.refine.filters)
        for name in names:
            yield name, self.filters[name] if name in self.filters else getattr(self, name)
        for name, variants in self.per_language.items():
            for language, variant in variants.items() if name in names else ():
                yield f"per_language.{language}.{name}", variant


SECTIONS: dict[str, Any] = {
    name: type_ for name, type_ in get_type_hints(Config).items() if dataclasses.is_dataclass(type_)
}


def varies_by_language(name: str) -> bool:
    """Whether a section may have other values per language, and percentiles as bounds."""
    return name == "language" or name not in SECTIONS


def section_of(key: str) -> str:
    """The section that a key belongs to: 'perplexity' for 'per_language.de.perplexity.model'."""
    parts = key.split(".")
    return parts[2] if parts[0] == "per_language" else parts[0]


def general_key(key: str) -> str:
    """The key for all languages that 'per_language.de.perplexity.model' overrides; else ''."""
    return ".".join(key.split(".")[2:]) if key.startswith("per_language.") else ""
