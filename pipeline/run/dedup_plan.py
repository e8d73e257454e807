"""The units of the dedup phases: how documents are grouped, rows partitioned, and rounds ended.

    sort -> match -> (star, only for graphs beyond dedup.cluster_memory) -> cluster -> rank -> elect
    -> keep -> alarm, index, and if asked for, lines -> repeats -> cuts

Every arrow is a shuffle (stages.dedup.shuffle). Units follow from commit records alone, so a run
that was killed lists the same units again.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.run.phase import Index, Phase, PhasePlan
from stages.dedup import cluster, keep, keys, lines, shuffle
from stages.dedup.cluster import ClusterTask, StarTask
from stages.dedup.components import estimated_bytes
from stages.dedup.config import DedupConfig
from stages.dedup.keep import HeavyLoss, KeepTask, RankTask
from stages.dedup.keys import IndexTask, KeysResult, SortTask
from stages.dedup.lines import CutsTask, LinesTask
from stages.dedup.shuffle import AnswerTask, Layout, PartitionTask, Shuffle, Source
from stages.formats.document import POSITION_BITS
from stages.formats.errors import ConfigError
from stages.storage.digests import digest
from stages.storage.files import exists, read_bytes, write_atomically
from stages.storage.ledger import Commit, Store, Unit
from stages.storage.parts import PartRef

# of the alternating algorithm, which needs O(log^2 n); seen: 40 for an ascending chain of a million
MAX_ROUNDS = 99


class DedupContext(NamedTuple):
    """What the units of a dedup phase are listed from; see PlanContext."""

    config: DedupConfig
    seed: int
    before: Mapping[str, Phase]
    here: Phase
    indexes: Sequence[Index]


class Group(NamedTuple):
    """Documents parts that are sorted into one file."""

    number: int
    parts: tuple[PartRef, ...]
    identity: str

    @property
    def name(self) -> str:
        """Name of the units that work on this group."""
        return f"{self.number:05d}"


# --- indexes of earlier batches -------------------------------------------------------------------


def published_indexes(config: DedupConfig) -> list[Index]:
    """The indexes of the runs in `against`, in order.

    ConfigError if one is missing, was made with other settings, or has changed.
    """
    return [_published_index(path, config) for path in config.against]


def _published_index(path: str, config: DedupConfig) -> Index:
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
    commits = Store(f"{path}/{entry['root']}", KeysResult).commits()
    if any(
        name not in commits or commits[name].digest != known
        for name, known in entry["units"].items()
    ):
        raise ConfigError(
            f"dedup.against: the index of {path} is not the one that was published; "
            "run its batch again"
        )
    root, documents, kept = (f"{path}/{entry[name]}" for name in ("root", "documents", "keep"))
    return Index(root, documents, kept, tuple(commits[name] for name in entry["units"]))


def publish_index(run: str, index: Index) -> None:
    """Let later batches find this index, in place of an earlier one of the same run."""
    entry: dict[str, Any] = {
        name: getattr(index, name).removeprefix(f"{run}/") for name in ("root", "documents", "keep")
    }
    entry |= {
        "keys": index.commits[0].result.keys,
        "units": {c.unit: c.digest for c in index.commits},
    }
    write_atomically(f"{run}/index.json", json.dumps(entry, indent=1).encode())


# --- units of each phase --------------------------------------------------------------------------


def groups(context: DedupContext) -> list[Group]:
    """Documents parts in order, cut into groups of about `documents_per_unit` documents.

    An input that is added later joins the last group or begins a new one.
    """
    runs: list[list[tuple[PartRef, Commit]]] = []
    documents = 0
    for part, commit in context.before["extract"].parts():
        if not runs or documents + commit.rows_out > context.config.documents_per_unit:
            runs.append([])
            documents = 0
        runs[-1].append((part, commit))
        documents += commit.rows_out
    return [
        Group(n, tuple(part for part, _ in run), digest([c.digest for _, c in run]))
        for n, run in enumerate(runs)
    ]


def sort_units(context: DedupContext) -> PhasePlan:
    if not context.config.enabled:
        return PhasePlan([])
    return PhasePlan([Unit(g.name, g.identity, SortTask(g.parts)) for g in groups(context)])


def match_units(context: DedupContext) -> PhasePlan:
    sources, commits = _written(context.before["dedup sort"], "keys")
    if not sources:
        return PhasePlan([])
    for number, index in enumerate(context.indexes):
        tag = keys.index_tag(number)
        sources += [Source(f"{index.root}/keys/{c.unit}", tag) for c in index.commits]
        commits += index.commits
    source = _shuffle(context, sources, context.config.layout, commits)
    return _partition_units(source, _digests(commits))


def star_units(context: DedupContext) -> PhasePlan:
    """All rounds so far, and the next one if they are done and the last two changed something."""
    if not _in_rounds(context):
        return PhasePlan([])
    matched = context.before["dedup match"]
    units = [
        Unit(
            f"00-{n:05d}", digest(c.digest), StarTask("read", (matched.store.uri(c.output().path),))
        )
        for n, c in enumerate(matched.ordered())
    ]
    listed = list(units)
    prepare: tuple[Callable[[], None], ...] = ()
    rounds: list[list[Commit]] = []
    while (commits := context.here.commits_of(units)) is not None and not _settled(
        [*rounds, commits]
    ):
        rounds.append(commits)
        if len(rounds) > MAX_ROUNDS:
            raise RuntimeError(
                f"dedup star has not settled after {MAX_ROUNDS} rounds; report this bug"
            )
        plan = _partition_units(_shuffle_of_round(context, commits), _digests(commits))
        operation: Literal["large", "small"] = "large" if len(rounds) % 2 else "small"
        units = [
            u._replace(
                name=f"{len(rounds):02d}-{u.name}", task=StarTask(operation, partition=u.task)
            )
            for u in plan.units
        ]
        listed, prepare = listed + units, plan.prepare
    return PhasePlan(listed, prepare)


def cluster_units(context: DedupContext) -> PhasePlan:
    """One unit for the whole graph, or one per partition of the last round of stars."""
    if not context.before["dedup sort"].units:
        return PhasePlan([])
    first_ids = [int(g.parts[0].unit) << POSITION_BITS for g in groups(context)]
    uri = context.here.store.uri(f"groups-{digest(first_ids)}.parquet")
    write_groups = partial(_write_groups, uri, first_ids)
    if not _in_rounds(context):
        matched = context.before["dedup match"]
        edges = tuple(matched.store.uri(c.output().path) for c in matched.ordered())
        identity = digest([first_ids, _digests(matched.ordered())])
        units = [Unit("all", identity, ClusterTask(uri, edges))]
        return PhasePlan(units, (write_groups,), _graph_bytes(context))
    stars = context.before["dedup star"]
    last = _last_round(stars)
    source = _shuffle_of_round(context._replace(here=stars), last)
    plan = _partition_units(source, _digests(last), first_ids)
    units = [u._replace(task=ClusterTask(uri, partition=u.task)) for u in plan.units]
    return PhasePlan(units, (*plan.prepare, write_groups))


def rank_units(context: DedupContext) -> PhasePlan:
    """One unit per group; with earlier batches, one more for their documents."""
    if not context.before["dedup sort"].units:
        return PhasePlan([])
    labels, commits = _labels(context)
    labeled = digest(_digests(commits))
    ranked = groups(context)
    if context.indexes:
        ranked = [*ranked, Group(len(ranked), (), "earlier")]
    units = [
        Unit(
            group.name,
            digest([group.identity, labeled, context.config.keep_rule]),
            RankTask(group.number, group.parts, labels.uri),
        )
        for group in ranked
    ]
    return PhasePlan(units, (partial(shuffle.transpose, labels),))


def elect_units(context: DedupContext) -> PhasePlan:
    sources, commits = _written(context.before["dedup rank"], "candidates")
    source = _shuffle(context, sources, keep.CANDIDATES, commits)
    plan = _partition_units(source, _digests(commits))
    return _answering(plan, groups=len(groups(context)) + 1)


def keep_units(context: DedupContext) -> PhasePlan:
    """One unit per group; without dedup, all documents stay."""
    config, labels_uri, verdicts_uri = context.config, None, None
    identity: str = ""
    prepare: tuple[Callable[[], None], ...] = ()
    if config.enabled:
        labels, labeled = _labels(context)
        sources, elected = _written(context.before["dedup elect"], "verdicts")
        layout = keep.verdicts_layout(len(groups(context)) + 1)
        verdicts = _single_lane_shuffle(context.here, sources, layout, elected)
        labels_uri, verdicts_uri = labels.uri, verdicts.uri
        identity = digest([_digests(labeled), _digests(elected)])
        prepare = (partial(shuffle.transpose, verdicts),)
    units = [
        Unit(
            group.name,
            digest([group.identity, identity, config.verify_share]),
            KeepTask(group.number, group.parts, labels_uri, verdicts_uri, context.seed),
        )
        for group in groups(context)
    ]
    return PhasePlan(units, prepare)


def alarm_units(context: DedupContext) -> PhasePlan:
    sources, commits = _written(context.before["dedup keep"], "losses")
    config = context.config
    source = _shuffle(context, sources, keep.LOSSES, commits)
    return _partition_units(source, _digests(commits), (config.alarm_share, config.alarm_documents))


def index_units(context: DedupContext) -> PhasePlan:
    """One unit per group. No two kept documents share a key, so the index needs no merging."""
    config = context.config
    if not config.enabled or config.write_index == "off":
        return PhasePlan([])
    units = []
    for group, tables, kept in _kept_groups(context):
        task = IndexTask(group.parts, tables if config.write_index == "kept" else ())
        identity = digest([group.identity, kept.digest, config.write_index])
        units.append(Unit(group.name, identity, task))
    return PhasePlan(units)


def lines_units(context: DedupContext) -> PhasePlan:
    level = context.config.line_level
    if level == "off":
        return PhasePlan([])
    return PhasePlan(
        [
            Unit(
                group.name,
                digest([group.identity, kept.digest, level]),
                LinesTask(group.number, group.parts, tables),
            )
            for group, tables, kept in _kept_groups(context)
        ]
    )


def repeats_units(context: DedupContext) -> PhasePlan:
    sources, commits = _written(context.before["dedup lines"], "lines")
    source = _shuffle(context, sources, lines.LINES, commits)
    return _answering(_partition_units(source, _digests(commits)), groups=len(groups(context)))


def cuts_units(context: DedupContext) -> PhasePlan:
    if context.config.line_level == "off":
        return PhasePlan([])
    sources, commits = _written(context.before["dedup repeats"], "repeats")
    layout = lines.repeats_layout(len(groups(context)))
    repeats = _single_lane_shuffle(context.here, sources, layout, commits)
    units = [
        u._replace(
            fingerprint=digest([u.fingerprint, _digests(commits)]),
            task=CutsTask(u.task, repeats.uri),
        )
        for u in context.before["dedup lines"].units
    ]
    return PhasePlan(units, (partial(shuffle.transpose, repeats),))


def _kept_groups(context: DedupContext) -> Iterator[tuple[Group, tuple[str, ...], Commit]]:
    """Each group with the keep tables of its parts, by URI, and the commit that wrote them."""
    phase = context.before["dedup keep"]
    for group, commit in zip(groups(context), phase.ordered(), strict=True):
        tables = [phase.store.uri(o.path) for o in commit.outputs if o.kind == "keep"]
        yield group, tuple(tables), commit


# --- shuffles -------------------------------------------------------------------------------------


def _written(phase: Phase, kind: str) -> tuple[list[Source], list[Commit]]:
    """The sorted files of one kind that a phase wrote, one per unit, and the commits."""
    commits = phase.ordered()
    return [Source(phase.store.uri(kind, c.unit)) for c in commits], commits


def _digests(commits: Sequence[Commit]) -> list[str]:
    return [c.digest for c in commits]


def _num_rows(commit: Commit) -> int:
    """Rows of a unit's sorted files: of keys there are several per document."""
    return commit.result.rows if isinstance(commit.result, KeysResult) else commit.rows_out


def _shuffle(
    context: DedupContext, sources: Sequence[Source], layout: Layout, commits: Sequence[Commit]
) -> Shuffle:
    """A shuffle in partitions of about `partition_bytes`; ConfigError if memory is too small."""
    config = context.config
    least = 4 * len(sources) * shuffle.MIN_READ
    if least > config.memory:
        raise ConfigError(
            f"{context.here.name}: a worker reads {len(sources):,} files at once, which takes "
            f"{least:,} bytes; dedup.memory is {config.memory:,}. Raise it, or "
            "dedup.documents_per_unit"
        )
    return _sized_shuffle(context, sources, layout, commits, rows=sum(map(_num_rows, commits)))


def _sized_shuffle(
    context: DedupContext,
    sources: Sequence[Source],
    layout: Layout,
    commits: Sequence[Commit],
    *,
    rows: int,
) -> Shuffle:
    size = context.config.partition_bytes
    per_lane = shuffle.partitions_per_lane(rows, layout, files=len(sources), partition_bytes=size)
    store, identity = context.here.store, _digests(commits)
    return shuffle.plan(store, sources, layout, per_lane=per_lane, identity=identity)


def _single_lane_shuffle(
    phase: Phase, sources: Sequence[Source], layout: Layout, commits: Sequence[Commit]
) -> Shuffle:
    """A shuffle with one partition per lane: each group of documents reads its own lane."""
    return shuffle.plan(phase.store, sources, layout, per_lane=1, identity=_digests(commits))


def _partition_units(source: Shuffle, digests: list[str], *identity: Any) -> PhasePlan:
    """One unit per partition of a shuffle; its task is a PartitionTask."""
    if not source.sources:
        return PhasePlan([])
    hashed = digest([digests, source.per_lane, *identity])
    units = [
        Unit(f"{n:05d}", digest([hashed, n]), PartitionTask(source.uri, n))
        for n in range(source.partitions)
    ]
    return PhasePlan(units, (partial(shuffle.transpose, source),))


def _answering(plan: PhasePlan, *, groups: int) -> PhasePlan:
    """The units of a plan, with answers that go back to groups of documents."""
    units = [u._replace(task=AnswerTask(u.task, groups)) for u in plan.units]
    return plan._replace(units=units)


def _labels(context: DedupContext) -> tuple[Shuffle, list[Commit]]:
    phase = context.before["dedup cluster"]
    sources, commits = _written(phase, "labels")
    layout = cluster.labels_layout(len(groups(context)))
    return _single_lane_shuffle(phase, sources, layout, commits), commits


def _write_groups(uri: str, first_ids: Sequence[int]) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"first_id": pa.array(first_ids, pa.uint64())}), sink)
    write_atomically(uri, sink.getvalue().to_pybytes())


# --- rounds ---------------------------------------------------------------------------------------


def _in_rounds(context: DedupContext) -> bool:
    """Whether the graph is too large for one process."""
    return _graph_bytes(context) > context.config.cluster_memory


def _graph_bytes(context: DedupContext) -> int:
    """Upper bound of the memory to cluster the graph in one process, in bytes.

    An edge adds at most two documents: its own and the center of its star.
    """
    edges = sum(c.rows_out for c in context.before["dedup match"].ordered())
    documents = sum(c.rows_out for c in context.before["dedup sort"].ordered())
    earlier = edges if context.indexes else 0
    return estimated_bytes(min(2 * edges, documents + earlier))


def _shuffle_of_round(context: DedupContext, commits: Sequence[Commit]) -> Shuffle:
    """The rows that a round of stars wrote; a unit writes one or more sorted files."""
    files = [o.path for c in commits for o in c.outputs if o.path.endswith(".rows")]
    sources = [Source(context.here.store.uri(path.removesuffix(".rows"))) for path in files]
    rows = sum(c.rows_out for c in commits)
    return _sized_shuffle(context, sources, cluster.EDGES, commits, rows=rows)


def _settled(rounds: Sequence[Sequence[Commit]]) -> bool:
    """Whether a large-star and a small-star changed no edge: then every edge leads to a root."""
    return (
        len(rounds) >= 5 and len(rounds) % 2 == 1 and _outputs(rounds[-1]) == _outputs(rounds[-3])
    )


def _outputs(commits: Sequence[Commit]) -> list[list[str]]:
    return [[o.sha256 for o in c.outputs] for c in commits]


def _last_round(stars: Phase) -> list[Commit]:
    last = max(c.unit[:2] for c in stars.ordered())
    return [c for c in stars.ordered() if c.unit.startswith(last)]


def heavy_losses(commits: Sequence[Commit]) -> list[HeavyLoss]:
    """Hosts, languages and inputs that lost too much, most dropped documents first."""
    losses = [loss for c in commits for loss in c.result.heavy_losses]
    return sorted(losses, key=lambda loss: (-loss.dropped, loss.example, loss.kind))
