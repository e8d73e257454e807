"""Check a data set of MDS shards against its index.json and a generation's manifest."""

import hashlib
import os
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from stages.formats.mds import (
    CONFIG_KEYS,
    HASHES,
    INDEX,
    Mismatch,
    array_length,
    column_encodings,
    open_shard,
    read_index,
    stored_file,
)


def verify(
    directory: str | os.PathLike[str], *, expected: Mapping[str, Any] | None
) -> list[Mismatch]:
    """Re-read every shard that index.json lists; all mismatches, [] if the data set is whole.

    Checked: presence, size, every hash on record, header against index, offsets, column sizes.
    Values are not decoded, so without hashes a flipped bit inside a value is not seen. `expected`
    is a generation's manifest, of which these are compared where present: rows, seq_len (length of
    the fixed-shape column `tokens`), tokens (no more than rows × seq_len: how much of a row is
    fill, only its spans tell), and per shard, by basename of the stored file (.zstd if compressed),
    bytes, sha256 and rows. Files that the index does not list are ignored. Holds one shard in
    memory.
    """
    folder = Path(directory)
    try:
        index = read_index(folder)
    except FileNotFoundError:
        return [Mismatch(INDEX, "file", "present", "missing")]
    except ValueError as error:
        return [Mismatch(INDEX, "content", "an index of MDS shards", str(error))]
    mismatches = [m for entry in index["shards"] for m in _check_shard(folder, entry)]
    listed = Counter(stored_file(entry)["basename"] for entry in index["shards"])
    for name, count in listed.items():
        mismatches += _compare(name, "times in index", 1, count)
    return mismatches + ([] if expected is None else _check_manifest(folder, index, expected))


def _compare(shard: str, what: str, expected: int | str, actual: int | str) -> list[Mismatch]:
    return [] if expected == actual else [Mismatch(shard, what, expected, actual)]


def _check_shard(folder: Path, entry: Mapping[str, Any]) -> list[Mismatch]:
    name = stored_file(entry)["basename"]
    try:
        data = (folder / name).read_bytes()
    except FileNotFoundError:
        return [Mismatch(name, "file", "present", "missing")]
    mismatches = _check_file(name, stored_file(entry), data)
    shard = open_shard(name, data)
    if isinstance(shard, Mismatch):
        return [*mismatches, shard]
    if entry["zip_data"] is not None:
        mismatches += _check_file(name, entry["raw_data"], shard.data)
    mismatches += _compare(name, "samples in header", entry["samples"], len(shard.offsets) - 1)
    header = {key: shard.config.get(key) for key in CONFIG_KEYS}
    return mismatches + [
        Mismatch(name, f"{key} in header", str(entry[key]), str(value))
        for key, value in header.items()
        if value != entry[key]
    ]


def _check_file(name: str, info: Mapping[str, Any], data: bytes) -> list[Mismatch]:
    mismatches = _compare(name, "bytes", info["bytes"], len(data))
    for algorithm, digest in info["hashes"].items():
        known = algorithm in HASHES
        actual = HASHES[algorithm](data).hexdigest() if known else "an unknown hash algorithm"
        mismatches += _compare(name, algorithm, digest, actual)
    return mismatches


def _check_manifest(
    folder: Path, index: Mapping[str, Any], manifest: Mapping[str, Any]
) -> list[Mismatch]:
    rows, seq_len = sum(entry["samples"] for entry in index["shards"]), _row_length(index)
    mismatches = _compare("manifest", "rows", manifest.get("rows", rows), rows)
    if seq_len is not None:
        mismatches += _compare("manifest", "seq_len", manifest.get("seq_len", seq_len), seq_len)
        if manifest.get("tokens", 0) > rows * seq_len:
            room = f"room for {rows * seq_len}"
            mismatches.append(Mismatch("manifest", "tokens", manifest["tokens"], room))
    if "shards" in manifest:
        mismatches += _check_listed_shards(folder, index, manifest)
    return mismatches


def _check_listed_shards(
    folder: Path, index: Mapping[str, Any], manifest: Mapping[str, Any]
) -> list[Mismatch]:
    in_index = {stored_file(entry)["basename"]: entry for entry in index["shards"]}
    in_manifest = {shard["basename"]: shard for shard in manifest["shards"]}
    absent = [(name, "in manifest") for name in in_index if name not in in_manifest]
    absent += [(name, "in index") for name in in_manifest if name not in in_index]
    mismatches = [Mismatch(name, where, "present", "missing") for name, where in absent]
    for name, shard in in_manifest.items():
        actual: dict[str, int | str] = {}
        if name in in_index:
            actual["rows"] = in_index[name]["samples"]
        if (folder / name).is_file():
            data = (folder / name).read_bytes()
            actual |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for key, value in actual.items():
            mismatches += _compare(name, f"{key} by manifest", shard.get(key, value), value)
    return mismatches


def _row_length(index: Mapping[str, Any]) -> int | None:
    """Length of the column `tokens`, if it is the same in all shards."""
    with suppress(ValueError):  # several encodings, or one that we do not write
        (encoding,) = {column_encodings(entry).get("tokens", "") for entry in index["shards"]}
        return array_length(encoding)
    return None
