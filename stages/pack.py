"""Stage pack: corpus parts to MDS parts of fixed rows, and the provenance of every row.

Documents are shuffled without a distributed shuffle: a permutation drawn by the seed deals the corpus parts into groups, and
a unit shuffles the documents of its group. StreamingDataset's own shuffle mixes across groups at training time.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from filters import STRICT, File, off_is_none
from stages import tokens
from stages.ledger import Commit, Store, Unit, scratch_folder
from stages.mds import INDEX, MDSWriter
from stages.parts import read_columns

VERSION = 1
PROVENANCE = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("doc_id", pa.uint64(), nullable=False),
        pa.field("start", pa.int32(), nullable=False),
        pa.field("length", pa.int32(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
    ]
)


@dataclass(frozen=True, config=STRICT)
class PackConfig:
    """Settings of the pack stage.

    `packing`: 'concatenate' lays documents end to end and cuts; 'best_fit' cuts fewer documents (arXiv:2404.10830).
    `vocabulary_dir` is a tiktoken cache folder, "" the vocabularies that ship with the install. `shard_bytes` is the size of
    a raw shard; `group_bytes` of corpus Parquet make one unit, which is shuffled in memory.
    """

    encoding: str = "cl100k_base"
    vocabulary_dir: File = ""
    seq_len: int = Field(default=2048, ge=2, le=1 << 20)
    packing: Literal["concatenate", "best_fit"] = "concatenate"
    compression: Annotated[str | None, BeforeValidator(off_is_none)] = Field(
        default=None, pattern=r"^zstd(:([1-9]|1\d|2[0-2]))?$"
    )
    hashes: tuple[str, ...] = ("sha1", "xxh64")
    shard_bytes: int = Field(default=1 << 26, gt=0, lt=1 << 32)
    group_bytes: int = Field(default=64_000_000, gt=0)
    num_cpus: float = Field(default=1.0, gt=0)
    memory: int = Field(default=1_500_000_000, gt=0)
    parallelism: int = Field(default=0, ge=0)
    batch_size: int = Field(default=256, gt=0)


class CorpusPart(NamedTuple):
    """A corpus part: the unit that wrote it, where it lies, its size and digest."""

    unit: str
    uri: str
    bytes: int
    digest: str


def derive_seed(seed: int, purpose: str, item: str = "") -> int:
    """A seed for one purpose and item of a run; equal names give equal draws, whoever asks and when."""
    return xxhash.xxh64_intdigest(f"{seed}/{purpose}/{item}".encode())


def group_parts(parts: Sequence[CorpusPart], *, group_bytes: int, seed: int) -> list[list[CorpusPart]]:
    """Deal parts into groups of about `group_bytes` in an order drawn by the seed; every part lies in one group."""
    if not parts:
        return []
    order = np.random.default_rng(derive_seed(seed, "pack.groups")).permutation(len(parts))
    count = min(len(parts), max(1, math.ceil(sum(p.bytes for p in parts) / group_bytes)))
    return [[parts[i] for i in order[g::count]] for g in range(count)]


def pack_unit(unit: Unit, plan: "PackPlan", store: Store) -> Commit:
    """Do one group of corpus parts. `unit.task`: {"parts": [CorpusPart...]}."""
    commit, config = Commit(unit.name, unit.fingerprint), plan.config
    encoding = tokens.load_encoding(config.encoding, config.vocabulary_dir)
    ids, texts = _shuffled([CorpusPart(*p) for p in unit.task["parts"]], seed=derive_seed(plan.seed, "pack.documents", unit.name))
    commit.rows_in = len(ids)
    documents = _tokenized(texts, encoding, config.batch_size, commit)
    pack = tokens.concatenate_and_chunk if config.packing == "concatenate" else tokens.best_fit
    store.clear("parts", unit.name)
    with scratch_folder("gristmill-pack") as folder:
        spans = []
        with MDSWriter(
            folder / "part",
            columns=columns(config.seq_len),
            compression=config.compression,
            hashes=sorted(config.hashes),
            size_limit=config.shard_bytes,
        ) as writer:
            for number, row in enumerate(pack(documents, seq_len=config.seq_len, fill=encoding.eot_token)):
                lengths = np.array([span.length for span in row.spans], np.uint32)
                writer.write({"tokens": row.tokens, "spans": lengths})
                spans += [(number, ids[s.document], s.start, s.length, s.offset) for s in row.spans]
                commit.rows_out += 1
        for file in sorted((folder / "part").iterdir(), key=lambda f: (f.name == INDEX, f.name)):
            with store.create("parts", unit.name, file.name, outputs=commit.outputs) as path:
                path.write_bytes(file.read_bytes())
    with store.create("provenance", f"{unit.name}.parquet", outputs=commit.outputs) as path:
        table = pa.table([list(column) for column in zip(*spans, strict=True)] or [[]] * 5, schema=PROVENANCE)
        pq.write_table(table, path, compression="zstd")
    commit.counts = {"kept": commit.rows_in}
    return commit


class PackPlan(NamedTuple):
    """Everything a worker needs for a unit of this stage."""

    config: PackConfig
    seed: int


def columns(seq_len: int) -> dict[str, str]:
    """MDS columns of a row: token ids (seq_len,), and the lengths of its documents' spans, in order, fill not counted."""
    return {"tokens": f"ndarray:uint32:{seq_len}", "spans": "ndarray:uint32"}


def _shuffled(parts: Sequence[CorpusPart], *, seed: int) -> tuple[list[int], list[str]]:
    tables = [read_columns(part.uri, ["doc_id", "text"]) for part in parts]
    table = pa.concat_tables(tables).combine_chunks()
    order = np.random.default_rng(seed).permutation(table.num_rows)
    shuffled = table.take(pa.array(order))
    return shuffled["doc_id"].to_pylist(), shuffled["text"]


def _tokenized(texts: Any, encoding: Any, batch_size: int, commit: Commit) -> Iterator[tokens.Tokens]:
    commit.totals["tokens"] = 0
    for start in range(0, len(texts), batch_size):
        batch = tokens.tokenize(texts.slice(start, batch_size).to_pylist(), encoding)
        commit.totals["tokens"] += sum(len(ids) for ids in batch)
        yield from batch
