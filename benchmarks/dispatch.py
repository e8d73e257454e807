"""What does it cost the driver to hand out units, and how fast does a cluster grow to do them?

    python -m benchmarks.dispatch units [NUMBER]       empty units: driver's CPU, memory, first end
    python -m benchmarks.dispatch growth [--plot PNG]  a cluster that begins without workers

Both compare the engine, which makes each unit a task of Ray, with a plan of Ray Data that has a
block for each unit. A growing cluster is three nodes of one processor on this machine, started by
Ray's own autoscaler; their units take as long as it takes three nodes to be at work, or a minute.
"""

import argparse
import json
import logging
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.watch import peak_bytes, watched
from pipeline.engine.cluster import start
from pipeline.engine.dispatch import on_ray
from pipeline.engine.units import PhaseWork, Resources, UnitOutcome, run_unit
from stages.storage.ledger import Commit, Store, Unit

NODES, WAIT_SECONDS = 3, 60
WORKER = Resources(1.0, 100_000_000)


def ray_data(address: str | None) -> Callable[..., Iterator[UnitOutcome]]:
    """As `on_ray`, by one operator of Ray Data."""

    def run(
        name: str, work: PhaseWork, units: Sequence[Unit], resources: Resources
    ) -> Iterator[UnitOutcome]:
        start(address)
        import ray.data

        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False

        def do(batch: dict[str, Any]) -> dict[str, Any]:
            return {"outcome": [pickle.dumps(run_unit(pickle.loads(batch["unit"][0]), work))]}

        rows = [{"unit": pickle.dumps(unit)} for unit in units]
        plan = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            do, batch_size=1, num_cpus=resources.num_cpus, memory=resources.memory
        )
        batch: Any
        for batch in plan.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from (pickle.loads(row["outcome"]) for row in batch.to_pylist())

    return run


ENGINES = {"tasks": on_ray, "ray data": ray_data}


def empty(unit: Unit, plan: Any, store: Store) -> Commit:
    """No work at all."""
    return Commit(unit.name, unit.fingerprint)


# --- units ----------------------------------------------------------------------------------------


def compare_units(number: int) -> None:
    """A line per figure of each engine, in a process of its own, and the ratio."""
    cpu = {}
    for engine in ENGINES:
        figures, _ = watched(hand_out, engine, number)
        cpu[engine] = figures["ms of the driver's CPU per unit"]
        for name, value in figures.items():
            print(f"{engine}: {number:,} units: {value:.2f} {name}", flush=True)
    print(f"ray data / tasks: {cpu['ray data'] / cpu['tasks']:.1f} of the driver's CPU per unit")


def hand_out(mark: Callable[[], None], engine: str, number: int) -> dict[str, float]:
    """Empty units from the first to the last; Ray is started before."""
    with tempfile.TemporaryDirectory() as folder:
        run = ENGINES[engine](None)
        units = [Unit(f"{n:06d}", "f", None) for n in range(number)]
        list(run("warm", PhaseWork(empty, None, Store(f"{folder}/w"), 3, "i"), units[:2], WORKER))
        before, began, first = time.process_time(), time.monotonic(), 0.0
        for _ in run("units", PhaseWork(empty, None, Store(folder), 3, "i"), units, WORKER):
            first = first or time.monotonic() - began
        return {
            "ms of the driver's CPU per unit": 1e3 * (time.process_time() - before) / number,
            "units/s": number / (time.monotonic() - began),
            "s to the end of the first": first,
            "MB at the driver's peak": peak_bytes() / 1e6,
        }


# --- growth ---------------------------------------------------------------------------------------


def compare_growth(plot: Path | None) -> None:
    """Seconds until all nodes are at work, and a plot of nodes over time."""
    from tests.support.autoscaling import growing_cluster

    lines = {}
    for engine in ENGINES:
        with growing_cluster(workers=NODES) as address, tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "benchmarks.dispatch", "grow", engine, address, folder]
            subprocess.run(command, env=os.environ | {"RAY_AUTH_MODE": "disabled"}, check=True)
            lines[engine] = json.loads(Path(folder, "nodes.json").read_text())
        at_work = [seconds for seconds, _, working in lines[engine] if working == NODES]
        when = f"{at_work[0]:.0f} s until all work" if at_work else "all never work at once"
        print(f"{engine}: {NODES} nodes, none at first: {when}", flush=True)
    if plot:
        draw(lines, plot)


def grow(engine: str, address: str, folder: str) -> None:
    """Do the units, and note twice a second how many nodes are alive and how many work."""
    import ray

    begun, nodes, ended = time.monotonic(), [], threading.Event()
    work = PhaseWork(wait_for_others, None, Store(folder), 3, "i", patience=1e9)
    units = [Unit(f"{n:06d}", "f", None) for n in range(2 * NODES)]

    def watch() -> None:
        last = False
        while not last:
            last = ended.wait(0.5)
            if ray.is_initialized():
                alive = sum(n["Alive"] and "CPU" in n["Resources"] for n in ray.nodes())
                working = len(list(Path(folder).glob("working-*")))
                nodes.append((time.monotonic() - begun, alive, working))

    thread = threading.Thread(target=watch)
    thread.start()
    list(ENGINES[engine](address)("units", work, units, WORKER))
    ended.set()
    thread.join()
    Path(folder, "nodes.json").write_text(json.dumps(nodes))


def wait_for_others(unit: Unit, plan: Any, store: Store) -> Commit:
    """Work until all nodes do, at most a minute."""
    import ray

    mine = Path(store.root, f"working-{ray.get_runtime_context().get_node_id()}")
    mine.touch()
    end = time.monotonic() + WAIT_SECONDS
    while len(list(Path(store.root).glob("working-*"))) < NODES and time.monotonic() < end:
        time.sleep(0.2)
    return Commit(unit.name, unit.fingerprint)


def draw(lines: dict[str, list[tuple[float, int, int]]], path: Path) -> None:
    """Nodes that are alive over time, a line for each engine."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.2))
    for engine, points in lines.items():
        seconds, alive, _ = zip(*points, strict=True)
        axes.step(seconds, alive, where="post", label=engine)
    axes.set(xlabel="seconds", ylabel="nodes alive", yticks=range(NODES + 1))
    axes.set_title("Six units that wait for three nodes, on a cluster without workers", fontsize=10)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Parse, and run one comparison."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("units").add_argument("number", nargs="?", type=int, default=2000)
    commands.add_parser("growth").add_argument("--plot", type=Path)
    one = commands.add_parser("grow", help="one engine, on a cluster that growth has started")
    for name in ("engine", "address", "folder"):
        one.add_argument(name)
    arguments = vars(parser.parse_args())
    command = arguments.pop("command")
    {"units": compare_units, "growth": compare_growth, "grow": grow}[command](**arguments)


if __name__ == "__main__":
    from benchmarks import dispatch  # workers cannot load what lies in __main__

    dispatch.main()
