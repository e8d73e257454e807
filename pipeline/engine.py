"""The one place that talks to Ray: a stage's units as a Ray Data plan.

A row of the plan is a unit; the task that gets it reads, works and writes by itself and returns its commit record, so no
document ever passes through the object store or the driver. Workers keep their models between units.
"""

import json
import logging
import os
import resource
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from stages.ledger import Commit, Store, Unit, exists, read_bytes, write_atomically

# so many blocks keep any cluster busy, and the driver's bookkeeping small; a block holds several units beyond that
MAX_BLOCKS = 10_000
# a unit's inputs and outputs go to disk, not to the object store: on one machine it can be small
_LOCAL_SETTINGS: dict[str, Any] = {"include_dashboard": False, "object_store_memory": 200_000_000}

Work = Callable[[Unit, Any, Store], Commit]


class Resources(NamedTuple):
    """What one worker of a stage may take. `parallelism` caps the workers, 0 for as many as fit the cluster.

    `actors`: the workers are a pool of their own, which keeps its model to itself, and not tasks that any process takes.
    """

    num_cpus: float
    memory: int
    parallelism: int = 0
    actors: bool = False


class Done(NamedTuple):
    """The end of one unit: its commit, or the error it is recorded with."""

    unit: str
    commit: Commit | None
    error: str | None


class Task(NamedTuple):
    """What every worker of a stage is given."""

    work: Work
    plan: Any
    store: Store
    attempts: int
    invocation: str


# runs the units of a phase and yields each one's end as it comes; a failing unit fails alone
RunUnits = Callable[[str, Task, Sequence[Unit], Resources], Iterator[Done]]


def start(address: str | None) -> None:
    """Connect to a cluster (`address`, else $RAY_ADDRESS), or start Ray on this machine."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    local = not (address or os.environ.get("RAY_ADDRESS"))
    import ray
    import ray.data

    if not ray.is_initialized():
        settings: dict[str, Any] = _LOCAL_SETTINGS if local else {}
        ray.init(address="local" if local else address, log_to_driver=False, logging_level=logging.ERROR, **settings)
    for handler in logging.getLogger("ray.data").handlers:
        if type(handler).__name__ == "PlainRayHandler":  # the terminal; Ray's own log files keep everything
            handler.setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False


def on_ray(address: str | None = None) -> RunUnits:
    """Run units on a cluster, or on this machine, each stage as one Ray Data operator; Ray starts with the first unit."""

    def run_units(name: str, task: Task, units: Sequence[Unit], resources: Resources) -> Iterator[Done]:
        start(address)
        return _plan(name, task, units, resources)

    return run_units


def in_process(name: str, task: Task, units: Sequence[Unit], resources: Resources) -> Iterator[Done]:
    """Run units one after the other in this process, without Ray: what the benchmark compares with, and tests use."""
    for unit in units:
        yield run_one(Unit(*json.loads(json.dumps(unit))), task)


def _plan(name: str, task: Task, units: Sequence[Unit], resources: Resources) -> Iterator[Done]:
    import ray.data

    rows = [{"unit": json.dumps(unit)} for unit in units]
    compute: Any
    if resources.actors:
        work, compute = _pooled(name, task), ray.data.ActorPoolStrategy(min_size=1, max_size=_workers(resources, len(units)))
    else:
        # tasks, not actors: Ray keeps a job's worker processes, and with them the models they have loaded
        work, compute = _function(name, task), ray.data.TaskPoolStrategy(size=resources.parallelism or None)
    plan = ray.data.from_items(rows, override_num_blocks=min(len(rows), MAX_BLOCKS)).map_batches(
        work, batch_size=1, num_cpus=resources.num_cpus, memory=min(resources.memory, _most_memory()), compute=compute
    )
    for row in plan.iter_rows():
        commit = Commit(**json.loads(row["commit"])) if row["commit"] else None
        yield Done(row["unit"], commit, row["error"] or None)


def _most_memory() -> int:
    """Bytes of memory of the largest node: Ray would wait for ever for a worker that fits nowhere."""
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    found = [node["Resources"].get("memory", 0) for node in nodes if node["Alive"]]
    return int(max(found, default=0)) or 1


def _function(name: str, task: Task) -> Any:
    def run(batch: dict[str, Any]) -> dict[str, Any]:
        return _run_row(batch, task)

    run.__name__ = run.__qualname__ = name  # what progress output and the dashboard call the operator
    return run


def _pooled(name: str, task: Task) -> Any:
    class Worker:
        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            return _run_row(batch, task)

    Worker.__name__ = Worker.__qualname__ = name.replace(" ", "_")
    return Worker


def _workers(resources: Resources, units: int) -> int:
    """How many actors a pool may have: as many as the cluster has processors for, and no more than there are units."""
    import ray

    fit = int(ray.cluster_resources().get("CPU", 1) / resources.num_cpus)  # type: ignore[no-untyped-call]
    return max(1, min(units, resources.parallelism or fit))


def _run_row(batch: dict[str, Any], task: Task) -> dict[str, Any]:
    done = run_one(Unit(*json.loads(batch["unit"][0])), task)
    commit = json.dumps(done.commit.__dict__) if done.commit else ""
    return {"unit": [done.unit], "commit": [commit], "error": [done.error or ""]}


def run_one(unit: Unit, task: Task) -> Done:
    """Do one unit, with Ray or without: work, then commit. An error is recorded with the unit and does not spread."""
    try:
        before = task.store.commit_of(unit.name)
        if before is not None and before.fingerprint == unit.fingerprint:
            return Done(unit.name, before, None)  # Ray retries a task of many units from its first one
        if before is not None:
            task.store.withdraw(unit.name)  # before its outputs are replaced: a commit never vouches for other bytes
        _count_attempt(unit, task)
        wall, cpu = time.monotonic(), _cpu_seconds()
        commit = task.work(unit, task.plan, task.store)
        commit.seconds = round(time.monotonic() - wall, 3)
        commit.cpu_seconds = round(_cpu_seconds() - cpu + commit.totals.get("child_cpu_seconds", 0.0), 3)
        commit.extra["finished"] = round(time.time(), 3)
        task.store.commit(commit)
        return Done(unit.name, commit, None)
    except Exception as error:  # a unit that cannot be done must not take the others with it
        message = f"{type(error).__name__}: {error}"
        record = {"unit": unit.name, "task": unit.task, "error": message, "traceback": traceback.format_exc()}
        task.store.fail(unit.name, record)
        return Done(unit.name, None, message)


def _count_attempt(unit: Unit, task: Task) -> None:
    """Ray retries a task whose worker died; a unit that kills its worker each time must not be retried for ever."""
    uri = task.store.uri("attempts", task.invocation, unit.name)
    before = int(read_bytes(uri)) if exists(uri) else 0
    if before >= task.attempts:
        raise RuntimeError(f"its worker died {before} times (out of memory?): raise the stage's memory, or look at its input")
    write_atomically(uri, str(before + 1).encode())


def _cpu_seconds() -> float:
    # of this process; the extractor's child reports its own time with each page
    own = resource.getrusage(resource.RUSAGE_SELF)
    return own.ru_utime + own.ru_stime
