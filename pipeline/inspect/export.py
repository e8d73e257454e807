"""The documents of a run as plain files."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.run import query
from pipeline.run.results import REJECTED, all_commits, result_parts, result_schemas
from pipeline.run.state import read_state
from stages.formats.json_output import to_json
from stages.storage.files import open_fs
from stages.storage.parts import schema_of

Parts = dict[str, list[str]]


def tables(root: str, kind: str) -> Iterator[pa.Table]:
    """The rows of 'documents', 'keep', 'corpus' or 'rejected' (of both stages), in order of units.

    Columns of parts are united, absent ones null.
    """
    parts = _parts(root)
    yield from _tables(parts, kind, _schema(parts, kind))


def export(root: str, kind: str, *, format: str, output: str) -> int:
    """Write the rows of a kind to one file (see `tables`); returns their number."""
    parts = _parts(root)
    schema = _schema(parts, kind)
    fs, path = open_fs(output)
    if "/" in path:
        fs.makedirs(path.rpartition("/")[0], exist_ok=True)
    writers = {"parquet": _write_parquet, "jsonl": _write_jsonl}
    with fs.open(path, "wb") as stream:
        return writers[format](stream, schema, _tables(parts, kind, schema))


def _parts(root: str) -> Parts:
    state = read_state(root)
    return result_parts(root, state, all_commits(root, state))


def _schema(parts: Parts, kind: str) -> pa.Schema:
    """The types as stored, which DuckDB does not keep: time zones, fixed widths, large strings."""
    if kind != "rejected":
        return _united(parts, kind)
    extract = _united(parts, "documents")
    fields = [field for field in extract if field.name not in ("band_keys", "content_hash")]
    refine = _united(parts, "rejected_by_refine") if parts["rejected_by_refine"] else pa.schema([])
    return pa.unify_schemas([pa.schema(fields, extract.metadata), refine])


def _united(parts: Parts, kind: str) -> pa.Schema:
    schemas = [schema_of(uri) for uri in parts[kind]]
    return pa.unify_schemas(schemas or [result_schemas(parts)[kind]])


def _tables(parts: Parts, kind: str, schema: pa.Schema) -> Iterator[pa.Table]:
    columns = ", ".join(query.quoted(name, '"') for name in schema.names)
    views = {"rejected": REJECTED}
    with (
        query.connect(parts, result_schemas(parts), views=views) as connection,
        query.select(connection, f"SELECT {columns} FROM {kind}") as reader,
    ):
        for batch in reader:
            yield pa.Table.from_batches([batch]).cast(schema)


def _write_parquet(stream: Any, schema: pa.Schema, rows: Iterator[pa.Table]) -> int:
    count = 0
    with pq.ParquetWriter(stream, schema, compression="zstd") as writer:
        for table in rows:
            writer.write_table(table)
            count += table.num_rows
    return count


def _write_jsonl(stream: Any, _: pa.Schema, rows: Iterator[pa.Table]) -> int:
    count = 0
    for table in rows:
        for row in table.to_pylist():
            stream.write(to_json(row).encode() + b"\n")
        count += table.num_rows
    return count
