"""Stage pack: corpus parts to MDS parts of fixed rows, and the provenance of every row.

Documents are shuffled without a distributed shuffle: a permutation drawn by the seed deals the
corpus parts into groups, and a unit shuffles the documents of its group. StreamingDataset's own
shuffle mixes across groups at training time.

A share of the documents may be held out of training, for evaluation: rows of their own, packed
alike.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash
from pydantic import BeforeValidator, Field

from filters import File, FileOrName, off_is_none, validated
from stages.formats import tokens
from stages.formats.document import table_schema
from stages.formats.mds import INDEX, MDSWriter, columns_of_rows
from stages.formats.tokenizer import Tokenizer, TokenizerOptions, load_tokenizer
from stages.storage.digests import file_sha256
from stages.storage.files import names_in, scratch_folder
from stages.storage.ledger import Commit, Store, Unit
from stages.storage.parts import read_columns

VERSION = 2
PROVENANCE = table_schema(
    {
        "row": pa.int64(),
        "doc_id": pa.uint64(),
        "start": pa.int32(),
        "length": pa.int32(),
        "offset": pa.int64(),
    },
    # here too, since a trainer may have nothing but the generation; null where there is none
    {"url": pa.string()},
)


@validated
class PackConfig:
    """Settings of the pack stage.

    `tokenizer` is a name of tiktoken's, or a path with a dot or a slash in it: a tokenizer.json of
    Hugging Face's, a SentencePiece model, or ranks of tiktoken, for which `pattern` is the regular
    expression that splits text. `end_of_text` and `begin_of_text` are its tokens around a document,
    "" for those that it names or that have a usual name; the latter is put before each document
    only with `add_begin_of_text`. `vocabulary_dir` is a tiktoken cache folder, "" the vocabularies
    that ship with the install.

    `packing`: 'concatenate' lays documents end to end and cuts; 'best_fit' cuts fewer documents
    (arXiv:2404.10830). `held_out` is the share of documents that are held out for evaluation and
    in no training row, drawn by their text. Generations of another share or seed are drawn apart:
    what one holds out another may train on. `shard_bytes` is the size of a raw shard; `group_bytes`
    of corpus Parquet make one unit, which is shuffled in memory.
    """

    tokenizer: FileOrName = Field(default="cl100k_base", min_length=1)
    pattern: str = ""
    end_of_text: str = ""
    begin_of_text: str = ""
    add_begin_of_text: bool = False
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

    @property
    def options(self) -> TokenizerOptions:
        """What the tokenizer's file may leave open."""
        return TokenizerOptions(self.pattern, self.end_of_text, self.begin_of_text)


def tokenizer_of(config: PackConfig, *, sha256: str = "") -> Tokenizer:
    """The tokenizer that a configuration names; ValueError if there is no such, or if its file has
    another `sha256` than this.
    """
    if sha256 and (now := file_sha256(Path(config.tokenizer))) != sha256:
        raise ValueError(
            f"{config.tokenizer}: was replaced during the run (sha256 {now[:12]}..., as the run "
            f"began {sha256[:12]}...); run again to pack with the new file, or put the old one back"
        )
    tokenizer = load_tokenizer(
        config.tokenizer, config.options, vocabulary_dir=config.vocabulary_dir
    )
    if config.add_begin_of_text and tokenizer.begin_of_text is None:
        raise ValueError(
            f"{config.tokenizer}: has no token for the beginning of a text; set "
            "pack.begin_of_text, or pack.add_begin_of_text = false"
        )
    return tokenizer


class CorpusPart(NamedTuple):
    """A corpus part: the unit that wrote it, where it lies, its size and digest."""

    unit: str
    uri: str
    bytes: int
    digest: str


class Split(NamedTuple):
    """Where pack writes the documents for training, or those held out: folders of its outputs."""

    parts: str
    provenance: str


TRAINING = Split("parts", "provenance")
HELD_OUT = Split("held_out", "held_out_provenance")


class Written(NamedTuple):
    """What was written of one split."""

    rows: int = 0
    tokens: int = 0


def derive_seed(seed: int, purpose: str, item: str = "") -> int:
    """A seed for one purpose and item of a run; equal names always give equal draws."""
    return xxhash.xxh64_intdigest(f"{seed}/{purpose}/{item}".encode())


def group_parts(
    parts: Sequence[CorpusPart], *, group_bytes: int, seed: int
) -> list[list[CorpusPart]]:
    """Deal parts into groups of about `group_bytes` in an order drawn by the seed; every part lies
    in one group.
    """
    order = np.random.default_rng(derive_seed(seed, "pack.groups")).permutation(len(parts))
    count = min(len(parts), max(1, math.ceil(sum(p.bytes for p in parts) / group_bytes)))
    return [[parts[i] for i in order[g::count]] for g in range(count)]


def is_held_out(text: bytes | pa.Buffer, *, share: float, seed: int) -> bool:
    """Whether a document of this text (UTF-8) is held out, wherever it comes from; a larger share
    takes more, and the same.

    By the text and not by the id: an exact copy in another unit, generation or crawl falls on the
    same side.
    """
    return xxhash.xxh64_intdigest(text, seed=derive_seed(seed, "pack.held_out")) < share * 2.0**64


@validated
class PackTask:
    """A group of corpus parts."""

    parts: tuple[CorpusPart, ...]


@validated
class PackResult:
    """Tokens of the documents for training; tokens and rows of those held out."""

    tokens: int = 0
    held_out_tokens: int = 0
    held_out_rows: int = 0


def pack_unit(unit: Unit, plan: "PackPlan", store: Store) -> Commit:
    """Pack one group of corpus parts. The task is a PackTask.

    `rows_in` are documents, counted as 'kept' for training or 'pack.held_out'; `rows_out` are
    training rows.
    """
    task: PackTask = unit.task
    commit = Commit(unit.name, unit.fingerprint)
    training, held_out = _deal(task.parts, plan, unit.name)
    commit.rows_in = training.num_rows + held_out.num_rows
    commit.counts = {"kept": training.num_rows}
    written = _write_split(training, TRAINING, plan, commit, store)
    held_out_written = Written()
    if held_out.num_rows:
        commit.counts["pack.held_out"] = held_out.num_rows
        held_out_written = _write_split(held_out, HELD_OUT, plan, commit, store)
    else:
        store.clear(HELD_OUT.parts, unit.name)
    commit.rows_out = written.rows
    commit.result = PackResult(written.tokens, held_out_written.tokens, held_out_written.rows)
    _remove_leftovers(commit, store)
    return commit


def _remove_leftovers(commit: Commit, store: Store) -> None:
    """Remove files of an attempt that died, by name: a second copy of the unit may be writing."""
    written = {output.path for output in commit.outputs}
    for split in (TRAINING, HELD_OUT):
        for name in names_in(store.uri(split.parts, commit.unit)):
            if not name.startswith(".") and f"{split.parts}/{commit.unit}/{name}" not in written:
                store.clear(split.parts, commit.unit, name)


def _write_split(
    documents: pa.Table, split: Split, plan: "PackPlan", commit: Commit, store: Store
) -> Written:
    """Tokenize, pack and write one split of a unit's documents."""
    config = plan.config
    tokenizer = tokenizer_of(config, sha256=plan.tokenizer_sha256)
    ids, urls = documents["doc_id"].to_pylist(), documents["url"].to_pylist()
    tokenized = _tokenize(documents["text"], tokenizer, config)
    pack = tokens.concatenate_and_chunk if config.packing == "concatenate" else tokens.best_fit
    provenance: list[dict[str, Any]] = []
    rows = 0
    with scratch_folder("gristmill-pack") as folder:
        with MDSWriter(
            folder / "part",
            columns=columns_of_rows(config.seq_len, tokenizer.dtype),
            compression=config.compression,
            hashes=sorted(config.hashes),
            size_limit=config.shard_bytes,
        ) as writer:
            for row in pack(tokenized, seq_len=config.seq_len, fill=tokenizer.end_of_text):
                lengths = np.array([span.length for span in row.spans], np.uint32)
                writer.write({"tokens": _stored(row.tokens, tokenizer), "spans": lengths})
                provenance += [
                    span._asdict()
                    | {"row": rows, "doc_id": ids[span.document], "url": urls[span.document]}
                    for span in row.spans
                ]
                rows += 1
        for file in sorted((folder / "part").iterdir(), key=lambda f: (f.name == INDEX, f.name)):
            with store.create(split.parts, commit.unit, file.name, outputs=commit.outputs) as path:
                path.write_bytes(file.read_bytes())
    table = pa.Table.from_pylist(provenance, schema=PROVENANCE)
    store.write_part(table, split.provenance, commit.unit, commit=commit)
    return Written(rows, sum(span["length"] for span in provenance))


def _stored(ids: tokens.Tokens, tokenizer: Tokenizer) -> npt.NDArray[np.unsignedinteger]:
    """A row in the type that is stored; ValueError for an id that the tokenizer does not have,
    which uint16 could turn into another.
    """
    if (largest := int(ids.max())) >= tokenizer.vocab_size:
        raise ValueError(
            f"{tokenizer.name}: gave the id {largest}, and has {tokenizer.vocab_size} tokens; "
            "its file and the package that reads it disagree: use another tokenizer"
        )
    return ids.astype(tokenizer.dtype)


class PackPlan(NamedTuple):
    """Everything a worker needs for a unit of this stage.

    `tokenizer_sha256` is that of the tokenizer's file as the run began, which its stage key has; ""
    for a name of tiktoken's.
    """

    config: PackConfig
    seed: int
    tokenizer_sha256: str = ""


def _deal(parts: Sequence[CorpusPart], plan: PackPlan, unit: str) -> tuple[pa.Table, pa.Table]:
    """The documents of some parts in an order drawn by the seed: for training, and held out."""
    columns = ["doc_id", "url", "text"]
    table = pa.concat_tables([read_columns(part.uri, columns) for part in parts]).combine_chunks()
    share = plan.config.held_out
    held_out = np.array(
        [is_held_out(t.as_buffer(), share=share, seed=plan.seed) for t in table["text"]], bool
    )
    rng = np.random.default_rng(derive_seed(plan.seed, "pack.documents", unit))
    order = rng.permutation(table.num_rows)
    training, evaluation = order[~held_out[order]], order[held_out[order]]
    return table.take(pa.array(training)), table.take(pa.array(evaluation))


def _tokenize(
    texts: pa.ChunkedArray, tokenizer: Tokenizer, config: PackConfig
) -> Iterator[tokens.Tokens]:
    for start in range(0, len(texts), config.batch_size):
        batch = texts.slice(start, config.batch_size).to_pylist()
        yield from tokenizer.encode_documents(batch, begin_of_text=config.add_begin_of_text)
