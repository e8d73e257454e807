"""Rows of published generations by number: their order in an epoch, reading them, reading them
ahead.

The one place that imports mosaicml-streaming. Of it we take the shuffle ("py1e") and the readers of
its shards, and leave out the StreamingDataset around them, for what it does when something goes
wrong (0.13.0): a missing or broken shard ends an epoch without a word or hangs it, padding repeats
rows, a killed run leaves shared memory behind, its constructor is a collective, and its position is
a count of samples that knows nothing of a second generation. Here a row is asked for by generation
and number. What is asked for either comes or raises; no shared memory, locks or collectives are
needed to read it.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from stages.formats import mds
from stages.storage.catalog import generation_error
from stages.storage.files import output_file
from trainer.data.generations import folder_of
from trainer.data.streaming import import_streaming


class Batch(NamedTuple):
    """A micro-batch, int64 on the CPU. `sources` are runs and `row_ids` (generation, row in it), one
    per row.

    `tokens` [rows, seq_len]; `documents` [rows, seq_len] is the index within its row of each
    token's document, -1 for fill.
    """

    tokens: torch.Tensor
    documents: torch.Tensor
    sources: list[str]
    row_ids: list[tuple[str, int]]


class RowRef(NamedTuple):
    """A row of a generation that has `rows` of them; `cache` is where a run on an object store is
    copied to (`stage`).
    """

    run: str
    generation: str
    rows: int
    row: int
    cache: str = ""


def read_batch(places: Sequence[RowRef]) -> Batch:
    """These rows as a micro-batch.

    GenerationError for one that cannot be read or whose spans do not fit in it.
    """
    samples = [_read_row(place) for place in places]
    tokens = np.stack([sample["tokens"] for sample in samples]).astype(np.int64)
    documents = np.full(tokens.shape, -1, np.int64)
    for row, sample in zip(documents, samples, strict=True):
        ids = np.repeat(np.arange(len(sample["spans"])), sample["spans"])
        row[: len(ids)] = ids
    row_ids = [(place.generation, place.row) for place in places]
    return Batch(
        torch.from_numpy(tokens),
        torch.from_numpy(documents),
        [place.run for place in places],
        row_ids,
    )


def _read_row(place: RowRef) -> dict[str, Any]:
    file: object = mds.INDEX
    try:
        shards = _shards(place.run, place.generation, place.rows, place.cache)
        shard = int(np.searchsorted(shards.starts, place.row, "right")) - 1
        file = shards.entries[shard]["raw_data"]["basename"]
        sample: dict[str, Any] = shards.read(shard, place.row - int(shards.starts[shard]))
    except (OSError, ValueError, LookupError) as error:
        found, do = repr(error), "restore the generation from a copy, and resume"
        raise generation_error(
            place.generation, str(file), expected=f"row {place.row}", found=found, do=do
        ) from error
    length, covered = len(sample["tokens"]), int(sample["spans"].sum(dtype=np.int64))
    if covered > length:
        do = "restore the generation from a copy, and train with verify = 'full'"
        expected = f"spans of row {place.row} within {length} tokens"
        raise generation_error(
            place.generation, str(file), expected=expected, found=f"{covered} tokens", do=do
        )
    return sample


class _Shards:
    """The shards of a generation as streaming's readers. A row is two small reads; nothing is kept
    open.
    """

    def __init__(self, folder: Path, rows: int) -> None:
        import_streaming()
        from streaming.base.format import reader_from_json

        self.folder = folder
        self.entries = mds.read_index(folder)["shards"]
        self.starts = np.cumsum([0, *(entry["samples"] for entry in self.entries)])
        if self.starts[-1] != rows:
            raise ValueError(
                f"the index has {self.starts[-1]} rows and had {rows} when it was verified"
            )
        self._readers = [reader_from_json(str(folder), None, entry) for entry in self.entries]
        self._raw: set[int] = set()  # shards known to lie there uncompressed

    def read(self, shard: int, row: int) -> Any:
        if shard not in self._raw:
            self._unpack(self.entries[shard])
            self._raw.add(shard)
        return self._readers[shard].get_item(row)

    def _unpack(self, entry: Mapping[str, Any]) -> None:
        """Put the raw form of a compressed shard beside it, where StreamingDataset would, and in
        one rename.
        """
        from streaming.base.compression import decompress

        raw, zipped = entry["raw_data"], entry["zip_data"]
        path = self.folder / raw["basename"]
        if zipped is None or (path.exists() and path.stat().st_size == raw["bytes"]):
            return
        data = decompress(entry["compression"], (self.folder / zipped["basename"]).read_bytes())
        if len(data) != raw["bytes"]:
            raise ValueError(
                f"{zipped['basename']} unpacks to {len(data)} bytes, the index says {raw['bytes']}"
            )
        with output_file(str(path)) as temporary:  # several workers may come here at once
            temporary.write_bytes(data)


@lru_cache(maxsize=64)
def _shards(run: str, generation: str, rows: int, cache: str) -> _Shards:
    return _Shards(folder_of(run, generation, cache), rows)
