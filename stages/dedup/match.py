"""Sorted keys to edges: a bucket becomes a star to its smallest id, never all pairs.

A bucket is a set of documents with equal keys.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from filters import validated
from stages.dedup.config import EARLIER, DedupConfig
from stages.dedup.shuffle import U64, PartitionTask, group_starts, merge
from stages.storage.files import open_fs
from stages.storage.ledger import Commit, Store, Unit

GIANT = 10_000  # documents of a bucket that the report lists
_EDGES_AT_ONCE = 1_000_000
# of a block, which may be hundreds of megabytes: what is made of it need not be
_ROWS_AT_ONCE = 1_000_000


@validated
class GiantBucket:
    """A bucket of more than GIANT documents: band key in hex, smallest document id, size."""

    key: str
    smallest: int
    documents: int


@validated
class MatchResult:
    """The largest buckets of a partition, at most 100."""

    giant_buckets: tuple[GiantBucket, ...] = ()


def match_unit(unit: Unit, config: DedupConfig, store: Store) -> Commit:
    """Write the edges of a partition of keys. The task is a PartitionTask."""
    task: PartitionTask = unit.task
    commit = Commit(unit.name, unit.fingerprint)
    giants: dict[tuple[str, int], int] = {}
    with (
        store.create("edges", f"{unit.name}.edges", outputs=commit.outputs) as path,
        open(path, "wb") as stream,
    ):
        blocks = merge(task.shuffle, task.partition, memory=config.partition_bytes)
        for edges in stars(_count_rows(blocks, commit), giants):
            edges.astype("<u8", copy=False).tofile(stream)
            commit.rows_out += len(edges)
    largest = sorted(giants.items(), key=lambda giant: -giant[1])[:100]
    commit.result = MatchResult(tuple(GiantBucket(*bucket, size) for bucket, size in largest))
    return commit


def _count_rows(blocks: Iterator[U64], commit: Commit) -> Iterator[U64]:
    for block in blocks:
        commit.rows_in += len(block)
        yield from (block[n : n + _ROWS_AT_ONCE] for n in range(0, len(block), _ROWS_AT_ONCE))


def stars(blocks: Iterator[U64], giants: dict[tuple[str, int], int]) -> Iterator[U64]:
    """Edges (smallest id, other id) of the buckets of rows (key, id), ascending.

    A bucket may continue in the next block. Buckets of more than GIANT documents are added to
    `giants`: (key in hex, smallest id) to size.
    """
    key, center, size = None, np.uint64(0), 0
    for rows in blocks:
        starts = group_starts(rows[:, 0])
        lengths = np.diff(np.append(starts, len(rows)))
        centers, sizes = rows[starts, 1].copy(), lengths.copy()
        if len(rows) and key == rows[0, 0]:
            centers[0], sizes[0] = center, size + sizes[0]
        edges = np.column_stack([np.repeat(centers, lengths), rows[:, 1]])
        yield edges[(edges[:, 0] != edges[:, 1]) & (edges[:, 0] < EARLIER)]
        for n in np.flatnonzero(sizes > GIANT):
            giants[f"{rows[starts[n], 0]:016x}", int(centers[n])] = int(sizes[n])
        if len(rows):
            key, center, size = rows[-1, 0], centers[-1], int(sizes[-1])


def read_edges(uris: Sequence[str]) -> Iterator[U64]:
    """Edges (m, 2) of some files, some at a time."""
    for uri in uris:
        fs, path = open_fs(uri)
        with fs.open(path, "rb") as stream:
            while data := stream.read(16 * _EDGES_AT_ONCE):
                yield np.frombuffer(data, "<u8").astype(np.uint64).reshape(-1, 2)
