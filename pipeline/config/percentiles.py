"""Bounds as percentiles of a sample of the run: `["p0", "p60"]` in a config, and the table that
`gristmill calibrate` writes.

Perplexities and classifier scores mean nothing across models and corpora, percentiles do: CCNet
cuts at the 30th and 60th of each language (arXiv:1911.00359, 5.1), DCLM keeps the best tenth
(arXiv:2406.11794, 4.3).
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

STEPS = 1000  # the table holds every tenth of a percent; between them it is interpolated
ALL = ""  # the language of all documents together

_PERCENTILE = re.compile(r"p(\d{1,3}(?:\.\d+)?)")


class Table(NamedTuple):
    """What a sample said: documents by language, `STEPS` + 1 quantiles by score and language (those
    of all, and of languages with enough documents), by section a digest of what it was measured
    with, and the settings that chose its documents.
    """

    documents: dict[str, int]
    quantiles: dict[str, dict[str, list[float]]]
    made_with: dict[str, str]
    drawn_by: dict[str, str] = {}

    @property
    def languages(self) -> list[str]:
        """Those with quantiles of their own."""
        return sorted({language for found in self.quantiles.values() for language in found} - {ALL})

    def value(self, score: str, percent: float, language: str) -> float:
        """The value that `percent` of the sample's documents of a language do not exceed; KeyError
        says what there is not.
        """
        if score not in self.quantiles:
            raise KeyError(
                f"holds no sample of {score}; run `gristmill calibrate` again, with a filter in use that has that score"
            )
        sampled = self.quantiles[score].get(language)
        # the only language there is, which tables of older versions do not name
        if sampled is None and (
            self.documents.get(language) == self.documents[ALL] or self.documents.keys() == {ALL}
        ):
            sampled = self.quantiles[score].get(ALL)
        if sampled is None:
            raise KeyError(
                f"has {self.documents.get(language, 0)} documents of language '{language}', too few for percentiles of its own, "
                f"or none with {score}; give numbers, or a larger --sample"
            )
        return float(np.interp(percent * STEPS / 100, np.arange(STEPS + 1), sampled))


def quantiles(values: npt.NDArray[np.float64]) -> list[float]:
    """The STEPS + 1 quantiles of the finite values, smallest to largest; [] when there is none."""
    finite = values[np.isfinite(values)]
    return np.quantile(finite, np.linspace(0, 1, STEPS + 1)).tolist() if len(finite) else []


def dump(table: Table) -> bytes:
    """The table as JSON."""
    return json.dumps(table._asdict()).encode()


def parse(text: bytes) -> Table:
    """The table from JSON; ValueError when it is none."""
    try:
        return Table(**json.loads(text))
    except (TypeError, ValueError) as error:
        raise ValueError(f"not a table of `gristmill calibrate`: {error}") from None


def used(section: Mapping[str, Any]) -> list[str]:
    """The keys of a raw config section whose values name percentiles."""
    return [
        key
        for key, value in section.items()
        if isinstance(value, list) and any(_percent(v) is not None for v in value)
    ]


def bound(limits: Sequence[Any], score: str, language: str, table: Table | None) -> list[Any]:
    """[low, high] as numbers: p0 leaves the low side open, p100 the high side, and every percentile
    while there is no table.

    KeyError says what the table does not hold, ValueError what cannot be meant.
    """
    low, high = map(_percent, limits)
    if low is not None and high is not None and low >= high:
        raise ValueError(
            f"the first percentile must be below the second, got {limits[0]} and {limits[1]}"
        )
    return [
        _limit(limit, percent, score, language, table, end)
        for limit, percent, end in zip(
            limits, (low, high), (_Side(0, -math.inf), _Side(100, math.inf)), strict=True
        )
    ]


class _Side(NamedTuple):
    """The percentile that leaves a side open, and what is written then."""

    percent: float
    value: float


def _limit(
    limit: Any, percent: float | None, score: str, language: str, table: Table | None, end: _Side
) -> Any:
    if percent is None:
        return limit
    return (
        end.value
        if table is None or percent == end.percent
        else table.value(score, percent, language)
    )


def _percent(limit: Any) -> float | None:
    """The percentage that "p60" names, None for anything else."""
    found = _PERCENTILE.fullmatch(limit) if isinstance(limit, str) else None
    return float(found[1]) if found and float(found[1]) <= 100 else None
