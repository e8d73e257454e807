"""Units that take far longer than the others did, and are begun a second time.

Ray does not start a task twice because it is slow, so the driver does, when processors are idle.
Both tasks write the same bytes under the same names, and the first commit stands.
"""

import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from pipeline.engine.units import PhaseWork, UnitOutcome, do_unit
from stages.storage.ledger import Commit, Unit

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
class Stragglers:
    """The rates of finished units, and since when processors have been idle."""

    patience: float
    rates: list[float] = field(default_factory=list)
    _idle_since: float | None = None
    _looked: float = 0.0

    @property
    def period(self) -> float:
        """Seconds between two looks."""
        return min(5.0, self.patience / 4)

    def are_due(self) -> bool:
        """Whether it is time for another look."""
        return time.monotonic() >= self._looked + self.period

    def note(self, unit: Unit, commit: Commit | None) -> None:
        """Note how fast a unit was."""
        if commit is not None:
            self.rates.append(commit.seconds / max(1, unit.bytes))

    def late(self, units: Sequence[Unit], *, room: int) -> list[Unit]:
        """At most `room` of the units that are late.

        Idle processors mean that all units have been running since they became idle.
        """
        now = self._looked = time.monotonic()
        if room <= 0:
            self._idle_since = None
            return []
        self._idle_since = self._idle_since or now
        waited = now - self._idle_since
        return late_units(units, self.rates, waited=waited, patience=self.patience)[:room]


def run_copy(unit: Unit, work: PhaseWork) -> UnitOutcome | None:
    """Do a unit a second time. None if that fails: the first task is still at work."""
    with suppress(Exception):
        # a commit of another input is for the first task to withdraw
        if work.store.loose_commit(unit.name) is None:
            return UnitOutcome(unit.name, do_unit(unit, work))
    return None
