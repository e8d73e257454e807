"""Published generations: read the catalog and the manifests, and check files against them.

    RUN/catalog.jsonl                            a line per generation, with its manifest's sha256
    RUN/generations/gen-0001/manifest.json       rows, tokens, sources, sha256 of every shard
    RUN/generations/gen-0001/index.json          all shards, for StreamingDataset and its readers
    RUN/generations/gen-0001/part-00000/*.mds    the shards
    RUN/generations/gen-0001/provenance.parquet  row -> spans of documents
    RUN/generations/gen-0001/tokenizer/*         the file of its tokenizer, if that has one
    RUN/generations/gen-0001/held_out/           the held-out split: index, shards and provenance

The catalog identifies the manifest, and the manifest every shard. A generation never changes, and
one that the catalog does not list is not published. RUN is a folder or a URL (s3://BUCKET/RUN).

An entry has `supersedes`, the generations whose documents it has anew, and `lineage`, the first of
them all: readers take what no other supersedes. Entries of earlier versions have neither, and
supersede nothing.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

from stages.formats import mds, mds_verify
from stages.formats.mds import Mismatch
from stages.storage.digests import bytes_sha256, file_sha256
from stages.storage.files import is_local, read_bytes

CATALOG, MANIFEST = "catalog.jsonl", "manifest.json"
RESTORE = "restore the generation from a copy, or leave it out of `generations`"


class GenerationError(ValueError):
    """A generation is not what was published, or cannot be read.

    The message names the generation and the file, what was expected and found, and what to do.
    """


def generation_error(
    name: str, file: str, *, expected: object, found: object, do: str = RESTORE
) -> GenerationError:
    """The one form of these messages."""
    return GenerationError(f"generation {name}: {file}: expected {expected}, found {found}; {do}")


def raise_first(name: str, mismatches: Iterable[Mismatch]) -> None:
    """GenerationError for the first of the mismatches of a generation, if there is one."""
    for shard, what, expected, actual in mismatches:
        raise generation_error(name, f"{shard}: {what}", expected=expected, found=actual)


def generation_uri(run: str, name: str) -> str:
    """The folder of a generation."""
    return f"{run.rstrip('/')}/generations/{name}"


# --- catalog and manifest -------------------------------------------------------------------------


def read_catalog(run: str) -> list[dict[str, Any]]:
    """Entries of the catalog, oldest first; [] where there is none. As `parse_catalog`."""
    uri = f"{run.rstrip('/')}/{CATALOG}"
    try:
        data = read_bytes(uri)
    except FileNotFoundError:
        return []
    return parse_catalog(data, uri=uri)


def parse_catalog(data: bytes, *, uri: str) -> list[dict[str, Any]]:
    """Entries of a catalog, oldest first. GenerationError for a line that is not an entry."""
    entries = []
    for number, line in enumerate(data.splitlines(), 1):
        try:
            entry = json.loads(line)
            keys = {key: str(entry[key]) for key in ("name", "manifest_sha256")}
            if not isinstance(entry.get("supersedes", []), list):
                raise ValueError("supersedes is no list")
        except (ValueError, LookupError, TypeError) as error:
            raise GenerationError(
                f"{uri}: line {number} is not an entry of a catalog: {error!r}; restore the file"
            ) from error
        entries.append({**entry, **keys})
    return entries


def current_entries(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The entries that no other supersedes: the newest generation of each lineage."""
    superseded = {name for entry in entries for name in entry.get("supersedes", ())}
    return [dict(entry) for entry in entries if entry["name"] not in superseded]


def entries_to_read(
    entries: Sequence[Mapping[str, Any]], begun: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The entries of the generations that a training reads which has `begun` some, in that order.

    First those begun, whatever supersedes them by now; then the newest of the others. What
    supersedes one begun, or is superseded by one, has its documents again.
    """
    by_name = {entry["name"]: dict(entry) for entry in entries}
    before, after = set(begun), set(begun)  # a catalog lists a generation after those it supersedes
    for entry in reversed(entries):
        if entry["name"] in before:
            before.update(entry.get("supersedes", ()))
    for entry in entries:
        if after.intersection(entry.get("supersedes", ())):
            after.add(entry["name"])
    first = [by_name[name] for name in begun if name in by_name]
    others = [entry for entry in entries if entry["name"] not in before | after]
    return first + current_entries(others)


def read_manifest(run: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of a generation. GenerationError if it is not what the catalog's entry says."""
    manifest = read_same_manifest(run, entry["name"], sha256=entry["manifest_sha256"])
    raise_first(entry["name"], _listing_mismatches(entry, manifest))
    return manifest


def read_same_manifest(run: str, name: str, *, sha256: str) -> dict[str, Any]:
    """The manifest with this sha256. GenerationError if the generation has another one by now."""
    with reading(run, name, MANIFEST):
        data = read_bytes(f"{generation_uri(run, name)}/{MANIFEST}")
    raise_first(name, _hash_mismatches(sha256, data))
    manifest: dict[str, Any] = json.loads(data)
    return manifest


def manifest_mismatches(entry: Mapping[str, Any], data: bytes) -> list[Mismatch]:
    """How the bytes of a manifest differ from the catalog's entry."""
    return _hash_mismatches(entry["manifest_sha256"], data) or _listing_mismatches(
        entry, json.loads(data)
    )


def _hash_mismatches(expected: str, data: bytes) -> list[Mismatch]:
    return mds.compare(MANIFEST, "sha256 in catalog", expected, bytes_sha256(data))


def _listing_mismatches(entry: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[Mismatch]:
    """How a whole entry of the catalog differs from the manifest that it lists."""
    mismatches = [
        Mismatch(CATALOG, key, manifest[key], entry[key])
        for key in ("rows", "tokens", "seq_len", "tokenizer")
        if entry.get(key, manifest[key]) != manifest[key]
    ]
    # an entry without them would be read beside what it supersedes
    for key, absent in (("lineage", "none"), ("supersedes", [])):
        published, listed = (str(record.get(key, absent)) for record in (manifest, entry))
        mismatches += mds.compare(CATALOG, key, published, listed)
    return mismatches


def splits(manifest: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The splits of a manifest by their folder: "" for training, "held_out/" if there is one."""
    held_out = manifest.get("held_out")  # no such key before pack.held_out existed
    return {"": manifest} if held_out is None else {"": manifest, "held_out/": held_out}


def stored_files(split: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Basename, bytes and sha256 of the shards, and of the tokenizer that lies beside them."""
    tokenizer = split.get("tokenizer_file")  # None for one that tiktoken names
    return [*split["shards"], *([tokenizer] if tokenizer else [])]


# --- files ----------------------------------------------------------------------------------------


@contextmanager
def reading(run: str, name: str, file: str = "") -> Iterator[None]:
    """Turn OSError into GenerationError.

    A file on a disk that cannot be read means a damaged generation. A store that does not answer
    says nothing about the generation: there, only absence does.
    """
    try:
        yield
    except OSError as error:
        if not is_local(run) and not isinstance(error, FileNotFoundError):
            raise
        path, reason = file or str(error.filename), error.strerror or error
        raise generation_error(name, path, expected="a readable file", found=reason) from error


def index_mismatches(folder: Path, split: Mapping[str, Any]) -> list[Mismatch]:
    """How index.json in a local folder differs from a split: in its shards, rows or columns."""
    shards = mds_verify.listed_shards(folder)
    if isinstance(shards, Mismatch):
        return [shards]
    rows = sum(shard["samples"] for shard in shards)
    mismatches = mds.compare(mds.INDEX, "rows", split["rows"], rows)
    if split["tokens"] > rows * split["seq_len"]:
        room = f"room for {rows * split['seq_len']}"
        mismatches.append(Mismatch(MANIFEST, "tokens", split["tokens"], room))
    published = [(shard["basename"], shard["rows"]) for shard in split["shards"]]
    listed = [(mds.stored_file(shard)["basename"], shard["samples"]) for shard in shards]
    for pair in zip_longest(published, listed, fillvalue="none"):
        if pair[0] != pair[1]:
            mismatches.append(Mismatch(mds.INDEX, "(shard, rows)", *map(str, pair)))
            break
    # no such key before small vocabularies were stored as uint16
    columns = mds.columns_of_rows(split["seq_len"], split.get("dtype", "uint32"))
    for shard, (name, _) in zip(shards, listed, strict=True):
        if (written := mds.column_encodings(shard)) != columns:
            mismatches.append(Mismatch(name, "columns", str(columns), str(written)))
    return mismatches


def size_mismatches(folder: Path, shards: Iterable[Mapping[str, Any]]) -> list[Mismatch]:
    """Shards of a manifest that are missing in a local folder, or have another size there."""
    mismatches = []
    for shard in shards:
        name, path = shard["basename"], folder / shard["basename"]
        if not path.is_file():
            mismatches.append(Mismatch(name, "file", "present", "missing"))
        else:
            size = path.stat().st_size
            mismatches += mds.compare(name, "bytes by manifest", shard["bytes"], size)
    return mismatches


def hash_mismatches(folder: Path, shards: Sequence[Mapping[str, Any]]) -> Iterator[Mismatch]:
    """Shards of a manifest that have another sha256 in a local folder. All must be present."""
    # hashing releases the GIL; 16 threads keep a fast disk busy and do no harm to a slow one
    pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
    try:
        hashes = pool.map(lambda shard: file_sha256(folder / shard["basename"]), shards)
        for shard, sha256 in zip(shards, hashes, strict=True):
            yield from mds.compare(shard["basename"], "sha256 by manifest", shard["sha256"], sha256)
    finally:
        pool.shutdown(cancel_futures=True)


def split_mismatches(folder: Path, split: Mapping[str, Any]) -> list[Mismatch]:
    """All mismatches of a split in a local folder.

    Every shard is read, and decoded as far as its columns (`mds_verify`).
    """
    files = stored_files(split)
    present = [file for file in files if (folder / file["basename"]).is_file()]
    mismatches = [
        *mds_verify.verify(folder),
        *index_mismatches(folder, split),
        *size_mismatches(folder, files),
        *hash_mismatches(folder, present),
    ]
    return list(dict.fromkeys(mismatches))


def generation_mismatches(folder: Path, manifest: Mapping[str, Any]) -> list[Mismatch]:
    """All mismatches of all splits of a generation in a local folder."""
    return [
        mismatch._replace(shard=f"{prefix}{mismatch.shard}")
        for prefix, split in splits(manifest).items()
        for mismatch in split_mismatches(folder / prefix, split)
    ]
