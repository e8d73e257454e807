"""The state of a run: units, work, rates and time left of each phase, from its ledger.

`gristmill status`, the report and the metrics show these numbers.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.run.phases import PHASES
from pipeline.run.results import store_of
from pipeline.run.state import Process, read_state
from stages.extract.extract import ExtractResult
from stages.storage.ledger import Commit, Store


@dataclass(frozen=True)
class PhaseStatus:
    """Units and work of a phase. Sums cover the committed units.

    `errors` are the messages of failed units, by unit; `quarantined` of them run again only after
    `gristmill retry`. `damage` says by unit what of an input could not be read. `wall_seconds` is
    the time in which at least one unit was at work; pauses do not count. `bytes_read` leaves out
    `reapplied` units, which had changed bounds applied to stored scores. Rates and the time left
    are from the units that the latest invocation finished, over their wall time; from all units
    where it has finished none. Times are Unix times.
    """

    name: str
    units: int
    done: int
    failed: int
    left: int
    errors: dict[str, str]
    damage: dict[str, str]
    quarantined: int
    rows_in: int
    rows_out: int
    wall_seconds: float
    cpu_seconds: float
    bytes_read: int
    bytes_written: int
    lost_bytes: int
    lost_members: int
    truncated: int
    reapplied: int
    rows_per_second: float | None
    bytes_per_second: float | None
    eta_seconds: float | None
    last_commit: float | None


@dataclass(frozen=True)
class RunStatus:
    """A run and its phases. `process` is the one that is running."""

    run: str
    stage: str | None
    process: Process | None
    generation: str | None
    phases: dict[str, PhaseStatus]


def run_status(root: str) -> RunStatus:
    """Read the status of a run under the keys that it used last."""
    state = read_state(root)
    since = state.started or 0.0
    phases = {}
    for spec in PHASES:
        store = store_of(root, state, spec.name)
        phases[spec.name] = phase_status(spec.name, store, store.listed_commits(), since=since)
    return RunStatus(root, state.stage, state.process, state.generation, phases)


def phase_status(
    name: str, store: Store, commits: Sequence[Commit], *, since: float
) -> PhaseStatus:
    """The status of a phase with these commits. `since` is when the latest invocation began."""
    listed, done = store.listed_units(), {c.unit for c in commits}
    failures = {u: f for u, f in store.failures().items() if u in listed and u not in done}
    recent = [c for c in commits if c.finished >= since] or commits
    busy, left = wall_time(recent), len(listed) - len(done) - len(failures)
    extracted = _extract_results(commits)
    return PhaseStatus(
        name=name,
        units=len(listed),
        done=len(done),
        failed=len(failures),
        left=left,
        errors={unit: f.error for unit, f in failures.items()},
        damage=damage_of(commits),
        quarantined=sum(f.quarantined == listed[unit] for unit, f in failures.items()),
        rows_in=sum(c.rows_in for c in commits),
        rows_out=sum(c.rows_out for c in commits),
        wall_seconds=wall_time(commits),
        cpu_seconds=sum(c.cpu_seconds for c in commits),
        bytes_read=_bytes_read(commits),
        bytes_written=sum(o.bytes for c in commits for o in c.outputs),
        lost_bytes=sum(r.lost_bytes for r in extracted),
        lost_members=sum(r.lost_members for r in extracted),
        truncated=sum(r.truncated for r in extracted),
        reapplied=sum(r.reapplied for r in extracted),
        rows_per_second=sum(c.rows_in for c in recent) / busy if busy else None,
        bytes_per_second=_bytes_read(recent) / busy if busy else None,
        eta_seconds=busy / len(recent) * left if recent and left else None,
        last_commit=max((c.finished for c in commits), default=None),
    )


def damage_of(commits: Sequence[Commit]) -> dict[str, str]:
    """What of each damaged input could not be read, by unit."""
    return {
        c.unit: c.result.damage
        for c in commits
        if isinstance(c.result, ExtractResult) and c.result.damage
    }


def _bytes_read(commits: Sequence[Commit]) -> int:
    return sum(r.bytes_in for r in _extract_results(commits) if not r.reapplied)


def _extract_results(commits: Sequence[Commit]) -> list[ExtractResult]:
    return [c.result for c in commits if isinstance(c.result, ExtractResult)]


def wall_time(commits: Iterable[Commit]) -> float:
    """Seconds in which at least one of these units was at work."""
    return covered((c.finished - c.seconds, c.finished) for c in commits)


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    length, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length
