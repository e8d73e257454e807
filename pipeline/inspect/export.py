"""The documents of a run as plain files."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.report.sample import read_ledger
from pipeline.run import query
from pipeline.run.results import REJECTED, result_schemas
from stages.formats.json_output import to_json
from stages.storage.files import open_fs
from stages.storage.parts import schema_of

Parts = dict[str, list[str]]


def tables(root: str, kind: str) -> pa.RecordBatchReader:
    """The rows of 'documents', 'keep', 'corpus' or 'rejected' (of both stages), in order of units.

    Columns of parts are united, absent ones null.
    """
    parts = read_ledger(root).parts
    schema = _schema(parts, kind)
    return pa.RecordBatchReader.from_batches(schema, _batches(parts, kind, schema))


def export(root: str, kind: str, *, format: str, output: str) -> int:
    """Write the rows of a kind to one file (see `tables`); returns their number."""
    rows = tables(root, kind)
    fs, path = open_fs(output)
    if "/" in path:
        fs.makedirs(path.rpartition("/")[0], exist_ok=True)
    writers = {"parquet": _write_parquet, "jsonl": _write_jsonl}
    with fs.open(path, "wb") as stream:
        return writers[format](stream, rows)


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


def _batches(parts: Parts, kind: str, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    columns = ", ".join(query.quoted(name, '"') for name in schema.names)
    views = {"rejected": REJECTED}
    with (
        query.connect(parts, result_schemas(parts), views=views) as connection,
        query.select(connection, f"SELECT {columns} FROM {kind}") as reader,
    ):
        for batch in reader:
            yield batch.cast(schema)


def _write_parquet(stream: Any, rows: pa.RecordBatchReader) -> int:
    count = 0
    with pq.ParquetWriter(stream, rows.schema, compression="zstd") as writer:
        for batch in rows:
            writer.write_batch(batch)
            count += batch.num_rows
    return count


def _write_jsonl(stream: Any, rows: pa.RecordBatchReader) -> int:
    count = 0
    for batch in rows:
        for row in batch.to_pylist():
            stream.write(to_json(row).encode() + b"\n")
        count += batch.num_rows
    return count
