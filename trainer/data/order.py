"""Which rows make a global batch: arithmetic on counters, the same on every rank and on every
number of ranks.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]


class Position(NamedTuple):
    """Where a source stands: `rows` are consumed of the generation `at`, which is its place in the
    list, in this `epoch`.
    """

    epoch: int = 0
    at: int = 0
    rows: int = 0


class Stretch(NamedTuple):
    """Places [start, stop) in the order of one generation and epoch."""

    epoch: int
    at: int
    start: int
    stop: int


def fitting_ranks(global_rows: int, micro_rows: int) -> list[int]:
    """Numbers of ranks among which a global batch divides, rising.

    ValueError where it does not divide into micro-batches.
    """
    if min(global_rows, micro_rows) < 1 or global_rows % micro_rows:
        raise ValueError(
            f"global_batch_rows={global_rows} must be a positive multiple of micro_batch_rows={micro_rows}"
        )
    total = global_rows // micro_rows
    return [ranks for ranks in range(1, total + 1) if total % ranks == 0]


def micro_batches(global_rows: int, micro_rows: int, world_size: int) -> int:
    """Micro-batches of a rank in each step.

    ValueError, with the numbers of ranks that do, where the batch does not divide.
    """
    fitting = fitting_ranks(global_rows, micro_rows)
    if world_size not in fitting:
        raise ValueError(
            f"a global batch of {global_rows} rows in micro-batches of {micro_rows} does not divide among {world_size} ranks; "
            f"run with {', '.join(map(str, fitting))} ranks, or change global_batch_rows or micro_batch_rows"
        )
    return global_rows // micro_rows // world_size


def draw(weights: Sequence[float], drawn: Sequence[int], rows: int) -> I64:
    """The source of each of the next `rows` rows, int64 [rows], after `drawn` rows of each source.

    Each row goes to the source that is furthest behind its share, the first of equals. No chance in
    it: the counters are all the state there is, the sources alternate within a batch, and a share
    is off by rows, never by a percentage.
    """
    total, counts, owners = sum(weights), list(drawn), np.empty(rows, np.int64)
    shares = [weight / total for weight in weights]
    for number in range(rows):
        n = sum(counts) + 1
        behind = [share * n - count for share, count in zip(shares, counts, strict=True)]
        owners[number] = owner = behind.index(max(behind))
        counts[owner] += 1
    return owners


def stretches(
    sizes: Sequence[int], position: Position, count: int, *, epochs: int
) -> tuple[list[Stretch], Position] | None:
    """The next `count` rows over generations of these `sizes`, and the position after them; None
    when there are not as many.

    What is left of a generation is filled up from the next, so no row is lost or repeated where two
    meet. After the last one comes the first again in the next epoch, as long as that is below
    `epochs`.
    """
    epoch, at, rows = position
    found = []
    while count > 0:
        if at == len(sizes):
            if epoch + 1 >= epochs or not any(sizes):
                return None
            epoch, at, rows = epoch + 1, 0, 0
        stop = min(sizes[at], rows + count)
        if stop > rows:
            found.append(Stretch(epoch, at, rows, stop))
            count -= stop - rows
        if stop == sizes[at] and count > 0:
            at, rows = at + 1, 0
        else:
            rows = stop
    return found, Position(epoch, at, rows)


def interleave(order: I64, lanes: int) -> I64:
    """Cut an order into `lanes` equal runs (one row more or less) and deal them out in turn: every
    row once, no padding.
    """
    borders = [len(order) * lane // lanes for lane in range(lanes + 1)]
    turns = np.concatenate([np.arange(stop - start) for start, stop in itertools.pairwise(borders)])
    return order[np.argsort(turns, kind="stable")]
