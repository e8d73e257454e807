"""Dedup against slow oracles: buckets by dictionary, components by flooding, and the keep rules."""

from collections import defaultdict

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.run.dedup_plan import Index
from stages.dedup import keep, match
from stages.dedup import keys as keys_module
from stages.dedup.config import DedupConfig
from stages.dedup.keep import HeavyLoss
from stages.dedup.match import stars
from stages.storage.ledger import Store
from tests.support.dedup_run import Doc, keep_rows, run_dedup
from tests.support.examples import at_most

CONFIG = DedupConfig(num_bands=3, rows_per_band=2)
IN_ROUNDS = {"cluster_memory": 1}


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


def slow_clusters(docs):
    """Documents with an equal content hash, or an equal key in one band, are linked."""
    buckets = defaultdict(list)
    for doc in docs:
        if doc.rejected_by is None:
            buckets["content", doc.content].append(doc.doc_id)
            for band, key in enumerate(doc.keys):
                buckets[band, key].append(doc.doc_id)
    return slow_components((members[0], other) for members in buckets.values() for other in members)


# few distinct keys, so that buckets are shared; some at the borders of cells
keys = st.sampled_from(
    [0, 1, 2**56 - 1, 2**56, 2**63, 2**64 - 1, 7 << 57, *range(5 << 40, (5 << 40) + 9)]
)
some_docs = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.sampled_from("abcdefghij"),
        st.just(()) | st.tuples(keys, keys, keys),
        st.integers(1, 9),
        st.sampled_from([None, None, "rule"]),
    ),
    min_size=1,
    max_size=25,
)


def in_parts(rows):
    """Documents of three inputs; their ids are those of the input and the row."""
    parts = [[], [], []]
    for n, (part, *values) in enumerate(rows):
        parts[part].append(Doc(part << 32 | n * 3, *values))
    return parts


@at_most(15)
@given(rows=some_docs, size=st.sampled_from([1, 4, 100]), rounds=st.sampled_from([{}, IN_ROUNDS]))
def test_clusters_equal_a_dictionary_of_buckets(tmp_path_factory, rows, size, rounds):
    parts = in_parts(rows)
    config = DedupConfig(num_bands=3, rows_per_band=2, documents_per_unit=size, **rounds)
    table = keep_rows(run_dedup(tmp_path_factory.mktemp("dedup"), parts, config))
    docs = [d for part in parts for d in part]
    oracle = slow_clusters(docs)
    assert {doc_id: row["cluster_id"] for doc_id, row in table.items()} == oracle
    for doc_id, row in table.items():
        members = [d for d in docs if oracle.get(d.doc_id) == oracle[doc_id]]
        winner = next(d for d in docs if d.doc_id == row["kept_id"])
        assert winner.num_chars == max(d.num_chars for d in members)
        assert row["cluster_size"] == len(members)
        assert row["keep"] == (row["kept_id"] == doc_id)
        assert sum(table[m.doc_id]["keep"] for m in members) == 1
        same = next(d for d in docs if d.doc_id == doc_id).content == winner.content
        assert row["rule"] == (None if row["keep"] else "dedup.exact" if same else "dedup.near")


@pytest.mark.parametrize(
    "rule, kept", [("longest", 2), ("first", 0), ("best:language_score", 1), ("newest", 1)]
)
def test_keep_rule_decides_which_copy_stays(tmp_path, rule, kept, monkeypatch):
    docs = [Doc(0, "x", (1, 2, 3), 10), Doc(1, "y", (1, 5, 6), 20), Doc(2, "z", (7, 5, 9), 30)]
    extra = {
        0: {"language_score": 0.2},
        1: {"language_score": 0.9, "crawl_date": 10**9},
        2: {"crawl_date": 10**8},
    }
    monkeypatch.setattr(
        Doc, "_asdict", lambda doc: dict(zip(doc._fields, doc, strict=True)) | extra[doc.doc_id]
    )
    config = DedupConfig(num_bands=3, rows_per_band=2, keep_rule=rule)
    table = keep_rows(run_dedup(tmp_path, [docs], config))
    assert [d for d, row in table.items() if row["keep"]] == [kept]


def test_equal_ranks_are_settled_by_the_content_hash_then_the_id(tmp_path):
    docs = [Doc(n, content, (7, 7, 7), 5) for n, content in enumerate("dcbaabcd")]
    table = keep_rows(run_dedup(tmp_path, [docs], CONFIG))
    hashes = {d.doc_id: keep.minhash.content_hash(d.content, d.content) for d in docs}
    assert [d for d, row in table.items() if row["keep"]] == [
        min(hashes, key=lambda d: (hashes[d], d))
    ]


@given(st.lists(st.floats(allow_nan=True) | st.none(), min_size=2, max_size=20))
def test_ranks_order_like_the_values_and_nothing_comes_last(values):
    import pyarrow as pa

    ranks = keep._descending(pa.chunked_array([pa.array(values, pa.float64())])).tolist()
    worth = [-np.inf if v is None or np.isnan(v) else v for v in values]
    for a, rank_a in zip(worth, ranks, strict=True):
        for b, rank_b in zip(worth, ranks, strict=True):
            if a > b:
                assert rank_a < rank_b


@at_most(10)
@given(
    first=some_docs,
    second=some_docs,
    which=st.sampled_from(["all", "kept"]),
    rounds=st.sampled_from([{}, IN_ROUNDS]),
)
def test_a_second_batch_keeps_what_one_run_over_both_keeps(
    tmp_path_factory, first, second, which, rounds
):
    folder = tmp_path_factory.mktemp("batches")
    config = DedupConfig(
        num_bands=3,
        rows_per_band=2,
        keep_rule="first",
        write_index=which,
        documents_per_unit=5,
        **rounds,
    )
    earlier = in_parts(first)
    later = [[d._replace(doc_id=d.doc_id + (3 << 32)) for d in part] for part in in_parts(second)]
    batch = run_dedup(folder / "1", earlier, config)
    index = index_of(batch)
    # the second batch numbers its inputs from 0 again
    alone = [[d._replace(doc_id=d.doc_id - (3 << 32)) for d in part] for part in later]
    table = keep_rows(run_dedup(folder / "2", alone, config, against=[index]))
    kept = {doc_id + (3 << 32) for doc_id, row in table.items() if row["keep"]}
    whole = keep_rows(run_dedup(folder / "both", [*earlier, *later], config))
    expected = {doc_id for doc_id, row in whole.items() if row["keep"] and doc_id >= 3 << 32}
    before = {doc_id: row for doc_id, row in keep_rows(batch).items()}
    if which == "all":
        assert kept == expected
    else:  # a copy of a dropped document that is no copy of the kept one is new to this index
        assert kept >= expected
    for row in table.values():
        assert (row["rule"] == "dedup.earlier") == (row["kept_in"] is not None)
        if row["kept_in"] is not None:
            assert not row["keep"]
            assert row["kept_id"] in before
            assert which == "all" or before[row["kept_id"]]["keep"]


def index_of(phases):
    stores = (phases[name].store.root for name in ("dedup index", "extract", "dedup keep"))
    return Index(*stores, tuple(phases["dedup index"].ordered()))


def test_an_index_holds_each_key_of_a_kept_document_once(tmp_path):
    docs = [Doc(0, "a", (1, 2, 3), 9), Doc(1, "b", (1, 2, 4), 5), Doc(2, "c", (8, 8, 8), 1)]
    phases = run_dedup(
        tmp_path, [docs], DedupConfig(num_bands=3, rows_per_band=2, write_index="kept")
    )
    rows = np.fromfile(phases["dedup index"].store.uri("keys", "00000.rows"), "<u8").reshape(-1, 2)
    assert rows[2:].tolist() == [[1, 0], [8, 2], [2, 0], [8, 2], [3, 0], [8, 2]]
    assert set(rows[:2, 1].tolist()) == {0, 2}


def test_two_indexes_are_told_apart(tmp_path):
    config = DedupConfig(num_bands=3, rows_per_band=2, write_index="kept")
    indexes = []
    for n in range(2):
        phases = run_dedup(tmp_path / str(n), [[Doc(5, f"old-{n}", (n, n, n))]], config)
        indexes.append(index_of(phases))
    new = [Doc(0, "new", (7, 1, 7)), Doc(1, "old-0"), Doc(2, "other", (9, 9, 9))]
    table = keep_rows(run_dedup(tmp_path / "new", [new], config, against=indexes))
    assert [(r["keep"], r["kept_in"], r["kept_id"]) for r in table.values()] == [
        (False, 1, 5),
        (False, 0, 5),
        (True, None, 2),
    ]


def test_keys_made_in_another_way_are_refused(tmp_path):
    phases = run_dedup(tmp_path, [[Doc(0, "x", (1, 2, 3))]], CONFIG)
    other = DedupConfig(num_bands=3, rows_per_band=2, ngram=4)
    with pytest.raises(
        ValueError, match=r"its keys are 'nfkd-words-\d, 5-grams.*expected 'nfkd-words-\d, 4-grams"
    ):
        keys_module.sort_unit(phases["dedup sort"].units[0], other, Store(str(tmp_path / "again")))


def test_keys_that_do_not_say_how_they_were_made_are_refused(tmp_path):
    phases = run_dedup(tmp_path, [[Doc(0, "x", (1, 2, 3))]], CONFIG)
    (part,) = (p for p, _ in phases["extract"].parts())
    pq.write_table(pq.read_table(part.uri).replace_schema_metadata({}), part.uri)
    with pytest.raises(ValueError, match="its keys do not say how they were made, expected"):
        keys_module.sort_unit(phases["dedup sort"].units[0], CONFIG, Store(str(tmp_path / "again")))


def test_keys_of_another_number_of_bands_are_refused(tmp_path):
    phases = run_dedup(tmp_path / "a", [[Doc(0, "x", (1, 2, 3))]], CONFIG)
    (part,) = (p for p, _ in phases["extract"].parts())
    table = pq.read_table(part.uri)
    place = table.schema.get_field_index("band_keys")
    pq.write_table(table.set_column(place, "band_keys", [[b"12345678" * 2]]), part.uri)
    with pytest.raises(
        ValueError, match="2 band keys per document, expected 3; rerun stage 'extract'"
    ):
        keys_module.sort_unit(phases["dedup sort"].units[0], CONFIG, Store(str(tmp_path / "again")))


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 60)), max_size=40),
    st.lists(st.integers(0, 40), max_size=5),
)
def test_stars_do_not_depend_on_where_blocks_end(rows, cuts):
    ordered = np.array(sorted(set(rows)), np.uint64).reshape(-1, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(match, "GIANT", 3)
        whole, in_blocks = {}, {}
        one = np.concatenate([np.empty((0, 2), np.uint64), *stars(iter([ordered]), whole)])
        blocks = np.split(ordered, sorted(min(c, len(ordered)) for c in cuts))
        many = np.concatenate([np.empty((0, 2), np.uint64), *stars(iter(blocks), in_blocks)])
    assert many.tolist() == one.tolist()
    assert in_blocks == whole
    members = defaultdict(list)
    for key, doc_id in ordered.tolist():
        members[key].append(doc_id)
    assert one.tolist() == [[m[0], other] for m in members.values() for other in m[1:]]
    assert list(whole.values()) == [len(m) for m in members.values() if len(m) > 3]


def test_similarities_are_measured_where_asked_for(tmp_path):
    words = [a + b for a in "abcdefghij" for b in "klmnopqrst"]
    docs = [
        Doc(0, "a", (1, 1, 1), 900, text=" ".join(words)),
        Doc(1, "b", (1, 2, 2), 800, text=" ".join(words[:90])),
        Doc(2, "c", (1, 3, 3), 700, text=" ".join(words[60:])),
    ]
    config = DedupConfig(num_bands=3, rows_per_band=2, verify_share=1.0)
    phases = run_dedup(tmp_path / "all", [docs], config)
    # 96 5-grams in the whole, 86 in the first 90 words, 36 in the last 40
    similarities = [keep_rows(phases)[d]["similarity"] for d in range(3)]
    assert similarities == [None, pytest.approx(86 / 96), pytest.approx(36 / 96)]
    assert phases["dedup keep"].commits[0].result.measured == 2
    without = keep_rows(run_dedup(tmp_path / "none", [docs], CONFIG))
    assert [row["similarity"] for row in without.values()] == [None] * 3


def test_who_loses_too_much_is_named(tmp_path):
    copies = [Doc(n, "same", (), 1, host="mirror.example") for n in range(30)]
    others = [Doc(100 + n, f"text {n}", (), 1, host="good.example") for n in range(30)]
    few = [Doc(200 + n, "same", (), 1, host="small.example") for n in range(5)]
    phases = run_dedup(tmp_path, [copies + others + few], CONFIG)
    losses = phases["dedup alarm"].commits[0].result.heavy_losses
    assert losses == (HeavyLoss("host", 30, 29, 0),)


def test_more_files_than_a_worker_s_memory_can_read_at_once_are_refused(tmp_path):
    config = DedupConfig(num_bands=3, rows_per_band=2, documents_per_unit=1, memory=700_000)
    with pytest.raises(
        ValueError,
        match=r"reads 3 files at once, which takes 768,000 bytes; dedup.memory is 700,000. Raise it",
    ):
        run_dedup(tmp_path, [[Doc(n << 32)] for n in range(3)], config)
