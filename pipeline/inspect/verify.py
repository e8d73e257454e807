"""Is a generation on disk what its index and manifest say? Every shard is read again."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from pipeline.run import publish
from stages.formats import mds
from stages.storage.digests import file_sha256
from stages.storage.files import exists, is_local, open_fs, scratch_folder


class Verified(NamedTuple):
    """A generation's manifest, of its training part, and what is wrong with either part; no faults
    means that it is whole.
    """

    path: str
    shards: int
    rows: int
    tokens: int
    faults: list[mds.Mismatch]


def verify_path(path: str) -> list[Verified]:
    """Verify a generation's folder, or every generation in the catalog of a run directory.

    FileNotFoundError when the path is neither.
    """
    path = path.rstrip("/")
    if exists(f"{path}/catalog.jsonl"):
        return [_verify(f"{path}/generations/{e['name']}", e) for e in publish.read_catalog(path)]
    if not exists(f"{path}/manifest.json") and not exists(f"{path}/{mds.INDEX}"):
        raise FileNotFoundError(
            f"{path} is neither a generation (manifest.json) nor a run with published ones (catalog.jsonl)"
        )
    return [_verify(path, None)]


def _verify(uri: str, entry: dict[str, Any] | None) -> Verified:
    if is_local(uri):
        return _verify_folder(Path(uri.removeprefix("file://")), uri, entry)
    with scratch_folder("gristmill-verify") as folder:
        fs, path = open_fs(uri)
        fs.get(path, str(folder / "generation"), recursive=True)
        return _verify_folder(folder / "generation", uri, entry)


def _verify_folder(folder: Path, uri: str, entry: dict[str, Any] | None) -> Verified:
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
    except (OSError, ValueError) as error:
        return Verified(
            uri, 0, 0, 0, [mds.Mismatch("manifest.json", "content", "a JSON manifest", str(error))]
        )
    sides = {"": manifest, "held_out/": manifest.get("held_out")}
    sides = {place: side for place, side in sides.items() if side is not None}
    faults = publish.verify_shards(folder, manifest) + _catalog_faults(uri, entry)
    faults += [
        fault for place, side in sides.items() for fault in _provenance_faults(folder, place, side)
    ]
    if not faults:
        faults += [
            fault for place, side in sides.items() for fault in _token_faults(folder, place, side)
        ]
    return Verified(
        uri, len(manifest["shards"]), manifest["rows"], manifest.get("tokens", 0), faults
    )


def _catalog_faults(uri: str, entry: dict[str, Any] | None) -> list[mds.Mismatch]:
    if entry is None:
        return []
    found = publish.digest_of(f"{uri}/manifest.json")
    expected = entry["manifest_sha256"]
    return (
        []
        if found == expected
        else [mds.Mismatch("manifest.json", "sha256 in catalog", expected, found)]
    )


def _provenance_faults(folder: Path, place: str, side: dict[str, Any]) -> list[mds.Mismatch]:
    name = f"{place}provenance.parquet"
    if not (folder / name).exists():
        return [mds.Mismatch(name, "file", "present", "missing")]
    found = file_sha256(folder / name)
    expected = side["provenance_sha256"]
    return [] if found == expected else [mds.Mismatch(name, "sha256", expected, found)]


def _token_faults(folder: Path, place: str, side: dict[str, Any]) -> list[mds.Mismatch]:
    """Tokens that spans cover, in the shards and in the provenance table, against the manifest."""
    paths = [folder / place / shard["basename"] for shard in side["shards"]]
    from_shards = sum(int(row["spans"].sum()) for path in paths for row in mds.read_shard(path))
    lengths = pq.read_table(folder / place / "provenance.parquet", columns=["length"])["length"]
    found = {"manifest.json": from_shards, f"{place}provenance.parquet": sum(lengths.to_pylist())}
    return [
        mds.Mismatch(n, f"{place}tokens", side["tokens"], tokens)
        for n, tokens in found.items()
        if tokens != side["tokens"]
    ]
