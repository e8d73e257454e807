"""Check a data set of MDS shards against its index.json."""

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.formats.mds import (
    CONFIG_KEYS,
    HASHES,
    INDEX,
    Mismatch,
    compare,
    open_shard,
    read_index,
    stored_file,
)


def verify(directory: str | os.PathLike[str]) -> list[Mismatch]:
    """Re-read every shard that index.json lists; all mismatches, [] if the data set is whole.

    Checked: presence, size, every hash on record, header against index, offsets, column sizes.
    Values are not decoded, so without hashes a flipped bit inside a value is not seen. Files that
    the index does not list are ignored. Holds one shard in memory.
    """
    folder = Path(directory)
    shards = listed_shards(folder)
    if isinstance(shards, Mismatch):
        return [shards]
    mismatches = [m for entry in shards for m in _check_shard(folder, entry)]
    listed = Counter(stored_file(entry)["basename"] for entry in shards)
    for name, count in listed.items():
        mismatches += compare(name, "times in index", 1, count)
    return mismatches


def listed_shards(folder: Path) -> list[dict[str, Any]] | Mismatch:
    """The entries of a local folder's index.json, or why there are none."""
    try:
        shards: list[dict[str, Any]] = read_index(folder)["shards"]
        return shards
    except FileNotFoundError:
        return Mismatch(INDEX, "file", "present", "missing")
    except ValueError as error:
        return Mismatch(INDEX, "content", "an index of MDS shards", str(error))


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
    mismatches += compare(name, "samples in header", entry["samples"], len(shard.offsets) - 1)
    header = {key: shard.config.get(key) for key in CONFIG_KEYS}
    return mismatches + [
        Mismatch(name, f"{key} in header", str(entry[key]), str(value))
        for key, value in header.items()
        if value != entry[key]
    ]


def _check_file(name: str, info: Mapping[str, Any], data: bytes) -> list[Mismatch]:
    mismatches = compare(name, "bytes", info["bytes"], len(data))
    for algorithm, digest in info["hashes"].items():
        known = algorithm in HASHES
        actual = HASHES[algorithm](data).hexdigest() if known else "an unknown hash algorithm"
        mismatches += compare(name, algorithm, digest, actual)
    return mismatches
