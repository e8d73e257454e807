"""The units of the dedup phases: how documents are grouped, rows partitioned, and rounds ended.

    sort -> match -> (star, only for graphs beyond dedup.cluster_memory) -> cluster -> rank -> elect
    -> keep -> alarm, index, and if asked for, lines -> repeats -> cuts

Every arrow is a shuffle (stages.dedup.shuffle). Units follow from commit records alone, so a run
that was killed lists the same units again.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.run.phase import Index, Phase, PhasePlan, PlanContext
from stages.dedup import cluster, keep, keys, lines, shuffle
from stages.dedup.cluster import ClusterTask, StarTask
from stages.dedup.components import estimated_bytes
from stages.dedup.config import DedupConfig
from stages.dedup.keep import HeavyLoss, KeepTask, RankTask
from stages.dedup.keys import KeysResult, SortTask
from stages.dedup.lines import LinesTask
from stages.dedup.shuffle import Layout, PartitionTask, Shuffle, Source
from stages.formats.document import POSITION_BITS
from stages.formats.errors import ConfigError
from stages.storage.digests import digest
from stages.storage.files import exists, read_bytes, write_atomically
from stages.storage.ledger import Commit, Store, Unit
from stages.storage.parts import PartRef

# of the alternating algorithm, which needs O(log^2 n); seen: 40 for an ascending chain of a million
MAX_ROUNDS = 99


class Group(NamedTuple):
    """Documents parts that are sorted into one file."""

    number: int
    parts: tuple[PartRef, ...]
    identity: str

    @property
    def name(self) -> str:
        """Name of the units that work on this group."""
        return f"{self.number:05d}"

    def unit(self, task: Any, *identity: Any) -> Unit:
        """A unit that works on this group; `identity` is of what else it reads."""
        return Unit(self.name, digest([self.identity, *identity]), task)


class SortedFiles(NamedTuple):
    """Sorted files that a shuffle reads, and the commits of the units that wrote them."""

    sources: list[Source]
    commits: list[Commit]

    @property
    def digests(self) -> list[str]:
        """The identity of the files."""
        return [c.digest for c in self.commits]

    @property
    def rows(self) -> int:
        """Number of rows. Of keys there are several per document."""
        return sum(
            c.result.rows if isinstance(c.result, KeysResult) else c.rows_out for c in self.commits
        )


# --- indexes of earlier batches -------------------------------------------------------------------


def published_index(path: str, config: DedupConfig) -> Index:
    """The index of a run that `dedup.against` names.

    ConfigError if it is missing, was made with other settings, or has changed.
    """
    uri = f"{path}/index.json"
    if not exists(uri):
        raise ConfigError(
            f"dedup.against: {path} has no published index; run it with "
            "dedup.write_index=kept (or all)"
        )
    entry = json.loads(read_bytes(uri))
    try:
        keys.require_same_keys(entry["keys"], config, uri)
    except ValueError as error:
        raise ConfigError(f"dedup.against: {error}") from None
    root, documents, kept = (f"{path}/{entry[name]}" for name in ("root", "documents", "keep"))
    units = entry["units"]
    commits = {c.unit: c for c in Store(root, KeysResult).commits() if c.unit in units}
    if units != {name: commit.digest for name, commit in commits.items()}:
        raise ConfigError(
            f"dedup.against: the index of {path} is not the one that was published; "
            "run its batch again"
        )
    return Index(root, documents, kept, tuple(commits[name] for name in units))


def publish_index(run: str, index: Index) -> None:
    """Let later batches find this index, in place of an earlier one of the same run."""
    entry = {
        "root": index.root.removeprefix(f"{run}/"),
        "documents": index.documents.removeprefix(f"{run}/"),
        "keep": index.keep.removeprefix(f"{run}/"),
        "keys": index.commits[0].result.keys,
        "units": {c.unit: c.digest for c in index.commits},
    }
    write_atomically(f"{run}/index.json", json.dumps(entry, indent=1).encode())


# --- units of each phase --------------------------------------------------------------------------


def groups(context: PlanContext) -> list[Group]:
    """Documents parts in order, cut into groups of about `documents_per_unit` documents.

    An input that is added later joins the last group or begins a new one.
    """
    found: list[Group] = []
    parts: list[PartRef] = []
    digests: list[str] = []
    documents, most = 0, context.config.dedup.documents_per_unit
    for part, commit in context.before["extract"].parts():
        if parts and documents + commit.rows_out > most:
            found.append(Group(len(found), tuple(parts), digest(digests)))
            parts, digests, documents = [], [], 0
        parts.append(part)
        digests.append(commit.digest)
        documents += commit.rows_out
    return [*found, Group(len(found), tuple(parts), digest(digests))] if parts else found


def sort_units(context: PlanContext) -> PhasePlan:
    if not context.config.dedup.enabled:
        return PhasePlan()
    return PhasePlan([Unit(g.name, g.identity, SortTask(g.parts)) for g in groups(context)])


def match_units(context: PlanContext) -> PhasePlan:
    files = _sorted_files(context, "sort", "keys")
    if not files.sources:
        return PhasePlan()
    for number, index in enumerate(context.indexes):
        tag = keys.index_tag(number)
        files.sources.extend(Source(f"{index.root}/keys/{c.unit}", tag) for c in index.commits)
        files.commits.extend(index.commits)
    return _partition_units(context, files, context.config.dedup.layout)


def star_units(context: PlanContext) -> PhasePlan:
    """All rounds so far, and the next one if they are done and the last two changed something."""
    if not _in_rounds(context):
        return PhasePlan()
    units = [
        Unit(f"00-{n:05d}", digest(commit.digest), StarTask("read", (part.uri,)))
        for n, (part, commit) in enumerate(context.before["dedup match"].parts())
    ]
    listed, plan = units, PhasePlan()
    rounds: list[Sequence[Commit]] = []
    while (commits := context.here.commits_of(units)) is not None:
        rounds.append(commits)
        if _settled(rounds):
            break
        if len(rounds) > MAX_ROUNDS:
            raise RuntimeError(
                f"dedup star has not settled after {MAX_ROUNDS} rounds; report this bug"
            )
        plan = _partitions(context, _files_of_round(context.here, commits), cluster.EDGES)
        units = [
            unit._replace(
                name=f"{len(rounds):02d}-{unit.name}",
                task=StarTask("large" if len(rounds) % 2 else "small", partition=unit.task),
            )
            for unit in plan.units
        ]
        listed = [*listed, *units]
    return plan._replace(units=listed)


def cluster_units(context: PlanContext) -> PhasePlan:
    """One unit for the whole graph, or one per partition of the last round of stars."""
    if not context.before["dedup sort"].units:
        return PhasePlan()
    first_ids = [int(g.parts[0].unit) << POSITION_BITS for g in groups(context)]
    uri = context.here.store.uri(f"groups-{digest(first_ids)}.parquet")
    write_groups = partial(_write_groups, uri, first_ids)
    if not _in_rounds(context):
        edges = list(context.before["dedup match"].parts())
        identity = digest([first_ids, [commit.digest for _, commit in edges]])
        task = ClusterTask(uri, tuple(part.uri for part, _ in edges))
        return PhasePlan([Unit("all", identity, task)], (write_groups,), _graph_bytes(context))
    stars = context.before["dedup star"]
    last = max(c.unit[:2] for c in stars.ordered())
    files = _files_of_round(stars, [c for c in stars.ordered() if c.unit.startswith(last)])
    plan = _partitions(context._replace(here=stars), files, cluster.EDGES, first_ids)
    units = [u._replace(task=ClusterTask(uri, partition=u.task)) for u in plan.units]
    return PhasePlan(units, (*plan.prepare, write_groups))


def rank_units(context: PlanContext) -> PhasePlan:
    """One unit per group; with earlier batches, one more for their documents."""
    if not context.before["dedup sort"].units:
        return PhasePlan()
    labels, labeled = _labels(context)
    ranked = groups(context)
    if context.indexes:
        ranked = [*ranked, Group(len(ranked), (), "earlier")]
    units = [
        group.unit(
            RankTask(group.number, group.parts, labels.uri),
            digest(labeled),
            context.config.dedup.keep_rule,
        )
        for group in ranked
    ]
    return PhasePlan(units, (partial(shuffle.transpose, labels),))


def elect_units(context: PlanContext) -> PhasePlan:
    plan = _partition_units(context, _sorted_files(context, "rank", "candidates"), keep.CANDIDATES)
    return _answering(plan, context, more=1)


def keep_units(context: PlanContext) -> PhasePlan:
    """One unit per group; without dedup, all documents stay."""
    config, labels_uri, verdicts_uri, identity = context.config.dedup, None, None, ""
    prepare: tuple[Callable[[], None], ...] = ()
    if config.enabled:
        labels, labeled = _labels(context)
        elected = _sorted_files(context, "elect", "verdicts")
        layout = keep.verdicts_layout(len(groups(context)) + 1)
        verdicts = _shuffle(context.here, elected, layout)
        labels_uri, verdicts_uri = labels.uri, verdicts.uri
        identity = digest([labeled, elected.digests])
        prepare = (partial(shuffle.transpose, verdicts),)
    seed = context.config.run.seed
    units = [
        group.unit(
            KeepTask(group.number, group.parts, labels_uri, verdicts_uri, seed),
            identity,
            config.verify_share,
        )
        for group in groups(context)
    ]
    return PhasePlan(units, prepare)


def alarm_units(context: PlanContext) -> PhasePlan:
    config, files = context.config.dedup, _sorted_files(context, "keep", "losses")
    limits = (config.alarm_share, config.alarm_documents)
    return _partition_units(context, files, keep.LOSSES, limits)


def index_units(context: PlanContext) -> PhasePlan:
    """One unit per group. No two kept documents share a key, so the index needs no merging."""
    config = context.config.dedup
    if not config.enabled or config.write_index == "off":
        return PhasePlan()
    return PhasePlan(
        [
            group.unit(
                SortTask(group.parts, tables if config.write_index == "kept" else ()),
                kept.digest,
                config.write_index,
            )
            for group, tables, kept in _kept_groups(context)
        ]
    )


def lines_units(context: PlanContext) -> PhasePlan:
    level = context.config.dedup.line_level
    if level == "off":
        return PhasePlan()
    return PhasePlan(
        [
            group.unit(LinesTask(group.number, group.parts, tables), kept.digest, level)
            for group, tables, kept in _kept_groups(context)
        ]
    )


def repeats_units(context: PlanContext) -> PhasePlan:
    plan = _partition_units(context, _sorted_files(context, "lines", "lines"), lines.LINES)
    return _answering(plan, context)


def cuts_units(context: PlanContext) -> PhasePlan:
    cut = lines_units(context).units
    if not cut:
        return PhasePlan()
    files = _sorted_files(context, "repeats", "repeats")
    repeats = _shuffle(context.here, files, lines.repeats_layout(len(groups(context))))
    units = [
        unit._replace(
            fingerprint=digest([unit.fingerprint, files.digests]),
            task=replace(unit.task, repeats=repeats.uri),
        )
        for unit in cut
    ]
    return PhasePlan(units, (partial(shuffle.transpose, repeats),))


def _kept_groups(context: PlanContext) -> Iterator[tuple[Group, tuple[str, ...], Commit]]:
    """Each group with the keep tables of its parts, by URI, and the commit that wrote them."""
    phase = context.before["dedup keep"]
    for group, commit in zip(groups(context), phase.ordered(), strict=True):
        tables = [phase.store.uri(o.path) for o in commit.outputs if o.kind == "keep"]
        yield group, tuple(tables), commit


# --- shuffles -------------------------------------------------------------------------------------


def _sorted_files(context: PlanContext, phase: str, kind: str) -> SortedFiles:
    """The sorted files of one kind that a phase of dedup wrote, one per unit."""
    written = context.before[f"dedup {phase}"]
    commits = list(written.ordered())
    return SortedFiles([Source(written.store.uri(kind, c.unit)) for c in commits], commits)


def _partition_units(
    context: PlanContext, files: SortedFiles, layout: Layout, *identity: Any
) -> PhasePlan:
    """As `_partitions`; ConfigError if a worker's memory is too small to read all files at once."""
    least, memory = 4 * len(files.sources) * shuffle.MIN_READ, context.config.dedup.memory
    if least > memory:
        raise ConfigError(
            f"{context.here.name}: a worker reads {len(files.sources):,} files at once, which "
            f"takes {least:,} bytes; dedup.memory is {memory:,}. Raise it, or "
            "dedup.documents_per_unit"
        )
    return _partitions(context, files, layout, *identity)


def _partitions(
    context: PlanContext, files: SortedFiles, layout: Layout, *identity: Any
) -> PhasePlan:
    """A shuffle in partitions of about `partition_bytes`, and a unit for each of them.

    A unit's task is a PartitionTask.
    """
    if not files.sources:
        return PhasePlan()
    per_lane = shuffle.partitions_per_lane(
        files.rows,
        layout,
        files=len(files.sources),
        partition_bytes=context.config.dedup.partition_bytes,
    )
    source = _shuffle(context.here, files, layout, per_lane=per_lane)
    hashed = digest([files.digests, per_lane, *identity])
    units = [
        Unit(f"{n:05d}", digest([hashed, n]), PartitionTask(source.uri, n))
        for n in range(source.partitions)
    ]
    return PhasePlan(units, (partial(shuffle.transpose, source),))


def _shuffle(phase: Phase, files: SortedFiles, layout: Layout, *, per_lane: int = 1) -> Shuffle:
    """A shuffle in the store of a phase. With one partition per lane, each group of documents reads
    its own lane.
    """
    return shuffle.plan(
        phase.store, files.sources, layout, per_lane=per_lane, identity=files.digests
    )


def _answering(plan: PhasePlan, context: PlanContext, *, more: int = 0) -> PhasePlan:
    """The units of a plan, with answers that go back to groups of documents, and to `more`."""
    if not plan.units:
        return plan
    count = len(groups(context)) + more
    return plan._replace(
        units=[unit._replace(task=replace(unit.task, groups=count)) for unit in plan.units]
    )


def _labels(context: PlanContext) -> tuple[Shuffle, list[str]]:
    """The shuffle of cluster labels by group of documents, and the digests of its files."""
    files = _sorted_files(context, "cluster", "labels")
    layout = cluster.labels_layout(len(groups(context)))
    return _shuffle(context.before["dedup cluster"], files, layout), files.digests


def _write_groups(uri: str, first_ids: Sequence[int]) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"first_id": pa.array(first_ids, pa.uint64())}), sink)
    write_atomically(uri, sink.getvalue().to_pybytes())


# --- rounds ---------------------------------------------------------------------------------------


def _in_rounds(context: PlanContext) -> bool:
    """Whether the graph is too large for one process."""
    return _graph_bytes(context) > context.config.dedup.cluster_memory


def _graph_bytes(context: PlanContext) -> int:
    """Upper bound of the memory to cluster the graph in one process, in bytes.

    An edge adds at most two documents: its own and the center of its star.
    """
    edges = context.before["dedup match"].ordered().total("rows_out")
    documents = context.before["dedup sort"].ordered().total("rows_out")
    earlier = edges if context.indexes else 0
    return estimated_bytes(min(2 * edges, documents + earlier))


def _files_of_round(stars: Phase, commits: Sequence[Commit]) -> SortedFiles:
    """The rows that a round of stars wrote; a unit writes one or more sorted files."""
    files = [o.path for c in commits for o in c.outputs if o.path.endswith(".rows")]
    return SortedFiles(
        [Source(stars.store.uri(f.removesuffix(".rows"))) for f in files], list(commits)
    )


def _settled(rounds: Sequence[Sequence[Commit]]) -> bool:
    """Whether a large-star and a small-star changed no edge: then every edge leads to a root."""
    return (
        len(rounds) >= 5 and len(rounds) % 2 == 1 and _outputs(rounds[-1]) == _outputs(rounds[-3])
    )


def _outputs(commits: Sequence[Commit]) -> list[list[str]]:
    return [[o.sha256 for o in c.outputs] for c in commits]


def heavy_losses(commits: Sequence[Commit]) -> list[HeavyLoss]:
    """Hosts, languages and inputs that lost too much, most dropped documents first."""
    losses = [loss for c in commits for loss in c.result.heavy_losses]
    return sorted(losses, key=lambda loss: (-loss.dropped, loss.example, loss.kind))
