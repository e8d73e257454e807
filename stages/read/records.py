"""Read rows and documents from JSON and Parquet files."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field
from pydantic.dataclasses import dataclass

from filters import STRICT
from stages.read.compression import HEAD, Damaged, decompressed, kind_of, kind_of_file
from stages.read.frames import Accounts
from stages.read.json_rows import JsonRow, json_rows, read_head

# what reading a file that is cut short, damaged or of another kind raises
UNREADABLE = (OSError, EOFError, pa.ArrowException)


@dataclass(frozen=True, config=STRICT)
class InputConfig:
    """Where documents come from.

    `paths`: files, globs, folders, s3:// or http(s):// URIs, or listings (`*.paths`, compressed or
    not), whose lines are addresses or are joined to `base_uri`. jsonl inputs are JSON in any common
    layout, encoding and compression. They and parquet inputs skip extraction: the columns named
    here are read (`id_column` and `url_column` may be absent: "").

    A WARC or WET file of more than `split_bytes` is read in equal ranges, each by a unit of its
    own; 0: never. Not at http addresses, where sizes are unknown. A file that is not compressed, or
    is one gzip member, is all in the first range. A run keeps the ranges of files that it listed.
    """

    format: Literal["warc", "wet", "jsonl", "parquet"] = "warc"
    paths: tuple[str, ...] = Field(default=(), min_length=0)
    base_uri: str = "https://data.commoncrawl.org/"
    split_bytes: int = Field(default=512 << 20, ge=0)
    text_column: str = "text"
    id_column: str = ""
    url_column: str = ""


# --- documents ------------------------------------------------------------------------------------


@dataclasses.dataclass
class TextStats(Accounts):
    """The bytes of a text input that could not be read; `damage` says where they start and why."""

    damage: str = ""


class TextRecord(NamedTuple):
    """One row of a text input.

    `error` says why it holds no document, in which case text is "": 'bad_json'; 'no_text'; or
    'damaged', the last row of a file whose rest cannot be decompressed. `details` describe what is
    wrong with the file, "" for a text that is null.
    """

    position: int
    text: str
    url: str | None = None
    source_id: str | None = None
    error: str | None = None
    details: str = ""


def read_texts(
    path: Path, config: InputConfig, *, name: str, stats: TextStats
) -> Iterator[TextRecord]:
    """Rows of a JSON or Parquet file in order. A row that cannot be read is a record with `error`.

    ValueError, which calls the file `name`, if it is of another kind, lacks a configured column, or
    has rows but none that could be a document.
    """
    read = _parquet_records if config.format == "parquet" else _json_records
    is_usable, rows, details = False, 0, ""
    with _errors_name(path, name):
        for record in read(path, config, stats):
            is_usable, rows = is_usable or not record.details, rows + 1
            details = details or record.details
            yield record
        if rows and not is_usable:
            raise ValueError(f"none of {rows:,} rows can be read; {details}")


@contextmanager
def _errors_name(path: Path, name: str) -> Iterator[None]:
    """Put the name of a file, and what it is, into what reading it raises."""
    try:
        yield
    except UNREADABLE as error:
        kind = None
        with suppress(OSError):
            kind = kind_of_file(path)
        what = kind or "whole, and what its name says"
        raise ValueError(f"{name}: cannot be read ({error}); is it {what}?") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def columns_of(path: Path, config: InputConfig, *, name: str) -> list[str]:
    """Names of a file's columns, of JSON those of its first good row; [] if it has none."""
    with _errors_name(path, name):
        if config.format != "parquet":
            return list(_first_object(path))
        names: list[str] = pq.read_schema(path).names
        return names


def id_type(path: Path, config: InputConfig) -> str:
    """Arrow's name of the id column's type if it holds integers, else 'string'.

    The first good row of a JSON file decides.
    """
    if config.format == "parquet":
        type_ = (
            pq.read_schema(path).field(config.id_column).type if config.id_column else pa.string()
        )
        return str(type_) if pa.types.is_integer(type_) else "string"
    return "int64" if type(_first_object(path).get(config.id_column)) is int else "string"


def _first_object(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return next((r.value for r in _json_file_rows(file) if isinstance(r.value, dict)), {})


def _json_records(path: Path, config: InputConfig, stats: TextStats) -> Iterator[TextRecord]:
    position = -1
    with open(path, "rb") as file:
        try:
            for position, row in enumerate(_json_file_rows(file)):
                problem = row.error or f"{type(row.value).__name__}, not an object"
                yield _text_record(position, row.value, config, f"line {row.line}: {problem}")
        except Damaged as error:
            stats.lose(0, unreadable=path.stat().st_size - error.offset)
            stats.note_damage()  # a cut loses no byte that is there
            stats.damage = str(error)
            yield TextRecord(position + 1, "", error="damaged", details=str(error))


def _json_file_rows(file: BinaryIO) -> Iterator[JsonRow]:
    head, stream = read_head(decompressed(file), HEAD)
    if (kind := kind_of(head)) is not None:
        raise ValueError(f"holds {kind}, and no JSON")
    return json_rows(stream)


def _parquet_records(path: Path, config: InputConfig, stats: TextStats) -> Iterator[TextRecord]:
    columns = [c for c in (config.text_column, config.id_column, config.url_column) if c]
    rows = parquet_rows(path, columns, text_column=config.text_column)
    for position, row in enumerate(rows):
        yield _text_record(position, row, config, "")


def _text_record(position: int, row: Any, config: InputConfig, problem: str) -> TextRecord:
    if not isinstance(row, dict):
        return TextRecord(position, "", error="bad_json", details=problem)
    url = _optional_string(row.get(config.url_column)) if config.url_column else None
    source_id = _optional_string(row.get(config.id_column)) if config.id_column else None
    text = row.get(config.text_column)
    if isinstance(text, bytes):  # Spark writes strings as binary by default
        text = text.decode("utf-8", "replace")
    if not isinstance(text, str):
        absent = config.text_column not in row
        details = _no_column(config.text_column, row) if absent else ""
        return TextRecord(position, "", url, source_id, "no_text", details)
    # Arrow strings and C libraries take neither lone surrogates (which JSON can escape) nor NULs
    text = text.encode("utf-8", "replace").decode().replace("\0", "")
    return TextRecord(position, text, url, source_id)


def _optional_string(value: Any) -> str | None:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    return None if value is None else str(value).encode("utf-8", "replace").decode()


def _no_column(column: str, names: Iterable[str]) -> str:
    return (
        f"no column '{column}'; it has {', '.join(names)}; set text_column, id_column or url_column"
    )


# --- rows of Parquet files ------------------------------------------------------------------------


class WrongColumn(ValueError):
    """A Parquet file has no such column, or no text in it."""


def parquet_rows(
    source: Path | pa.NativeFile,
    columns: Sequence[str] | None = None,
    *,
    text_column: str | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet file, with all columns or the named ones.

    WrongColumn if one is absent, or if `text_column` cannot hold text. Where a string of a batch is
    not UTF-8, its strings are bytes.
    """
    with pq.ParquetFile(source) as file:
        schema = file.schema_arrow
        for column in columns or ():
            if column not in schema.names:
                raise WrongColumn(_no_column(column, schema.names))
        if text_column is not None and not _may_be_text(schema.field(text_column).type):
            raise WrongColumn(f"column '{text_column}' holds {schema.field(text_column).type}")
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            try:
                yield from batch.to_pylist()
            except UnicodeDecodeError:
                yield from _with_bytes(batch).to_pylist()


def _may_be_text(type_: pa.DataType) -> bool:
    of = type_.value_type if pa.types.is_dictionary(type_) else type_
    is_a = pa.types
    return any(
        test(of)
        for test in (is_a.is_string, is_a.is_large_string, is_a.is_string_view, is_a.is_binary,
                     is_a.is_large_binary, is_a.is_null)
    )  # fmt: skip


def _with_bytes(batch: pa.RecordBatch) -> pa.RecordBatch:
    columns = [
        column.cast(pa.large_binary()) if _may_be_text(column.type) else column
        for column in batch.columns
    ]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)
