"""The run ledger: which units of each stage are done, with their inputs and outputs. All on disk.

    RUN/<stage>/<key>/<kind>/<unit>.parquet      outputs of a unit
    RUN/<stage>/<key>/commits/<unit>.json        its commit: written last, atomically
    RUN/<stage>/<key>/sealed/<number>.parquet    a segment: many commits in one file
    RUN/<stage>/<key>/units.json                 units of the last run under this key: fingerprints
    RUN/<stage>/<key>/failures/<unit>.json       why it failed; the next run tries it again

A unit writes its outputs under temporary names, renames them, and then writes its commit. A crash
at any moment leaves garbage, never a false record. Paths are URIs: local disk or object storage.

Of a million units, commits as files of their own would take an hour to list and read. So the
driver, which holds the lease, seals them: it writes a segment, then removes the single files. What
keeps that safe at any moment, through kills and retries:

    - Only a commit whose outcome the driver has is sealed: no worker of this run needs its file.
    - A single file counts more than a segment, and a later segment more than an earlier one: a kill
      between the two steps leaves the same commit twice.
    - A unit that will be done has no sealed commit: the driver withdraws one of another input
      first. So workers look at single files alone (`loose_commit`). If Ray retries a task whose
      commit is sealed, it does the same work again: the same bytes, the same commit.

An object store has no rename and needs none: a PUT becomes visible whole or not at all. A multipart
upload that was cut off is never visible but costs money: give the bucket a lifecycle rule that
aborts incomplete multipart uploads.
"""

import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import ValidationError
from pydantic.dataclasses import dataclass as validated
from pydantic_core import from_json

from stages.storage.commits import Commit as Commit
from stages.storage.commits import Commits as Commits
from stages.storage.commits import Output as Output
from stages.storage.commits import input_key, pack, unit_order, without
from stages.storage.digests import file_sha256
from stages.storage.files import (
    create_only,
    names_in,
    open_parquet,
    output_file,
    read_bytes,
    read_present,
    remove,
    remove_many,
    remove_tree,
    write_atomically,
)

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

SEGMENT = 10_000  # commits of a segment


class Unit(NamedTuple):
    """One piece of a phase's work.

    `fingerprint` identifies its input: a commit with another fingerprint does not count. `task` is
    the phase's own frozen dataclass. `bytes` is the size of the input, 0 where it is unknown: the
    largest units start first.
    """

    name: str
    fingerprint: str
    task: Any
    bytes: int = 0


@validated(frozen=True)
class Failure:
    """Why a unit could not be done.

    `task` is for a person to read. `quarantined` is the fingerprint of an input that killed its
    worker too often, None for an ordinary error; `attempts` is what is known of each such death.
    """

    unit: str
    error: str
    task: Any = None
    traceback: str = ""
    quarantined: str | None = None
    attempts: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Store:
    """The folder of one phase under one key.

    `result` is the type of its commits' results: without it, results are left out when commits are
    read.
    """

    root: str
    result: type | None = None

    def uri(self, *parts: str) -> str:
        """URI of a file of this stage."""
        return "/".join([self.root.rstrip("/"), *parts])

    @contextmanager
    def create(self, *parts: str, outputs: list[Output]) -> Iterator[Path]:
        """A local path to write one output to; on success it is moved into place and recorded in
        `outputs`.
        """
        with output_file(self.uri(*parts)) as temporary:
            yield temporary
            output = Output("/".join(parts), temporary.stat().st_size, file_sha256(temporary))
        outputs.append(output)

    def commit(self, commit: Commit) -> None:
        """Record that a unit is done: the last thing a unit does. If two processes did it, the
        first commit stays.

        RuntimeError if that one has another input or other bytes.
        """
        record = dataclasses.asdict(commit) | {"digest": commit.digest}
        uri = self.uri("commits", f"{commit.unit}.json")
        if not create_only(uri, json.dumps(record, indent=1).encode()):
            first = self._decode(from_json(read_bytes(uri)))
            if (first.fingerprint, first.digest) != (commit.fingerprint, commit.digest):
                raise RuntimeError(
                    f"{uri} was written by another run, from another input or with other bytes: "
                    "is one still running? Run again"
                )
        self.clear_failure(commit.unit)

    def withdraw(self, unit: str) -> None:
        """Remove the commit of a unit that a worker does, so that the unit will be done again."""
        remove(self.uri("commits", f"{unit}.json"))

    def withdraw_all(self, units: Collection[str]) -> None:
        """Remove commits of units, sealed or not. Only under the lease."""
        # the oldest first: after a crash, none may count that another had replaced
        for name in self._segments() if units else ():
            uri = self.uri("sealed", name)
            rest = without(uri, units)
            if rest is not None:  # an empty one stays: its number must not be used again
                write_atomically(uri, rest)
        remove_many([self.uri("commits", f"{unit}.json") for unit in units])

    def seal(self, commits: Sequence[Commit]) -> str:
        """Replace the files of commits by a segment, and return its URI. Only under the lease, and
        for units that no worker does any more. RuntimeError if another process seals as well.
        """
        names = self._segments()
        number = int(names[-1].removesuffix(".parquet")) + 1 if names else 0
        uri = self.uri("sealed", f"{number:06d}.parquet")
        if not create_only(uri, pack(commits)):
            raise RuntimeError(f"{uri} was written by another run: is one still running? Run again")
        remove_many([self.uri("commits", f"{commit.unit}.json") for commit in commits])
        return uri

    def is_segment(self, loose: Collection[str]) -> bool:
        """Whether so many commits are to be sealed."""
        return len(loose) >= SEGMENT

    def seal_loose(self) -> None:
        """Seal what earlier runs left in files of its own, if it is much. Only under the lease,
        before the workers start.
        """
        for commits in self._loose_commits():
            if len(commits) == SEGMENT:
                self.seal(commits)

    def fail(self, failure: Failure) -> None:
        """Record why a unit could not be done; a later success removes the record."""
        data = json.dumps(dataclasses.asdict(failure), indent=1, default=str).encode()
        write_atomically(self.uri("failures", f"{failure.unit}.json"), data)

    def clear_failure(self, unit: str) -> None:
        """Remove the record of an earlier failure of a unit."""
        remove(self.uri("failures", f"{unit}.json"))

    def commits(self) -> Commits:
        """Commits of all units done so far, the newest of each unit."""
        last, packed = list[Commit](), list[bytes]()
        for commits in self._loose_commits():
            packed += [pack(last)] if last else []
            last = commits
        # after the single files: what is sealed meanwhile is in one of both
        sealed = [self.uri("sealed", name) for name in self._segments()]
        return Commits(last, segments=[*sealed, *packed], decode=self._decode)

    def list_units(self, units: Sequence[Unit]) -> None:
        """Record the units to do under this key; commits of other units no longer count."""
        pieces = []  # of the text: all at once, a million units would take a gigabyte
        for first in range(0, len(units), SEGMENT):
            listed = {unit.name: unit.fingerprint for unit in units[first : first + SEGMENT]}
            pieces.append(json.dumps(listed)[1:-1].encode())
        write_atomically(self.uri("units.json"), b"{" + b", ".join(pieces) + b"}")

    def listed_units(self) -> dict[str, str]:
        """Fingerprints of the units recorded last, by name."""
        listed: dict[str, str] = {}
        with suppress(FileNotFoundError):
            listed = from_json(read_bytes(self.uri("units.json")))
        return listed

    def listed_commits(self, listed: Mapping[str, str] | None = None) -> Commits:
        """Commits of the units recorded last (`listed_units`), without those of another input."""
        import pyarrow as pa

        listed = self.listed_units() if listed is None else listed
        keys = pa.array([input_key(unit, f) for unit, f in listed.items()], pa.string())
        return self.commits().select(keys)

    def commit_of(self, unit: str) -> Commit | None:
        """The commit of one unit, or None. `loose_commit` costs less."""
        if commit := self.loose_commit(unit):
            return commit
        for name in reversed(self._segments()):
            uri = self.uri("sealed", name)
            if unit in _units_of(uri):
                for commit in Commits(segments=[uri], decode=self._decode):
                    if commit.unit == unit:
                        return commit
        return None

    def loose_commit(self, unit: str) -> Commit | None:
        """The commit of one unit, or None if it has none or a sealed one. Enough for a worker."""
        with suppress(FileNotFoundError):
            return self._decode(from_json(read_bytes(self.uri("commits", f"{unit}.json"))))
        return None

    def read_part(self, commit: Commit, kind: str = "") -> "pa.Table":
        """The Parquet part that a unit wrote: its first output, or the one in the folder `kind`."""
        with open_parquet(self.uri(commit.output(kind).path)) as file:
            return file.read()

    @contextmanager
    def part_writer(
        self, kind: str, name: str, schema: "pa.Schema", *, commit: Commit
    ) -> "Iterator[pq.ParquetWriter]":
        """A writer for a Parquet part of a unit, in the folder `kind`."""
        import pyarrow.parquet as pq

        with (
            self.create(kind, f"{name}.parquet", outputs=commit.outputs) as path,
            pq.ParquetWriter(path, schema, compression="zstd") as writer,
        ):
            yield writer

    def write_part(self, table: "pa.Table", kind: str, name: str, *, commit: Commit) -> None:
        """Write a Parquet part of a unit, whole, to the folder `kind`."""
        with self.part_writer(kind, name, table.schema, commit=commit) as writer:
            writer.write_table(table)

    def failures(self) -> dict[str, Failure]:
        """Units that failed and have not succeeded since, by name."""
        failures = {}
        for record in self._records("failures"):
            # earlier versions wrote set_aside
            record.setdefault("quarantined", record.get("set_aside"))
            failures[record["unit"]] = Failure(**record)
        return failures

    def _records(self, kind: str) -> list[dict[str, Any]]:
        return [json.loads(data) for data in read_present(self._files(kind))]

    def _files(self, kind: str) -> list[str]:
        """URIs of JSON files of units, in order of units."""
        names = (n.removesuffix(".json") for n in names_in(self.uri(kind)) if n.endswith(".json"))
        return [self.uri(kind, f"{name}.json") for name in sorted(names, key=unit_order)]

    def _segments(self) -> list[str]:
        """Names of the segments, the oldest first."""
        return sorted(name for name in names_in(self.uri("sealed")) if name.endswith(".parquet"))

    def _loose_commits(self) -> Iterator[list[Commit]]:
        """Commits in files of their own, a segment's worth at a time; removed ones are left out."""
        uris = self._files("commits")
        for first in range(0, len(uris), SEGMENT):
            yield [
                self._decode(from_json(data))
                for data in read_present(uris[first : first + SEGMENT])
            ]

    def clear(self, *parts: str) -> None:
        """Remove a folder of this stage if there is one: what an uncommitted unit left."""
        remove_tree(self.uri(*parts))

    def _decode(self, record: dict[str, Any]) -> Commit:
        """A commit from its JSON record; ValueError if the record is not one of this phase."""
        try:
            fields = _with_typed_result(record, self.result)
            result = self.result and self.result(**fields["result"])
            return Commit(**{**fields, "result": result})
        except (KeyError, TypeError, ValidationError) as error:
            raise ValueError(
                f"{self.uri('commits')}: the commit of unit {record.get('unit')} is not of this "
                f"version ({error}); remove it, and its unit is done again"
            ) from error


def _with_typed_result(record: dict[str, Any], result: type | None) -> dict[str, Any]:
    """The record, with `totals` and `extra` of earlier versions turned into `result`."""
    if "extra" not in record:
        return dict(record)
    earlier = {**record["totals"], **record["extra"]}
    names = {f.name for f in dataclasses.fields(result)} if result is not None else set()
    fields = {name: value for name, value in earlier.items() if name in names}
    return {**record, "result": fields, "finished": earlier.get("finished", 0.0)}


@lru_cache(maxsize=1024)
def _units_of(uri: str) -> frozenset[str]:
    """The units of a segment, or of what it was before some were withdrawn."""
    with open_parquet(uri) as file:
        return frozenset(file.read(columns=["unit"])["unit"].to_pylist())
