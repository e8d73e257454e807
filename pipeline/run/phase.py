"""A phase of a run as it is on disk, and what its units are listed from."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config.sections import Config
from pipeline.engine.lease import fence
from pipeline.run.inputs import Input
from stages.storage.commits import Written, input_key
from stages.storage.ledger import Commit, Commits, Output, Store, Unit
from stages.storage.parts import PartRef

_PIECE = 10_000


class PhasePlan(NamedTuple):
    """The units of a phase in order of names (`unit_order`), and what they need.

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
    commits: Commits = field(default_factory=Commits)
    prepare: tuple[Callable[[], None], ...] = ()
    memory: int = 0

    @property
    def pending(self) -> list[Unit]:
        """Units without a commit of the same input."""
        is_done = pc.is_in(_keys(self.units), value_set=self.commits.keys())
        return list(compress(self.units, pc.invert(is_done).to_pylist()))

    def add(self, commit: Commit) -> None:
        """Add the commit of a unit that was pending and has ended."""
        self.commits.add(commit)
        if self.store.is_segment(self.commits.loose):
            fence()  # or it would count more than what another run has done since
            self.commits.replace_loose(self.store.seal([*self.commits.loose.values()]))

    def ordered(self) -> Commits:
        """Commits of the phase's units, in the order of the units; failed ones are missing."""
        return self.commits.select(_keys(self.units))

    def commits_of(self, units: Sequence[Unit]) -> Commits | None:
        """Commits of some units, None if any of them is pending."""
        commits = self.commits.select(_keys(units))
        return commits if len(commits) == len(units) else None

    def release(self) -> None:
        """Forget the tasks of units that are done: of a million units they take half a gigabyte."""
        self.units = [Unit(u.name, u.fingerprint, None) for u in self.units]

    def withdraw_stale(self, *, unlisted: bool) -> None:
        """Withdraw commits of units that have another input now, before outputs are replaced;
        `unlisted`: those of units that are no longer listed, too.
        """
        stale = self.commits.select(_keys(self.units), others=True)
        names = stale.units()
        if not unlisted:
            names = names.filter(
                pc.is_in(names, value_set=pa.array((u.name for u in self.units), pa.string()))
            )
        if len(names):
            self.store.withdraw_all(names.to_pylist())
            self.commits = self.store.commits()

    def written(self) -> Iterator[Written]:
        """What the phase's units wrote, in the order of the units."""
        return self.ordered().written()

    def parts(self) -> Iterator[tuple[PartRef, Written]]:
        """The Parquet part that each unit wrote first."""
        return ((PartRef(w.unit, self.store.uri(w.output().path)), w) for w in self.written())

    def outputs(self) -> dict[str, Output]:
        """All files that the phase's units wrote, by path."""
        return {output.path: output for w in self.written() for output in w.outputs}


def _keys(units: Sequence[Unit]) -> pa.Array:
    def keys(some: Sequence[Unit]) -> pa.Array:
        return pa.array([input_key(u.name, u.fingerprint) for u in some], pa.string())

    # in pieces: a million strings of Python would take 200 MB
    pieces = [keys(units[first : first + _PIECE]) for first in range(0, len(units), _PIECE)]
    return pa.concat_arrays([*pieces, keys(())])


class Index(NamedTuple):
    """An earlier batch: URIs of its index, documents and keep table, and the index's commits."""

    root: str
    documents: str
    keep: str
    commits: Sequence[Commit]


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
