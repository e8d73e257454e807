"""Which copy stays, and who lost too much: rank, elect, keep, alarm (see stages.dedup).

A document of an earlier batch (a tagged id, see `keys.index_tag`) beats all others and is not a
member of the cluster: a cluster that holds one loses all its documents.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import field
from functools import partial
from itertools import groupby
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from filters import validated
from filters.text.words import normalize
from stages.dedup import minhash, shuffle
from stages.dedup.config import CELLS, EARLIER, DedupConfig
from stages.dedup.keys import earlier_documents
from stages.dedup.shuffle import (
    U64,
    Layout,
    PartitionTask,
    concatenate,
    first_of_groups,
    merge,
    merge_all,
    mix,
    whole_groups,
)
from stages.formats.document import sampled, table_schema
from stages.storage.ledger import Commit, Store, Unit
from stages.storage.parts import PartRef, documents, fixed_binary, part_of, read_columns

KEEP = table_schema(
    {
        "doc_id": pa.uint64(),
        "cluster_id": pa.uint64(),  # the smallest doc_id of the cluster
        "cluster_size": pa.int64(),  # documents of this batch
        "keep": pa.bool_(),
        "kept_id": pa.uint64(),
    },
    {
        # the number of the index that holds the kept copy; null: this batch
        "kept_in": pa.uint8(),
        "rule": pa.string(),  # dedup.exact, dedup.near, dedup.earlier; null: kept
        # true Jaccard similarity with the kept copy; null: not measured
        "similarity": pa.float64(),
    },
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


@validated
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
        rows = [_candidates(labels, task.group, 0, 0, np.zeros((len(labels), 2)), labels[:, 0])]
    best = _best(concatenate(rows, width=CANDIDATES.width))
    commit.rows_out = shuffle.write(store, "candidates", [best], CANDIDATES, commit=commit)
    return commit


def _members(part: PartRef, labels: U64, group: int, rule: str) -> U64:
    column = _COLUMNS.get(rule, rule.removeprefix("best:"))
    table = _kept_documents(part, ["content_hash", *{column} - {"doc_id"}])
    place, member = _places(table["doc_id"].to_numpy(), labels)
    table = table.filter(pa.array(member)).combine_chunks()
    ids = table["doc_id"].to_numpy()
    rank = ids + 1 if rule == "first" else _descending(table[column])
    return _candidates(labels[place[member]], group, 1, rank, _hashes(table), ids)


def _candidates(
    labels: U64, group: int, members: int, rank: U64 | int, hashes: npt.NDArray[Any], ids: U64
) -> U64:
    """Rows of CANDIDATES for documents with labels."""
    rows = np.empty((len(labels), CANDIDATES.width), np.uint64)
    rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3] = mix(labels[:, 1]), group, members, rank
    rows[:, 4:6], rows[:, 6] = hashes, ids
    return rows


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
    column = table["content_hash"].combine_chunks()
    hashes: U64 = fixed_binary(column, 16).view(">u8").astype(np.uint64)
    return hashes


def _descending(column: pa.ChunkedArray) -> U64:
    """Ranks in (0, 2^64): greater values rank first, missing values and NaN last."""
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.int64())
    values = column.cast(pa.float64(), safe=False).to_numpy()
    bits = values.view(np.uint64)
    ascending = np.where(values < 0, ~bits, bits | (1 << 63))
    return np.where(np.isnan(values), _WORST, ~ascending)


def _best(rows: U64) -> U64:
    """The candidate of each cluster with the least (rank, content hash, doc_id); members summed."""
    return first_of_groups(rows[np.lexsort(rows[:, [6, 5, 4, 3, 0]].T)], summed=slice(2, 3))


# --- elect ----------------------------------------------------------------------------------------


@validated
class ElectResult:
    """Number of clusters by size class (see `size_classes`)."""

    cluster_sizes: dict[str, int] = field(default_factory=dict)


def elect_unit(unit: Unit, config: DedupConfig, store: Store) -> Commit:
    """Write the winners of a partition of clusters. The task is a PartitionTask."""
    task: PartitionTask = unit.task
    commit = Commit(unit.name, unit.fingerprint)
    sizes: Counter[str] = Counter()
    answers = []
    for rows in whole_groups(merge(task.shuffle, task.partition, memory=config.partition_bytes)):
        best = _best(rows)
        answers.append(_answers(rows, best))
        sizes.update(size_classes(best[:, 2]))
        commit.rows_in += len(rows)
        commit.rows_out += len(best)
    groups = concatenate(answers, width=6)
    shuffle.write_by_group(
        store, "verdicts", groups[:, 1:], groups[:, 0], verdicts_layout(task.groups), commit=commit
    )
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
    exponents = np.ceil(np.log2(np.maximum(sizes, 1).astype(np.float64))).astype(int)
    return {
        ("1", "2")[e] if e < 2 else f"{2 ** (e - 1) + 1}-{2**e}": count
        for e, count in sorted(Counter(exponents.tolist()).items())
    }


# --- keep -----------------------------------------------------------------------------------------


@validated
class KeepTask:
    """A group of documents parts, and the shuffles of labels and verdicts by URI (None: no dedup).

    `seed` draws the documents whose similarity is measured.
    """

    group: int
    parts: tuple[PartRef, ...]
    labels: str | None
    verdicts: str | None
    seed: int


@validated
class LargeCluster:
    """A cluster, its size in documents, and some of its members in this group."""

    cluster_id: int
    size: int
    members: list[int] = field(default_factory=list)


@validated
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
    losses: list[U64] = []
    largest, measured = _largest(verdicts), 0
    for part in task.parts:
        documents = _kept_documents(part, ["content_hash", "host", "language", "warc_file"])
        table = _keep_table(documents, labels, verdicts)
        similarities = _similarities(table, part, config, task.seed)
        table = table.append_column(KEEP.field("similarity"), similarities)
        store.write_part(table, "keep", part.unit, commit=commit)
        counts.update(rule or "kept" for rule in table["rule"].to_pylist())
        losses += _losses(documents, table["keep"])
        _add_members(largest, table)
        commit.rows_in += table.num_rows
        measured += len(similarities) - similarities.null_count
    summed = _sum_losses(concatenate(losses, width=LOSSES.width))
    shuffle.write(store, "losses", [summed], LOSSES, commit=commit)
    commit.rows_out, commit.counts = counts["kept"], dict(sorted(counts.items()))
    commit.result = KeepResult(measured, tuple(largest.values()))
    return commit


def _largest(verdicts: U64, count: int = 10) -> dict[int, LargeCluster]:
    """The largest clusters with members in a group, by cluster_id, for the report.

    The largest clusters of the whole batch are among those of the groups.
    """
    order = np.lexsort((verdicts[:, 0], -verdicts[:, 1].astype(np.int64)))[:count]
    roots, sizes = shuffle.unmix(verdicts[order, 0]), verdicts[order, 1]
    return {
        root: LargeCluster(root, size)
        for root, size in zip(roots.tolist(), sizes.tolist(), strict=True)
    }


def _add_members(largest: dict[int, LargeCluster], table: pa.Table, count: int = 3) -> None:
    rows = table.filter(pc.is_in(table["cluster_id"], pa.array(list(largest), pa.uint64())))
    for row in rows.select(["doc_id", "cluster_id"]).to_pylist():
        members = largest[row["cluster_id"]].members
        if len(members) < count:
            members.append(row["doc_id"])


def _keep_table(documents: pa.Table, labels: U64, verdicts: U64) -> pa.Table:
    """Columns of KEEP, all but the similarity."""
    ids = documents["doc_id"].to_numpy()
    place, member = _places(ids, labels)
    cluster, size, kept = ids.copy(), np.ones(len(ids), np.int64), ids.copy()
    near = np.zeros(len(ids), bool)
    if member.any():
        roots = labels[place[member], 1]
        verdict = verdicts[np.searchsorted(verdicts[:, 0], mix(roots))]
        cluster[member], size[member], kept[member] = roots, verdict[:, 1], verdict[:, 4]
        near[member] = (_hashes(documents)[member] != verdict[:, 2:4]).any(axis=1)
    earlier = kept >= EARLIER
    rule = np.where(earlier, "dedup.earlier", np.where(near, "dedup.near", "dedup.exact"))
    number, doc_id = earlier_documents(kept)
    keep = kept == ids
    columns = [
        *(ids, cluster, size, keep),
        np.where(earlier, doc_id, kept),
        pa.array(number.astype(np.uint8), mask=~earlier),
        pa.array(rule, pa.string(), mask=keep),
    ]
    return pa.table(columns, schema=pa.schema(list(KEEP)[:-1]))


# --- verification ---------------------------------------------------------------------------------


def _similarities(table: pa.Table, part: PartRef, config: DedupConfig, seed: int) -> pa.Array:
    """True similarity of sampled dropped documents with their kept copies, null for all others.

    Only copies kept in this batch are compared.
    """
    if not config.verify_share:
        return pa.nulls(table.num_rows, pa.float64())
    ids, kept_ids = table["doc_id"].to_pylist(), table["kept_id"].to_pylist()
    dropped = pc.indices_nonzero(pc.and_not(pc.is_null(table["kept_in"]), table["keep"]))
    rows = [
        row
        for row in dropped.to_pylist()
        if sampled(ids[row], share=config.verify_share, seed=seed)
    ]
    similarity = np.full(table.num_rows, np.nan)
    for first in range(0, len(rows), _PAIRS_AT_ONCE):
        some = rows[first : first + _PAIRS_AT_ONCE]
        needed = {i for row in some for i in (ids[row], kept_ids[row])}
        sets = _shingle_sets(needed, part, config.ngram)
        for row in some:
            similarity[row] = _jaccard(sets[ids[row]], sets[kept_ids[row]])
    return pa.array(similarity, mask=np.isnan(similarity))


def _shingle_sets(ids: set[int], part: PartRef, ngram: int) -> dict[int, U64]:
    """Shingles of documents of any part; a text without shingles counts as one shingle."""
    sets = {}
    for uri, wanted in groupby(sorted(ids), partial(part_of, beside=part.uri)):
        for doc_id, row in documents(uri, list(wanted), ["text"]).items():
            if row["text"] is None:
                raise ValueError(
                    f"{uri}: texts were not kept; verify_share needs extract.keep_text = true"
                )
            normalized = normalize(row["text"])
            shingles = minhash.shingle_hashes(normalized, ngram=ngram)
            whole = xxhash.xxh64_intdigest(normalized.encode("utf-8", "surrogatepass"))
            sets[doc_id] = shingles if len(shingles) else np.array([whole], np.uint64)
    return sets


def _jaccard(a: U64, b: U64) -> float:
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


# --- alarm ----------------------------------------------------------------------------------------


def _losses(documents: pa.Table, keep: pa.ChunkedArray) -> Iterator[U64]:
    """Rows of LOSSES for every host, language and input file of a part."""
    dropped = pc.invert(keep).cast(pa.uint64())
    for kind, column in enumerate(("host", "language", "warc_file")):
        table = pa.table(
            [documents[column], dropped, documents["doc_id"]], ["name", "dropped", "id"]
        )
        # no host: a document without a URL
        named = table.filter(pc.not_equal(table["name"], "")).group_by("name")
        sums = named.aggregate([("dropped", "count"), ("dropped", "sum"), ("id", "min")])
        name, *numbers = sums.select(["name", "dropped_count", "dropped_sum", "id_min"]).columns
        keys = [xxhash.xxh64_intdigest(text.encode()) & ~3 | kind for text in name.to_pylist()]
        yield np.column_stack(
            [
                np.array(keys, np.uint64),
                *(number.cast(pa.uint64()).to_numpy() for number in numbers),
            ]
        )


def _sum_losses(rows: U64) -> U64:
    return first_of_groups(rows[np.lexsort((rows[:, 3], rows[:, 0]))], summed=slice(1, 3))


@validated
class HeavyLoss:
    """A host, language or input file that lost too much: documents before, dropped, one of them."""

    kind: Literal["host", "language", "input"]
    documents: int
    dropped: int
    example: int


@validated
class AlarmResult:
    """Heavy losses of a partition, most dropped documents first, at most 1000."""

    heavy_losses: tuple[HeavyLoss, ...] = ()


def alarm_unit(unit: Unit, config: DedupConfig, store: Store) -> Commit:
    """Find the heavy losses of a partition. The task is a PartitionTask."""
    task: PartitionTask = unit.task
    commit = Commit(unit.name, unit.fingerprint)
    heavy = []
    for rows in whole_groups(merge(task.shuffle, task.partition, memory=config.partition_bytes)):
        sums = _sum_losses(rows)
        commit.rows_in += len(sums)
        heavy.append(sums[_too_much(sums, config)])
    losses = concatenate(heavy, width=LOSSES.width)
    commit.rows_out = len(losses)
    order = np.lexsort((losses[:, 0] & 3, losses[:, 3], -losses[:, 2].astype(np.int64)))
    commit.result = AlarmResult(
        tuple(
            HeavyLoss(KINDS[key & 3], *numbers) for key, *numbers in losses[order[:1000]].tolist()
        )
    )
    return commit


def _too_much(sums: U64, config: DedupConfig) -> npt.NDArray[np.bool_]:
    documents, dropped = sums[:, 1].astype(np.float64), sums[:, 2].astype(np.float64)
    return (documents >= config.alarm_documents) & (dropped > config.alarm_share * documents)
