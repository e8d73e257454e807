"""Sorted keys of documents: the input of `match`, and the index for later batches.

A row is (key, doc_id): lane 0 holds content hashes, the others one band each. A document too short
to shingle has no band keys and takes part by its content hash alone. Banding: Broder 1997;
FineWeb's 14 x 8, arXiv:2406.17557. A key has 64 bits: among 10^11 documents about a hundred pairs
are expected to share one by chance.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic.dataclasses import dataclass

from filters import STRICT
from stages.dedup import minhash, shuffle
from stages.dedup.config import EARLIER, DedupConfig
from stages.dedup.shuffle import U64, group_starts
from stages.storage.files import open_parquet
from stages.storage.ledger import Commit, Store, Unit
from stages.storage.parts import PartRef, fixed_binary, read_columns

_INDEX_BITS = 56


@dataclass(frozen=True)
class SortTask:
    """Documents parts whose keys are sorted into one file."""

    parts: tuple[PartRef, ...]


@dataclass(frozen=True, config=STRICT)
class KeysResult:
    """Number of rows of sorted keys, and how the keys were made (`minhash.describe`)."""

    rows: int = 0
    keys: str = ""


def sort_unit(unit: Unit, config: DedupConfig, store: Store) -> Commit:
    """Sort the keys of a group of documents parts. The task is a SortTask."""
    task: SortTask = unit.task
    commit = Commit(unit.name, unit.fingerprint)
    batches = [b for part in task.parts for b in read_keys(part, config)]
    commit.rows_in = commit.rows_out = sum(len(b.ids) for b in batches)
    rows = commit.rows_in + config.num_bands * sum(len(b.keyed) for b in batches)
    commit.result = KeysResult(rows, minhash.describe(config.signature))
    shuffle.write(store, "keys", lanes_of(batches, config.num_bands), config.layout, commit=commit)
    return commit


class Keys(NamedTuple):
    """Keys of kept documents.

    `ids` and `content` keys are (n,); `keyed` are the ids with band keys (m,), `bands` their keys
    (m, num_bands).
    """

    ids: U64
    content: U64
    keyed: U64
    bands: U64


def read_keys(part: PartRef, config: DedupConfig) -> Iterator[Keys]:
    """Keys of a part's kept documents, in batches; ValueError if made with other settings."""
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
    """ValueError unless keys are made as configured: others agree only by chance."""
    expected = minhash.describe(config.signature)
    if found != expected:
        made = f"are '{found}'" if found else "do not say how they were made"
        raise ValueError(
            f"{where}: its keys {made}, expected '{expected}'; make them again, or change [dedup]"
        )


def _keys_of(batch: pa.RecordBatch, num_bands: int, uri: str) -> Keys:
    lengths = pc.binary_length(batch["band_keys"]).to_numpy()
    wrong = lengths[(lengths != 0) & (lengths != num_bands * 8)]
    if len(wrong):
        raise ValueError(
            f"{uri}: {wrong[0] // 8} band keys per document, expected {num_bands}; "
            "rerun stage 'extract'"
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


@dataclass(frozen=True)
class IndexTask:
    """Documents parts, and their keep tables by URI; without keep tables, all documents count."""

    parts: tuple[PartRef, ...]
    keep: tuple[str, ...] = ()


def index_unit(unit: Unit, config: DedupConfig, store: Store) -> Commit:
    """Write the sorted distinct keys of a group, for later batches. The task is an IndexTask."""
    task: IndexTask = unit.task
    commit = Commit(unit.name, unit.fingerprint)
    batches: list[Keys] = []
    for n, part in enumerate(task.parts):
        kept = _kept_ids(task.keep[n]) if task.keep else None
        batches += [b if kept is None else _filter_keys(b, kept) for b in read_keys(part, config)]
    commit.rows_in = commit.rows_out = sum(len(b.ids) for b in batches)
    sizes: list[int] = []
    lanes = _distinct_rows(lanes_of(batches, config.num_bands), sizes)
    shuffle.write(store, "keys", lanes, config.layout, commit=commit)
    commit.result = KeysResult(sum(sizes), minhash.describe(config.signature))
    return commit


def index_tag(number: int) -> int:
    """The bits that mark ids of index `number` among those of this batch."""
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


def _filter_keys(keys: Keys, kept: U64) -> Keys:
    among, keyed = np.isin(keys.ids, kept), np.isin(keys.keyed, kept)
    return Keys(keys.ids[among], keys.content[among], keys.keyed[keyed], keys.bands[keyed])


def _distinct_rows(lanes: Iterator[U64], sizes: list[int]) -> Iterator[U64]:
    """Of each lane one row per key; their numbers are appended to `sizes`."""
    for rows in lanes:
        if len(rows) and int(rows[:, 1].max()) >> _INDEX_BITS:
            raise ValueError(
                f"an index holds documents of at most {1 << (_INDEX_BITS - 32):,} input files"
            )
        ordered = shuffle.sort_rows(rows)
        distinct = ordered[group_starts(ordered[:, 0])]
        sizes.append(len(distinct))
        yield distinct
