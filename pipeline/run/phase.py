"""A phase: a set of units that run together under one name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from stages.storage.ledger import Commit, Store, Unit
from stages.storage.parts import PartRef

# phases that most runs do not have
OPTIONAL = {
    "dedup star",
    "dedup index",
    "dedup lines",
    "dedup repeats",
    "dedup cuts",
    "refine names",
}


class Listing(NamedTuple):
    """The units of a phase; what is to be done before they run (small jobs, harmless to do again);
    bytes that a unit needs.

    `memory` 0: what the stage's configuration says.
    """

    units: list[Unit]
    prepare: tuple[Callable[[], None], ...] = ()
    memory: int = 0


@dataclass
class Phase:
    """A phase as it stands: its units, and what they left.

    `commits` are of this phase's units only.
    """

    name: str
    store: Store
    units: list[Unit]
    commits: dict[str, Commit] = field(default_factory=dict)
    prepare: tuple[Callable[[], None], ...] = ()
    memory: int = 0

    @property
    def pending(self) -> list[Unit]:
        """Units without a commit of the same input."""
        return [u for u in self.units if not self._done(u)]

    def ordered(self) -> list[Commit]:
        """Commits of this phase's units, in the units' order; failed ones are missing."""
        return [self.commits[u.name] for u in self.units if self._done(u)]

    def done(self, units: Sequence[Unit]) -> list[Commit] | None:
        """Commits of some units, None if any of them is still to do."""
        if not all(self._done(u) for u in units):
            return None
        return [self.commits[u.name] for u in units]

    def parts(self) -> list[tuple[PartRef, Commit]]:
        """The Parquet part that each unit wrote first."""
        return [(PartRef(c.unit, self.store.uri(c.outputs[0]["path"])), c) for c in self.ordered()]

    def _done(self, unit: Unit) -> bool:
        commit = self.commits.get(unit.name)
        return commit is not None and commit.fingerprint == unit.fingerprint
