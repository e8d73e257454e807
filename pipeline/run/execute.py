"""A run: the stages in order, each resumed from its commits, then publication.

The order: hold the lease; extend the input list; for each phase, list its units and run those
without a commit of the same input; stop if too many failed; publish what pack wrote. All state is
on disk.
"""

import dataclasses
import logging
import uuid
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import NamedTuple, Protocol

from pipeline.config.digests import file_digests
from pipeline.config.sections import Config
from pipeline.config.show import settings
from pipeline.engine.lease import fence, lease
from pipeline.engine.units import PhaseWork, RunUnits, UnitOutcome
from pipeline.run import dedup_plan
from pipeline.run.inputs import Input, extend_list, list_inputs, require_columns
from pipeline.run.keys import stage_keys
from pipeline.run.lineage import Origin, run_name, succession
from pipeline.run.phase import Index, Phase, PlanContext
from pipeline.run.phases import PHASES, SPECS, STAGES, PhaseSpec
from pipeline.run.publish import Published, publish
from pipeline.run.state import IndexRef, RunState, Setting, read_state, state_or_new, write_state
from stages.storage.catalog import read_catalog
from stages.storage.digests import digest
from stages.storage.ledger import Commits, Store, Unit

_LOG = logging.getLogger(__name__)


class RunFailed(RuntimeError):
    """A stage could not be completed. Commits stay, and the same command continues from there."""


class Progress(Protocol):
    """Receives progress events."""

    def begin(self, phase: str, *, run: str, units: int, done: Commits) -> None: ...
    def advance(self, phase: str, outcome: UnitOutcome) -> None: ...
    def end(self, phase: str) -> None: ...


class Outcome(NamedTuple):
    """The result of a run: failed units by phase, and the generation if pack was reached."""

    failed: dict[str, list[str]]
    published: Published | None


class Run:
    """The phases of one configuration in one directory, their state, and how to execute them."""

    def __init__(
        self, config: Config, *, new_lineage: bool = False, publishes: bool = True
    ) -> None:
        self.config, self.new_lineage, self.publishes = config, new_lineage, publishes
        self.root = config.run.directory
        self.catalog = config.run.catalog or self.root
        self.indexes = [
            dedup_plan.published_index(path, config.dedup) for path in config.dedup.against
        ]
        self.files = file_digests(config)
        self.keys = stage_keys(config, self.indexes, self.files)
        self.reusable_stores = self._reusable_stores()
        self.invocation = uuid.uuid4().hex[:12]
        self.phases: dict[str, Phase] = {}

    def store(self, name: str) -> Store:
        """The store of a phase."""
        return SPECS[name].store(self.root, self.keys)

    def inputs(self, *, extend: bool) -> list[Input]:
        """The inputs that the configuration names; `extend`: new ones join the run's list, if they
        may be read and published here (`check`).
        """
        inputs = list_inputs(self.root, self.config.input)
        if extend:
            for warning in self.check(inputs):
                _LOG.warning(warning)
            extend_list(self.root, inputs)
        return inputs

    def read_phase(self, spec: PhaseSpec, inputs: Sequence[Input]) -> Phase:
        """A phase as it is on disk, listed from the phases that were read before it."""
        store = self.store(spec.name)
        phase = Phase(spec.name, store, commits=store.commits())
        context = PlanContext(
            self.config, inputs, self.phases, phase, self.indexes, self.reusable_stores
        )
        phase.units, phase.prepare, phase.memory = spec.list_units(context)
        self.phases[spec.name] = phase
        return phase

    def list_phase(self, spec: PhaseSpec, inputs: Sequence[Input]) -> Phase:
        """As `read_phase`, and record the units: commits of others no longer count."""
        fence()
        self.store(spec.name).seal_loose()
        phase = self.read_phase(spec, inputs)
        phase.store.list_units(phase.units)
        if not phase.pending:
            phase.release()
        return phase

    def state(self) -> RunState:
        """The state that this run found, with its own invocation, keys and settings."""
        state = state_or_new(self.root).begun(self.invocation, self.keys)
        return dataclasses.replace(
            state,
            config={
                key: Setting(None if value == "off" else value, origin)
                for key, value, origin in settings(self.config)
            },
            files=self.files,
            indexes=tuple(IndexRef(index.documents, index.keep) for index in self.indexes),
        )

    def publish_index(self) -> None:
        """Let later batches deduplicate against this one, if it has an index."""
        phase = self.phases.get("dedup index")
        if phase is not None and phase.units:
            documents, kept = self.store("extract").root, self.store("dedup keep").root
            index = Index(phase.store.root, documents, kept, tuple(phase.ordered()))
            dedup_plan.publish_index(self.root, index)

    def publish(self, inputs: Sequence[Input]) -> Published | None:
        """Publish what pack wrote as a generation, None if that is nothing."""
        packed = self.phases["pack"]
        commits = packed.ordered()
        if not any(c.rows_out for c in commits):
            return None
        paths = {i.unit: i.path for i in inputs}
        sources: Counter[str] = Counter()  # of a file that was read in ranges, their sum
        for wrote in self.phases["refine"].written():
            sources[paths[wrote.unit]] += wrote.rows_out
        return publish(
            self.catalog,
            packed.store,
            commits,
            self.config.pack,
            sources=sources,
            origin=self._origin(inputs),
            tokenizer_sha256=self.files.get("pack.tokenizer", ""),
        )

    def check(self, inputs: Sequence[Input]) -> tuple[str, ...]:
        """Warnings of what would be published; ConfigError if it may not be (`succession`), or if
        the inputs lack a column.
        """
        require_columns(inputs, self.config.input)
        if not self.publishes:
            return ()
        entries = read_catalog(self.catalog)
        return succession(self.catalog, entries, self._origin(inputs)).warnings

    def _origin(self, inputs: Sequence[Input]) -> Origin:
        read = self.config.input
        return Origin(
            run_name(self.root, self.catalog),
            frozenset(i.path for i in inputs),
            digest([read.paths, read.base_uri]),
            self.new_lineage,
        )

    def _reusable_stores(self) -> tuple[str, ...]:
        """Stores of the same extraction under other bounds, newest first."""
        ours = self.keys["extract"]
        earlier = [entry.keys["extract"] for entry in reversed(state_or_new(self.root).history)]
        same = dict.fromkeys(k for k in earlier if k[:8] == ours[:8] and k != ours)
        return tuple(f"{self.root}/extract/{key}" for key in same)


def plan(
    config: Config, *, only: str | None, first: str | None, new_lineage: bool = False
) -> list[Phase]:
    """What a run would do: each phase whose units can be known now, with its pending units."""
    run = Run(config, new_lineage=new_lineage, publishes=only in (None, "pack"))
    inputs = run.inputs(extend=False)
    run.check(inputs)
    for spec in PHASES:
        if run.read_phase(spec, inputs).pending:
            break  # what comes after depends on what these units will write
    return [
        phase
        for name, phase in run.phases.items()
        if SPECS[name].stage in _stages(only or first, only)
    ]


def execute(
    config: Config,
    progress: Progress,
    run_units: RunUnits,
    *,
    only: str | None = None,
    first: str | None = None,
    last: str | None = None,
    new_lineage: bool = False,
) -> Outcome:
    """Run all stages, or stages `first` to `last`, or stage `only`; earlier ones must be done.

    `new_lineage`: supersede nothing. Raises Held, RunFailed, PublishError or ValueError.
    """
    first, last = only or first, only or last
    with lease(config.run.directory):
        run = Run(config, new_lineage=new_lineage, publishes=last in (None, "pack"))
        inputs = run.inputs(extend=True)
        asked = "pack" if only else last or "pack"
        state = run.state().at_work(stage="extract", generation=None, last=asked)
        write_state(run.root, state)
        failed: dict[str, list[str]] = {}
        for spec in PHASES:
            if spec.stage not in _stages(None, last):
                break
            phase = run.list_phase(spec, inputs)
            if spec.stage not in _stages(first, last):
                _require_done(phase, spec, config)
                continue
            write_state(run.root, state.at_work(stage=spec.name))
            if errors := run_phase(run, spec, phase, progress, run_units):
                failed[spec.name] = errors
            while spec.in_rounds and (phase := run.list_phase(spec, inputs)).pending:
                run_phase(run, spec, phase, progress, run_units)
            phase.release()
        published = run.publish(inputs) if "pack" in run.phases else None
        if published or ("pack" not in run.phases and only is None):
            run.publish_index()
        done = dataclasses.replace(
            state,
            process=None,
            stage=only if only and only != "pack" else "done",
            generation=published.name if published else None,
        )
        write_state(run.root, done)
        return Outcome(failed, published)


def _stages(first: str | None, last: str | None) -> tuple[str, ...]:
    """The stages from `first` to `last`, by default from the start or to the end."""
    return STAGES[STAGES.index(first or "extract") : STAGES.index(last or "pack") + 1]


def _require_done(phase: Phase, spec: PhaseSpec, config: Config) -> None:
    failed = phase.store.failures()
    bearable = spec.max_failed_share(config) * len(phase.units)
    if any(u.name not in failed for u in phase.pending) or len(phase.pending) > bearable:
        raise RunFailed(
            f"stage '{spec.stage}' has {len(phase.pending)} of {len(phase.units)} units to do "
            "under this config; run without --from and --only, or from that stage"
        )


def run_phase(
    run: Run, spec: PhaseSpec, phase: Phase, progress: Progress, run_units: RunUnits
) -> list[str]:
    """Do the pending units of a phase; returns the errors of those that failed.

    RunFailed if there are more than the configuration allows.
    """
    if not phase.units:
        return []
    pending = phase.pending
    if pending:
        for step in phase.prepare:
            step()
        phase.withdraw_stale(unlisted=spec.named_by_input)
    progress.begin(phase.name, run=run.root, units=len(phase.units), done=phase.ordered())
    errors = []
    # closed, so that no unit is at work once an error has freed the lease
    with closing(_outcomes(run, spec, phase, pending, run_units)) as outcomes:
        for outcome in outcomes:
            progress.advance(phase.name, outcome)
            if outcome.commit is not None:
                phase.add(outcome.commit)
            else:
                errors.append(f"{outcome.unit}: {outcome.error}")
    progress.end(phase.name)
    phase.store.clear("attempts", run.invocation)
    _check_failures(spec, phase, errors, run.config)
    return errors


def _outcomes(
    run: Run, spec: PhaseSpec, phase: Phase, pending: Sequence[Unit], run_units: RunUnits
) -> Generator[UnitOutcome]:
    """How each pending unit ends, as it ends."""
    quarantined = _quarantined(phase, pending)
    yield from quarantined.values()
    pending = [unit for unit in pending if unit.name not in quarantined]
    attempts = run.config.run.attempts
    work = PhaseWork(
        spec.work, spec.plan(run.config, run.files), phase.store, attempts, run.invocation
    )
    resources = spec.resources(run.config)
    resources = resources._replace(memory=max(resources.memory, phase.memory))
    if pending:
        yield from run_units(phase.name, work, pending, resources)


def _quarantined(phase: Phase, pending: Sequence[Unit]) -> dict[str, UnitOutcome]:
    """Outcomes of pending units that an earlier run quarantined, for the same input, by unit."""
    fingerprints = {unit.name: unit.fingerprint for unit in pending}
    failures = phase.store.failures() if pending else {}
    return {
        name: UnitOutcome(name, None, failure.error)
        for name, failure in failures.items()
        if failure.quarantined and failure.quarantined == fingerprints.get(name)
    }


def _check_failures(spec: PhaseSpec, phase: Phase, errors: list[str], config: Config) -> None:
    """RunFailed when more units failed than the configuration allows, by share or by number."""
    share, most = spec.max_failed_share(config), config.run.max_failed_units
    by_share = len(errors) > share * len(phase.units)
    if by_share or (most is not None and len(errors) > most):
        limit = f"share allows {share:.1%}" if by_share else f"units allows {most}"
        shown = "\n  ".join(errors[:5])
        raise RunFailed(
            f"{len(errors)} of {len(phase.units)} units of '{phase.name}' failed "
            f"(run.max_failed_{limit}):\n  {shown}\nDetails: {phase.store.uri('failures')}. "
            "The same command tries them again, except quarantined ones: see `gristmill retry`."
        )


def forget_failures(root: str, units: Sequence[str]) -> list[tuple[str, str]]:
    """Forget why units failed or were quarantined, all by default; returns them as (phase, unit).

    FileNotFoundError if there is no run, Held if it is running, ValueError names a unit that did
    not fail.
    """
    read_state(root)  # before the lease makes a directory of it
    with lease(root):
        keys = read_state(root).keys
        stores = {spec.name: spec.store(root, keys) for spec in PHASES}
        failed = [(phase, unit) for phase, store in stores.items() for unit in store.failures()]
        names = {unit for _, unit in failed}
        for name in units:
            if name not in names:
                known = ", ".join(sorted(names)) or "none"
                raise ValueError(f"unit '{name}' has not failed; failed: {known}")
        forgotten = [(phase, unit) for phase, unit in failed if not units or unit in units]
        for phase, unit in forgotten:
            stores[phase].clear_failure(unit)
    return forgotten
