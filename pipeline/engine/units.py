"""The one place that talks to Ray: a stage's units as a Ray Data plan.

A row of the plan is a unit; the task that gets it reads, works and writes by itself and returns its
commit record, so no document ever passes through the object store or the driver. Workers keep their
models between units.

Ray Data starts no task twice because it is slow, so the driver does: when processors lie idle, a
unit that takes far longer than the others did is begun a second time by a task of its own. Both
copies write the same bytes under the same names; the first commit stands. The other copy finds it
and ends its process, and Ray's retry of the plan's task returns what stands.
"""

import json
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
from stages.storage.ledger import Commit, Store, Unit

Work = Callable[[Unit, Any, Store], Commit]


class Resources(NamedTuple):
    """What one worker of a stage may take. `parallelism` caps the workers, 0 for as many as fit the
    cluster.

    `actors`: the workers are a pool of their own, which keeps its model to itself, and not tasks
    that any process takes.
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


def in_process(
    name: str, task: Task, units: Sequence[Unit], resources: Resources
) -> Iterator[Done]:
    """Run units one after the other in this process, without Ray: what the benchmark compares with,
    and tests use.
    """
    for unit in units:
        yield run_one(Unit(*json.loads(json.dumps(unit))), task)


def size_of(unit: Unit) -> int:
    """Bytes that the unit reads, where its listing tells; 0 where it does not."""
    return int(unit.task.get("bytes", 0))


def run_one(unit: Unit, task: Task) -> Done:
    """Do one unit, with Ray or without: work, then commit.

    An error is recorded with the unit and does not spread.
    """
    try:
        before = task.store.commit_of(unit.name)
        if before is not None and before.fingerprint == unit.fingerprint:
            return Done(
                unit.name, before, None
            )  # Ray retries a task of many units from its first one
        if before is not None:
            task.store.withdraw(
                unit.name
            )  # before its outputs are replaced: a commit never vouches for other bytes
        _count_attempt(unit, task)
        return Done(unit.name, do_unit(unit, task), None)
    except Exception as error:  # a unit that cannot be done must not take the others with it
        if winner := commit_for(unit, task.store):
            return Done(unit.name, winner, None)
        message = f"{type(error).__name__}: {error}"
        record: dict[str, Any] = {
            "unit": unit.name,
            "task": unit.task,
            "error": message,
            "traceback": traceback.format_exc(),
        }
        if isinstance(error, SetAside):
            record |= {"set_aside": unit.fingerprint, "attempts": error.attempts}
        else:
            task.store.clear(
                "attempts", task.invocation, unit.name
            )  # it ended with a word: its worker lives
        task.store.fail(unit.name, record)
        return Done(unit.name, None, message)


def commit_for(unit: Unit, store: Store) -> Commit | None:
    """The unit's commit, if it is of the same input."""
    commit = store.commit_of(unit.name)
    return commit if commit is not None and commit.fingerprint == unit.fingerprint else None


def do_unit(unit: Unit, task: Task) -> Commit:
    wall, cpu = time.monotonic(), _cpu_seconds()
    commit = task.work(unit, task.plan, _Yielding(task.store.root, unit))
    commit.seconds = round(time.monotonic() - wall, 3)
    commit.cpu_seconds = round(
        _cpu_seconds() - cpu + commit.totals.get("child_cpu_seconds", 0.0), 3
    )
    commit.extra["finished"] = round(time.time(), 3)
    try:
        task.store.commit(commit)
    except RuntimeError:
        task.store.withdraw(
            unit.name
        )  # another copy wrote other bytes, and its commit may not vouch for ours
        raise
    return commit


def _count_attempt(unit: Unit, task: Task) -> None:
    """Ray retries a task whose worker died; a unit that kills its worker each time must not be
    retried for ever.
    """
    uri = task.store.uri("attempts", task.invocation, unit.name)
    before = (
        [attempts.post_mortem(dead) for dead in json.loads(read_bytes(uri))] if exists(uri) else []
    )
    if len(before) >= task.attempts:
        raise SetAside(before)
    write_atomically(uri, json.dumps([*before, attempts.attempt()]).encode())


def _cpu_seconds() -> float:
    # of this process; the extractor's child reports its own time with each page
    own = resource.getrusage(resource.RUSAGE_SELF)
    return own.ru_utime + own.ru_stime


# --- second copies of late units ------------------------------------------------------------------


@dataclass(frozen=True)
class _Yielding(Store):
    """A unit's store that lets no output be replaced once another copy is committed, which vouches
    for the bytes there are.
    """

    unit: Unit

    @contextmanager
    def create(self, *parts: str, outputs: list[dict[str, Any]]) -> Iterator[Path]:
        """As in Store. Overtaken if there is a commit."""
        with super().create(*parts, outputs=outputs) as path:
            yield path
            if self.commit_of(self.unit.name) is not None:
                raise Overtaken(f"unit {self.unit.name} was committed by another copy")
