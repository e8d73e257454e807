"""One source of training data: its generations and their copies on this node, its position, and its
part of a checkpoint.
"""

import itertools
import logging
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from stages.storage.catalog import (
    current_entries,
    entries_to_read,
    generation_error,
    read_catalog,
)
from stages.storage.digests import bytes_sha256
from stages.storage.files import is_local
from trainer.config import DataConfig, SourceConfig
from trainer.data.generations import Manifest, Share, folder_of, stage, verify_generation
from trainer.data.order import I64, OrderSlice, Position, epoch_order
from trainer.data.rows import RowRange, RowRef
from trainer.ranks import Ranks

_LOG = logging.getLogger(__name__)


class Source:
    """The generations of a run, in reading order: those named, or the newest of each lineage.

    A training that has begun a generation stays with it when another supersedes it.

    `generations` were verified, `position` is how far rows are planned (not how far they are used),
    `num_planned` counts the planned rows since the weights of sources last changed.
    """

    def __init__(self, config: SourceConfig, data: DataConfig, ranks: Ranks) -> None:
        self.run, self.weight = config.run, config.weight
        self.generations: list[Manifest] = []
        self.position = Position()
        self.num_planned = 0
        self.copies = Copies(config.run, self.generations, data, ranks)
        self._config, self._data, self._ranks = config, data, ranks
        self._saved: list[tuple[str, str]] = []  # what a checkpoint had begun to read
        self.left_out: dict[str, str] = {}  # newer than what was begun, and what to say; on rank 0
        self._order = np.empty(0, np.int64)
        self._order_key: tuple[int, int] | None = None  # (index of the generation, epoch)
        self._order_digest = ""

    def extend(self) -> list[Manifest]:
        """Verify and append the generations that were published since the last call. Collective."""
        entries = self._ranks.on_first(self._catalog_entries)
        known = len(self.generations)
        for entry in entries[known:]:
            # generations that a resumed run has finished are not hashed again
            is_read = len(self.generations) < self.position.gen_index
            mode = "quick" if is_read and self._data.at_end != "repeat" else self._data.verify
            share = Share(self._ranks.rank, self._ranks.count)
            cache = self._data.cache_dir
            verify = partial(
                verify_generation, self.run, entry, mode=mode, share=share, cache=cache
            )
            self.generations.append(self._ranks.agree(verify))
        return self.generations[known:]

    def row_refs(self, slices: Sequence[OrderSlice]) -> Iterator[RowRef]:
        """The rows of the slices, in order."""
        for epoch, index, start, stop in slices:
            generation = self.generations[index]
            for row in self._epoch_order(index, epoch)[start:stop].tolist():
                yield RowRef(self.run, generation.name, generation.rows, row, self._data.cache_dir)

    def row_ranges(self, slices: Sequence[OrderSlice]) -> list[RowRange]:
        """The slices by the names of their generations."""
        return [
            RowRange(self.generations[index].name, epoch, start, stop)
            for epoch, index, start, stop in slices
        ]

    def state(self) -> dict[str, Any]:
        """The position, for a checkpoint."""
        epoch, index, rows = self.position
        begun = [[m.name, m.sha256] for m in self.generations[: index + 1]]
        name, sha256 = begun[-1] if begun else (None, None)
        return {
            "generation": name,
            "manifest_sha256": sha256,
            "order": self._order_digest if self._order_key == (index, epoch) else None,
            "generations": begun,
            "epoch": epoch,
            "rows": rows,
            "drawn": self.num_planned,
            "weight": self.weight,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; call before `extend`."""
        self._saved = [(name, sha256) for name, sha256 in state["generations"]]
        self.position = Position(state["epoch"], max(0, len(self._saved) - 1), state["rows"])
        self.num_planned = state["drawn"]

    def check_order(self, state: Mapping[str, Any]) -> None:
        """GenerationError if rows have another order than when the checkpoint was saved.

        Another version of NumPy or streaming may shuffle differently.
        """
        if state["order"] is None:
            return
        self._epoch_order(self.position.gen_index, self.position.epoch)
        if self._order_digest != state["order"]:
            raise generation_error(
                state["generation"],
                "order of rows",
                expected=state["order"],
                found=self._order_digest,
                do="resume with the versions of numpy and streaming that the run began with",
            )

    def _epoch_order(self, index: int, epoch: int) -> I64:
        """The order of a generation; the last one is kept in memory, 8 bytes a row."""
        if self._order_key != (index, epoch):
            seed, nodes = self._data.shuffle_seed, self._data.canonical_nodes
            self._order = epoch_order(self.generations[index], epoch, seed=seed, nodes=nodes)
            self._order_key = (index, epoch)
            self._order_digest = bytes_sha256(self._order.tobytes())[:16]
        return self._order

    def _catalog_entries(self) -> list[dict[str, Any]]:
        """The catalog's entries of this source, checked against what was read so far."""
        entries, names = read_catalog(self.run), self._config.generations
        if names:
            by_name = {entry["name"]: entry for entry in entries}
            missing = [name for name in names if name not in by_name]
            if missing and self._data.at_end != "wait":
                raise generation_error(
                    missing[0],
                    "catalog.jsonl",
                    expected="its entry",
                    found=", ".join(by_name) or "none",
                    do="correct `generations`, or publish it",
                )
            entries = [by_name[name] for name in itertools.takewhile(by_name.__contains__, names)]
        else:
            entries = self._without_repeats(entries)
        self._check_unchanged(entries)
        return entries

    def _begun(self) -> list[tuple[str, str]]:
        """Name and manifest's sha256 of what this training reads, or had begun to read."""
        known = [(manifest.name, manifest.sha256) for manifest in self.generations]
        return known if len(known) > len(self._saved) else self._saved

    def _without_repeats(self, entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The entries to read; says which newer ones are not, once each."""
        to_read = entries_to_read(entries, [name for name, _ in self._begun()])
        read = {entry["name"] for entry in to_read}
        for entry in current_entries(entries):
            name = entry["name"]
            if name not in read and name not in self.left_out:
                self.left_out[name] = (
                    f"{self.run}: {name} supersedes {', '.join(entry['supersedes'])}, which this "
                    "training has begun, and is not read; start a new training to read it"
                )
                _LOG.warning(self.left_out[name])
        return to_read

    def _check_unchanged(self, entries: Sequence[Mapping[str, Any]]) -> None:
        seen = self._begun()
        listed = [f"{entry['name']} with {entry['manifest_sha256']}" for entry in entries]
        for index, (name, sha256) in enumerate(seen):
            actual = listed[index] if index < len(listed) else "none"
            if actual != f"{name} with {sha256}":
                raise generation_error(
                    name,
                    "manifest_sha256 in catalog.jsonl",
                    expected=f"{name} with {sha256}, as this run has read it",
                    found=actual,
                    do="restore the published one, or start a new training: another order would "
                    "repeat rows and lose others",
                )


class Copies:
    """Copies `generations` of a run, each in a thread; does nothing for a run on a disk.

    The list may grow. The rank with LOCAL_RANK 0 copies for its node. `waiting_for` is the index of
    the generation whose copy has to end before rows can be planned, `threads` are by that index.
    """

    def __init__(
        self, run: str, generations: Sequence[Manifest], config: DataConfig, ranks: Ranks
    ) -> None:
        self._is_local, self._generations = is_local(run), generations
        self._config, self._ranks = config, ranks
        self.threads: dict[int, _CopyThread] = {}
        self.waiting_for: int | None = None
        self._complete: set[int] = set()
        self._removed = 0  # how many generations, from the first on, need no copy any more

    def complete(self, index: int, *, timeout: float) -> bool:
        """Whether every node has a generation's shards, after up to `timeout` seconds. Collective.

        Starts the copy if there is none. A copy that failed in the background is tried again, the
        failure of one that was waited for is raised.
        """
        if index in self._complete or self._is_local:
            return True
        thread = self._start(index, retry=self.waiting_for is None)
        if thread:
            thread.join(timeout)
        self.waiting_for = index if self.is_copying(index) else None
        if self.waiting_for is not None:
            return False
        self._ranks.agree(partial(self._require_copy, thread, index))
        self._complete.add(index)
        return True

    def is_copying(self, index: int) -> bool:
        """Whether any node still copies a generation. Collective."""
        return self._ranks.any(index in self.threads and self.threads[index].is_alive())

    def advance(self, current: int) -> None:
        """Remove copies before `current`, also those of an earlier attempt, and copy the next one.

        No rank reads them any more: all ranks have finished the step before, in which they
        exchanged gradients.
        """
        if self._is_local:
            return
        if self._config.at_end != "repeat":
            for manifest in self._generations[self._removed : current]:
                folder = folder_of(manifest.run, manifest.name, self._config.cache_dir)
                shutil.rmtree(folder, ignore_errors=True)
        self._removed = max(self._removed, current)
        if current in self._complete and current + 1 < len(self._generations):
            self._start(current + 1)

    def _start(self, index: int, *, retry: bool = False) -> "_CopyThread | None":
        """The thread that copies a generation; None if another rank of this node does."""
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return None
        thread = self.threads.get(index)
        if thread is None or (retry and thread.failure is not None):
            mode, cache = self._config.verify, self._config.cache_dir
            copy = partial(stage, self._generations[index], mode=mode, cache=cache)
            self.threads[index] = thread = _CopyThread(copy)
            thread.start()
        return thread

    def _require_copy(self, thread: "_CopyThread | None", index: int) -> None:
        if thread is None:  # another rank of this node has copied it
            stage(self._generations[index], mode="quick", cache=self._config.cache_dir)
        elif thread.failure:
            raise thread.failure


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
