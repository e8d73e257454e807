"""The run ledger: which units of each stage are done, with their inputs and outputs. All on disk.

    RUN/<stage>/<key>/<kind>/<unit>.parquet      outputs of a unit
    RUN/<stage>/<key>/commits/<unit>.json        its commit: written last, atomically
    RUN/<stage>/<key>/units.json                 units of the last run under this key: fingerprints
    RUN/<stage>/<key>/failures/<unit>.json       why it failed; the next run tries it again

A unit writes its outputs under temporary names, renames them, and then writes its commit. A crash
at any moment leaves garbage, never a false record. Paths are URIs: local disk or object storage.

An object store has no rename and needs none: a PUT becomes visible whole or not at all. A multipart
upload that was cut off is never visible but costs money: give the bucket a lifecycle rule that
aborts incomplete multipart uploads.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stages.storage.digests import digest, file_sha256
from stages.storage.files import (
    create_only,
    names_in,
    open_parquet,
    output_file,
    read_bytes,
    read_many,
    remove,
    remove_tree,
    write_atomically,
)

if TYPE_CHECKING:
    import pyarrow as pa


class Unit(NamedTuple):
    """One piece of a stage's work.

    `fingerprint` identifies its input: a commit of another input does not count.
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
        """URI of a file of this stage."""
        return "/".join([self.root.rstrip("/"), *parts])

    @contextmanager
    def create(self, *parts: str, outputs: list[dict[str, Any]]) -> Iterator[Path]:
        """A local path to write one output to; on success moved into place and put in `outputs`."""
        with output_file(self.uri(*parts)) as temporary:
            yield temporary
            record = {
                "path": "/".join(parts),
                "bytes": temporary.stat().st_size,
                "sha256": file_sha256(temporary),
            }
        outputs.append(record)

    def commit(self, commit: Commit) -> None:
        """Record that a unit is done: the last thing a unit does.

        If two processes did it, the first commit stays.

        RuntimeError if that one has another input or other bytes.
        """
        record = dataclasses.asdict(commit) | {"digest": commit.digest}
        uri = self.uri("commits", f"{commit.unit}.json")
        if not create_only(uri, json.dumps(record, indent=1).encode()):
            first = _commit(json.loads(read_bytes(uri)))
            if (first.fingerprint, first.digest) != (commit.fingerprint, commit.digest):
                raise RuntimeError(
                    f"{uri} was written by another run, from another input or with other bytes: "
                    "is one still running? Run again"
                )
        self.clear_failure(commit.unit)

    def withdraw(self, unit: str) -> None:
        """Remove a unit's commit, so that the unit will be done again."""
        remove(self.uri("commits", f"{unit}.json"))

    def fail(self, unit: str, error: dict[str, Any]) -> None:
        """Record why a unit could not be done; a later success removes the record."""
        write_atomically(self.uri("failures", f"{unit}.json"), json.dumps(error, indent=1).encode())

    def clear_failure(self, unit: str) -> None:
        """Remove the record of an earlier failure of a unit."""
        remove(self.uri("failures", f"{unit}.json"))

    def commits(self) -> dict[str, Commit]:
        """Commits of all units done so far, by unit, in order of name."""
        return {record["unit"]: _commit(record) for record in self._records("commits")}

    def list_units(self, units: Sequence[Unit]) -> None:
        """Record the units to do under this key; commits of other units no longer count."""
        listed = {unit.name: unit.fingerprint for unit in units}
        write_atomically(self.uri("units.json"), json.dumps(listed).encode())

    def listed_units(self) -> dict[str, str]:
        """Fingerprints of the units recorded last, by name."""
        try:
            listed: dict[str, str] = json.loads(read_bytes(self.uri("units.json")))
        except FileNotFoundError:
            return {}
        return listed

    def listed_commits(self) -> list[Commit]:
        """Commits of the units recorded last, in order of name, without those of another input."""
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
    ) -> "pa.Table":
        """The Parquet part that a unit wrote: its first output, or the one in the folder `kind`."""
        path = next(o["path"] for o in commit.outputs if o["path"].startswith(kind))
        with open_parquet(self.uri(path)) as file:
            return file.read(columns=columns)

    def failures(self) -> dict[str, dict[str, Any]]:
        """Units that failed and have not succeeded since, by name."""
        return {record["unit"]: record for record in self._records("failures")}

    def _records(self, kind: str) -> list[dict[str, Any]]:
        names = sorted(name for name in names_in(self.uri(kind)) if name.endswith(".json"))
        return [json.loads(data) for data in read_many([self.uri(kind, name) for name in names])]

    def clear(self, *parts: str) -> None:
        """Remove a folder of this stage if there is one: what an uncommitted unit left."""
        remove_tree(self.uri(*parts))


def _commit(record: dict[str, Any]) -> Commit:
    return Commit(**{f.name: record[f.name] for f in dataclasses.fields(Commit)})
