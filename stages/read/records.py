"""Documents that are text already: JSONL (plain, gzip, zstd) and Parquet, read row by row with odd
rows made visible.
"""

import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from pydantic import Field
from pydantic.dataclasses import dataclass

from filters import STRICT


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


def columns_of(path: Path, config: InputConfig) -> list[str]:
    """Names of the columns of a file, of JSONL those of its first good row; [] for a file without
    one.
    """
    if config.format == "parquet":
        names: list[str] = pq.read_schema(path).names
        return names
    return list(next((row for row in _jsonl_rows(path) if isinstance(row, dict)), {}))


def id_type(path: Path, config: InputConfig) -> str:
    """Arrow's name of the id column's type if it holds integers (JSONL: if its first good row has
    one), else 'string'.
    """
    if config.format == "parquet":
        kind = (
            pq.read_schema(path).field(config.id_column).type if config.id_column else pa.string()
        )
        return str(kind) if pa.types.is_integer(kind) else "string"
    first: dict[str, Any] = next((row for row in _jsonl_rows(path) if isinstance(row, dict)), {})
    return "int64" if type(first.get(config.id_column)) is int else "string"


class TextRecord(NamedTuple):
    """One row of a text input; `error` says why it holds no document ('bad_json', 'no_text'), in
    which case text is "".
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
    rows = _parquet_rows(path, config) if config.format == "parquet" else _jsonl_rows(path)
    for position, row in enumerate(rows):
        yield _record(position, row, config)


def _record(position: int, row: Any, config: InputConfig) -> TextRecord:
    if not isinstance(row, dict):
        return TextRecord(position, "", error="bad_json")
    url = _string(row.get(config.url_column)) if config.url_column else None
    source_id = _string(row.get(config.id_column)) if config.id_column else None
    text = row.get(config.text_column)
    if isinstance(text, bytes):  # Spark writes strings as binary by default
        text = text.decode("utf-8", "replace")
    if not isinstance(text, str):
        return TextRecord(position, "", url, source_id, "no_text")
    # lone surrogates (JSON allows their escapes) and NULs have no place in Arrow strings and C
    # libraries
    return TextRecord(
        position, text.encode("utf-8", "replace").decode().replace("\0", ""), url, source_id
    )


def _string(value: Any) -> str | None:
    return None if value is None else str(value).encode("utf-8", "replace").decode()


def _jsonl_rows(path: Path) -> Iterator[Any]:
    with _open(path) as stream:
        for line in stream:
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                yield None


def _parquet_rows(path: Path, config: InputConfig) -> Iterator[dict[str, Any]]:
    file = pq.ParquetFile(path)
    wanted = [c for c in (config.text_column, config.id_column, config.url_column) if c]
    missing = [c for c in wanted if c not in file.schema_arrow.names]
    if missing:
        has = ", ".join(file.schema_arrow.names)
        raise ValueError(
            f"{path}: no column '{missing[0]}'; it has {has}; set input.text_column, id_column or url_column"
        )
    for batch in file.iter_batches(batch_size=1024, columns=wanted):
        yield from batch.to_pylist()


def _open(path: Path) -> IO[bytes]:
    # by magic, not by name: a download may have lost its suffix
    stream = open(path, "rb")
    magic = stream.read(4)
    stream.seek(0)
    if magic[:2] == b"\x1f\x8b":
        return gzip.open(stream)  # type: ignore[return-value]
    if magic == b"\x28\xb5\x2f\xfd":
        return io.BufferedReader(Unpacked(stream))
    return stream


_CHUNK = 1 << 12  # bytes unpacked at once: 128 MiB, at the most that zstd can pack into them


def zstd_pieces(file: BinaryIO) -> Iterator[bytes]:
    """A .zst file unpacked, piece by piece; EOFError if it was cut short, which a reader of streams
    takes for its end.
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


class Unpacked(io.RawIOBase):
    """A .zst file unpacked, as a stream."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._pieces, self._left = file, zstd_pieces(file), memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._left = self._left or memoryview(next(filter(None, self._pieces), b""))
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()
