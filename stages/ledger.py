"""The run ledger: which units of which stage are done, from what, into what. All truth is on disk.

    RUN/<stage>/<key>/<kind>/<unit>.parquet      what a unit wrote
    RUN/<stage>/<key>/commits/<unit>.json        that it is whole: written last, atomically
    RUN/<stage>/<key>/units.json                 the units of the last run under this key, with their inputs' fingerprints
    RUN/<stage>/<key>/failures/<unit>.json       why it could not be done; tried again by the next run

A unit writes its outputs under temporary names, renames them, and then writes its commit. A crash at any moment leaves
rubbish, never a lie. Paths are fsspec URIs: local disk and object storage alike.

An object store has no rename and needs none: a PUT is seen whole or not at all. One in many parts that was cut off is never
seen but paid for: give the bucket a lifecycle rule that aborts incomplete multipart uploads.
"""

import dataclasses
import hashlib
import json
import os
import random
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq


class Unit(NamedTuple):
    """One piece of a stage's work. `fingerprint` identifies its input: a commit made from another one does not count."""

    name: str
    fingerprint: str
    task: dict[str, Any]


@dataclass
class Commit:
    """What one unit did. `counts` are rows by reason ('kept' included), `totals` any other sums (bytes, tokens, spans)."""

    unit: str
    fingerprint: str
    rows_in: int = 0
    rows_out: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    outputs: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @property
    def digest(self) -> str:
        """Identity of everything the unit wrote; equal bytes give equal digests."""
        return digest([f"{o['path']}:{o['sha256']}" for o in self.outputs])


def digest(parts: Any) -> str:
    """Short stable hash of a JSON-able value, for stage keys and fingerprints: 16 hex digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def is_local(uri: str) -> bool:
    """Whether a URI lies on this machine's file system."""
    return "://" not in uri or uri.startswith("file://")


def file_sha256(path: Path) -> str:
    """Hex sha256 of a local file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def open_fs(uri: str) -> tuple[Any, str]:
    """The file system of a URI, and the path there. Listings are not cached: others write here too.

    S3 is asked up to 6 times where it answers 500 or 503 or not at all, with random and growing pauses, and more slowly
    after it said SlowDown; $AWS_RETRY_MODE and $AWS_MAX_ATTEMPTS overrule that.
    """
    # the only way that reaches every client, those of libraries included; read when a client is made. s3fs tries up to 5
    # times as often where there is no answer: a store that is away is an error after a minute or two
    os.environ.setdefault("AWS_RETRY_MODE", "adaptive")
    os.environ.setdefault("AWS_MAX_ATTEMPTS", "6")
    fs, path = fsspec.core.url_to_fs(uri, use_listings_cache=False)
    return fs, path


def write_atomically(uri: str, data: bytes | memoryview) -> None:
    """Replace the object at `uri`: readers see the old bytes or the new ones, never a part (an object store's PUT is atomic)."""
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
    """All bytes of an object, and which version of it they are (or an earlier one's name); b"" and None if there is none."""
    fs, path = open_fs(uri)
    try:
        version = fs.info(path)["ETag"] if _has_conditions(fs) else None  # first: a version that is too old harms nobody
        data = read_bytes(uri)
    except FileNotFoundError:
        return b"", None
    return data, version or hashlib.sha256(data).hexdigest()


def replace_if(uri: str, data: bytes, version: str | None) -> bool:
    """Replace the object if it still is what `read_version` gave, None for nothing. False, and nothing written, if it is not.

    S3 decides by itself (If-None-Match; If-Match, of which s3fs knows nothing from 100 MB on). Elsewhere we look and then
    write, and two at once may both succeed: a local disk has the lease's lock against that, other stores have nothing.
    `data` should be like nobody else's: what is there already counts as written, for the answer to our own first attempt
    may have been lost.
    """
    fs, path = open_fs(uri)
    if not _has_conditions(fs):
        data_there, version_there = read_version(uri)
        if version_there == version:
            write_atomically(uri, data)
        return version_there == version or data_there == data
    try:
        fs.pipe_file(path, data, **({"mode": "create"} if version is None else {"IfMatch": version}))
        return True
    except OSError as error:
        code = getattr(error.__cause__, "response", {}).get("Error", {}).get("Code")
        if code == "ConditionalRequestConflict":  # somebody is writing it at this moment: S3 says to ask again
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
    return [name.rstrip("/").rsplit("/", 1)[-1] for name in fs.ls(path, detail=False)] if fs.exists(path) else []


@contextmanager
def open_parquet(uri: str) -> Iterator[pq.ParquetFile]:
    """A Parquet object anywhere fsspec reaches."""
    if is_local(uri):
        # by Arrow's own hands: a thread of its pool that still holds a Python file when Python ends aborts the process
        with pq.ParquetFile(uri.removeprefix("file://")) as file:
            yield file
        return
    fs, path = open_fs(uri)
    with fs.open(path, "rb") as stream:
        yield pq.ParquetFile(stream)


@dataclass(frozen=True)
class Store:
    """The folder of one stage under one key."""

    root: str

    def uri(self, *parts: str) -> str:
        """Where a file of this stage lies."""
        return "/".join([self.root.rstrip("/"), *parts])

    @contextmanager
    def create(self, *parts: str, outputs: list[dict[str, Any]]) -> Iterator[Path]:
        """A local path to write one output to; on success it is moved into place and appended to `outputs`."""
        uri = self.uri(*parts)
        local = is_local(uri)
        folder = Path(os.path.dirname(uri.removeprefix("file://")) if local else os.environ.get("TMPDIR", "/tmp"))
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{parts[-1]}.tmp-{uuid.uuid4().hex}"
        try:
            yield temporary
            record = {"path": "/".join(parts), "bytes": temporary.stat().st_size, "sha256": file_sha256(temporary)}
            if local:
                os.replace(temporary, uri.removeprefix("file://"))
            else:
                fs, path = open_fs(uri)
                fs.put_file(str(temporary), path)
            outputs.append(record)
        finally:
            temporary.unlink(missing_ok=True)

    def commit(self, commit: Commit) -> None:
        """Declare a unit done: the last thing a unit does. Of two that did it, the first's word stands.

        RuntimeError when that one read another input or wrote other bytes.
        """
        record = dataclasses.asdict(commit) | {"digest": commit.digest}
        uri = self.uri("commits", f"{commit.unit}.json")
        if not create_only(uri, json.dumps(record, indent=1).encode()):
            first = _commit(json.loads(read_bytes(uri)))
            if (first.fingerprint, first.digest) != (commit.fingerprint, commit.digest):
                raise RuntimeError(f"{uri} is another run's, of another input or other bytes: is one still at work? Run again")
        self.clear_failure(commit.unit)

    def withdraw(self, unit: str) -> None:
        """Take a unit's commit back."""
        fs, path = open_fs(self.uri("commits", f"{unit}.json"))
        fs.rm_file(path)

    def fail(self, unit: str, error: dict[str, Any]) -> None:
        """Record why a unit could not be done; a later success removes the record."""
        write_atomically(self.uri("failures", f"{unit}.json"), json.dumps(error, indent=1).encode())

    def clear_failure(self, unit: str) -> None:
        """Forget an earlier failure of a unit."""
        uri = self.uri("failures", f"{unit}.json")
        if exists(uri):
            fs, path = open_fs(uri)
            fs.rm_file(path)

    def commits(self) -> dict[str, Commit]:
        """All units done so far, by name, in order of name."""
        return {record["unit"]: _commit(record) for record in self._records("commits")}

    def list_units(self, units: Sequence[Unit]) -> None:
        """Note which units there are to do under this key; what other units have left behind no longer counts."""
        listed = {unit.name: unit.fingerprint for unit in units}
        write_atomically(self.uri("units.json"), json.dumps(listed).encode())

    def listed_units(self) -> dict[str, str]:
        """Fingerprints of the units noted last, by name."""
        try:
            listed: dict[str, str] = json.loads(read_bytes(self.uri("units.json")))
        except FileNotFoundError:
            return {}
        return listed

    def listed_commits(self) -> list[Commit]:
        """Commits of the units noted last, in order of name; a commit made from another input is none of theirs."""
        listed = self.listed_units()
        return [c for c in self.commits().values() if listed.get(c.unit) == c.fingerprint]

    def commit_of(self, unit: str) -> Commit | None:
        """The commit of one unit, or None."""
        try:
            record = json.loads(read_bytes(self.uri("commits", f"{unit}.json")))
        except FileNotFoundError:
            return None
        return _commit(record)

    def read_part(self, commit: Commit, columns: list[str] | None = None, kind: str = "") -> pa.Table:
        """The Parquet part that a unit wrote: its first output, or its output of that kind (folder)."""
        path = next(o["path"] for o in commit.outputs if o["path"].startswith(kind))
        with open_parquet(self.uri(path)) as file:
            return file.read(columns=columns)

    def failures(self) -> dict[str, dict[str, Any]]:
        """Units that failed and have not succeeded since, by name."""
        return {record["unit"]: record for record in self._records("failures")}

    def _records(self, kind: str) -> list[dict[str, Any]]:
        fs, folder = open_fs(self.uri(kind))
        if not fs.exists(folder):
            return []
        paths = sorted(p for p in fs.ls(folder, detail=False) if p.endswith(".json"))
        # object stores answer in tens of milliseconds: ask for many records at once
        with ThreadPoolExecutor(16) as pool:
            return [json.loads(data) for data in pool.map(fs.cat_file, paths)]

    def clear(self, *parts: str) -> None:
        """Remove a folder of this stage if it is there (rubbish of a unit that never committed)."""
        fs, path = open_fs(self.uri(*parts))
        if fs.exists(path):
            fs.rm(path, recursive=True)


def _commit(record: dict[str, Any]) -> Commit:
    return Commit(**{f.name: record[f.name] for f in dataclasses.fields(Commit)})


@contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """A temporary local folder, removed at the end however it comes."""
    folder = Path(os.environ.get("TMPDIR", "/tmp")) / f"{prefix}-{uuid.uuid4().hex}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
