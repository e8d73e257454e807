"""The phases of a run, each declared once. To add a phase, add an entry to PHASES."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.config.sections import Config
from pipeline.engine.units import Resources, Work
from pipeline.run import dedup_plan, plans
from pipeline.run.phase import PhasePlan, PlanContext
from stages.dedup import cluster, keep, keys, lines, match
from stages.extract import extract
from stages.pack import pack
from stages.refine import ner, refine
from stages.storage.ledger import Store

Stage = Literal["extract", "dedup", "refine", "pack"]
STAGES: tuple[Stage, ...] = ("extract", "dedup", "refine", "pack")


@dataclass(frozen=True)
class PhaseSpec:
    """One phase: what its units are, what does them, and how it is stored and shown.

    `name` is the stage, and the part of it where a stage has several phases. `plan` makes what each
    worker is given of the configuration. `result` is the type of the commits' results. `key` names
    the stage key of the phase's folder, the stage's own by default. `unit` says what one unit is.
    """

    name: str
    work: Work
    list_units: Callable[[PlanContext], PhasePlan]
    plan: Callable[[Config], Any]
    result: type | None = None
    key: str = ""
    unit: Literal["input", "group", "partition", "graph", "corpus group"] = "group"
    # absent from most runs
    optional: bool = False
    # its counts are the stage's rows in the funnel
    in_funnel: bool = False
    # failed units are bearable, up to run.max_failed_share: a missing part of documents or corpus
    # is a known loss, but missing edges would let duplicates through unseen
    may_fail: bool = False
    # its units are listed again after each round, until none is new
    in_rounds: bool = False
    # outputs are named by input and not by unit, so that another unit's may take their place
    named_by_input: bool = False
    # its workers are a pool that keeps a large model
    actors: bool = False

    @property
    def stage(self) -> Stage:
        """The stage that the phase belongs to."""
        return next(stage for stage in STAGES if stage == self.name.split()[0])

    def max_failed_share(self, config: Config) -> float:
        """The share of the phase's units that may fail."""
        return config.run.max_failed_share if self.may_fail else 0.0

    def resources(self, config: Config) -> Resources:
        """What a worker needs, by the stage's section of the configuration."""
        section = getattr(config, self.stage)
        return Resources(section.num_cpus, section.memory, section.parallelism, self.actors)

    def folder(self, root: str, stage_keys: dict[str, str]) -> str:
        """Where the phase keeps its units: RUN/<stage>/<key>, and a folder in it for a part."""
        part = self.name.removeprefix(self.stage).strip()
        key = stage_keys[self.key or self.stage]
        return "/".join(filter(None, [root, self.stage, key, part]))

    def store(self, root: str, stage_keys: dict[str, str]) -> Store:
        """The phase's store under these keys."""
        return Store(self.folder(root, stage_keys), self.result)


def _dedup(
    name: str, work: Work, list_units: Callable[[PlanContext], PhasePlan], **fields: Any
) -> PhaseSpec:
    """A phase of dedup, whose workers need only its own section."""
    return PhaseSpec(f"dedup {name}", work, list_units, lambda config: config.dedup, **fields)


PHASES: tuple[PhaseSpec, ...] = (
    PhaseSpec(
        "extract",
        extract.extract_unit,
        plans.extract_units,
        plans.extract_plan,
        extract.ExtractResult,
        unit="input",
        in_funnel=True,
        may_fail=True,
    ),
    # the graph of copies does not depend on which copy stays: its key has no keep rule
    _dedup("sort", keys.sort_unit, dedup_plan.sort_units, result=keys.KeysResult, key="graph"),
    _dedup(
        "match",
        match.match_unit,
        dedup_plan.match_units,
        result=match.MatchResult,
        key="graph",
        unit="partition",
    ),
    _dedup(
        "star",
        cluster.star_unit,
        dedup_plan.star_units,
        key="graph",
        unit="partition",
        optional=True,
        in_rounds=True,
    ),
    _dedup("cluster", cluster.cluster_unit, dedup_plan.cluster_units, key="graph", unit="graph"),
    _dedup("rank", keep.rank_unit, dedup_plan.rank_units),
    _dedup(
        "elect",
        keep.elect_unit,
        dedup_plan.elect_units,
        result=keep.ElectResult,
        unit="partition",
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
        unit="partition",
    ),
    _dedup("index", keys.index_unit, dedup_plan.index_units, result=keys.KeysResult, optional=True),
    _dedup("lines", lines.lines_unit, dedup_plan.lines_units, optional=True),
    _dedup(
        "repeats", lines.repeats_unit, dedup_plan.repeats_units, unit="partition", optional=True
    ),
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
        plans.refine_units,
        plans.refine_plan,
        refine.RefineResult,
        unit="input",
        in_funnel=True,
        may_fail=True,
    ),
    PhaseSpec(
        "refine ner",
        ner.ner_unit,
        plans.ner_units,
        plans.ner_plan,
        ner.NerResult,
        key="ner",
        unit="input",
        optional=True,
        may_fail=True,
        actors=True,
    ),
    PhaseSpec(
        "pack",
        pack.pack_unit,
        plans.pack_units,
        plans.pack_plan,
        pack.PackResult,
        unit="corpus group",
        in_funnel=True,
    ),
)
SPECS: dict[str, PhaseSpec] = {spec.name: spec for spec in PHASES}
# the phase whose counts are a stage's rows in the funnel
FUNNEL_PHASES: dict[Stage, str] = {spec.stage: spec.name for spec in PHASES if spec.in_funnel}
