"""A phase's units as tasks of Ray.

The task that gets a unit reads, works and writes by itself and returns its commit, so no document
ever passes through the object store or the driver. Workers keep their models between units.

Tasks that wait in Ray's queue are also what makes its autoscaler add nodes, as many as can work on
them, and no more once the last has begun or the driver is gone. An operator of Ray Data takes many
times the driver's time for each unit, and asks for nodes by the rate of outputs, which a unit does
not have before its end (benchmarks/README.md).
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from pipeline.engine.cluster import fitted, free_slots, slots, start
from pipeline.engine.stragglers import Stragglers, run_copy
from pipeline.engine.units import (
    PhaseWork,
    Resources,
    RunUnits,
    UnitOutcome,
    commit_for,
    run_unit,
)
from stages.storage.ledger import Commit, Unit

# tasks in Ray's queue beyond those that run: how far a cluster can grow at once. The driver holds
# 9 kB for each.
MAX_WAITING = 20_000
_COUNT_SECONDS, _CANCEL_SECONDS = 5.0, 10.0


def on_ray(
    address: str | None = None, *, show_dashboard: Callable[[str], None] | None = None
) -> RunUnits:
    """Run units on a cluster, or on this machine.

    Ray starts with the first unit, and then gives `show_dashboard` the URL of its dashboard.
    """
    return partial(_run_phase, partial(start, address, show_dashboard=show_dashboard))


def _run_phase(
    connect: Callable[[], None],
    name: str,
    work: PhaseWork,
    units: Sequence[Unit],
    resources: Resources,
) -> Iterator[UnitOutcome]:
    connect()
    resources = fitted(resources)
    tasks = _Tasks.of(name, work, resources)
    try:
        yield from tasks.run(order_units(units))
    finally:
        tasks.cancel_all()


def order_units(units: Sequence[Unit]) -> list[Unit]:
    """The units as they begin: the largest first, since they end last."""
    return sorted(units, key=lambda unit: -unit.bytes)


@dataclass
class _Tasks:
    """The tasks of a phase that Ray has been given and that have not ended, by unit.

    A unit that is late has a second task, once; the first of the two that ends well stands.
    """

    work: PhaseWork
    resources: Resources
    begin: Callable[[Unit], Any]
    begin_again: Callable[[Unit], Any]
    units: dict[str, Unit] = field(default_factory=dict)
    running: dict[str, list[Any]] = field(default_factory=dict)
    ends: "SimpleQueue[tuple[str, Any, Future[Any]]]" = field(default_factory=SimpleQueue)
    slots: int = 0
    counted: float = 0.0

    @classmethod
    def of(cls, name: str, work: PhaseWork, resources: Resources) -> "_Tasks":
        """Tasks that the dashboard shows under the name of the phase."""
        import ray

        needs: dict[str, Any] = {"num_cpus": resources.num_cpus, "memory": resources.memory}
        if resources.own_workers:
            # a process runs only tasks with the environment that it was started with
            needs["runtime_env"] = {"env_vars": {"GRISTMILL_PHASE": name}}
        shared = ray.put(work)
        # a worker that dies, and a node that is lost, are no fault of the unit: run_unit counts
        task = ray.remote(run_unit).options(name=name, max_retries=-1, **needs)
        copy = ray.remote(run_copy).options(name=f"{name} again", max_retries=0, **needs)
        return cls(
            work,
            resources,
            lambda unit: task.remote(unit, shared),
            lambda unit: copy.remote(unit, shared),
        )

    def run(self, units: Sequence[Unit]) -> Iterator[UnitOutcome]:
        """Each outcome as it comes."""
        todo, stragglers = deque(units), Stragglers(self.work.patience)
        while True:
            for _ in range(min(len(todo), self._most() - len(self.units))):
                unit = todo.popleft()
                self.units[unit.name] = unit
                self._watch(unit.name, self.begin(unit))
            if not self.units:
                return
            outcome = self._next_end(timeout=stragglers.period)
            if outcome is not None:
                stragglers.note(self.units.pop(outcome.unit), outcome.commit)
                yield outcome
            if self.units and stragglers.are_due():
                # what an end leaves free is for the next unit
                self._copy_late(stragglers, room=0 if todo else self._room())

    def _most(self) -> int:
        """How many tasks Ray may have: all that the cluster can run, and some that wait."""
        if self.resources.parallelism:
            return self.resources.parallelism
        if len(self.units) >= MAX_WAITING and time.monotonic() > self.counted + _COUNT_SECONDS:
            self.slots, self.counted = slots(self.resources), time.monotonic()
        return self.slots + MAX_WAITING

    def _watch(self, name: str, task: Any) -> None:
        self.running.setdefault(name, []).append(task)
        task.future().add_done_callback(lambda future: self.ends.put((name, task, future)))

    def _next_end(self, *, timeout: float) -> UnitOutcome | None:
        """How the next unit ended; None if none did in `timeout` seconds.

        Raises what a unit's first task raised: the errors of a unit are part of its outcome.
        """
        from ray.exceptions import RayTaskError

        try:
            name, task, future = self.ends.get(timeout=timeout)
        except Empty:
            return None
        if name not in self.units:
            return None  # the other task of its unit was faster
        is_copy = task != self.running[name][0]
        if is_copy and (future.exception() or future.result() is None):
            # it failed or died, and stays listed: there is no third task. The first one says how
            # the unit ends
            return None
        self.running[name].remove(task)
        try:
            outcome: UnitOutcome = future.result()
        except RayTaskError as error:
            raise error.cause from error  # its text is one line, Ray's a traceback
        others = self.running.pop(name)
        _cancel(others)
        if others and outcome.commit is None and (commit := self._commit_after(name, others)):
            return UnitOutcome(name, commit)
        return outcome

    def _commit_after(self, name: str, tasks: Sequence[Any]) -> Commit | None:
        """The commit of a unit that failed in one task, if another one was faster than its end."""
        import ray

        ray.wait(list(tasks), num_returns=len(tasks), timeout=_CANCEL_SECONDS)
        return commit_for(self.units[name], self.work)

    def _room(self) -> int:
        """How many more tasks the cluster could run now."""
        return free_slots(self.resources, running=sum(map(len, self.running.values())))

    def _copy_late(self, stragglers: Stragglers, *, room: int) -> None:
        """Begin late units again while there is room."""
        once = [unit for unit in self.units.values() if len(self.running[unit.name]) == 1]
        for unit in stragglers.late(once, room=room):
            self._watch(unit.name, self.begin_again(unit))

    def cancel_all(self) -> None:
        """End what runs, if the phase ends early."""
        for tasks in self.running.values():
            _cancel(tasks)


def _cancel(tasks: Sequence[Any]) -> None:
    """End the processes of tasks; those that wait never begin."""
    import ray

    for task in tasks:
        ray.cancel(task, force=True)
