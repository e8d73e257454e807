"""Files by URI: atomic writes, locks, and one client configuration for everything that opens S3."""

import multiprocessing
import os

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs

from stages.storage import files
from stages.storage.files import (
    fs_options,
    names_in,
    open_fs,
    open_parquet,
    output_file,
    read_bytes,
    read_many,
    remove,
    remove_tree,
    write_atomically,
)
from stages.storage.locks import is_locked, lock, try_lock


@pytest.fixture(params=["s3", "memory", "local"])
def folder(request, tmp_path):
    if request.param == "s3":
        return request.getfixturevalue("s3_bucket")
    return f"memory://{tmp_path}" if request.param == "memory" else str(tmp_path)


def test_objects_are_written_listed_read_and_removed(folder):
    assert names_in(f"{folder}/a") == []
    for name in ("x", "y"):
        write_atomically(f"{folder}/a/{name}", name.encode())
    write_atomically(f"{folder}/a/x", b"new")
    assert sorted(names_in(f"{folder}/a")) == ["x", "y"]
    assert read_bytes(f"{folder}/a/x") == b"new"
    assert read_many([f"{folder}/a/{name}" for name in ("y", "x")]) == [b"y", b"new"]
    for _ in range(2):  # removing what is absent does nothing
        remove(f"{folder}/a/x")
    assert names_in(f"{folder}/a") == ["y"]
    for _ in range(2):
        remove_tree(f"{folder}/a")
    assert names_in(f"{folder}/a") == [] and read_many([]) == []


def test_an_output_file_appears_only_when_its_block_succeeds(folder):
    with pytest.raises(RuntimeError, match="disk"), output_file(f"{folder}/a/x") as path:
        path.write_bytes(b"half")
        raise RuntimeError("disk")
    assert names_in(f"{folder}/a") == [] and not path.exists()
    with output_file(f"{folder}/a/x") as path:
        path.write_bytes(b"whole")
        assert "x" not in names_in(f"{folder}/a")
    assert names_in(f"{folder}/a") == ["x"] and read_bytes(f"{folder}/a/x") == b"whole"


def test_columns_of_a_part_are_read_from_any_store(folder):
    table = pa.table({"doc_id": [1, 2, 3], "text": ["a", "b", None]})
    with output_file(f"{folder}/a/x.parquet") as path:
        pq.write_table(table, path, row_group_size=2)
    with open_parquet(f"{folder}/a/x.parquet") as part:
        assert part.read() == table and part.read_row_group(1, ["text"])["text"].to_pylist() == [
            None
        ]
        assert [b.num_rows for b in part.iter_batches(2, columns=["doc_id"])] == [2, 1]


def test_two_columns_of_a_part_on_s3_cost_their_own_bytes(s3_bucket, monkeypatch):
    """And not those of the text between them, nor a request for each row group."""
    texts = [os.urandom(300).hex() for _ in range(3000)]
    table = pa.table({"doc_id": range(3000), "text": texts, "key": range(3000)})
    with output_file(f"{s3_bucket}/x.parquet") as path:
        pq.write_table(table, path, row_group_size=500, compression="none")
        size = path.stat().st_size
    received = []
    call = s3fs.S3FileSystem._call_s3

    async def counted(self, method, *args, **kwargs):
        answer = await call(self, method, *args, **kwargs)
        if method == "get_object":
            received.append(answer["ContentLength"])
        return answer

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", counted)
    with open_parquet(f"{s3_bucket}/x.parquet") as part:
        assert part.read(["doc_id", "key"]) == table.select(["doc_id", "key"])
    assert sum(received) < size / 10 and len(received) < 12
    received.clear()
    with open_parquet(f"{s3_bucket}/x.parquet") as part:
        assert part.read() == table
    assert size <= sum(received) < 1.1 * size and len(received) < 12


# --- S3 clients -----------------------------------------------------------------------------------


def retries(fs):
    fs.connect()
    return fs.s3.meta.config.retries


def test_every_client_has_our_retry_settings_whatever_was_opened_before(s3_bucket, monkeypatch):
    """fsspec returns the first client made with equal arguments, so the settings are arguments."""
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_RETRY_MODE", "legacy")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    for options in ({}, {"use_listings_cache": False}):
        fs, _ = fsspec.core.url_to_fs(s3_bucket, **options)
        assert retries(fs)["total_max_attempts"] == 1
    monkeypatch.delenv("AWS_RETRY_MODE")
    monkeypatch.delenv("AWS_MAX_ATTEMPTS")
    ours = {"mode": "adaptive", "total_max_attempts": 6}
    assert ours.items() <= retries(open_fs(s3_bucket)[0]).items()
    # as torch's checkpoint reader and writer open it
    chained, _ = fsspec.core.url_to_fs(f"simplecache::{s3_bucket}", s3=fs_options(s3_bucket))
    assert ours.items() <= retries(chained.fs).items()
    assert (
        ours.items()
        <= retries(fsspec.core.url_to_fs(s3_bucket, **fs_options(s3_bucket))[0]).items()
    )
    assert "AWS_MAX_ATTEMPTS" not in os.environ
    s3fs.S3FileSystem.clear_instance_cache()  # of those with one attempt


def test_the_environment_overrides_the_retry_settings(s3_bucket, monkeypatch):
    monkeypatch.setenv("AWS_RETRY_MODE", "standard")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    assert retries(open_fs(s3_bucket)[0]) == {"mode": "standard", "total_max_attempts": 2}


def test_conditions_are_trusted_by_class_not_by_protocol(s3_bucket):
    class Other(fsspec.AbstractFileSystem):
        protocol = ("s3", "s3a")

    assert files._has_conditions(open_fs(s3_bucket)[0]) and not files._has_conditions(Other())


# --- locks ----------------------------------------------------------------------------------------


def hold(path, held, release):
    with lock(path):
        held.set()
        release.wait(60)


def test_a_lock_excludes_other_processes_until_it_is_released_or_its_holder_dies(tmp_path):
    path, context = tmp_path / "lock", multiprocessing.get_context("fork")
    assert not is_locked(path) and not path.exists()
    for end in ("release", "kill"):
        held, release = context.Event(), context.Event()
        holder = context.Process(target=hold, args=(path, held, release))
        holder.start()
        assert held.wait(60) and is_locked(path)
        with pytest.raises(BlockingIOError), try_lock(path):
            pass
        release.set() if end == "release" else holder.kill()
        with lock(path):  # waits
            pass
        holder.join()
        assert not is_locked(path)


def test_a_lock_ends_with_its_block_even_if_a_forked_process_inherited_its_file(tmp_path):
    context = multiprocessing.get_context("fork")
    release = context.Event()
    with try_lock(tmp_path / "lock"):
        child = context.Process(target=release.wait, args=(60,))
        child.start()
    assert not is_locked(tmp_path / "lock")
    release.set()
    child.join()
