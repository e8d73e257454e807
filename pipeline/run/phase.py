"""A phase of a run as it is on disk, and what its units are listed from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pipeline.config.sections import Config
from pipeline.run.inputs import Input
from stages.storage.ledger import Commit, Output, Store, Unit
from stages.storage.parts import PartRef


class PhasePlan(NamedTuple):
    """The units of a phase, and what they need.

    `prepare` are small jobs that run before the units and may run again. `memory` is in bytes per
    unit, 0 for what the stage's configuration says.
    """

    units: Sequence[Unit] = ()
    prepare: tuple[Callable[[], None], ...] = ()
    memory: int = 0


@dataclass
class Phase:
    """A phase on disk: its plan, and the commits of its units."""

    name: str
    store: Store
    units: Sequence[Unit] = ()
    commits: dict[str, Commit] = field(default_factory=dict)
    prepare: tuple[Callable[[], None], ...] = ()
    memory: int = 0

    @property
    def pending(self) -> list[Unit]:
        """Units without a commit of the same input."""
        return [u for u in self.units if not self._is_done(u)]

    def ordered(self) -> list[Commit]:
        """Commits of the phase's units, in the order of the units; failed ones are missing."""
        return [self.commits[u.name] for u in self.units if self._is_done(u)]

    def commits_of(self, units: Sequence[Unit]) -> list[Commit] | None:
        """Commits of some units, None if any of them is pending."""
        if not all(self._is_done(u) for u in units):
            return None
        return [self.commits[u.name] for u in units]

    def parts(self) -> list[tuple[PartRef, Commit]]:
        """The Parquet part that each unit wrote first."""
        return [(PartRef(c.unit, self.store.uri(c.output().path)), c) for c in self.ordered()]

    def outputs(self) -> dict[str, Output]:
        """All files that the phase's units wrote, by path."""
        return {output.path: output for c in self.ordered() for output in c.outputs}

    def _is_done(self, unit: Unit) -> bool:
        commit = self.commits.get(unit.name)
        return commit is not None and commit.fingerprint == unit.fingerprint


class Index(NamedTuple):
    """An earlier batch: URIs of its index, documents and keep table, and the index's commits."""

    root: str
    documents: str
    keep: str
    commits: tuple[Commit, ...]


class PlanContext(NamedTuple):
    """What the units of a phase are listed from.

    `before` are the phases above by name, `here` is the phase itself with its commits so far.
    `reusable_stores` hold the same extraction under other bounds, newest first.
    """

    config: Config
    inputs: Sequence[Input]
    before: Mapping[str, Phase]
    here: Phase
    indexes: Sequence[Index] = ()
    reusable_stores: tuple[str, ...] = ()
