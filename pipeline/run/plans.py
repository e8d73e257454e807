"""What workers need of a configuration, and the units of extract, refine and pack."""

from pipeline.config.sections import Config
from pipeline.run.phase import PhasePlan, PlanContext
from stages.extract.extract import ExtractPlan, ExtractTask
from stages.pack.pack import CorpusPart, PackPlan, PackTask, group_parts
from stages.refine.ner import NerPlan, NerTask
from stages.refine.refine import RefinePlan, RefineTask
from stages.storage.digests import digest
from stages.storage.ledger import Unit

# --- plans ----------------------------------------------------------------------------------------


def extract_plan(config: Config) -> ExtractPlan:
    return ExtractPlan(
        config=config.extract,
        input=config.input,
        fetch=config.fetch,
        url_policy=config.url_policy,
        opt_out=config.opt_out,
        language=config.named("language"),
        filters=config.chain(config.extract.filters),
        signature=config.dedup.signature,
        seed=config.run.seed,
    )


def refine_plan(config: Config) -> RefinePlan:
    filters = config.chain(config.refine.filters)
    return RefinePlan(config.refine, filters, config.pii, config.run.seed, config.dedup.line_level)


def ner_plan(config: Config) -> NerPlan:
    return NerPlan(config.ner)


def pack_plan(config: Config) -> PackPlan:
    return PackPlan(config.pack, config.run.seed)


# --- units ----------------------------------------------------------------------------------------


def extract_units(context: PlanContext) -> PhasePlan:
    """One unit per input, in order of numbers: ids ascend from unit to unit."""
    stores = context.reusable_stores
    return PhasePlan(
        [
            Unit(i.unit, i.fingerprint, ExtractTask(i.path, i.ordinal, stores), i.bytes or 0)
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
        task = RefineTask(
            part.uri, keep.store.uri(decided.path), cuts.store.uri(cut.path) if cut else None
        )
        identity = digest([commit.digest, decided.sha256, cut.sha256 if cut else None])
        units.append(Unit(part.unit, identity, task, commit.output().bytes))
    return PhasePlan(units)


def ner_units(context: PlanContext) -> PhasePlan:
    """One unit per corpus part of refine, if there is entity recognition at all."""
    if not context.config.ner.enabled:
        return PhasePlan([])
    refined = context.before["refine"]
    outputs = [(c.unit, c.output("corpus")) for c in refined.ordered()]
    return PhasePlan(
        [Unit(name, o.sha256, NerTask(refined.store.uri(o.path)), o.bytes) for name, o in outputs]
    )


def pack_units(context: PlanContext) -> PhasePlan:
    """One unit per group of corpus parts, drawn by the run's seed."""
    config = context.config
    source = context.before["refine ner" if config.ner.enabled else "refine"]
    parts = []
    for commit in source.ordered():
        output = commit.output("corpus")
        if commit.rows_out:
            uri = source.store.uri(output.path)
            parts.append(CorpusPart(commit.unit, uri, output.bytes, output.sha256))
    groups = group_parts(parts, group_bytes=config.pack.group_bytes, seed=config.run.seed)
    return PhasePlan(
        [
            Unit(
                f"{number:05d}",
                digest([part.digest for part in group]),
                PackTask(tuple(group)),
                sum(part.bytes for part in group),
            )
            for number, group in enumerate(groups)
        ]
    )
