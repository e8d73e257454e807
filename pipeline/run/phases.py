"""The phases of a run, each declared once. To add a phase, add an entry to PHASES."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config.sections import Config
from pipeline.engine.units import Resources, Work
from pipeline.run import dedup_plan
from pipeline.run.phase import PhasePlan, PlanContext
from stages.dedup import cluster, keep, keys, lines, match
from stages.extract import extract
from stages.pack import pack
from stages.refine import ner, refine
from stages.storage.digests import digest
from stages.storage.ledger import Store, Unit

STAGES = ("extract", "dedup", "refine", "pack")


@dataclass(frozen=True)
class PhaseSpec:
    """One phase: what its units are, what does them, and how it is stored and shown.

    `name` is the stage, and the part of it where a stage has several phases. `plan` makes what each
    worker is given of the configuration, and of the `file_digests` as the run began. `result` is
    the type of the commits' results. `key` names the stage key of the phase's folder, the stage's
    own by default.
    """

    name: str
    work: Work
    list_units: Callable[[PlanContext], PhasePlan]
    plan: Callable[[Config, Mapping[str, str]], Any]
    result: type | None = None
    key: str = ""
    # a unit is an input. Some may fail, up to run.max_failed_share: a missing part of documents or
    # corpus is a known loss, but missing edges would let duplicates through unseen
    by_input: bool = False
    # absent from most runs
    optional: bool = False
    # its counts are the stage's rows in the funnel
    in_funnel: bool = False
    # its units are listed again after each round, until none is new
    in_rounds: bool = False
    # outputs are named by input and not by unit, so that another unit's may take their place
    named_by_input: bool = False
    # its workers keep a large model, which those of other phases must not have
    own_workers: bool = False

    @property
    def stage(self) -> str:
        """The stage that the phase belongs to."""
        return self.name.partition(" ")[0]

    def max_failed_share(self, config: Config) -> float:
        """The share of the phase's units that may fail."""
        return config.run.max_failed_share if self.by_input else 0.0

    def resources(self, config: Config) -> Resources:
        """What a worker needs, by the stage's section of the configuration."""
        section = getattr(config, self.stage)
        return Resources(section.num_cpus, section.memory, section.parallelism, self.own_workers)

    def store(self, root: str, stage_keys: dict[str, str]) -> Store:
        """The phase's store under these keys: RUN/<stage>/<key>, and a folder in it for a part."""
        stage, _, part = self.name.partition(" ")
        folder = [root, stage, stage_keys[self.key or stage], part]
        return Store("/".join(filter(None, folder)), self.result)


# --- plans ----------------------------------------------------------------------------------------


def extract_plan(config: Config) -> extract.ExtractPlan:
    return extract.ExtractPlan(
        config=config.extract,
        input=config.input,
        fetch=config.fetch,
        url_policy=config.url_policy,
        opt_out=config.opt_out,
        language=config.named("language"),
        license=config.license,
        filters=config.chain(config.extract.filters),
        signature=config.dedup.signature,
        seed=config.run.seed,
    )


def refine_plan(config: Config) -> refine.RefinePlan:
    filters = config.chain(config.refine.filters)
    return refine.RefinePlan(
        config.refine, filters, config.pii, config.run.seed, config.dedup.line_level
    )


# --- units ----------------------------------------------------------------------------------------


def extract_units(context: PlanContext) -> PhasePlan:
    """One unit per input, in order of numbers: ids ascend from unit to unit."""
    stores = context.reusable_stores
    return PhasePlan(
        [
            Unit(
                i.unit,
                i.identity,
                extract.ExtractTask(i.path, i.ordinal, stores, i.byte_range),
                i.bytes or 0,
            )
            for i in sorted(context.inputs)
        ]
    )


def refine_units(context: PlanContext) -> PhasePlan:
    """One unit per documents part that dedup has decided on."""
    before = context.before
    keep, cuts = before["dedup keep"], before["dedup cuts"]
    keep_tables, cut_tables = keep.outputs(), cuts.outputs()
    units = []
    for part, commit in before["extract"].parts():
        decided = keep_tables.get(f"keep/{part.unit}.parquet")
        if decided is None:
            continue
        cut = cut_tables.get(f"cuts/{part.unit}.parquet")
        task = refine.RefineTask(
            part.uri, keep.store.uri(decided.path), cuts.store.uri(cut.path) if cut else None
        )
        identity = digest([commit.digest, decided.sha256, cut.sha256 if cut else None])
        units.append(Unit(part.unit, identity, task, commit.output().bytes))
    return PhasePlan(units)


def ner_units(context: PlanContext) -> PhasePlan:
    """One unit per corpus part of refine, if there is entity recognition at all."""
    if not context.config.ner.enabled:
        return PhasePlan()
    refined = context.before["refine"]
    outputs = ((w.unit, w.output("corpus")) for w in refined.written())
    return PhasePlan(
        [
            Unit(name, o.sha256, ner.NerTask(refined.store.uri(o.path)), o.bytes)
            for name, o in outputs
        ]
    )


def pack_units(context: PlanContext) -> PhasePlan:
    """One unit per group of corpus parts, drawn by the run's seed."""
    config = context.config
    source = context.before["refine ner" if config.ner.enabled else "refine"]
    outputs = ((w.unit, w.output("corpus")) for w in source.written() if w.rows_out)
    parts = [
        pack.CorpusPart(unit, source.store.uri(o.path), o.bytes, o.sha256) for unit, o in outputs
    ]
    groups = pack.group_parts(parts, group_bytes=config.pack.group_bytes, seed=config.run.seed)
    return PhasePlan(
        [
            Unit(
                f"{number:05d}",
                digest([part.digest for part in group]),
                pack.PackTask(tuple(group)),
                sum(part.bytes for part in group),
            )
            for number, group in enumerate(groups)
        ]
    )


# --- the table ------------------------------------------------------------------------------------


def _dedup(
    name: str, work: Work, list_units: Callable[[PlanContext], PhasePlan], **fields: Any
) -> PhaseSpec:
    """A phase of dedup, whose workers need only its own section."""
    return PhaseSpec(f"dedup {name}", work, list_units, lambda config, _: config.dedup, **fields)


PHASES: tuple[PhaseSpec, ...] = (
    PhaseSpec(
        "extract",
        extract.extract_unit,
        extract_units,
        lambda config, _: extract_plan(config),
        extract.ExtractResult,
        by_input=True,
        in_funnel=True,
    ),
    # the graph of copies does not depend on which copy stays: its key has no keep rule
    _dedup("sort", keys.sort_unit, dedup_plan.sort_units, result=keys.KeysResult, key="graph"),
    _dedup(
        "match",
        match.match_unit,
        dedup_plan.match_units,
        result=match.MatchResult,
        key="graph",
    ),
    _dedup(
        "star",
        cluster.star_unit,
        dedup_plan.star_units,
        key="graph",
        optional=True,
        in_rounds=True,
    ),
    _dedup("cluster", cluster.cluster_unit, dedup_plan.cluster_units, key="graph"),
    _dedup("rank", keep.rank_unit, dedup_plan.rank_units),
    _dedup(
        "elect",
        keep.elect_unit,
        dedup_plan.elect_units,
        result=keep.ElectResult,
    ),
    _dedup(
        "keep",
        keep.keep_unit,
        dedup_plan.keep_units,
        result=keep.KeepResult,
        in_funnel=True,
        named_by_input=True,
    ),
    _dedup(
        "alarm",
        keep.alarm_unit,
        dedup_plan.alarm_units,
        result=keep.AlarmResult,
    ),
    _dedup("index", keys.index_unit, dedup_plan.index_units, result=keys.KeysResult, optional=True),
    _dedup("lines", lines.lines_unit, dedup_plan.lines_units, optional=True),
    _dedup("repeats", lines.repeats_unit, dedup_plan.repeats_units, optional=True),
    _dedup(
        "cuts",
        lines.cuts_unit,
        dedup_plan.cuts_units,
        result=lines.CutsResult,
        optional=True,
        named_by_input=True,
    ),
    PhaseSpec(
        "refine",
        refine.refine_unit,
        refine_units,
        lambda config, _: refine_plan(config),
        refine.RefineResult,
        by_input=True,
        in_funnel=True,
    ),
    PhaseSpec(
        "refine ner",
        ner.ner_unit,
        ner_units,
        lambda config, _: config.ner,
        ner.NerResult,
        key="ner",
        by_input=True,
        optional=True,
        own_workers=True,
    ),
    PhaseSpec(
        "pack",
        pack.pack_unit,
        pack_units,
        lambda config, files: pack.PackPlan(
            config.pack, config.run.seed, files.get("pack.tokenizer", "")
        ),
        pack.PackResult,
        in_funnel=True,
    ),
)
SPECS: dict[str, PhaseSpec] = {spec.name: spec for spec in PHASES}
# the phase whose counts are a stage's rows in the funnel
FUNNEL_PHASES: dict[str, str] = {spec.stage: spec.name for spec in PHASES if spec.in_funnel}
