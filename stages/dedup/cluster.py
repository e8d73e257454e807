"""Edges to labels (doc_id, root), sent back to the groups of documents that `sort` worked on.

star      only for graphs beyond one machine's memory: rounds of large-star and small-star
cluster   the whole graph in one process, or a partition of the last round
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

import numpy as np

from filters import validated
from stages.dedup import shuffle
from stages.dedup.components import changes, dense_components, large_star, small_star
from stages.dedup.config import EARLIER, DedupConfig
from stages.dedup.match import read_edges
from stages.dedup.shuffle import (
    U64,
    Layout,
    PartitionTask,
    concatenate,
    merge,
    mix,
    unmix,
)
from stages.storage.ledger import Commit, Store, Unit
from stages.storage.parts import read_columns

EDGES = Layout(width=2, lanes=1, cells=1 << 16)


@validated
class StarTask:
    """Part of a round of the alternating algorithm.

    "read" takes `edges` (URIs of edge files), the other operations a partition of a shuffle.
    """

    operation: Literal["read", "large", "small"]
    edges: tuple[str, ...] = ()
    partition: PartitionTask | None = None


def star_unit(unit: Unit, config: DedupConfig, store: Store) -> Commit:
    """Do one partition of one round. The task is a StarTask.

    A round reads rows (mixed node, neighbour) and writes the edges of its operation as rows in both
    directions, of which the small-star uses those to smaller neighbours.
    """
    commit = Commit(unit.name, unit.fingerprint)
    # a node may have more neighbours than memory holds: as many sorted files as it takes, each from
    # edges (16 bytes) of a quarter of a partition
    for number, edges in enumerate(
        _regroup(_run_operation(unit.task, config), size=config.partition_bytes // (4 * 16))
    ):
        both = np.concatenate([edges, edges[:, ::-1]])
        both[:, 0] = mix(both[:, 0])
        ordered = shuffle.sort_rows(both)
        distinct = ordered[changes(ordered[:, 0]) | changes(ordered[:, 1])]
        name = f"{unit.name}-{number}"
        commit.rows_out += shuffle.write(store, "rows", [distinct], EDGES, commit=commit, name=name)
    return commit


def _regroup(blocks: Iterator[U64], *, size: int) -> Iterator[U64]:
    """The same rows in arrays of `size` rows or little more."""
    pending: list[U64] = []
    for block in blocks:
        pending.append(block)
        if sum(map(len, pending)) >= size:
            yield np.concatenate(pending)
            pending = []
    if any(map(len, pending)):
        yield np.concatenate(pending)


def _run_operation(task: StarTask, config: DedupConfig) -> Iterator[U64]:
    if task.partition is None:
        yield from read_edges(task.edges)
        return
    blocks = _neighbors(task.partition, config)
    if task.operation == "large":
        yield from large_star(blocks)
    else:
        yield from small_star(block[block[:, 1] < block[:, 0]] for block in blocks)


def _neighbors(task: PartitionTask, config: DedupConfig) -> Iterator[U64]:
    """Rows (node, neighbor) of a partition of mixed nodes."""
    for block in merge(task.shuffle, task.partition, memory=config.partition_bytes):
        yield np.column_stack([unmix(block[:, 0]), block[:, 1]])


@validated
class ClusterTask:
    """The whole graph (`edges`: URIs of edge files), or a partition of the last round of stars.

    `first_ids` is the URI of a table with the first document id of every group, ascending.
    """

    first_ids: str
    edges: tuple[str, ...] = ()
    partition: PartitionTask | None = None


def cluster_unit(unit: Unit, config: DedupConfig, store: Store) -> Commit:
    """Write labels (doc_id, root). The task is a ClusterTask.

    The lane of a label is the group of documents that the doc_id belongs to, the last one for
    documents of earlier batches. Documents without a copy have no label.
    """
    task: ClusterTask = unit.task
    commit = Commit(unit.name, unit.fingerprint)
    first_ids = read_columns(task.first_ids, ["first_id"])["first_id"].to_numpy()
    if task.partition is None:
        nodes, roots = dense_components(lambda: read_edges(task.edges))
    else:
        blocks = _labels(_neighbors(task.partition, config))
        labels = concatenate(blocks, width=2)
        nodes, roots = labels[np.argsort(labels[:, 0])].T
    assert (first_ids[1:] > first_ids[:-1]).all()
    borders = np.searchsorted(nodes, np.append(first_ids[1:], np.uint64(EARLIER)))
    lanes = (
        np.column_stack([nodes[a:b], roots[a:b]])
        for a, b in pairwise([0, *borders.tolist(), len(nodes)])
    )
    commit.rows_in = commit.rows_out = shuffle.write(
        store, "labels", lanes, labels_layout(len(first_ids)), commit=commit
    )
    return commit


def labels_layout(groups: int) -> Layout:
    """The grid of labels: a lane for each group of documents, and one for documents of earlier
    batches.
    """
    return Layout(width=2, lanes=groups + 1)


def _labels(blocks: Iterator[U64]) -> Iterator[U64]:
    """(node, root) of rows (node, neighbour) of stars: the smaller of the two ends of a node's
    first row.
    """
    last = None
    for block in blocks:
        first = changes(block[:, 0], last)
        yield np.column_stack([block[first, 0], block[first].min(axis=1)])
        last = block[-1, 0] if len(block) else last
