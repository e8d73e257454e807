"""Which copy stays, and who lost too much: rank, elect, keep, alarm (see stages.dedup).

A document of an earlier batch (a tagged id, see `keys.index_tag`) beats all others and is not a
member of the cluster: a cluster that holds one loses all its documents.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash
from pydantic.dataclasses import dataclass as validated

from filters import STRICT
from stages.dedup import minhash, shuffle
from stages.dedup.config import CELLS, EARLIER, DedupConfig
from stages.dedup.keys import earlier_documents
from stages.dedup.shuffle import (
    U64,
    AnswerTask,
    Layout,
    PartitionTask,
    group_starts,
    merge,
    merge_all,
    mix,
    whole_groups,
)
from stages.formats.document import sampled
from stages.storage.ledger import Commit, Store, Unit
from stages.storage.parts import PartRef, documents, fixed_binary, part_of, read_columns

KEEP = pa.schema(
    [
        pa.field("doc_id", pa.uint64(), nullable=False),
        pa.field("cluster_id", pa.uint64(), nullable=False),  # the smallest doc_id of the cluster
        pa.field("cluster_size", pa.int64(), nullable=False),  # documents of this batch
        pa.field("keep", pa.bool_(), nullable=False),
        pa.field("kept_id", pa.uint64(), nullable=False),
        # the number of the index that holds the kept copy; null: this batch
        pa.field("kept_in", pa.uint8()),
        pa.field("rule", pa.string()),  # dedup.exact, dedup.near, dedup.earlier; null: kept
        # true Jaccard similarity with the kept copy; null: not measured
        pa.field("similarity", pa.float64()),
    ]
)
# mixed root, group, members, rank, content hash (2), doc_id
CANDIDATES = Layout(width=7, lanes=1, cells=CELLS)
# hash of kind and name, documents, dropped, a document
LOSSES = Layout(width=4, lanes=1, cells=256)
KINDS: tuple[Literal["host", "language", "input"], ...] = ("host", "language", "input")
_COLUMNS = {"longest": "num_chars", "newest": "crawl_date", "first": "doc_id"}
_WORST = np.uint64(2**64 - 1)
_PAIRS_AT_ONCE = 512


# --- rank -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RankTask:
    """A group of documents parts, and the URI of the shuffle of labels.

    Without parts, the group stands for the documents of earlier batches.
    """

    group: int
    parts: tuple[PartRef, ...]
    labels: str


def rank_unit(unit: Unit, config: DedupConfig, store: Store) -> Commit:
    """Write the best candidate of a group for every cluster. The task is a RankTask."""
    task: RankTask = unit.task
    commit = Commit(unit.name, unit.fingerprint)
    labels = merge_all(task.labels, task.group, width=2)
    commit.rows_in = len(labels)
    rows = [_members(p, labels, task.group, config.keep_rule) for p in task.parts if len(labels)]
    if not task.parts:
        rows = [_earlier(labels, task.group)]
    best = _best(np.concatenate([np.empty((0, CANDIDATES.width), np.uint64), *rows]))
    commit.rows_out = len(best)
    shuffle.write(store, "candidates", [best], CANDIDATES, commit=commit)
    return commit


def _members(part: PartRef, labels: U64, group: int, rule: str) -> U64:
    column = _COLUMNS.get(rule, rule.removeprefix("best:"))
    table = _kept_documents(part, ["content_hash", *{column} - {"doc_id"}])
    place, member = _places(table["doc_id"].to_numpy().astype(np.uint64), labels)
    table = table.filter(pa.array(member)).combine_chunks()
    ids = table["doc_id"].to_numpy().astype(np.uint64)
    rank = ids + np.uint64(1) if rule == "first" else _descending(table[column])
    one, where = np.ones(len(ids), np.uint64), np.full(len(ids), group, np.uint64)
    return np.column_stack([mix(labels[place[member], 1]), where, one, rank, _hashes(table), ids])


def _earlier(labels: U64, group: int) -> U64:
    zero = np.zeros(len(labels), np.uint64)
    where = np.full(len(labels), group, np.uint64)
    return np.column_stack([mix(labels[:, 1]), where, zero, zero, zero, zero, labels[:, 0]])


def _kept_documents(part: PartRef, columns: Sequence[str]) -> pa.Table:
    table = read_columns(part.uri, ["doc_id", *columns, "rejected_by"])
    return table.filter(pc.is_null(table["rejected_by"])).combine_chunks()


def _places(ids: U64, labels: U64) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Row of each id among the labels, and whether it has one."""
    if not len(labels):
        return np.zeros(len(ids), np.int64), np.zeros(len(ids), np.bool_)
    place = np.minimum(np.searchsorted(labels[:, 0], ids), len(labels) - 1)
    return place, labels[place, 0] == ids


def _hashes(table: pa.Table) -> U64:
    chunks = [fixed_binary(chunk, 16).copy() for chunk in table["content_hash"].chunks]
    hashes: U64 = (
        np.concatenate([np.empty((0, 16), np.uint8), *chunks]).view(">u8").astype(np.uint64)
    )
    return hashes


def _descending(column: pa.ChunkedArray) -> U64:
    """Ranks in (0, 2^64): greater values rank first, missing values and NaN last."""
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.int64())
    values = column.cast(pa.float64(), safe=False).to_numpy()
    bits = values.view(np.uint64)
    ascending = np.where(values < 0, ~bits, bits | np.uint64(1 << 63))
    return np.where(np.isnan(values), _WORST, ~ascending)


def _best(rows: U64) -> U64:
    """The candidate of each cluster with the least (rank, content hash, doc_id); members summed."""
    ordered = rows[np.lexsort(rows[:, [6, 5, 4, 3, 0]].T)]
    starts = group_starts(ordered[:, 0])
    best: U64 = ordered[starts]
    if len(starts):
        best[:, 2] = np.add.reduceat(ordered[:, 2], starts)
    return best


# --- elect ----------------------------------------------------------------------------------------


@validated(frozen=True, config=STRICT)
class ElectResult:
    """Number of clusters by size class (see `size_classes`)."""

    cluster_sizes: dict[str, int] = field(default_factory=dict)


def elect_unit(unit: Unit, config: DedupConfig, store: Store) -> Commit:
    """Write the winners of a partition of clusters. The task is an AnswerTask."""
    task: AnswerTask = unit.task
    commit = Commit(unit.name, unit.fingerprint)
    sizes: Counter[str] = Counter()
    answers = [np.empty((0, 6), np.uint64)]
    source = task.partition
    for rows in whole_groups(
        merge(source.shuffle, source.partition, memory=config.partition_bytes)
    ):
        best = _best(rows)
        answers.append(_answers(rows, best))
        sizes.update(size_classes(best[:, 2]))
        commit.rows_in += len(rows)
        commit.rows_out += len(best)
    groups = np.concatenate(answers)
    groups = groups[np.argsort(groups[:, 0], kind="stable")]
    borders = np.searchsorted(groups[:, 0], np.arange(1, task.groups, dtype=np.uint64))
    lanes = np.split(groups[:, 1:], borders)
    shuffle.write(store, "verdicts", lanes, verdicts_layout(task.groups), commit=commit)
    commit.result = ElectResult(dict(sizes))
    return commit


def verdicts_layout(groups: int) -> Layout:
    """Verdicts (mixed root, size, content hash (2), winner): a lane for each group.

    The last group stands for earlier batches.
    """
    return Layout(width=5, lanes=groups)


def _answers(rows: U64, best: U64) -> U64:
    """(group, mixed root, size, content hash (2), winner) for every group that has a candidate."""
    of = np.searchsorted(best[:, 0], rows[:, 0])
    return np.column_stack([rows[:, 1], best[of][:, [0, 2, 4, 5, 6]]])


def size_classes(sizes: U64) -> dict[str, int]:
    """Number of clusters by size: '1', '2', '3-4', '5-8', and so on in powers of two.

    '1' is a copy of a document of an earlier batch.
    """
    exponents, counts = np.unique(
        np.ceil(np.log2(np.maximum(sizes, 1).astype(np.float64))).astype(int), return_counts=True
    )
    names = [
        "1" if e == 0 else "2" if e == 1 else f"{2 ** (e - 1) + 1}-{2**e}"
        for e in exponents.tolist()
    ]
    return dict(zip(names, counts.tolist(), strict=True))


# --- keep -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KeepTask:
    """A group of documents parts, and the shuffles of labels and verdicts by URI (None: no dedup).

    `seed` draws the documents whose similarity is measured.
    """

    group: int
    parts: tuple[PartRef, ...]
    labels: str | None
    verdicts: str | None
    seed: int


@validated(frozen=True, config=STRICT)
class LargeCluster:
    """A cluster, its size in documents, and some of its members in this group."""

    cluster_id: int
    size: int
    members: list[int] = field(default_factory=list)


@validated(frozen=True, config=STRICT)
class KeepResult:
    """Documents whose similarity was measured, and the largest clusters with members here."""

    measured: int = 0
    largest: tuple[LargeCluster, ...] = ()


def keep_unit(unit: Unit, config: DedupConfig, store: Store) -> Commit:
    """Write the keep table of a group's parts. The task is a KeepTask."""
    task: KeepTask = unit.task
    commit = Commit(unit.name, unit.fingerprint)
    labels, verdicts = np.empty((0, 2), np.uint64), np.empty((0, 5), np.uint64)
    if task.labels and task.verdicts:
        labels = merge_all(task.labels, task.group, width=2)
        verdicts = merge_all(task.verdicts, task.group, width=5)
    counts: Counter[str] = Counter()
    losses, largest = [np.empty((0, 4), np.uint64)], _largest(verdicts)
    measured = 0
    for part in task.parts:
        documents = _kept_documents(part, ["content_hash", "host", "language", "warc_file"])
        table = _keep_table(documents, labels, verdicts)
        if config.verify_share:
            place = table.schema.get_field_index("similarity")
            similarities = _similarities(table, part, config, task.seed)
            table = table.set_column(place, KEEP.field(place), similarities)
        with store.create("keep", f"{part.unit}.parquet", outputs=commit.outputs) as path:
            pq.write_table(table, path, compression="zstd")
        counts.update(rule or "kept" for rule in table["rule"].to_pylist())
        losses.append(_losses(documents, table["keep"]))
        _add_members(largest, table)
        commit.rows_in += table.num_rows
        measured += table.num_rows - table["similarity"].null_count
    shuffle.write(store, "losses", [_sum_losses(np.concatenate(losses))], LOSSES, commit=commit)
    commit.rows_out, commit.counts = counts["kept"], dict(sorted(counts.items()))
    commit.result = KeepResult(measured, tuple(largest.values()))
    return commit


def _largest(verdicts: U64, count: int = 10) -> dict[int, LargeCluster]:
    """The largest clusters with members in a group, by cluster_id, for the report.

    The largest clusters of the whole batch are among those of the groups.
    """
    order = np.lexsort((verdicts[:, 0], -verdicts[:, 1].astype(np.int64)))[:count]
    roots = shuffle.unmix(verdicts[order, 0]).tolist()
    return {
        root: LargeCluster(root, size)
        for root, size in zip(roots, verdicts[order, 1].tolist(), strict=True)
    }


def _add_members(largest: dict[int, LargeCluster], table: pa.Table, count: int = 3) -> None:
    rows = table.filter(
        pc.is_in(table["cluster_id"], value_set=pa.array(list(largest), pa.uint64()))
    )
    for doc_id, root in zip(
        rows["doc_id"].to_pylist(), rows["cluster_id"].to_pylist(), strict=True
    ):
        if len(largest[root].members) < count:
            largest[root].members.append(doc_id)


def _keep_table(found: pa.Table, labels: U64, verdicts: U64) -> pa.Table:
    ids = found["doc_id"].to_numpy().astype(np.uint64)
    place, member = _places(ids, labels)
    cluster, size, kept = ids.copy(), np.ones(len(ids), np.int64), ids.copy()
    near = np.zeros(len(ids), bool)
    if member.any():
        roots = labels[place[member], 1]
        verdict = verdicts[np.searchsorted(verdicts[:, 0], mix(roots))]
        cluster[member], size[member], kept[member] = roots, verdict[:, 1], verdict[:, 4]
        near[member] = (_hashes(found)[member] != verdict[:, 2:4]).any(axis=1)
    earlier = kept >= np.uint64(EARLIER)
    rule = np.where(earlier, "dedup.earlier", np.where(near, "dedup.near", "dedup.exact"))
    number, doc_id = earlier_documents(kept)
    keep = kept == ids
    columns = [
        *(ids, cluster, size, keep),
        np.where(earlier, doc_id, kept),
        pa.array(number.astype(np.uint8), pa.uint8(), mask=~earlier),
        pa.array(rule, pa.string(), mask=keep),
        pa.nulls(len(ids), pa.float64()),
    ]
    return pa.table(columns, schema=KEEP)


# --- verification ---------------------------------------------------------------------------------


def _similarities(table: pa.Table, part: PartRef, config: DedupConfig, seed: int) -> pa.Array:
    """True similarity of sampled dropped documents with their kept copies, null for all others.

    Only copies kept in this batch are compared.
    """
    rows = zip(
        *(table[name].to_pylist() for name in ("doc_id", "kept_id", "kept_in", "keep")), strict=True
    )
    pairs = [
        (row, doc_id, kept_id)
        for row, (doc_id, kept_id, kept_in, keep) in enumerate(rows)
        if not keep and kept_in is None and sampled(doc_id, share=config.verify_share, seed=seed)
    ]
    similarity = np.full(table.num_rows, np.nan)
    for first in range(0, len(pairs), _PAIRS_AT_ONCE):
        some = pairs[first : first + _PAIRS_AT_ONCE]
        sets = _shingle_sets(
            {i for _, doc_id, kept in some for i in (doc_id, kept)}, part, config.ngram
        )
        for row, doc_id, kept in some:
            similarity[row] = _jaccard(sets[doc_id], sets[kept])
    return pa.array(similarity, mask=np.isnan(similarity))


def _shingle_sets(ids: set[int], part: PartRef, ngram: int) -> dict[int, U64]:
    """Shingles of documents of any part; a text without shingles counts as one shingle."""
    by_part: dict[str, list[int]] = {}
    for doc_id in sorted(ids):
        by_part.setdefault(part_of(doc_id, beside=part.uri), []).append(doc_id)
    sets = {}
    for uri, wanted in by_part.items():
        for doc_id, row in documents(uri, wanted, ["text"]).items():
            if row["text"] is None:
                raise ValueError(
                    f"{uri}: texts were not kept; verify_share needs extract.keep_text = true"
                )
            normalized = minhash.normalize(row["text"])
            shingles = minhash.shingle_hashes(normalized, ngram=ngram)
            whole = np.array(
                [xxhash.xxh64_intdigest(normalized.encode("utf-8", "surrogatepass"))], np.uint64
            )
            sets[doc_id] = shingles if len(shingles) else whole
    return sets


def _jaccard(a: U64, b: U64) -> float:
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


# --- alarm ----------------------------------------------------------------------------------------


def _losses(found: pa.Table, keep: pa.ChunkedArray) -> U64:
    """Rows of LOSSES for every host, language and input file of a part."""
    rows = [np.empty((0, 4), np.uint64)]
    dropped = pc.invert(keep).cast(pa.uint64())
    for kind, column in enumerate(("host", "language", "warc_file")):
        table = pa.table({"name": found[column], "dropped": dropped, "doc_id": found["doc_id"]})
        # no host: a document without a URL
        named = table.filter(pc.not_equal(table["name"], "")).group_by("name")
        sums = named.aggregate([("dropped", "sum"), ("dropped", "count"), ("doc_id", "min")])
        names = [
            xxhash.xxh64_intdigest(name.encode()) & ~3 | kind for name in sums["name"].to_pylist()
        ]
        numbers = (
            sums[c].to_numpy().astype(np.uint64)
            for c in ("dropped_count", "dropped_sum", "doc_id_min")
        )
        rows.append(np.column_stack([np.array(names, np.uint64), *numbers]))
    return np.concatenate(rows)


def _sum_losses(rows: U64) -> U64:
    ordered = rows[np.lexsort((rows[:, 3], rows[:, 0]))]
    starts = group_starts(ordered[:, 0])
    sums: U64 = ordered[starts]
    if len(starts):
        sums[:, 1:3] = np.add.reduceat(ordered[:, 1:3], starts, axis=0)
    return sums


@validated(frozen=True, config=STRICT)
class HeavyLoss:
    """A host, language or input file that lost too much: documents before, dropped, one of them."""

    kind: Literal["host", "language", "input"]
    documents: int
    dropped: int
    example: int


@validated(frozen=True, config=STRICT)
class AlarmResult:
    """Heavy losses of a partition, most dropped documents first, at most 1000."""

    heavy_losses: tuple[HeavyLoss, ...] = ()


def alarm_unit(unit: Unit, config: DedupConfig, store: Store) -> Commit:
    """Find the heavy losses of a partition. The task is a PartitionTask."""
    task: PartitionTask = unit.task
    commit = Commit(unit.name, unit.fingerprint)
    heavy = [np.empty((0, 4), np.uint64)]
    for rows in whole_groups(merge(task.shuffle, task.partition, memory=config.partition_bytes)):
        sums = _sum_losses(rows)
        commit.rows_in += len(sums)
        heavy.append(sums[_too_much(sums, config)])
    losses = np.concatenate(heavy)
    commit.rows_out = len(losses)
    order = np.lexsort((losses[:, 0] & np.uint64(3), losses[:, 3], -losses[:, 2].astype(np.int64)))
    commit.result = AlarmResult(
        tuple(
            HeavyLoss(KINDS[key & 3], *numbers) for key, *numbers in losses[order[:1000]].tolist()
        )
    )
    return commit


def _too_much(sums: U64, config: DedupConfig) -> npt.NDArray[np.bool_]:
    documents, dropped = sums[:, 1].astype(np.float64), sums[:, 2].astype(np.float64)
    return (documents >= config.alarm_documents) & (dropped > config.alarm_share * documents)
