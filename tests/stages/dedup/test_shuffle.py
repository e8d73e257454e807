"""The shuffle against sorting everything at once."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.dedup import shuffle
from stages.dedup.shuffle import Layout, Source, merge, mix, unmix, whole_groups
from stages.storage.ledger import Commit, Store

U64 = st.integers(0, 2**64 - 1)
# few distinct keys, some at the borders of cells
KEYS = st.sampled_from([0, 1, 2**56 - 1, 2**56, 2**63, 2**64 - 1, 7 << 57]) | U64


def as_rows(rows, width=2):
    return np.array(rows, np.uint64).reshape(-1, width)


def write_files(folder, files, layout):
    """Sorted files of lanes of rows; a transposed shuffle over them."""
    store = Store(str(folder))
    for n, lanes in enumerate(files):
        shuffle.write(
            store,
            "keys",
            [as_rows(rows, layout.width) for rows in lanes],
            layout,
            commit=Commit(f"f{n}", ""),
        )
    return store, [Source(store.uri("keys", f"f{n}")) for n in range(len(files))]


def transposed(store, sources, layout, per_lane=1):
    planned = shuffle.plan(store, sources, layout, per_lane=per_lane, identity="")
    shuffle.transpose(planned)
    return planned


@given(st.lists(U64, max_size=50))
def test_unmix_is_the_inverse_of_mix(ids):
    ids = np.array(ids, np.uint64)
    assert unmix(mix(ids)).tolist() == ids.tolist()


@given(st.lists(st.tuples(KEYS, st.integers(0, 3), st.integers(0, 3)), max_size=40))
def test_sort_rows_is_sorting(rows):
    assert shuffle.sort_rows(as_rows(rows, 3)).tolist() == sorted(map(list, rows))


@given(
    files=st.lists(
        st.lists(st.lists(st.tuples(KEYS, st.integers(0, 9)), max_size=12), min_size=3, max_size=3),
        min_size=1,
        max_size=5,
    ),
    per_lane=st.sampled_from([1, 2, 8]),
    at_once=st.integers(1, 12),
)
def test_merged_partitions_are_the_sorted_rows_of_each_lane(
    tmp_path_factory, files, per_lane, at_once
):
    layout = Layout(width=2, lanes=3, cells=8)
    store, sources = write_files(tmp_path_factory.mktemp("shuffle"), files, layout)
    planned = transposed(store, sources, layout, per_lane)
    with pytest.MonkeyPatch.context() as patch:
        # so that a file's range takes several reads
        patch.setattr(shuffle, "MIN_READ", 16 * at_once)
        found = [list(merge(planned.uri, p, memory=0)) for p in range(planned.partitions)]
    for lane in range(3):
        blocks = [b for blocks in found[lane * per_lane : (lane + 1) * per_lane] for b in blocks]
        expected = sorted([list(row) for lanes in files for row in lanes[lane]])
        assert [row for b in blocks for row in b.tolist()] == expected


def test_a_reader_holds_no_more_than_its_buffers(tmp_path, monkeypatch):
    monkeypatch.setattr(shuffle, "MIN_READ", 1600)
    layout = Layout(width=2, lanes=1, cells=1)
    # one key, far more rows than the buffers
    giant = [[(7, n) for n in range(k, 30_000, 3)] for k in range(3)]
    store, sources = write_files(tmp_path, [[rows] for rows in giant], layout)
    blocks = list(merge(transposed(store, sources, layout).uri, 0, memory=4800))
    assert max(len(b) for b in blocks) <= 3 * 100
    assert np.concatenate(blocks)[:, 1].tolist() == list(range(30_000))


def test_a_source_s_tag_is_set_in_the_second_column(tmp_path):
    layout = Layout(width=2, lanes=1, cells=2)
    store, (a, b) = write_files(tmp_path, [[[(1, 5), (2, 6)]], [[(1, 3)]]], layout)
    found = transposed(store, [a, b._replace(tag=1 << 63)], layout, 2)
    assert np.concatenate(list(merge(found.uri, 0, memory=0))).tolist() == [
        [1, 5],
        [1, 3 | 1 << 63],
        [2, 6],
    ]


@given(
    st.lists(st.tuples(st.integers(0, 4), U64), max_size=40),
    st.lists(st.integers(0, 40), max_size=6),
)
def test_whole_groups_never_end_within_a_key(rows, cuts):
    ordered = shuffle.sort_rows(as_rows(rows))
    blocks = np.split(ordered, sorted(min(c, len(rows)) for c in cuts))
    found = list(whole_groups(iter(blocks)))
    assert [row for b in found for row in b.tolist()] == ordered.tolist()
    keys = [set(b[:, 0].tolist()) for b in found]
    assert sum(map(len, keys)) == len(set().union(*keys))


@pytest.mark.parametrize(
    "rows, files, expected", [(0, 1, 1), (10**9, 100, 63), (10**11, 12_500, 2000)]
)
def test_partitions_are_as_large_as_memory_allows_and_a_range_is_worth_a_request(
    rows, files, expected
):
    layout = Layout(width=2, lanes=1, cells=4096)
    assert shuffle.partitions_per_lane(
        rows, layout, files=files, partition_bytes=256_000_000
    ) == min(4096, expected)


def test_a_file_of_another_grid_is_refused(tmp_path):
    store, sources = write_files(tmp_path, [[[(1, 1)]]], Layout(width=2, lanes=1, cells=2))
    with pytest.raises(
        ValueError, match=r"f0.cells: 2 cells, expected 1 x 4; it was written with another layout"
    ):
        transposed(store, sources, Layout(width=2, lanes=1, cells=4))


def test_a_file_that_was_cut_short_is_refused(tmp_path):
    layout = Layout(width=2, lanes=1, cells=1)
    store, sources = write_files(tmp_path, [[[(1, 1), (2, 2)]]], layout)
    found = transposed(store, sources, layout)
    (tmp_path / "keys" / "f0.rows").write_bytes(b"\0" * 24)
    with pytest.raises(ValueError, match=r"f0.rows: 24 bytes at 0, expected 32; it is truncated"):
        list(merge(found.uri, 0, memory=1))
