"""Commits: what units did. A run of a million units has millions of them.

The store of a phase (stages.storage.ledger) holds commits as single files or sealed into segments.
A segment is a Parquet file of commits in order of units. Its columns are what sums and plans need:

    unit  fingerprint  digest  rows_in  rows_out  bytes_out  seconds  cpu_seconds  finished  counts
    result.<field>     numbers and texts of the phase's result
    outputs  record    the outputs and all else of the commit, as JSON
"""

import dataclasses
import heapq
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import field
from itertools import compress
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from pydantic.dataclasses import dataclass as validated
from pydantic_core import from_json, to_json

from stages.storage.digests import digest
from stages.storage.files import open_parquet

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa
    import pyarrow.parquet as pq

    Rows = npt.NDArray[np.intp]

T = TypeVar("T")
# a segment: its URI, or its bytes
Segment = str | bytes

# commits that a reader of a segment holds decompressed; all segments are read side by side
_ROW_GROUP = 1000


@validated(frozen=True, slots=True)
class Output:
    """A file that a unit wrote: `path` below the phase's folder, size in bytes, hex sha256."""

    path: str
    bytes: int
    sha256: str

    @property
    def kind(self) -> str:
        """The folder of the file, such as "corpus"."""
        return self.path.partition("/")[0]


@validated
class Commit:
    """What one unit did.

    `counts` are rows by reason ("kept" included). `result` is the phase's own frozen dataclass, or
    None. `notes` are figures that a wrapper around the work adds (`gristmill estimate`). `finished`
    is in Unix seconds, 0.0 until the unit is committed.
    """

    unit: str
    fingerprint: str
    rows_in: int = 0
    rows_out: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    result: Any = None
    notes: dict[str, float | str] = field(default_factory=dict)
    outputs: list[Output] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    finished: float = 0.0

    @property
    def digest(self) -> str:
        """Identity of everything the unit wrote; equal bytes give equal digests."""
        return digest([f"{o.path}:{o.sha256}" for o in self.outputs])

    def output(self, kind: str = "") -> Output:
        """The first file of a kind, or of any kind; ValueError if there is none."""
        return _first(self.outputs, kind, self.unit)


class Written(NamedTuple):
    """What a unit wrote, without the figures of its commit, which take long to decode."""

    unit: str
    digest: str
    rows_out: int
    outputs: list[Output]

    def output(self, kind: str = "") -> Output:
        """As `Commit.output`."""
        return _first(self.outputs, kind, self.unit)


def _first(outputs: Iterable[Output], kind: str, unit: str) -> Output:
    for output in outputs:
        if kind in ("", output.kind):
            return output
    raise ValueError(f"unit {unit} wrote no file of kind '{kind}'")


def unit_order(name: str) -> list[tuple[int, str]]:
    """Sort key of units: numbers in a name count as numbers, with or without leading zeros."""
    return [(len(part), part) for part in name.split("-")]


def input_key(unit: str, fingerprint: str) -> str:
    """A unit together with its input, as `Commits.select` and `Commits.keys` have it."""
    return f"{unit} {fingerprint}"


class Commits(Sequence[Commit]):
    """The commits of a phase in order of units, the newest of each unit.

    Sealed ones stay where they are, and each iteration reads and decodes them again: iterate once
    where that is enough, and use `written` for outputs, `total` and `table` for numbers. A later
    segment counts more than an earlier one, a single file more than both.
    """

    def __init__(
        self,
        commits: Iterable[Commit] = (),
        *,
        segments: Sequence[Segment] = (),
        decode: Callable[[dict[str, Any]], Commit] | None = None,
    ) -> None:
        self.loose = {commit.unit: commit for commit in commits}
        self._decode = decode
        # a segment, and the numbers of its rows that count
        self._segments: list[tuple[Segment, Rows]] = []
        if segments:
            self._segments = _newest(segments, list(self.loose))

    def __len__(self) -> int:
        return sum(len(rows) for _, rows in self._segments) + len(self.loose)

    def __iter__(self) -> Iterator[Commit]:
        assert self._decode or not self._segments

        def decode(record: str, outputs: str) -> Commit:
            return self._decode({**from_json(record), "outputs": from_json(outputs)})  # type: ignore[misc]

        return self._merged(decode, ("record", "outputs"), self.loose.values())

    def written(self) -> Iterator[Written]:
        """What each unit wrote, in order of units."""

        def decode(unit: str, digest: str, rows_out: int, outputs: str) -> Written:
            return Written(unit, digest, rows_out, [Output(**o) for o in from_json(outputs)])

        loose = [Written(c.unit, c.digest, c.rows_out, c.outputs) for c in self.loose.values()]
        return self._merged(decode, Written._fields, loose)

    def __getitem__(self, index: Any) -> Any:
        """The commit at a position, or a list of a slice of them. Decodes all before it."""
        wanted = range(len(self))[index]
        if isinstance(wanted, int):
            return next(commit for n, commit in enumerate(self) if n == wanted)
        chosen = {n: commit for n, commit in enumerate(self) if n in wanted}
        return [chosen[n] for n in wanted]

    def add(self, commit: Commit) -> None:
        """Add the commit of a unit that has no sealed one."""
        self.loose[commit.unit] = commit

    def replace_loose(self, segment: Segment) -> None:
        """Hold a segment in place of the single commits that were sealed into it."""
        self._segments += _newest([segment], [])
        self.loose.clear()

    def keys(self) -> "pa.Array":
        """Units with their inputs (`input_key`): those of the segments, then the single ones."""
        import pyarrow.compute as pc

        table = self.table("unit", "fingerprint")
        columns = (table[name].combine_chunks() for name in ("unit", "fingerprint"))
        return pc.binary_join_element_wise(*columns, " ")

    def units(self) -> "pa.Array":
        """Names of the units, in no order."""
        return self.table("unit")["unit"].combine_chunks()

    def select(self, keys: "pa.Array", *, others: bool = False) -> "Commits":
        """The commits of some units and inputs, or those of all others."""
        import pyarrow.compute as pc

        chosen = Commits(decode=self._decode)
        is_chosen = pc.is_in(self.keys(), value_set=keys).to_numpy(zero_copy_only=False) ^ others
        first = 0
        for segment, rows in self._segments:
            chosen._segments.append((segment, rows[is_chosen[first : first + len(rows)]]))
            first += len(rows)
        chosen.loose = dict(compress(self.loose.items(), is_chosen[first:]))
        return chosen

    def table(self, *columns: str) -> "pa.Table":
        """Columns of all commits (see above), in no order; null where a phase has none of them."""
        import pyarrow as pa

        tables = [_read(segment, columns, rows) for segment, rows in self._segments]
        loose = as_table(self.loose.values())
        tables.append(loose.select([name for name in columns if name in loose.column_names]))
        joined = pa.concat_tables(tables, promote_options="default")
        for name in set(columns) - set(joined.column_names):
            joined = joined.append_column(name, pa.nulls(len(joined), pa.int64()))
        return joined

    def total(self, column: str) -> int:
        """The sum of a column of whole numbers."""
        import pyarrow.compute as pc

        return int(pc.sum(self.table(column)[column]).as_py() or 0)

    def counts(self) -> Counter[str]:
        """The sums of counts by reason."""
        import pyarrow as pa

        total: Counter[str] = Counter()
        for counts in self.table("counts")["counts"].chunks:
            pairs = pa.table({"reason": counts.keys, "rows": counts.items})
            summed = pairs.group_by("reason").aggregate([("rows", "sum")])
            total.update(
                dict(zip(summed["reason"].to_pylist(), summed["rows_sum"].to_pylist(), strict=True))
            )
        return total

    def _merged(
        self, decode: Callable[..., T], columns: Sequence[str], loose: Iterable[T]
    ) -> Iterator[T]:
        """All rows in order of units: those of segments, decoded, and the single ones."""

        def order(item: T) -> list[tuple[int, str]]:
            return unit_order(item.unit)  # type: ignore[attr-defined]

        streams = [_stream(*segment, decode, columns) for segment in self._segments]
        return heapq.merge(*streams, sorted(loose, key=order), key=order)


# --- segments -------------------------------------------------------------------------------------


def pack(commits: Iterable[Commit]) -> bytes:
    """A segment of commits."""
    return _write(as_table(commits))


def without(segment: Segment, units: Collection[str]) -> bytes | None:
    """A segment without the commits of some units; None if it has none of them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    removed = pc.is_in(_read(segment, ("unit",))["unit"], value_set=pa.array(units, pa.string()))
    if not pc.any(removed).as_py():
        return None
    return _write(_read(segment, None).filter(pc.invert(removed)))


def as_table(commits: Iterable[Commit]) -> "pa.Table":
    """Commits as the columns of a segment, in order of units."""
    import pyarrow as pa

    ordered = sorted(commits, key=lambda commit: unit_order(commit.unit))
    text, integer, real = pa.string(), pa.int64(), pa.float64()
    columns = {
        "unit": pa.array([c.unit for c in ordered], text),
        "fingerprint": pa.array([c.fingerprint for c in ordered], text),
        "digest": pa.array([c.digest for c in ordered], text),
        "rows_in": pa.array([c.rows_in for c in ordered], integer),
        "rows_out": pa.array([c.rows_out for c in ordered], integer),
        "bytes_out": pa.array([sum(o.bytes for o in c.outputs) for c in ordered], integer),
        "seconds": pa.array([c.seconds for c in ordered], real),
        "cpu_seconds": pa.array([c.cpu_seconds for c in ordered], real),
        "finished": pa.array([c.finished for c in ordered], real),
        "counts": pa.array([list(c.counts.items()) for c in ordered], pa.map_(text, integer)),
        **_result_columns([c.result for c in ordered]),
        "outputs": pa.array([to_json(c.outputs).decode() for c in ordered], text),
        "record": pa.array([to_json(c, exclude={"outputs"}).decode() for c in ordered], text),
    }
    return pa.table(columns)


def _result_columns(results: Sequence[Any]) -> dict[str, "pa.Array"]:
    """The fields of the results of a phase that are numbers or texts."""
    import pyarrow as pa

    types = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string()}
    columns = {}
    for part in dataclasses.fields(results[0]) if results and results[0] is not None else ():
        values = [getattr(result, part.name) for result in results]
        if type(values[0]) in types:
            columns[f"result.{part.name}"] = pa.array(values, types[type(values[0])])
    return columns


def _write(table: "pa.Table") -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=_ROW_GROUP)
    data: bytes = sink.getvalue().to_pybytes()
    return data


@contextmanager
def _opened(segment: Segment) -> "Iterator[pq.ParquetFile]":
    import pyarrow as pa
    import pyarrow.parquet as pq

    if isinstance(segment, str):
        with open_parquet(segment) as file:
            yield file
    else:
        with pq.ParquetFile(pa.BufferReader(segment)) as file:
            yield file


def _read(
    segment: Segment, columns: Sequence[str] | None, rows: "Rows | None" = None
) -> "pa.Table":
    """Columns of a segment, those that it has; of all its rows, or of some."""
    with _opened(segment) as file:
        known = file.schema_arrow.names
        table = file.read(columns and [name for name in columns if name in known])
        return table if rows is None or len(rows) == file.metadata.num_rows else table.take(rows)


def _stream(
    segment: Segment, rows: "Rows", decode: Callable[..., T], columns: Sequence[str]
) -> Iterator[T]:
    """Some rows of a segment, decoded one by one."""
    first, wanted = 0, rows.tolist()
    with _opened(segment) as file:
        for group in range(file.num_row_groups):
            end = first + file.metadata.row_group(group).num_rows
            here = wanted[bisect_left(wanted, first) : bisect_left(wanted, end)]
            if here:
                table = file.read_row_group(group, columns=columns)
                values = [table[name].to_pylist() for name in columns]
                yield from (decode(*(v[row - first] for v in values)) for row in here)
            first = end


def _newest(segments: Sequence[Segment], loose: Sequence[str]) -> "list[tuple[Segment, Rows]]":
    """Segments with the numbers of their rows that no later segment or single commit replaces."""
    import numpy as np
    import pyarrow as pa

    units = [_read(segment, ("unit",))["unit"].combine_chunks() for segment in segments]
    joined = pa.concat_arrays([*units, pa.array(loose, pa.string())])
    codes = joined.dictionary_encode().indices.to_numpy()
    last = np.zeros(codes.max(initial=-1) + 1, np.int64)
    last[codes] = np.arange(len(codes))
    is_newest, first, newest = last[codes] == np.arange(len(codes)), 0, []
    for segment, names in zip(segments, units, strict=True):
        newest.append((segment, np.flatnonzero(is_newest[first : first + len(names)])))
        first += len(names)
    return newest
