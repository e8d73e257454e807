"""Generations: packed parts become one immutable data set, verified, then listed in the catalog.

    RUN/generations/gen-0001/part-00000/shard.00000.mds ...    the shards
    RUN/generations/gen-0001/index.json                        one index for all parts, what StreamingDataset reads
    RUN/generations/gen-0001/manifest.json                     rows, tokens, sources, tokenizer, sha256 of every shard
    RUN/generations/gen-0001/provenance.parquet                row -> spans of documents
    RUN/generations/gen-0001/held_out/                         parts, index and provenance of what is never trained on
    RUN/catalog.jsonl                                          one line per generation; what is not listed is not published

A generation is never changed: StreamingDataset corrupts its order when a data set grows under it.
On an object store, files are only ever created, the manifest last, and the catalog is replaced only
if it is what it was when the generation was begun (`stages.ledger.replace_if`), by a run that still
holds its lease.
"""

import hashlib
import json
import os
import shutil
import tomllib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.engine.lease import Fenced, fence
from stages.formats import mds, mds_verify, tokens
from stages.pack.pack import HELD_OUT, PROVENANCE, TRAINING, PackConfig, Split
from stages.storage.digests import digest, file_sha256
from stages.storage.files import (
    create_only,
    exists,
    is_local,
    open_fs,
    read_bytes,
    read_version,
    replace_if,
    scratch_folder,
)
from stages.storage.ledger import Commit, Store


class PublishError(RuntimeError):
    """The packed shards are not what their writers said; nothing was published."""


class Published(NamedTuple):
    """A generation: its name, folder and manifest; `new` is False when the same content had been
    published before.
    """

    name: str
    uri: str
    manifest: dict[str, Any]
    new: bool


def published_to(root: str, state: dict[str, Any]) -> str:
    """Where a run, by its run.json, publishes: in its own directory, or in that of the series it is
    a batch of.
    """
    value = state["config"].get("run.catalog", {}).get("value", '""')  # as TOML
    return str(tomllib.loads(f"catalog = {value}")["catalog"] or root)


def read_catalog(run: str) -> list[dict[str, Any]]:
    """Entries of the catalog, oldest first."""
    uri = f"{run}/catalog.jsonl"
    return [json.loads(line) for line in read_bytes(uri).splitlines()] if exists(uri) else []


def publish(
    run: str,
    store: Store,
    commits: Sequence[Commit],
    config: PackConfig,
    *,
    sources: dict[str, int],
) -> Published:
    """Publish the parts of these pack commits as the next generation, unless the same content is
    published already.

    Fenced when another run has taken over, or has published at the same time: nothing was published
    then.
    """
    identity = digest([store.root.rsplit("/", 1)[-1], *(c.digest for c in commits)])
    before, version = read_version(f"{run}/catalog.jsonl")
    fence()  # who takes over from here on changes the catalog, or finds it changed
    catalog = [json.loads(line) for line in before.splitlines()]
    for entry in catalog:
        if entry["identity"] == identity:
            uri = f"{run}/generations/{entry['name']}"
            return Published(
                entry["name"], uri, json.loads(read_bytes(f"{uri}/manifest.json")), new=False
            )
    name = f"gen-{len(catalog) + 1:04d}"
    uri = f"{run}/generations/{name}"
    with _workshop(run, name) as folder:
        manifest = _build(
            folder, store, commits, config, name=name, identity=identity, sources=sources
        )
        faults = verify_shards(folder, manifest)
        if faults:
            raise PublishError(
                f"{len(faults)} faults, first: {faults[0]}; remove {store.root} and run again"
            )
        _move(folder, uri)
    entry = {k: manifest[k] for k in ("name", "identity", "rows", "tokens", "seq_len", "tokenizer")}
    entry["manifest_sha256"] = digest_of(f"{uri}/manifest.json")
    lines = "".join(json.dumps(e) + "\n" for e in [*catalog, entry])
    fence()
    if not replace_if(f"{run}/catalog.jsonl", lines.encode(), version):
        raise Fenced(
            f"{run}/catalog.jsonl was changed by another run while {name} was built; nothing was published. Run again"
        )
    return Published(name, uri, manifest, new=True)


def verify_shards(folder: Path, manifest: dict[str, Any]) -> list[mds.Mismatch]:
    """All faults of a generation's shards, those held out included."""
    faults = mds_verify.verify(folder, expected=manifest)
    if manifest.get("held_out") is not None:  # no such key before there was pack.held_out
        found = mds_verify.verify(folder / "held_out", expected=manifest["held_out"])
        faults += [fault._replace(shard=f"held_out/{fault.shard}") for fault in found]
    return faults


def digest_of(uri: str) -> str:
    """Hex sha256 of a small object."""
    return hashlib.sha256(read_bytes(uri)).hexdigest()


def _workshop(run: str, name: str) -> Any:
    """A local folder to build in; beside the generations if they are local, so that the last step
    is one rename.
    """
    if not is_local(run):
        return scratch_folder(f"gristmill-{name}")
    root = Path(run.removeprefix("file://")) / "generations"
    root.mkdir(parents=True, exist_ok=True)
    for rubbish in root.glob(".building-*"):
        shutil.rmtree(rubbish)
    # a crash between the rename and the catalog's line leaves an unlisted folder under the next
    # name
    shutil.rmtree(root / name, ignore_errors=True)
    return _building(root / f".building-{name}")


class _building:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> Path:
        self.folder.mkdir()
        return self.folder

    def __exit__(self, *error: Any) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _build(
    folder: Path,
    store: Store,
    commits: Sequence[Commit],
    config: PackConfig,
    *,
    name: str,
    identity: str,
    sources: dict[str, int],
) -> dict[str, Any]:
    written = _assemble(folder, store, commits, TRAINING)
    encoding = tokens.load_encoding(config.encoding, config.vocabulary_dir)
    manifest = {
        "name": name,
        "identity": identity,
        "rows": sum(c.rows_out for c in commits),
        "tokens": int(sum(c.totals["tokens"] for c in commits)),
        "documents": sum(c.rows_in - c.counts.get("pack.held_out", 0) for c in commits),
        "seq_len": config.seq_len,
        "packing": config.packing,
        "tokenizer": config.encoding,
        "tokenizer_sha256": tokens.encoding_digest(encoding),
        "end_of_text": encoding.eot_token,
        "sources": sources,  # documents by input file, those held out included
        "provenance": "provenance.parquet",
        **written,
        "held_out": _held_out(folder / "held_out", store, commits, seq_len=config.seq_len),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    return manifest


def _held_out(
    folder: Path, store: Store, commits: Sequence[Commit], *, seq_len: int
) -> dict[str, Any] | None:
    """Put what was held out into `folder`, shaped like a generation; its part of the manifest, None
    when there is nothing.
    """
    commits = [c for c in commits if "pack.held_out" in c.counts]
    if not commits:
        return None
    folder.mkdir()
    return {
        "rows": int(sum(c.totals["held_out_rows"] for c in commits)),
        "tokens": int(sum(c.totals[HELD_OUT.tokens] for c in commits)),
        "documents": sum(c.counts["pack.held_out"] for c in commits),
        "seq_len": seq_len,
        **_assemble(folder, store, commits, HELD_OUT),
    }


def _assemble(folder: Path, store: Store, commits: Sequence[Commit], side: Split) -> dict[str, Any]:
    """Put one side of the commits into `folder`: shards, one index, provenance; what the manifest
    says of the files.
    """
    names = [f"part-{c.unit}" for c in commits]
    for part, commit in zip(names, commits, strict=True):
        (folder / part).mkdir()
        for output in commit.outputs:
            if output["path"].startswith(f"{side.parts}/"):
                _fetch(store.uri(output["path"]), folder / part / os.path.basename(output["path"]))
    indexes = [mds.read_index(folder / part) for part in names]
    for part in names:
        (folder / part / mds.INDEX).unlink()
    mds.write_index(folder, mds.merge_indexes(names, indexes))
    rows = [sum(shard["samples"] for shard in index["shards"]) for index in indexes]
    _merge_provenance(
        folder, (store.read_part(c, kind=f"{side.provenance}/") for c in commits), rows
    )
    return {
        "provenance_sha256": file_sha256(folder / "provenance.parquet"),
        "shards": _shards(folder, names, indexes),
    }


def _shards(
    folder: Path, names: Sequence[str], indexes: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    shards = []
    for part, index in zip(names, indexes, strict=True):
        for entry in index["shards"]:
            stored = entry["zip_data"] or entry["raw_data"]
            path = folder / part / stored["basename"]
            shards.append(
                {
                    "basename": f"{part}/{stored['basename']}",
                    "bytes": path.stat().st_size,
                    "sha256": file_sha256(path),
                    "rows": entry["samples"],
                }
            )
    return shards


def _merge_provenance(folder: Path, tables: Iterable[pa.Table], rows: Sequence[int]) -> None:
    """One table of all parts', whose numbers of `rows` say where each begins."""
    first = 0
    with pq.ParquetWriter(folder / "provenance.parquet", PROVENANCE, compression="zstd") as writer:
        for table, count in zip(tables, rows, strict=True):
            shifted = pa.compute.add(table["row"], first).combine_chunks()
            writer.write_table(table.set_column(0, PROVENANCE.field("row"), shifted))
            first += count


def _fetch(uri: str, target: Path) -> None:
    if is_local(uri):
        try:
            os.link(uri.removeprefix("file://"), target)  # same disk: no second copy of the data
            return
        except OSError:
            pass
    fs, path = open_fs(uri)
    fs.get_file(path, str(target))


def _move(folder: Path, uri: str) -> None:
    if is_local(uri):
        os.rename(folder, uri.removeprefix("file://"))
        return
    fence()
    fs, path = open_fs(uri)
    if fs.exists(path):
        fs.rm(
            path,
            recursive=True,
            # of a run that died here, perhaps with other content: unlisted, or `publish` had found it
        )
    data = sorted(f for f in folder.rglob("*") if f.is_file() and f.suffix != ".json")
    for files in (
        data,
        sorted(folder.rglob("*.json")),
    ):  # without index and manifest nobody takes it for a generation
        with ThreadPoolExecutor(4) as pool:  # each holds a file in memory
            list(pool.map(lambda file: _upload(file, f"{uri}/{file.relative_to(folder)}"), files))


def _upload(file: Path, uri: str) -> None:
    fence()  # else the files that a late run alone has would lie in the generation of the other
    if not create_only(uri, file.read_bytes()):
        raise Fenced(
            f"{uri}: another run writes this generation at the same time; nothing was published. Run again"
        )
