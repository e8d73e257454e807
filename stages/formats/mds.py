"""Write, read and verify MDS shards, the format of mosaicml-streaming, without torch.

A shard is `uint32 n | uint32 offsets[n + 1] | config as JSON | samples`, offsets counted from the
start of the file. A sample is `uint32 sizes[variable columns] | values`, columns in name order,
everything little-endian. index.json lists the shards. For the same samples and options this writes
the bytes that streaming 0.13.0 writes, index included.
"""

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import xxhash
import zstandard

INDEX = "index.json"
HASHES: dict[str, Callable[[bytes], Any]] = {
    **{
        name: getattr(hashlib, name)
        for name in hashlib.algorithms_guaranteed
        if not name.startswith("shake_")
    },
    **{name: getattr(xxhash, name) for name in xxhash.algorithms_available},
}


class Mismatch(NamedTuple):
    """One way in which a data set is not what its index or manifest says."""

    shard: str  # basename of the stored file; "index.json" or "manifest" for faults of the whole
    what: str
    expected: int | str
    actual: int | str


class MDSWriter:
    """Write samples to `out/shard.00000.mds` and on, and once the `with` block has ended well,
    `out/index.json`.

    An exception inside the block leaves shards but no index.json: a dead task never looks complete.
    `out` is a local folder, made if absent; one that holds anything is refused, never emptied
    (FileExistsError).

    `columns` is name → encoding: bytes, str, json, int (64 bits), [u]int8…64, float16…64,
    ndarray[:dtype[:dim,dim]]. `compression` is None, 'zstd' (level 3) or 'zstd:1'…'zstd:22'.
    `hashes` are names from HASHES, unique and sorted (streaming's rule). `size_limit` is bytes of a
    raw shard; None puts everything in one. As in streaming, a first sample beyond the limit comes
    after an empty shard 0. ValueError for any other option.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        *,
        columns: Mapping[str, str],
        compression: str | None = None,
        hashes: Sequence[str] = (),
        size_limit: int | None = 1 << 26,
    ) -> None:
        if not columns:
            raise ValueError("columns is empty; name at least one column")
        if list(hashes) != sorted(set(hashes)) or not HASHES.keys() >= set(hashes):
            raise ValueError(
                f"hashes must be unique, sorted and of {sorted(HASHES)}, got {list(hashes)}"
            )
        if size_limit is not None and not 0 < size_limit < 1 << 32:
            raise ValueError(
                f"size_limit must lie in [1, 2**32) bytes (offsets are uint32), got {size_limit}"
            )
        self._codecs = {name: _codec(columns[name]) for name in sorted(columns)}
        self._level = None if compression is None else _zstd_level(compression)
        self._size_limit = size_limit
        self._hashes = list(hashes)
        self._config: dict[str, Any] = {
            "version": 2,
            "format": "mds",
            "compression": compression,
            "hashes": self._hashes,
            "size_limit": size_limit,
            "column_names": list(self._codecs),
            "column_encodings": [columns[name] for name in self._codecs],
            "column_sizes": [codec.size for codec in self._codecs.values()],
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
        if self._size_limit is not None and self._size_limit < self._num_bytes + num_bytes:
            self._flush()
        self._samples.append(data)
        self._num_bytes += num_bytes

    def _encode(self, sample: Mapping[str, Any]) -> bytes:
        sizes, values = [], []
        for name, codec in self._codecs.items():
            try:
                value = codec.encode(sample[name])
            except (TypeError, ValueError, OverflowError) as error:
                raise ValueError(f"column '{name}': {error}") from error
            if codec.size is None:
                sizes.append(len(value))
            values.append(value)
        return b"".join([np.array(sizes, np.uint32).tobytes(), *values])

    def _start_shard(self) -> None:
        self._samples: list[bytes] = []
        self._num_bytes = 4 + 4 + len(self._config_json)

    def _flush(self) -> None:
        offsets = np.cumsum([0, *map(len, self._samples)], dtype=np.int64)
        offsets += 4 + 4 * len(offsets) + len(self._config_json)
        if offsets[-1] >= 1 << 32:
            raise ValueError(
                f"a shard of {offsets[-1]:,} bytes; offsets are uint32, so set a size_limit below 2**32"
            )
        head = np.uint32(len(self._samples)).tobytes() + offsets.astype(np.uint32).tobytes()
        stored = raw = b"".join([head, self._config_json, *self._samples])
        name = f"shard.{len(self.shards):05}.mds"
        files = {"raw_data": self._file_info(name, raw), "zip_data": None}
        if self._level is not None:
            name, stored = f"{name}.zstd", _compress(raw, self._level)
            files["zip_data"] = self._file_info(name, stored)
        (self.out / name).write_bytes(stored)
        self.shards.append({"samples": len(self._samples), **files, **self._config})
        self._start_shard()

    def _file_info(self, basename: str, data: bytes) -> dict[str, Any]:
        hashes = {algo: HASHES[algo](data).hexdigest() for algo in self._hashes}
        return {"basename": basename, "bytes": len(data), "hashes": hashes}


def read_index(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The index.json of `directory`; FileNotFoundError when absent, ValueError when it is no index
    of MDS shards.
    """
    path = Path(directory) / INDEX
    try:
        index: dict[str, Any] = json.loads(path.read_bytes())
        whole = all(
            (entry["version"], entry["format"]) == (2, "mds")
            and entry.keys() >= {"samples", "zip_data", *_CONFIG_KEYS}
            and entry["raw_data"].keys() == _stored(entry).keys() == {"basename", "bytes", "hashes"}
            for entry in index["shards"]
        )
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ) as error:  # broken JSON, or JSON of another shape
        raise ValueError(
            f"{path} cannot be read as an index: {error!r}; rerun stage 'pack'"
        ) from error
    if not whole:
        raise ValueError(f"{path} is not an index of MDS shards, version 2; rerun stage 'pack'")
    return index


def write_index(directory: str | os.PathLike[str], index: Mapping[str, Any]) -> None:
    """Put `index` at `directory`/index.json in one rename, as the bytes that streaming would write."""
    temporary = Path(directory) / f"{INDEX}.tmp"
    temporary.write_bytes(_to_json(index))
    temporary.replace(Path(directory) / INDEX)


def merge_indexes(
    part_names: Sequence[str], indexes: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """One index over parts that lie in folders beside it; samples keep the order of the parts, then
    of their shards.

    Basenames become 'part-00000/shard.00000.mds', which StreamingDataset(local=…) follows.
    ValueError when the names are not unique, do not pair up with the indexes, or when parts differ
    in columns.
    """
    if len(part_names) != len(indexes) or len(set(part_names)) != len(part_names):
        raise ValueError(
            f"{len(indexes)} indexes need as many unique part names, got {list(part_names)}"
        )
    shards = []
    for part, index in zip(part_names, indexes, strict=True):
        shards += [_in_folder(part, entry) for entry in index["shards"]]
    for entry in shards:
        ours, first = (
            dict(zip(s["column_names"], s["column_encodings"], strict=True))
            for s in (entry, shards[0])
        )
        if ours != first:
            name = _stored(entry)["basename"]
            raise ValueError(
                f"{name} has columns {ours}, the first shard has {first}; pack all parts alike"
            )
    return {"version": 2, "shards": shards}


def read_shard(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Samples of one shard, in order; a name that ends in .zstd is decompressed.

    Needs no index: the shard's own header names the columns. Arrays are read-only. ValueError for a
    broken shard.
    """
    shard = _open_shard(os.fspath(path), Path(path).read_bytes())
    if isinstance(shard, Mismatch):
        raise ValueError(
            f"{path}: {shard.what}: expected {shard.expected}, found {shard.actual}; rerun stage 'pack'"
        )
    num_variable = sum(codec.size is None for codec in shard.codecs.values())
    for start in shard.offsets[:-1].tolist():
        sizes = iter(np.frombuffer(shard.data, np.uint32, num_variable, start).tolist())
        at = start + 4 * num_variable
        sample = {}
        for name, codec in shard.codecs.items():
            size = next(sizes) if codec.size is None else codec.size
            sample[name] = codec.decode(shard.data[at : at + size])
            at += size
        yield sample


def verify(
    directory: str | os.PathLike[str], *, expected: Mapping[str, Any] | None
) -> list[Mismatch]:
    """Re-read every shard that index.json lists; all faults found, none when the data set is whole.

    Checked: presence, size, every hash on record, header against index, offsets, column sizes.
    Values are not decoded, so without hashes a flipped bit inside a value is not seen. `expected`
    is a generation's manifest, of which these are compared where present: rows, seq_len (length of
    the fixed-shape column `tokens`), tokens (no more than rows × seq_len: how much of a row is
    fill, only its spans tell), and per shard, by basename of the stored file (.zstd if compressed),
    bytes, sha256 and rows. Files that the index does not list are ignored. Holds one shard in
    memory.
    """
    try:
        index = read_index(directory)
    except FileNotFoundError:
        return [Mismatch(INDEX, "file", "present", "missing")]
    except ValueError as error:
        return [Mismatch(INDEX, "content", "an index of MDS shards", str(error))]
    faults = [fault for entry in index["shards"] for fault in _shard_faults(Path(directory), entry)]
    times = Counter(_stored(entry)["basename"] for entry in index["shards"])
    faults += [
        Mismatch(name, "times in index", 1, count) for name, count in times.items() if count > 1
    ]
    return (
        faults if expected is None else faults + _manifest_faults(Path(directory), index, expected)
    )


def _shard_faults(directory: Path, entry: Mapping[str, Any]) -> list[Mismatch]:
    name = _stored(entry)["basename"]
    try:
        data = (directory / name).read_bytes()
    except FileNotFoundError:
        return [Mismatch(name, "file", "present", "missing")]
    faults = _file_faults(name, _stored(entry), data)
    shard = _open_shard(name, data)
    if isinstance(shard, Mismatch):
        return [*faults, shard]
    if entry["zip_data"] is not None:
        faults += _file_faults(name, entry["raw_data"], shard.data)
    if len(shard.offsets) - 1 != entry["samples"]:
        faults.append(Mismatch(name, "samples in header", entry["samples"], len(shard.offsets) - 1))
    differ = [key for key in _CONFIG_KEYS if shard.config.get(key) != entry[key]]
    return faults + [
        Mismatch(name, f"{key} in header", str(entry[key]), str(shard.config.get(key)))
        for key in differ
    ]


def _file_faults(name: str, info: Mapping[str, Any], data: bytes) -> list[Mismatch]:
    faults = (
        [] if info["bytes"] == len(data) else [Mismatch(name, "bytes", info["bytes"], len(data))]
    )
    for algo, digest in info["hashes"].items():
        found = HASHES[algo](data).hexdigest() if algo in HASHES else "a hash we cannot compute"
        if found != digest:
            faults.append(Mismatch(name, algo, digest, found))
    return faults


def _manifest_faults(
    directory: Path, index: Mapping[str, Any], manifest: Mapping[str, Any]
) -> list[Mismatch]:
    rows, seq_len = sum(entry["samples"] for entry in index["shards"]), _row_length(index)
    faults = []
    if manifest.get("rows", rows) != rows:
        faults.append(Mismatch("manifest", "rows", manifest["rows"], rows))
    if seq_len is not None and manifest.get("seq_len", seq_len) != seq_len:
        faults.append(Mismatch("manifest", "seq_len", manifest["seq_len"], seq_len))
    if seq_len is not None and manifest.get("tokens", 0) > rows * seq_len:
        faults.append(
            Mismatch("manifest", "tokens", manifest["tokens"], f"room for {rows * seq_len}")
        )
    if "shards" not in manifest:
        return faults
    listed = {_stored(entry)["basename"]: entry for entry in index["shards"]}
    named = {shard["basename"]: shard for shard in manifest["shards"]}
    faults += [
        Mismatch(name, "in manifest", "present", "missing") for name in listed if name not in named
    ]
    faults += [
        Mismatch(name, "in index", "present", "missing") for name in named if name not in listed
    ]
    for name, shard in named.items():
        if "rows" in shard and name in listed and shard["rows"] != listed[name]["samples"]:
            faults.append(
                Mismatch(name, "rows by manifest", shard["rows"], listed[name]["samples"])
            )
        if (directory / name).is_file():
            data = (directory / name).read_bytes()
            found: dict[str, int | str] = {
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
            differ = [key for key in found if shard.get(key, found[key]) != found[key]]
            faults += [
                Mismatch(name, f"{key} by manifest", shard[key], found[key]) for key in differ
            ]
    return faults


def _row_length(index: Mapping[str, Any]) -> int | None:
    """Length of the column `tokens`, where it is one and the same in all shards."""
    columns = [
        dict(zip(s["column_names"], s["column_encodings"], strict=True)) for s in index["shards"]
    ]
    encodings = {column.get("tokens", "") for column in columns}
    fixed = re.fullmatch(r"ndarray:\w+:(\d+)", encodings.pop()) if len(encodings) == 1 else None
    return None if fixed is None else int(fixed[1])


def _stored(entry: Mapping[str, Any]) -> dict[str, Any]:
    """File info of what lies on disk: the compressed form if there is one."""
    info: dict[str, Any] = entry["raw_data"] if entry["zip_data"] is None else entry["zip_data"]
    return info


def _in_folder(part: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    infos = {key: entry[key] for key in ("raw_data", "zip_data") if entry[key] is not None}
    return {
        **entry,
        **{key: {**info, "basename": f"{part}/{info['basename']}"} for key, info in infos.items()},
    }


# keys of an index entry that the header of its shard repeats
_CONFIG_KEYS = (
    "compression",
    "hashes",
    "size_limit",
    "column_names",
    "column_encodings",
    "column_sizes",
)


class _Shard(NamedTuple):
    data: bytes  # decompressed
    offsets: np.ndarray  # int64 [n + 1]
    config: dict[str, Any]
    codecs: "dict[str, _Codec]"


def _open_shard(name: str, data: bytes) -> _Shard | Mismatch:
    """The parts of a shard, or the first thing that keeps it from being read; each check relies on
    those before it.
    """
    if name.endswith(".zstd"):
        try:
            data = _decompress(data)
        except ValueError as error:
            return Mismatch(name, "zstd", "one whole frame", str(error))
    num_samples = int.from_bytes(data[:4], "little")
    table_end = 4 + 4 * (num_samples + 1)
    if len(data) < table_end:
        return Mismatch(
            name, f"bytes, to hold {num_samples:,} offsets", f"at least {table_end}", len(data)
        )
    offsets = np.frombuffer(data, np.uint32, num_samples + 1, 4).astype(np.int64)
    for at in np.flatnonzero(np.diff(offsets) < 0)[:1].tolist():
        return Mismatch(name, f"offset {at + 1}", f"at least {offsets[at]}", int(offsets[at + 1]))
    if offsets[-1] != len(data):
        return Mismatch(name, "last offset, the end of the file", len(data), int(offsets[-1]))
    try:
        config = json.loads(data[table_end : offsets[0]])
        columns = zip(config["column_names"], config["column_encodings"], strict=True)
        codecs = {column: _codec(encoding) for column, encoding in columns}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        return Mismatch(name, "header", "JSON with the columns", repr(error))
    lengths = _lengths_by_columns(data, offsets, list(codecs.values()))
    for at in np.flatnonzero(lengths != np.diff(offsets))[:1].tolist():
        return Mismatch(
            name,
            f"bytes of sample {at} by its columns",
            int(offsets[at + 1] - offsets[at]),
            int(lengths[at]),
        )
    return _Shard(data, offsets, config, codecs)


def _lengths_by_columns(data: bytes, offsets: np.ndarray, codecs: "list[_Codec]") -> np.ndarray:
    """Bytes of each sample by the sizes it begins with, int64 [n]; -1 where it cannot hold even
    those.
    """
    head = 4 * sum(codec.size is None for codec in codecs)
    fixed = sum(codec.size or 0 for codec in codecs)
    holds = np.diff(offsets) >= head
    sizes = np.frombuffer(data, np.uint8)[offsets[:-1][holds, None] + np.arange(head)].view(
        np.uint32
    )
    lengths = np.full(len(holds), -1, np.int64)
    lengths[holds] = head + fixed + sizes.sum(axis=1, dtype=np.int64)
    return lengths


def _to_json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _zstd_level(compression: str) -> int:
    levels = {"zstd": 3, **{f"zstd:{level}": level for level in range(1, 23)}}
    if compression not in levels:
        raise ValueError(
            f"compression must be None, 'zstd' or 'zstd:1' to 'zstd:22', got '{compression}'"
        )
    return levels[compression]


def _compress(data: bytes, level: int) -> bytes:
    # threads=1 is zstd's multi-threaded path with one worker. It cuts the data into jobs as
    # streaming's `zstd` package does, whatever the number of cores; threads=0 gives other bytes
    # from about 4 MB on (seen with libzstd 1.5.7).
    return zstandard.ZstdCompressor(level=level, threads=1).compress(data)


def _decompress(data: bytes) -> bytes:
    """The content of exactly one zstd frame; ValueError when it is damaged, cut short or followed
    by anything.
    """
    frame = (
        zstandard.ZstdDecompressor().decompressobj()
    )  # grows as it goes: a damaged size field allocates nothing
    try:
        raw = frame.decompress(data)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
    if not frame.eof or frame.unused_data:
        raise ValueError("bytes after the frame" if frame.eof else "a frame cut short")
    return raw


class _Codec(NamedTuple):
    size: int | None  # bytes of every value; None when they vary
    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]


# dtype → the byte that stands for it where the encoding does not name one
_DTYPES = {
    "uint8": 8,
    "int8": 9,
    "uint16": 16,
    "int16": 17,
    "float16": 18,
    "uint32": 32,
    "int32": 33,
    "float32": 34,
}
_DTYPES |= {"uint64": 64, "int64": 65, "float64": 66}


def _codec(encoding: str) -> _Codec:
    """How a column is turned to bytes and back; ValueError for an encoding that we do not have."""
    name, *options = encoding.split(":")
    if name == "ndarray" and len(options) <= 2 and {*options[:1]} <= _DTYPES.keys():
        return _array_codec(*options)
    if encoding in _DTYPES:
        return _scalar_codec(np.dtype(encoding))
    if encoding in _SIMPLE:
        return _SIMPLE[encoding]
    known = ", ".join([*_SIMPLE, *_DTYPES, "ndarray[:dtype[:dim,dim]]"])
    raise ValueError(f"unknown encoding '{encoding}'; have {known}")


def _a(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"wants {kind.__name__}, got {type(value).__name__}")
    return value


_SIMPLE = {
    "bytes": _Codec(None, lambda value: _a(bytes, value), bytes),
    "str": _Codec(None, lambda value: _a(str, value).encode(), bytes.decode),
    "json": _Codec(
        None,
        lambda value: json.dumps(
            value.tolist() if isinstance(value, np.ndarray) else value
        ).encode(),
        json.loads,
    ),
    "int": _Codec(
        8,
        lambda value: np.int64(_a(int, value)).tobytes(),
        lambda data: int.from_bytes(data, "little", signed=True),
    ),
}


def _scalar_codec(dtype: np.dtype) -> _Codec:
    def encode(value: Any) -> bytes:
        scalar = dtype.type(value)
        if (
            dtype.kind != "f" and scalar != value
        ):  # numpy silently wraps its own integers and cuts floats
            raise ValueError(f"{value!r} does not fit {dtype}")
        return bytes(scalar.tobytes())

    return _Codec(dtype.itemsize, encode, lambda data: np.frombuffer(data, dtype)[0])


def _array_codec(dtype: str | None = None, dims: str | None = None) -> _Codec:
    """Arrays as `dtype byte | shape | values`, without the parts that the encoding fixes."""
    shape = None if dims is None else tuple(map(int, dims.split(",")))
    if shape is not None and min(shape) < 1:
        raise ValueError(
            f"array dimensions must be at least 1, got '{dims}': MDS has no empty arrays"
        )

    def encode(array: Any) -> bytes:
        name = _a(np.ndarray, array).dtype.name
        if name not in _DTYPES or not array.dtype.isnative or (dtype is not None and name != dtype):
            raise TypeError(f"wants an array of {dtype or ', '.join(_DTYPES)}, got {array.dtype!r}")
        if (
            array.size == 0
            or not 1 <= array.ndim < 64
            or (shape is not None and array.shape != shape)
        ):
            raise ValueError(
                f"wants an array of shape {shape or 'of 1 to 63 axes, none empty'}, got {array.shape}"
            )
        head = b"" if dtype is not None else bytes([_DTYPES[name]])
        return (
            head
            + (b"" if shape is not None else _encode_shape(array.shape))
            + bytes(array.tobytes())
        )

    def decode(data: bytes) -> np.ndarray:
        of, start = (dtype, 0) if dtype is not None else (_DTYPE_OF[data[0]], 1)
        into, start = (shape, start) if shape is not None else _decode_shape(data, start)
        return np.frombuffer(data, of, offset=start).reshape(into)

    size = None if dtype is None or shape is None else math.prod(shape) * np.dtype(dtype).itemsize
    return _Codec(size, encode, decode)


_DTYPE_OF = {byte: dtype for dtype, byte in _DTYPES.items()}


def _encode_shape(shape: tuple[int, ...]) -> bytes:
    """`ndim << 2 | log2(w)`, then the dimensions in w bytes each, w the least of 1, 2, 4, 8 that
    holds them all.
    """
    log2 = sum(max(shape) >= 1 << bits for bits in (8, 16, 32))
    return bytes([len(shape) << 2 | log2]) + b"".join(
        dim.to_bytes(1 << log2, "little") for dim in shape
    )


def _decode_shape(data: bytes, at: int) -> tuple[tuple[int, ...], int]:
    """The shape written at `at`, and where it ends."""
    width = 1 << (data[at] & 3)
    end = at + 1 + (data[at] >> 2) * width
    return tuple(
        int.from_bytes(data[i : i + width], "little") for i in range(at + 1, end, width)
    ), end
