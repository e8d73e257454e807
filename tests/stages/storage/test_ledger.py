"""The ledger: a commit is the last thing written, and says what was written."""

import hashlib
import json
from dataclasses import replace

import pytest
from pydantic.dataclasses import dataclass

from stages.storage.ledger import Commit, Failure, Output, Store


def test_outputs_are_recorded_with_size_and_hash(tmp_path):
    store, commit = Store(str(tmp_path)), Commit("000001", "f")
    with store.create("documents", "000001.parquet", outputs=commit.outputs) as path:
        path.write_bytes(b"abc")
    assert commit.outputs == [
        Output("documents/000001.parquet", 3, hashlib.sha256(b"abc").hexdigest())
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
    assert [c.unit for c in store.commits()] == ["000001", "000002"]
    assert store.commits()[1] == Commit("000002", "f", rows_in=3, counts={"kept": 2})
    assert store.commit_of("000003") is None


def test_the_first_of_two_commits_of_a_unit_stays(tmp_path):
    store, output = Store(str(tmp_path)), Output("p", 1, "1")
    store.commit(Commit("000001", "f", outputs=[output], seconds=1))
    store.commit(Commit("000001", "f", outputs=[output], seconds=2))
    assert store.commit_of("000001").seconds == 1
    for other in (
        Commit("000001", "g", outputs=[output]),
        Commit("000001", "f", outputs=[replace(output, sha256="2")]),
    ):
        with pytest.raises(
            RuntimeError,
            match=r"000001.json was written by another run, from another input or with other bytes",
        ):
            store.commit(other)
    assert store.commit_of("000001").seconds == 1


def test_success_clears_an_earlier_failure(tmp_path):
    store = Store(str(tmp_path))
    store.fail(Failure("000001", "ValueError: x"))
    assert store.failures()["000001"].error == "ValueError: x"
    store.commit(Commit("000001", "f"))
    assert store.failures() == {}


def test_digest_changes_with_the_bytes_and_not_with_the_time():
    a = Commit("u", "f", outputs=[Output("p", 1, "1")], seconds=1)
    b = Commit("u", "f", outputs=[Output("p", 1, "1")], seconds=2)
    c = Commit("u", "f", outputs=[Output("p", 1, "2")])
    assert a.digest == b.digest != c.digest


@dataclass(frozen=True)
class Total:
    rows: int = 0


def test_a_result_comes_back_as_its_own_type_and_a_wrong_one_is_refused(tmp_path):
    store = Store(str(tmp_path), Total)
    store.commit(Commit("000001", "f", result=Total(3)))
    assert store.commit_of("000001").result == Total(3)
    assert Store(str(tmp_path)).commit_of("000001").result is None
    file = tmp_path / "commits" / "000001.json"
    file.write_text(file.read_text().replace('"rows": 3', '"rows": "many"'))
    with pytest.raises(
        ValueError, match=r"(?s)commit of unit 000001 is not of this version .*rows"
    ):
        store.commit_of("000001")


def test_commits_of_earlier_versions_are_read(tmp_path):
    record = {"unit": "u", "fingerprint": "f", "rows_in": 1, "rows_out": 1, "counts": {}}
    record |= {"totals": {"rows": 7.0}, "extra": {"finished": 5.0}, "outputs": []}
    (tmp_path / "commits").mkdir()
    (tmp_path / "commits" / "u.json").write_text(json.dumps(record))
    commit = Store(str(tmp_path), Total).commit_of("u")
    assert (commit.result, commit.finished) == (Total(7), 5.0)


def test_a_unit_that_an_earlier_version_set_aside_stays_quarantined(tmp_path):
    (tmp_path / "failures").mkdir()
    record = {"unit": "u", "task": {}, "error": "died", "traceback": "", "set_aside": "f"}
    (tmp_path / "failures" / "u.json").write_text(json.dumps(record))
    assert Store(str(tmp_path)).failures()["u"].quarantined == "f"
