"""Stage dedup, first half: which documents are copies of one another. Reads hashes and band keys,
never text.

  sort      documents parts -> one sorted file of rows (key, doc_id): lane 0 holds content hashes, the others one band each
  match     a partition of one lane -> edges: every bucket becomes a star to its smallest id, never all pairs
  star      only where the graph is beyond one machine's memory: rounds of large-star and small-star on the same shuffle
  cluster   edges -> labels: rows (doc_id, root), sent back to the groups of documents that `sort` worked on

A bucket is a set of documents with equal keys. A document too short to shingle has no band keys: it
takes part by its content hash alone. The second half, which copy stays, is in stages.keep. Banding:
Broder 1997; FineWeb's 14 x 8, arXiv:2406.17557. A key is 64 bits: among 10^11 documents some
hundred pairs are expected to share one by chance.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from filters import STRICT
from stages.dedup import minhash, shuffle
from stages.dedup.components import dense_components, large_star, small_star
from stages.dedup.minhash import Signature
from stages.dedup.shuffle import Layout, group_starts, merge, mix, unmix
from stages.storage.files import open_fs, open_parquet
from stages.storage.ledger import Commit, Store, Unit
from stages.storage.parts import PartRef, fixed_binary, read_columns

VERSION = 2
U64 = npt.NDArray[np.uint64]
CELLS = 4096  # of a lane: the most partitions that a band can be cut into
GIANT = 10_000  # documents of a bucket that is worth a line in the log
# Ids of documents of earlier batches carry this bit, so that they sort behind all others, and the
# number of their index.
EARLIER = 1 << 63
_INDEX_BITS = 56
_EDGES_AT_ONCE = 1_000_000
_ROWS_AT_ONCE = (
    1_000_000  # of a block, which may be hundreds of megabytes: what is made of it need not be
)
EDGES = Layout(width=2, lanes=1, cells=1 << 16)


@dataclass(frozen=True, config=STRICT)
class DedupConfig:
    """Settings of the dedup stage.

    `keep_rule` names the copy that stays: the longest, the newest by crawl date, the first by
    doc_id, or 'best:<column>', the one with the highest score; ties go to the smaller content hash,
    then the smaller doc_id.

    `against`: runs, or outputs of `gristmill dedup`, whose published documents count as copies that
    stay. They must have been made with `write_index`: the keys of their kept documents, or of all.
    `verify_share`: share of the dropped documents, in [0, 1], whose true Jaccard similarity with
    the kept copy is measured and stored in the keep table. A host, language or input of at least
    `alarm_documents` that loses more than `alarm_share` is pointed out.

    `line_level`: remove lines, or paragraphs, that an earlier document of the batch holds already
    (CCNet, Dolma).

    Sizes: `documents_per_unit` are sorted into one file (about 450 bytes of memory each); a unit
    works on `partition_bytes` of rows at once (about four times that in memory, and 0.2 GB); a
    graph that needs more than `cluster_memory` bytes is clustered in rounds on all workers instead
    of in one process.
    """

    enabled: bool = True
    num_bands: int = Field(default=14, gt=0, le=256)
    rows_per_band: int = Field(default=8, gt=0, le=64)
    ngram: int = Field(default=5, gt=0)
    scheme: Literal["affine32", "affine64"] = "affine32"
    seed: int = 1
    keep_rule: str = Field(default="longest", pattern=r"^(longest|newest|first|best:.+)$")
    against: tuple[str, ...] = Field(default=(), max_length=127)
    write_index: Literal["off", "kept", "all"] = "off"
    verify_share: float = Field(default=0.0, ge=0, le=1)
    alarm_share: float = Field(default=0.9, ge=0, le=1)
    alarm_documents: int = Field(default=20, gt=0)
    line_level: Literal["off", "line", "paragraph"] = "off"
    documents_per_unit: int = Field(default=2_000_000, gt=0)
    partition_bytes: int = Field(default=256_000_000, ge=100_000)
    cluster_memory: int = Field(default=8_400_000_000, gt=0)
    num_cpus: float = Field(default=1.0, gt=0)
    memory: int = Field(default=1_500_000_000, gt=0)
    parallelism: int = Field(default=0, ge=0)

    @property
    def signature(self) -> Signature:
        """What the extract stage needs to know to make the band keys."""
        return Signature(self.num_bands, self.rows_per_band, self.ngram, self.scheme, self.seed)

    @property
    def layout(self) -> Layout:
        """The grid of the sorted keys: a lane for content hashes and one for each band."""
        return Layout(width=2, lanes=1 + self.num_bands, cells=CELLS)

    @model_validator(mode="after")
    def _index_needs_keys(self) -> "DedupConfig":
        if not self.enabled and (
            self.write_index != "off" or self.against or self.line_level != "off"
        ):
            raise ValueError(
                "enabled = false leaves nothing to do for write_index, against and line_level"
            )
        return self


# --- sort -----------------------------------------------------------------------------------------


def sort_unit(unit: Unit, config: DedupConfig, store: Store) -> Commit:
    """Sort the keys of a group of documents parts. `unit.task`: {"parts": [PartRef...]}."""
    commit = Commit(unit.name, unit.fingerprint, extra={"keys": minhash.describe(config.signature)})
    batches = [b for part in unit.task["parts"] for b in read_keys(PartRef(*part), config)]
    commit.rows_in = commit.rows_out = sum(len(b.ids) for b in batches)
    commit.totals["rows"] = commit.rows_in + config.num_bands * sum(len(b.keyed) for b in batches)
    shuffle.write(store, "keys", lanes_of(batches, config.num_bands), config.layout, commit=commit)
    return commit


class Keys(NamedTuple):
    """Keys of some kept documents: ids (n,), content keys (n,); ids that have band keys (m,), band
    keys (m, num_bands).
    """

    ids: U64
    content: U64
    keyed: U64
    bands: U64


def read_keys(part: PartRef, config: DedupConfig) -> Iterator[Keys]:
    """Keys of a part's kept documents, some at a time.

    ValueError when they were made in another way than configured.
    """
    with open_parquet(part.uri) as file:
        require_same_keys(
            (file.schema_arrow.metadata or {}).get(b"gristmill.keys", b"").decode(),
            config,
            part.uri,
        )
        for batch in file.iter_batches(
            columns=["doc_id", "content_hash", "band_keys", "rejected_by"]
        ):
            yield _keys_of(
                batch.filter(pc.is_null(batch["rejected_by"])), config.num_bands, part.uri
            )


def require_same_keys(found: str, config: DedupConfig, where: str) -> None:
    """ValueError unless keys are made as configured: others agree by chance only."""
    wanted = minhash.describe(config.signature)
    if found != wanted:
        made = f"are '{found}'" if found else "do not say how they were made"
        raise ValueError(
            f"{where}: its keys {made}, expected '{wanted}'; make them again, or set [dedup] accordingly"
        )


def _keys_of(batch: pa.RecordBatch, num_bands: int, uri: str) -> Keys:
    lengths = pc.binary_length(batch["band_keys"]).to_numpy()
    wrong = lengths[(lengths != 0) & (lengths != num_bands * 8)]
    if len(wrong):
        raise ValueError(
            f"{uri}: {wrong[0] // 8} band keys a document, expected {num_bands}; rerun stage 'extract'"
        )
    ids = batch["doc_id"].to_numpy().astype(np.uint64)
    content = fixed_binary(batch["content_hash"], 16)[:, :8]
    bands = fixed_binary(batch["band_keys"], num_bands * 8)
    return Keys(
        ids,
        np.ascontiguousarray(content).view(">u8").ravel().astype(np.uint64),
        ids[lengths > 0],
        np.ascontiguousarray(bands).view("<u8").reshape(-1, num_bands),
    )


def lanes_of(batches: Sequence[Keys], num_bands: int) -> Iterator[U64]:
    """Rows (key, doc_id) of every lane, one lane at a time."""
    none = np.empty(0, np.uint64)
    ids = np.concatenate([none, *(b.ids for b in batches)])
    yield np.column_stack([np.concatenate([none, *(b.content for b in batches)]), ids])
    keyed = np.concatenate([none, *(b.keyed for b in batches)])
    for band in range(num_bands):
        yield np.column_stack([np.concatenate([none, *(b.bands[:, band] for b in batches)]), keyed])


# --- match ----------------------------------------------------------------------------------------


def match_unit(unit: Unit, config: DedupConfig, store: Store) -> Commit:
    """Edges of a partition. `unit.task`: {"shuffle": URI, "partition": number}."""
    commit = Commit(unit.name, unit.fingerprint)
    giants: list[dict[str, Any]] = []
    with (
        store.create("edges", f"{unit.name}.edges", outputs=commit.outputs) as path,
        open(path, "wb") as stream,
    ):
        blocks = merge(unit.task["shuffle"], unit.task["partition"], memory=config.partition_bytes)
        for edges in stars(_counted(blocks, commit), giants):
            edges.astype("<u8", copy=False).tofile(stream)
            commit.rows_out += len(edges)
    if giants:
        commit.extra["giant_buckets"] = sorted(giants, key=lambda g: -g["documents"])[:100]
    return commit


def _counted(blocks: Iterator[U64], commit: Commit) -> Iterator[U64]:
    for block in blocks:
        commit.rows_in += len(block)
        yield from (block[n : n + _ROWS_AT_ONCE] for n in range(0, len(block), _ROWS_AT_ONCE))


def stars(blocks: Iterator[U64], giants: list[dict[str, Any]]) -> Iterator[U64]:
    """Edges (smallest id, other id) of the buckets of rows (key, id), ascending; a bucket may go on
    in the next block.

    Buckets of more than GIANT documents are added to `giants`.
    """
    key, centre, size = None, np.uint64(0), 0
    for rows in blocks:
        starts = group_starts(rows[:, 0])
        lengths = np.diff(np.append(starts, len(rows)))
        centres, sizes = rows[starts, 1].copy(), lengths.copy()
        if len(rows) and key == rows[0, 0]:
            centres[0], sizes[0] = centre, size + sizes[0]
        edges = np.column_stack([np.repeat(centres, lengths), rows[:, 1]])
        yield edges[(edges[:, 0] != edges[:, 1]) & (edges[:, 0] < np.uint64(EARLIER))]
        for n in np.flatnonzero((sizes > GIANT) & (sizes - lengths <= GIANT)):
            giants.append(
                {"key": f"{rows[starts[n], 0]:016x}", "smallest": int(centres[n]), "documents": 0}
            )
        for n in np.flatnonzero(sizes > GIANT):
            giant = next(
                g
                for g in giants
                if g["smallest"] == int(centres[n]) and g["key"] == f"{rows[starts[n], 0]:016x}"
            )
            giant["documents"] = int(sizes[n])
        if len(rows):
            key, centre, size = rows[-1, 0], centres[-1], int(sizes[-1])


def read_edges(uris: Sequence[str]) -> Iterator[U64]:
    """Edges (m, 2) of some files, some at a time."""
    for uri in uris:
        fs, path = open_fs(uri)
        with fs.open(path, "rb") as stream:
            while data := stream.read(16 * _EDGES_AT_ONCE):
                yield np.frombuffer(data, "<u8").astype(np.uint64).reshape(-1, 2)


# --- star -----------------------------------------------------------------------------------------


def star_unit(unit: Unit, config: DedupConfig, store: Store) -> Commit:
    """One partition of one round. `unit.task`: {"operation", "edges": [URIs]} or {"operation",
    "shuffle", "partition"}.

    A round reads rows (mixed node, neighbour) and writes the edges of its operation as rows in both
    directions, of which the small-star uses those to smaller neighbours.
    """
    commit = Commit(unit.name, unit.fingerprint)
    # a node may have more neighbours than memory holds: as many sorted files as it takes, each from
    # edges (16 bytes) of a quarter of a partition
    for number, edges in enumerate(
        _gathered(_round(unit.task, config), size=config.partition_bytes // (4 * 16))
    ):
        both = np.concatenate([edges, edges[:, ::-1]])
        both[:, 0] = mix(both[:, 0])
        ordered = shuffle.sort_rows(both)
        distinct = ordered[np.append(True, (ordered[1:] != ordered[:-1]).any(axis=1))]
        commit.rows_out += len(distinct)
        shuffle.write(store, "rows", [distinct], EDGES, commit=commit, name=f"{unit.name}-{number}")
    return commit


def _gathered(blocks: Iterator[U64], *, size: int) -> Iterator[U64]:
    """The same rows in arrays of `size` rows or little more."""
    held: list[U64] = []
    for block in blocks:
        held.append(block)
        if sum(map(len, held)) >= size:
            yield np.concatenate(held)
            held = []
    if sum(map(len, held)):
        yield np.concatenate(held)


def _round(task: dict[str, Any], config: DedupConfig) -> Iterator[U64]:
    if task["operation"] == "read":
        yield from read_edges(task["edges"])
        return
    blocks = _nodes(merge(task["shuffle"], task["partition"], memory=config.partition_bytes))
    if task["operation"] == "large":
        yield from large_star(blocks)
    else:
        yield from small_star(block[block[:, 1] < block[:, 0]] for block in blocks)


def _nodes(blocks: Iterator[U64]) -> Iterator[U64]:
    for block in blocks:
        yield np.column_stack([unmix(block[:, 0]), block[:, 1]])


# --- cluster --------------------------------------------------------------------------------------


def cluster_unit(unit: Unit, config: DedupConfig, store: Store) -> Commit:
    """Labels. `unit.task`: {"first_ids": URI} and {"edges": [URIs]} (all), or {"shuffle",
    "partition"} of the last round.

    A label is a row (doc_id, root); its lane is the group of documents that the doc_id belongs to,
    the last one for documents of earlier batches. Documents that have no copy have no label.
    """
    commit = Commit(unit.name, unit.fingerprint)
    first_ids = (
        read_columns(unit.task["first_ids"], ["first_id"])["first_id"].to_numpy().astype(np.uint64)
    )
    if "edges" in unit.task:
        nodes, roots = dense_components(lambda: read_edges(unit.task["edges"]))
    else:
        blocks = _nodes(
            merge(unit.task["shuffle"], unit.task["partition"], memory=config.partition_bytes)
        )
        labels = np.concatenate([np.empty((0, 2), np.uint64), *_labels(blocks)])
        nodes, roots = labels[np.argsort(labels[:, 0])].T
    assert (first_ids[1:] > first_ids[:-1]).all()
    borders = np.searchsorted(nodes, np.append(first_ids[1:], np.uint64(EARLIER)))
    lanes = (
        np.column_stack([nodes[a:b], roots[a:b]])
        for a, b in pairwise([0, *borders.tolist(), len(nodes)])
    )
    shuffle.write(store, "labels", lanes, labels_layout(len(first_ids)), commit=commit)
    commit.rows_in = commit.rows_out = len(nodes)
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
        first = group_starts(block[:, 0])
        if len(block) and block[0, 0] == last:
            first = first[1:]
        yield np.column_stack([block[first, 0], block[first].min(axis=1)])
        last = block[-1, 0] if len(block) else last


# --- index ----------------------------------------------------------------------------------------


def index_unit(unit: Unit, config: DedupConfig, store: Store) -> Commit:
    """The sorted distinct keys of a group's documents, for later batches. `unit.task`: {"parts",
    "keep": [URIs] or []}.
    """
    commit = Commit(unit.name, unit.fingerprint, extra={"keys": minhash.describe(config.signature)})
    parts, keep = [PartRef(*p) for p in unit.task["parts"]], unit.task["keep"]
    batches: list[Keys] = []
    for n, part in enumerate(parts):
        kept = _kept_ids(keep[n]) if keep else None
        batches += [b if kept is None else _only(b, kept) for b in read_keys(part, config)]
    commit.rows_in = commit.rows_out = sum(len(b.ids) for b in batches)
    shuffle.write(
        store,
        "keys",
        _distinct(lanes_of(batches, config.num_bands), commit),
        config.layout,
        commit=commit,
    )
    return commit


def index_tag(number: int) -> int:
    """What marks the ids of index `number` among those of this batch."""
    return EARLIER | number << _INDEX_BITS


def earlier_documents(tagged: U64) -> tuple[U64, U64]:
    """Index numbers, and doc_ids there, of tagged ids."""
    return (tagged >> np.uint64(_INDEX_BITS)) & np.uint64(127), tagged & np.uint64(
        (1 << _INDEX_BITS) - 1
    )


def _kept_ids(uri: str) -> U64:
    table = read_columns(uri, ["doc_id", "keep"])
    ids: U64 = table["doc_id"].filter(table["keep"]).to_numpy().astype(np.uint64)
    return ids


def _only(keys: Keys, kept: U64) -> Keys:
    among, keyed = np.isin(keys.ids, kept), np.isin(keys.keyed, kept)
    return Keys(keys.ids[among], keys.content[among], keys.keyed[keyed], keys.bands[keyed])


def _distinct(lanes: Iterator[U64], commit: Commit) -> Iterator[U64]:
    for rows in lanes:
        if len(rows) and int(rows[:, 1].max()) >> _INDEX_BITS:
            raise ValueError(
                f"an index holds documents of at most {1 << (_INDEX_BITS - 32):,} input files"
            )
        ordered = shuffle.sort_rows(rows)
        distinct = ordered[group_starts(ordered[:, 0])]
        commit.totals["rows"] = commit.totals.get("rows", 0) + len(distinct)
        yield distinct
