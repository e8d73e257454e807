"""Read micro-batches ahead of training, in a thread or in worker processes."""

import math
import queue
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from trainer.data.rows import Batch, RowRef, read_batch


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
        return _ThreadLoader(refs, ahead=ahead, timeout=timeout)
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


class _ThreadLoader:
    """Reads in one daemon thread, so a read that hangs cannot keep the process alive."""

    def __init__(self, refs: Iterator[list[RowRef]], *, ahead: int, timeout: float) -> None:
        self._refs, self._ahead, self._timeout = refs, ahead, timeout
        self._requests: queue.SimpleQueue[list[RowRef] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Batch | Exception] = queue.SimpleQueue()
        self._pending = 0
        threading.Thread(
            target=_read_requests, args=(self._requests, self._results), name="rows", daemon=True
        ).start()

    def __iter__(self) -> "_ThreadLoader":
        return self

    def __next__(self) -> Batch:
        while self._pending < self._ahead and (refs := next(self._refs, None)) is not None:
            self._requests.put(refs)
            self._pending += 1
        if self._pending == 0:
            raise StopIteration
        result = self._results.get(timeout=self._timeout)
        self._pending -= 1
        if isinstance(result, Exception):
            raise result
        return result

    def __del__(self) -> None:
        self._requests.put(None)


def _read_requests(
    requests: "queue.SimpleQueue[list[RowRef] | None]",
    results: "queue.SimpleQueue[Batch | Exception]",
) -> None:
    while (refs := requests.get()) is not None:
        try:
            results.put(read_batch(refs))
        except Exception as error:  # raised in the training thread
            results.put(error)
