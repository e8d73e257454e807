"""The state of a run: units, work, rates and time left of each phase, from its ledger.

`gristmill status`, the report and the metrics show these numbers.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.run.phases import PHASES
from pipeline.run.results import store_of
from pipeline.run.state import Process, read_state
from stages.storage.ledger import Commit, Commits, Store


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
        listed = store.listed_units()
        commits = store.listed_commits(listed)
        phases[spec.name] = phase_status(spec.name, store, commits, since=since, listed=listed)
    return RunStatus(root, state.stage, state.process, state.generation, phases)


def phase_status(
    name: str,
    store: Store,
    commits: Commits,
    *,
    since: float,
    listed: Mapping[str, str] | None = None,
) -> PhaseStatus:
    """The status of a phase with these commits. `since` is when the latest invocation began;
    `listed` are the store's `listed_units`, which are read if they are not given.
    """
    listed = store.listed_units() if listed is None else listed
    failed = store.failures()
    done = set(commits.units().to_pylist()) if failed else set()
    failures = {u: f for u, f in failed.items() if u in listed and u not in done}
    work = commits.table(*_COLUMNS)
    recent = work.filter(pc.greater_equal(work["finished"], since))
    recent = recent if len(recent) else work
    busy, left = _wall_time(recent), len(listed) - len(work) - len(failures)
    return PhaseStatus(
        name=name,
        units=len(listed),
        done=len(work),
        failed=len(failures),
        left=left,
        errors={unit: f.error for unit, f in failures.items()},
        damage=_damage(work),
        quarantined=sum(f.quarantined == listed[unit] for unit, f in failures.items()),
        rows_in=_total(work, "rows_in"),
        rows_out=_total(work, "rows_out"),
        wall_seconds=_wall_time(work),
        cpu_seconds=_total(work, "cpu_seconds"),
        bytes_read=_bytes_read(work),
        bytes_written=_total(work, "bytes_out"),
        lost_bytes=_total(work, "result.lost_bytes"),
        lost_members=_total(work, "result.lost_members"),
        truncated=_total(work, "result.truncated"),
        reapplied=_total(work, "result.reapplied"),
        rows_per_second=_total(recent, "rows_in") / busy if busy else None,
        bytes_per_second=_bytes_read(recent) / busy if busy else None,
        eta_seconds=busy / len(recent) * left if len(recent) and left else None,
        last_commit=pc.max(work["finished"]).as_py(),
    )


# those of results only extract has
_COLUMNS = (
    *("unit", "rows_in", "rows_out", "bytes_out", "seconds", "cpu_seconds", "finished"),
    *("result.bytes_in", "result.damage", "result.lost_bytes", "result.lost_members"),
    *("result.truncated", "result.reapplied"),
)


def _total(work: pa.Table, column: str) -> Any:
    return pc.sum(work[column]).as_py() or 0


def _damage(work: pa.Table) -> dict[str, str]:
    """What of each damaged input could not be read, by unit."""
    is_damaged = pc.fill_null(pc.not_equal(work["result.damage"].cast(pa.string()), ""), False)
    damaged = work.filter(is_damaged).sort_by("unit")
    return dict(zip(damaged["unit"].to_pylist(), damaged["result.damage"].to_pylist(), strict=True))


def _bytes_read(work: pa.Table) -> int:
    is_read = pc.invert(pc.fill_null(work["result.reapplied"].cast(pa.bool_()), True))
    return int(_total(work.filter(is_read), "result.bytes_in"))


def wall_time(commits: Iterable[Commit]) -> float:
    """Seconds in which at least one of these units was at work."""
    return covered([(c.finished - c.seconds, c.finished) for c in commits])


def _wall_time(work: pa.Table) -> float:
    finished = work["finished"].to_numpy()
    return covered(np.column_stack([finished - work["seconds"].to_numpy(), finished]))


def covered(spans: npt.ArrayLike) -> float:
    """Length of the union of intervals (start, end)."""
    starts, ends = np.asarray(spans, np.float64).reshape(-1, 2).T
    order = np.argsort(starts)
    starts, ends = starts[order], ends[order]
    reached = np.maximum.accumulate(np.append(-math.inf, ends))[:-1]
    return float(np.maximum(0.0, ends - np.maximum(starts, reached)).sum())
