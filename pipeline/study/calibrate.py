"""`gristmill calibrate`: the scores of a sample of the run's own documents, as the quantiles that
bounds can name.

The run is brought through dedup, whose work it needs anyway. Then every filter of refine measures a
sample of the documents that dedup kept, whatever the others say of them; the scores of extract are
read from its parts. The table lands beside the run's state, where the next `gristmill run` finds
it.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from filters import rules
from pipeline.config import percentiles
from pipeline.config.calibration import CALIBRATED
from pipeline.config.digests import measured_with, selection_settings, texts_made_with
from pipeline.config.sections import Config, general_key
from pipeline.engine import units
from pipeline.engine.lease import lease
from pipeline.report.charts import Floats, binned
from pipeline.report.page import write_page
from pipeline.run.execute import Progress, Run, check_failures, execute, plan, run_phase
from pipeline.run.phase import Phase
from pipeline.run.phases import PHASES, SPECS
from pipeline.run.plans import refine_plan
from stages.formats.document import score_columns
from stages.refine import refine
from stages.storage.digests import digest
from stages.storage.files import read_bytes, write_atomically
from stages.storage.ledger import Store
from stages.storage.parts import read_columns

# below this a percentile is noise: such languages are cut by the distribution of all documents
MIN_DOCUMENTS = 100


class Distribution(NamedTuple):
    """One score over the sampled documents of a language ("" for all)."""

    score: str
    language: str
    documents: int
    percentiles: dict[int, float]
    values: Floats


class Calibration(NamedTuple):
    """Where the table lies, what it says, and documents of languages that are too few for
    percentiles of their own.
    """

    table: str
    distributions: list[Distribution]
    few: dict[str, int]


SHOWN = (1, 5, 25, 50, 75, 95, 99)


def calibrate(
    config: Config, progress: Progress, run_units: units.RunUnits, *, sample: int
) -> Calibration:
    """Measure about `sample` documents and write RUN/calibration.json.

    `config` is one whose percentiles bound nothing yet (`load(..., calibrated=False)`). Held,
    RunFailed as of a run; ValueError when there is nothing to measure.
    """
    if _is_pending(config):  # else run.json goes on telling of the corpus that is there
        execute(config, progress, run_units, last="dedup")
    with lease(config.run.directory):
        columns = _sampled(config, progress, run_units, sample)
    table, distributions = _described(config, columns)
    uri = f"{config.run.directory}/calibration.json"
    write_atomically(uri, percentiles.dump(table))
    enough = min(
        MIN_DOCUMENTS, table.documents[percentiles.ALL]
    )  # all are enough for the only language
    return Calibration(
        uri, distributions, {language: n for language, n in table.documents.items() if n < enough}
    )


def changed_since(config: Config) -> list[str]:
    """Keys that choose documents and are set otherwise than when the table was made that this
    configuration's percentiles come from; [] for a table of another run, which its user named.
    """
    taken = {key for key, origin in config.origins.items() if origin.endswith(CALIBRATED)}
    if not taken or config.run.calibration:
        return []
    table = percentiles.parse(read_bytes(f"{config.run.directory}/calibration.json"))
    before, now = table.drawn_by, selection_settings(config)
    # what is not said for a language is as for all
    values = {
        key: [said.get(key, said.get(general_key(key))) for said in (before, now)]
        for key in (before | now if before else {})
    }
    return [
        key
        for key, (then, today) in values.items()
        if key not in taken and None not in (then, today) and then != today
    ]


def _is_pending(config: Config) -> bool:
    """Whether extract or dedup has anything to do."""
    reached = plan(config, only=None, first=None)[-1]
    return bool(reached.pending) and reached.name.split()[0] in ("extract", "dedup")


def write_plot(config: Config, distributions: Sequence[Distribution]) -> str:
    """Write RUN/calibration.html, the distributions with the bounds of `config`, which is
    calibrated; returns where it lies.
    """
    charts = [(d, binned({"kept": d.values}, _bound(config, d))) for d in distributions]
    uri = f"{config.run.directory}/calibration.html"
    write_page(uri, "calibration.html.j2", root=config.run.directory, charts=charts, shown=SHOWN)
    return uri


def _bound(config: Config, distribution: Distribution) -> tuple[float, float] | None:
    section, _, rule = distribution.score.partition(".")
    return rules(config.named(section).of(distribution.language))[rule]


def _sampled(
    config: Config, progress: Progress, run_units: units.RunUnits, sample: int
) -> dict[str, pa.Table]:
    """The sampled rows with their scores: those that extract measured, and those that dedup kept,
    with refine's scores.
    """
    run = Run(config)
    phases, inputs = run.phases, run.inputs(extend=False)
    for spec in PHASES:
        run.read_phase(spec, inputs)
        if spec.name == "refine":
            break
    kept = sum(c.rows_out for c in phases["dedup keep"].ordered())
    rows = sum(sum(c.counts.values()) for c in phases["extract"].ordered())
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
        SPECS["refine"], work=refine.sample_unit, plan=lambda _: plan, result=None
    )
    store.list_units(phase.units)
    errors = run_phase(run, spec, phase, progress, run_units)
    check_failures(phase, errors, config.run.max_failed_share, config)
    commits = phase.ordered()
    return {
        kind: pa.concat_tables(
            [read_columns(store.uri(kind, f"{c.unit}.parquet"), None) for c in commits],
            promote_options="default",
        )
        for kind in ("extracted", "sample")
    }


def _described(
    config: Config, columns: dict[str, pa.Table]
) -> tuple[percentiles.Table, list[Distribution]]:
    # the models' scores first: they are what percentiles are for
    sources = {
        name: ("sample", name) for name in score_columns(config.chain(config.refine.filters))
    }
    sources |= {
        "language.score": ("extracted", "language_score"),
        "language.line_share": ("extracted", "language_line_share"),
    }
    sources |= {
        name: ("extracted", name) for name in score_columns(config.chain(config.extract.filters))
    }
    sampled = _documents(columns["sample"])
    # of a run in one language the documents of that language and all documents are the same thing
    apart = [
        lang
        for lang, n in sampled.items()
        if lang and MIN_DOCUMENTS <= n < sampled[percentiles.ALL]
    ]
    names = ("language", *config.extract.filters, *config.refine.filters)
    made_with = {name: measured_with(config, name) for name in names} | {
        "texts": texts_made_with(config)
    }
    table = percentiles.Table(sampled, {}, made_with, selection_settings(config))
    distributions = []
    for score, (kind, column) in sources.items():
        for language, values in _by_language(columns[kind], column, [percentiles.ALL, *apart]):
            found = percentiles.quantiles(values)
            if found:
                table.quantiles.setdefault(score, {})[language] = found
                shown = {p: table.value(score, p, language) for p in SHOWN}
                distributions.append(Distribution(score, language, len(values), shown, values))
    return table, distributions


def _documents(rows: pa.Table) -> dict[str, int]:
    """Sampled documents, of all languages and of each."""
    counted = {c["values"]: c["counts"] for c in pc.value_counts(rows["language"]).to_pylist()}
    return {percentiles.ALL: rows.num_rows} | {
        language: n for language, n in sorted(counted.items(), key=str) if language
    }


def _by_language(
    rows: pa.Table, column: str, languages: Sequence[str]
) -> Iterator[tuple[str, Floats]]:
    measured = rows.filter(pc.is_valid(rows[column]))
    for language in languages:
        chosen = (
            measured
            if language == percentiles.ALL
            else measured.filter(pc.equal(measured["language"], language))
        )
        yield language, chosen[column].to_numpy().astype(np.float64)
