"""Evaluate gradient-boosted trees in NumPy, all trees and rows at once.

Lucchese et al. 2015, "QuickScorer" (SIGIR): the leaves of a tree are the bits of a word, from left
to right. A node whose condition is false makes the leaves to its left impossible; the leaf that a
row reaches is the first one that no node excludes. The order of the nodes does not matter.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

MAX_LEAVES: Final = 32  # bits of a word
_ROWS_AT_ONCE: Final = 128  # what a core's cache holds


@dataclass(frozen=True)
class Trees:
    """Trees as arrays, (nodes, trees), filled up with nodes that change nothing.

    In a node a row goes left if its `feature` <= `threshold`; else the leaves of `left`, as bits,
    are impossible. `leaves` is (trees, MAX_LEAVES).
    """

    feature: NDArray[np.int64]
    threshold: NDArray[np.float32]
    left: NDArray[np.int32]
    leaves: NDArray[np.float64]

    def probabilities(self, columns: NDArray[np.float32]) -> NDArray[np.float64]:
        """The sigmoid of the sum of all trees, in (0, 1), for each column of (features, rows).

        Columns must be finite.
        """
        rows = columns.shape[1]
        sums = np.zeros(rows)
        features = self.feature.ravel()
        trees = np.arange(self.feature.shape[1])[:, None]
        for begin in range(0, rows, _ROWS_AT_ONCE):
            part = columns[:, begin : begin + _ROWS_AT_ONCE].take(features, axis=0)
            part = part.reshape(*self.feature.shape, -1)
            np.subtract(self.threshold[:, :, None], part, out=part)
            impossible = part.view(np.int32)
            impossible >>= 31  # all bits where the difference is negative, else none
            impossible &= self.left[:, :, None]
            possible = ~np.bitwise_or.reduce(impossible, axis=0)
            first = (possible & -possible).view(np.uint32)  # the lowest bit that is set
            leaf = (first.astype(np.float32).view(np.int32) >> 23) - 127  # its exponent
            sums[begin : begin + _ROWS_AT_ONCE] = self.leaves[trees, leaf].sum(axis=0)
        return 1 / (1 + np.exp(-sums))

    @classmethod
    def of_lightgbm(cls, dump: dict[str, Any]) -> "Trees":
        """The trees of a LightGBM model, as its `dump_model` returns them.

        ValueError if a tree has more than MAX_LEAVES leaves or a condition of another kind.
        """
        nodes, leaves = [], []
        for tree in dump["tree_info"]:
            values: list[float] = []
            nodes.append(_nodes(tree["tree_structure"], values))
            leaves.append(values + [0.0] * (MAX_LEAVES - len(values)))
        shape = (max(1, *map(len, nodes)), len(nodes))
        feature, threshold = np.zeros(shape, np.int64), np.full(shape, np.inf, np.float32)
        left = np.zeros(shape, np.uint32)
        for tree, its_nodes in enumerate(nodes):
            for node, (split, bound, mask) in enumerate(its_nodes):
                feature[node, tree] = split
                threshold[node, tree] = _rounded_down(bound)
                left[node, tree] = mask
        return cls(feature, threshold, left.view(np.int32), np.array(leaves, np.float64))


def _nodes(node: dict[str, Any], values: list[float]) -> list[tuple[int, float, int]]:
    """Feature, threshold and the leaves on the left of each node; appends the leaves' values."""
    if "leaf_value" in node:
        if len(values) == MAX_LEAVES:
            raise ValueError(f"a tree has more than {MAX_LEAVES} leaves")
        values.append(node["leaf_value"])
        return []
    if node["decision_type"] != "<=":
        raise ValueError(f"a node has the condition {node['decision_type']!r}; want '<='")
    begin = len(values)
    left = _nodes(node["left_child"], values)
    mask = (1 << len(values)) - (1 << begin)
    right = _nodes(node["right_child"], values)
    return [(node["split_feature"], node["threshold"], mask), *left, *right]


def _rounded_down(bound: float) -> np.float32:
    """The largest float32 not above `bound`: for float32 values both conditions are the same."""
    with np.errstate(over="ignore"):
        rounded = np.float32(bound)
    # as float64: NumPy compares a float32 with a Python float in float32
    if float(rounded) > bound:
        rounded = np.nextafter(rounded, np.float32(-np.inf))
    return rounded + np.float32(0)  # no -0.0: less 0.0 it is negative
