"""`gristmill calibrate`: score quantiles of a sample of the run's own documents, for bounds.

The run is completed through dedup, which it needs anyway. Then every filter of refine measures a
sample of the documents that dedup kept, whether or not another filter rejects them; the scores of
extract are read from its parts. The table is written to the run directory, where the next
`gristmill run` looks for it.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from filters import rules
from pipeline.config import percentiles
from pipeline.config.digests import measured_with, selection_settings, texts_made_with
from pipeline.config.percentiles import CALIBRATED
from pipeline.config.sections import Config
from pipeline.config.show import changed
from pipeline.engine import units
from pipeline.engine.lease import lease
from pipeline.report.charts import Floats, binned
from pipeline.report.page import write_page
from pipeline.run import query
from pipeline.run.execute import Progress, Run, execute, plan, run_phase
from pipeline.run.phase import Phase
from pipeline.run.phases import PHASES, SPECS, refine_plan
from stages.formats.document import score_columns
from stages.refine import refine
from stages.storage.digests import digest
from stages.storage.files import read_bytes, write_atomically
from stages.storage.ledger import Store

if TYPE_CHECKING:
    import duckdb

# below this a percentile is noise: such languages have the percentiles of all documents
MIN_DOCUMENTS = 100


class Distribution(NamedTuple):
    """One score over the sampled documents of a language ("" for all)."""

    score: str
    language: str
    documents: int
    percentiles: dict[int, float]
    values: Floats


class Calibration(NamedTuple):
    """The URI of the table, its contents, and the document counts of languages that have too few
    for percentiles of their own.
    """

    table: str
    distributions: list[Distribution]
    few: dict[str, int]


SHOWN = (1, 5, 25, 50, 75, 95, 99)


def calibrate(
    config: Config, progress: Progress, run_units: units.RunUnits, *, sample: int
) -> Calibration:
    """Measure about `sample` documents and write RUN/calibration.json.

    `config` has no bounds from percentiles yet (`load(..., calibrated=False)`). Raises Held and
    RunFailed as a run does; ValueError if there is nothing to measure.
    """
    if _is_pending(config):  # otherwise run.json keeps the state of the existing corpus
        execute(config, progress, run_units, last="dedup")
    with lease(config.run.directory):
        parts = _measure_sample(config, progress, run_units, sample)
    with query.connect(parts, {}) as connection:
        table, distributions = _describe(config, connection)
    uri = f"{config.run.directory}/calibration.json"
    write_atomically(uri, percentiles.dump(table))
    # all documents are enough for the only language
    enough = min(MIN_DOCUMENTS, table.documents[percentiles.ALL])
    few = {language: n for language, n in table.documents.items() if n < enough}
    return Calibration(uri, distributions, few)


def changed_since(config: Config) -> list[str]:
    """Settings that select documents and have changed since the table was made that the percentiles
    of this configuration come from; [] for a table of another run, which the user has named.
    """
    calibrated = {key for key, origin in config.origins.items() if origin.endswith(CALIBRATED)}
    if not calibrated or config.run.calibration:
        return []
    table = percentiles.parse(read_bytes(f"{config.run.directory}/calibration.json"))
    changes = changed(table.drawn_by, selection_settings(config))
    return [key for key, _, _ in changes if key not in calibrated]


def _is_pending(config: Config) -> bool:
    """Whether extract or dedup has units to do."""
    phase = plan(config, only=None, first=None)[-1]
    return bool(phase.pending) and phase.name.split()[0] in ("extract", "dedup")


def write_plot(config: Config, distributions: Sequence[Distribution]) -> str:
    """Write RUN/calibration.html: the distributions with the bounds of `config`, which is
    calibrated. Returns its URI.
    """
    charts = [(d, binned({"kept": d.values}, _bound(config, d))) for d in distributions]
    uri = f"{config.run.directory}/calibration.html"
    write_page(uri, "calibration.html.j2", root=config.run.directory, charts=charts, shown=SHOWN)
    return uri


def _bound(config: Config, distribution: Distribution) -> tuple[float, float] | None:
    section, _, rule = distribution.score.partition(".")
    return rules(config.named(section).of(distribution.language))[rule]


def _measure_sample(
    config: Config, progress: Progress, run_units: units.RunUnits, sample: int
) -> dict[str, list[str]]:
    """Parts of the sample: `extracted`, with scores of extract, and `sample`, of documents that
    dedup kept, with scores of refine.
    """
    run = Run(config)
    phases, inputs = run.phases, run.inputs(extend=False)
    for spec in PHASES:
        run.read_phase(spec, inputs)
        if spec.name == "refine":
            break
    kept = phases["dedup keep"].ordered().total("rows_out")
    rows = phases["extract"].ordered().counts().total()
    if not kept:
        raise ValueError(
            f"{run.root}: extract and dedup kept no document, so there is nothing to calibrate with"
        )
    plan = refine.SamplePlan(
        refine_plan(config), min(1.0, sample / kept), min(1.0, sample / rows), config.run.seed
    )
    measuring = [[name, measured_with(config, name)] for name in config.refine.filters]
    drawing = [plan.share, plan.extracted_share, plan.seed]
    key = digest([run.keys["dedup"], refine.VERSION, measuring, config.dedup.line_level, drawing])
    store = Store(f"{run.root}/calibrate/{key}")
    phase = Phase("calibrate", store, phases["refine"].units, store.commits())
    spec = dataclasses.replace(
        SPECS["refine"], work=refine.sample_unit, plan=lambda *_: plan, result=None
    )
    store.list_units(phase.units)
    run_phase(run, spec, phase, progress, run_units)
    commits = phase.ordered()
    return {
        kind: [store.uri(kind, f"{c.unit}.parquet") for c in commits]
        for kind in ("extracted", "sample")
    }


def _describe(
    config: Config, connection: "duckdb.DuckDBPyConnection"
) -> tuple[percentiles.Table, list[Distribution]]:
    documents = _documents(connection)
    # in a run of one language, its documents are all documents
    languages = [
        language
        for language, n in documents.items()
        if language != percentiles.ALL and MIN_DOCUMENTS <= n < documents[percentiles.ALL]
    ]
    names = ("language", *config.extract.filters, *config.refine.filters)
    made_with = {name: measured_with(config, name) for name in names}
    made_with["texts"] = texts_made_with(config)
    table = percentiles.Table(documents, {}, made_with, selection_settings(config))
    distributions = []
    for score, (kind, column) in _columns(config).items():
        for language in (percentiles.ALL, *languages):
            values = _values(connection, kind, column, language)
            if quantiles := percentiles.quantiles(values):
                table.quantiles.setdefault(score, {})[language] = quantiles
                shown = {p: table.value(score, p, language) for p in SHOWN}
                distributions.append(Distribution(score, language, len(values), shown, values))
    return table, distributions


def _columns(config: Config) -> dict[str, tuple[str, str]]:
    """Kind of part and column of each score; those of models first, as they need percentiles."""
    refined = score_columns(config.chain(config.refine.filters))
    extracted = score_columns(config.chain(config.extract.filters))
    return {
        **{name: ("sample", name) for name in refined},
        "language.score": ("extracted", "language_score"),
        "language.line_share": ("extracted", "language_line_share"),
        **{name: ("extracted", name) for name in extracted},
    }


def _documents(connection: "duckdb.DuckDBPyConnection") -> dict[str, int]:
    """Sampled documents, of all languages and of each."""
    sql = """
        SELECT $all, count(*) FROM sample
        UNION ALL
        SELECT language, count(*) FROM sample WHERE language <> '' GROUP BY 1 ORDER BY 1"""
    return dict(connection.execute(sql, {"all": percentiles.ALL}).fetchall())


def _values(
    connection: "duckdb.DuckDBPyConnection", kind: str, column: str, language: str
) -> Floats:
    """The measured values of a column, of one language or of all."""
    name = query.quoted(column, '"')
    sql = f"SELECT {name}::DOUBLE FROM {kind} WHERE {name} IS NOT NULL"
    if language != percentiles.ALL:
        sql += f" AND language = {query.quoted(language)}"
    return np.asarray(query.table(connection, sql)[0].to_numpy(), np.float64)
