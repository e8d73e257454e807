"""Stage dedup: which documents are copies of one another, and which copy stays. Reads hashes and band keys, never text.

Three phases, each a set of committed units:

  sort     documents parts -> one file of (band key, doc_id) sorted by (band, key), one of (content hash, doc_id), and for
           each the offsets of a fixed grid of cells: (band, top byte of the key)
  match    a contiguous range of cells -> edges: every bucket becomes a star to its smallest id, never all pairs
  cluster  edges -> connected components with the smallest id as root, and the keep table: doc_id, cluster_id,
           cluster_size, keep, kept_id, one part per documents part

A bucket is a set of documents with equal keys. A document too short to shingle has no band keys: it takes part by its
content hash alone. Banding: Broder 1997; FineWeb's 14 x 8, arXiv:2406.17557.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from filters import STRICT
from stages.ledger import Commit, Store, Unit
from stages.minhash import Signature

VERSION = 1
U64 = npt.NDArray[np.uint64]
CELLS = 256  # cells per band: the top byte of a key

KEEP = pa.schema(
    [
        pa.field("doc_id", pa.uint64(), nullable=False),
        pa.field("cluster_id", pa.uint64(), nullable=False),
        pa.field("cluster_size", pa.int64(), nullable=False),
        pa.field("keep", pa.bool_(), nullable=False),
        pa.field("kept_id", pa.uint64(), nullable=False),
    ]
)


@dataclass(frozen=True, config=STRICT)
class DedupConfig:
    """Settings of the dedup stage.

    `keep_rule` names the copy that stays: the longest, the newest by crawl date, the first by doc_id, or 'best:<column>', the
    one with the highest score; ties go to the smaller content hash, then the smaller doc_id. `parts_per_unit` documents
    parts are sorted into one file; `partitions` is the number of match units.
    """

    enabled: bool = True
    num_bands: int = Field(default=14, gt=0, le=256)
    rows_per_band: int = Field(default=8, gt=0, le=64)
    ngram: int = Field(default=5, gt=0)
    scheme: Literal["affine32", "affine64"] = "affine64"
    seed: int = 1
    keep_rule: str = Field(default="longest", pattern=r"^(longest|newest|first|best:.+)$")
    parts_per_unit: int = Field(default=32, gt=0)
    partitions: int = Field(default=16, gt=0, le=4096)
    num_cpus: float = Field(default=1.0, gt=0)
    memory: int = Field(default=1_500_000_000, gt=0)
    parallelism: int = Field(default=0, ge=0)

    @property
    def signature(self) -> Signature:
        """What the extract stage needs to know to make the band keys."""
        return Signature(self.num_bands, self.rows_per_band, self.ngram, self.scheme, self.seed)

    @model_validator(mode="after")
    def _partitions_divide_the_grid(self) -> "DedupConfig":
        if self.partitions > self.num_bands * CELLS:
            raise ValueError(f"partitions must not exceed num_bands * {CELLS} = {self.num_bands * CELLS}")
        return self


class PartRef(NamedTuple):
    """A Parquet part of an earlier stage: the unit that wrote it and where it lies."""

    unit: str
    uri: str


# --- sort ------------------------------------------------------------------------------------------------------------


def sort_unit(unit: Unit, config: DedupConfig, store: Store) -> Commit:
    """Sort the keys of some documents parts. `unit.task`: {"parts": [PartRef...]}."""
    commit = Commit(unit.name, unit.fingerprint)
    ids, hashes, keyed, keys = _read_keys([PartRef(*p) for p in unit.task["parts"]], config.num_bands)
    commit.rows_in = commit.rows_out = len(ids)
    exact = np.column_stack([hashes, ids])
    _save(store, "exact", unit.name, *_sorted_cells([exact]), commit=commit)
    bands = [np.column_stack([keys[:, band], keyed]) for band in range(config.num_bands)]
    _save(store, "bands", unit.name, *_sorted_cells(bands), commit=commit)
    return commit


def _read_keys(parts: Sequence[PartRef], num_bands: int) -> tuple[U64, U64, U64, U64]:
    """Of the kept documents: ids (n,), content hashes (n, 2), ids that have band keys (m,), band keys (m, num_bands)."""
    ids, hashes, keyed, keys = [], [], [], []
    for part in parts:
        table = read_columns(part.uri, ["doc_id", "content_hash", "band_keys", "rejected_by"])
        table = table.filter(pa.compute.is_null(table["rejected_by"])).combine_chunks()
        doc_ids = table["doc_id"].to_numpy()
        packed = table["band_keys"].to_pylist()
        wrong = next((len(p) for p in packed if p and len(p) != num_bands * 8), None)
        if wrong is not None:
            raise ValueError(f"{part.uri}: {wrong // 8} band keys a document, expected {num_bands}; rerun stage 'extract'")
        has_keys = np.fromiter((bool(p) for p in packed), bool, len(packed))
        ids.append(doc_ids)
        hashes.append(np.frombuffer(b"".join(table["content_hash"].to_pylist()), ">u8").reshape(-1, 2))
        keyed.append(doc_ids[has_keys])
        keys.append(np.frombuffer(b"".join(packed), "<u8").reshape(-1, num_bands))
    return (
        np.concatenate(ids).astype(np.uint64),
        np.concatenate(hashes).astype(np.uint64),
        np.concatenate(keyed).astype(np.uint64),
        np.concatenate(keys).astype(np.uint64),
    )


def _sorted_cells(bands: Sequence[U64]) -> tuple[U64, U64]:
    """Rows of each band sorted by key, then id, stacked; and the offsets of the grid, len(bands) * CELLS + 1 of them."""
    ordered = [rows[np.lexsort(rows.T[::-1])] for rows in bands]
    edges = np.arange(CELLS, dtype=np.uint64) << np.uint64(56)
    offsets, start = [], 0
    for rows in ordered:
        offsets.append(start + np.searchsorted(rows[:, 0], edges))
        start += len(rows)
    return np.concatenate(ordered), np.append(np.concatenate(offsets), start).astype(np.uint64)


def _save(store: Store, kind: str, name: str, rows: U64, offsets: U64, *, commit: Commit) -> None:
    with store.create(kind, f"{name}.keys", outputs=commit.outputs) as path:
        rows.astype("<u8").tofile(path)
    with store.create(kind, f"{name}.offsets", outputs=commit.outputs) as path:
        offsets.astype("<u8").tofile(path)


# --- match -----------------------------------------------------------------------------------------------------------


def match_unit(unit: Unit, config: DedupConfig, store: Store) -> Commit:
    """Edges of a range of cells. `unit.task`: {"kind": "bands" | "exact", "first", "last", "sorted": [unit names], "root"}."""
    commit = Commit(unit.name, unit.fingerprint)
    task, source = unit.task, Store(unit.task["root"])
    num_bands, width = (config.num_bands, 2) if task["kind"] == "bands" else (1, 3)
    files = [_CellFile(source.uri(task["kind"], name), num_bands, width) for name in task["sorted"]]
    stars: list[U64] = [np.empty((0, 2), np.uint64)]
    largest = 1
    for first, last in _bands_of(task["first"], task["last"]):
        rows = np.concatenate([f.read(first, last) for f in files])
        commit.rows_in += len(rows)
        edges, size = _stars(rows[np.lexsort(rows.T[::-1])])
        stars.append(edges)
        largest = max(largest, size)
    edges = np.unique(np.concatenate(stars), axis=0)
    commit.rows_out = len(edges)
    commit.extra["largest_bucket"] = largest
    with store.create("edges", f"{unit.name}.edges", outputs=commit.outputs) as path:
        edges.astype("<u8").tofile(path)
    return commit


def cell_ranges(num_bands: int, partitions: int) -> list[tuple[int, int]]:
    """The grid of num_bands * CELLS cells in `partitions` contiguous ranges [first, last)."""
    bounds = np.linspace(0, num_bands * CELLS, partitions + 1).astype(int).tolist()
    return list(pairwise(bounds))


def _bands_of(first: int, last: int) -> Iterator[tuple[int, int]]:
    # equal keys of different bands are no bucket: a range of cells is cut at the bands' borders
    while first < last:
        end = min(last, (first // CELLS + 1) * CELLS)
        yield first, end
        first = end


class _CellFile:
    """One sorted file of phase `sort`, read by ranges of cells."""

    def __init__(self, stem: str, num_bands: int, width: int) -> None:
        self.fs, self.path = fsspec.core.url_to_fs(f"{stem}.keys")
        self.width = width
        self.offsets = np.frombuffer(self.fs.cat_file(self.path.removesuffix("keys") + "offsets"), "<u8")
        if len(self.offsets) != num_bands * CELLS + 1:
            raise ValueError(f"{stem}.offsets: {len(self.offsets)} offsets, expected {num_bands * CELLS + 1}")

    def read(self, first: int, last: int) -> U64:
        row_bytes = 8 * self.width
        start, end = int(self.offsets[first]) * row_bytes, int(self.offsets[last]) * row_bytes
        data = self.fs.cat_file(self.path, start, end) if end > start else b""
        return np.frombuffer(data, "<u8").reshape(-1, self.width).astype(np.uint64)


def _stars(rows: U64) -> tuple[U64, int]:
    """Edges (smallest id, other id) of every bucket of rows sorted by (key..., id), and the size of the largest bucket."""
    if not len(rows):
        return np.empty((0, 2), np.uint64), 0
    starts = np.flatnonzero(np.append(True, (rows[1:, :-1] != rows[:-1, :-1]).any(axis=1)))
    sizes = np.diff(np.append(starts, len(rows)))
    centre = np.repeat(rows[starts, -1], sizes)
    edges = np.column_stack([centre, rows[:, -1]])
    return edges[edges[:, 0] != edges[:, 1]], int(sizes.max())


# --- cluster ---------------------------------------------------------------------------------------------------------


def cluster_unit(unit: Unit, config: DedupConfig, store: Store) -> Commit:
    """Components and the keep table. `unit.task`: {"parts": [PartRef...], "edges": [URIs]}."""
    commit = Commit(unit.name, unit.fingerprint)
    parts = [PartRef(*p) for p in unit.task["parts"]]
    nodes, roots = components(_read_edges(unit.task["edges"]))
    kept = _winners(parts, nodes, roots, config.keep_rule)
    members, counts = np.unique(roots, return_counts=True)
    sizes = counts[np.searchsorted(members, roots)] if len(nodes) else np.empty(0, np.int64)
    for part in parts:
        ids, _ = _kept_documents(part)
        table = _keep_table(ids, nodes, roots, sizes, kept)
        with store.create("keep", f"{part.unit}.parquet", outputs=commit.outputs) as path:
            pq.write_table(table, path, compression="zstd")
        commit.rows_in += len(ids)
        commit.rows_out += int(pa.compute.sum(table["keep"]).as_py() or 0)
    commit.counts = {"kept": commit.rows_out, "dedup.duplicate": commit.rows_in - commit.rows_out}
    commit.extra = {"cluster_sizes": _size_histogram(counts), "largest": _largest(members, counts, nodes, roots)}
    return commit


def components(edges: U64) -> tuple[U64, U64]:
    """Connected components of a graph of edges (m, 2): its nodes ascending, and the smallest id of each one's component.

    A dense union-find in scipy's compiled code over positions in the sorted list of nodes: 8 bytes a node and edge end.
    """
    nodes, dense = np.unique(edges, return_inverse=True)
    if not len(nodes):
        return nodes.astype(np.uint64), nodes.astype(np.uint64)
    ends = dense.reshape(-1, 2)
    graph = coo_matrix((np.ones(len(ends), bool), (ends[:, 0], ends[:, 1])), shape=(len(nodes), len(nodes)))
    _, labels = connected_components(graph, directed=False)
    _, first = np.unique(labels, return_index=True)  # nodes ascend, so the first of a label is its smallest id
    return nodes, nodes[first][labels]


def _read_edges(uris: Sequence[str]) -> U64:
    edges = [np.empty((0, 2), np.uint64)]
    for uri in uris:
        fs, path = fsspec.core.url_to_fs(uri)
        edges.append(np.frombuffer(fs.cat_file(path), "<u8").reshape(-1, 2).astype(np.uint64))
    return np.concatenate(edges)


def _kept_documents(part: PartRef) -> tuple[U64, U64]:
    table = read_columns(part.uri, ["doc_id", "content_hash", "rejected_by"])
    table = table.filter(pa.compute.is_null(table["rejected_by"])).combine_chunks()
    hashes = np.frombuffer(b"".join(table["content_hash"].to_pylist()), ">u8").reshape(-1, 2)
    return table["doc_id"].to_numpy().astype(np.uint64), hashes.astype(np.uint64)


def _winners(parts: Sequence[PartRef], nodes: U64, roots: U64, rule: str) -> U64:
    """The id that stays, for the cluster of each node; of the members of clusters only their rank columns are read."""
    if not len(nodes):
        return nodes
    column = {"longest": "num_chars", "newest": "crawl_date", "first": "doc_id"}.get(rule, rule.removeprefix("best:"))
    ids, ranks, hashes = [], [], []
    for part in parts:
        doc_ids, content = _kept_documents(part)
        table = read_columns(part.uri, [column, "rejected_by"])
        table = table.filter(pa.compute.is_null(table["rejected_by"]))
        member = np.isin(doc_ids, nodes)
        ids.append(doc_ids[member])
        hashes.append(content[member])
        ranks.append(_rank(table[column])[member])
    doc_ids, rank, content = np.concatenate(ids), np.concatenate(ranks), np.concatenate(hashes)
    rank = np.zeros(len(rank)) if rule == "first" else -rank
    tie = (np.zeros_like(content) if rule == "first" else content).T
    order = np.lexsort((doc_ids, tie[1], tie[0], rank, roots[np.searchsorted(nodes, doc_ids)]))
    by_root = roots[np.searchsorted(nodes, doc_ids[order])]
    clusters, first = np.unique(by_root, return_index=True)
    winners: U64 = doc_ids[order][first][np.searchsorted(clusters, roots)]
    return winners


def _rank(column: pa.ChunkedArray) -> npt.NDArray[np.float64]:
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.int64())
    rank = column.cast(pa.float64(), safe=False).to_numpy()
    return np.where(np.isnan(rank), -np.inf, rank)


def _keep_table(ids: U64, nodes: U64, roots: U64, sizes: npt.NDArray[Any], kept: U64) -> pa.Table:
    cluster, kept_id, size = ids.copy(), ids.copy(), np.ones(len(ids), np.int64)
    if len(nodes):
        place = np.minimum(np.searchsorted(nodes, ids), len(nodes) - 1)
        member = nodes[place] == ids
        cluster[member], kept_id[member] = roots[place[member]], kept[place[member]]
        size[member] = sizes[place[member]]
    return pa.table([ids, cluster, size, kept_id == ids, kept_id], schema=KEEP)


def _size_histogram(counts: npt.NDArray[Any]) -> dict[str, int]:
    """Number of clusters by size, in powers of two: '2', '3-4', '5-8', ..."""
    histogram: dict[str, int] = {}
    for size in counts.tolist():
        high = 1 << (size - 1).bit_length()
        low = high // 2 + 1
        name = str(high) if low == high else f"{low}-{high}"
        histogram[name] = histogram.get(name, 0) + 1
    return dict(sorted(histogram.items(), key=lambda item: int(item[0].split("-")[0])))


def _largest(members: U64, counts: npt.NDArray[Any], nodes: U64, roots: U64, top: int = 10) -> list[dict[str, Any]]:
    """The largest clusters with up to three members each, for the report."""
    order = np.lexsort((members, -counts))[:top]
    return [
        {"cluster_id": int(members[i]), "size": int(counts[i]), "members": nodes[roots == members[i]][:3].tolist()} for i in order
    ]


def read_columns(uri: str, columns: list[str] | None) -> pa.Table:
    """Some columns of a Parquet object anywhere fsspec reaches."""
    fs, path = fsspec.core.url_to_fs(uri)
    with fs.open(path, "rb") as stream:
        return pq.read_table(stream, columns=columns)
