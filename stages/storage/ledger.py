"""The run ledger: which units of which stage are done, from what, into what. All truth is on disk.

    RUN/<stage>/<key>/<kind>/<unit>.parquet      what a unit wrote
    RUN/<stage>/<key>/commits/<unit>.json        that it is whole: written last, atomically
    RUN/<stage>/<key>/units.json                 the units of the last run under this key, with their inputs' fingerprints
    RUN/<stage>/<key>/failures/<unit>.json       why it could not be done; tried again by the next run

A unit writes its outputs under temporary names, renames them, and then writes its commit. A crash
at any moment leaves rubbish, never a lie. Paths are fsspec URIs: local disk and object storage
alike.

An object store has no rename and needs none: a PUT is seen whole or not at all. One in many parts
that was cut off is never seen but paid for: give the bucket a lifecycle rule that aborts incomplete
multipart uploads.
"""

import dataclasses
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from stages.storage.digests import digest, file_sha256
from stages.storage.files import (
    create_only,
    exists,
    is_local,
    open_fs,
    open_parquet,
    read_bytes,
    write_atomically,
)


class Unit(NamedTuple):
    """One piece of a stage's work. `fingerprint` identifies its input: a commit made from another
    one does not count.
    """

    name: str
    fingerprint: str
    task: dict[str, Any]


@dataclass
class Commit:
    """What one unit did.

    `counts` are rows by reason ('kept' included), `totals` any other sums (bytes, tokens, spans).
    """

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


@dataclass(frozen=True)
class Store:
    """The folder of one stage under one key."""

    root: str

    def uri(self, *parts: str) -> str:
        """Where a file of this stage lies."""
        return "/".join([self.root.rstrip("/"), *parts])

    @contextmanager
    def create(self, *parts: str, outputs: list[dict[str, Any]]) -> Iterator[Path]:
        """A local path to write one output to; on success it is moved into place and appended to
        `outputs`.
        """
        uri = self.uri(*parts)
        local = is_local(uri)
        folder = Path(
            os.path.dirname(uri.removeprefix("file://"))
            if local
            else os.environ.get("TMPDIR", "/tmp")
        )
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{parts[-1]}.tmp-{uuid.uuid4().hex}"
        try:
            yield temporary
            record = {
                "path": "/".join(parts),
                "bytes": temporary.stat().st_size,
                "sha256": file_sha256(temporary),
            }
            if local:
                os.replace(temporary, uri.removeprefix("file://"))
            else:
                fs, path = open_fs(uri)
                fs.put_file(str(temporary), path)
            outputs.append(record)
        finally:
            temporary.unlink(missing_ok=True)

    def commit(self, commit: Commit) -> None:
        """Declare a unit done: the last thing a unit does. Of two that did it, the first's word
        stands.

        RuntimeError when that one read another input or wrote other bytes.
        """
        record = dataclasses.asdict(commit) | {"digest": commit.digest}
        uri = self.uri("commits", f"{commit.unit}.json")
        if not create_only(uri, json.dumps(record, indent=1).encode()):
            first = _commit(json.loads(read_bytes(uri)))
            if (first.fingerprint, first.digest) != (commit.fingerprint, commit.digest):
                raise RuntimeError(
                    f"{uri} is another run's, of another input or other bytes: is one still at work? Run again"
                )
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
        """Note which units there are to do under this key; what other units have left behind no
        longer counts.
        """
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
        """Commits of the units noted last, in order of name; a commit made from another input is
        none of theirs.
        """
        listed = self.listed_units()
        return [c for c in self.commits().values() if listed.get(c.unit) == c.fingerprint]

    def commit_of(self, unit: str) -> Commit | None:
        """The commit of one unit, or None."""
        try:
            record = json.loads(read_bytes(self.uri("commits", f"{unit}.json")))
        except FileNotFoundError:
            return None
        return _commit(record)

    def read_part(
        self, commit: Commit, columns: list[str] | None = None, kind: str = ""
    ) -> pa.Table:
        """The Parquet part that a unit wrote: its first output, or its output of that kind
        (folder).
        """
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
