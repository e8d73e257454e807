"""Files by URI: atomic writes, locks, and one client configuration for everything that opens S3."""

import multiprocessing
import os

import fsspec
import pytest
import s3fs

from stages.storage import files
from stages.storage.files import (
    fs_options,
    names_in,
    open_fs,
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
