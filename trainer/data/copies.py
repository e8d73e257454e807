"""Copies of a source's generations on this node, if its run lies on an object store."""

import os
import shutil
import threading
from collections.abc import Sequence
from functools import partial

from stages.storage.files import is_local
from trainer.config import DataConfig
from trainer.data.generations import Manifest, folder_of, stage
from trainer.ranks import Ranks


class Copies:
    """Copies the generations of one source, each in a thread; does nothing for a run on a disk.

    The rank with LOCAL_RANK 0 copies for its node. `waiting_for` is the index of the generation
    whose copy has to end before rows can be planned, `threads` are by that index.
    """

    def __init__(self, run: str, config: DataConfig, ranks: Ranks) -> None:
        self._is_local, self._config, self._ranks = is_local(run), config, ranks
        self.threads: dict[int, _CopyThread] = {}
        self.waiting_for: int | None = None
        self._complete: set[int] = set()
        self._removed = 0  # how many generations, from the first on, need no copy any more

    def complete(self, generations: Sequence[Manifest], index: int, *, timeout: float) -> bool:
        """Whether every node has a generation's shards, after up to `timeout` seconds. Collective.

        Starts the copy if there is none. A copy that failed in the background is tried again, the
        failure of one that was waited for is raised.
        """
        if index in self._complete or self._is_local:
            return True
        thread = self._start(generations, index, retry=self.waiting_for is None)
        if thread:
            thread.join(timeout)
        self.waiting_for = index if self.is_copying(index) else None
        if self.waiting_for is not None:
            return False
        self._ranks.agree(
            partial(_require_copy, thread, generations[index], self._config.cache_dir)
        )
        self._complete.add(index)
        return True

    def is_copying(self, index: int) -> bool:
        """Whether any node still copies a generation. Collective."""
        return self._ranks.any(index in self.threads and self.threads[index].is_alive())

    def advance(self, generations: Sequence[Manifest], current: int) -> None:
        """Remove copies before `current`, also those of an earlier attempt, and copy the next one.

        No rank reads them any more: all ranks have finished the step before, in which they
        exchanged gradients.
        """
        if self._is_local:
            return
        for manifest in generations[self._removed : current]:
            if self._config.at_end != "repeat":
                folder = folder_of(manifest.run, manifest.name, self._config.cache_dir)
                shutil.rmtree(folder, ignore_errors=True)
        self._removed = max(self._removed, current)
        if current in self._complete and current + 1 < len(generations):
            self._start(generations, current + 1)

    def _start(
        self, generations: Sequence[Manifest], index: int, *, retry: bool = False
    ) -> "_CopyThread | None":
        """The thread that copies a generation; None if another rank of this node does."""
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return None
        thread = self.threads.get(index)
        if thread is None or (retry and thread.failure is not None):
            mode, cache = self._config.verify, self._config.cache_dir
            thread = _CopyThread(partial(stage, generations[index], mode=mode, cache=cache))
            self.threads[index] = thread
            thread.start()
        return thread


class _CopyThread(threading.Thread):
    """Runs `copy` and keeps its error in `failure`."""

    def __init__(self, copy: partial[None]) -> None:
        super().__init__(name="copy", daemon=True)
        self.failure: Exception | None = None
        self._copy = copy

    def run(self) -> None:
        try:
            self._copy()
        except Exception as error:
            self.failure = error


def _require_copy(thread: _CopyThread | None, manifest: Manifest, cache: str) -> None:
    if thread is None:
        stage(manifest, mode="quick", cache=cache)  # another rank of this node has copied it
    elif thread.failure:
        raise thread.failure
