"""The inputs of a run: its append-only list, from whose numbers document ids are made."""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from stages.formats.errors import ConfigError
from stages.read.listing import expand_inputs, fingerprint
from stages.read.ranges import WHOLE, ByteRange, equal_ranges
from stages.read.records import InputConfig, TextStats, WrongColumn, read_texts
from stages.storage.files import (
    exists,
    is_local,
    open_fs,
    read_bytes,
    scratch_folder,
    write_atomically,
)
from stages.storage.parts import unit_name

_CHECKED_FILES, _CHECKED_ROWS, _CHECKED_BYTES = 16, 1000, 1 << 20
_AT_ONCE = 10_000  # a task that waits for a thread takes 2 kB


class Input(NamedTuple):
    """An input file, or a range of it: its number in the run's list, its path, and what identifies
    the content of the file, "" if that was not looked at.
    """

    ordinal: int
    path: str
    fingerprint: str = ""
    byte_range: ByteRange = WHOLE

    @property
    def unit(self) -> str:
        """Name of the units that this input makes."""
        return unit_name(self.ordinal)

    @property
    def identity(self) -> str:
        """What identifies the content of the input."""
        return self.fingerprint + self.byte_range.name

    @property
    def bytes(self) -> int | None:
        """Size in bytes; None for an http address, which would have to be requested."""
        size = _size_of(self.fingerprint)
        return None if size is None else self.byte_range.size(size)


def list_inputs(root: str, config: InputConfig) -> list[Input]:
    """The inputs that the configuration names, numbered: new ones after those in the list."""
    paths = expand_inputs(list(config.paths), base_uri=config.base_uri)
    paths = [p for p in paths if not p.startswith(f"{root}/")]  # a run does not read its own output
    return number_inputs(paths, config, listed=read_list(root))


def number_inputs(
    paths: Sequence[str], config: InputConfig, *, listed: Sequence[Input]
) -> list[Input]:
    """The inputs that some files make: as they are listed, or else numbered after these.

    The ranges of a file that was listed stay: document ids are made from them.
    """
    by_path: dict[str, list[Input]] = {}
    for input in listed:
        by_path.setdefault(input.path, []).append(input)
    numbers = itertools.count(max((i.ordinal for i in listed), default=-1) + 1)
    split_bytes = config.split_bytes if config.format in ("warc", "wet") else 0
    fingerprints: list[str] = []
    with ThreadPoolExecutor(32) as pool:
        for first in range(0, len(paths), _AT_ONCE):
            fingerprints += pool.map(_fingerprint, paths[first : first + _AT_ONCE])
    inputs: list[Input] = []
    for path, identity in zip(paths, fingerprints, strict=True):
        if path in by_path:
            # the path that is equal, so that memory holds it once
            inputs += (i._replace(path=path, fingerprint=identity) for i in by_path[path])
            continue
        ranges = equal_ranges(_size_of(identity), split_bytes)
        inputs += (Input(next(numbers), path, identity, r) for r in ranges)
    return inputs


def whole_files(inputs: Iterable[Input]) -> list[Input]:
    """The files of some inputs, each once, under the number of its first range."""
    firsts: dict[str, Input] = {}
    for input in inputs:
        firsts.setdefault(input.path, input._replace(byte_range=WHOLE))
    return list(firsts.values())


def extend_list(root: str, inputs: Sequence[Input]) -> None:
    """Add inputs to the run's list, if they are new."""
    listed = read_list(root)
    numbers = {i.ordinal for i in listed}
    if new := [i for i in inputs if i.ordinal not in numbers]:
        write_list(root, [*listed, *new])


def require_columns(inputs: Sequence[Input], config: InputConfig) -> None:
    """ConfigError if all inputs lack a configured column: then the configuration is wrong.

    A few inputs and the first rows of each are looked at; on an object store, those in its first
    MB. Single inputs, what cannot be read, and http addresses are left to the units.
    """
    if config.format not in ("jsonl", "parquet"):
        return
    paths = [i.path for i in inputs[:: max(1, len(inputs) // _CHECKED_FILES)]]
    with ThreadPoolExecutor(_CHECKED_FILES) as pool:
        faults = list(pool.map(lambda path: _column_fault(path, config), paths))
    if faults and all(faults):
        raise ConfigError(f"{faults[0]} (all {len(faults)} inputs that were looked at)")


def _column_fault(path: str, config: InputConfig) -> str | None:
    """What is wrong with the columns of an input, None if nothing is, as far as can be seen."""
    fault = None
    try:
        with _beginning(path, config) as file:
            rows = read_texts(file, config, name=path, stats=TextStats()) if file else ()
            for row in islice(rows, _CHECKED_ROWS):
                if not row.details:
                    return None
                if row.error == "no_text" and fault is None:
                    fault = f"{path}: {row.details}"
    except (OSError, ValueError, pa.ArrowException) as error:
        return str(error) if isinstance(error.__cause__, WrongColumn) else fault
    return fault


@contextmanager
def _beginning(path: str, config: InputConfig) -> Iterator[Path | None]:
    """A local file with the columns and first rows of an input; None for an http address."""
    if is_local(path):
        yield Path(path)
    elif path.startswith(("http://", "https://")):
        yield None
    else:
        fs, name = open_fs(path)
        with scratch_folder("gristmill-columns") as folder:
            file = folder / Path(name).name
            if config.format == "parquet":
                with fs.open(name) as stream, pq.ParquetFile(stream) as table:
                    pq.write_table(table.schema_arrow.empty_table(), file)
            else:
                file.write_bytes(fs.cat_file(name, start=0, end=_CHECKED_BYTES))
            yield file


def read_list(root: str) -> list[Input]:
    """Each input that was ever listed; none if there is no list."""
    uri = f"{root}/inputs.jsonl"
    return [parse_entry(json.loads(e)) for e in read_bytes(uri).splitlines()] if exists(uri) else []


def write_list(root: str, inputs: Iterable[Input]) -> None:
    """Replace the list of inputs."""
    lines = [json.dumps(entry(i)) + "\n" for i in inputs]
    write_atomically(f"{root}/inputs.jsonl", "".join(lines).encode())


def entry(input: Input) -> dict[str, Any]:
    """An input as a list has it: number and path, and the range if it is not a whole file."""
    of_file = {"ordinal": input.ordinal, "path": input.path}
    return of_file if input.byte_range == WHOLE else of_file | input.byte_range._asdict()


def parse_entry(entry: Mapping[str, Any]) -> Input:
    """The input of an entry of a list."""
    byte_range = ByteRange(entry.get("start", 0), entry.get("end"))
    return Input(entry["ordinal"], entry["path"], byte_range=byte_range)


def _size_of(fingerprint: str) -> int | None:
    """The size in bytes that a fingerprint begins with, None if that is unknown."""
    size = fingerprint.partition(":")[0]
    return int(size) if size.isdecimal() else None


def _fingerprint(path: str) -> str:
    try:
        return fingerprint(path)
    except FileNotFoundError:
        return "missing"  # its unit will fail and say so; the others go on
