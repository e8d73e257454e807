"""Read rows and documents from JSONL (plain, gzip, zstd) and Parquet files."""

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import IO, Any, BinaryIO, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from pydantic import Field
from pydantic.dataclasses import dataclass

from filters import STRICT

# what reading a file that is cut short, damaged or of another kind raises
UNREADABLE = (OSError, EOFError, zlib.error, zstandard.ZstdError, pa.ArrowException)

Compression = Literal["gzip", "zstd"] | None


@dataclass(frozen=True, config=STRICT)
class InputConfig:
    """Where documents come from.

    `paths`: files, globs, folders, s3:// or http(s):// URIs, or Common Crawl `*.paths.gz` listings,
    whose lines are joined to `base_uri`. jsonl and parquet inputs skip extraction: the columns
    named here are read (`id_column` and `url_column` may be absent: "").
    """

    format: Literal["warc", "wet", "jsonl", "parquet"] = "warc"
    paths: tuple[str, ...] = Field(default=(), min_length=0)
    base_uri: str = "https://data.commoncrawl.org/"
    text_column: str = "text"
    id_column: str = ""
    url_column: str = ""


# --- documents ------------------------------------------------------------------------------------


class TextRecord(NamedTuple):
    """One row of a text input.

    `error` says why it holds no document ('bad_json', 'no_text'), in which case text is "".
    """

    position: int
    text: str
    url: str | None = None
    source_id: str | None = None
    error: str | None = None


def read_texts(path: Path, config: InputConfig) -> Iterator[TextRecord]:
    """Rows of a JSONL or Parquet file in order. A row that cannot be read is a record with `error`.

    ValueError when a Parquet file lacks a configured column: then no row of it can be right.
    """
    columns = [c for c in (config.text_column, config.id_column, config.url_column) if c]
    is_parquet = config.format == "parquet"
    rows = parquet_rows(path, columns) if is_parquet else _jsonl_values(path)
    for position, row in enumerate(rows):
        yield _text_record(position, row, config)


def _text_record(position: int, row: Any, config: InputConfig) -> TextRecord:
    if not isinstance(row, dict):
        return TextRecord(position, "", error="bad_json")
    url = _optional_string(row.get(config.url_column)) if config.url_column else None
    source_id = _optional_string(row.get(config.id_column)) if config.id_column else None
    text = row.get(config.text_column)
    if isinstance(text, bytes):  # Spark writes strings as binary by default
        text = text.decode("utf-8", "replace")
    if not isinstance(text, str):
        return TextRecord(position, "", url, source_id, "no_text")
    # Arrow strings and C libraries take neither lone surrogates (which JSON can escape) nor NULs
    text = text.encode("utf-8", "replace").decode().replace("\0", "")
    return TextRecord(position, text, url, source_id)


def _optional_string(value: Any) -> str | None:
    return None if value is None else str(value).encode("utf-8", "replace").decode()


def columns_of(path: Path, config: InputConfig) -> list[str]:
    """Names of a file's columns, of JSONL those of its first good row; [] if it has none."""
    if config.format == "parquet":
        names: list[str] = pq.read_schema(path).names
        return names
    return list(_first_object(path))


def id_type(path: Path, config: InputConfig) -> str:
    """Arrow's name of the id column's type if it holds integers, else 'string'.

    The first good row of a JSONL file decides.
    """
    if config.format == "parquet":
        type_ = (
            pq.read_schema(path).field(config.id_column).type if config.id_column else pa.string()
        )
        return str(type_) if pa.types.is_integer(type_) else "string"
    return "int64" if type(_first_object(path).get(config.id_column)) is int else "string"


def _first_object(path: Path) -> dict[str, Any]:
    return next((value for value in _jsonl_values(path) if isinstance(value, dict)), {})


def _jsonl_values(path: Path) -> Iterator[Any]:
    with open(path, "rb") as file:
        # by content, not by name: a download may have lost its suffix
        magic = file.read(4)
        file.seek(0)
        compression: Compression = None
        if magic.startswith(b"\x1f\x8b"):
            compression = "gzip"
        elif magic == b"\x28\xb5\x2f\xfd":
            compression = "zstd"
        for line in json_lines(decompressed(file, compression)):
            yield line.value


# --- rows -----------------------------------------------------------------------------------------


class JsonLine(NamedTuple):
    """A line of a JSONL file; if it is not JSON, `error` says why and `value` is None."""

    number: int
    value: Any
    error: str | None = None


def json_lines(lines: Iterable[bytes]) -> Iterator[JsonLine]:
    """The lines of a JSONL file, numbered from 1, without blank ones and byte order marks."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield JsonLine(number, json.loads(line))
        except (ValueError, RecursionError) as error:
            yield JsonLine(number, None, str(error))


def parquet_rows(
    source: Path | pa.NativeFile, columns: Sequence[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet file, with all columns or the named ones; ValueError if one is absent."""
    with pq.ParquetFile(source) as file:
        names = file.schema_arrow.names
        absent = [column for column in columns or () if column not in names]
        if absent:
            raise ValueError(
                f"{source}: no column '{absent[0]}'; it has {', '.join(names)}; "
                "set text_column, id_column or url_column"
            )
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            yield from batch.to_pylist()


# --- compression ----------------------------------------------------------------------------------


def compression_by_name(path: str | PurePath) -> Compression:
    """What the suffix of a file's name says."""
    suffixes: dict[str, Compression] = {".gz": "gzip", ".tgz": "gzip", ".zst": "zstd"}
    return suffixes.get(PurePath(path).suffix)


def decompressed(file: BinaryIO, compression: Compression) -> IO[bytes]:
    """The decompressed content of a file; EOFError while reading if the file is cut short."""
    if compression == "gzip":
        return gzip.open(file)  # type: ignore[return-value]
    return io.BufferedReader(_ZstdStream(file)) if compression == "zstd" else file


_CHUNK = 1 << 12  # compressed bytes per step; zstd can pack at most 128 MiB into them


class _ZstdStream(io.RawIOBase):
    """A .zst file, decompressed, as a stream."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._pieces, self._rest = file, _zstd_pieces(file), memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._rest = self._rest or memoryview(next(filter(None, self._pieces), b""))
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def _zstd_pieces(file: BinaryIO) -> Iterator[bytes]:
    """A .zst file, decompressed, piece by piece; EOFError if its last frame is cut short.

    zstandard's own stream reader takes a cut for the end of the file.
    """
    data = file.read(_CHUNK)
    while data:
        frame = zstandard.ZstdDecompressor().decompressobj()
        while not frame.eof:
            if not data:
                raise EOFError("the last frame has no end")
            yield frame.decompress(data)
            data = frame.unused_data if frame.eof else file.read(_CHUNK)
        data = data or file.read(_CHUNK)
