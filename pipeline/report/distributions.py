"""Histograms of the sampled pages: scores with their bounds, and lengths of kept documents."""

import math
from typing import NamedTuple

import numpy as np

from filters import Bound
from pipeline.report.charts import Histogram, binned
from pipeline.report.sample import Ledger, Sample
from pipeline.run.query import quoted


class Score(NamedTuple):
    """The distribution of one score.

    `outside`: share of measured documents beyond the bound, NaN included. `by_language`: bounds of
    languages that have their own, which `outside` ignores.
    """

    name: str
    stage: str
    bound: Bound
    histogram: Histogram | None
    outside: float
    not_numbers: int
    first_dropped: int
    by_language: dict[str, Bound]


def scores(ledger: Ledger, sample: Sample) -> list[Score]:
    """The scores that extract measured, then those that refine added."""
    charted = [_score("language.score", "extract", ledger, sample, column="language_score")]
    if sample.count("pages WHERE extract_confidence IS NOT NULL"):
        confidence = "extract.confidence"
        column = "extract_confidence"
        charted.append(_score(confidence, "extract", ledger, sample, column=column))
    extracted = _charted(sample, "pages")
    charted += [_score(name, "extract", ledger, sample) for name in extracted]
    refined = [name for name in _charted(sample, "refined") if name not in extracted]
    charted = charted if sample.count("pages") else []
    return charted + [_score(name, "refine", ledger, sample) for name in refined]


def _charted(sample: Sample, table: str) -> list[str]:
    """Names of scores; of personal data only the number that a rule may bound."""
    return [n for n in sample.scores(table) if n == "pii.count" or not n.startswith("pii.")]


_MEASURED = """
SELECT {column} AS value,
    CASE WHEN rejected_by IS NULL THEN 0 WHEN rejected_by = $rule THEN 2 ELSE 1 END AS verdict
FROM {table} WHERE {column} IS NOT NULL"""


def _score(name: str, stage: str, ledger: Ledger, sample: Sample, column: str = "") -> Score:
    """Verdicts are those of the score's own stage: a duplicate passed the rules of extract."""
    table = "pages" if stage == "extract" else "refined"
    sql = _MEASURED.format(column=quoted(column or name, '"'), table=table)
    measured = sample.table(sql, rule=name)
    values = measured["value"].to_numpy().astype(np.float64)
    verdicts = measured["verdict"].to_numpy()
    bound = ledger.bound(name)
    low, high = bound or (-math.inf, math.inf)
    inside = (values >= low) & (values <= high)  # NaN is never inside
    series = ("kept", "other rule", "this rule")
    return Score(
        name=name,
        stage=stage,
        bound=bound,
        histogram=binned({s: values[verdicts == i] for i, s in enumerate(series)}, bound),
        outside=float(1 - inside.mean()) if len(values) and bound is not None else 0.0,
        not_numbers=int(np.isnan(values).sum()),
        first_dropped=int((verdicts == 2).sum()),
        by_language=ledger.bounds_by_language(name),
    )


def lengths(sample: Sample) -> dict[str, Histogram]:
    """Lengths of kept documents: characters of the corpus, tokens of the packed rows."""
    queries = {
        "characters": "SELECT num_chars FROM refined WHERE rejected_by IS NULL",
        "tokens": "SELECT sum(length)::BIGINT FROM spans GROUP BY doc_id",
    }
    histograms = {name: binned({"kept": sample.values(sql)}) for name, sql in queries.items()}
    return {name: h for name, h in histograms.items() if h is not None}
