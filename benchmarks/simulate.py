"""A whole Common Crawl snapshot on clusters that we do not have: how long, what is lost, what breaks first.

    python -m benchmarks.simulate [--nodes 100 1000 5000] [--cut NAME ...] [--set preemptions_per_hour=0.1 ...]
        [--seed 0] [--files 90000] [--plot FOLDER]
    python -m benchmarks.simulate --replay configs/web.toml run.directory=RUN ...

The run is real: `execute` lists inputs (empty files of the right size), plans every phase, writes and reads
a commit per unit. Its `RunUnits` is a model instead of Ray (benchmarks.simulate_cluster), for all sizes of
cluster at once: what the units are does not depend on the cluster. What a unit takes comes from
benchmarks/costs.json and cost_inputs.toml by benchmarks.snapshot. Publication is not simulated.

Replaces benchmarks/simulation.json when the snapshot is whole and nothing is set.
"""

import argparse
import dataclasses
import datetime
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.pipeline import Silent
from benchmarks.simulate_cluster import NO_FAULTS, Cloud, Cluster, Load, Settled
from benchmarks.simulate_report import plot_at_work, plot_makespan, print_report, report
from benchmarks.simulate_units import Requests, Snapshot
from benchmarks.snapshot import figures, inputs
from benchmarks.watch import peak_bytes
from pipeline.config.load import load
from pipeline.config.sections import Config
from pipeline.engine.dispatch import order_units
from pipeline.engine.units import PhaseWork, Resources, UnitOutcome
from pipeline.run.execute import Run, execute
from pipeline.run.phases import PHASES
from stages.storage.ledger import Commit, Failure, Unit

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("simulation.json")


# --- the engine's place ---------------------------------------------------------------------------


class SimulatedEngine:
    """A RunUnits. Every cluster runs every phase; outcomes come in the order of the first cluster.

    `planning` is the driver's CPU before each phase, in seconds, on this machine and a local disk;
    `modelling` what the model takes in its place, `committing` of it for the workers' commits, which are
    written if there is a `ledger`.
    """

    def __init__(self, clusters: Sequence[Cluster], snapshot: Snapshot, *, ledger: bool) -> None:
        self.clusters, self.snapshot, self.ledger = clusters, snapshot, ledger
        self.planning: dict[str, float] = {}
        self.requests: dict[str, Requests] = {}
        self.units: dict[str, int] = {}
        self.committing = self.modelling = 0.0
        self._mark = time.process_time()

    def __call__(
        self, name: str, work: PhaseWork, units: Sequence[Unit], resources: Resources
    ) -> Iterator[UnitOutcome]:
        planning = time.process_time() - self._mark
        self.planning[name] = self.planning.get(name, 0.0) + planning
        ordered = order_units(units)
        start = time.process_time()
        works = self.snapshot.work(name, ordered, work.store)
        self.requests[name] = Requests(
            *(sum(kind) for kind in zip(*(w.requests for w in works), strict=True))
        )
        self.units[name] = len(units)
        for cluster in self.clusters:
            cluster.clock += planning
            cluster.run(
                name,
                ordered,
                [w.load for w in works],
                resources,
                patience=work.patience,
                attempts=work.attempts,
                load_seconds=_load_seconds(self.snapshot.measured, name),
            )
        self.modelling += time.process_time() - start
        start = time.process_time()
        outcomes = [
            self._settle(ordered[s.unit], works[s.unit].commit, s, work)
            for s in self.clusters[0].traces[-1].settled
        ]
        self.committing += time.process_time() - start
        self.modelling += time.process_time() - start
        self._mark = time.process_time()
        yield from outcomes

    def _settle(self, unit: Unit, commit: Commit, settled: Settled, work: PhaseWork) -> UnitOutcome:
        if settled.failed:
            error = f"its worker died {work.attempts} times"
            work.store.fail(Failure(unit.name, error, quarantined=unit.fingerprint))
            return UnitOutcome(unit.name, None, error)
        commit.seconds = commit.cpu_seconds = round(settled.seconds, 3)
        if self.ledger:
            work.store.commit(commit)
        return UnitOutcome(unit.name, commit)


def _load_seconds(measured: dict[str, Any], phase: str) -> float:
    seconds = measured["loads"]["seconds"]
    return float(seconds.get(phase, seconds["pack"]))


# --- cases ----------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A run of the snapshot on named clusters."""

    engine: SimulatedEngine
    config: Config
    driver_seconds: float
    driver_bytes: int


def simulate(
    clusters: Sequence[Cluster],
    folder: Path,
    *,
    files: int,
    seed: int = 0,
    overrides: Sequence[str] = (),
    ledger: bool = True,
) -> Case:
    """Run a snapshot of some files; without a `ledger`, commits are kept in memory alone."""
    given, measured = inputs(), figures()
    given = given.scaled(files / given.snapshot["files"])
    paths = _make_inputs(folder / "warc", files, int(given.snapshot["gzip_bytes_per_file"]))
    config = load(
        ROOT / "configs" / "web.toml",
        [f"input.paths=['{paths}']", f"run.directory={folder}/run", *overrides],
    )
    engine = SimulatedEngine(clusters, Snapshot(measured, given, config, seed=seed), ledger=ledger)
    start = time.process_time()
    execute(config, Silent(), engine)
    spent = time.process_time() - start - engine.modelling
    return Case(engine, config, spent, peak_bytes())


def _make_inputs(folder: Path, count: int, size: int) -> str:
    """Sparse files: listing and planning look at names, sizes and times only."""
    folder.mkdir(parents=True)
    for number in range(count):
        with open(folder / f"{number:06d}.warc.gz", "wb") as file:
            file.truncate(size)
    return f"{folder}/*.warc.gz"


def dispatch_seconds(measured: dict[str, Any]) -> float:
    """The driver's CPU per task, by the plans with most and least units."""
    plans = sorted(measured["dispatch"]["plans"], key=lambda plan: plan["units"])
    first, last = plans[0], plans[-1]
    spent: float = last["driver_seconds"] - first["driver_seconds"]
    return spent / (last["units"] - first["units"])


class Span(NamedTuple):
    """Wall seconds of a phase's units, in a real run and by the model."""

    units: int
    real: float
    model: float


def replay(config: Config, *, cores: int, dispatch: float) -> dict[str, Span]:
    """The phases of a finished run on one machine of `cores`, by the model, from what each unit really
    took: this checks the order, the slots and the driver, not the costs.
    """
    run = Run(config)
    given = run.inputs(extend=False)
    cloud = dataclasses.replace(NO_FAULTS, cores=cores, memory=1 << 50, dispatch_seconds=dispatch)
    cluster, spans = Cluster(1, cloud), {}
    for spec in PHASES:
        phase = run.read_phase(spec, given)
        if not phase.units:
            continue
        ordered = order_units(phase.units)
        by_unit = {commit.unit: commit for commit in phase.commits}
        commits = [by_unit[unit.name] for unit in ordered]
        resources = spec.resources(config)
        trace = cluster.run(spec.name, ordered, [Load(c.seconds) for c in commits], resources)
        begin, end = min(c.finished - c.seconds for c in commits), max(c.finished for c in commits)
        spans[spec.name] = Span(len(ordered), end - begin, trace.end - trace.begin)
    return spans


def print_replay(spans: dict[str, Span]) -> None:
    for name, span in spans.items():
        print(f"{name:13} {span.units:5} units, real {span.real:7.2f} s, model {span.model:7.2f} s")
    real, model = sum(s.real for s in spans.values()), sum(s.model for s in spans.values())
    print(f"all phases: real {real:.1f} s, model {model:.1f} s: {model / real - 1:+.1%}")


# --- command --------------------------------------------------------------------------------------


# how units are cut; the first one writes its commits, which shows what the ledger takes
CUTS: dict[str, tuple[str, ...]] = {
    "whole files": ("input.split_bytes=0",),
    "ranges of 512 MiB": (),
    "ranges, dedup in groups of 100,000": ("dedup.documents_per_unit=100000",),
}
SHOWN = "ranges of 512 MiB"  # by the plot of cores over time


def variants(sizes: Sequence[int], cloud: Cloud) -> dict[str, tuple[int, Cloud]]:
    """The clusters of a case: each size, and the middle one and the largest under other conditions."""
    middle, largest = sorted(sizes)[len(sizes) // 2], max(sizes)
    present = dataclasses.replace(cloud, launch_burst=1e9)
    often = dataclasses.replace(cloud, preemptions_per_hour=0.5)
    return {
        **{f"{n:,} nodes": (n, cloud) for n in sizes},
        f"{middle:,} nodes, all launched at once": (middle, present),
        f"{largest:,} nodes, all launched at once": (largest, present),
        f"{middle:,} nodes, one in two preempted each hour": (middle, often),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, nargs="+", default=[100, 1000, 5000])
    parser.add_argument("--files", type=int, default=int(inputs().snapshot["files"]))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cut", choices=CUTS, action="append", help="default: all")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="of Cloud")
    parser.add_argument("--plot", type=Path, help="folder for two PNG files (needs matplotlib)")
    parser.add_argument(
        "--replay",
        nargs="+",
        metavar=("CONFIG", "KEY=VALUE"),
        help="of a finished run on this machine: the model's time beside the real one",
    )
    given = parser.parse_args()
    if given.replay:
        config, *overrides = given.replay
        spans = replay(
            load(config, overrides), cores=os.cpu_count() or 1, dispatch=dispatch_seconds(figures())
        )
        print_replay(spans)
        return
    changes = {name: float(value) for name, value in (pair.split("=") for pair in given.set)}
    cloud = Cloud(**{"dispatch_seconds": dispatch_seconds(figures()), **changes})
    for name in given.cut or CUTS:
        named = variants(given.nodes, cloud)
        clusters = {label: Cluster(n, c, seed=given.seed) for label, (n, c) in named.items()}
        with tempfile.TemporaryDirectory(prefix="gristmill-simulate-") as folder:
            case = simulate(
                list(clusters.values()),
                Path(folder),
                files=given.files,
                seed=given.seed,
                overrides=CUTS[name],
                ledger=name == "whole files",
            )
        print(f"== {name}")
        reports = {
            label: report(cluster, case.engine.requests) for label, cluster in clusters.items()
        }
        for label, of in reports.items():
            print_report(label, of)
        print(f"\n  driver: {driver(case)}", flush=True)
        if given.files == inputs().snapshot["files"] and not changes:
            record(name, given.seed, cloud, {"clusters": reports, "driver": driver(case)})
        if given.plot and name == SHOWN:
            shown = {f"{n:,} nodes": clusters[f"{n:,} nodes"] for n in given.nodes[::2]}
            plot_at_work(shown, given.plot / "simulate_cores.png")
    if given.plot:
        plot_makespan(json.loads(RESULTS.read_text())["cases"], given.plot / "simulate_nodes.png")


def record(cut: str, seed: int, cloud: Cloud, case: dict[str, Any]) -> None:
    """Replace one case of the results."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"cases": {}}
    cases = known["cases"] | {cut: case}
    known = {
        "date": datetime.date.today().isoformat(),
        "seed": seed,
        "cloud": dataclasses.asdict(cloud),
        "cases": {name: cases[name] for name in CUTS if name in cases},
    }
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")


def driver(case: Case) -> dict[str, Any]:
    """What the real code took: `execute` without workers' commits, on a local disk."""
    engine = case.engine
    units = sum(engine.units.values())
    return {
        "units": units,
        "cpu_seconds": round(case.driver_seconds, 1),
        "cpu_milliseconds_per_unit": round(1000 * case.driver_seconds / units, 3),
        "planning_seconds": {name: round(s, 2) for name, s in engine.planning.items()},
        "commit_milliseconds": round(1000 * engine.committing / units, 3),
        "peak_bytes": case.driver_bytes,
    }


if __name__ == "__main__":
    main()
