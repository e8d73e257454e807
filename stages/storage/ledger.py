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
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import ValidationError
from pydantic.dataclasses import dataclass as validated

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
    import pyarrow.parquet as pq


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
class Output:
    """A file that a unit wrote: `path` below the phase's folder, size in bytes, hex sha256."""

    path: str
    bytes: int
    sha256: str

    @property
    def kind(self) -> str:
        """The folder of the file, such as "corpus"."""
        return self.path.partition("/")[0]


@validated
class Commit:
    """What one unit did.

    `counts` are rows by reason ("kept" included). `result` is the phase's own frozen dataclass, or
    None. `notes` are figures that a wrapper around the work adds (`gristmill estimate`). `finished`
    is in Unix seconds, 0.0 until the unit is committed.
    """

    unit: str
    fingerprint: str
    rows_in: int = 0
    rows_out: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    result: Any = None
    notes: dict[str, float | str] = field(default_factory=dict)
    outputs: list[Output] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    finished: float = 0.0

    @property
    def digest(self) -> str:
        """Identity of everything the unit wrote; equal bytes give equal digests."""
        return digest([f"{o.path}:{o.sha256}" for o in self.outputs])

    def output(self, kind: str = "") -> Output:
        """The first file of a kind, or of any kind; ValueError if there is none."""
        for output in self.outputs:
            if kind in ("", output.kind):
                return output
        raise ValueError(f"unit {self.unit} wrote no file of kind '{kind}'")


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
            first = self._decode_commit(json.loads(read_bytes(uri)))
            if (first.fingerprint, first.digest) != (commit.fingerprint, commit.digest):
                raise RuntimeError(
                    f"{uri} was written by another run, from another input or with other bytes: "
                    "is one still running? Run again"
                )
        self.clear_failure(commit.unit)

    def withdraw(self, unit: str) -> None:
        """Remove a unit's commit, so that the unit will be done again."""
        remove(self.uri("commits", f"{unit}.json"))

    def fail(self, failure: Failure) -> None:
        """Record why a unit could not be done; a later success removes the record."""
        data = json.dumps(dataclasses.asdict(failure), indent=1, default=str).encode()
        write_atomically(self.uri("failures", f"{failure.unit}.json"), data)

    def clear_failure(self, unit: str) -> None:
        """Remove the record of an earlier failure of a unit."""
        remove(self.uri("failures", f"{unit}.json"))

    def commits(self) -> dict[str, Commit]:
        """Commits of all units done so far, by unit, in order of name."""
        return {record["unit"]: self._decode_commit(record) for record in self._records("commits")}

    def list_units(self, units: Sequence[Unit]) -> None:
        """Record the units to do under this key; commits of other units no longer count."""
        listed = {unit.name: unit.fingerprint for unit in units}
        write_atomically(self.uri("units.json"), json.dumps(listed).encode())

    def listed_units(self) -> dict[str, str]:
        """Fingerprints of the units recorded last, by name."""
        listed: dict[str, str] = {}
        with suppress(FileNotFoundError):
            listed = json.loads(read_bytes(self.uri("units.json")))
        return listed

    def listed_commits(self) -> list[Commit]:
        """Commits of the units recorded last, in order of name, without those of another input."""
        listed = self.listed_units()
        return [c for c in self.commits().values() if listed.get(c.unit) == c.fingerprint]

    def commit_of(self, unit: str) -> Commit | None:
        """The commit of one unit, or None."""
        with suppress(FileNotFoundError):
            return self._decode_commit(json.loads(read_bytes(self.uri("commits", f"{unit}.json"))))
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
        names = sorted(name for name in names_in(self.uri(kind)) if name.endswith(".json"))
        return [json.loads(data) for data in read_many([self.uri(kind, name) for name in names])]

    def clear(self, *parts: str) -> None:
        """Remove a folder of this stage if there is one: what an uncommitted unit left."""
        remove_tree(self.uri(*parts))

    def _decode_commit(self, record: dict[str, Any]) -> Commit:
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
