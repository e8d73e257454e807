"""The one place that talks to Ray: a stage's units as a Ray Data plan.

A row of the plan is a unit; the task that gets it reads, works and writes by itself and returns its commit record, so no
document ever passes through the object store or the driver. Workers keep their models between units.

Ray Data starts no task twice because it is slow, so the driver does: when processors lie idle, a unit that takes far longer
than the others did is begun a second time by a task of its own. Both copies write the same bytes under the same names; the
first commit stands. The other copy finds it and ends its process, and Ray's retry of the plan's task returns what stands.
"""

import json
import logging
import os
import resource
import statistics
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import evidence
from stages.ledger import Commit, Store, Unit, exists, read_bytes, write_atomically

# so many blocks keep any cluster busy, and the driver's bookkeeping small; a block holds several units beyond that
MAX_BLOCKS = 10_000
# a unit is late when it takes so many times what its size and the median of the others' rates let expect
LATE = 3.0
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
    patience: float = 60.0  # seconds that a unit may take before anyone asks whether it is late


class SetAside(RuntimeError):
    """A unit killed its worker too often; `attempts` is what is known of each time."""

    def __init__(self, attempts: list[dict[str, Any]]) -> None:
        kills = sum(a.get("kernel_kills_since", 0) > 0 for a in attempts)
        known = f"the kernel killed for memory {kills} times" if kills else "out of memory?"
        super().__init__(
            f"its worker died {len(attempts)} times ({known}): raise the stage's memory, or look at its input; set aside until "
            "`gristmill retry`"
        )
        self.attempts = attempts


class Overtaken(RuntimeError):
    """Another copy of the unit was committed first."""


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

    blocks = min(len(units), MAX_BLOCKS)
    ordered = dealt(units, blocks)
    rows = [{"unit": json.dumps(unit)} for unit in ordered]
    compute: Any
    if resources.actors:
        work, compute = _pooled(name, task), ray.data.ActorPoolStrategy(min_size=1, max_size=_workers(resources, len(units)))
    else:
        # tasks, not actors: Ray keeps a job's worker processes, and with them the models they have loaded
        work, compute = _function(name, task), ray.data.TaskPoolStrategy(size=resources.parallelism or None)
    plan = ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
        work, batch_size=1, num_cpus=resources.num_cpus, memory=min(resources.memory, _most_memory()), compute=compute
    )
    batch: Any
    with _second_copies(name, task, ordered, resources) as copies:
        # iter_rows would hold back each block until the next one comes, which may be an hour
        for batch in plan.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for row in batch.to_pylist():
                commit = Commit(**json.loads(row["commit"])) if row["commit"] else None
                yield copies.settle(Done(row["unit"], commit, row["error"] or None), task)


def size_of(unit: Unit) -> int:
    """Bytes that the unit reads, where its listing tells; 0 where it does not."""
    return int(unit.task.get("bytes", 0))


def dealt(units: Sequence[Unit], blocks: int) -> list[Unit]:
    """The rows of a plan of so many blocks, such that the largest units begin first, whether a block holds one or many.

    Ray Data cuts rows into even runs, longer by one row at the front, and starts them in order. Equal units keep theirs.
    """
    ordered = sorted(units, key=lambda unit: -size_of(unit))
    return [unit for block in range(blocks) for unit in ordered[block::blocks]]


def _most_memory() -> int:
    """Bytes of memory of the largest node: Ray would wait for ever for a worker that fits nowhere."""
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    found = [node["Resources"].get("memory", 0) for node in nodes if node["Alive"]]
    return int(max(found, default=0)) or 1


def _function(name: str, task: Task) -> Any:
    def run(batch: dict[str, Any]) -> dict[str, Any]:
        with _giving_way(Unit(*json.loads(batch["unit"][0])), task):
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
        return Done(unit.name, _do(unit, task), None)
    except Exception as error:  # a unit that cannot be done must not take the others with it
        if winner := _committed(unit, task.store):
            return Done(unit.name, winner, None)
        message = f"{type(error).__name__}: {error}"
        record: dict[str, Any] = {"unit": unit.name, "task": unit.task, "error": message, "traceback": traceback.format_exc()}
        if isinstance(error, SetAside):
            record |= {"set_aside": unit.fingerprint, "attempts": error.attempts}
        else:
            task.store.clear("attempts", task.invocation, unit.name)  # it ended with a word: its worker lives
        task.store.fail(unit.name, record)
        return Done(unit.name, None, message)


def _committed(unit: Unit, store: Store) -> Commit | None:
    """The unit's commit, if it is of the same input."""
    commit = store.commit_of(unit.name)
    return commit if commit is not None and commit.fingerprint == unit.fingerprint else None


def _do(unit: Unit, task: Task) -> Commit:
    wall, cpu = time.monotonic(), _cpu_seconds()
    commit = task.work(unit, task.plan, _Yielding(task.store.root, unit))
    commit.seconds = round(time.monotonic() - wall, 3)
    commit.cpu_seconds = round(_cpu_seconds() - cpu + commit.totals.get("child_cpu_seconds", 0.0), 3)
    commit.extra["finished"] = round(time.time(), 3)
    try:
        task.store.commit(commit)
    except RuntimeError:
        task.store.withdraw(unit.name)  # another copy wrote other bytes, and its commit may not vouch for ours
        raise
    return commit


def _count_attempt(unit: Unit, task: Task) -> None:
    """Ray retries a task whose worker died; a unit that kills its worker each time must not be retried for ever."""
    uri = task.store.uri("attempts", task.invocation, unit.name)
    before = [evidence.post_mortem(dead) for dead in json.loads(read_bytes(uri))] if exists(uri) else []
    if len(before) >= task.attempts:
        raise SetAside(before)
    write_atomically(uri, json.dumps([*before, evidence.attempt()]).encode())


def _cpu_seconds() -> float:
    # of this process; the extractor's child reports its own time with each page
    own = resource.getrusage(resource.RUSAGE_SELF)
    return own.ru_utime + own.ru_stime


# --- second copies of late units ---------------------------------------------------------------------------------------


def late(units: Sequence[Unit], rates: Sequence[float], *, waited: float, patience: float) -> list[Unit]:
    """Units that should have ended by now, as far as those that are done can tell: by `rates`, their seconds a byte.

    `waited`: seconds that each was at work, at least. None is late before `patience`, or while none is done to compare with.
    """
    rate = statistics.median(rates) if rates else float("inf")
    return [unit for unit in units if waited > max(patience, LATE * rate * max(1, size_of(unit)))]


@dataclass
class _Copies:
    """Units that have not ended, in the order of their plan; the rates of those that have; the second copies at work."""

    left: dict[str, Unit]
    rates: list[float] = field(default_factory=list)
    tasks: dict[str, Any] = field(default_factory=dict)

    def settle(self, done: Done, task: Task) -> Done:
        """Note an end, and take its second copy's word for it where that was first."""
        unit, copy = self.left.pop(done.unit), self.tasks.pop(done.unit, None)
        if copy is not None:
            _end(copy)
            winner = _committed(unit, task.store)
            done = Done(unit.name, winner, None) if winner else done
        if done.commit is not None:
            self.rates.append(done.commit.seconds / max(1, size_of(unit)))
        return done


@contextmanager
def _second_copies(name: str, task: Task, units: Sequence[Unit], resources: Resources) -> Iterator[_Copies]:
    """Watch the units of a plan while the block consumes it. Not those of a pool, whose models other workers do not have."""
    copies, stop = _Copies({unit.name: unit for unit in units}), threading.Event()
    watch = threading.Thread(target=_watch, args=(name, task, copies, resources, stop), daemon=True)
    if not resources.actors:
        watch.start()
    try:
        yield copies
    finally:
        stop.set()
        if not resources.actors:
            watch.join()
        for copy in copies.tasks.values():
            _end(copy)


def _watch(name: str, task: Task, copies: _Copies, resources: Resources, stop: threading.Event) -> None:
    """Begin late units again while there is room. Room left over means that all the others are at work since there was some."""
    import ray

    memory = min(resources.memory, _most_memory())
    again = ray.remote(num_cpus=resources.num_cpus, memory=memory, max_retries=0)(_second).options(name=f"{name} again")
    idle_since: float | None = None
    while not stop.wait(min(5.0, task.patience / 4)):
        room, now = _room(resources, memory, at_work=len(copies.left) + len(copies.tasks)), time.monotonic()
        idle_since = (now if idle_since is None else idle_since) if room > 0 else None
        if idle_since is not None:
            units = [unit for unit in list(copies.left.values()) if unit.name not in copies.tasks]
            for unit in late(units, copies.rates, waited=now - idle_since, patience=task.patience)[:room]:
                copies.tasks[unit.name] = again.remote(Unit(*json.loads(json.dumps(unit))), task)  # as the plan gives it


def _room(resources: Resources, memory: int, *, at_work: int) -> int:
    """How many more units the cluster could take now."""
    import ray

    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    fit = min(free.get("CPU", 0.0) / resources.num_cpus, free.get("memory", 0.0) / memory)
    return int(min(fit, resources.parallelism - at_work) if resources.parallelism else fit)


def _second(unit: Unit, task: Task) -> None:
    """The second copy of a unit. Its failure is not the unit's: the first copy is still at work, and will tell."""
    with suppress(Exception), _giving_way(unit, task):
        if task.store.commit_of(unit.name) is None:  # one of another input is the first copy's to withdraw
            _do(unit, task)


def _end(copy: Any) -> None:
    import ray

    ray.cancel(copy, force=True)
    ray.wait([copy], timeout=10)


@contextmanager
def _giving_way(unit: Unit, task: Task) -> Iterator[None]:
    """End this process, which may hang in the block, once another copy of its unit has been committed."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(task.patience):
            with suppress(OSError):  # the store is away for a moment
                if _committed(unit, task.store) and not ended.is_set():
                    os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


@dataclass(frozen=True)
class _Yielding(Store):
    """A unit's store that lets no output be replaced once another copy is committed, which vouches for the bytes there are."""

    unit: Unit

    @contextmanager
    def create(self, *parts: str, outputs: list[dict[str, Any]]) -> Iterator[Path]:
        """As in Store. Overtaken if there is a commit."""
        with super().create(*parts, outputs=outputs) as path:
            yield path
            if self.commit_of(self.unit.name) is not None:
                raise Overtaken(f"unit {self.unit.name} was committed by another copy")
