"""Components both ways against networkx, and one component of a million nodes both ways against
each other.
"""

import tracemalloc
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.dedup import components
from stages.dedup.components import dense_components, estimated_bytes, large_star, small_star

ODD = 0x9E3779B1  # odd, so that multiplying by it shuffles the ids of 32 bits and of 64 bits

ids = st.integers(0, 20) | st.integers(2**63 - 10, 2**63 + 10) | st.integers(0, 2**64 - 1)
SHAPES = {
    "chain": lambda nodes: list(pairwise(nodes)),
    "star": lambda nodes: [(nodes[0], node) for node in nodes],
    "clique": lambda nodes: list(combinations(nodes, 2)),
    "matching": lambda nodes: list(zip(nodes[::2], nodes[1::2], strict=False)),
}


def rows_of(pairs):
    return np.array(pairs, np.uint64).reshape(-1, 2)


@st.composite
def graphs(draw):
    """Edges in any order and direction: chains, stars, cliques and pairs over shuffled ids, and
    loose edges between them.
    """
    nodes = st.lists(ids, min_size=1, max_size=30, unique=True)
    pairs = [
        pair
        for shape in draw(st.lists(st.sampled_from(sorted(SHAPES)), max_size=4))
        for pair in SHAPES[shape](draw(nodes))
    ]
    pairs += draw(st.lists(st.tuples(ids, ids), max_size=20))
    rows = rows_of(pairs)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return rng.permuted(rows, axis=1)[rng.permutation(len(rows))]


cuts = st.lists(st.integers(0, 1200), max_size=12).map(sorted)


def networkx_labels(edges):
    networkx = pytest.importorskip("networkx")
    found = networkx.connected_components(networkx.Graph(edges.tolist()))
    return {node: root for component in found for root in [min(component)] for node in component}


def as_dict(nodes, roots):
    assert nodes.dtype == roots.dtype == np.uint64
    return dict(zip(nodes.tolist(), roots.tolist(), strict=True))


# --- the sort between the operations, in memory ---------------------------------------------------


def by_hash(rows):
    """Rows ordered by a hash of the node, then by neighbour."""
    return rows[np.lexsort((rows[:, 1], rows[:, 0] * np.uint64(ODD)))]


def by_hash_packed(rows):
    """`by_hash` in a tenth of the time, for ids below 2^32."""
    low = np.uint64(2**32 - 1)
    keys = np.sort((rows[:, 0] * np.uint64(ODD) & low) << np.uint64(32) | rows[:, 1])
    return np.column_stack(
        [(keys >> np.uint64(32)) * np.uint64(pow(ODD, -1, 2**32)) & low, keys & low]
    )


def distinct(rows):
    return rows[np.append(True, (rows[1:] != rows[:-1]).any(axis=1))] if len(rows) else rows


def apply(operation, rows, cuts):
    return np.concatenate([rows[:0], *operation(iter(np.split(rows, cuts)))])


def alternate(edges, *, group=by_hash, cuts=()):
    """Nodes, their roots, and after how many rounds of both operations the edges stood still."""
    nodes = np.unique(edges)
    roots = nodes.copy()
    edges = np.sort(edges[edges[:, 0] != edges[:, 1]], axis=1)[:, ::-1]
    edges = distinct(group(edges))
    for rounds in range(200):
        large = apply(large_star, group(np.concatenate([edges, edges[:, ::-1]])), cuts)
        small = distinct(group(apply(small_star, group(large), cuts)))
        if np.array_equal(small, edges):
            # one row (node, root) for every node that is no root
            assert len(np.unique(edges[:, 0])) == len(edges)
            roots[np.searchsorted(nodes, edges[:, 0])] = edges[:, 1]
            return nodes, roots, rounds
        edges = small
    raise AssertionError("no fixed point")


# --- laws -----------------------------------------------------------------------------------------


@given(graphs())
def test_dense_components_equal_networkx(edges):
    assert as_dict(*dense_components(lambda: iter([edges]))) == networkx_labels(edges)


@given(graphs(), cuts)
def test_alternating_stars_equal_networkx(edges, cuts):
    nodes, roots, _ = alternate(edges, cuts=cuts)
    assert as_dict(nodes, roots) == networkx_labels(edges)


@given(graphs(), cuts, st.sampled_from([1, 2, 7, 1 << 20]))
def test_chunks_of_any_size_give_the_same_labels(edges, cuts, size):
    expected = dense_components(lambda: iter([edges]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(components, "CHUNK", size)
        found = dense_components(lambda: iter(np.split(edges, cuts)))
    np.testing.assert_array_equal(found, expected)


@given(graphs(), cuts)
def test_a_node_cut_over_blocks_gives_the_same_rows(edges, cuts):
    both = by_hash(np.concatenate([edges, edges[:, ::-1]]))
    below = both[both[:, 1] < both[:, 0]]
    np.testing.assert_array_equal(apply(large_star, both, cuts), apply(large_star, both, []))
    np.testing.assert_array_equal(apply(small_star, below, cuts), apply(small_star, below, []))


def test_the_stars_of_one_node():
    around = rows_of([(5, 2), (5, 3), (5, 3), (5, 8), (5, 9), (5, 9)])
    assert apply(large_star, around, [2, 5]).tolist() == [[8, 2], [9, 2]]
    assert apply(small_star, around[:3], [1, 2]).tolist() == [[5, 2], [3, 2]]
    assert apply(large_star, rows_of([(1, 4), (1, 6)]), [1]).tolist() == [[4, 1], [6, 1]]


def test_no_edges_no_nodes():
    for chunks in [], [rows_of([])]:
        nodes, roots = dense_components(lambda chunks=chunks: iter(chunks))
        assert nodes.shape == roots.shape == (0,)
        assert [row for block in large_star(iter(chunks)) for row in block] == []


def test_a_chain_that_comes_from_its_far_end_makes_the_deepest_forest(monkeypatch):
    monkeypatch.setattr(components, "CHUNK", 16)
    chain = np.column_stack([np.arange(20_000), np.arange(1, 20_001)]).astype(np.uint64)[::-1]
    _, roots = dense_components(lambda: iter([chain]))
    assert not roots.any()


def chain_of(size):
    return np.column_stack([np.arange(size - 1), np.arange(1, size)])


def tree_of(size):
    child = np.arange(1, size)
    return np.column_stack([child, np.random.default_rng(2).integers(0, child)])


@pytest.mark.parametrize("shape", [chain_of, tree_of])
def test_a_component_of_two_hundred_thousand_shuffled_nodes_has_one_root(shape):
    rng = np.random.default_rng(1)
    names = np.unique(rng.integers(0, 2**32, 201_000, dtype=np.uint64))[:200_000]
    edges = rng.permutation(rng.permutation(names)[shape(len(names))])
    nodes, roots = dense_components(lambda: iter(np.array_split(edges, 7)))
    np.testing.assert_array_equal(nodes, names)
    assert set(roots.tolist()) == {int(names[0])}
    starred, starred_roots, rounds = alternate(
        edges, group=by_hash_packed, cuts=range(20_000, 200_000, 20_000)
    )
    np.testing.assert_array_equal((starred, starred_roots), (nodes, roots))
    assert rounds < 25  # seen: 16 for the chain, 8 for the tree


@pytest.mark.parametrize("shape", [chain_of, tree_of, lambda size: np.arange(size).reshape(-1, 2)])
def test_the_memory_taken_stays_under_the_estimate(shape, monkeypatch):
    monkeypatch.setattr(components, "CHUNK", 1 << 14)
    size = 300_000
    edges = np.random.default_rng(3).permutation(size).astype(np.uint64)[shape(size)]
    tracemalloc.start()
    nodes, _ = dense_components(lambda: iter([edges]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 16 * len(nodes) < peak < estimated_bytes(len(nodes))
