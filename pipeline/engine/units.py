"""Doing one unit: work, then commit. Nothing here knows Ray.

A unit that fails is recorded and does not stop the others. A unit whose worker died is tried again
by Ray; after `attempts` crashes its input is quarantined. A worker lost with its node is no crash.
"""

import dataclasses
import json
import pickle
import resource
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.engine import attempts
from stages.storage.files import exists, read_bytes, write_atomically
from stages.storage.ledger import Commit, Failure, Output, Store, Unit

Work = Callable[[Unit, Any, Store], Commit]
LOST_NODES = (
    10  # times `attempts` that a unit may lose its worker, if most are lost with their node
)


class Resources(NamedTuple):
    """What one worker of a phase needs: processors, and bytes of memory.

    `parallelism` caps the number of workers, 0 means as many as fit the cluster. With `own_workers`
    they are processes of their own, so that no others load the phase's large model.
    """

    num_cpus: float
    memory: int
    parallelism: int = 0
    own_workers: bool = False


class UnitOutcome(NamedTuple):
    """How one unit ended: its commit, or the error it was recorded with."""

    unit: str
    commit: Commit | None
    error: str | None = None


class PhaseWork(NamedTuple):
    """What every worker of a phase is given.

    `patience` is the time in seconds before a unit can count as late.
    """

    work: Work
    plan: Any
    store: Store
    attempts: int
    invocation: str
    patience: float = 60.0


# runs the units of a phase and yields each outcome as it comes; a failing unit fails alone
RunUnits = Callable[[str, PhaseWork, Sequence[Unit], Resources], Iterator[UnitOutcome]]


class Quarantined(RuntimeError):
    """A unit killed its worker too often; `attempts` is what is known of each time."""

    def __init__(self, attempts: list[dict[str, Any]]) -> None:
        super().__init__(
            f"its worker died {len(attempts)} times ({_cause(attempts)}); raise the stage's memory "
            "or check the input; it is quarantined until `gristmill retry`"
        )
        self.attempts = attempts


def _cause(attempts: Sequence[dict[str, Any]]) -> str:
    """Why workers died, as far as their records show."""
    if kills := sum(a.get("kernel_kills_since", 0) > 0 for a in attempts):
        return f"the kernel killed it for memory {kills} times"
    if all(a.get("kernel_kills_since") == 0 for a in attempts):
        free = min(a.get("available_bytes", 0) for a in attempts)
        return (
            "the kernel killed none for memory, of which "
            f"{free / 1e9:.1f} GB were free: a crash, or killed by another process"
        )
    return "out of memory?"


class Overtaken(RuntimeError):
    """Another copy of the unit was committed first."""


def in_process(
    name: str, work: PhaseWork, units: Sequence[Unit], resources: Resources
) -> Iterator[UnitOutcome]:
    """Run units one after the other in this process, without Ray: for tests and benchmarks."""
    for unit in units:
        yield run_unit(pickle.loads(pickle.dumps(unit)), work)


def run_unit(unit: Unit, work: PhaseWork) -> UnitOutcome:
    """Do one unit and commit it. An error is recorded with the unit and does not spread."""
    try:
        before = work.store.loose_commit(unit.name)
        if before is not None and before.fingerprint == unit.fingerprint:
            # Ray retries a task whose worker died after its commit
            return UnitOutcome(unit.name, before)
        if before is not None:
            # before its outputs are replaced: a commit must never vouch for other bytes
            work.store.withdraw(unit.name)
        _count_attempt(unit, work)
        return UnitOutcome(unit.name, do_unit(unit, work))
    except (KeyboardInterrupt, SystemExit):
        raise
    # a unit that cannot be done must not take the others with it; a panic of Rust is no Exception
    except BaseException as error:
        if commit := commit_for(unit, work):
            return UnitOutcome(unit.name, commit)
        return _record_failure(unit, work, error)


def _record_failure(unit: Unit, work: PhaseWork, error: BaseException) -> UnitOutcome:
    message, path = f"{type(error).__name__}: {error}", getattr(unit.task, "path", None)
    if path and path not in message:
        message = f"{path}: {message}"
    failure = Failure(unit.name, message, dataclasses.asdict(unit.task), traceback.format_exc())
    if isinstance(error, Quarantined):
        failure = dataclasses.replace(
            failure, quarantined=unit.fingerprint, attempts=error.attempts
        )
    else:
        # it raised an error: its worker is alive
        work.store.clear("attempts", work.invocation, unit.name)
    work.store.fail(failure)
    return UnitOutcome(unit.name, None, message)


def commit_for(unit: Unit, work: PhaseWork) -> Commit | None:
    """The unit's commit, if it is of the same input."""
    commit = work.store.loose_commit(unit.name)
    return commit if commit is not None and commit.fingerprint == unit.fingerprint else None


def do_unit(unit: Unit, work: PhaseWork) -> Commit:
    """Do the work and commit it, with its wall time and the CPU time of all its processes."""
    wall, cpu = time.monotonic(), _cpu_seconds()
    commit = work.work(unit, work.plan, _GuardedStore(work.store.root, work.store.result, unit))
    commit.seconds = round(time.monotonic() - wall, 3)
    # the work itself has noted what its child processes took
    commit.cpu_seconds = round(commit.cpu_seconds + _cpu_seconds() - cpu, 3)
    commit.finished = round(time.time(), 3)
    try:
        work.store.commit(commit)
    except RuntimeError:
        # another copy wrote other bytes, and its commit must not vouch for ours
        work.store.withdraw(unit.name)
        raise
    return commit


def _count_attempt(unit: Unit, work: PhaseWork) -> None:
    """Note that an attempt begins; Quarantined after `attempts` crashes of its worker.

    Ray retries a task whose worker died, but a unit that kills its worker every time must end. One
    that takes the whole node with it ends as well, later: lost nodes are rarely a unit's fault.
    """
    uri = work.store.uri("attempts", work.invocation, unit.name)
    earlier = json.loads(read_bytes(uri)) if exists(uri) else []
    dead = [attempts.post_mortem(attempt) for attempt in earlier]
    if len(dead) >= work.attempts:
        crashes = attempts.crashed(dead, limit=work.attempts)
        if len(crashes) >= work.attempts:
            raise Quarantined(crashes)
        if len(dead) >= LOST_NODES * work.attempts:
            raise Quarantined(dead)
    write_atomically(uri, json.dumps([*dead, attempts.attempt()]).encode())


def _cpu_seconds() -> float:
    """CPU time of this process alone, in seconds."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


@dataclass(frozen=True)
class _GuardedStore(Store):
    """A unit's store that replaces no output once another copy of the unit is committed."""

    unit: Unit | None = None

    @contextmanager
    def create(self, *parts: str, outputs: list[Output]) -> Iterator[Path]:
        """As in Store. Overtaken if there is a commit."""
        assert self.unit is not None
        with super().create(*parts, outputs=outputs) as path:
            yield path
            if self.loose_commit(self.unit.name) is not None:
                raise Overtaken(f"unit {self.unit.name} was committed by another copy")
