"""A shuffle of fixed-width rows through sorted files: any number of rows in bounded memory.

    write      a unit sorts its rows by (lane, key, other columns) and writes them as one object,
               with the number of rows in every cell of a fixed grid: lane x top bits of the key
    transpose  one small job turns the grids of all files into one object: for each border between
               partitions, its offset in every file, so that no reducer reads an index per file
    merge      a reducer reads its borders, then its byte range of every file, in blocks of
               ascending rows; a key with more rows than fit in memory comes in several blocks

A row is `width` uint64 columns, the key first: 16 bytes for a band key and its document. Lanes are
never mixed: a lane is a band, or the group that rows are sent back to. A partition is a run of
cells within one lane.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import zstandard

from filters import validated
from stages.dedup.components import changes
from stages.storage.digests import digest
from stages.storage.files import exists, open_fs, read_bytes, write_atomically
from stages.storage.ledger import Commit, Store

U64 = npt.NDArray[np.uint64]
# an object store answers a request for fewer bytes than these no faster
MIN_READ = 64_000
_READERS = 16
_MIX = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_UNMIX = np.uint64(0x96DE1B173F119089), np.uint64(0x319642B2D24D8EC3)


class Layout(NamedTuple):
    """Columns of a row, and the grid of `lanes` x `cells`.

    `cells` is a power of two up to 2^16, 1 if keys are not uniform.
    """

    width: int
    lanes: int
    cells: int = 1


class Source(NamedTuple):
    """A sorted file: its URI without suffix, and bits to set in the second column when reading."""

    uri: str
    tag: int = 0


class Shuffle(NamedTuple):
    """A shuffle that can be transposed: URI of its borders, its files, and partitions per lane."""

    uri: str
    sources: tuple[Source, ...]
    layout: Layout
    per_lane: int

    @property
    def partitions(self) -> int:
        """Number of partitions, the same for each lane; those of lane 0 come first."""
        return self.per_lane * self.layout.lanes


@validated
class PartitionTask:
    """A unit's task: one partition of a shuffle, by the shuffle's URI.

    `groups` is the number of groups that answers to its rows go back to, if there are answers.
    """

    shuffle: str
    partition: int
    groups: int = 0


def mix(ids: U64) -> U64:
    """A bijection of 64-bit integers onto uniform keys (the finaliser of splitmix64, Steele et al.

    2014).
    """
    mixed = (ids ^ (ids >> np.uint64(30))) * _MIX[0]
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX[1]
    last: U64 = mixed ^ (mixed >> np.uint64(31))
    return last


def unmix(keys: U64) -> U64:
    """The ids of mixed keys, the inverse of `mix`."""
    ids = (keys ^ (keys >> np.uint64(31)) ^ (keys >> np.uint64(62))) * _UNMIX[1]
    ids = (ids ^ (ids >> np.uint64(27)) ^ (ids >> np.uint64(54))) * _UNMIX[0]
    last: U64 = ids ^ (ids >> np.uint64(30)) ^ (ids >> np.uint64(60))
    return last


# --- write ----------------------------------------------------------------------------------------


def write(
    store: Store, kind: str, lanes: Iterable[U64], layout: Layout, *, commit: Commit, name: str = ""
) -> int:
    """Write the rows of every lane, each (n, width) in any order, as a sorted file; their number.

    `name` is the unit's by default. One lane at a time is held in memory.
    """
    counts, name = [], name or commit.unit
    with (
        store.create(kind, f"{name}.rows", outputs=commit.outputs) as path,
        open(path, "wb") as stream,
    ):
        for rows in lanes:
            ordered = sort_rows(rows)
            counts.append(_cells(ordered[:, 0], layout.cells))
            ordered.astype("<u8", copy=False).tofile(stream)
    assert len(counts) == layout.lanes
    cells = np.concatenate(counts)
    with store.create(kind, f"{name}.cells", outputs=commit.outputs) as path:
        path.write_bytes(zstandard.compress(cells.astype("<u4").tobytes()))
    return int(cells.sum())


def write_by_group(
    store: Store, kind: str, rows: U64, groups: U64, layout: Layout, *, commit: Commit
) -> int:
    """Write each row to the lane of its group; the number of rows."""
    order = np.argsort(groups, kind="stable")
    borders = np.searchsorted(groups[order], np.arange(1, layout.lanes, dtype=np.uint64))
    return write(store, kind, np.split(rows[order], borders), layout, commit=commit)


def sort_rows(rows: U64) -> U64:
    """Rows in ascending order of all columns."""
    if (rows[1:, 0] > rows[:-1, 0]).all():
        return rows
    # rows nearly always come with equal keys in order: by input file, and within it by document
    ordered: U64 = rows[np.argsort(np.ascontiguousarray(rows[:, 0]), kind="stable")]
    tied = np.flatnonzero(ordered[1:, 0] == ordered[:-1, 0])
    if rows.shape[1] == 2 and (ordered[tied, 1] <= ordered[tied + 1, 1]).all():
        return ordered
    return ordered if not len(tied) else rows[np.lexsort(rows.T[::-1])]


def _cells(keys: U64, cells: int) -> npt.NDArray[np.int64]:
    if cells == 1:
        return np.array([len(keys)])
    return np.bincount((keys >> 64 - cells.bit_length() + 1).astype(np.int64), minlength=cells)


# --- transpose ------------------------------------------------------------------------------------


def partitions_per_lane(rows: int, layout: Layout, *, files: int, partition_bytes: int) -> int:
    """Partitions of about `partition_bytes`, or more if a reducer's range of a file gets too small.

    A range below MIN_READ is not worth a request.
    """
    size = max(partition_bytes, files * MIN_READ)
    return int(min(layout.cells, max(1, -(-rows * layout.width * 8 // (size * layout.lanes)))))


def plan(
    store: Store, sources: Sequence[Source], layout: Layout, *, per_lane: int, identity: Any
) -> Shuffle:
    """The shuffle of some sorted files, named by their content. Nothing is read or written yet."""
    name = digest([identity, list(sources), layout, per_lane])
    return Shuffle(store.uri("shuffles", name), tuple(sources), layout, per_lane)


def transpose(shuffle: Shuffle) -> None:
    """Write the borders of all partitions in all files, if that was not done before.

    (partitions + 1) x files x 8 bytes: a reducer reads two rows of it. Held in memory, 3.0 GB for
    30,000 partitions of 12,500 files, which are 100 billion documents.
    """
    if exists(f"{shuffle.uri}.json"):
        return
    layout, sources = shuffle.layout, shuffle.sources
    in_lane = np.linspace(0, layout.cells, shuffle.per_lane + 1).astype(np.int64)
    lane_starts = np.arange(layout.lanes) * layout.cells
    edges = np.append(np.add.outer(lane_starts, in_lane[:-1]), layout.lanes * layout.cells)
    borders = np.zeros((len(edges), len(sources)), "<u8")

    def fill(n: int) -> None:
        counts = np.frombuffer(zstandard.decompress(read_bytes(f"{sources[n].uri}.cells")), "<u4")
        if len(counts) != layout.lanes * layout.cells:
            expected = f"{layout.lanes} x {layout.cells}"
            raise ValueError(
                f"{sources[n].uri}.cells: {len(counts)} cells, expected {expected}; "
                "it was written with another layout"
            )
        borders[:, n] = np.append(np.uint64(0), counts.cumsum(dtype=np.uint64))[edges]

    with ThreadPoolExecutor(_READERS) as pool:
        list(pool.map(fill, range(len(sources))))
    write_atomically(f"{shuffle.uri}.borders", borders.reshape(-1).view(np.uint8).data)
    write_atomically(
        f"{shuffle.uri}.json", json.dumps({"width": layout.width, "files": list(sources)}).encode()
    )


# --- merge ----------------------------------------------------------------------------------------


def merge(uri: str, partition: int, *, memory: int) -> Iterator[U64]:
    """Rows of a partition, ascending by their first two columns at least, in blocks.

    A block holds about `memory` bytes at most, or MIN_READ for each file if that is more. Rows of
    one key may come in several blocks, the smallest first.
    """
    manifest = json.loads(read_bytes(f"{uri}.json"))
    width, files = manifest["width"], manifest["files"]
    start, stop = (
        _read(f"{uri}.borders", partition * len(files), (partition + 2) * len(files))
        .reshape(2, -1)
        .astype(np.int64)
    )
    runs = [
        _Run(f"{files[n][0]}.rows", files[n][1], width, start[n], stop[n])
        for n in np.flatnonzero(stop > start)
    ]
    size = max(MIN_READ, memory // max(1, len(runs))) // (8 * width)
    with ThreadPoolExecutor(_READERS) as pool:
        while runs:
            list(pool.map(lambda run: run.fill(size), (r for r in runs if not len(r.rows))))
            # rows up to the least last row of the unfinished files have been read from every file
            limit = min((r.last for r in runs if r.left), default=None)
            block = _sort_together([r.take(limit) for r in runs])
            runs = [r for r in runs if r.left or len(r.rows)]
            yield block
            del block


def _sort_together(sorted_rows: list[U64]) -> U64:
    if len(sorted_rows) == 1:
        return sorted_rows[0]
    rows = np.concatenate(sorted_rows)
    sorted_rows.clear()  # before memory is needed for sorting
    return sort_rows(rows)


def merge_all(uri: str, partition: int, *, width: int) -> U64:
    """All rows of a small partition."""
    return concatenate(merge(uri, partition, memory=1 << 40), width=width)


@dataclass
class _Run:
    """One file's range of a partition: what is unread, and rows that were read but not taken."""

    uri: str
    tag: int
    width: int
    start: int
    stop: int
    rows: U64 = field(default_factory=lambda: np.empty((0, 0), np.uint64))

    @property
    def left(self) -> bool:
        return self.start < self.stop

    @property
    def last(self) -> tuple[int, int]:
        return int(self.rows[-1, 0]), int(self.rows[-1, 1])

    def fill(self, size: int) -> None:
        end = min(self.stop, self.start + size)
        self.rows = _read(self.uri, self.start * self.width, end * self.width).reshape(
            -1, self.width
        )
        self.start = end
        if self.tag:
            self.rows = self.rows.copy()
            self.rows[:, 1] |= self.tag

    def take(self, limit: tuple[int, int] | None) -> U64:
        count = len(self.rows) if limit is None else self._place(limit)
        taken, self.rows = self.rows[:count], self.rows[count:]
        if not len(self.rows):
            # a view would keep alive what has been taken
            self.rows = np.empty((0, self.width), np.uint64)
        return taken

    def _place(self, limit: tuple[int, int]) -> int:
        key, second = np.uint64(limit[0]), np.uint64(limit[1])
        first, end = (
            np.searchsorted(self.rows[:, 0], key, "left"),
            np.searchsorted(self.rows[:, 0], key, "right"),
        )
        return int(first + np.searchsorted(self.rows[first:end, 1], second, "right"))


def _read(uri: str, start: int, stop: int) -> U64:
    """Values [start, stop) of an object of little-endian uint64."""
    fs, path = open_fs(uri)
    # by name: what comes second differs between stores
    data = fs.cat_file(path, start=int(start) * 8, end=int(stop) * 8)
    if len(data) != (stop - start) * 8:
        raise ValueError(
            f"{uri}: {len(data)} bytes at {start * 8}, expected {(stop - start) * 8}; "
            "it is truncated"
        )
    return np.frombuffer(data, "<u8").astype(np.uint64, copy=False)


# --- groups of rows -------------------------------------------------------------------------------


def concatenate(blocks: Iterable[U64], *, width: int) -> U64:
    """All rows of some blocks; there may be none."""
    return np.concatenate([np.empty((0, width), np.uint64), *blocks])


def whole_groups(blocks: Iterator[U64]) -> Iterator[U64]:
    """The same rows in blocks that never end within a key. Holds the rows of one key: for keys
    known to be small.
    """
    rest: list[U64] = []
    for block in (b for b in blocks if len(b)):
        rows = np.concatenate([*rest, block])
        border = int(np.searchsorted(rows[:, 0], rows[-1, 0], "left"))
        if border:
            yield rows[:border]
        rest = [rows[border:].copy()]
    yield from rest


def group_starts(keys: U64) -> npt.NDArray[np.int64]:
    """Indices at which a run of equal keys begins."""
    return np.flatnonzero(changes(keys))


def first_of_groups(ordered: U64, *, summed: slice) -> U64:
    """The first row of each key, with the sums of the `summed` columns over the rows of the key."""
    starts = group_starts(ordered[:, 0])
    first: U64 = ordered[starts]
    if len(starts):
        first[:, summed] = np.add.reduceat(ordered[:, summed], starts, axis=0)
    return first
