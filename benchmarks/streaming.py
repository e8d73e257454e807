"""Would refine, ner and pack be better as one streaming Ray Data plan over document blocks?

    python -m benchmarks.streaming [DATA] [--copies 24] [--ner] [--units-per-block 1 8]

Both sides refine, tokenize and write the same units: the documents of 2,240 real pages that dedup
keeps, each file of them under `--copies` names. "units" is the engine's plan: a phase after the
other, a task for a unit that reads, works and writes. "streaming" passes blocks of documents
between named operators, through the object store: readers, a pool of actors that refine, one that
replaces names, and writers, which tokenize. Its functions are those of the stages.

It is a measurement and no path of the product: its shards are not shuffled over units, and the
writers leave no commits. Last comes what a barrier costs a Common Crawl snapshot: the time of a
phase of equal units on clusters of some sizes, and what it were without waiting for the last ones.
"""

import argparse
import logging
import math
import pickle
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from benchmarks.pages import deal, read_pages
from benchmarks.pipeline import ROOT, Silent
from benchmarks.snapshot import figures, inputs, names_step, snapshot_steps, stored_bytes
from benchmarks.watch import MB, Usage, watched
from filters.pii.ner import Ner
from pipeline.config.load import load
from pipeline.config.sections import Config
from pipeline.engine.cluster import local_settings, start
from pipeline.engine.dispatch import on_ray
from pipeline.engine.units import PhaseWork, in_process
from pipeline.run.execute import Run, execute
from pipeline.run.phase import Phase, PlanContext
from pipeline.run.phases import SPECS, refine_plan
from stages.formats.document import Row, corpus_schema, pii_column
from stages.pack.pack import TRAINING, PackConfig, PackPlan, _write_split
from stages.refine.ner import BATCH, _scrubbed
from stages.refine.refine import RefinePlan, _batches, _kept_copies, _refine, make_judge
from stages.storage.ledger import Commit, Store, Unit

RECIPE = ROOT / "configs" / "quickstart.toml"  # with perplexity, quality and PII
OBJECT_STORE = 1_000_000_000  # bytes, of the streaming side


class Job(NamedTuple):
    """What both sides do, and where each writes."""

    config: Config
    units: Sequence[Unit]
    folder: str


class Done(NamedTuple):
    """Documents that were kept, tokens of the shards, and bytes that operators put in the store."""

    documents: int
    tokens: int
    stored: int = 0


def main() -> None:
    """Print a line per figure, then the ratios."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as scratch:
        job = prepare(Path(scratch), arguments)
        done, usage = watched(by_units, job)
        show("units", done, usage)
        for count in arguments.units_per_block:
            other, streamed = watched(by_blocks, job, count)
            name = f"streaming, {count} units a block"
            show(name, other, streamed)
            assert other.documents == done.documents, "the sides did different work"
            print(
                f"{name} / units: {streamed.cpu / usage.cpu:.2f} of CPU, "
                f"{streamed.wall / usage.wall:.2f} of wall time, "
                f"{streamed.total / usage.total:.2f} of memory",
                flush=True,
            )
    show_barriers()


def prepare(folder: Path, arguments: argparse.Namespace) -> Job:
    """Extract and deduplicate the pages; the units of refine, each under several names."""
    deal(list(read_pages(arguments.data)), folder / "pages", copies=1)
    settings = [f'input.paths=["{folder}/pages/*.warc.gz"]', f"run.directory={folder}/run"]
    # groups small enough for all processors
    settings += ["pack.held_out=0.0", "pack.group_bytes=4000000"]
    settings += [f"ner.enabled={str(arguments.ner).lower()}"]
    config = load(RECIPE, settings)
    execute(config, Silent(), in_process, last="dedup")
    run = Run(config)
    pages = run.inputs(extend=False)
    for name, spec in SPECS.items():
        phase = run.read_phase(spec, pages)
        if name == "refine":
            break
    units = [
        unit._replace(name=f"{unit.name}-{copy:02d}")
        for unit in phase.units
        for copy in range(arguments.copies)
    ]
    return Job(config, units, str(folder))


def show(name: str, done: Done, usage: Usage) -> None:
    """The figures of a side, Ray's own processes included, its start not."""
    print(f"{name}: {usage.cpu:.1f} s of CPU, {usage.wall:.1f} s wall")
    print(f"{name}: {done.documents:,} documents kept, {done.tokens:,} tokens")
    print(f"{name}: {usage.total / MB:,.0f} MB at most, all processes together")
    print(
        f"{name}: {done.stored / MB:,.0f} MB through the object store, "
        f"{done.stored / done.documents:,.0f} bytes a document",
        flush=True,
    )


def show_barriers() -> None:
    """Seconds of the phases of a snapshot, by arithmetic from costs.json and cost_inputs.toml."""
    measured, given = figures(), inputs()
    corpus = stored_bytes(measured, given).corpus_per_document * given.documents
    files, groups = int(given.snapshot["files"]), math.ceil(corpus / PackConfig().group_bytes)
    *_, refined, packed = snapshot_steps(measured, given, "web_models")
    steps = {"refine": (refined, files), "names": (names_step(measured, given), files)}
    for nodes in (100, 1000, 5000):
        processors = int(nodes * given.prices["node_processors"])
        for name, (step, units) in (steps | {"pack": (packed, groups)}).items():
            seconds = step.core_hours * 3600 / units
            wall, even = math.ceil(units / processors) * seconds, units * seconds / processors
            label = f"{nodes:,} nodes, {name}: {units:,} units of {seconds:.1f} s"
            print(f"{label}: {wall:,.0f} s; {even:,.0f} s if none waits")


# --- units of each phase --------------------------------------------------------------------------


def by_units(mark: Callable[[], None], job: Job) -> Done:
    """The phases one after the other, as in a run."""
    _start_ray(mark, local_settings(dashboard=False)["object_store_memory"])
    phases: dict[str, Phase] = {}
    for name in ("refine", "refine ner", "pack"):
        spec = SPECS[name]
        phase = Phase(name, Store(f"{job.folder}/units/{name}", spec.result))
        listed = spec.list_units(PlanContext(job.config, (), phases, phase)) if phases else None
        phase.units = listed.units if listed else job.units
        phases[name] = phase
        if not phase.units:
            continue
        work = PhaseWork(spec.work, spec.plan(job.config, {}), phase.store, 3, "benchmark")
        for outcome in on_ray()(name, work, phase.units, spec.resources(job.config)):
            assert outcome.commit is not None, outcome.error
            phase.add(outcome.commit)
    packed = list(phases["pack"].ordered())
    return Done(sum(c.rows_in for c in packed), sum(c.result.tokens for c in packed))


# --- one plan over blocks -------------------------------------------------------------------------


def by_blocks(mark: Callable[[], None], job: Job, units_per_block: int) -> Done:
    """All operators at once. Their shares of a processor let them run together on two."""
    _start_ray(mark, OBJECT_STORE)
    import ray.data

    plan = refine_plan(job.config)
    pool: Any = ray.data.ActorPoolStrategy(size=2)
    arrow: Any = {"batch_size": None, "batch_format": "pyarrow"}
    groups = [job.units[n : n + units_per_block] for n in range(0, len(job.units), units_per_block)]
    rows = [{"units": pickle.dumps(group)} for group in groups]
    data = ray.data.from_items(rows, override_num_blocks=len(rows))
    data = data.map_batches(read, batch_size=1, num_cpus=0.2)
    data = data.map_batches(Refine, fn_constructor_args=[plan], compute=pool, num_cpus=0.4, **arrow)
    if job.config.ner.enabled:
        data = data.map_batches(
            ReplaceNames, fn_constructor_args=[job.config.ner], compute=pool, num_cpus=0.4, **arrow
        )
    data = data.map_batches(write, fn_args=[job], num_cpus=0.3, **arrow)
    documents = tokens = 0
    for batch in data.iter_batches(batch_size=None):
        documents += int(batch["documents"].sum())
        tokens += int(batch["tokens"].sum())
    return Done(documents, tokens, bytes_in_store(data.stats()))


def read(batch: dict[str, Any]) -> pa.Table:
    """The documents of some units that dedup kept."""
    parts = []
    for unit in pickle.loads(batch["units"][0]):
        documents = _kept_copies(unit.task.documents, unit.task.keep)
        names = pa.repeat(unit.name, documents.num_rows)
        parts.append(documents.append_column("unit", names))
    return pa.concat_tables(parts)


class Refine:
    """Measures, judges and scrubs the documents of a block, in its killable child."""

    def __init__(self, plan: RefinePlan) -> None:
        self.plan = plan

    def __call__(self, documents: pa.Table) -> pa.Table:
        plan, child = self.plan, self.plan.child(make_judge)
        rows = [
            _refine(row, plan, child) for batch in _batches(documents, None, plan) for row in batch
        ]
        unit = documents.schema.get_field_index("unit")
        schema = corpus_schema(documents.schema.remove(unit), plan.filters, plan.entities)
        return pa.Table.from_pylist(rows, schema=schema.append(pa.field("unit", pa.string())))


class ReplaceNames:
    """Replaces the names in the documents of a block that were kept."""

    def __init__(self, ner: Ner) -> None:
        self.ner = ner

    def __call__(self, documents: pa.Table) -> pa.Table:
        counts = {pii_column(entity): pa.int32() for entity in self.ner.entities}
        rows: list[Row] = []
        for batch in documents.to_batches(max_chunksize=BATCH):
            kept = [row for row in batch.to_pylist() if row["rejected_by"] is None]
            rows += _scrubbed(kept, self.ner)
            rows += [row for row in batch.to_pylist() if row["rejected_by"] is not None]
        schema = pa.schema([*documents.schema, *pa.schema(counts)])
        return pa.Table.from_pylist(rows, schema=schema)


def write(documents: pa.Table, job: Job) -> pa.Table:
    """Write the corpus and rejected parts and the shards of the units in a block."""
    corpus, packed = Store(f"{job.folder}/streaming"), Store(f"{job.folder}/streaming/pack")
    plan = PackPlan(job.config.pack, job.config.run.seed)
    figures = {"documents": 0, "tokens": 0}
    for name in pc.unique(documents["unit"]).to_pylist():
        commit, shards = Commit(name, ""), Commit(name, "")
        rows = documents.filter(pc.equal(documents["unit"], name)).drop_columns(["unit"])
        kept = pc.is_null(rows["rejected_by"])
        corpus.write_part(rows.filter(kept), "corpus", name, commit=commit)
        corpus.write_part(rows.filter(pc.invert(kept)), "rejected", name, commit=commit)
        chosen = rows.filter(kept).select(["doc_id", "url", "text"])
        written = _write_split(chosen, TRAINING, plan, shards, packed)
        figures["documents"] += chosen.num_rows
        figures["tokens"] += written.tokens
    return pa.table({key: [value] for key, value in figures.items()})


def bytes_in_store(stats: str) -> int:
    """Bytes of the blocks that all operators but the last put out, by Ray Data's statistics."""
    totals = re.findall(r"Output size bytes per block: .*?, (\d+) total", stats)
    return sum(map(int, totals[:-1]))


def _start_ray(mark: Callable[[], None], object_store_memory: int) -> None:
    """Start Ray as a run does, and count from then on."""
    import ray

    settings = local_settings(dashboard=False) | {"object_store_memory": object_store_memory}
    ray.init(address="local", log_to_driver=False, logging_level=logging.ERROR, **settings)
    start(None)
    mark()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", nargs="?", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--copies", type=int, default=24, help="of each unit")
    parser.add_argument("--ner", action="store_true", help="replace names too")
    parser.add_argument("--units-per-block", type=int, nargs="+", default=[1, 8])
    return parser.parse_args()


if __name__ == "__main__":
    # as a module: Ray's workers cannot load what belongs to a spawned process's __main__
    from benchmarks.streaming import main as run_main

    run_main()
