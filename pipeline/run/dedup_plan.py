"""The units of the dedup phases: how documents are grouped, rows partitioned, and rounds ended.

    sort -> match -> (star, only for graphs beyond dedup.cluster_memory) -> cluster -> rank -> elect
    -> keep -> alarm, index, and if asked for, lines -> repeats -> cuts

Every arrow is a shuffle (stages.shuffle). What is listed here follows from commit records alone, so
that a run that was killed lists the same units again.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.run.phase import Listing, Phase
from stages.dedup import dedup, keep, lines, shuffle
from stages.dedup.components import estimated_bytes
from stages.dedup.dedup import DedupConfig
from stages.dedup.shuffle import Layout, Shuffle, Source
from stages.formats.document import POSITION_BITS
from stages.formats.errors import ConfigError
from stages.storage.digests import digest
from stages.storage.files import exists, read_bytes, write_atomically
from stages.storage.ledger import Commit, Store, Unit
from stages.storage.parts import PartRef

# of the alternating algorithm, which needs O(log^2 n); seen: 40 for an ascending chain of a million
MAX_ROUNDS = 99


class Index(NamedTuple):
    """The keys of an earlier batch: the stores of its index, its documents and its keep table, and
    the index's commits.
    """

    root: str
    documents: str
    keep: str
    commits: tuple[Commit, ...]


class Plan(NamedTuple):
    """What the listing of a dedup phase depends on: settings, seed, the phases above, its own
    state, earlier batches.
    """

    config: DedupConfig
    seed: int
    before: Mapping[str, Phase]
    here: Phase
    indexes: Sequence[Index]


class Group(NamedTuple):
    """Documents parts that are sorted into one file."""

    number: int
    parts: list[PartRef]
    identity: str


# --- indexes of earlier batches -------------------------------------------------------------------


def published_indexes(config: DedupConfig) -> list[Index]:
    """The indexes of everything in `against`, in order.

    ConfigError when one is missing, or made otherwise, or has changed.
    """
    return [_published_index(path, config) for path in config.against]


def _published_index(path: str, config: DedupConfig) -> Index:
    uri = f"{path}/index.json"
    if not exists(uri):
        raise ConfigError(
            f"dedup.against: {path} holds no published index; run it with dedup.write_index=kept (or all)"
        )
    entry = json.loads(read_bytes(uri))
    try:
        dedup.require_same_keys(entry["keys"], config, uri)
    except ValueError as error:
        raise ConfigError(f"dedup.against: {error}") from None
    commits = Store(f"{path}/{entry['root']}").commits()
    if any(
        name not in commits or commits[name].digest != known
        for name, known in entry["units"].items()
    ):
        raise ConfigError(
            f"dedup.against: the index of {path} is not the one that was published; run its batch again"
        )
    root, documents, kept = (f"{path}/{entry[name]}" for name in ("root", "documents", "keep"))
    return Index(root, documents, kept, tuple(commits[name] for name in entry["units"]))


def publish_index(run: str, index: Index) -> None:
    """Let later batches find this one's index, in place of an earlier one of the same run; done
    last.
    """
    entry: dict[str, Any] = {
        name: getattr(index, name).removeprefix(f"{run}/") for name in ("root", "documents", "keep")
    }
    entry |= {
        "keys": index.commits[0].extra["keys"],
        "units": {c.unit: c.digest for c in index.commits},
    }
    write_atomically(f"{run}/index.json", json.dumps(entry, indent=1).encode())


# --- listings -------------------------------------------------------------------------------------


def groups(plan: Plan) -> list[Group]:
    """Documents parts in order, cut into groups of about `documents_per_unit`; a later input joins
    the last or begins one.
    """
    cut: list[list[tuple[PartRef, Commit]]] = []
    held = 0
    for part, commit in plan.before["extract"].parts():
        if not cut or held + commit.rows_out > plan.config.documents_per_unit:
            cut.append([])
            held = 0
        cut[-1].append((part, commit))
        held += commit.rows_out
    return [
        Group(n, [p for p, _ in parts], digest([c.digest for _, c in parts]))
        for n, parts in enumerate(cut)
    ]


def sort_units(plan: Plan) -> Listing:
    if not plan.config.enabled:
        return Listing([])
    return Listing([Unit(f"{g.number:05d}", g.identity, {"parts": g.parts}) for g in groups(plan)])


def match_units(plan: Plan) -> Listing:
    sources, commits = _written(plan.before["dedup sort"], "keys")
    if not sources:
        return Listing([])
    for number, index in enumerate(plan.indexes):
        sources += [
            Source(f"{index.root}/keys/{c.unit}", dedup.index_tag(number)) for c in index.commits
        ]
        commits += index.commits
    found = _shuffle(plan, sources, plan.config.layout, commits)
    return _reducers(found, commits)


def star_units(plan: Plan) -> Listing:
    """All rounds so far and, when they are done and the last two made a difference, the next one."""
    matched = plan.before["dedup match"]
    if not _in_rounds(plan):
        return Listing([])
    units = [
        Unit(
            f"00-{n:05d}",
            digest(c.digest),
            {"operation": "read", "edges": [matched.store.uri(c.outputs[0]["path"])]},
        )
        for n, c in enumerate(matched.ordered())
    ]
    listed, last = list(units), Listing(units)
    rounds: list[list[Commit]] = []
    while (commits := plan.here.done(units)) is not None and not _settled([*rounds, commits]):
        rounds.append(commits)
        if len(rounds) > MAX_ROUNDS:
            raise ValueError(
                f"dedup star: no end after {MAX_ROUNDS} rounds; this is a fault of ours"
            )
        last = _reducers(_rows_of_round(plan, commits), commits)
        operation = "large" if len(rounds) % 2 else "small"
        units = [
            u._replace(name=f"{len(rounds):02d}-{u.name}", task=u.task | {"operation": operation})
            for u in last.units
        ]
        listed += units
    return Listing(listed, last.prepare)


def cluster_units(plan: Plan) -> Listing:
    if not plan.before["dedup sort"].units:
        return Listing([])
    first_ids = [int(g.parts[0].unit) << POSITION_BITS for g in groups(plan)]
    uri = plan.here.store.uri(f"groups-{digest(first_ids)}.parquet")
    write_groups = partial(_write_groups, uri, first_ids)
    if not _in_rounds(plan):
        matched = plan.before["dedup match"]
        edges = [matched.store.uri(c.outputs[0]["path"]) for c in matched.ordered()]
        identity = digest([first_ids, [c.digest for c in matched.ordered()]])
        return Listing(
            [Unit("all", identity, {"first_ids": uri, "edges": edges})],
            (write_groups,),
            _graph_bytes(plan),
        )
    last = _last_round(plan.before["dedup star"])
    found = _rows_of_round(plan._replace(here=plan.before["dedup star"]), last)
    listing = _reducers(found, last, first_ids)
    return Listing(
        [u._replace(task=u.task | {"first_ids": uri}) for u in listing.units],
        (*listing.prepare, write_groups),
    )


def rank_units(plan: Plan) -> Listing:
    if not plan.before["dedup sort"].units:
        return Listing([])
    labels, commits = _labels(plan)
    labelled = digest(_digests(commits))
    of_groups = [(g.number, g.parts, g.identity) for g in groups(plan)]
    if plan.indexes:
        of_groups.append((len(of_groups), [], "earlier"))
    units = [
        Unit(
            f"{n:05d}",
            digest([identity, labelled, plan.config.keep_rule]),
            {"group": n, "parts": parts, "labels": labels.uri},
        )
        for n, parts, identity in of_groups
    ]
    return Listing(units, (partial(shuffle.transpose, labels),))


def elect_units(plan: Plan) -> Listing:
    sources, commits = _written(plan.before["dedup rank"], "candidates")
    found = _shuffle(plan, sources, keep.CANDIDATES, commits)
    listing = _reducers(found, commits)
    lanes = len(groups(plan)) + 1
    return Listing(
        [u._replace(task=u.task | {"groups": lanes}) for u in listing.units], listing.prepare
    )


def keep_units(plan: Plan) -> Listing:
    """One unit per group; without dedup, or before it, all documents stay."""
    tables: dict[str, Any] = {"labels": None, "verdicts": None}
    identity, prepare = "", []
    if plan.config.enabled:
        labels, labelled = _labels(plan)
        sources, elected = _written(plan.before["dedup elect"], "verdicts")
        verdicts = shuffle.plan(
            plan.here.store,
            sources,
            keep.verdicts_layout(len(groups(plan)) + 1),
            per_lane=1,
            identity=_digests(elected),
        )
        tables = {"labels": labels.uri, "verdicts": verdicts.uri}
        identity = digest([_digests(labelled), _digests(elected)])
        prepare.append(partial(shuffle.transpose, verdicts))
    units = []
    for group in groups(plan):
        task = {"group": group.number, "parts": group.parts, "seed": plan.seed, **tables}
        units.append(
            Unit(
                f"{group.number:05d}",
                digest([group.identity, identity, plan.config.verify_share]),
                task,
            )
        )
    return Listing(units, tuple(prepare))


def alarm_units(plan: Plan) -> Listing:
    sources, commits = _written(plan.before["dedup keep"], "losses")
    limits = plan.config.alarm_share, plan.config.alarm_documents
    return _reducers(_shuffle(plan, sources, keep.LOSSES, commits), commits, limits)


def index_units(plan: Plan) -> Listing:
    """One unit per group; of kept documents no two share a key, so the index of the batch needs no
    merging.
    """
    if not plan.config.enabled or plan.config.write_index == "off":
        return Listing([])
    units = []
    for group, kept in zip(groups(plan), plan.before["dedup keep"].ordered(), strict=True):
        task = (
            _texts(plan, group)
            if plan.config.write_index == "kept"
            else {"parts": group.parts, "keep": []}
        )
        units.append(
            Unit(
                f"{group.number:05d}",
                digest([group.identity, kept.digest, plan.config.write_index]),
                task,
            )
        )
    return Listing(units)


def lines_units(plan: Plan) -> Listing:
    if plan.config.line_level == "off":
        return Listing([])
    return Listing(
        [
            Unit(
                f"{g.number:05d}",
                digest([g.identity, kept.digest, plan.config.line_level]),
                _texts(plan, g) | {"group": g.number},
            )
            for g, kept in zip(groups(plan), plan.before["dedup keep"].ordered(), strict=True)
        ]
    )


def repeats_units(plan: Plan) -> Listing:
    sources, commits = _written(plan.before["dedup lines"], "lines")
    listing = _reducers(_shuffle(plan, sources, lines.LINES, commits), commits)
    return listing._replace(
        units=[u._replace(task=u.task | {"groups": len(groups(plan))}) for u in listing.units]
    )


def cuts_units(plan: Plan) -> Listing:
    if plan.config.line_level == "off":
        return Listing([])
    sources, commits = _written(plan.before["dedup repeats"], "repeats")
    layout = lines.repeats_layout(len(groups(plan)))
    repeats = shuffle.plan(plan.here.store, sources, layout, per_lane=1, identity=_digests(commits))
    units = [
        u._replace(
            fingerprint=digest([u.fingerprint, _digests(commits)]),
            task=u.task | {"repeats": repeats.uri},
        )
        for u in plan.before["dedup lines"].units
    ]
    return Listing(units, (partial(shuffle.transpose, repeats),))


def _texts(plan: Plan, group: Group) -> dict[str, Any]:
    store = plan.before["dedup keep"].store
    return {
        "parts": group.parts,
        "keep": [store.uri("keep", f"{p.unit}.parquet") for p in group.parts],
    }


LISTINGS: dict[str, Callable[[Plan], Listing]] = {
    "dedup sort": sort_units,
    "dedup match": match_units,
    "dedup star": star_units,
    "dedup cluster": cluster_units,
    "dedup rank": rank_units,
    "dedup elect": elect_units,
    "dedup keep": keep_units,
    "dedup alarm": alarm_units,
    "dedup index": index_units,
    "dedup lines": lines_units,
    "dedup repeats": repeats_units,
    "dedup cuts": cuts_units,
}


# --- shuffles -------------------------------------------------------------------------------------


def _written(phase: Phase, kind: str) -> tuple[list[Source], list[Commit]]:
    commits = phase.ordered()
    return [Source(phase.store.uri(kind, c.unit)) for c in commits], commits


def _digests(commits: Sequence[Commit]) -> list[str]:
    return [c.digest for c in commits]


def _shuffle(
    plan: Plan, sources: Sequence[Source], layout: Layout, commits: Sequence[Commit]
) -> Shuffle:
    rows = int(sum(c.totals.get("rows", c.rows_out) for c in commits))
    size = plan.config.partition_bytes
    least = 4 * len(sources) * shuffle.MIN_READ
    if least > plan.config.memory:
        raise ConfigError(
            f"{plan.here.name}: a worker reads {len(sources):,} files at once, which takes {least:,} bytes; dedup.memory is "
            f"{plan.config.memory:,}. Raise it, or dedup.documents_per_unit"
        )
    per_lane = shuffle.partitions_per_lane(rows, layout, files=len(sources), partition_bytes=size)
    return shuffle.plan(
        plan.here.store, sources, layout, per_lane=per_lane, identity=_digests(commits)
    )


def _reducers(found: Shuffle, commits: Sequence[Commit], *also: Any) -> Listing:
    if not found.sources:
        return Listing([])
    identity = digest([_digests(commits), found.per_lane, *also])
    units = [
        Unit(f"{n:05d}", digest([identity, n]), {"shuffle": found.uri, "partition": n})
        for n in range(found.partitions)
    ]
    return Listing(units, (partial(shuffle.transpose, found),))


def _labels(plan: Plan) -> tuple[Shuffle, list[Commit]]:
    phase = plan.before["dedup cluster"]
    sources, commits = _written(phase, "labels")
    layout = dedup.labels_layout(len(groups(plan)))
    return shuffle.plan(
        phase.store, sources, layout, per_lane=1, identity=_digests(commits)
    ), commits


def _write_groups(uri: str, first_ids: Sequence[int]) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"first_id": pa.array(first_ids, pa.uint64())}), sink)
    write_atomically(uri, sink.getvalue().to_pybytes())


# --- rounds ---------------------------------------------------------------------------------------


def _in_rounds(plan: Plan) -> bool:
    """Whether the graph is too large for one process."""
    return _graph_bytes(plan) > plan.config.cluster_memory


def _graph_bytes(plan: Plan) -> int:
    """Memory to cluster the graph in one process, at most.

    An edge leads to one document more at most, and to its centre.
    """
    edges = sum(c.rows_out for c in plan.before["dedup match"].ordered())
    documents = sum(c.rows_out for c in plan.before["dedup sort"].ordered())
    earlier = edges if plan.indexes else 0
    return estimated_bytes(min(2 * edges, documents + earlier))


def _rows_of_round(plan: Plan, commits: Sequence[Commit]) -> Shuffle:
    files = [o["path"] for c in commits for o in c.outputs if o["path"].endswith(".rows")]
    sources = [Source(plan.here.store.uri(path.removesuffix(".rows"))) for path in files]
    rows = sum(c.rows_out for c in commits)
    size = plan.config.partition_bytes
    per_lane = shuffle.partitions_per_lane(
        rows, dedup.EDGES, files=len(sources), partition_bytes=size
    )
    return shuffle.plan(
        plan.here.store, sources, dedup.EDGES, per_lane=per_lane, identity=_digests(commits)
    )


def _settled(rounds: Sequence[Sequence[Commit]]) -> bool:
    """Whether a large-star and a small-star have left the edges as they were: then every edge leads
    to a root.
    """
    return (
        len(rounds) >= 5 and len(rounds) % 2 == 1 and _outputs(rounds[-1]) == _outputs(rounds[-3])
    )


def _outputs(commits: Sequence[Commit]) -> list[list[str]]:
    return [[o["sha256"] for o in c.outputs] for c in commits]


def _last_round(stars: Phase) -> list[Commit]:
    last = max(c.unit[:2] for c in stars.ordered())
    return [c for c in stars.ordered() if c.unit.startswith(last)]


def wiped(commits: Sequence[Commit]) -> Iterator[dict[str, Any]]:
    """Who lost too much, most documents first."""
    found = [w for c in commits for w in c.extra.get("wiped", [])]
    yield from sorted(found, key=lambda w: (-w["dropped"], w["example"], w["kind"]))
