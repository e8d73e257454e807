"""The documents of a run as plain files."""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.run.json_output import to_json
from pipeline.run.results import corpus_phase, store_of
from pipeline.run.state import read_state
from stages.storage.files import open_fs
from stages.storage.parts import read_columns

KINDS = {"documents": "extract", "keep": "dedup keep", "rejected": "refine"}


def tables(root: str, kind: str) -> Iterator[pa.Table]:
    """The parts of 'documents', 'keep', 'corpus' or 'rejected' (of both stages), in order of units."""
    state = read_state(root)
    if kind == "rejected":
        for table in tables(root, "documents"):
            yield table.filter(pc.is_valid(table["rejected_by"])).drop_columns(
                ["band_keys", "content_hash"]
            )
    store = store_of(root, state, corpus_phase(root, state) if kind == "corpus" else KINDS[kind])
    for commit in store.listed_commits():
        for output in commit.outputs:
            if output["path"].startswith(f"{kind}/"):
                yield read_columns(store.uri(output["path"]), None)


def export(root: str, kind: str, *, format: str, output: str) -> int:
    """Write the rows of a kind to one file; returns their number.

    Columns of parts are united, absent ones null.
    """
    schema = pa.unify_schemas([t.schema for t in tables(root, kind)] or [pa.schema([])])
    fs, path = open_fs(output)
    if "/" in path:
        fs.makedirs(path.rpartition("/")[0], exist_ok=True)
    count = 0
    with fs.open(path, "wb") as stream:
        if format == "parquet":
            with pq.ParquetWriter(stream, schema, compression="zstd") as writer:
                for table in tables(root, kind):
                    writer.write_table(_align(table, schema))
                    count += table.num_rows
            return count
        for table in tables(root, kind):
            for batch in table.to_batches(max_chunksize=1024):
                for row in batch.to_pylist():
                    stream.write(to_json(row).encode() + b"\n")
                    count += 1
    return count


def _align(table: pa.Table, schema: pa.Schema) -> pa.Table:
    columns = [
        table[f.name] if f.name in table.column_names else pa.nulls(table.num_rows, f.type)
        for f in schema
    ]
    return pa.table(columns, schema=schema)
