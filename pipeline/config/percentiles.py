"""Bounds as percentiles of a sample of the run: `["p0", "p60"]` in a config, and the table of
percentiles that `gristmill calibrate` writes.

Perplexities and classifier scores mean nothing across models and corpora, percentiles do: CCNet
cuts at the 30th and 60th of each language (arXiv:1911.00359, 5.1), DCLM keeps the best tenth
(arXiv:2406.11794, 4.3).
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.config.digests import measured_with, texts_made_with
from pipeline.config.paths import absolute_path
from pipeline.config.sections import Config, RunConfig
from stages.formats.errors import ConfigError
from stages.storage.files import read_bytes

CALIBRATED = "of `gristmill calibrate`"  # ends the origin of a bound that is a percentile

STEPS = 1000  # the table holds every tenth of a percent; between them it is interpolated
ALL = ""  # the language of all documents together

_PERCENTILE = re.compile(r"p(\d{1,3}(?:\.\d+)?)")


class Table(NamedTuple):
    """The measurements of a sample.

    Documents by language; `STEPS` + 1 quantiles by score and language (those of all documents, and
    of languages with enough documents); by section a digest of what it was measured with; and the
    settings that selected the documents.
    """

    documents: dict[str, int]
    quantiles: dict[str, dict[str, list[float]]]
    made_with: dict[str, str]
    drawn_by: dict[str, str] = {}  # noqa: RUF012

    @property
    def languages(self) -> list[str]:
        """Languages with quantiles of their own."""
        return sorted({language for score in self.quantiles.values() for language in score} - {ALL})

    def value(self, score: str, percent: float, language: str) -> float:
        """The value that `percent` of the sample's documents of a language do not exceed.

        LookupError says what the table lacks.
        """
        if score not in self.quantiles:
            raise LookupError(
                f"holds no sample of {score}; run `gristmill calibrate` again, with a filter in "
                "use that has that score"
            )
        quantiles = self.quantiles[score].get(language)
        # in a run of one language all documents are of it; tables of older versions do not name it
        if quantiles is None and (
            self.documents.get(language) == self.documents[ALL] or self.documents.keys() == {ALL}
        ):
            quantiles = self.quantiles[score].get(ALL)
        if quantiles is None:
            raise LookupError(
                f"has {self.documents.get(language, 0)} documents of language '{language}', too "
                f"few for percentiles of its own, or none with {score}; give numbers, or a larger "
                "--sample"
            )
        return float(np.interp(percent * STEPS / 100, np.arange(STEPS + 1), quantiles))


def quantiles(values: npt.NDArray[np.float64]) -> list[float]:
    """The STEPS + 1 quantiles of the finite values, smallest to largest; [] if there are none."""
    finite = values[np.isfinite(values)]
    return np.quantile(finite, np.linspace(0, 1, STEPS + 1)).tolist() if len(finite) else []


def dump(table: Table) -> bytes:
    """The table as JSON."""
    return json.dumps(table._asdict()).encode()


def parse(text: bytes) -> Table:
    """The table from JSON; ValueError for anything else."""
    try:
        return Table(**json.loads(text))
    except (TypeError, ValueError) as error:
        raise ValueError(f"not a table of `gristmill calibrate`: {error}") from None


def keys_with_percentiles(section: Mapping[str, Any]) -> list[str]:
    """The keys of a raw config section whose values contain percentiles."""
    return [
        key
        for key, value in section.items()
        if isinstance(value, list) and any(_percent(v) is not None for v in value)
    ]


def resolve(limits: Sequence[Any], score: str, language: str, table: Table | None) -> list[Any]:
    """[low, high] as numbers: p0 leaves the low side open, p100 the high side, and without a table
    every percentile does.

    LookupError says what the table lacks, ValueError what is wrong with the percentiles.
    """
    low, high = map(_percent, limits)
    if low is not None and high is not None and low >= high:
        raise ValueError(
            f"the first percentile must be below the second, got {limits[0]} and {limits[1]}"
        )

    def number(limit: Any, percent: float | None, end: int, open_end: float) -> Any:
        if percent is None:
            return limit
        if table is None or percent == end:
            return open_end
        return table.value(score, percent, language)

    return [number(limits[0], low, 0, -math.inf), number(limits[1], high, 100, math.inf)]


def _percent(limit: Any) -> float | None:
    """The percentage that "p60" names, None for anything else."""
    match = _PERCENTILE.fullmatch(limit) if isinstance(limit, str) else None
    return float(match[1]) if match and float(match[1]) <= 100 else None


# --- the table of a run ---------------------------------------------------------------------------


class Calibration(NamedTuple):
    """A table of percentiles and where it lies; without one, percentiles are an error if
    `required`, and bound nothing if not.
    """

    uri: str
    table: Table | None
    required: bool

    @property
    def languages(self) -> list[str]:
        """The languages that have percentiles of their own."""
        return self.table.languages if self.table else []

    def resolve(self, limits: Sequence[Any], score: str, language: str) -> list[Any]:
        """As `resolve`. ValueError if the percentiles are wrong, or the table lacks them."""
        if len(limits) != 2:
            raise ValueError("give [low, high]")
        if self.required and self.table is None:
            raise ValueError(
                "there is no table of percentiles: run `gristmill calibrate` with this config, "
                f"which writes {self.uri}"
            )
        try:
            return resolve(limits, score, language, self.table)
        except LookupError as error:
            raise ValueError(f"{self.uri} {error}") from None


def read_calibration(run: RunConfig, *, required: bool) -> Calibration:
    """The calibration of a run; without its table if there is none, or if not `required`."""
    uri = absolute_path(run.calibration) or f"{absolute_path(run.directory)}/calibration.json"
    table = None
    try:
        if required:
            table = parse(read_bytes(uri))
    except FileNotFoundError:
        if run.calibration:
            raise ConfigError(
                f"run.calibration: no such file: {uri}; write it with `gristmill calibrate`"
            ) from None
    except ValueError as error:
        raise ConfigError(f"{uri}: {error}") from None
    return Calibration(uri, table, required)


def check_calibration(
    config: Config, calibration: Calibration, raw: Iterable[dict[str, Any]]
) -> None:
    """ConfigError if percentiles are used whose table was measured in another way.

    `raw` are the sections as written, for all documents and for each language.
    """
    if calibration.table is None:
        return
    names = {
        name
        for sections in raw
        for name, section in sections.items()
        if isinstance(section, dict) and keys_with_percentiles(section)
    }
    made_with = calibration.table.made_with
    for name in sorted(names & {"language", *config.extract.filters, *config.refine.filters}):
        if made_with.get(name) != measured_with(config, name):
            raise ConfigError(
                f"{calibration.uri} was measured with other settings or another model of '{name}'; "
                "run `gristmill calibrate` again"
            )
    if names and made_with.get("texts", texts := texts_made_with(config)) != texts:
        raise ConfigError(
            f"{calibration.uri} was measured on texts of another extract.engine (or its options) "
            "or dedup.line_level; run `gristmill calibrate` again"
        )
