"""Stage pack: corpus parts to MDS parts of fixed rows, and the provenance of every row.

Documents are shuffled without a distributed shuffle: a permutation drawn by the seed deals the
corpus parts into groups, and a unit shuffles the documents of its group. StreamingDataset's own
shuffle mixes across groups at training time.

A share of the documents may be held out of training, for evaluation: rows of their own, packed
alike.
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
from stages.formats import tokens
from stages.formats.mds import INDEX, MDSWriter
from stages.storage.files import names_in, scratch_folder
from stages.storage.ledger import Commit, Store, Unit
from stages.storage.parts import read_columns

VERSION = 2
PROVENANCE = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("doc_id", pa.uint64(), nullable=False),
        pa.field("start", pa.int32(), nullable=False),
        pa.field("length", pa.int32(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field(
            "url",
            pa.string(),
            # here as well, as a trainer may have nothing but the generation; null where there is none
        ),
    ]
)


@dataclass(frozen=True, config=STRICT)
class PackConfig:
    """Settings of the pack stage.

    `packing`: 'concatenate' lays documents end to end and cuts; 'best_fit' cuts fewer documents
    (arXiv:2404.10830). `held_out` is the share of documents that are set aside for evaluation and
    in no training row, drawn by their text. Generations of another share or seed are drawn apart:
    what one holds out another may train on. `vocabulary_dir` is a tiktoken cache folder, "" the
    vocabularies that ship with the install. `shard_bytes` is the size of a raw shard; `group_bytes`
    of corpus Parquet make one unit, which is shuffled in memory.
    """

    encoding: str = "cl100k_base"
    vocabulary_dir: File = ""
    seq_len: int = Field(default=2048, ge=2, le=1 << 20)
    packing: Literal["concatenate", "best_fit"] = "concatenate"
    held_out: float = Field(default=0.0, ge=0, lt=1)
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


class Split(NamedTuple):
    """Where pack leaves one side of the documents: kinds of its outputs, and the name of its total
    of tokens.
    """

    parts: str
    provenance: str
    tokens: str


TRAINING = Split("parts", "provenance", "tokens")
HELD_OUT = Split("held_out", "held_out_provenance", "held_out_tokens")


def derive_seed(seed: int, purpose: str, item: str = "") -> int:
    """A seed for one purpose and item of a run; equal names give equal draws, whoever asks and
    when.
    """
    return xxhash.xxh64_intdigest(f"{seed}/{purpose}/{item}".encode())


def group_parts(
    parts: Sequence[CorpusPart], *, group_bytes: int, seed: int
) -> list[list[CorpusPart]]:
    """Deal parts into groups of about `group_bytes` in an order drawn by the seed; every part lies
    in one group.
    """
    if not parts:
        return []
    order = np.random.default_rng(derive_seed(seed, "pack.groups")).permutation(len(parts))
    count = min(len(parts), max(1, math.ceil(sum(p.bytes for p in parts) / group_bytes)))
    return [[parts[i] for i in order[g::count]] for g in range(count)]


def is_held_out(text: bytes | pa.Buffer, *, share: float, seed: int) -> bool:
    """Whether a document of this text (UTF-8) is set aside, wherever it comes from; a larger share
    takes more, and the same.

    By the text and not by the id: an exact copy in another unit, generation or crawl falls on the
    same side.
    """
    return xxhash.xxh64_intdigest(text, seed=derive_seed(seed, "pack.held_out")) < share * 2.0**64


def pack_unit(unit: Unit, plan: "PackPlan", store: Store) -> Commit:
    """Do one group of corpus parts. `unit.task`: {"parts": [CorpusPart...]}.

    `rows_in` are documents, counted as 'kept' for training or 'pack.held_out'; `rows_out` are
    training rows. Totals: tokens, and where any document is held out held_out_tokens and
    held_out_rows.
    """
    commit = Commit(unit.name, unit.fingerprint)
    training, held_out = _dealt([CorpusPart(*p) for p in unit.task["parts"]], plan, unit.name)
    commit.rows_in = training.num_rows + held_out.num_rows
    commit.counts = {"kept": training.num_rows}
    commit.rows_out = _write(training, TRAINING, plan.config, commit, store)
    if held_out.num_rows:
        commit.counts["pack.held_out"] = held_out.num_rows
        commit.totals["held_out_rows"] = _write(held_out, HELD_OUT, plan.config, commit, store)
    else:
        store.clear(HELD_OUT.parts, unit.name)
    written = {output["path"] for output in commit.outputs}
    for side in (TRAINING, HELD_OUT):
        # what died here left; now and by name, for a second copy of the unit may be at work, which
        # writes the same ones
        for name in names_in(store.uri(side.parts, unit.name)):
            if not name.startswith(".") and f"{side.parts}/{unit.name}/{name}" not in written:
                store.clear(side.parts, unit.name, name)
    return commit


def _write(
    documents: pa.Table, side: Split, config: PackConfig, commit: Commit, store: Store
) -> int:
    """Tokenise, pack and write one side of a unit's documents; the number of rows."""
    encoding = tokens.load_encoding(config.encoding, config.vocabulary_dir)
    ids, urls, rows = documents["doc_id"].to_pylist(), documents["url"].to_pylist(), 0
    tokenized = _tokenized(
        documents["text"], encoding, config.batch_size, commit.totals, side.tokens
    )
    pack = tokens.concatenate_and_chunk if config.packing == "concatenate" else tokens.best_fit
    with scratch_folder("gristmill-pack") as folder:
        spans = []
        with MDSWriter(
            folder / "part",
            columns=columns(config.seq_len),
            compression=config.compression,
            hashes=sorted(config.hashes),
            size_limit=config.shard_bytes,
        ) as writer:
            for row in pack(tokenized, seq_len=config.seq_len, fill=encoding.eot_token):
                lengths = np.array([span.length for span in row.spans], np.uint32)
                writer.write({"tokens": row.tokens, "spans": lengths})
                spans += [
                    (rows, ids[s.document], s.start, s.length, s.offset, urls[s.document])
                    for s in row.spans
                ]
                rows += 1
        for file in sorted((folder / "part").iterdir(), key=lambda f: (f.name == INDEX, f.name)):
            with store.create(side.parts, commit.unit, file.name, outputs=commit.outputs) as path:
                path.write_bytes(file.read_bytes())
    with store.create(side.provenance, f"{commit.unit}.parquet", outputs=commit.outputs) as path:
        table = pa.table(
            [list(column) for column in zip(*spans, strict=True)] or [[]] * len(PROVENANCE),
            schema=PROVENANCE,
        )
        pq.write_table(table, path, compression="zstd")
    return rows


class PackPlan(NamedTuple):
    """Everything a worker needs for a unit of this stage."""

    config: PackConfig
    seed: int


def columns(seq_len: int) -> dict[str, str]:
    """MDS columns of a row: token ids (seq_len,), and the lengths of its documents' spans, in
    order, fill not counted.
    """
    return {"tokens": f"ndarray:uint32:{seq_len}", "spans": "ndarray:uint32"}


def _dealt(parts: Sequence[CorpusPart], plan: PackPlan, unit: str) -> tuple[pa.Table, pa.Table]:
    """The documents of some parts in an order drawn by the seed: those for training, and those held
    out.
    """
    table = pa.concat_tables(
        [read_columns(part.uri, ["doc_id", "url", "text"]) for part in parts]
    ).combine_chunks()
    share = plan.config.held_out
    held_out = np.array(
        [is_held_out(t.as_buffer(), share=share, seed=plan.seed) for t in table["text"]], bool
    )
    order = np.random.default_rng(derive_seed(plan.seed, "pack.documents", unit)).permutation(
        table.num_rows
    )
    return table.take(pa.array(order[~held_out[order]])), table.take(
        pa.array(order[held_out[order]])
    )


def _tokenized(
    texts: pa.ChunkedArray, encoding: Any, batch_size: int, totals: dict[str, float], name: str
) -> Iterator[tokens.Tokens]:
    """Token ids of each text; the total of that name counts them."""
    totals[name] = 0
    for start in range(0, len(texts), batch_size):
        batch = tokens.tokenize(texts.slice(start, batch_size).to_pylist(), encoding)
        totals[name] += sum(len(ids) for ids in batch)
        yield from batch
