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
    places: Iterator[list[RowRef]], *, ahead: int, workers: int, timeout: float
) -> Iterator[Batch]:
    """The micro-batches of `places`, in order, `ahead` of them being read in a thread or in
    `workers` processes.

    `places` is drawn from in the caller's thread. A batch that is not there within `timeout`
    seconds, or whose worker died, raises queue.Empty or RuntimeError: torch's DataLoader has no
    narrower one. Dropping the iterator ends the reading.
    """
    if workers == 0:
        return _ThreadLoader(places, ahead=ahead, timeout=timeout)
    loader = DataLoader(
        _Rows(),
        sampler=places,  # an iterator, once: each of its items is what a worker is asked for
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        prefetch_factor=math.ceil(ahead / workers),
        timeout=timeout,
        # it draws a seed for the workers; not from the run's random state
        generator=torch.Generator(),
    )
    return iter(loader)


class _Rows(Dataset[Batch]):
    """What workers run: an index is a list of places."""

    def __getitem__(self, places: list[RowRef]) -> Batch:
        return read_batch(places)


def _as_it_is(batch: Any) -> Any:
    return batch


class _ThreadLoader:
    """Reads micro-batches `ahead` in one daemon thread, which cannot keep the process alive;
    queue.Empty when one is late.
    """

    def __init__(self, places: Iterator[list[RowRef]], *, ahead: int, timeout: float) -> None:
        self._places, self._ahead, self._timeout = places, ahead, timeout
        self._todo: queue.SimpleQueue[list[RowRef] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Batch | Exception] = queue.SimpleQueue()
        self._pending = 0
        threading.Thread(
            target=_read_all, args=(self._todo, self._done), name="rows", daemon=True
        ).start()

    def __iter__(self) -> "_ThreadLoader":
        return self

    def __next__(self) -> Batch:
        while self._pending < self._ahead and (places := next(self._places, None)) is not None:
            self._todo.put(places)
            self._pending += 1
        if self._pending == 0:
            raise StopIteration
        batch = self._done.get(timeout=self._timeout)
        self._pending -= 1
        if isinstance(batch, Exception):
            raise batch
        return batch

    def __del__(self) -> None:
        self._todo.put(None)


def _read_all(
    todo: "queue.SimpleQueue[list[RowRef] | None]", done: "queue.SimpleQueue[Batch | Exception]"
) -> None:
    while (places := todo.get()) is not None:
        try:
            done.put(read_batch(places))
        except Exception as error:  # for the training thread to raise
            done.put(error)
