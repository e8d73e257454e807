"""The ledger: a commit is the last thing written, and says what was written."""

import hashlib

import pytest

from stages.storage.ledger import Commit, Store


def test_outputs_are_recorded_with_size_and_hash(tmp_path):
    store, commit = Store(str(tmp_path)), Commit("000001", "f")
    with store.create("documents", "000001.parquet", outputs=commit.outputs) as path:
        path.write_bytes(b"abc")
    assert commit.outputs == [
        {
            "path": "documents/000001.parquet",
            "bytes": 3,
            "sha256": hashlib.sha256(b"abc").hexdigest(),
        }
    ]
    assert (tmp_path / "documents" / "000001.parquet").read_bytes() == b"abc"


def test_an_error_while_writing_leaves_no_file(tmp_path):
    outputs = []
    with (
        pytest.raises(RuntimeError, match="disk"),
        Store(str(tmp_path)).create("d", "x", outputs=outputs) as path,
    ):
        path.write_bytes(b"half")
        raise RuntimeError("disk")
    assert outputs == [] and list((tmp_path / "d").iterdir()) == []


def test_commits_come_back_as_written_in_order_of_name(tmp_path):
    store = Store(str(tmp_path))
    for name in ("000002", "000001"):
        store.commit(Commit(name, "f", rows_in=3, counts={"kept": 2}))
    assert list(store.commits()) == ["000001", "000002"]
    assert store.commits()["000002"] == Commit("000002", "f", rows_in=3, counts={"kept": 2})
    assert store.commit_of("000003") is None


def test_the_first_of_two_commits_of_a_unit_stays(tmp_path):
    store, output = Store(str(tmp_path)), {"path": "p", "sha256": "1", "bytes": 1}
    store.commit(Commit("000001", "f", outputs=[output], seconds=1))
    store.commit(Commit("000001", "f", outputs=[output], seconds=2))
    assert store.commit_of("000001").seconds == 1
    for other in (
        Commit("000001", "g", outputs=[output]),
        Commit("000001", "f", outputs=[output | {"sha256": "2"}]),
    ):
        with pytest.raises(
            RuntimeError,
            match=r"000001.json was written by another run, from another input or with other bytes",
        ):
            store.commit(other)
    assert store.commit_of("000001").seconds == 1


def test_success_clears_an_earlier_failure(tmp_path):
    store = Store(str(tmp_path))
    store.fail("000001", {"unit": "000001", "error": "ValueError: x"})
    assert store.failures()["000001"]["error"] == "ValueError: x"
    store.commit(Commit("000001", "f"))
    assert store.failures() == {}


def test_digest_changes_with_the_bytes_and_not_with_the_time():
    a = Commit("u", "f", outputs=[{"path": "p", "sha256": "1", "bytes": 1}], seconds=1)
    b = Commit("u", "f", outputs=[{"path": "p", "sha256": "1", "bytes": 1}], seconds=2)
    c = Commit("u", "f", outputs=[{"path": "p", "sha256": "2", "bytes": 1}])
    assert a.digest == b.digest != c.digest
