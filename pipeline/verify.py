"""Is a generation on disk what its index and manifest say? Every shard is read again."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import pyarrow.parquet as pq

from pipeline import catalog
from stages import mds
from stages.ledger import exists, file_sha256, is_local, scratch_folder


class Verified(NamedTuple):
    """What was found in one generation; no faults means that it is whole."""

    path: str
    shards: int
    rows: int
    tokens: int
    faults: list[mds.Fault]


def verify_path(path: str) -> list[Verified]:
    """Verify a generation's folder, or every generation in the catalog of a run directory.

    FileNotFoundError when the path is neither.
    """
    path = path.rstrip("/")
    if exists(f"{path}/catalog.jsonl"):
        return [_verify(f"{path}/generations/{e['name']}", e) for e in catalog.read_catalog(path)]
    if not exists(f"{path}/manifest.json") and not exists(f"{path}/{mds.INDEX}"):
        raise FileNotFoundError(f"{path} is neither a generation (manifest.json) nor a run with published ones (catalog.jsonl)")
    return [_verify(path, None)]


def _verify(uri: str, entry: dict[str, Any] | None) -> Verified:
    if is_local(uri):
        return _verify_folder(Path(uri.removeprefix("file://")), uri, entry)
    with scratch_folder("gristmill-verify") as folder:
        fs, path = fsspec.core.url_to_fs(uri)
        fs.get(path, str(folder / "generation"), recursive=True)
        return _verify_folder(folder / "generation", uri, entry)


def _verify_folder(folder: Path, uri: str, entry: dict[str, Any] | None) -> Verified:
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
    except (OSError, ValueError) as error:
        return Verified(uri, 0, 0, 0, [mds.Fault("manifest.json", "content", "a JSON manifest", str(error))])
    faults = list(mds.verify(folder, expected=manifest))
    faults += _catalog_faults(uri, entry)
    faults += _provenance_faults(folder, manifest)
    tokens = manifest.get("tokens", 0)
    if not faults:
        tokens = _count_tokens(folder, manifest)
        if tokens != manifest["tokens"]:
            faults.append(mds.Fault("manifest.json", "tokens", manifest["tokens"], tokens))
    return Verified(uri, len(manifest["shards"]), manifest["rows"], tokens, faults)


def _catalog_faults(uri: str, entry: dict[str, Any] | None) -> list[mds.Fault]:
    if entry is None:
        return []
    found = catalog.digest_of(f"{uri}/manifest.json")
    expected = entry["manifest_sha256"]
    return [] if found == expected else [mds.Fault("manifest.json", "sha256 in catalog", expected, found)]


def _provenance_faults(folder: Path, manifest: dict[str, Any]) -> list[mds.Fault]:
    file = folder / manifest["provenance"]
    if not file.exists():
        return [mds.Fault(file.name, "file", "present", "missing")]
    found = file_sha256(file)
    expected = manifest["provenance_sha256"]
    return [] if found == expected else [mds.Fault(file.name, "sha256", expected, found)]


def _count_tokens(folder: Path, manifest: dict[str, Any]) -> int:
    """Tokens that spans cover in the shards, which must be the spans of the provenance table too."""
    from_shards = sum(
        int(row["spans"].sum()) for shard in manifest["shards"] for row in mds.read_shard(folder / shard["basename"])
    )
    lengths = pq.read_table(folder / manifest["provenance"], columns=["length"])["length"]
    from_table = int(sum(lengths.to_pylist()))
    return from_shards if from_shards == from_table else -1
