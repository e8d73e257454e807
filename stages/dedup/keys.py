"""Sorted keys of documents: the input of `match`, and the index for later batches.

A row is (key, doc_id): lane 0 holds content hashes, the others one band each. A document too short
to shingle has no band keys and takes part by its content hash alone. Banding: Broder 1997;
FineWeb's 14 x 8, arXiv:2406.17557. A key has 64 bits: among 10^11 documents about a hundred pairs
are expected to share one by chance.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, zip_longest
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from filters import validated
from stages.dedup import minhash, shuffle
from stages.dedup.config import EARLIER, DedupConfig
from stages.dedup.shuffle import U64, concatenate, group_starts
from stages.storage.files import open_parquet
from stages.storage.ledger import Commit, Store, Unit
from stages.storage.parts import PartRef, fixed_binary, kept_ids, read_ahead, read_columns

_INDEX_BITS = 56


@validated
class SortTask:
    """Documents parts whose keys are sorted into one file.

    `keep` are their keep tables by URI; without them, all documents that extract kept count.
    """

    parts: tuple[PartRef, ...]
    keep: tuple[str, ...] = ()


@validated
class KeysResult:
    """Number of rows of sorted keys, and how the keys were made (`minhash.describe`)."""

    rows: int = 0
    keys: str = ""


def sort_unit(unit: Unit, config: DedupConfig, store: Store) -> Commit:
    """Sort the keys of a group of documents parts. The task is a SortTask."""
    return _write_keys(unit, lambda rows: rows, config, store)


def index_unit(unit: Unit, config: DedupConfig, store: Store) -> Commit:
    """Write the sorted distinct keys of a group, for later batches. The task is a SortTask."""
    return _write_keys(unit, _distinct_rows, config, store)


def _write_keys(
    unit: Unit, select: Callable[[U64], U64], config: DedupConfig, store: Store
) -> Commit:
    task: SortTask = unit.task
    pairs = zip_longest(task.parts, task.keep)
    read = read_ahead(lambda pair: list(read_keys(pair[0], config, pair[1])), pairs)
    batches = list(chain.from_iterable(read))
    documents = sum(len(batch.ids) for batch in batches)
    commit = Commit(unit.name, unit.fingerprint, rows_in=documents, rows_out=documents)
    lanes = map(select, lanes_of(batches, config.num_bands))
    rows = shuffle.write(store, "keys", lanes, config.layout, commit=commit)
    commit.result = KeysResult(rows, minhash.describe(config.signature))
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


def read_keys(part: PartRef, config: DedupConfig, keep: str | None) -> Iterator[Keys]:
    """Keys of a part's kept documents, in batches; ValueError if made with other settings."""
    kept = None if keep is None else kept_ids(read_columns(keep, ["doc_id", "keep"]))
    with open_parquet(part.uri) as file:
        made = (file.schema_arrow.metadata or {}).get(b"gristmill.keys", b"").decode()
        require_same_keys(made, config, part.uri)
        columns = ["doc_id", "content_hash", "band_keys", "rejected_by"]
        for batch in file.iter_batches(columns=columns):
            wanted = pc.is_null(batch["rejected_by"])
            if kept is not None:
                wanted = pc.and_(wanted, pc.is_in(batch["doc_id"], value_set=kept))
            yield _keys_of(batch.filter(wanted), config.num_bands, part.uri)


def require_same_keys(made: str, config: DedupConfig, where: str) -> None:
    """ValueError unless keys are made as configured: others agree only by chance."""
    expected = minhash.describe(config.signature)
    if made != expected:
        actual = f"are '{made}'" if made else "do not say how they were made"
        raise ValueError(
            f"{where}: its keys {actual}, expected '{expected}'; make them again, or change [dedup]"
        )


def _keys_of(batch: pa.RecordBatch, num_bands: int, uri: str) -> Keys:
    lengths = pc.binary_length(batch["band_keys"]).to_numpy()
    wrong = lengths[(lengths != 0) & (lengths != num_bands * 8)]
    if len(wrong):
        raise ValueError(
            f"{uri}: {wrong[0] // 8} band keys per document, expected {num_bands}; "
            "rerun stage 'extract'"
        )
    ids = batch["doc_id"].to_numpy()
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
    yield concatenate((np.column_stack([b.content, b.ids]) for b in batches), width=2)
    for band in range(num_bands):
        yield concatenate((np.column_stack([b.bands[:, band], b.keyed]) for b in batches), width=2)


def index_tag(number: int) -> int:
    """The bits that mark ids of index `number` among those of this batch."""
    return EARLIER | number << _INDEX_BITS


def earlier_documents(tagged: U64) -> tuple[U64, U64]:
    """Index numbers, and doc_ids there, of tagged ids."""
    number, doc_id = np.divmod(tagged, np.uint64(1 << _INDEX_BITS))
    return number & np.uint64(127), doc_id


def _distinct_rows(rows: U64) -> U64:
    """One row per key."""
    if len(rows) and int(rows[:, 1].max()) >> _INDEX_BITS:
        raise ValueError(
            f"an index holds documents of at most {1 << (_INDEX_BITS - 32):,} input files"
        )
    ordered = shuffle.sort_rows(rows)
    distinct: U64 = ordered[group_starts(ordered[:, 0])]
    return distinct
