"""Bounds as percentiles of a sample of the run: `["p0", "p60"]` in a config, and the table of
percentiles that `gristmill calibrate` writes.

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
    numbers = []
    for limit, percent, end, open_end in (
        (limits[0], low, 0, -math.inf),
        (limits[1], high, 100, math.inf),
    ):
        if percent is None:
            numbers.append(limit)
        elif table is None or percent == end:
            numbers.append(open_end)
        else:
            numbers.append(table.value(score, percent, language))
    return numbers


def _percent(limit: Any) -> float | None:
    """The percentage that "p60" names, None for anything else."""
    match = _PERCENTILE.fullmatch(limit) if isinstance(limit, str) else None
    return float(match[1]) if match and float(match[1]) <= 100 else None
