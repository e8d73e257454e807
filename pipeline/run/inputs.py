"""The inputs of a run: its append-only list, from whose numbers document ids are made."""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from stages.formats.errors import ConfigError
from stages.read.listing import expand_inputs, fingerprint
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


class Input(NamedTuple):
    """An input file: its number in the run's list, its path, and what identifies its content."""

    ordinal: int
    path: str
    fingerprint: str

    @property
    def unit(self) -> str:
        """Name of the units that this input makes."""
        return unit_name(self.ordinal)

    @property
    def bytes(self) -> int | None:
        """Size of a file or object; None for an http address, which would have to be requested."""
        size = self.fingerprint.partition(":")[0]
        return int(size) if size.isdecimal() else None


def list_inputs(root: str, config: InputConfig) -> list[Input]:
    """The inputs that the configuration names, numbered: new ones after those in the list."""
    numbers = input_numbers(root)
    paths = expand_inputs(list(config.paths), base_uri=config.base_uri)
    paths = [p for p in paths if not p.startswith(f"{root}/")]  # a run does not read its own output
    for path in paths:
        numbers.setdefault(path, len(numbers))
    with ThreadPoolExecutor(32) as pool:
        fingerprints = list(pool.map(_fingerprint, paths))
    return [Input(numbers[p], p, f) for p, f in zip(paths, fingerprints, strict=True)]


def extend_list(root: str, inputs: Sequence[Input]) -> None:
    """Add inputs to the run's list, if they are new."""
    write_numbers(root, input_numbers(root) | {i.path: i.ordinal for i in inputs})


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


def input_numbers(root: str) -> dict[str, int]:
    """Number of each input that was ever listed, by path; none if there is no list."""
    uri = f"{root}/inputs.jsonl"
    if not exists(uri):
        return {}
    return {r["path"]: r["ordinal"] for r in map(json.loads, read_bytes(uri).splitlines())}


def write_numbers(root: str, numbers: Mapping[str, int]) -> None:
    """Replace the list of inputs: the number of each, by path."""
    lines = [json.dumps({"ordinal": n, "path": p}) + "\n" for p, n in numbers.items()]
    write_atomically(f"{root}/inputs.jsonl", "".join(lines).encode())


def _fingerprint(path: str) -> str:
    try:
        return fingerprint(path)
    except FileNotFoundError:
        return "missing"  # its unit will fail and say so; the others go on
