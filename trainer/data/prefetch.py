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
    threading.Thread(
        target=_read_requests, args=(requests, results), name="rows", daemon=True
    ).start()
    num_pending = 0
    try:
        while True:
            while num_pending < ahead and (batch_refs := next(refs, None)) is not None:
                requests.put(batch_refs)
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


def _read_requests(
    requests: "queue.SimpleQueue[list[RowRef] | None]",
    results: "queue.SimpleQueue[Batch | Exception]",
) -> None:
    while (refs := requests.get()) is not None:
        try:
            results.put(read_batch(refs))
        except Exception as error:  # raised in the training thread
            results.put(error)
