"""Reading and writing files by URI, on a local disk or an object store: atomic, conditional, never
a part.
"""

import hashlib
import os
import random
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq


def is_local(uri: str) -> bool:
    """Whether a URI lies on this machine's file system."""
    return "://" not in uri or uri.startswith("file://")


def open_fs(uri: str) -> tuple[Any, str]:
    """The file system of a URI, and the path there. Listings are not cached: others write here too.

    S3 is asked up to 6 times where it answers 500 or 503 or not at all, with random and growing
    pauses, and more slowly after it said SlowDown; $AWS_RETRY_MODE and $AWS_MAX_ATTEMPTS overrule
    that.
    """
    # the only way that reaches every client, those of libraries included; read when a client is
    # made. s3fs tries up to 5 times as often where there is no answer: a store that is away is an
    # error after a minute or two
    os.environ.setdefault("AWS_RETRY_MODE", "adaptive")
    os.environ.setdefault("AWS_MAX_ATTEMPTS", "6")
    fs, path = fsspec.core.url_to_fs(uri, use_listings_cache=False)
    return fs, path


def write_atomically(uri: str, data: bytes | memoryview) -> None:
    """Replace the object at `uri`: readers see the old bytes or the new ones, never a part (an
    object store's PUT is atomic).
    """
    fs, path = open_fs(uri)
    if not is_local(uri):
        fs.pipe_file(path, bytes(data))
        return
    temporary = f"{path}.tmp-{uuid.uuid4().hex}"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(temporary, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def read_version(uri: str) -> tuple[bytes, str | None]:
    """All bytes of an object, and which version of it they are (or an earlier one's name); b"" and
    None if there is none.
    """
    fs, path = open_fs(uri)
    try:
        version = (
            fs.info(path)["ETag"] if _has_conditions(fs) else None
        )  # first: a version that is too old harms nobody
        data = read_bytes(uri)
    except FileNotFoundError:
        return b"", None
    return data, version or hashlib.sha256(data).hexdigest()


def replace_if(uri: str, data: bytes, version: str | None) -> bool:
    """Replace the object if it still is what `read_version` gave, None for nothing. False, and
    nothing written, if it is not.

    S3 decides by itself (If-None-Match; If-Match, of which s3fs knows nothing from 100 MB on).
    Elsewhere we look and then write, and two at once may both succeed: a local disk has the lease's
    lock against that, other stores have nothing. `data` should be like nobody else's: what is there
    already counts as written, for the answer to our own first attempt may have been lost.
    """
    fs, path = open_fs(uri)
    if not _has_conditions(fs):
        data_there, version_there = read_version(uri)
        if version_there == version:
            write_atomically(uri, data)
        return version_there == version or data_there == data
    try:
        fs.pipe_file(
            path, data, **({"mode": "create"} if version is None else {"IfMatch": version})
        )
        return True
    except OSError as error:
        code = getattr(error.__cause__, "response", {}).get("Error", {}).get("Code")
        if (
            code == "ConditionalRequestConflict"
        ):  # somebody is writing it at this moment: S3 says to ask again
            time.sleep(random.random())
            return replace_if(uri, data, version)
        if code not in ("PreconditionFailed", "NoSuchKey"):
            raise
        return read_version(uri)[0] == data


def create_only(uri: str, data: bytes) -> bool:
    """Write an object where there is none; False if there is another. The terms of `replace_if`."""
    return replace_if(uri, data, None)


def _has_conditions(fs: Any) -> bool:
    return "s3" in fs.protocol


def read_bytes(uri: str) -> bytes:
    """All bytes of an object. FileNotFoundError if there is none."""
    fs, path = open_fs(uri)
    data: bytes = fs.cat_file(path)
    return data


def exists(uri: str) -> bool:
    """Whether there is an object or folder at `uri`."""
    fs, path = open_fs(uri)
    return bool(fs.exists(path))


def names_in(uri: str) -> list[str]:
    """Names of what lies in a folder; none where there is no folder."""
    fs, path = open_fs(uri)
    return (
        [name.rstrip("/").rsplit("/", 1)[-1] for name in fs.ls(path, detail=False)]
        if fs.exists(path)
        else []
    )


@contextmanager
def open_parquet(uri: str) -> Iterator[pq.ParquetFile]:
    """A Parquet object anywhere fsspec reaches."""
    if is_local(uri):
        # by Arrow's own hands: a thread of its pool that still holds a Python file when Python ends
        # aborts the process
        with pq.ParquetFile(uri.removeprefix("file://")) as file:
            yield file
        return
    fs, path = open_fs(uri)
    with fs.open(path, "rb") as stream:
        yield pq.ParquetFile(stream)


@contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """A temporary local folder, removed at the end however it comes."""
    folder = Path(os.environ.get("TMPDIR", "/tmp")) / f"{prefix}-{uuid.uuid4().hex}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
