"""Second copies of units that take far longer than the others did."""

import json
import os
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from pipeline.engine.cluster import largest_node_memory
from pipeline.engine.units import Done, Resources, Task, commit_for, do_unit, size_of
from stages.storage.ledger import Unit

# a unit is late when it takes so many times what its size and the median of the others' rates let
# expect
LATE = 3.0


def late(
    units: Sequence[Unit], rates: Sequence[float], *, waited: float, patience: float
) -> list[Unit]:
    """Units that should have ended by now, as far as those that are done can tell: by `rates`,
    their seconds a byte.

    `waited`: seconds that each was at work, at least. None is late before `patience`, or while none
    is done to compare with.
    """
    rate = statistics.median(rates) if rates else float("inf")
    return [unit for unit in units if waited > max(patience, LATE * rate * max(1, size_of(unit)))]


@dataclass
class _Copies:
    """Units that have not ended, in the order of their plan; the rates of those that have; the
    second copies at work.
    """

    left: dict[str, Unit]
    rates: list[float] = field(default_factory=list)
    tasks: dict[str, Any] = field(default_factory=dict)

    def settle(self, done: Done, task: Task) -> Done:
        """Note an end, and take its second copy's word for it where that was first."""
        unit, copy = self.left.pop(done.unit), self.tasks.pop(done.unit, None)
        if copy is not None:
            _end(copy)
            winner = commit_for(unit, task.store)
            done = Done(unit.name, winner, None) if winner else done
        if done.commit is not None:
            self.rates.append(done.commit.seconds / max(1, size_of(unit)))
        return done


@contextmanager
def second_copies(
    name: str, task: Task, units: Sequence[Unit], resources: Resources
) -> Iterator[_Copies]:
    """Watch the units of a plan while the block consumes it.

    Not those of a pool, whose models other workers do not have.
    """
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


def _watch(
    name: str, task: Task, copies: _Copies, resources: Resources, stop: threading.Event
) -> None:
    """Begin late units again while there is room.

    Room left over means that all the others are at work since there was some.
    """
    import ray

    memory = min(resources.memory, largest_node_memory())
    again = ray.remote(num_cpus=resources.num_cpus, memory=memory, max_retries=0)(_second).options(
        name=f"{name} again"
    )
    idle_since: float | None = None
    while not stop.wait(min(5.0, task.patience / 4)):
        room, now = (
            _room(resources, memory, at_work=len(copies.left) + len(copies.tasks)),
            time.monotonic(),
        )
        idle_since = (now if idle_since is None else idle_since) if room > 0 else None
        if idle_since is not None:
            units = [unit for unit in list(copies.left.values()) if unit.name not in copies.tasks]
            for unit in late(units, copies.rates, waited=now - idle_since, patience=task.patience)[
                :room
            ]:
                copies.tasks[unit.name] = again.remote(
                    Unit(*json.loads(json.dumps(unit))), task
                )  # as the plan gives it


def _room(resources: Resources, memory: int, *, at_work: int) -> int:
    """How many more units the cluster could take now."""
    import ray

    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    fit = min(free.get("CPU", 0.0) / resources.num_cpus, free.get("memory", 0.0) / memory)
    return int(min(fit, resources.parallelism - at_work) if resources.parallelism else fit)


def _second(unit: Unit, task: Task) -> None:
    """The second copy of a unit. Its failure is not the unit's: the first copy is still at work,
    and will tell.
    """
    with suppress(Exception), giving_way(unit, task):
        if (
            task.store.commit_of(unit.name) is None
        ):  # one of another input is the first copy's to withdraw
            do_unit(unit, task)


def _end(copy: Any) -> None:
    import ray

    ray.cancel(copy, force=True)
    ray.wait([copy], timeout=10)


@contextmanager
def giving_way(unit: Unit, task: Task) -> Iterator[None]:
    """End this process, which may hang in the block, once another copy of its unit has been
    committed.
    """
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(task.patience):
            with suppress(OSError):  # the store is away for a moment
                if commit_for(unit, task.store) and not ended.is_set():
                    os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
