"""Dedup against slow oracles: buckets by dictionary, components by flooding, and the keep rules."""

from collections import defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages import dedup, minhash
from stages.dedup import DedupConfig, PartRef, components
from stages.document import document_schema
from stages.ledger import Store, Unit

CONFIG = DedupConfig(num_bands=3, rows_per_band=2, partitions=4)


def slow_components(edges):
    """Smallest id of the component of each node, by flooding."""
    near = defaultdict(set)
    for a, b in edges:
        near[a].add(b)
        near[b].add(a)
    root = {}
    for start in sorted(near):
        queue = [start] if start not in root else []
        while queue:
            node = queue.pop()
            if node not in root:
                root[node] = start
                queue += near[node]
    return root


ids = st.integers(0, 2**63) | st.integers(0, 20)


@given(st.lists(st.tuples(ids, ids), max_size=60))
def test_components_equal_flooding(edges):
    nodes, roots = components(np.array(edges, np.uint64).reshape(-1, 2))
    assert dict(zip(nodes.tolist(), roots.tolist(), strict=True)) == slow_components(edges)


def test_a_chain_of_a_hundred_thousand_is_one_component():
    chain = np.column_stack([np.arange(100_000), np.arange(1, 100_001)]).astype(np.uint64)
    _, roots = components(chain)
    assert set(roots.tolist()) == {0}


def write_part(folder, unit, rows):
    """A documents part of rows (doc_id, content, band keys, chars)."""
    table = pa.Table.from_pylist(
        [
            {
                "doc_id": doc_id,
                "content_hash": minhash.content_hash(content),
                "band_keys": np.array(keys, "<u8").tobytes(),
                "num_chars": chars,
                "rejected_by": rejected,
            }
            for doc_id, content, keys, chars, rejected in rows
        ],
        schema=document_schema(()),
    )
    pq.write_table(table, folder / f"{unit}.parquet")
    return PartRef(unit, str(folder / f"{unit}.parquet"))


def run_dedup(folder, parts, config):
    """All three phases in this process; the keep table as {doc_id: row}."""
    sort, match, cluster = (Store(str(folder / name)) for name in ("sort", "match", "cluster"))
    for n, part in enumerate(parts):
        dedup.sort_unit(Unit(str(n), "", {"parts": [part]}), config, sort)
    names = [str(n) for n in range(len(parts))]
    edges = []
    for kind, bands in (("exact", 1), ("bands", config.num_bands)):
        for n, (a, b) in enumerate(dedup.cell_ranges(bands, min(config.partitions, bands * 256))):
            task = {"kind": kind, "first": a, "last": b, "sorted": names, "root": sort.root}
            commit = dedup.match_unit(Unit(f"{kind}-{n}", "", task), config, match)
            edges.append(match.uri(commit.outputs[0]["path"]))
    dedup.cluster_unit(Unit("all", "", {"parts": parts, "edges": edges}), config, cluster)
    rows = [r for p in parts for r in pq.read_table(cluster.uri("keep", f"{p.unit}.parquet")).to_pylist()]
    return {row["doc_id"]: row for row in rows}


def slow_clusters(rows, num_bands):
    """Documents with an equal content hash, or an equal key in one band, are linked."""
    buckets = defaultdict(list)
    for doc_id, content, keys, _, rejected in rows:
        if rejected is None:
            buckets["content", content].append(doc_id)
            for band, key in enumerate(keys):
                buckets[band, key].append(doc_id)
    edges = [(members[0], other) for members in buckets.values() for other in members]
    return slow_components(edges)


# few distinct keys, so that buckets are shared; some at the borders of cells
keys = st.sampled_from([0, 1, 2**56 - 1, 2**56, 2**63, 2**64 - 1, 7 << 57])
row = st.tuples(st.sampled_from("abcdefghij"), st.one_of(st.just([]), st.lists(keys, min_size=3, max_size=3)), st.integers(1, 9))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.tuples(row, st.sampled_from([None, None, "rule"])), min_size=1, max_size=25),
    partitions=st.sampled_from([1, 4, 9]),
)
def test_clusters_equal_a_dictionary_of_buckets(tmp_path_factory, rows, partitions):
    folder = tmp_path_factory.mktemp("dedup")
    flat = [(n * 3, content, keys, chars, rejected) for n, ((content, keys, chars), rejected) in enumerate(rows)]
    parts = [write_part(folder, f"{i:06d}", flat[i::3]) for i in range(3)]
    config = DedupConfig(num_bands=3, rows_per_band=2, partitions=partitions)
    table = run_dedup(folder, parts, config)
    oracle = slow_clusters(flat, 3)
    assert {doc_id: row["cluster_id"] for doc_id, row in table.items()} == oracle
    for doc_id, kept in table.items():
        members = [d for d, c in oracle.items() if c == oracle[doc_id]]
        longest = max(r[3] for r in flat if r[0] in members)
        winner = next(r for r in flat if r[0] == kept["kept_id"])
        assert winner[3] == longest
        assert kept["cluster_size"] == len(members)
        assert kept["keep"] == (kept["kept_id"] == doc_id)
        assert sum(table[m]["keep"] for m in members) == 1


@pytest.mark.parametrize("rule, kept", [("longest", 2), ("first", 0)])
def test_keep_rule_decides_which_copy_stays(tmp_path, rule, kept):
    rows = [(0, "x", [1, 2, 3], 10, None), (1, "y", [1, 5, 6], 20, None), (2, "z", [7, 5, 9], 30, None)]
    config = DedupConfig(num_bands=3, rows_per_band=2, partitions=2, keep_rule=rule)
    table = run_dedup(tmp_path, [write_part(tmp_path, "000000", rows)], config)
    assert [d for d, row in table.items() if row["keep"]] == [kept]


def test_keys_of_another_number_of_bands_are_refused(tmp_path):
    part = write_part(tmp_path, "000000", [(0, "x", [1, 2], 10, None)])
    with pytest.raises(ValueError, match="2 band keys a document, expected 3; rerun stage 'extract'"):
        dedup.sort_unit(Unit("0", "", {"parts": [part]}), CONFIG, Store(str(tmp_path / "sort")))
