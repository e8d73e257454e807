"""Read and write files by URI, on a local disk or an object store.

The only module that opens either.

Writes are atomic: a reader sees the old bytes or the new ones, never a part.

The base is fsspec. obstore was evaluated (November 2026) and not adopted: it hangs after a fork, in
the child and in the parent, cannot be interrupted by Ctrl-C, its errors are not OSError, it reports
a 409 on create as AlreadyExists, does not fsync on a local put, ignores AWS_MAX_ATTEMPTS and
~/.aws/credentials, and torch's distributed checkpoints would still need fsspec. Call these
functions with the URI each time: a file system object must not be carried across a fork.
"""

import os
import random
import shutil
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec

from stages.storage.digests import bytes_sha256
from stages.storage.errors import explained, explains

if TYPE_CHECKING:
    import pyarrow.parquet as pq


def is_local(uri: str) -> bool:
    """Whether a URI lies on this machine's file system."""
    return "://" not in uri or uri.startswith("file://")


def local_path(uri: str) -> Path:
    """The path of a local URI."""
    return Path(uri.removeprefix("file://"))


def fs_options(uri: str) -> dict[str, Any]:
    """Options for fsspec and for libraries that open `uri` through it. Listings are not cached:
    others write here too.

    An S3 request is attempted up to 6 times when the answer is 500 or 503 or there is none, with
    random, growing pauses, and more slowly after SlowDown; $AWS_RETRY_MODE and $AWS_MAX_ATTEMPTS
    override that. s3fs repeats each up to 5 times where there is no answer: a store that is down
    is an error after a minute or two. These are arguments, not defaults set in the environment,
    because fsspec returns the first client made with equal arguments, whatever the environment was.
    """
    options: dict[str, Any] = {"use_listings_cache": False}
    if uri.startswith(("s3://", "s3a://")):
        mode = os.environ.get("AWS_RETRY_MODE", "adaptive")
        attempts = int(os.environ.get("AWS_MAX_ATTEMPTS", "6"))
        options["config_kwargs"] = {"retries": {"mode": mode, "total_max_attempts": attempts}}
    return options


def open_fs(uri: str) -> tuple[Any, str]:
    """The file system of a URI, with `fs_options`, and the path in it."""
    fs, path = fsspec.core.url_to_fs(uri, **fs_options(uri))
    return fs, path


# --- reading --------------------------------------------------------------------------------------


@explains("reading")
def read_bytes(uri: str) -> bytes:
    """All bytes of an object. FileNotFoundError if there is none."""
    fs, path = open_fs(uri)
    data: bytes = fs.cat_file(path)
    return data


def read_many(uris: Sequence[str]) -> list[bytes]:
    """All bytes of several objects of one store, 16 read at a time.

    One read from an object store takes tens of milliseconds.
    """
    return list(_read_all(uris))


def read_present(uris: Sequence[str]) -> list[bytes]:
    """As `read_many`, without the objects that are gone."""
    return [data for data in _read_all(uris, missing=FileNotFoundError) if data is not None]


def _read_all(uris: Sequence[str], *, missing: Any = ()) -> list[Any]:
    """All bytes of objects; None in place of an error that counts as `missing`."""
    if not uris:
        return []
    fs, _ = open_fs(uris[0])  # one for all threads: fsspec would make a client in each
    # s3fs would ask for each object's size first, to read large ones in parallel
    options = {"max_concurrency": 1} if _has_conditions(fs) else {}

    def read(uri: str) -> bytes | None:
        with suppress(missing):
            data: bytes = fs.cat_file(uri, **options)
            return data
        return None

    with explained(uris[0], "reading"), ThreadPoolExecutor(16) as pool:
        return list(pool.map(read, uris))


@explains("looking for")
def exists(uri: str) -> bool:
    """Whether there is an object or folder at `uri`."""
    fs, path = open_fs(uri)
    return bool(fs.exists(path))


@explains("listing")
def names_in(uri: str) -> list[str]:
    """Names of the files and folders in a folder; none where there is no folder."""
    fs, path = open_fs(uri)
    try:
        return [name.rstrip("/").rpartition("/")[2] for name in fs.ls(path, detail=False)]
    except FileNotFoundError:
        return []


@contextmanager
def open_parquet(uri: str) -> "Iterator[pq.ParquetFile]":
    """A Parquet object anywhere fsspec reaches."""
    import pyarrow.parquet as pq  # here: most importers of this module need no pyarrow

    if is_local(uri):
        # opened by Arrow: a thread of its pool that still holds a Python file when Python ends
        # aborts the process
        with pq.ParquetFile(local_path(uri)) as file:
            yield file
        return
    fs, path = open_fs(uri)
    # Arrow asks for the ranges that it needs, together; with a cache fsspec reads on to the end
    with explained(uri, "reading"), fs.open(path, "rb", cache_type="none") as stream:
        yield pq.ParquetFile(stream, pre_buffer=True)


@explains("downloading")
def download(uri: str, target: Path) -> None:
    """Copy an object to a local file."""
    fs, path = open_fs(uri)
    fs.get_file(path, str(target))


# --- writing --------------------------------------------------------------------------------------


@explains("writing")
def write_atomically(uri: str, data: bytes | memoryview) -> None:
    """Replace the object at `uri`, durably (an object store's PUT is atomic)."""
    if not is_local(uri):
        fs, path = open_fs(uri)
        fs.pipe_file(path, bytes(data))
        return
    with output_file(uri) as temporary, open(temporary, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def output_file(uri: str) -> Iterator[Path]:
    """A local path to write an object to; it is moved or uploaded to `uri` if the block succeeds.

    It is removed if not. A killed process leaves a file `.NAME.tmp-*`.
    """
    local, name = is_local(uri), uri.rpartition("/")[2]
    folder = local_path(uri).parent if local else _temporary_folder()
    temporary = folder / f".{name}.tmp-{uuid.uuid4().hex}"
    try:
        with explained(uri, "writing"):
            folder.mkdir(parents=True, exist_ok=True)
            yield temporary
            if local:
                temporary.replace(local_path(uri))
            else:
                fs, path = open_fs(uri)
                fs.put_file(str(temporary), path)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: str) -> None:
    """Make the names of the files in a local folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@explains("removing")
def remove(uri: str) -> None:
    """Remove an object if there is one."""
    fs, path = open_fs(uri)
    with suppress(FileNotFoundError):
        fs.rm_file(path)


def remove_many(uris: Sequence[str]) -> None:
    """Remove several objects of one store, those that there are; on S3, 1,000 with each request."""
    if not uris:
        return
    fs, _ = open_fs(uris[0])
    with explained(uris[0], "removing"):
        if not _has_conditions(fs):
            for uri in uris:
                remove(uri)
            return
        paths = [fs.split_path(uri) for uri in uris]
        for first in range(0, len(paths), 1000):
            keys = [{"Key": key} for _, key, _ in paths[first : first + 1000]]
            answer = fs.call_s3(
                "delete_objects", Bucket=paths[0][0], Delete={"Objects": keys, "Quiet": True}
            )
            if errors := answer.get("Errors"):
                raise OSError(f"{len(errors)} objects were not removed, first: {errors[0]}")


@explains("removing")
def remove_tree(uri: str) -> None:
    """Remove a file, or a folder with everything in it, if there is one."""
    fs, path = open_fs(uri)
    with suppress(FileNotFoundError):
        fs.rm(path, recursive=True)


@contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """A temporary local folder, removed when the block ends."""
    folder = _temporary_folder() / f"{prefix}-{uuid.uuid4().hex}"
    try:
        with explained(str(folder), "writing temporary files to"):
            folder.mkdir(parents=True)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _temporary_folder() -> Path:
    return Path(os.environ.get("TMPDIR", "/tmp"))


# --- conditional writes ---------------------------------------------------------------------------


@explains("reading")
def read_version(uri: str) -> tuple[bytes, str | None]:
    """All bytes of an object, and the name of their version (or of an earlier one).

    They are b"" and None if there is no object.
    """
    fs, path = open_fs(uri)
    try:
        # the version first: one that is too old is only refused
        version = fs.info(path)["ETag"] if _has_conditions(fs) else None
        data = read_bytes(uri)
    except FileNotFoundError:
        return b"", None
    return data, version or bytes_sha256(data)


@explains("writing")
def replace_if(uri: str, data: bytes, version: str | None) -> bool:
    """Replace the object if its version is still the one from `read_version`, None for no object.
    False if not, and nothing is written.

    S3 decides atomically (If-None-Match; If-Match, which s3fs does not send from 100 MB on).
    Elsewhere we look and then write, and two writers at once may both succeed: on a local disk the
    lease's lock prevents that, on other stores nothing does. `data` must differ from what any other
    writer writes: equal bytes in place count as written, because the answer to our own first
    attempt may have been lost.
    """
    fs, path = open_fs(uri)
    if not _has_conditions(fs):
        current_data, current_version = read_version(uri)
        if current_version == version:
            write_atomically(uri, data)
        return current_version == version or current_data == data
    condition = {"mode": "create"} if version is None else {"IfMatch": version}
    try:
        fs.pipe_file(path, data, **condition)
        return True
    except OSError as error:
        code = getattr(error.__cause__, "response", {}).get("Error", {}).get("Code")
        if code == "ConditionalRequestConflict":  # another write is under way: S3 says to retry
            time.sleep(random.random())
            return replace_if(uri, data, version)
        if code not in ("PreconditionFailed", "NoSuchKey"):
            raise
        return read_version(uri)[0] == data


def create_only(uri: str, data: bytes) -> bool:
    """Write an object where there is none; False if there is another. As `replace_if`."""
    return replace_if(uri, data, None)


def _has_conditions(fs: Any) -> bool:
    # by class: other implementations of "s3" (obstore.fsspec) ignore conditions silently
    s3fs = sys.modules.get("s3fs")
    return s3fs is not None and isinstance(fs, s3fs.S3FileSystem)
