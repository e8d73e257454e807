"""Published generations as the trainer sees them: listed in the catalog, verified before a row is read, never trusted later.

    RUN/catalog.jsonl                            one line per generation, with the sha256 of its manifest
    RUN/generations/gen-0001/manifest.json       rows, tokens, sha256 of every shard
    RUN/generations/gen-0001/index.json          what StreamingDataset and its readers go by
    RUN/generations/gen-0001/provenance.parquet  row -> spans of documents
    RUN/generations/gen-0001/held_out/           rows for evaluation alone, with an index and provenance of their own; or none

The catalog vouches for the manifest, the manifest for every shard. RUN lies on a disk of this machine.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from stages import mds


class GenerationFault(RuntimeError):
    """A generation is not what was published, or cannot be read: which, which file, expected, found, what to do."""


class Manifest(NamedTuple):
    """A generation that passed. `sha256` is of its manifest.json; `shard_rows` are rows by shard, in the order of the index."""

    run: str
    name: str
    sha256: str
    rows: int
    tokens: int
    seq_len: int
    tokenizer: str
    shard_rows: tuple[int, ...]


class Document(NamedTuple):
    """A document's span: tokens [start, start + length) of `row` of a generation, from the document's token `offset` on."""

    row: int
    doc_id: int
    start: int
    length: int
    offset: int
    url: str | None


def fault(name: str, file: str, *, expected: object, found: object, do: str) -> GenerationFault:
    """The one form of these messages."""
    return GenerationFault(f"generation {name}: {file}: expected {expected}, found {found}; {do}")


def folder_of(run: str, name: str) -> Path:
    """Where a generation lies. ValueError for a run on object storage: there is no random access to rows there."""
    path = run.removeprefix("file://")
    if "://" in path:
        raise ValueError(f"the trainer reads local disks, not '{run}'; copy its catalog.jsonl and generations/ to one first")
    return Path(path) / "generations" / name


def read_catalog(run: str) -> list[dict[str, Any]]:
    """Entries of the catalog, oldest first; [] where there is none. GenerationFault for a line that is no entry."""
    path = folder_of(run, "").parent / "catalog.jsonl"
    entries = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else []):
        try:
            entry = json.loads(line)
            entries.append({**entry, "name": str(entry["name"]), "manifest_sha256": str(entry["manifest_sha256"])})
        except (ValueError, LookupError, TypeError) as error:
            raise GenerationFault(f"{path}: line {number + 1} is no entry of a catalog: {error!r}; restore the file") from error
    return entries


def verify_generation(run: str, entry: Mapping[str, Any], *, mode: Literal["full", "quick"]) -> Manifest:
    """Check a generation against the catalog's `entry`. GenerationFault names the first thing that is wrong.

    Quick: manifest against catalog, index against manifest, presence and size of every shard. Full: sha256 of every shard as
    well, files side by side; a generation that passed is not hashed again by this process. This is less than `mds.verify`, which
    ran when it was published: bytes with the published sha256 need no second look inside, and here they are read once.
    """
    folder = folder_of(run, entry["name"])
    with _readable(entry["name"]):
        return _verify(run, folder, _read_manifest(folder, entry), entry["manifest_sha256"], mode=mode)


def verify_held_out(run: str, entry: Mapping[str, Any]) -> Manifest | None:
    """Check in full what a generation holds out for evaluation, None where that is nothing.

    It is a generation in itself, to `trainer.data` too, of the name "gen-0001/held_out", and its rows are in no other.
    """
    folder = folder_of(run, entry["name"])
    with _readable(entry["name"]):
        manifest = _read_manifest(folder, entry)
        part = manifest.get("held_out")
        if part is None or part["rows"] == 0:
            return None
        part = {**manifest, **part, "name": f"{entry['name']}/held_out"}
        return _verify(run, folder / "held_out", part, entry["manifest_sha256"], mode="full")


def documents_of(run: str, name: str, rows: Iterable[int]) -> list[Document]:
    """The documents that rows of a generation are made of, in the order of the rows and of the spans within them."""
    import pyarrow.parquet as pq  # only where somebody asks: a training node need not carry it

    path, wanted = folder_of(run, name) / "provenance.parquet", sorted(set(rows))
    table = pq.read_table(path, columns=list(Document._fields), filters=[("row", "in", wanted)])
    return [Document(**span) for span in table.sort_by([("row", "ascending"), ("start", "ascending")]).to_pylist()]


_RESTORE = "restore the generation from a copy, or leave it out of `generations`"
_hashed: set[tuple[str, str]] = set()  # folder and manifest of generations whose shards this process has hashed


@contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise fault(name, str(error.filename), expected="a readable file", found=error.strerror, do=_RESTORE) from error


def _verify(run: str, folder: Path, manifest: Mapping[str, Any], sha256: str, *, mode: Literal["full", "quick"]) -> Manifest:
    name, shard_rows = manifest["name"], _check_index(folder, manifest)
    for shard in manifest["shards"]:
        _check_size(folder, name, shard)
    if mode == "full" and (str(folder), sha256) not in _hashed:
        _check_hashes(folder, name, manifest["shards"])
        _hashed.add((str(folder), sha256))
    shape = {key: manifest[key] for key in ("rows", "tokens", "seq_len", "tokenizer")}
    return Manifest(run, name, sha256, **shape, shard_rows=tuple(shard_rows))


def _read_manifest(folder: Path, entry: Mapping[str, Any]) -> dict[str, Any]:
    data = (folder / "manifest.json").read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != entry["manifest_sha256"]:
        raise fault(entry["name"], "manifest.json", expected=f"sha256 {entry['manifest_sha256']}", found=found, do=_RESTORE)
    manifest: dict[str, Any] = json.loads(data)  # the very bytes that were published
    for key in ("rows", "tokens", "seq_len", "tokenizer"):
        if entry.get(key, manifest[key]) != manifest[key]:
            raise fault(entry["name"], f"{key} in catalog.jsonl", expected=manifest[key], found=entry[key], do=_RESTORE)
    return manifest


def _check_index(folder: Path, manifest: Mapping[str, Any]) -> list[int]:
    """Rows of each shard; an index with other shards, rows or columns than the manifest's is a fault."""
    name = manifest["name"]
    try:
        shards = mds.read_index(folder)["shards"]
    except ValueError as error:
        raise fault(name, mds.INDEX, expected="an index of MDS shards", found=error, do=_RESTORE) from error
    listed = [((shard["zip_data"] or shard["raw_data"])["basename"], shard["samples"]) for shard in shards]
    named = [(shard["basename"], shard["rows"]) for shard in manifest["shards"]]
    total = sum(rows for _, rows in listed)
    if total != manifest["rows"]:
        raise fault(name, mds.INDEX, expected=f"{manifest['rows']} rows", found=f"{total} rows", do=_RESTORE)
    for expected, found in zip(named, listed, strict=False):
        if expected != found:
            raise fault(name, mds.INDEX, expected=f"(shard, rows) {expected}", found=found, do=_RESTORE)
    if len(named) != len(listed):
        raise fault(name, mds.INDEX, expected=f"{len(named)} shards", found=f"{len(listed)} shards", do=_RESTORE)
    columns = {"tokens": f"ndarray:uint32:{manifest['seq_len']}", "spans": "ndarray:uint32"}
    for shard in shards:
        written = dict(zip(shard["column_names"], shard["column_encodings"], strict=True))
        if written != columns:
            raise fault(name, f"columns of {shard['raw_data']['basename']}", expected=columns, found=written, do=_RESTORE)
    return [rows for _, rows in listed]


def _check_size(folder: Path, name: str, shard: Mapping[str, Any]) -> None:
    path = folder / shard["basename"]
    if not path.is_file():
        raise fault(name, shard["basename"], expected="a file", found="none", do=_RESTORE)
    if path.stat().st_size != shard["bytes"]:
        found = f"{path.stat().st_size} bytes"
        raise fault(name, shard["basename"], expected=f"{shard['bytes']} bytes", found=found, do=_RESTORE)


def _check_hashes(folder: Path, name: str, shards: list[dict[str, Any]]) -> None:
    # hashing releases the GIL; 16 threads keep a fast disk busy and are no harm to a slow one
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda shard: _sha256(folder / shard["basename"]), shards)
        for shard, digest in zip(shards, found, strict=True):
            if digest != shard["sha256"]:
                pool.shutdown(wait=False, cancel_futures=True)
                raise fault(name, shard["basename"], expected=f"sha256 {shard['sha256']}", found=digest, do=_RESTORE)


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
