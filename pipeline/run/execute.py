"""A run: the stages in order, each resumed from its commits, then publication. State on disk only.

Order of things: hold the lease; extend the input list; for each stage, derive its key from what it
depends on, list its units, run those without a commit of the same input; stop if too many failed;
publish what pack wrote.
"""

import dataclasses
import itertools
import json
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

from pipeline.config.digests import file_digests
from pipeline.config.sections import Config
from pipeline.config.show import show
from pipeline.engine import units as engine
from pipeline.engine.lease import lease
from pipeline.run import dedup_plan, publish
from pipeline.run.keys import extract_plan, refine_plan, stage_keys, store_uri
from pipeline.run.phase import Listing, Phase
from pipeline.run.state import Input, read_state
from stages.dedup import dedup, keep, lines
from stages.extract import extract
from stages.pack import pack
from stages.read.fetch import expand_inputs, fingerprint
from stages.refine import ner, refine
from stages.storage.digests import digest
from stages.storage.files import exists, read_bytes, write_atomically
from stages.storage.ledger import Commit, Store, Unit
from stages.storage.parts import unit_name

STAGES = ("extract", "dedup", "refine", "pack")
# phases whose outputs bear other names than their units, so that another unit's may take their
# place
_BY_PART = ("dedup keep", "dedup cuts")


class RunFailed(RuntimeError):
    """A stage could not be completed; what was committed stays, and the same command goes on from
    there.
    """


class Progress(Protocol):
    """Who is told how a run comes along."""

    def begin(self, phase: str, *, run: str, units: int, done: Sequence[Commit]) -> None: ...
    def advance(self, phase: str, done: engine.Done) -> None: ...
    def end(self, phase: str) -> None: ...


class Outcome(NamedTuple):
    """What a run came to: failed units by phase, and the generation, if pack was reached."""

    failed: dict[str, list[str]]
    published: publish.Published | None


# --- keys -----------------------------------------------------------------------------------------


def _fingerprint(path: str) -> str:
    try:
        return fingerprint(path)
    except FileNotFoundError:
        return "missing"  # its unit will fail, and say so; the others go on


# --- plans ----------------------------------------------------------------------------------------


def _tasks(config: Config) -> Sequence["StageTask"]:
    def of(section: Any) -> engine.Resources:
        return engine.Resources(section.num_cpus, section.memory, section.parallelism)

    return (
        StageTask("extract", extract.extract_unit, extract_plan(config), of(config.extract)),
        *(StageTask(phase, work, config.dedup, of(config.dedup)) for phase, work in DEDUP.items()),
        StageTask("refine", refine.refine_unit, refine_plan(config), of(config.refine)),
        StageTask(
            "refine names",
            ner.names_unit,
            ner.NamesPlan(config.ner),
            of(config.refine)._replace(actors=True),
        ),
        StageTask(
            "pack", pack.pack_unit, pack.PackPlan(config.pack, config.run.seed), of(config.pack)
        ),
    )


DEDUP: dict[str, engine.Work] = {
    "dedup sort": dedup.sort_unit,
    "dedup match": dedup.match_unit,
    "dedup star": dedup.star_unit,
    "dedup cluster": dedup.cluster_unit,
    "dedup rank": keep.rank_unit,
    "dedup elect": keep.elect_unit,
    "dedup keep": keep.keep_unit,
    "dedup alarm": keep.alarm_unit,
    "dedup index": dedup.index_unit,
    "dedup lines": lines.lines_unit,
    "dedup repeats": lines.repeats_unit,
    "dedup cuts": lines.cuts_unit,
}


class StageTask(NamedTuple):
    """What does the units of a phase, with which plan and resources."""

    phase: str
    work: engine.Work
    plan: Any
    resources: engine.Resources


# --- the run --------------------------------------------------------------------------------------


class Run:
    """One configuration in one directory: which phases there are, in which state, and how to bring
    them on.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.root = config.run.directory
        self.indexes = dedup_plan.published_indexes(config.dedup)
        self.files = file_digests(config)
        self.keys = stage_keys(config, self.indexes, self.files)
        self.tasks = {task.phase: task for task in _tasks(config)}
        self.invocation = uuid.uuid4().hex[:12]

    def store(self, phase: str) -> Store:
        """Where a phase keeps its units."""
        return Store(store_uri(self.root, self.keys, phase))

    def phase(self, name: str, before: dict[str, Phase], inputs: Sequence[Input]) -> Phase:
        """A phase as it stands on disk, given the phases above it."""
        phase = Phase(name, self.store(name), [])
        known = phase.store.commits()
        phase.commits = known  # the rounds of 'dedup star' are listed from those that are done
        if name in dedup_plan.LISTINGS:
            listing = dedup_plan.LISTINGS[name](
                dedup_plan.Plan(
                    self.config.dedup, self.config.run.seed, before, phase, self.indexes
                )
            )
        else:
            listing = _UNITS[name](self, before, inputs)
        done = {u.name: known[u.name] for u in listing.units if u.name in known}
        return Phase(name, phase.store, listing.units, done, listing.prepare, listing.memory)

    def inputs(self, *, extend: bool) -> list[Input]:
        """The inputs that the configuration names, numbered by the run's list; new ones are
        appended to it if `extend`.
        """
        uri = f"{self.root}/inputs.jsonl"
        numbered = {}
        if exists(uri):
            numbered = {
                r["path"]: r["ordinal"] for r in map(json.loads, read_bytes(uri).splitlines())
            }
        paths = expand_inputs(list(self.config.input.paths), base_uri=self.config.input.base_uri)
        paths = [
            p for p in paths if not p.startswith(f"{self.root}/")
        ]  # a run does not read what it wrote
        for path in paths:
            numbered.setdefault(path, len(numbered))
        if extend:
            lines = "".join(
                json.dumps({"ordinal": n, "path": p}) + "\n" for p, n in numbered.items()
            )
            write_atomically(uri, lines.encode())
        with ThreadPoolExecutor(32) as pool:
            return [
                Input(numbered[p], p, f)
                for p, f in zip(paths, pool.map(_fingerprint, paths), strict=True)
            ]

    def publish_index(self, phase: Phase) -> None:
        """Let later batches deduplicate against this one."""
        documents, kept = (self.store(name).root for name in ("extract", "dedup keep"))
        dedup_plan.publish_index(
            self.root, dedup_plan.Index(phase.store.root, documents, kept, tuple(phase.ordered()))
        )

    def remember(self, **state: Any) -> None:
        """Write run.json: what this directory holds, for status, report and the like.

        Derivable, never relied on to resume.
        """
        values = {
            key: {"value": value, "origin": origin} for key, value, origin in show(self.config)
        }
        before = read_state(self.root) if exists(f"{self.root}/run.json") else {}
        indexes = [{"documents": index.documents, "keep": index.keep} for index in self.indexes]
        now = {
            "invocation": self.invocation,
            "keys": self.keys,
            "config": values,
            "files": self.files,
            "indexes": indexes,
            **state,
        }
        history = [*before.get("history", [])[-99:]]
        if before.get("invocation") != self.invocation:
            history.append(
                {"invocation": self.invocation, "started": round(time.time(), 3), "keys": self.keys}
            )
        write_atomically(
            f"{self.root}/run.json",
            json.dumps(before | now | {"history": history}, indent=1).encode(),
        )


def plan(config: Config, *, only: str | None, first: str | None) -> list[Phase]:
    """What a run would do, without doing it: each phase whose units can be known now, with its
    pending units.
    """
    run = Run(config)
    phases: dict[str, Phase] = {}
    inputs = run.inputs(extend=False)
    for name in run.tasks:
        phases[name] = run.phase(name, phases, inputs)
        if phases[name].pending:
            break  # what comes after depends on what these units will write
    return [
        p
        for p in phases.values()
        if _wanted(p.name, only or first) and only in (None, p.name.split()[0])
    ]


def execute(
    config: Config,
    progress: Progress,
    run_units: engine.RunUnits,
    *,
    only: str | None = None,
    first: str | None = None,
    last: str | None = None,
) -> Outcome:
    """Bring a run to its end, or through stages `first` to `last`, or stage `only`; those before
    must be done.

    Held, RunFailed, PublishError or ValueError say why it cannot.
    """
    first, last = only or first, only or last
    with lease(config.run.directory):
        run = Run(config)
        inputs = run.inputs(extend=True)
        run.remember(
            stage="extract", generation=None, pid=_pid(), last="pack" if only else last or "pack"
        )
        phases: dict[str, Phase] = {}
        failed: dict[str, list[str]] = {}
        wanted = [
            n for n in run.tasks if last is None or STAGES.index(n.split()[0]) <= STAGES.index(last)
        ]
        for name in wanted:
            phase = phases[name] = run.phase(name, phases, inputs)
            phase.store.list_units(phase.units)
            if not _wanted(name, first):
                _require_done(phase, _share(name, config))
                continue
            run.remember(stage=name, pid=_pid())
            errors = run_phase(run, phase, progress, run_units)
            while (
                name == "dedup star"
                and not errors
                and (phase := run.phase(name, phases, inputs)).pending
            ):
                phases[name] = phase  # the next round
                phase.store.list_units(phase.units)
                errors = run_phase(run, phase, progress, run_units)
            if errors:
                failed[name] = errors
            check_failures(phase, errors, _share(name, config), config.run.max_failed_units)
        if "pack" not in wanted:
            if only is None and phases["dedup index"].units:
                run.publish_index(phases["dedup index"])
            run.remember(stage="done" if only is None else only, pid=None)
            return Outcome(failed, None)
        published = _publish(run, phases, inputs)
        if published and phases["dedup index"].units:
            run.publish_index(phases["dedup index"])
        run.remember(stage="done", generation=published.name if published else None, pid=None)
        return Outcome(failed, published)


def _pid() -> dict[str, Any]:
    import os
    import socket

    return {"host": socket.gethostname(), "pid": os.getpid()}


def _wanted(phase: str, first: str | None) -> bool:
    return first is None or STAGES.index(phase.split()[0]) >= STAGES.index(first)


def _share(phase: str, config: Config) -> float:
    # a missing part of documents or corpus is a loss that can be borne; missing edges would be
    # duplicates let through unseen, and a missing group of packed rows a generation that is not
    # what it says
    return config.run.max_failed_share if phase in ("extract", "refine", "refine names") else 0.0


def _require_done(phase: Phase, max_failed_share: float) -> None:
    failed = phase.store.failures()
    if any(u.name not in failed for u in phase.pending) or len(
        phase.pending
    ) > max_failed_share * len(phase.units):
        raise RunFailed(
            f"stage '{phase.name.split()[0]}' has {len(phase.pending)} of {len(phase.units)} units to do under this config; "
            "run without --from and --only, or from that stage"
        )


def run_phase(run: Run, phase: Phase, progress: Progress, run_units: engine.RunUnits) -> list[str]:
    """Do what is pending of a phase; the errors of the units that failed."""
    task = run.tasks[phase.name]
    plan = task.plan
    if phase.name == "extract":
        plan = dataclasses.replace(plan, reusable_stores=_reusable_stores(run))
    pending = phase.pending
    if not phase.units:
        return []
    if pending:
        for step in phase.prepare:
            step()
        if phase.name in _BY_PART:
            _withdraw_unlisted(phase)
    progress.begin(phase.name, run=run.root, units=len(phase.units), done=phase.ordered())
    errors = []
    aside = _set_aside(phase)
    pending = [unit for unit in pending if unit.name not in {done.unit for done in aside}]
    shipped = engine.Task(task.work, plan, phase.store, run.config.run.attempts, run.invocation)
    resources = task.resources._replace(memory=max(task.resources.memory, phase.memory))
    ends = run_units(phase.name, shipped, pending, resources) if pending else iter(())
    for done in itertools.chain(aside, ends):
        progress.advance(phase.name, done)
        if done.commit is not None:
            phase.commits[done.unit] = done.commit
        else:
            errors.append(f"{done.unit}: {done.error}")
    progress.end(phase.name)
    phase.store.clear("attempts", run.invocation)
    return errors


def _set_aside(phase: Phase) -> list[engine.Done]:
    """What an earlier run set aside of this phase's pending units, for the same input: it would
    kill workers again.
    """
    failures = phase.store.failures() if phase.pending else {}
    found = [(unit, failures[unit.name]) for unit in phase.pending if unit.name in failures]
    return [
        engine.Done(unit.name, None, r["error"])
        for unit, r in found
        if r.get("set_aside") == unit.fingerprint
    ]


def forget_failures(root: str, units: Sequence[str]) -> list[tuple[str, str]]:
    """Forget why units of a run failed or were set aside, all if none is named; returns them as
    (phase, unit).

    FileNotFoundError if there is no run, Held if it is at work, ValueError names a unit that did
    not fail.
    """
    read_state(root)  # before a lease file makes a directory of it
    with lease(root):
        keys = read_state(root)["keys"]
        stores = {phase: Store(store_uri(root, keys, phase)) for phase in (*_UNITS, *DEDUP)}
        failed = [(phase, unit) for phase, store in stores.items() for unit in store.failures()]
        for name in units:
            if name not in [unit for _, unit in failed]:
                raise ValueError(
                    f"unit '{name}' has not failed; failed: {', '.join(sorted({u for _, u in failed})) or 'none'}"
                )
        forgotten = [(phase, unit) for phase, unit in failed if not units or unit in units]
        for phase, unit in forgotten:
            stores[phase].clear_failure(unit)
    return forgotten


def _withdraw_unlisted(phase: Phase) -> None:
    """Take back the commits of units that are none any more, before their outputs are replaced."""
    listed = {u.name: u.fingerprint for u in phase.units}
    for name, commit in phase.store.commits().items():
        if listed.get(name) != commit.fingerprint:
            phase.store.withdraw(name)


def _reusable_stores(run: Run) -> tuple[str, ...]:
    """Stores of the same content under another policy, newest first."""
    mine = run.keys["extract"]
    state = read_state(run.root)
    keys = [h["keys"]["extract"] for h in reversed(state.get("history", []))]
    same = dict.fromkeys(k for k in keys if k[:8] == mine[:8] and k != mine)
    return tuple(f"{run.root}/extract/{key}" for key in same)


def check_failures(
    phase: Phase, errors: list[str], max_failed_share: float, max_failed_units: int | None = None
) -> None:
    """RunFailed when more units failed than may, by their share or by their number."""
    by_share = len(errors) > max_failed_share * len(phase.units)
    if by_share or (max_failed_units is not None and len(errors) > max_failed_units):
        allowed = (
            f"share allows {max_failed_share:.1%}"
            if by_share
            else f"units allows {max_failed_units}"
        )
        shown = "\n  ".join(errors[:5])
        raise RunFailed(
            f"{len(errors)} of {len(phase.units)} units of '{phase.name}' failed (run.max_failed_{allowed}):\n  {shown}\n"
            f"Details: {phase.store.uri('failures')}. The same command tries them again, but those set aside: `gristmill retry`."
        )


def _publish(
    run: Run, phases: dict[str, Phase], inputs: Sequence[Input]
) -> publish.Published | None:
    commits = phases["pack"].ordered()
    if not any(c.rows_out for c in commits):
        return None
    by_unit = {unit_name(i.ordinal): i.path for i in inputs}
    sources = {by_unit[c.unit]: c.rows_out for c in phases["refine"].ordered()}
    return publish.publish(
        run.config.run.catalog or run.root,
        phases["pack"].store,
        commits,
        run.config.pack,
        sources=sources,
    )


# --- units of each phase --------------------------------------------------------------------------


def _extract_units(run: Run, before: dict[str, Phase], inputs: Sequence[Input]) -> Listing:
    in_order = sorted(
        inputs
    )  # of their numbers: ids ascend from unit to unit, whenever an input came to the list
    return Listing([Unit(unit_name(i.ordinal), i.fingerprint, _extract_task(i)) for i in in_order])


def _extract_task(i: Input) -> dict[str, Any]:
    return {"path": i.path, "ordinal": i.ordinal, "bytes": i.bytes or 0}


def _refine_units(run: Run, before: dict[str, Phase], inputs: Sequence[Input]) -> Listing:
    tables: dict[str, tuple[str, str]] = {}
    for phase in (before["dedup keep"], before["dedup cuts"]):
        tables |= {
            o["path"]: (phase.store.uri(o["path"]), o["sha256"])
            for c in phase.ordered()
            for o in c.outputs
        }
    units = []
    for part, commit in before["extract"].parts():
        keep, cuts = (
            tables.get(f"keep/{part.unit}.parquet"),
            tables.get(f"cuts/{part.unit}.parquet", (None, None)),
        )
        if keep:
            task = {
                "documents": part.uri,
                "keep": keep[0],
                "cuts": cuts[0],
                "bytes": commit.outputs[0]["bytes"],
            }
            units.append(Unit(part.unit, digest([commit.digest, keep[1], cuts[1]]), task))
    return Listing(units)


def _names_units(run: Run, before: dict[str, Phase], inputs: Sequence[Input]) -> Listing:
    if not run.config.ner.enabled:
        return Listing([])
    outputs = [
        (c, o)
        for c in before["refine"].ordered()
        for o in c.outputs
        if o["path"].startswith("corpus/")
    ]
    uri = before["refine"].store.uri
    return Listing(
        [
            Unit(c.unit, o["sha256"], {"corpus": uri(o["path"]), "bytes": o["bytes"]})
            for c, o in outputs
        ]
    )


def _pack_units(run: Run, before: dict[str, Phase], inputs: Sequence[Input]) -> Listing:
    source = before["refine names" if run.config.ner.enabled else "refine"]
    parts = []
    for commit in source.ordered():
        output = next(o for o in commit.outputs if o["path"].startswith("corpus/"))
        if commit.rows_out:
            parts.append(
                pack.CorpusPart(
                    commit.unit, source.store.uri(output["path"]), output["bytes"], output["sha256"]
                )
            )
    groups = pack.group_parts(
        parts, group_bytes=run.config.pack.group_bytes, seed=run.config.run.seed
    )
    tasks = [{"parts": list(g), "bytes": sum(p.bytes for p in g)} for g in groups]
    return Listing(
        [
            Unit(f"{n:05d}", digest([p.digest for p in g]), t)
            for n, (g, t) in enumerate(zip(groups, tasks, strict=True))
        ]
    )


_UNITS: dict[str, Callable[[Run, dict[str, Phase], Sequence[Input]], Listing]] = {
    "extract": _extract_units,
    "refine": _refine_units,
    "refine names": _names_units,
    "pack": _pack_units,
}
