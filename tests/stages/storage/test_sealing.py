"""Sealed commits: whatever is committed, withdrawn, sealed and killed in between, reading gives what
one file per unit would give.
"""

import dataclasses
import uuid
from collections import Counter
from contextlib import contextmanager, suppress

import fsspec
import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic.dataclasses import dataclass

from stages.storage import ledger
from stages.storage.commits import input_key, unit_order
from stages.storage.files import names_in
from stages.storage.ledger import Commit, Output, Store

UNITS = ("000009", "000010", "999999", "1000000")


class Killed(Exception):
    pass


@dataclass(frozen=True)
class Result:
    bytes_in: int = 0
    damage: str = ""


def commit(unit, fingerprint, seconds=0.0):
    """What a deterministic unit writes of an input: only the time differs."""
    rows = int(unit) % 7
    output = Output(f"parts/{unit}.parquet", 1, f"{unit}-{fingerprint}")
    return Commit(
        unit,
        fingerprint,
        rows_in=rows,
        counts={"kept": rows, fingerprint: 1},
        result=Result(rows, fingerprint),
        outputs=[output],
        seconds=seconds,
    )


@contextmanager
def killed_after(steps):
    """Segments of two commits. Before the step after so many, a write or the removal of a file, everything ends."""
    left = [steps]

    def stepwise(call):
        def step(*args, **options):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return call(*args, **options)

        return step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger, "SEGMENT", 2)
        for name in ("pipe_file", "rm_file"):
            patch.setattr(MemoryFileSystem, name, stepwise(getattr(MemoryFileSystem, name)))
        yield


def state(store):
    """What is committed, read in every way there is."""
    commits = store.commits()
    read = {c.unit: c for c in commits}
    assert list(read) == sorted(read, key=int) and len(commits) == len(read)
    assert all(store.commit_of(unit) == read.get(unit) for unit in UNITS)
    assert sorted(commits.keys().to_pylist()) == sorted(
        input_key(c.unit, c.fingerprint) for c in read.values()
    )
    assert commits.counts() == sum((Counter(c.counts) for c in read.values()), Counter())
    sums = commits.table("rows_in", "result.bytes_in")
    assert sum(sums["rows_in"].to_pylist()) == sum(c.rows_in for c in read.values())
    assert sorted(sums["result.bytes_in"].to_pylist()) == sorted(
        c.result.bytes_in for c in read.values()
    )
    assert all(
        dataclasses.replace(c, seconds=0.0) == commit(u, c.fingerprint) for u, c in read.items()
    )
    return {unit: c.fingerprint for unit, c in read.items()}


def do_unit(store, before, unit, fingerprint):
    """Commit a unit as a run does: withdrawn first if there is a commit of another input."""
    if before.get(unit, fingerprint) != fingerprint:
        store.withdraw_all([unit])
    store.commit(commit(unit, fingerprint, seconds=1.0))


steps = st.lists(
    st.tuples(
        st.sampled_from(["commit", "withdraw", "seal", "seal_loose"]),
        st.sets(st.sampled_from(UNITS), min_size=1),
        st.sampled_from("ab"),
        st.none() | st.integers(0, 4),
    ),
    max_size=12,
)


@settings(max_examples=60)
@given(steps)
def test_any_interleaving_reads_as_one_file_per_unit(taken):
    fsspec.filesystem("memory").store.clear()
    store, expected = Store(f"memory://{uuid.uuid4().hex}", Result), {}
    for what, units, fingerprint, kill in taken:
        after = dict(expected)
        if what == "commit":
            after |= dict.fromkeys(units, fingerprint)
        elif what == "withdraw":
            after = {u: f for u, f in after.items() if u not in units}
        with suppress(Killed), killed_after(-1 if kill is None else kill):
            if what == "commit":
                for unit in units:
                    do_unit(store, expected, unit, fingerprint)
            elif what == "withdraw":
                store.withdraw_all(units)
            elif what == "seal":
                loose = store.commits().loose
                store.seal([loose[unit] for unit in units if unit in loose])
            else:
                store.seal_loose()
        actual = state(store)
        if kill is None:
            assert actual == after
        for unit in UNITS:  # all of a unit or nothing: never what was there before
            assert actual.get(unit) in (expected.get(unit), after.get(unit), None)
            unharmed = what.startswith("seal") or unit not in units or after == expected
            assert not unharmed or actual.get(unit) == expected.get(unit)
        expected = actual


def test_a_sealed_commit_comes_back_as_written_and_its_file_is_gone(tmp_path):
    store = Store(str(tmp_path), Result)
    written = [commit(unit, "a", seconds=1.5) for unit in UNITS]
    for one in written:
        store.commit(one)
    store.seal(written[1:])
    assert list(store.commits()) == written
    assert names_in(f"{tmp_path}/commits") == ["000009.json"]
    assert names_in(f"{tmp_path}/sealed") == ["000000.parquet"]
    assert store.loose_commit("000010") is None and store.commit_of("000010") == written[1]
    chosen = store.commits().select(pa.array([input_key("999999", "a"), input_key("000009", "b")]))
    assert list(chosen) == [written[2]]
    others = store.commits().select(pa.array([input_key("999999", "a")]), others=True)
    assert [c.unit for c in others] == ["000009", "000010", "1000000"]
    assert (store.commits()[-1], store.commits()[1:3]) == (written[3], written[1:3])


def test_a_task_that_is_retried_after_its_commit_was_sealed_commits_the_same_again(tmp_path):
    """What Ray may do, and what a worker that came back after its node was given up may do."""
    store = Store(str(tmp_path), Result)
    store.commit(commit("000009", "a", seconds=1.0))
    store.seal(list(store.commits()))
    store.commit(commit("000009", "a", seconds=2.0))
    assert [c.seconds for c in store.commits()] == [2.0]
    store.seal(list(store.commits().loose.values()))
    assert [c.seconds for c in store.commits()] == [2.0]
    assert len(names_in(f"{tmp_path}/sealed")) == 2
    store.withdraw_all(["000009"])
    assert list(store.commits()) == [] and store.commit_of("000009") is None


def test_a_segment_is_never_replaced_by_that_of_another_process(tmp_path, monkeypatch):
    store = Store(str(tmp_path), Result)
    for unit in UNITS:
        store.commit(commit(unit, "a"))
    ours, theirs = list(store.commits())[:2], list(store.commits())[2:]
    real = ledger.pack
    # the other one seals after we chose our number
    monkeypatch.setattr(
        ledger, "pack", lambda c: (monkeypatch.undo(), store.seal(theirs), real(c))[-1]
    )
    with pytest.raises(RuntimeError, match=r"000000\.parquet was written by another run"):
        store.seal(ours)
    assert [c.unit for c in store.commits()] == list(UNITS)
    store.seal(ours)
    assert [c.unit for c in store.commits()] == list(UNITS)


def test_few_commits_stay_files_of_their_own(tmp_path, monkeypatch):
    store = Store(str(tmp_path), Result)
    for unit in UNITS:
        store.commit(commit(unit, "a"))
    store.seal_loose()
    assert names_in(f"{tmp_path}/sealed") == [] and len(names_in(f"{tmp_path}/commits")) == 4
    monkeypatch.setattr(ledger, "SEGMENT", 3)
    before = list(store.commits())  # more than a segment of them: packed while they are read
    store.seal_loose()
    assert names_in(f"{tmp_path}/commits") == ["1000000.json"]
    assert list(store.commits()) == before and [c.unit for c in before] == list(UNITS)


def test_units_are_in_order_of_their_numbers():
    names = ["1000000", "02-00001", "999999", "000001", "01-00002", "100000", "02-100000"]
    assert sorted(names, key=unit_order) == [
        *("01-00002", "02-00001", "02-100000"),
        *("000001", "100000", "999999", "1000000"),
    ]
