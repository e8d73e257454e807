"""Read Parquet parts that earlier stages wrote: columns, rows by number, documents by id."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stages.formats.document import ordinal_of
from stages.storage.files import open_parquet


class PartRef(NamedTuple):
    """A part of an earlier stage: the unit that wrote it and its URI."""

    unit: str
    uri: str


def read_columns(uri: str, columns: list[str] | None) -> pa.Table:
    """Columns of a part; None for all."""
    with open_parquet(uri) as part:
        return part.read(columns=columns)


def schema_of(uri: str) -> pa.Schema:
    """The schema of a part, from its footer."""
    with open_parquet(uri) as part:
        return part.schema_arrow


def score_names(uri: str) -> list[str]:
    """Names of the columns of a part that hold scores: numbers named '<filter>.<rule>'."""
    return [
        field.name
        for field in schema_of(uri)
        if "." in field.name and not pa.types.is_string(field.type)
    ]


def rows_at(uri: str, rows: Sequence[int], columns: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a part by number, in the order of `rows`; reads only the row groups with them."""
    by_number: dict[int, dict[str, Any]] = {}
    with open_parquet(uri) as part:
        first = 0
        for group in range(part.num_row_groups):
            count = part.metadata.row_group(group).num_rows
            inside = sorted({r for r in rows if first <= r < first + count})
            if inside:
                table = part.read_row_group(group, columns=list(columns)).take(
                    [r - first for r in inside]
                )
                by_number |= dict(zip(inside, table.to_pylist(), strict=True))
            first += count
    return [by_number[r] for r in rows]


def unit_name(ordinal: int) -> str:
    """Name of the unit of an input, by its number in the run's input list."""
    return f"{ordinal:06d}"


def unit_of(doc_id: int) -> str:
    """Name of the unit whose input a document came from."""
    return unit_name(ordinal_of(doc_id))


def part_of(doc_id: int, *, beside: str) -> str:
    """URI of the part that holds a document, from the URI of any other part of the same kind."""
    return f"{beside.rpartition('/')[0]}/{unit_of(doc_id)}.parquet"


def documents(uri: str, ids: Sequence[int], columns: Sequence[str]) -> dict[int, dict[str, Any]]:
    """Columns of some documents of a part, by doc_id; ids that are not in the part are left out."""
    doc_ids = read_columns(uri, ["doc_id"])["doc_id"]
    rows = pc.indices_nonzero(pc.is_in(doc_ids, value_set=pa.array(ids, pa.uint64()))).to_pylist()
    return {row["doc_id"]: row for row in rows_at(uri, rows, ["doc_id", *columns])}


def fixed_binary(column: pa.Array, width: int) -> npt.NDArray[np.uint8]:
    """The non-empty values of a binary column as an array (n, width), without a copy.

    The column has no nulls, and all its values have `width` bytes.
    """
    if pa.types.is_fixed_size_binary(column.type):
        data, start = column.buffers()[1], column.offset * width
        return np.frombuffer(data, np.uint8)[start : start + len(column) * width].reshape(-1, width)
    offsets = np.frombuffer(column.buffers()[1], np.int32)[
        column.offset : column.offset + len(column) + 1
    ]
    data = column.buffers()[2]
    values = np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)
    return values[offsets[0] : offsets[-1]].reshape(-1, width)
