"""The supply of global batches: every row once, on any number of ranks, across stops and
generations; and every way to fail.
"""

import gc
import json
import multiprocessing
import os
import threading
import time
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.examples import at_most

pytestmark = pytest.mark.train
torch = pytest.importorskip("torch")

from stages.storage import catalog
from stages.storage.catalog import GenerationError, read_catalog
from stages.storage.digests import bytes_sha256
from tests.support import damages
from tests.support.loading import BOTH, data_config, next_when_published, on_two_ranks
from tests.support.shards import (
    SEQ_LEN,
    publish,
    write_manifest,
)
from trainer.config import DataConfig, SourceConfig
from trainer.data import (
    generations,
    loader,
)
from trainer.data.generations import (
    Manifest,
    RowShape,
    verify_generation,
)
from trainer.data.loader import BatchLoader
from trainer.data.order import epoch_order, import_streaming, order_seed
from trainer.data.rows import RowRef, read_batch


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """sizes → a run with generations of these many rows; the same run when asked again, so nobody
    may change it.
    """

    @lru_cache
    def run_of(*sizes: int) -> str:
        run = tmp_path_factory.mktemp("run")
        for number, rows in enumerate(sizes):
            publish(run, rows, first=1000 * number)
        return str(run)

    return run_of


Row = tuple[str, str, int]


def steps(
    data: DataConfig, *, ranks: int = 1, state: Any = None, limit: int = 1000
) -> tuple[list[list[Row]], Any]:
    """The rows of each global step (run, generation, row), and the state after the last, which all
    ranks must agree on.
    """
    supplies = [
        BatchLoader(data, rank=rank, world_size=ranks, state=state) for rank in range(ranks)
    ]
    first = json.loads(json.dumps(state))["step"] if state else 0
    found = []
    for step in range(first, first + limit):
        given_out = [one.next(step) for one in supplies]
        if not given_out[0]:
            assert given_out == [[]] * ranks
            break
        batches = [batch for batches in given_out for batch in batches]
        found.append(
            [
                (run, *place)
                for batch in batches
                for run, place in zip(batch.sources, batch.row_ids, strict=True)
            ]
        )
    states = [one.state_dict() for one in supplies]
    assert states == states[:1] * ranks
    for one in supplies:
        one.close()
    return found, json.loads(json.dumps(states[0]))


def rows_of(found: list[list[Row]]) -> list[Row]:
    return [row for step in found for row in step]


# --- order ----------------------------------------------------------------------------------------


def manifest(*shard_rows: int) -> Manifest:
    shape = RowShape(SEQ_LEN, "cl100k_base")
    return Manifest("run", "gen-0001", "0" * 64, sum(shard_rows), shape, shard_rows)


@given(
    st.lists(st.integers(0, 9), max_size=6),
    st.integers(0, 2),
    st.integers(1, 70),
    st.integers(0, 9),
)
def test_an_epoch_has_every_row_once(shard_rows, epoch, nodes, seed):
    order = epoch_order(manifest(*shard_rows), epoch, seed=seed, nodes=nodes)
    assert sorted(order.tolist()) == list(range(sum(shard_rows)))


def test_seed_epoch_and_content_each_give_another_order():
    one = manifest(50, 50)
    cases = [(one, 0, 0), (one, 1, 0), (one, 0, 1), (one._replace(sha256="1" * 64), 0, 0)]
    orders = {tuple(epoch_order(m, epoch, seed=seed, nodes=4).tolist()) for m, epoch, seed in cases}
    assert len(orders) == 4
    assert tuple(epoch_order(one._replace(run="elsewhere"), 0, seed=0, nodes=4).tolist()) in orders


def test_the_order_is_that_of_a_streaming_dataset(published):
    run = published(32)
    one = verify_generation(run, read_catalog(run)[0], mode="full")
    dataset = import_streaming().StreamingDataset(
        local=f"{run}/generations/gen-0001",
        batch_size=8,
        shuffle=True,
        shuffle_algo="py1e",
        shuffle_seed=order_seed(one, 0, seed=7),
        num_canonical_nodes=4,
        shuffle_block_size=1 << 18,
    )
    theirs = [int(sample["tokens"][0]) for sample in dataset]
    assert epoch_order(one, 0, seed=7, nodes=4).tolist() == theirs


@pytest.mark.parametrize("compression", [None, "zstd:3"])
def test_a_streaming_dataset_reads_the_same_tokens_and_spans(tmp_path, compression):
    publish(tmp_path, 21, per_shard=8, compression=compression)
    dataset = import_streaming().StreamingDataset(
        local=f"{tmp_path}/generations/gen-0001", batch_size=1, shuffle=False
    )
    theirs = list(dataset)
    ours = read_batch([RowRef(str(tmp_path), "gen-0001", 21, row) for row in range(21)])
    assert len(theirs) == 21
    for sample, tokens, documents in zip(theirs, ours.tokens, ours.documents, strict=True):
        assert sample["tokens"].dtype == sample["spans"].dtype == np.uint32
        assert tokens.tolist() == sample["tokens"].tolist()
        assert torch.bincount(documents[documents >= 0]).tolist() == sample["spans"].tolist()


# --- batches --------------------------------------------------------------------------------------


@BOTH
def test_a_batch_has_tokens_documents_and_where_they_come_from(published, workers):
    run = published(20)
    with BatchLoader(data_config(run, workers=workers), rank=0, world_size=1) as data:
        batches = data.next(0)
    assert [len(batch.row_ids) for batch in batches] == [2, 2, 2, 2]
    for batch in batches:
        assert batch.tokens.dtype == batch.documents.dtype == torch.int64
        assert batch.sources == [run] * 2
        for (name, row), tokens, documents in zip(
            batch.row_ids, batch.tokens, batch.documents, strict=True
        ):
            assert name == "gen-0001"
            assert tokens.tolist() == list(range(row, row + SEQ_LEN))
            spans = [0] * 5 + [1] * 4 * (row % 2)
            assert documents.tolist() == spans + [-1] * (SEQ_LEN - len(spans))


@BOTH
@pytest.mark.parametrize("compression", [None, "zstd:3"])
def test_every_row_comes_once_across_generations(tmp_path, workers, compression):
    for number, rows in enumerate((21, 3, 24)):
        publish(tmp_path, rows, first=1000 * number, compression=compression)
    found, state = steps(data_config(tmp_path, workers=workers))
    expected = {
        (str(tmp_path), f"gen-000{n + 1}", row)
        for n, rows in enumerate((21, 3, 24))
        for row in range(rows)
    }
    assert len(found) == 6
    assert Counter(rows_of(found)) == Counter(expected)
    # a generation ends before the next begins
    assert rows_of(found)[:21] == [r for r in rows_of(found) if r[1] == "gen-0001"]
    assert (state["sources"][0]["generation"], state["sources"][0]["rows"]) == ("gen-0003", 24)


def test_what_fills_no_batch_is_kept_for_the_next_generation(tmp_path):
    publish(tmp_path, 13)
    first, state = steps(data_config(tmp_path))
    assert (len(first), state["sources"][0]["rows"]) == (1, 8)
    publish(tmp_path, 11, first=1000)
    second, _ = steps(data_config(tmp_path), state=state)
    assert len(second) == 2
    assert Counter(row[1:] for row in rows_of(first + second)) == Counter(
        [("gen-0001", row) for row in range(13)] + [("gen-0002", row) for row in range(11)]
    )


def test_the_next_generation_is_taken_up_when_it_is_published_during_training(tmp_path):
    publish(tmp_path, 40)
    with BatchLoader(data_config(tmp_path), rank=0, world_size=1) as data:
        data.next(0)
        publish(tmp_path, 8)
        names = {
            name for step in range(1, 6) for batch in data.next(step) for name, _ in batch.row_ids
        }
        assert (names, data.next(6)) == ({"gen-0001", "gen-0002"}, [])


@BOTH
def test_what_is_published_while_the_last_rows_are_read_ahead_is_taken_up_too(tmp_path, workers):
    publish(tmp_path, 12)
    with BatchLoader(data_config(tmp_path, workers=workers), rank=0, world_size=1) as data:
        first = data.next(0)  # with it the end was met
        publish(tmp_path, 12)
        places = {place for batch in first + data.next(1) + data.next(2) for place in batch.row_ids}
        assert (len(places), data.next(3)) == (24, [])


def supersede(run, name, *earlier):
    """As if the last generation had been published by a rerun."""
    folder = Path(run)
    manifest = json.loads((folder / "generations" / name / "manifest.json").read_text())
    text = json.dumps(manifest | {"supersedes": [*earlier]})
    (folder / "generations" / name / "manifest.json").write_text(text)
    entries = read_catalog(str(run))
    entries[-1] |= {"supersedes": [*earlier], "manifest_sha256": bytes_sha256(text.encode())}
    new = folder / "catalog.jsonl.new"
    new.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    new.replace(folder / "catalog.jsonl")


def test_the_newest_generation_of_each_lineage_is_read_or_those_named(tmp_path):
    for rows in (8, 16, 8):
        publish(tmp_path, rows)
    supersede(tmp_path, "gen-0003", "gen-0001")
    run, names = str(tmp_path), ("gen-0001", "gen-0003")
    found, _ = steps(data_config(run))
    assert {name for step in found for _, name, _ in step} == {"gen-0002", "gen-0003"}
    assert len(found) == 3
    for chosen in (("gen-0001",), names):
        found, _ = steps(data_config(SourceConfig(run, generations=chosen)))
        assert {name for step in found for _, name, _ in step} == {*chosen}


def test_a_training_stays_with_the_generation_that_it_has_begun(tmp_path, caplog):
    """A rerun that supersedes it neither stops the training nor comes on top of it."""
    publish(tmp_path, 24)
    config = data_config(str(tmp_path))
    with BatchLoader(config, rank=0, world_size=1) as data:
        first = [place for batch in data.next(0) for place in batch.row_ids]
        publish(tmp_path, 24, first=1000)
        supersede(tmp_path, "gen-0002", "gen-0001")
        publish(tmp_path, 8, first=2000)  # a batch: it adds
        state = data.state_dict()
        rest = [p for step in (1, 2, 3) for batch in data.next(step) for p in batch.row_ids]
        assert data.next(4) == []
    assert Counter(name for name, _ in first + rest) == {"gen-0001": 24, "gen-0003": 8}
    assert caplog.text.count("gen-0002 supersedes gen-0001, which this training has begun") == 1
    with BatchLoader(config, rank=0, world_size=1, state=state) as data:
        again = [p for step in (1, 2, 3) for batch in data.next(step) for p in batch.row_ids]
        assert again == rest and data.begun() == {str(tmp_path): ["gen-0001", "gen-0003"]}


def test_repeating_gives_every_row_once_an_epoch_in_another_order(published):
    run = published(16, 8)
    found, state = steps(data_config(run, at_end="repeat", max_epochs=3))
    assert len(found) == 9
    epochs = [rows_of(found[i : i + 3]) for i in (0, 3, 6)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 24 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert state["sources"][0]["epoch"] == 2


def test_named_generations_are_read_in_the_order_named(published):
    found, _ = steps(
        data_config(SourceConfig(published(8, 16, 8), generations=("gen-0003", "gen-0001")))
    )
    assert [{name for _, name, _ in step} for step in found] == [{"gen-0003"}, {"gen-0001"}]


def test_weights_hit_their_shares_in_every_batch(published):
    runs = [published(64), published(33, 40), published(50)]
    sources = [SourceConfig(run, weight) for run, weight in zip(runs, (0.5, 0.3, 0.2), strict=True)]
    found, _ = steps(data_config(*sources, global_batch_rows=10))
    counts = [Counter(run for run, _, _ in step) for step in found]
    assert [[count[run] for run in runs] for count in counts] == [
        [5, 3, 2]
    ] * 12  # until the first source has no 5 left
    assert len(set(rows_of(found))) == 120


# --- any number of ranks, any stop ----------------------------------------------------------------

SIZES = st.lists(st.sampled_from([1, 5, 8, 13, 30]), min_size=1, max_size=3)


@at_most(25)
@given(SIZES, st.sampled_from([4, 8, 12]), st.integers(0, 3))
def test_global_batches_are_the_same_on_any_number_of_ranks(published, sizes, rows, seed):
    data = data_config(
        published(*sizes), global_batch_rows=rows, micro_batch_rows=1, shuffle_seed=seed
    )
    alone = steps(data)
    assert [steps(data, ranks=ranks) for ranks in (2, 4)] == [alone, alone]


@at_most(40)
@given(st.data())
def test_a_run_stopped_at_any_step_goes_on_as_if_it_had_not_been(published, data):
    sizes, others = data.draw(SIZES), data.draw(SIZES)
    sources = [
        published(*sizes),
        SourceConfig(published(*others), weight=data.draw(st.sampled_from([0.2, 1.0, 3.0]))),
    ]
    options = data.draw(st.sampled_from([{}, {"at_end": "repeat", "max_epochs": 3}]))
    setting = data_config(*sources, global_batch_rows=data.draw(st.sampled_from([4, 8])), **options)
    whole, end = steps(setting, limit=12)
    stop = data.draw(st.integers(0, len(whole)))
    before, after = data.draw(st.sampled_from([(1, 1), (1, 2), (2, 1)]))
    first, state = steps(setting, ranks=before, limit=stop)
    second, last = steps(setting, ranks=after, state=state, limit=12 - stop)
    assert (first + second, last) == (whole, end)


@BOTH
def test_the_state_is_that_of_the_batch_handed_out_not_of_what_is_read_ahead(published, workers):
    data = data_config(published(30), workers=workers)
    with BatchLoader(data, rank=0, world_size=1) as one:
        assert (one.state_dict()["step"], one.state_dict()["sources"][0]["rows"]) == (0, 0)
        for step in range(3):
            one.next(step)
            state = one.state_dict()
            assert (state["step"], state["sources"][0]["rows"]) == (step + 1, 8 * (step + 1))


def test_steps_come_in_order_and_a_closed_supply_gives_none(published):
    one = BatchLoader(data_config(published(30)), rank=0, world_size=1)
    one.next(0)
    with pytest.raises(ValueError, match="asked for step 2, but the loader stands at 1"):
        one.next(2)
    one.close()
    with pytest.raises(ValueError, match="this loader is closed"):
        one.next(1)


def test_new_weights_hold_from_where_they_were_changed(published):
    runs = published(64), published(33, 40)
    _, state = steps(data_config(SourceConfig(runs[0], 3.0), SourceConfig(runs[1], 1.0)), limit=5)
    found, _ = steps(data_config(*runs), state=state, limit=2)
    assert [Counter(run for run, _, _ in step)[runs[0]] for step in found] == [4, 4]


# --- what does not fit is refused -----------------------------------------------------------------


@pytest.mark.parametrize(
    "options, ranks, message",
    [
        ({}, 3, "run with 1, 2, 4 ranks"),
        ({"global_batch_rows": 7}, 1, "positive multiple of micro_batch_rows=2"),
        ({"sources": ()}, 1, "at least one source"),
    ],
)
def test_a_config_that_cannot_work_says_what_would(published, options, ranks, message):
    with pytest.raises(ValueError, match=message):
        BatchLoader(
            DataConfig(**{**vars(data_config(published(8))), **options}), rank=0, world_size=ranks
        )


def test_a_run_without_generations_is_a_fault(tmp_path):
    with pytest.raises(
        GenerationError,
        match=r"expected generations in catalog.jsonl, found none; run the pipeline",
    ):
        BatchLoader(data_config(tmp_path), rank=0, world_size=1)


def test_a_generation_that_is_not_published_is_a_fault(published):
    with pytest.raises(
        GenerationError,
        match=r"gen-0007: catalog.jsonl: expected its entry, found gen-0001; correct",
    ):
        BatchLoader(
            data_config(SourceConfig(published(8), generations=("gen-0001", "gen-0007"))),
            rank=0,
            world_size=1,
        )


@pytest.mark.parametrize("key", ["shuffle_seed", "canonical_nodes"])
def test_a_state_of_another_order_is_refused(published, key):
    data = data_config(published(30))
    _, state = steps(data, limit=1)
    with pytest.raises(ValueError, match=f"the checkpoint's order has {key}="):
        BatchLoader(DataConfig(**{**vars(data), key: 11}), rank=0, world_size=1, state=state)


def test_an_order_that_the_installed_versions_draw_differently_is_refused(published):
    data = data_config(published(30))
    _, state = steps(data, limit=1)
    state["sources"][0]["order"] = "0" * 16
    with pytest.raises(
        GenerationError, match=r"order of rows: expected 0000.*resume with the versions"
    ):
        BatchLoader(data, rank=0, world_size=1, state=state)


def test_a_state_of_other_sources_is_refused(published):
    data = data_config(published(30))
    _, state = steps(data, limit=1)
    with pytest.raises(ValueError, match="the checkpoint has 1 sources, the config 2"):
        BatchLoader(data_config(published(30), published(8)), rank=0, world_size=1, state=state)


@pytest.mark.parametrize("changed", ["gen-0001", "gen-0002"])
def test_a_generation_changed_under_a_checkpoint_refuses(tmp_path, changed):
    publish(tmp_path, 8)
    publish(tmp_path, 24)
    _, state = steps(data_config(tmp_path), limit=2)
    path = tmp_path / "generations" / changed / "part-00000/shard.00000.mds"
    path.write_bytes(path.read_bytes()[:-4] + b"new!")
    write_manifest(tmp_path, changed)
    with pytest.raises(
        GenerationError,
        match=f"{changed}: manifest_sha256 in catalog.jsonl: .*as this run has read it",
    ):
        BatchLoader(data_config(tmp_path), rank=0, world_size=1, state=state)


def test_a_generation_of_another_sequence_length_is_refused(tmp_path):
    publish(tmp_path, 8)
    _, state = steps(data_config(tmp_path))
    publish(tmp_path, 8, seq_len=32)
    for saved in (None, state):
        with pytest.raises(
            GenerationError,
            match=r"gen-0002: .*seq_len 16, as in this run so far, found seq_len 32",
        ):
            BatchLoader(data_config(tmp_path), rank=0, world_size=1, state=saved)


@BOTH
@pytest.mark.parametrize("damage, message", damages.FULL.items())
def test_damage_is_found_before_the_first_step(tmp_path, workers, damage, message):
    publish(tmp_path, 20)
    damage(tmp_path)
    with pytest.raises(GenerationError, match=message):
        BatchLoader(data_config(tmp_path, workers=workers), rank=0, world_size=1)


@BOTH
@pytest.mark.parametrize(
    "damage", [damages.missing_shard, damages.short_shard, damages.grown_index]
)
def test_damage_done_during_training_raises_with_the_row_that_could_not_be_read(
    tmp_path, workers, damage
):
    publish(tmp_path, 20)
    with BatchLoader(data_config(tmp_path, workers=workers), rank=0, world_size=1) as data:
        damage(tmp_path)
        with pytest.raises(
            GenerationError,
            match=r"generation gen-0001: .*expected row \d+, found .*; restore the generation",
        ):
            [data.next(step) for step in range(2)]


def test_spans_beyond_the_row_are_a_fault(tmp_path):
    publish(tmp_path, 8)
    shard = tmp_path / "generations/gen-0001/part-00000/shard.00000.mds"
    shard.write_bytes(shard.read_bytes().replace(b"\5\0\0\0\4\0\0\0", b"\5\0\0\0\xff\0\0\0"))
    with pytest.raises(
        GenerationError, match="expected spans of row 1 within 16 tokens, found 260 tokens"
    ):
        read_batch([RowRef(str(tmp_path), "gen-0001", 8, 1)])


@BOTH
def test_the_watchdog_names_what_it_waited_for(tmp_path, workers):
    publish(tmp_path, 64)
    with BatchLoader(
        data_config(tmp_path, workers=workers, batch_timeout_seconds=1.0), rank=0, world_size=1
    ) as data:
        for shard in tmp_path.glob("generations/*/*/*.mds"):
            shard.unlink()
            os.mkfifo(shard)  # opening it hangs, like a dead disk
        with pytest.raises(
            GenerationError,
            match=r"rows gen-0001:\d+, gen-0001:\d+: expected a batch within 1 s, found",
        ):
            data.next(0)


def test_a_dead_worker_is_named_with_what_it_was_asked_for(tmp_path, monkeypatch):
    publish(tmp_path, 64)
    # the workers are forked: they see it
    monkeypatch.setattr("trainer.data.rows.read_batch", lambda places: os._exit(1))
    with (
        BatchLoader(data_config(tmp_path, workers=2), rank=0, world_size=1) as data,
        pytest.raises(
            GenerationError,
            match=r"rows gen-0001:\d+.*found DataLoader worker .* exited unexpectedly",
        ),
    ):
        data.next(0)


# --- waiting --------------------------------------------------------------------------------------


@BOTH
def test_waiting_sees_a_generation_published_later(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(loader, "POLL_SECONDS", 0.01)
    with BatchLoader(
        data_config(tmp_path, at_end="wait", workers=workers), rank=0, world_size=1
    ) as data:
        threading.Timer(0.2, publish, (tmp_path, 12)).start()
        first = next_when_published(data, 0)
        threading.Timer(0.2, publish, (tmp_path, 12)).start()
        rest = next_when_published(data, 1) + next_when_published(data, 2)
    assert len({place for batch in first + rest for place in batch.row_ids}) == 24


def test_waiting_ends_and_loses_no_row(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "POLL_SECONDS", 0.01)
    publish(tmp_path, 12)
    with BatchLoader(
        data_config(tmp_path, at_end="wait", wait_seconds=0.05), rank=0, world_size=1
    ) as data:
        first = next_when_published(data, 0)
        assert next_when_published(data, 1) == []
        assert data.state_dict()["sources"][0]["rows"] == 8
        publish(tmp_path, 4)
        assert len({place for batch in first + data.next(1) for place in batch.row_ids}) == 16


@pytest.mark.parametrize("at_end", ["stop", "repeat"])
def test_who_is_not_told_to_wait_does_not(published, at_end):
    with BatchLoader(data_config(published(8), at_end=at_end), rank=0, world_size=1) as data:
        assert data.next(0) and not data.next(1) and not data.should_wait()


# --- what is told, and what is left behind --------------------------------------------------------


def test_what_a_step_took_is_told_so_that_its_rows_can_be_found_again(published):
    runs = published(64), published(9, 40)
    data = data_config(*runs)
    with BatchLoader(data, rank=0, world_size=1) as supplied:
        for step in range(5):
            given = {
                (run, *place)
                for batch in supplied.next(step)
                for run, place in zip(batch.sources, batch.row_ids, strict=True)
            }
            told = set()
            for run, drawn in supplied.row_ranges.items():
                for name, epoch, start, stop in drawn:
                    [entry] = [entry for entry in read_catalog(run) if entry["name"] == name]
                    manifest = verify_generation(run, entry, mode="quick")
                    rows = epoch_order(
                        manifest, epoch, seed=data.shuffle_seed, nodes=data.canonical_nodes
                    )[start:stop]
                    told |= {(run, name, row) for row in rows.tolist()}
            assert given == told and len(told) == 8


def shared_memory() -> list[str]:
    return [
        line for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm/" in line
    ]


@BOTH
def test_reading_leaves_no_shared_memory_no_worker_and_no_file_behind(published, workers):
    run = published(30)
    before, files = shared_memory(), sorted(Path(run).rglob("*"))
    with BatchLoader(data_config(run, workers=workers), rank=0, world_size=1) as data:
        batches = data.next(0)
        assert len(multiprocessing.active_children()) == workers
    del batches

    def left() -> tuple[set[str], list[Any]]:
        return set(shared_memory()) - set(before), multiprocessing.active_children()

    until = time.monotonic() + 600
    while left() != (set(), []) and time.monotonic() < until:
        # the loader's queues lie in reference cycles, their feeder threads end some time later, and
        # a worker that is slow to end is only signaled
        gc.collect()
        time.sleep(0.1)
    assert left() == (set(), []) and sorted(Path(run).rglob("*")) == files


@BOTH
def test_the_random_state_of_the_run_is_left_alone(published, workers):
    before = torch.get_rng_state()
    steps(data_config(published(30), workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


# --- several processes ----------------------------------------------------------------------------


def test_two_processes_share_the_batches_of_one_and_raise_what_only_rank_0_can_see(
    published, tmp_path
):
    publish(tmp_path, 24)
    damages.flipped_byte(tmp_path)
    whole, broken = published(24), str(tmp_path)
    found = on_two_ranks(tmp_path, broken, whole)
    assert "sha256 by manifest" in found[0, broken]
    assert found[1, broken] == found[0, broken]
    together = [
        [place for batch in a + b for place in batch]
        for a, b in zip(found[0, whole], found[1, whole], strict=True)
    ]
    alone, _ = steps(data_config(whole))
    assert together == [[row[1:] for row in step] for step in alone]


def test_a_fault_that_only_another_rank_sees_is_raised_on_rank_0(published, monkeypatch):
    missing = GenerationError("generation gen-0001: a shard is not on this node's disk")
    monkeypatch.setattr("trainer.ranks.gather_objects", lambda own: [own, (None, missing)])
    with pytest.raises(GenerationError, match="not on this node's disk"):
        BatchLoader(data_config(published(24)), rank=0, world_size=2)


def test_a_generation_is_hashed_once_in_a_process(published, monkeypatch):
    generations._hashed.clear()
    hashed = []
    monkeypatch.setattr(
        catalog,
        "file_sha256",
        lambda path, real=catalog.file_sha256: hashed.append(path) or real(path),
    )
    run = published(24)
    for _ in range(2):
        BatchLoader(data_config(run), rank=0, world_size=1).close()
    assert len(hashed) == len(set(hashed)) == 3


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_ranks_hash_each_shard_once_between_them(published, monkeypatch, ranks):
    generations._hashed.clear()
    hashed, run = Counter(), published(24)
    monkeypatch.setattr(
        catalog,
        "file_sha256",
        lambda path, real=catalog.file_sha256: hashed.update([str(path)]) or real(path),
    )
    [entry] = catalog.read_catalog(run)
    for rank in range(ranks):
        share = generations.Share(rank, ranks)
        generations.verify_generation(run, entry, mode="full", share=share)
    assert len(hashed) == 3 and set(hashed.values()) == {1}


@given(*[st.sampled_from([None, 1, 2])] * 2)
def test_shapes_differ_where_both_are_known(ours, theirs):
    ours, theirs = (RowShape(seq_len=n, tokenizer=n) for n in (ours, theirs))
    expected = None not in (ours.seq_len, theirs.seq_len) and ours.seq_len != theirs.seq_len
    assert ours.differences(theirs) == (["seq_len", "tokenizer"] if expected else [])
    assert ours.completed(theirs).seq_len == (ours.seq_len or theirs.seq_len)
    # with the same digest, a tokenizer of another name is the same
    same = [s._replace(tokenizer_sha256="0") for s in (ours, theirs)]
    assert same[0].differences(same[1]) == (["seq_len"] if expected else [])
