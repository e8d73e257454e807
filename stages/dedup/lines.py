"""Cuts lines or paragraphs that occur earlier in the batch; the first copy stays.

After CCNet (Wenzek et al. 2019, arXiv:1911.00359) and Dolma (Soldaini et al. 2024,
arXiv:2402.00159), but exact over the whole batch. Only documents that document dedup keeps are
compared. Two lines are equal if the 64-bit hashes of their normalized texts are; a line that is
empty when normalized always stays. The first copy has the smallest (doc_id, line number).

    lines     a group of documents parts -> its distinct hashes as rows (hash, group)
    repeats   a partition of hashes -> every row but the first of its hash, back to its group
    cuts      repeats of a group, and its texts -> the numbers of the lines to remove

A row needs no position: groups are runs of documents in order of doc_id, so the first copy lies in
the smallest group, and its texts show which one it is. Memory: 17 bytes per line, and 48 per
distinct line while they are sorted for the shuffle.
"""

import re
from array import array
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from filters import validated
from filters.text.words import normalize
from stages.dedup import shuffle
from stages.dedup.components import changes
from stages.dedup.config import CELLS, DedupConfig
from stages.dedup.shuffle import U64, Layout, PartitionTask, concatenate, merge
from stages.formats.document import table_schema
from stages.storage.files import open_parquet
from stages.storage.ledger import Commit, Store, Unit
from stages.storage.parts import PartRef, kept_ids, read_columns

Piece = Literal["line", "paragraph"]
LINES = Layout(width=2, lanes=1, cells=CELLS)  # hash, group
CUTS = table_schema(
    {
        "doc_id": pa.uint64(),
        # numbers of the lines to remove, from 0, ascending
        "cut": pa.list_(pa.int32()),
        "chars_cut": pa.int64(),  # by which the text gets shorter
    }
)
# Paragraphs are separated by blank lines: a line end, then one or more lines of nothing but white
# space, with their ends.
_SEPARATORS = {"line": re.compile("(\n)"), "paragraph": re.compile(r"(\n(?:[^\S\n]*\n)+)")}
_EMPTY = np.uint64(xxhash.xxh3_64_intdigest(b""))
# A word that normalisation leaves alone, between lines that are normalised together; ASCII, as most
# texts are.
_BETWEEN = "zqxvj"
_TEXTS_AT_ONCE = 1024


def cut_text(text: str, cut: Sequence[int], unit: Piece) -> str:
    """The text without some of its lines or paragraphs, numbered from 0.

    Each goes with the separator before it, and the first that remains loses its own: cutting
    nothing changes nothing.
    """
    pieces, gone = _SEPARATORS[unit].split(text), set(cut)
    kept = [n for n in range(0, len(pieces), 2) if n // 2 not in gone]
    return "".join(part for n in kept for part in pieces[n - (n > kept[0]) : n + 1])


def line_hashes(text: str, unit: Piece) -> bytes:
    """64-bit hashes of the normalized lines or paragraphs, big-endian; an empty one hashes b""."""
    return b"".join(map(xxhash.xxh3_64_digest, _normalized(_SEPARATORS[unit].split(text)[::2])))


def _normalized(pieces: Sequence[str]) -> list[bytes]:
    """Each piece normalized, as UTF-8, all in one call: a call per piece took 10 times as long.

    Neither a final sigma nor the order of combining marks depends on what follows a space.
    """
    lines = normalize(f" {_BETWEEN} ".join(pieces)).encode().split(_BETWEEN.encode())
    if len(lines) != len(pieces):  # a piece holds the word itself
        return [normalize(piece).encode() for piece in pieces]
    return [line.strip(b" ") for line in lines]


@validated
class LinesTask:
    """A group of documents parts, and their keep tables by URI, one per part.

    `repeats` is the URI of the shuffle of repeats, once there is one.
    """

    group: int
    parts: tuple[PartRef, ...]
    keep: tuple[str, ...]
    repeats: str = ""


def lines_unit(unit: Unit, config: DedupConfig, store: Store) -> Commit:
    """Write the distinct line hashes of a group. The task is a LinesTask."""
    assert config.line_level != "off"
    commit = Commit(unit.name, unit.fingerprint)
    hashes, _ = _group_hashes(unit.task, config.line_level)
    commit.rows_in = len(hashes)
    hashes.sort()
    hashes = hashes[changes(hashes) & (hashes != _EMPTY)]
    rows = np.full((len(hashes), LINES.width), unit.task.group, np.uint64)
    rows[:, 0] = hashes
    del hashes  # before the rows are sorted
    commit.rows_out = shuffle.write(store, "lines", [rows], LINES, commit=commit)
    return commit


def repeats_unit(unit: Unit, config: DedupConfig, store: Store) -> Commit:
    """Write the hashes that an earlier group has. The task is a PartitionTask."""
    task: PartitionTask = unit.task
    commit = Commit(unit.name, unit.fingerprint)
    later, last = [], None
    for rows in merge(task.shuffle, task.partition, memory=config.partition_bytes):
        later.append(rows[~changes(rows[:, 0], last)])
        last = rows[-1, 0] if len(rows) else last
        commit.rows_in += len(rows)
    repeats = concatenate(later, width=LINES.width)
    commit.rows_out = shuffle.write_by_group(
        store, "repeats", repeats, repeats[:, 1], repeats_layout(task.groups), commit=commit
    )
    return commit


def repeats_layout(groups: int) -> Layout:
    """The grid of repeats (hash, group): a lane for each group."""
    return Layout(width=LINES.width, lanes=groups)


@validated
class CutsResult:
    """Lines (empty ones included), lines cut, and characters cut."""

    lines: int = 0
    lines_cut: int = 0
    chars_cut: int = 0


def cuts_unit(unit: Unit, config: DedupConfig, store: Store) -> Commit:
    """Write which lines to cut. The task is a LinesTask.

    `rows_in` are documents, `rows_out` those that lose a line.
    """
    assert config.line_level != "off"
    task: LinesTask = unit.task
    commit = Commit(unit.name, unit.fingerprint)
    hashes, ends = _group_hashes(task, config.line_level)
    blocks = merge(task.repeats, task.group, memory=config.partition_bytes)
    cut = _copies(
        hashes, np.concatenate([np.empty(0, np.uint64), *(rows[:, 0].copy() for rows in blocks)])
    )
    total_chars = 0
    for (part, uri), keep in zip(task.parts, task.keep, strict=True):
        rows = []
        for doc_id, text in _kept_texts(uri, keep):
            gone = np.flatnonzero(cut[ends[commit.rows_in] : ends[commit.rows_in + 1]]).tolist()
            if gone:
                chars_cut = len(text) - len(cut_text(text, gone, config.line_level))
                total_chars += chars_cut
                rows.append({"doc_id": doc_id, "cut": gone, "chars_cut": chars_cut})
            commit.rows_in += 1
        store.write_part(pa.Table.from_pylist(rows, schema=CUTS), "cuts", part, commit=commit)
        commit.rows_out += len(rows)
    commit.result = CutsResult(len(hashes), int(cut.sum()), total_chars)
    return commit


def _group_hashes(task: LinesTask, piece: Piece) -> tuple[U64, npt.NDArray[np.int64]]:
    """Hashes of all lines of a group in order (L,), and the borders of documents (D + 1,)."""
    digests, places = bytearray(), array("q", [0])
    for (_, uri), keep in zip(task.parts, task.keep, strict=True):
        for _, text in _kept_texts(uri, keep):
            digests += line_hashes(text, piece)
            places.append(len(digests) // 8)
    return np.frombuffer(digests, ">u8").astype(np.uint64), np.array(places)


def _kept_texts(uri: str, keep_uri: str) -> Iterator[tuple[int, str]]:
    """Id and text of each document of a part that dedup kept, in order of doc_id, in batches."""
    keep = read_columns(keep_uri, ["doc_id", "keep"])
    documents = read_columns(uri, ["doc_id", "rejected_by"])
    if not documents.filter(pc.is_null(documents["rejected_by"]))["doc_id"].equals(keep["doc_id"]):
        raise ValueError(f"{keep_uri} does not list the documents of {uri}; rerun stage 'dedup'")
    kept = kept_ids(keep)
    with open_parquet(uri) as file:
        for batch in file.iter_batches(_TEXTS_AT_ONCE, columns=["doc_id", "text"]):
            batch = batch.filter(pc.is_in(batch["doc_id"], value_set=kept))
            yield from zip(
                batch["doc_id"].to_pylist(),
                pc.fill_null(batch["text"], "").to_pylist(),
                strict=True,
            )


def _copies(hashes: U64, repeats: U64) -> npt.NDArray[np.bool_]:
    """Whether an earlier group (`repeats`, ascending) or an earlier line has the same hash (L,).

    A range of hashes at a time.
    """
    copy, top = np.zeros(len(hashes), np.bool_), (hashes >> 60).astype(np.uint8)
    for n in range(16):
        places = np.flatnonzero(top == n)
        places = places[np.argsort(hashes[places], kind="stable")]
        keys = hashes[places]
        among = np.searchsorted(repeats, keys, "right") > np.searchsorted(repeats, keys, "left")
        copy[places] = (among | ~changes(keys)) & (keys != _EMPTY)
    return copy
