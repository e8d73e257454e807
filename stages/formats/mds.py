"""Write and read MDS shards, the format of mosaicml-streaming, without torch.

A shard is `uint32 n | uint32 offsets[n + 1] | config as JSON | samples`, offsets counted from the
start of the file. A sample is `uint32 sizes[variable columns] | values`, columns in name order,
everything little-endian. index.json lists the shards. For the same samples and options this writes
the bytes that streaming 0.13.0 writes, index included.

Columns hold arrays of uint32 or uint16 with one axis, which is all that Gristmill writes:
`ndarray:uint32:N` is the N values, `ndarray:uint32` any number of values after their shape.
Options are not checked here: `PackConfig` and `gristmill check` do that.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import xxhash
import zstandard

INDEX = "index.json"
HASHES: dict[str, Callable[[bytes], Any]] = {
    name: getattr(module, name)
    for module, names in (
        (hashlib, hashlib.algorithms_guaranteed),
        (xxhash, xxhash.algorithms_available),
    )
    for name in names
    if not name.startswith("shake_")
}
# keys of an index entry that the header of its shard repeats
CONFIG_KEYS = (
    "compression",
    "hashes",
    "size_limit",
    "column_names",
    "column_encodings",
    "column_sizes",
)
_ENCODING = re.compile(r"ndarray:(uint16|uint32)(?::([1-9]\d*))?")
_ENCODINGS = "ndarray:uint32 or ndarray:uint32:N, or of uint16"


class Mismatch(NamedTuple):
    """One way in which a data set differs from what its index or manifest says."""

    shard: str  # basename of the stored file; "index.json" or "manifest" for the whole data set
    what: str
    expected: int | str
    actual: int | str


def compare(shard: str, what: str, expected: int | str, actual: int | str) -> list[Mismatch]:
    """The mismatch of two values, if there is one."""
    return [] if expected == actual else [Mismatch(shard, what, expected, actual)]


def columns_of_rows(seq_len: int, dtype: str = "uint32") -> dict[str, str]:
    """Columns of packed rows: token ids (seq_len,) of `dtype`, and the lengths of the spans of
    documents, in order, fill not counted.
    """
    return {"tokens": f"ndarray:{dtype}:{seq_len}", "spans": "ndarray:uint32"}


class Column(NamedTuple):
    """The arrays of a column: their type, and how many values each has; None if that varies."""

    dtype: np.dtype
    length: int | None

    @property
    def size(self) -> int | None:
        """Bytes of each array; None if that varies."""
        return None if self.length is None else self.dtype.itemsize * self.length


def parse_column(encoding: str) -> Column:
    """The column of an encoding that `_ENCODING` matches."""
    match = _ENCODING.fullmatch(encoding)
    assert match is not None
    return Column(np.dtype(match[1]), int(match[2]) if match[2] else None)


class MDSWriter:
    """Write samples to `out/shard.00000.mds` and on, and after the `with` block `out/index.json`.

    An exception inside the block leaves shards but no index.json: a dead task never looks complete.
    `out` is a local folder, made if absent; one that holds anything is refused, never emptied
    (FileExistsError).

    `columns` is name → encoding. `compression` is None, 'zstd' (level 3) or 'zstd:1'…'zstd:22'.
    `hashes` are names from HASHES, unique and sorted (streaming's rule). `size_limit` is bytes of a
    raw shard, below 2^32. As in streaming, a first sample beyond the limit comes after an empty
    shard 0.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        *,
        columns: Mapping[str, str],
        compression: str | None = None,
        hashes: Sequence[str] = (),
        size_limit: int = 1 << 26,
    ) -> None:
        self._columns = {name: parse_column(columns[name]) for name in sorted(columns)}
        self._config: dict[str, Any] = {
            "version": 2,
            "format": "mds",
            "compression": compression,
            "hashes": list(hashes),
            "size_limit": size_limit,
            "column_names": list(self._columns),
            "column_encodings": [columns[name] for name in self._columns],
            "column_sizes": [column.size for column in self._columns.values()],
        }
        self._config_json = _to_json(self._config)
        self.out = Path(out)
        self.out.mkdir(parents=True, exist_ok=True)
        if any(self.out.iterdir()):
            raise FileExistsError(
                f"{self.out} is not empty; write to a new folder, or remove this one yourself"
            )
        self.shards: list[dict[str, Any]] = []  # entries of index.json for the shards on disk
        self._start_shard()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            return
        if self._samples:
            self._flush()
        write_index(self.out, {"version": 2, "shards": self.shards})

    def write(self, sample: Mapping[str, Any]) -> None:
        """Add one sample; keys beyond `columns` are ignored, as in streaming.

        KeyError for a missing column, ValueError for a value that its encoding cannot hold; the
        sample is then left out and the writer stays usable.
        """
        data = self._encode(sample)
        num_bytes = 4 + len(data)
        if self._config["size_limit"] < self._num_bytes + num_bytes:
            self._flush()
        self._samples.append(data)
        self._num_bytes += num_bytes

    def _encode(self, sample: Mapping[str, Any]) -> bytes:
        sizes, values = [], []
        for name, column in self._columns.items():
            try:
                values.append(_encode_array(sample[name], column))
            except ValueError as error:
                raise ValueError(f"column '{name}': {error}") from error
            if column.length is None:
                sizes.append(len(values[-1]))
        return b"".join([np.array(sizes, np.uint32).tobytes(), *values])

    def _start_shard(self) -> None:
        self._samples: list[bytes] = []
        self._num_bytes = 4 + 4 + len(self._config_json)

    def _flush(self) -> None:
        offsets = np.cumsum([0, *map(len, self._samples)], dtype=np.int64)
        offsets += 4 + 4 * len(offsets) + len(self._config_json)
        head = np.uint32(len(self._samples)).tobytes() + offsets.astype(np.uint32).tobytes()
        stored = raw = b"".join([head, self._config_json, *self._samples])
        name = f"shard.{len(self.shards):05}.mds"
        files = {"raw_data": self._file_info(name, raw), "zip_data": None}
        if self._config["compression"]:
            name, stored = f"{name}.zstd", _compress(raw, self._config["compression"])
            files["zip_data"] = self._file_info(name, stored)
        (self.out / name).write_bytes(stored)
        self.shards.append({"samples": len(self._samples), **files, **self._config})
        self._start_shard()

    def _file_info(self, basename: str, data: bytes) -> dict[str, Any]:
        hashes = {name: HASHES[name](data).hexdigest() for name in self._config["hashes"]}
        return {"basename": basename, "bytes": len(data), "hashes": hashes}


# --- index.json -----------------------------------------------------------------------------------


def read_index(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The index.json of `directory`; FileNotFoundError if absent, ValueError if it is not one."""
    path = Path(directory) / INDEX
    try:
        index: dict[str, Any] = json.loads(path.read_bytes())
        is_valid = all(
            (entry["version"], entry["format"]) == (2, "mds")
            and entry.keys() >= {"samples", "zip_data", *CONFIG_KEYS}
            and entry["raw_data"].keys()
            == stored_file(entry).keys()
            == {"basename", "bytes", "hashes"}
            for entry in index["shards"]
        )
    # broken JSON, or JSON of another shape
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} cannot be read as an index: {error!r}; rerun stage 'pack'"
        ) from error
    if not is_valid:
        raise ValueError(f"{path} is not an index of MDS shards, version 2; rerun stage 'pack'")
    return index


def write_index(directory: str | os.PathLike[str], index: Mapping[str, Any]) -> None:
    """Write `index` to `directory`/index.json by a rename, in the bytes that streaming writes."""
    temporary = Path(directory) / f"{INDEX}.tmp"
    temporary.write_bytes(_to_json(index))
    temporary.replace(Path(directory) / INDEX)


def merge_indexes(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One index of the indexes of parts, by the names of the folders beside it where they lie.

    Basenames become 'part-00000/shard.00000.mds', which StreamingDataset(local=…) follows.
    """
    shards = [_in_folder(part, e) for part, index in parts.items() for e in index["shards"]]
    return {"version": 2, "shards": shards}


def _in_folder(part: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    infos = {key: entry[key] for key in ("raw_data", "zip_data") if entry[key] is not None}
    moved = {key: {**info, "basename": f"{part}/{info['basename']}"} for key, info in infos.items()}
    return {**entry, **moved}


def stored_file(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Basename, size and hashes of the file on disk: the compressed one if there is one."""
    info: dict[str, Any] = entry["raw_data"] if entry["zip_data"] is None else entry["zip_data"]
    return info


def column_encodings(entry: Mapping[str, Any]) -> dict[str, str]:
    """Column name → encoding, of an index entry or a shard's own header."""
    return dict(zip(entry["column_names"], entry["column_encodings"], strict=True))


# --- reading a shard ------------------------------------------------------------------------------


class Shard(NamedTuple):
    """A shard whose layout has been checked."""

    data: bytes  # decompressed
    offsets: np.ndarray  # int64 [n + 1]
    config: dict[str, Any]
    columns: dict[str, Column]


def read_shard(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Samples of one shard, in order; a name that ends in .zstd is decompressed.

    Needs no index: the shard's own header names the columns. Arrays are read-only. ValueError for a
    broken shard, or one with columns that Gristmill does not write.
    """
    shard = open_shard(os.fspath(path), Path(path).read_bytes())
    if isinstance(shard, Mismatch):
        raise ValueError(
            f"{path}: {shard.what}: expected {shard.expected}, found {shard.actual}; "
            "rerun stage 'pack'"
        )
    num_variable = _num_variable(shard)
    for start in shard.offsets[:-1].tolist():
        sizes = iter(np.frombuffer(shard.data, np.uint32, num_variable, start).tolist())
        at = start + 4 * num_variable
        sample = {}
        for name, column in shard.columns.items():
            size = next(sizes) if column.size is None else column.size
            try:
                sample[name] = _decode_array(shard.data[at : at + size], column)
            except ValueError as error:
                raise ValueError(f"{path}: column '{name}': {error}") from error
            at += size
        yield sample


def open_shard(name: str, data: bytes) -> Shard | Mismatch:
    """Check a shard's layout: its parts, or the first mismatch; each check relies on the ones
    before it.
    """
    if name.endswith(".zstd"):
        try:
            data = _decompress(data)
        except ValueError as error:
            return Mismatch(name, "zstd", "one whole frame", str(error))
    num_samples = int.from_bytes(data[:4], "little")
    table_end = 4 + 4 * (num_samples + 1)
    if len(data) < table_end:
        what = f"bytes, to hold {num_samples:,} offsets"
        return Mismatch(name, what, f"at least {table_end}", len(data))
    offsets = np.frombuffer(data, np.uint32, num_samples + 1, 4).astype(np.int64)
    for at in np.flatnonzero(np.diff(offsets) < 0)[:1].tolist():
        return Mismatch(name, f"offset {at + 1}", f"at least {offsets[at]}", int(offsets[at + 1]))
    if offsets[-1] != len(data):
        return Mismatch(name, "last offset, the end of the file", len(data), int(offsets[-1]))
    try:
        config = json.loads(data[table_end : offsets[0]])
        encodings = column_encodings(config)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        return Mismatch(name, "header", "JSON with the columns", repr(error))
    for column, encoding in encodings.items():
        if not _ENCODING.fullmatch(str(encoding)):
            return Mismatch(name, f"encoding of column '{column}'", _ENCODINGS, str(encoding))
    columns = {column: parse_column(encoding) for column, encoding in encodings.items()}
    shard = Shard(data, offsets, config, columns)
    expected, actual = np.diff(offsets), _sizes_by_columns(shard)
    for at in np.flatnonzero(actual != expected)[:1].tolist():
        what = f"bytes of sample {at} by its columns"
        return Mismatch(name, what, int(expected[at]), int(actual[at]))
    return shard


def _num_variable(shard: Shard) -> int:
    """Columns whose arrays differ in length."""
    return sum(column.length is None for column in shard.columns.values())


def _sizes_by_columns(shard: Shard) -> np.ndarray:
    """Bytes of each sample by the sizes it begins with, int64 [n]; -1 if too short for them."""
    head = 4 * _num_variable(shard)
    fixed = sum(column.size or 0 for column in shard.columns.values())
    fits = np.diff(shard.offsets) >= head
    heads = shard.offsets[:-1][fits, None] + np.arange(head)
    sizes = np.frombuffer(shard.data, np.uint8)[heads].view(np.uint32)
    totals = np.full(len(fits), -1, np.int64)
    totals[fits] = head + fixed + sizes.sum(axis=1, dtype=np.int64)
    return totals


# --- compression ----------------------------------------------------------------------------------


def _to_json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _compress(data: bytes, compression: str) -> bytes:
    level = int(compression.partition(":")[2] or 3)
    # threads=1 is zstd's multi-threaded path with one worker. It cuts the data into jobs as
    # streaming's `zstd` package does, whatever the number of cores; threads=0 gives other bytes
    # from about 4 MB on (seen with libzstd 1.5.7).
    return zstandard.ZstdCompressor(level=level, threads=1).compress(data)


def _decompress(data: bytes) -> bytes:
    """The content of exactly one zstd frame; ValueError if it is damaged, cut or has a tail."""
    # a decompressobj grows as it reads: a damaged size field allocates nothing
    frame = zstandard.ZstdDecompressor().decompressobj()
    try:
        raw = frame.decompress(data)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
    if not frame.eof or frame.unused_data:
        raise ValueError("bytes after the frame" if frame.eof else "a frame cut short")
    return raw


# --- arrays ---------------------------------------------------------------------------------------


def _encode_array(array: np.ndarray, column: Column) -> bytes:
    dtype, length = column
    fits = array.ndim == 1 and len(array) and length in (None, len(array))
    if array.dtype != dtype or not fits:
        raise ValueError(
            f"must be {dtype} of shape ({length or 'n'},), got {array.dtype} of shape {array.shape}"
        )
    return (_encode_shape(len(array)) if length is None else b"") + array.tobytes()


def _encode_shape(length: int) -> bytes:
    """`ndim << 2 | log2(w)`, ndim = 1, then the length in w bytes, the least of 1, 2, 4, 8."""
    log2 = sum(length >= 1 << bits for bits in (8, 16, 32))
    return bytes([1 << 2 | log2]) + length.to_bytes(1 << log2, "little")


def _decode_array(data: bytes, column: Column) -> np.ndarray:
    dtype, length = column
    if length is not None:
        return np.frombuffer(data, dtype)
    num_axes, log2 = divmod(data[0] if data else 0, 4)
    start = 1 + (1 << log2)
    size = dtype.itemsize * int.from_bytes(data[1:start], "little")
    if num_axes != 1 or start + size != len(data):
        raise ValueError(f"shape does not fit in {len(data)} bytes")
    return np.frombuffer(data, dtype, offset=start)
