"""SQL over Parquet parts with DuckDB, capped in memory. Only the listed parts can be read."""

import datetime
import io
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import fsspec
import pyarrow as pa

from stages.storage.files import is_local, open_fs, scratch_folder

if TYPE_CHECKING:
    import duckdb


SETTINGS: dict[str, Any] = {
    "memory_limit": "1GB",
    "threads": 2,
    "async_threads": 2,
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    "allow_persistent_secrets": False,
    "validate_external_file_cache": "NO_VALIDATION",
    "python_enable_replacements": False,
}


@contextmanager
def connect(
    parts: Mapping[str, Sequence[str]],
    schemas: Mapping[str, pa.Schema],
    *,
    tables: Mapping[str, pa.Table] | None = None,
    views: Mapping[str, str] | None = None,
) -> Iterator["duckdb.DuckDBPyConnection"]:
    """A connection with a view for each name in `parts` (URIs of Parquet files).

    `tables` come after them, then `views`, defined by SQL. Columns of parts are united by name;
    `part` and `file_row_number` say where a row lies. A name without parts is an empty table of
    its schema. Queries that exceed the memory limit spill to $TMPDIR. The connection is closed at
    the end: a process that ends with an open result hangs.
    """
    import duckdb

    with scratch_folder("gristmill-sql") as scratch:
        connection = duckdb.connect(":memory:", config=SETTINGS | {"temp_directory": str(scratch)})
        try:
            # settings of extensions are unknown before; a cursor does not inherit SESSION settings
            for setting in ("parquet_can_have_nan = true", "TimeZone = 'UTC'"):
                connection.execute(f"SET GLOBAL {setting}").fetchall()
            _allow_files(connection, {uri for uris in parts.values() for uri in uris})
            for name, uris in parts.items():
                if uris:
                    _create_view(connection, name, _scan(uris))
                else:  # read_parquet([]) is an error
                    connection.from_arrow(_without_rows(schemas[name])).create(name)
            for name, table in (tables or {}).items():
                connection.from_arrow(table).create(name)
            for name, sql in (views or {}).items():
                _create_view(connection, name, sql)
            connection.execute("SET lock_configuration = true").fetchall()
            yield connection
        finally:
            connection.close()


@contextmanager
def select(
    connection: "duckdb.DuckDBPyConnection", sql: str, *, rows: int = 10_000
) -> Iterator[pa.RecordBatchReader]:
    """Stream the result of one SELECT of a user, in batches of `rows`. ValueError when it fails.

    query() refuses everything but one SELECT; DuckDB itself would also run WITH x AS (COPY … TO …).
    """
    import duckdb

    cursor = connection.cursor()
    try:
        statement = f"SELECT * FROM query({quoted(sql.strip().rstrip(';'))})"
        reader = cursor.sql(statement).to_arrow_reader(rows)
        try:
            yield reader
        finally:
            reader.close()
    except (duckdb.Error, pa.ArrowException) as error:  # Arrow's: one that occurs while streaming
        raise ValueError(_user_message(error)) from error
    finally:
        cursor.close()


def table(connection: "duckdb.DuckDBPyConnection", sql: str, parameters: Any = None) -> pa.Table:
    """The result of one of our own queries; `parameters` are values for its $names or ?."""
    cursor = connection.cursor()
    try:
        return cursor.sql(sql, params=parameters).to_arrow_table()
    finally:
        cursor.close()


def quoted(value: object, mark: str = "'") -> str:
    """A string literal of SQL; with '"' as mark, a name."""
    return mark + str(value).replace(mark, mark * 2) + mark


def _create_view(connection: "duckdb.DuckDBPyConnection", name: str, sql: str) -> None:
    connection.execute(f"CREATE VIEW {quoted(name, chr(34))} AS {sql}").fetchall()


def _user_message(error: Exception) -> str:
    """DuckDB's message in one line, without the place in our own statement around the user's."""
    message = str(error).partition("\n\nLINE ")[0].partition("Candidate functions:")[0]
    return " ".join(message.split())


def _scan(uris: Sequence[str]) -> str:
    files = ", ".join(quoted(_location(uri)) for uri in uris)
    return (
        f"SELECT * FROM read_parquet([{files}], union_by_name = true, hive_partitioning = false, "
        "filename = 'part', file_row_number = true)"
    )


def _without_rows(schema: pa.Schema) -> pa.Table:
    place = [pa.field("file_row_number", pa.int64()), pa.field("part", pa.string())]
    return pa.schema([*schema, *place]).empty_table()


def _location(uri: str) -> str:
    """A URI as DuckDB gets it: an absolute path, or a URL whose file system is registered."""
    return os.path.abspath(uri.removeprefix("file://")) if is_local(uri) else uri


def _allow_files(connection: "duckdb.DuckDBPyConnection", uris: set[str]) -> None:
    remote = sorted(uri for uri in uris if not is_local(uri))
    for protocol, same in itertools.groupby(remote, key=lambda uri: uri.partition("://")[0]):
        urls = list(same)
        connection.register_filesystem(_ListedFiles(open_fs(urls[0])[0], protocol, urls))
    allowed = ", ".join(quoted(_location(uri)) for uri in sorted(uris))
    connection.execute(f"SET allowed_paths = [{allowed}]").fetchall()
    connection.execute("SET enable_external_access = false").fetchall()


class _ListedFiles(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """The listed files of another file system: read only, each size requested once."""

    cachable = False

    def __init__(self, fs: Any, protocol: str, urls: Sequence[str]) -> None:
        super().__init__()
        self.fs, self.protocol = fs, protocol
        self.infos: dict[str, dict[str, Any] | None] = dict.fromkeys(urls)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        info = self.infos[path]
        if info is None:
            info = {"name": path, "type": "file", "size": self.fs.info(path)["size"]}
            self.infos[path] = info
        return info

    def exists(self, path: str, **_: Any) -> bool:
        return path in self.infos

    isfile = exists

    def glob(self, path: str, **_: Any) -> list[str]:
        return [path] if path in self.infos else []

    def modified(self, path: str) -> datetime.datetime:
        return datetime.datetime.fromtimestamp(0, datetime.UTC)  # parts never change

    def open(self, path: str, mode: str = "rb", **_: Any) -> "_RangeReader":
        if mode != "rb" or path not in self.infos:
            raise PermissionError(f"{path} is not one of the parts")
        return _RangeReader(self.fs, path, self.info(path)["size"])


class _RangeReader(io.RawIOBase):
    """A file read by ranges: one request per read, and no position shared between threads."""

    def __init__(self, fs: Any, path: str, size: int) -> None:
        self.fs, self.path, self.size, self.position = fs, path, size, 0

    def read(self, n: int | None = -1) -> bytes:
        end = self.size if n is None or n < 0 else min(self.position + n, self.size)
        if end <= self.position:
            return b""
        data: bytes = self.fs.cat_file(self.path, start=self.position, end=end)
        self.position += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + (0, self.position, self.size)[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def readable(self) -> bool:
        return True

    seekable = readable
