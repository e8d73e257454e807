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

import hashlib
import importlib
import math
import queue
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from stages.formats import mds
from trainer.data.generations import Manifest, fault, folder_of
from trainer.data.order import I64, interleave


class Batch(NamedTuple):
    """A micro-batch, int64 on the CPU. `sources` are runs and `where` (generation, row in it), one
    per row.

    `tokens` [rows, seq_len]; `documents` [rows, seq_len] is the index within its row of each
    token's document, -1 for fill.
    """

    tokens: torch.Tensor
    documents: torch.Tensor
    sources: list[str]
    where: list[tuple[str, int]]


class Place(NamedTuple):
    """A row of a generation that has `rows` of them; `cache` is where a run on an object store is
    copied to (`stage`).
    """

    run: str
    generation: str
    rows: int
    row: int
    cache: str = ""


def read_ahead(
    places: Iterator[list[Place]], *, ahead: int, workers: int, timeout: float
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


def epoch_order(manifest: Manifest, epoch: int, *, seed: int, nodes: int) -> I64:
    """All rows of a generation in the order of an epoch, int64 [rows]: no row twice, and none left
    out.

    It is the order in which a StreamingDataset with num_canonical_nodes=`nodes`,
    shuffle_algo="py1e" and the same shuffle_seed gives out a generation whose rows divide evenly,
    and without its padding where they do not. py1e moves a row at most about 2^17 rows away from
    its shard's, within one of `nodes` runs of shards, which are then dealt out in turn: a batch
    sees every run, and reads keep to few shards at a time.
    """
    if manifest.rows == 0:
        return np.empty(0, np.int64)
    import_streaming()
    from streaming.base.shuffle import get_shuffle

    nodes = min(nodes, manifest.rows)  # py1e raises for a node without rows
    block = max(
        1 << 18, 4 * max(manifest.shard_rows)
    )  # py1e does not mix shards above 3/4 of a block
    drawn = order_seed(manifest, epoch, seed=seed)
    order: I64 = get_shuffle(
        "py1e", np.array(manifest.shard_rows, np.int64), nodes, drawn, 0, block
    )
    return interleave(order, nodes)


def order_seed(manifest: Manifest, epoch: int, *, seed: int) -> int:
    """32 bits by seed, content and epoch: sources that grow side by side do not shuffle alike, and
    a moved run does as before.
    """
    return int.from_bytes(
        hashlib.sha256(f"{seed}/data.order/{manifest.sha256}/{epoch}".encode()).digest()[:4],
        "little",
    )


def read_batch(places: Sequence[Place]) -> Batch:
    """These rows as a micro-batch.

    GenerationFault for one that cannot be read or whose spans do not fit in it.
    """
    samples = [_read_row(place) for place in places]
    tokens = np.stack([sample["tokens"] for sample in samples]).astype(np.int64)
    documents = np.full(tokens.shape, -1, np.int64)
    for row, sample in zip(documents, samples, strict=True):
        ids = np.repeat(np.arange(len(sample["spans"])), sample["spans"])
        row[: len(ids)] = ids
    where = [(place.generation, place.row) for place in places]
    return Batch(
        torch.from_numpy(tokens),
        torch.from_numpy(documents),
        [place.run for place in places],
        where,
    )


def _read_row(place: Place) -> dict[str, Any]:
    file: object = mds.INDEX
    try:
        shards = _shards(place.run, place.generation, place.rows, place.cache)
        shard = int(np.searchsorted(shards.starts, place.row, "right")) - 1
        file = shards.entries[shard]["raw_data"]["basename"]
        sample: dict[str, Any] = shards.read(shard, place.row - int(shards.starts[shard]))
    except (OSError, ValueError, LookupError) as error:
        found, do = repr(error), "restore the generation from a copy, and resume"
        raise fault(
            place.generation, str(file), expected=f"row {place.row}", found=found, do=do
        ) from error
    length, covered = len(sample["tokens"]), int(sample["spans"].sum(dtype=np.int64))
    if covered > length:
        do = "restore the generation from a copy, and train with verify = 'full'"
        expected = f"spans of row {place.row} within {length} tokens"
        raise fault(
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
        temporary = path.with_name(
            f"{path.name}.{uuid.uuid4().hex}"
        )  # several workers may come here at once
        temporary.write_bytes(data)
        temporary.replace(path)


@lru_cache(maxsize=64)
def _shards(run: str, generation: str, rows: int, cache: str) -> _Shards:
    return _Shards(folder_of(run, generation, cache), rows)


class _Rows(Dataset[Batch]):
    """What workers run: an index is a list of places."""

    def __getitem__(self, places: list[Place]) -> Batch:
        return read_batch(places)


def _as_it_is(batch: Any) -> Any:
    return batch


class _ThreadLoader:
    """Reads micro-batches `ahead` in one daemon thread, which cannot keep the process alive;
    queue.Empty when one is late.
    """

    def __init__(self, places: Iterator[list[Place]], *, ahead: int, timeout: float) -> None:
        self._places, self._ahead, self._timeout = places, ahead, timeout
        self._todo: queue.SimpleQueue[list[Place] | None] = queue.SimpleQueue()
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
    todo: "queue.SimpleQueue[list[Place] | None]", done: "queue.SimpleQueue[Batch | Exception]"
) -> None:
    while (places := todo.get()) is not None:
        try:
            done.put(read_batch(places))
        except Exception as error:  # for the training thread to raise
            done.put(error)


def import_streaming() -> Any:
    """The module `streaming`, also where torchvision is absent or does not match torch. Takes 6-20
    s the first time.

    `import streaming` loads its vision datasets, and these load torchvision. With CPU torch and a
    CUDA wheel of torchvision that raises "operator torchvision::nms does not exist". We read no
    images: where the real torchvision does not import, empty modules stand in for it while
    streaming is imported, and no longer, so that nothing else in the process takes them for the
    real ones.
    """
    if "streaming" in sys.modules:
        return sys.modules["streaming"]
    try:
        importlib.import_module("torchvision")
    except (
        ImportError,
        RuntimeError,
        OSError,
    ):  # absent; another torch's operators; another CUDA's libraries
        with_stand_ins = _torchvision_stand_ins()
    else:
        with_stand_ins = {}
    sys.modules.update(with_stand_ins)
    try:
        return importlib.import_module("streaming")
    finally:
        for name in with_stand_ins:
            del sys.modules[name]


def _torchvision_stand_ins() -> dict[str, ModuleType]:
    """Just the names that streaming 0.13.0's vision/base.py imports."""
    names = (
        "torchvision",
        "torchvision.datasets",
        "torchvision.transforms",
        "torchvision.transforms.functional",
    )
    modules = {
        name: module_from_spec(ModuleSpec(name, None)) for name in names
    }  # transformers asks for a __spec__
    modules["torchvision.datasets"].VisionDataset = type("VisionDataset", (), {})  # type: ignore[attr-defined]
    modules["torchvision.transforms.functional"].to_tensor = None  # type: ignore[attr-defined]
    return modules
