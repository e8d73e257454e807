"""Read the texts of evaluation sets, whatever the format of their files."""

import csv
import io
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa

from stages.read.compression import COMPRESSED_SUFFIXES, decompressed
from stages.read.json_rows import json_rows
from stages.read.listing import is_input
from stages.read.records import (
    UNREADABLE,
    parquet_rows,
)
from stages.storage.digests import bytes_sha256

_FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
# names of files that are a part of a set, and folders that do not name one
_PART = re.compile(r"(test|train|dev|val|valid|validation|eval)(-\d+-of-\d+)?")
_GENERIC = re.compile(r"data|main|default")


class EvaluationFile(NamedTuple):
    """The strings of a file's rows, in order; None for a row that could not be read."""

    benchmark: str
    name: str
    sha256: str
    rows: list[list[str] | None]


def evaluation_files(path: str) -> Iterator[EvaluationFile]:
    """The evaluation files at a path: a .jsonl, .json, .csv, .tsv or .parquet file, a folder or a
    .tar archive of them.

    Any may be compressed (gzip, zstd, xz, bzip2). A file is a set named after the file, without
    suffixes; but gsm8k/test.jsonl belongs to gsm8k, and all files like
    mmlu/data/test/anatomy_test.csv to mmlu. 'NAME=PATH' makes one set, NAME, of all files at a
    path. ValueError names a file that cannot be read.
    """
    name, _, location = path.partition("=")
    if not location or Path(path).exists():
        name, location = "", path
    try:
        members = list(_members(Path(location)))
    except (*UNREADABLE, tarfile.TarError) as error:
        raise unreadable(location, error) from None
    if not members:
        raise ValueError(
            f"{location}: holds no evaluation file; they end in {', '.join(_FORMATS)}, or in these "
            "and .gz, .zst, .xz or .bz2; name a .tar archive itself, not its folder"
        )
    for place, data in members:
        rows = list(_string_rows(place, data))
        if not any(row is not None for row in rows):
            raise ValueError(
                f"{location}: of the {len(rows)} rows of {place} none could be read; "
                "is it what its name says?"
            )
        yield EvaluationFile(name or benchmark_of(place), place.name, bytes_sha256(data), rows)


def benchmark_of(place: PurePosixPath) -> str:
    """The set of a file: its name, or its folder's where the name only says which part it is."""
    *folders, stem = *place.parts[:-1], place.name.split(".")[0]
    inside = [f for f in folders if not _PART.fullmatch(f) and not _GENERIC.fullmatch(f)]
    in_part = folders and _PART.fullmatch(folders[-1]) and stem.endswith(f"_{folders[-1]}")
    return inside[-1] if inside and (in_part or _PART.fullmatch(stem)) else stem


def read_plain_text(path: str) -> str:
    """A .txt file, which may be compressed; ValueError if it cannot be read."""
    try:
        return _decompress(Path(path).read_bytes()).decode("utf-8", "replace")
    except UNREADABLE as error:
        raise unreadable(f"background {path}", error) from None


def unreadable(path: str, error: Exception) -> ValueError:
    """The error for a file that is cut short, damaged or of another kind."""
    return ValueError(f"{path}: cannot be read ({error}); is it whole, and what its name says?")


def format_of(path: PurePath) -> str:
    """The suffix that says what a file holds: '.jsonl' of a.jsonl.gz, '.tar' of a.tgz."""
    suffix = next((s for s in reversed(path.suffixes) if s not in COMPRESSED_SUFFIXES), "")
    return ".tar" if suffix == ".tgz" else suffix


# --- files ----------------------------------------------------------------------------------------


def _members(path: Path) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Evaluation files, decompressed, with their places.

    A place in a folder begins with that folder's name, one in an archive is that of the archive.
    """
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            below = file.relative_to(path)
            if file.is_file() and format_of(file) in _FORMATS and is_input(below.as_posix()):
                place = PurePosixPath(path.resolve().name, *below.parts)
                yield place, _decompress(file.read_bytes())
        return
    data = _decompress(path.read_bytes())
    if format_of(path) in _FORMATS:
        yield PurePosixPath(path.resolve()), data
    elif format_of(path) == ".tar":
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for member in archive:
                place = PurePosixPath(member.name)
                is_set = format_of(place) in _FORMATS and is_input(place.as_posix())
                if member.isfile() and is_set:
                    content = archive.extractfile(member)
                    assert content is not None  # it is a file
                    yield place, _decompress(content.read())


def _decompress(data: bytes) -> bytes:
    return decompressed(io.BytesIO(data)).read()


# --- rows -----------------------------------------------------------------------------------------


def _string_rows(place: PurePosixPath, data: bytes) -> Iterator[list[str] | None]:
    """The strings of each row, None for one that cannot be read."""
    format_ = format_of(place)
    if format_ in (".csv", ".tsv"):
        yield from _csv_rows(data, delimiter="," if format_ == ".csv" else "\t")
    elif format_ == ".parquet":
        try:
            yield from map(_strings, parquet_rows(pa.BufferReader(data)))
        except pa.ArrowException as error:
            raise ValueError(f"{place}: cannot be read as Parquet ({error})") from None
    elif format_ == ".json" and (value := _json_value(data)) is not None:
        yield from map(_strings, _rows_in(value))
    else:  # .json files of many lines are common too
        for row in json_rows(io.BytesIO(data), arrays_are="rows"):
            yield None if row.value is None else _strings(row.value)


def _json_value(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _rows_in(value: Any) -> list[Any]:
    """The rows of a JSON value: a list, or the lists of an object, its parts or its columns.

    {"train": [...], "test": [...]} has parts; in columns, as many values stand in every list.
    """
    if isinstance(value, list):
        return value
    lists = [v for v in value.values() if isinstance(v, list)] if isinstance(value, dict) else []
    rows = [row for rows in lists for row in rows]
    are_columns = len(lists) > 1 and len(set(map(len, lists))) == 1
    if are_columns and not all(isinstance(row, dict) for row in rows):
        return [list(row) for row in zip(*lists, strict=True)]
    return rows if lists else [value]


def _csv_rows(data: bytes, *, delimiter: str) -> Iterator[list[str] | None]:
    text = io.StringIO(data.decode("utf-8-sig", "replace"), newline="")
    reader = csv.reader(text, delimiter=delimiter)
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error:  # a cell of more than 128 kB, which an open quote makes
            yield None


def _strings(row: Any) -> list[str]:
    """All strings in a row, in reading order, without the keys of objects."""
    strings, pending = [], [row]
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            strings.append(value)
        elif isinstance(value, dict | list):
            pending.extend(reversed(list(value.values()) if isinstance(value, dict) else value))
    return strings
