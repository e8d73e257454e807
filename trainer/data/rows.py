"""Step 2 of a row's way to the loss: read rows of published generations from their MDS shards,
micro-batches ahead of training, in a thread or in worker processes.

Of mosaicml-streaming (0.13.0) this uses the shard readers (`streaming.base.format`) and the
decompression of shards (`streaming.base.compression`), and `order` the shuffle py1e
(`streaming.base.shuffle`). Its StreamingDataset reads the same rows from a generation, and a test
holds it to that. It is not used because of how it fails: a missing or broken shard ends an epoch
silently or hangs it, padding repeats rows, a killed run leaves shared memory behind, its
constructor is a collective, and its position is a count of samples that does not know a second
generation. Here a row is read by generation and number: it is returned or an error is raised, and
reading needs no shared memory, locks or collectives.
"""

import itertools
import math
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from stages.formats import mds
from stages.storage.catalog import generation_error
from stages.storage.files import output_file
from trainer.data.generations import folder_of
from trainer.data.order import import_streaming


class RowRef(NamedTuple):
    """Where to read a row: row `row` of a generation that has `rows` rows.

    `cache` is the folder to which generations of a run on an object store are copied (`stage`).
    """

    run: str
    generation: str
    rows: int
    row: int
    cache: str = ""


class RowRange(NamedTuple):
    """Rows that a step took of a generation: [start, stop) of its `epoch_order`."""

    generation: str
    epoch: int
    start: int
    stop: int


class Batch(NamedTuple):
    """A micro-batch, int64 on the CPU.

    `tokens` [rows, seq_len]; `documents` [rows, seq_len] is the index of each token's document
    within its row, -1 for fill. Per row, `sources` has its run and `row_ids` (generation, row).
    """

    tokens: torch.Tensor
    documents: torch.Tensor
    sources: list[str]
    row_ids: list[tuple[str, int]]


def read_batch(refs: Sequence[RowRef]) -> Batch:
    """Read rows as a micro-batch.

    GenerationError for a row that cannot be read or whose document spans exceed its length.
    """
    samples = [_read_row(ref) for ref in refs]
    tokens = np.stack([sample["tokens"] for sample in samples]).astype(np.int64)
    documents = np.full(tokens.shape, -1, np.int64)
    for row, sample in zip(documents, samples, strict=True):
        ids = np.repeat(np.arange(len(sample["spans"])), sample["spans"])
        row[: len(ids)] = ids
    return Batch(
        torch.from_numpy(tokens),
        torch.from_numpy(documents),
        [ref.run for ref in refs],
        [(ref.generation, ref.row) for ref in refs],
    )


# --- read ahead ---------------------------------------------------------------------------------


def read_ahead(
    refs: Iterator[list[RowRef]], *, ahead: int, workers: int, timeout: float
) -> Iterator[Batch]:
    """The micro-batches of `refs` in order, `ahead` of them in flight.

    They are read in a thread or, if `workers` > 0, in that many processes; `refs` is always
    advanced in the caller's thread. queue.Empty or RuntimeError (torch's DataLoader has no narrower
    one) if a batch takes longer than `timeout` seconds or its worker died. Drop the iterator to
    stop reading.
    """
    if workers == 0:
        return _read_in_thread(refs, ahead=ahead, timeout=timeout)
    loader = DataLoader(
        _RowDataset(),
        sampler=refs,  # an iterator, consumed once: each item is what a worker reads
        batch_size=None,
        collate_fn=_identity,
        num_workers=workers,
        prefetch_factor=math.ceil(ahead / workers),
        timeout=timeout,
        # DataLoader draws a seed for the workers: not from the random state of the run
        generator=torch.Generator(),
    )
    return iter(loader)


class _RowDataset(Dataset[Batch]):
    """Runs in the workers; its indices are lists of RowRef."""

    def __getitem__(self, refs: list[RowRef]) -> Batch:
        return read_batch(refs)


def _identity(batch: Any) -> Any:
    return batch


def _read_in_thread(refs: Iterator[list[RowRef]], *, ahead: int, timeout: float) -> Iterator[Batch]:
    """Read in one daemon thread: a read that hangs cannot keep the process alive."""
    requests: queue.SimpleQueue[list[RowRef] | None] = queue.SimpleQueue()
    results: queue.SimpleQueue[Batch | Exception] = queue.SimpleQueue()

    def read_requests() -> None:
        for request in iter(requests.get, None):
            try:
                results.put(read_batch(request))
            except Exception as error:  # raised in the training thread
                results.put(error)

    threading.Thread(target=read_requests, name="rows", daemon=True).start()
    num_pending = 0
    try:
        while True:
            for request in itertools.islice(refs, ahead - num_pending):
                requests.put(request)
                num_pending += 1
            if num_pending == 0:
                return
            result = results.get(timeout=timeout)
            num_pending -= 1
            if isinstance(result, Exception):
                raise result
            yield result
    finally:
        requests.put(None)  # ends the thread


# --- shards -------------------------------------------------------------------------------------


def _read_row(ref: RowRef) -> dict[str, Any]:
    file: object = mds.INDEX
    try:
        shards = _open_shards(ref.run, ref.generation, ref.rows, ref.cache)
        shard = int(np.searchsorted(shards.starts, ref.row, "right")) - 1
        file = shards.entries[shard]["raw_data"]["basename"]
        sample: dict[str, Any] = shards.read(shard, ref.row - int(shards.starts[shard]))
    except (OSError, ValueError, LookupError) as error:
        raise generation_error(
            ref.generation,
            str(file),
            expected=f"row {ref.row}",
            found=repr(error),
            do="restore the generation from a copy, and resume",
        ) from error
    length, covered = len(sample["tokens"]), int(sample["spans"].sum(dtype=np.int64))
    if covered > length:
        raise generation_error(
            ref.generation,
            str(file),
            expected=f"spans of row {ref.row} within {length} tokens",
            found=f"{covered} tokens",
            do="restore the generation from a copy, and train with verify = 'full'",
        )
    return sample


class _Shards:
    """The shards of a generation. A row costs two small reads; no file is kept open."""

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
        self._unpacked: set[int] = set()

    def read(self, shard: int, row: int) -> Any:
        if shard not in self._unpacked:
            self._unpack(self.entries[shard])
            self._unpacked.add(shard)
        return self._readers[shard].get_item(row)

    def _unpack(self, entry: Mapping[str, Any]) -> None:
        """Write the raw form of a compressed shard beside it, where StreamingDataset would."""
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
        with output_file(str(path)) as temporary:  # several workers may unpack at the same time
            temporary.write_bytes(data)


@lru_cache(maxsize=64)
def _open_shards(run: str, generation: str, rows: int, cache: str) -> _Shards:
    return _Shards(folder_of(run, generation, cache), rows)
