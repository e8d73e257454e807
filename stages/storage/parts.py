"""Read Parquet parts that earlier stages wrote: columns, rows by number, documents by id."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stages.formats.document import POSITION_BITS
from stages.storage.files import open_parquet

Item = TypeVar("Item")
Result = TypeVar("Result")


class PartRef(NamedTuple):
    """A part of an earlier stage: the unit that wrote it and its URI."""

    unit: str
    uri: str


def read_columns(uri: str, columns: list[str] | None) -> pa.Table:
    """Columns of a part; None for all."""
    with open_parquet(uri) as part:
        return part.read(columns=columns)


def read_ahead(
    read: Callable[[Item], Result], items: Iterable[Item], *, at_once: int = 8
) -> Iterator[Result]:
    """What `read` returns for each item, in order; the next `at_once` are read meanwhile.

    A read from an object store is a tenth of a second of waiting.
    """
    with ThreadPoolExecutor(at_once) as pool:
        reading: deque[Future[Result]] = deque()
        for item in items:
            reading.append(pool.submit(read, item))
            if len(reading) > at_once:
                yield reading.popleft().result()
        while reading:
            yield reading.popleft().result()


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


def unit_name(ordinal: int) -> str:
    """Name of the unit of an input, by its number in the run's input list."""
    return f"{ordinal:06d}"


def unit_of(doc_id: int) -> str:
    """Name of the unit whose input a document came from."""
    return unit_name(doc_id >> POSITION_BITS)


def part_of(doc_id: int, *, beside: str) -> str:
    """URI of the part that holds a document, from the URI of any other part of the same kind."""
    return f"{beside.rpartition('/')[0]}/{unit_of(doc_id)}.parquet"


def documents(uri: str, ids: Sequence[int], columns: Sequence[str]) -> dict[int, dict[str, Any]]:
    """Columns of some documents of a part, by doc_id; ids that are not in the part are left out.

    Only the row groups that hold them are read.
    """
    by_id: dict[int, dict[str, Any]] = {}
    with open_parquet(uri) as part:
        doc_ids = part.read(columns=["doc_id"])["doc_id"]
        rows = np.flatnonzero(pc.is_in(doc_ids, value_set=pa.array(ids, pa.uint64())))
        first = 0
        for group in range(part.num_row_groups):
            end = first + part.metadata.row_group(group).num_rows
            inside = rows[(first <= rows) & (rows < end)] - first
            if len(inside):
                table = part.read_row_group(group, ["doc_id", *columns]).take(inside)
                by_id |= {row["doc_id"]: row for row in table.to_pylist()}
            first = end
    return by_id


def kept_ids(keep: pa.Table) -> pa.ChunkedArray:
    """The doc_ids that a keep table keeps."""
    return keep["doc_id"].filter(keep["keep"])


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
