"""Verify generations: read every shard again and compare it with index, manifest and catalog."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from stages.formats import mds
from stages.formats.mds import Mismatch
from stages.storage.catalog import (
    CATALOG,
    MANIFEST,
    generation_mismatches,
    generation_uri,
    manifest_mismatches,
    read_catalog,
    splits,
)
from stages.storage.digests import file_sha256
from stages.storage.files import exists, is_local, local_path, open_fs, scratch_folder


class Verified(NamedTuple):
    """The size of a generation's training split by its manifest, and the faults of all its splits.

    No faults means that the generation is whole.
    """

    path: str
    shards: int
    rows: int
    tokens: int
    faults: list[Mismatch]


def verify_path(path: str) -> list[Verified]:
    """Verify a generation's folder, or every generation in the catalog of a run directory.

    FileNotFoundError when the path is neither.
    """
    path = path.rstrip("/")
    if exists(f"{path}/{CATALOG}"):
        entries = read_catalog(path)
        verified = [_verify(generation_uri(path, e["name"]), e) for e in entries]
        for number, entry in enumerate(entries):
            verified[number].faults.extend(_lineage_mismatches(entry, entries[:number]))
        return verified
    if not exists(f"{path}/{MANIFEST}") and not exists(f"{path}/{mds.INDEX}"):
        raise FileNotFoundError(
            f"{path} is neither a generation ({MANIFEST}) nor a run with published ones ({CATALOG})"
        )
    return [_verify(path, None)]


def _lineage_mismatches(
    entry: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]]
) -> Iterator[Mismatch]:
    """What an entry supersedes must have been published before it, and its lineage begun."""
    names = {e["name"] for e in earlier}
    for name in entry.get("supersedes", ()):
        if name not in names:
            yield Mismatch(CATALOG, "supersedes", "an earlier generation", name)
    lineage = entry.get("lineage", entry["name"])
    if lineage not in names | {entry["name"]}:
        yield Mismatch(CATALOG, "lineage", "an earlier generation", lineage)


def _verify(uri: str, entry: dict[str, Any] | None) -> Verified:
    if is_local(uri):
        return _verify_folder(local_path(uri), uri, entry)
    with scratch_folder("gristmill-verify") as folder:
        fs, path = open_fs(uri)
        fs.get(path, str(folder / "generation"), recursive=True)
        return _verify_folder(folder / "generation", uri, entry)


def _verify_folder(folder: Path, uri: str, entry: dict[str, Any] | None) -> Verified:
    try:
        data = (folder / MANIFEST).read_bytes()
        manifest = json.loads(data)
    except (OSError, ValueError) as error:
        return Verified(
            uri, 0, 0, 0, [Mismatch(MANIFEST, "content", "a JSON manifest", str(error))]
        )
    faults = generation_mismatches(folder, manifest)
    faults += manifest_mismatches(entry, data) if entry else []
    parts = splits(manifest).items()
    faults += [fault for part in parts for fault in _provenance_mismatches(folder, *part)]
    if not faults:
        faults += [fault for part in parts for fault in _token_mismatches(folder, *part)]
    return Verified(
        uri, len(manifest["shards"]), manifest["rows"], manifest.get("tokens", 0), faults
    )


def _provenance_mismatches(
    folder: Path, prefix: str, split: Mapping[str, Any]
) -> Iterator[Mismatch]:
    name, expected = f"{prefix}provenance.parquet", split["provenance_sha256"]
    if not (folder / name).exists():
        yield Mismatch(name, "file", "present", "missing")
    elif (sha256 := file_sha256(folder / name)) != expected:
        yield Mismatch(name, "sha256", expected, sha256)


def _token_mismatches(folder: Path, prefix: str, split: Mapping[str, Any]) -> Iterator[Mismatch]:
    """Compare the tokens of the spans, in the shards and in the provenance, with the manifest."""
    paths = [folder / prefix / shard["basename"] for shard in split["shards"]]
    provenance = f"{prefix}provenance.parquet"
    lengths = pq.read_table(folder / provenance, columns=["length"])["length"]
    tokens = {
        MANIFEST: sum(int(row["spans"].sum()) for path in paths for row in mds.read_shard(path)),
        provenance: sum(lengths.to_pylist()),
    }
    for name, count in tokens.items():
        if count != split["tokens"]:
            yield Mismatch(name, f"{prefix}tokens", split["tokens"], count)
