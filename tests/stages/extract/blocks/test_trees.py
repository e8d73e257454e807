"""Trees evaluated all at once give what a walk from the root to a leaf gives."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.extract.blocks.trees import MAX_LEAVES, Trees

FEATURES = 4
FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
# thresholds are met exactly, and some are no float32
BOUNDS = st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from(
    [0.0, -0.0, 1.0, 0.1, 1e-35, 1.0000000180025095e-35, -1e-50, 1e300, -1e300]
)
VALUES = FLOAT32 | st.sampled_from([0.0, -0.0, 1.0]) | BOUNDS.map(lambda x: float(np.float32(x)) if abs(x) < 3e38 else 0.0)  # fmt: skip


@st.composite
def trees(draw, leaves=None):
    """The structure of a tree in LightGBM's dump."""
    leaves = draw(st.integers(1, MAX_LEAVES)) if leaves is None else leaves
    if leaves == 1:
        return {"leaf_value": draw(st.floats(-5, 5))}
    left = draw(st.integers(1, leaves - 1))
    return {
        "decision_type": "<=",
        "split_feature": draw(st.integers(0, FEATURES - 1)),
        "threshold": draw(BOUNDS),
        "left_child": draw(trees(left)),
        "right_child": draw(trees(leaves - left)),
    }


def dump_of(structures):
    return {"tree_info": [{"tree_structure": structure} for structure in structures]}


def leaf_of(node, row):
    while "leaf_value" not in node:
        goes_left = float(row[node["split_feature"]]) <= node["threshold"]
        node = node["left_child" if goes_left else "right_child"]
    return node["leaf_value"]


@given(
    st.lists(trees(), min_size=1, max_size=4),
    st.lists(st.lists(VALUES, min_size=FEATURES, max_size=FEATURES), max_size=8),
)
def test_probabilities_are_those_of_a_walk_along_each_tree(structures, rows):
    columns = np.array(rows, np.float32).reshape(-1, FEATURES).T
    expected = [
        1 / (1 + math.exp(-sum(leaf_of(tree, row) for tree in structures))) for row in columns.T
    ]
    found = Trees.of_lightgbm(dump_of(structures)).probabilities(columns)
    assert found == pytest.approx(expected, rel=1e-12, abs=0)


@pytest.mark.parametrize("rows", [0, 1, 127, 128, 129, 1000])
def test_rows_do_not_depend_on_those_around_them(rows):
    rng = np.random.default_rng(rows)
    tree = {"leaf_value": 0.0}
    for i in range(MAX_LEAVES - 1):
        tree = {
            "decision_type": "<=",
            "split_feature": i % FEATURES,
            "threshold": float(rng.normal()),
            "left_child": {"leaf_value": float(i)} if i % 2 else tree,
            "right_child": tree if i % 2 else {"leaf_value": float(i)},
        }
    model = Trees.of_lightgbm(dump_of([tree, {"leaf_value": -9.0}]))
    columns = rng.normal(size=(FEATURES, rows)).astype(np.float32)
    one_by_one = [model.probabilities(columns[:, [i]])[0] for i in range(rows)]
    assert model.probabilities(columns).tolist() == one_by_one


def chain(leaves):
    return {
        "decision_type": "<=",
        "split_feature": 0,
        "threshold": 0.0,
        "left_child": {"leaf_value": 1.0},
        "right_child": chain(leaves - 1) if leaves > 2 else {"leaf_value": 0.0},
    }


@pytest.mark.parametrize(
    "structure, message",
    [
        (chain(MAX_LEAVES + 1), "more than 32 leaves"),
        (chain(2) | {"decision_type": "=="}, "the condition '=='; want '<='"),
    ],
)
def test_other_trees_are_refused(structure, message):
    with pytest.raises(ValueError, match=message):
        Trees.of_lightgbm(dump_of([structure]))


# in a process of its own: one that has loaded LightGBM and forks may hang
TRAINING = """
import json, sys
import numpy as np
try:
    import lightgbm
except (ImportError, OSError) as error:
    sys.exit(f"no LightGBM: {error}")
rng = np.random.default_rng(1)
rows = rng.normal(size=(600, 4)).astype(np.float32)
rows[:, 1] = np.round(rows[:, 1])
rows[rows < -1] = 0
labels = (rows[:, 0] * rows[:, 1] + rng.normal(size=600) / 3 > 0).astype(float)
options = dict(objective="cross_entropy", num_leaves=31, min_data_in_leaf=3, num_threads=1, verbose=-1)
model = lightgbm.train(options, lightgbm.Dataset(rows, labels), 20)
print(json.dumps([model.dump_model(), rows.tolist(), model.predict(rows).tolist()]))
"""


def test_probabilities_are_those_of_lightgbm():
    done = subprocess.run([sys.executable, "-c", TRAINING], capture_output=True, text=True)
    if "no LightGBM" in done.stderr:
        pytest.skip(done.stderr)
    dump, rows, predicted = json.loads(done.stdout)
    found = Trees.of_lightgbm(dump).probabilities(np.array(rows, np.float32).T)
    assert np.abs(found - predicted).max() < 1e-12


@pytest.mark.parametrize("bound", [0.1, -0.1, 1e-35, 0.0, -0.0, -1e-50, 1e300, -1e300])
def test_values_on_both_sides_of_a_bound_go_to_their_sides(bound):
    near = np.float32(max(min(bound, 3e38), -3e38))
    values = [np.nextafter(near, np.float32(x)) for x in (-np.inf, np.inf)] + [near]
    found = Trees.of_lightgbm(dump_of([chain(2) | {"threshold": bound}]))
    expected = [1 / (1 + math.exp(-float(float(x) <= bound))) for x in values]
    assert found.probabilities(np.array([values], np.float32)) == pytest.approx(expected)
