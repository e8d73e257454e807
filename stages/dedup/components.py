"""Connected components of near-duplicate graphs; the root of a component is its smallest id.

Two ways to the same labels; ids are any uint64, rows of edges have shape (n, 2):

    dense_components         one machine, 16 bytes per node; edges are streamed twice, never stored
    large_star, small_star   any size: two maps over sorted edges, repeated in turn until a pair of
                             them reproduces its input, which is then (node, root)
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
Places = npt.NDArray[np.signedinteger[Any]]
CHUNK = 1 << 20  # edges worked on at once


def dense_components(chunks: Callable[[], Iterator[U64]]) -> tuple[U64, U64]:
    """Nodes ascending (n,), and for each the smallest id of its component (n,).

    `chunks()` starts a fresh pass over the edges, arrays (m, 2), in any order, with repeats and
    self-loops; there are two. A forest of parents over positions in the list of nodes: the roots of
    a chunk's ends are found, scipy joins them in a small graph of their own, and each is hooked to
    the smallest it met. No parent lies above its child, so the root that is left is the smallest
    id. About 1 microsecond an edge, 2 from 100 million nodes on; memory: `estimated_bytes`.
    """

    def slices() -> Iterator[U64]:
        return (
            chunk[start : start + CHUNK]
            for chunk in chunks()
            for start in range(0, len(chunk), CHUNK)
        )

    nodes = _node_list(slices())
    labels = np.empty(len(nodes), np.uint64)
    # the parents live in the memory of the result, half of it where int32 suffices
    parent = labels.view(np.int32)[: len(nodes)] if len(nodes) < 1 << 31 else labels.view(np.int64)
    for start in range(0, len(nodes), CHUNK):
        parent[start : start + CHUNK] = np.arange(start, min(start + CHUNK, len(nodes)))
    for edges in slices():
        ends = edges.ravel()
        # ascending keys keep searchsorted in the cache: 30 times faster at 20 million nodes
        order = np.argsort(ends)
        roots = np.empty(edges.shape, parent.dtype)
        roots.reshape(-1)[order] = _roots(parent, np.searchsorted(nodes, ends[order]))
        _hook(parent, roots[roots[:, 0] != roots[:, 1]])
    # from the top: an id overwrites parents at or above its own position only, and nothing below
    # looks up there
    for start in reversed(range(0, len(nodes), CHUNK)):
        labels[start : start + CHUNK] = nodes[
            _roots(parent, np.arange(start, min(start + CHUNK, len(nodes))))
        ]
    return nodes, labels


def estimated_bytes(num_nodes: int) -> int:
    """Upper bound of the memory `dense_components` takes, result included, beside the chunk its
    caller holds.
    """
    return 16 * num_nodes + 160 * CHUNK  # measured: 92 bytes an edge of a chunk


def _node_list(chunks: Iterator[U64]) -> U64:
    nodes = np.empty(0, np.uint64)
    merged = 0  # so many ascend without repeats; behind them stand runs of one chunk each
    for edges in chunks:
        ids = np.unique(edges)
        # realloc remaps a large block, it does not copy
        nodes.resize(len(nodes) + len(ids), refcheck=False)
        nodes[-len(ids) :] = ids
        # merged at a quarter of the list: 12 bytes a node at the peak, and each id is moved a
        # constant number of times
        if len(nodes) - merged > max(2 * CHUNK, merged // 4):
            _merge(nodes)
            merged = len(nodes)
    _merge(nodes)
    return nodes


def _merge(nodes: U64) -> None:
    """Sort in place, drop the repeats and the room they took."""
    nodes.sort(kind="stable")  # timsort merges ascending runs; its scratch is the shorter of two
    size = 0
    for start in range(0, len(nodes), CHUNK):
        block = nodes[start : start + CHUNK]
        block = block[changes(block, nodes[size - 1] if size else None)]
        nodes[size : size + len(block)] = block
        size += len(block)
    nodes.resize(size, refcheck=False)


def _roots(parent: Places, places: Places) -> Places:
    """Roots of `places` (k,), which become their children; those on the way skip one generation
    (path halving).
    """
    roots = parent[places]
    climbing = np.flatnonzero(parent[roots] != roots)
    while len(climbing):
        at = roots[climbing]
        above = parent[parent[at]]
        parent[at] = above
        roots[climbing] = above
        climbing = climbing[parent[above] != above]
    parent[places] = roots
    return roots


def _hook(parent: Places, pairs: Places) -> None:
    """Join the trees of each pair of roots (k, 2)."""
    # imported by the few processes that come here: it takes half a second
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    if not len(pairs):
        return
    roots = np.unique(pairs)
    # until they are hooked, the roots' own entries hold their rank
    parent[roots] = np.arange(len(roots))
    ends = parent[pairs]
    graph = coo_matrix(
        (np.ones(len(ends), bool), (ends[:, 0], ends[:, 1])), shape=(len(roots), len(roots))
    )
    count, label = connected_components(graph, directed=False)
    smallest = np.empty(count, parent.dtype)
    smallest[label[::-1]] = roots[::-1]  # of repeated assignments the last stays
    parent[roots] = smallest[label]


def large_star(blocks: Iterator[U64]) -> Iterator[U64]:
    """Every neighbour above the node, with the smallest of the node and its neighbours: rows
    (larger, smaller).

    `blocks` hold rows (node, neighbour), each edge in both directions, a node's rows together with
    neighbours ascending, repeats allowed; the nodes come in any order. A node may span blocks: what
    is carried over is one row and its minimum. Takes a few times the memory of a block. Kiveris et
    al. 2014, "Connected Components in MapReduce and Beyond".
    """
    for rows, _, smallest in _groups(blocks):
        above = rows[:, 1] > rows[:, 0]
        yield np.column_stack([rows[above, 1], np.minimum(rows[above, 0], smallest[above])])


def small_star(blocks: Iterator[U64]) -> Iterator[U64]:
    """The node and its neighbours, each with the smallest neighbour: rows (larger, smaller).

    `blocks` as for `large_star`, but each edge only at its larger end. A node's first row stands
    for the node itself.
    """
    for rows, first, smallest in _groups(blocks):
        yield np.column_stack([np.where(first, rows[:, 0], rows[:, 1]), smallest])


def _groups(blocks: Iterator[U64]) -> Iterator[tuple[U64, npt.NDArray[np.bool_], U64]]:
    """Rows without repeats; which of them start a node; the first neighbor of each row's node."""
    last: Sequence[np.uint64 | None] | U64 = (None, None)
    # first neighbour of the node that was under way when the block ended
    carried = np.zeros(1, np.uint64)
    for block in blocks:
        starts = changes(block[:, 0], last[0])
        fresh = starts | changes(block[:, 1], last[1])
        rows, first = block[fresh], starts[fresh]
        smallest = np.append(carried, rows[first, 1])
        yield rows, first, smallest[np.cumsum(first)]
        if len(block):
            last, carried = block[-1].copy(), smallest[-1:]


def changes(values: U64, before: np.uint64 | None = None) -> npt.NDArray[np.bool_]:
    """Where a value differs from the one before it; `before` precedes the first, None if nothing
    does.
    """
    return np.append(values[:1] != before, values[1:] != values[:-1])
