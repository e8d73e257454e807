"""Step 1 of a row's way to the loss: which rows make a global batch.

Arithmetic on counters and a seeded order, the same on every rank and for any number of ranks. The
shuffle is mosaicml-streaming's, which this module imports.
Next: `rows` reads them, `loader` hands out batches, `model.step` computes gradients, `loop` trains.
"""

import hashlib
import importlib
import itertools
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from trainer.data.generations import Manifest

I64 = npt.NDArray[np.int64]


class Position(NamedTuple):
    """How far a source is read: `rows` rows of the generation at `gen_index` in its list."""

    epoch: int = 0
    gen_index: int = 0
    rows: int = 0


class OrderSlice(NamedTuple):
    """Indices [start, stop) of the `epoch_order` of the generation at `gen_index`."""

    epoch: int
    gen_index: int
    start: int
    stop: int


def valid_rank_counts(global_rows: int, micro_rows: int) -> list[int]:
    """Numbers of ranks that divide a global batch evenly, ascending.

    ValueError if the batch does not divide into micro-batches.
    """
    if min(global_rows, micro_rows) < 1 or global_rows % micro_rows:
        raise ValueError(
            f"global_batch_rows={global_rows} must be a positive multiple of "
            f"micro_batch_rows={micro_rows}"
        )
    total = global_rows // micro_rows
    return [ranks for ranks in range(1, total + 1) if total % ranks == 0]


def micro_batches_per_rank(global_rows: int, micro_rows: int, world_size: int) -> int:
    """Micro-batches of each rank in a step; ValueError, with valid numbers, if it is not whole."""
    valid = valid_rank_counts(global_rows, micro_rows)
    if world_size not in valid:
        raise ValueError(
            f"a global batch of {global_rows} rows in micro-batches of {micro_rows} does not "
            f"divide among {world_size} ranks; run with {', '.join(map(str, valid))} ranks, or "
            "change global_batch_rows or micro_batch_rows"
        )
    return global_rows // micro_rows // world_size


def assign_sources(weights: Sequence[float], counts: Sequence[int], rows: int) -> I64:
    """The source of each of the next `rows` rows, int64 [rows], after `counts` rows per source.

    Each row goes to the source that is furthest behind its share, the first one of equals. There is
    no randomness: the counters are the whole state, sources alternate within a batch, and a share
    is off by a few rows, never by a percentage.
    """
    total, counts, owners = sum(weights), list(counts), np.empty(rows, np.int64)
    shares = [weight / total for weight in weights]
    for row in range(rows):
        n = sum(counts) + 1
        deficits = [share * n - count for share, count in zip(shares, counts, strict=True)]
        owners[row] = owner = deficits.index(max(deficits))
        counts[owner] += 1
    return owners


def next_slices(
    sizes: Sequence[int], position: Position, count: int, *, epochs: int
) -> tuple[list[OrderSlice], Position] | None:
    """The next `count` rows of generations of these `sizes`, and the position after them.

    None if there are fewer rows. A batch that a generation cannot fill is completed from the next
    one, so no row is lost or repeated at the border. After the last generation comes the first one
    in the next epoch, while that is below `epochs`.
    """
    epoch, index, rows = position
    slices = []
    while count > 0:
        if index == len(sizes):
            if epoch + 1 >= epochs or not any(sizes):
                return None
            epoch, index, rows = epoch + 1, 0, 0
        stop = min(sizes[index], rows + count)
        if stop > rows:
            slices.append(OrderSlice(epoch, index, rows, stop))
            count -= stop - rows
        if stop == sizes[index] and count > 0:
            index, rows = index + 1, 0
        else:
            rows = stop
    return slices, Position(epoch, index, rows)


def interleave(order: I64, parts: int) -> I64:
    """Cut an order into `parts` runs, equal to one row, and take one row of each in turn."""
    borders = [len(order) * part // parts for part in range(parts + 1)]
    turns = np.concatenate([np.arange(stop - start) for start, stop in itertools.pairwise(borders)])
    return order[np.argsort(turns, kind="stable")]


def epoch_order(manifest: Manifest, epoch: int, *, seed: int, nodes: int) -> I64:
    """All rows of a generation in the order of an epoch, int64 [rows], each exactly once.

    It is the order of a StreamingDataset with num_canonical_nodes=`nodes`, shuffle_algo="py1e" and
    the same shuffle_seed if the rows divide evenly, and without its padding if they do not. py1e
    moves a row at most about 2^17 rows away from its shard's, within one of `nodes` runs of shards,
    which are then interleaved: a batch has rows of every run, and reads stay in few shards.
    """
    if manifest.rows == 0:
        return np.empty(0, np.int64)
    import_streaming()
    from streaming.base.shuffle import get_shuffle

    nodes = min(nodes, manifest.rows)  # py1e raises for a node without rows
    # py1e does not mix shards above 3/4 of a block
    block = max(1 << 18, 4 * max(manifest.shard_rows))
    shard_rows = np.array(manifest.shard_rows, np.int64)
    seed = order_seed(manifest, epoch, seed=seed)
    return interleave(get_shuffle("py1e", shard_rows, nodes, seed, 0, block), nodes)


def order_seed(manifest: Manifest, epoch: int, *, seed: int) -> int:
    """32 bits from seed, content and epoch.

    Sources of the same shape do not shuffle alike, and a run that was moved shuffles as before.
    """
    key = f"{seed}/data.order/{manifest.sha256}/{epoch}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little")


def import_streaming() -> Any:
    """The module `streaming`, also if torchvision is missing or does not fit torch.

    Takes 6-20 s the first time. `import streaming` loads its vision datasets, which load
    torchvision; with CPU torch and a CUDA wheel of torchvision that raises "operator
    torchvision::nms does not exist". We read no images: if the real torchvision does not import,
    empty modules replace it while streaming is imported, and only then, so that no other code takes
    them for the real ones.
    """
    if "streaming" in sys.modules:
        return sys.modules["streaming"]
    stand_ins: dict[str, ModuleType] = {}
    try:
        importlib.import_module("torchvision")
    # missing; operators of another torch; libraries of another CUDA
    except (ImportError, RuntimeError, OSError):
        stand_ins = _torchvision_stand_ins()
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module("streaming")
    finally:
        for name in stand_ins:
            del sys.modules[name]


def _torchvision_stand_ins() -> dict[str, ModuleType]:
    """The names that streaming 0.13.0's vision/base.py imports."""
    names = ("", ".datasets", ".transforms", ".transforms.functional")
    # with a spec, which transformers looks at
    modules = {
        f"torchvision{name}": module_from_spec(ModuleSpec(f"torchvision{name}", None))
        for name in names
    }
    modules["torchvision.datasets"].VisionDataset = type("VisionDataset", (), {})  # type: ignore[attr-defined]
    modules["torchvision.transforms.functional"].to_tensor = None  # type: ignore[attr-defined]
    return modules
