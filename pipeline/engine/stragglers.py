"""Second copies of units that take far longer than the others did.

Ray Data does not start a task twice because it is slow, so the driver does: when processors are
idle, a late unit is started a second time by a task of its own. Both copies write the same bytes
under the same names, and the first commit stands. The other copy sees the commit and ends its
process; Ray's retry of the plan's task then returns what stands.
"""

import os
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from pipeline.engine.cluster import largest_node_memory
from pipeline.engine.units import PhaseWork, Resources, UnitOutcome, commit_for, do_unit
from stages.storage.ledger import Unit

# a unit is late after this many times what its size and the median rate of the others predict
LATE = 3.0


def late_units(
    units: Sequence[Unit], rates: Sequence[float], *, waited: float, patience: float
) -> list[Unit]:
    """Units that should have ended by now, judged by `rates`: seconds per byte of finished units.

    `waited` is the least time in seconds that each has been running. No unit counts as late before
    `patience` seconds, or before any unit has finished.
    """
    rate = statistics.median(rates) if rates else float("inf")
    return [unit for unit in units if waited > max(patience, LATE * rate * max(1, unit.bytes))]


@dataclass
class _Copies:
    """Unfinished units in the order of their plan, rates of finished units, second copies."""

    left: dict[str, Unit]
    rates: list[float] = field(default_factory=list)
    tasks: dict[str, Any] = field(default_factory=dict)

    def settle(self, outcome: UnitOutcome, work: PhaseWork) -> UnitOutcome:
        """Note how a unit ended; the outcome is that of its second copy if that one was first."""
        unit, copy = self.left.pop(outcome.unit), self.tasks.pop(outcome.unit, None)
        if copy is not None:
            _end_copy(copy)
            commit = commit_for(unit, work)
            outcome = UnitOutcome(unit.name, commit) if commit else outcome
        if outcome.commit is not None:
            self.rates.append(outcome.commit.seconds / max(1, unit.bytes))
        return outcome


@contextmanager
def second_copies(
    name: str, work: PhaseWork, units: Sequence[Unit], resources: Resources
) -> Iterator[_Copies]:
    """Watch the units of a plan while the block consumes it.

    Units of an actor pool get no second copy: other workers do not have their model.
    """
    copies, stop = _Copies({unit.name: unit for unit in units}), threading.Event()
    watch = threading.Thread(target=_watch, args=(name, work, copies, resources, stop), daemon=True)
    watch.start()
    try:
        yield copies
    finally:
        stop.set()
        watch.join()
        for copy in copies.tasks.values():
            _end_copy(copy)


def _watch(
    name: str, work: PhaseWork, copies: _Copies, resources: Resources, stop: threading.Event
) -> None:
    """Start late units of tasks again while there is room.

    Idle processors mean that all other units have been running since they became idle.
    """
    import ray

    if resources.actors:
        return
    memory = min(resources.memory, largest_node_memory())
    remote = ray.remote(num_cpus=resources.num_cpus, memory=memory, max_retries=0)(_run_copy)
    remote = remote.options(name=f"{name} again")
    idle_since: float | None = None
    while not stop.wait(min(5.0, work.patience / 4)):
        room = _free_slots(resources, memory, running=len(copies.left) + len(copies.tasks))
        now = time.monotonic()
        idle_since = (now if idle_since is None else idle_since) if room > 0 else None
        if idle_since is None:
            continue
        units = [unit for unit in list(copies.left.values()) if unit.name not in copies.tasks]
        waited = now - idle_since
        late = late_units(units, copies.rates, waited=waited, patience=work.patience)
        for unit in late[:room]:
            copies.tasks[unit.name] = remote.remote(unit, work)


def _free_slots(resources: Resources, memory: int, *, running: int) -> int:
    """How many more units the cluster could run now."""
    import ray

    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    fit = min(free.get("CPU", 0.0) / resources.num_cpus, free.get("memory", 0.0) / memory)
    return int(min(fit, resources.parallelism - running) if resources.parallelism else fit)


def _run_copy(unit: Unit, work: PhaseWork) -> None:
    """Run the second copy of a unit. Its failure does not count: the first is still running."""
    with suppress(Exception), exit_when_committed(unit, work):
        # a commit of another input is for the first copy to withdraw
        if work.store.loose_commit(unit.name) is None:
            do_unit(unit, work)


def _end_copy(copy: Any) -> None:
    import ray

    ray.cancel(copy, force=True)
    ray.wait([copy], timeout=10)


@contextmanager
def exit_when_committed(unit: Unit, work: PhaseWork) -> Iterator[None]:
    """End this process, which may hang in the block, once another copy of the unit is committed."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(work.patience):
            with suppress(OSError):  # the store does not answer for a moment
                if commit_for(unit, work) and not ended.is_set():
                    os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
