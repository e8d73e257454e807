"""Publish generations: packed parts become one immutable data set, verified, then listed.

`stages.storage.catalog` describes the files. A generation is never changed: StreamingDataset
corrupts its order when a data set grows under it. On an object store, files are only created, the
manifest last, and the catalog is replaced only if it is what it was when the generation was begun
(`stages.storage.files.replace_if`), by a run that still holds its lease.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.engine.lease import Fenced, fence
from pipeline.run.lineage import Origin, succession
from pipeline.run.state import RunState
from stages.formats import mds
from stages.formats.tokenizer import Tokenizer
from stages.pack.pack import HELD_OUT, PROVENANCE, TRAINING, PackConfig, Split, tokenizer_of
from stages.storage.catalog import (
    CATALOG,
    MANIFEST,
    current_entries,
    generation_mismatches,
    generation_uri,
    parse_catalog,
)
from stages.storage.digests import bytes_sha256, digest, file_sha256
from stages.storage.files import (
    create_only,
    download,
    is_local,
    local_path,
    read_bytes,
    read_version,
    remove_tree,
    replace_if,
    scratch_folder,
)
from stages.storage.ledger import Commit, Store

# what the catalog repeats of a manifest
_LISTED = ("name", "identity", "lineage", "supersedes", "rows", "tokens", "seq_len", "tokenizer")


class PublishError(RuntimeError):
    """The packed shards are not what their writers said; nothing was published."""


class Published(NamedTuple):
    """A generation: its name, folder and manifest.

    `new` is False if the same content was published before.
    """

    name: str
    uri: str
    manifest: dict[str, Any]
    new: bool


def published_to(root: str, state: RunState) -> str:
    """The directory that a run publishes to, from its run.json: its own, or that of its series."""
    return state.setting("run.catalog") or root


def publish(
    run: str,
    store: Store,
    commits: Sequence[Commit],
    config: PackConfig,
    *,
    sources: Mapping[str, int],
    origin: Origin | None = None,
    tokenizer_sha256: str = "",
) -> Published:
    """Publish the parts of pack commits as the next generation, unless a current one is the same.

    It supersedes what `succession` says of its `origin`, by default a run in the catalog's own
    directory. `tokenizer_sha256` is that of the file that the parts were packed with, "" if there
    was none: ValueError if the file has another now. Fenced if another run took over, or published
    at the same time: nothing is published then.
    """
    identity = digest([store.root.rsplit("/", 1)[-1], *(c.digest for c in commits)])
    catalog_uri = f"{run}/{CATALOG}"
    before, version = read_version(catalog_uri)
    fence()  # a run that takes over from here on changes the catalog, or finds it changed
    catalog = parse_catalog(before, uri=catalog_uri)
    if same := [e["name"] for e in current_entries(catalog) if e["identity"] == identity]:
        uri = generation_uri(run, same[0])
        return Published(same[0], uri, json.loads(read_bytes(f"{uri}/{MANIFEST}")), new=False)
    origin = origin or Origin(".", frozenset(sources))
    supersedes, lineage, _ = succession(run, catalog, origin)
    name = f"gen-{len(catalog) + 1:04d}"
    uri = generation_uri(run, name)
    with _building_folder(run, name) as folder:
        manifest = dict[str, Any](name=name, identity=identity, lineage=lineage or name)
        manifest["supersedes"] = list(supersedes)
        tokenizer = tokenizer_of(config, sha256=tokenizer_sha256)
        manifest |= _build(folder, store, commits, config, tokenizer, sources)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
        _require_whole(folder, manifest, store)
        _move_folder(folder, uri)
    entry = {key: manifest[key] for key in _LISTED}
    entry |= {"run": origin.run, "listing": origin.listing}
    entry["manifest_sha256"] = bytes_sha256(read_bytes(f"{uri}/{MANIFEST}"))
    lines = "".join(json.dumps(e) + "\n" for e in [*catalog, entry])
    fence()
    if not replace_if(catalog_uri, lines.encode(), version):
        raise Fenced(
            f"{catalog_uri} was changed by another run while {name} was built; nothing was "
            "published. Run again"
        )
    return Published(name, uri, manifest, new=True)


def _require_whole(folder: Path, manifest: Mapping[str, Any], store: Store) -> None:
    """PublishError if the files of a generation are not what its manifest says."""
    if mismatches := generation_mismatches(folder, manifest):
        raise PublishError(
            f"{len(mismatches)} mismatches, first: {mismatches[0]}; "
            f"remove {store.root} and run again"
        )


@contextmanager
def _building_folder(run: str, name: str) -> Iterator[Path]:
    """A local folder to build in.

    Beside the generations if they are local, so that the last step is one rename.
    """
    if not is_local(run):
        with scratch_folder(f"gristmill-{name}") as folder:
            yield folder
        return
    root = local_path(run) / "generations"
    # a crash between the rename and the catalog's line leaves an unlisted folder of the next name
    for leftover in (*root.glob(".building-*"), root / name):
        shutil.rmtree(leftover, ignore_errors=True)
    folder = root / f".building-{name}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _build(
    folder: Path,
    store: Store,
    commits: Sequence[Commit],
    config: PackConfig,
    tokenizer: Tokenizer,
    sources: Mapping[str, int],
) -> dict[str, Any]:
    """Put a generation into `folder`; its manifest."""
    held_out = [c for c in commits if "pack.held_out" in c.counts]
    return {
        "rows": sum(c.rows_out for c in commits),
        "tokens": sum(c.result.tokens for c in commits),
        "documents": sum(c.rows_in - c.counts.get("pack.held_out", 0) for c in commits),
        "seq_len": config.seq_len,
        "packing": config.packing,
        **_describe_tokenizer(folder, tokenizer),
        "add_begin_of_text": config.add_begin_of_text,
        "sources": sources,  # documents by input file, those held out included
        "provenance": "provenance.parquet",
        **_assemble(folder, store, commits, TRAINING),
        "held_out": {
            "rows": sum(c.result.held_out_rows for c in held_out),
            "tokens": sum(c.result.held_out_tokens for c in held_out),
            "documents": sum(c.counts["pack.held_out"] for c in held_out),
            "seq_len": config.seq_len,
            "dtype": tokenizer.dtype,
            **_assemble(folder / "held_out", store, held_out, HELD_OUT),
        }
        if held_out
        else None,
    }


def _describe_tokenizer(folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Copy a tokenizer's file to `folder`, so that a trainer needs no other; the manifest's entries
    on it. An encoding that tiktoken names has no file: trainers have one that does not ship with
    the install in $TIKTOKEN_CACHE_DIR.
    """
    file = None
    if tokenizer.file:
        copy = folder / "tokenizer" / tokenizer.name
        copy.parent.mkdir(parents=True)
        shutil.copyfile(tokenizer.file, copy)
        file = {
            "basename": f"tokenizer/{tokenizer.name}",
            "bytes": copy.stat().st_size,
            "sha256": file_sha256(copy),
        }
    return {
        "tokenizer": tokenizer.name,
        "tokenizer_sha256": tokenizer.digest,
        "tokenizer_file": file,
        "tokenizer_options": tokenizer.options._asdict(),
        "vocab_size": tokenizer.vocab_size,
        "end_of_text": tokenizer.end_of_text,
        "begin_of_text": tokenizer.begin_of_text,
        "dtype": tokenizer.dtype,  # of the stored tokens
    }


def _assemble(
    folder: Path, store: Store, commits: Sequence[Commit], split: Split
) -> dict[str, Any]:
    """Put a split into `folder`: shards, one index, provenance; their entries in the manifest."""
    indexes = {}
    for commit in commits:
        part = folder / f"part-{commit.unit}"
        part.mkdir(parents=True)
        for output in commit.outputs:
            if output.kind == split.parts:
                _link_or_download(store.uri(output.path), part / os.path.basename(output.path))
        indexes[part.name] = mds.read_index(part)
        (part / mds.INDEX).unlink()
    index = mds.merge_indexes(indexes)
    mds.write_index(folder, index)
    rows = [sum(shard["samples"] for shard in part["shards"]) for part in indexes.values()]
    _merge_provenance(folder, (store.read_part(c, kind=split.provenance) for c in commits), rows)
    return {
        "provenance_sha256": file_sha256(folder / "provenance.parquet"),
        "shards": [_shard(folder, entry) for entry in index["shards"]],
    }


def _shard(folder: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """The manifest's entry of a shard, from that of the index."""
    basename = mds.stored_file(entry)["basename"]
    return {
        "basename": basename,
        "bytes": (folder / basename).stat().st_size,
        "sha256": file_sha256(folder / basename),
        "rows": entry["samples"],
    }


def _merge_provenance(folder: Path, tables: Iterable[pa.Table], rows: Sequence[int]) -> None:
    """Write one table of the parts' tables; `rows` counts the rows of each part."""
    first = 0
    with pq.ParquetWriter(folder / "provenance.parquet", PROVENANCE, compression="zstd") as writer:
        for table, count in zip(tables, rows, strict=True):
            shifted = pa.compute.add(table["row"], first).combine_chunks()
            writer.write_table(table.set_column(0, PROVENANCE.field("row"), shifted))
            first += count


def _link_or_download(uri: str, target: Path) -> None:
    try:
        os.link(local_path(uri), target)  # same disk: no second copy of the data
    except OSError:
        download(uri, target)


def _move_folder(folder: Path, uri: str) -> None:
    """Move a generation to its place. On an object store, its index and manifest last."""
    if is_local(uri):
        os.rename(folder, local_path(uri))
        return
    fence()
    # of a run that died here, maybe with other content; not listed, or `publish` had seen it
    remove_tree(uri)
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    last = [f for f in files if f.name in (mds.INDEX, MANIFEST)]
    for part in ([f for f in files if f not in last], last):
        with ThreadPoolExecutor(4) as pool:  # each holds a file in memory
            list(pool.map(lambda file: _upload(file, f"{uri}/{file.relative_to(folder)}"), part))


def _upload(file: Path, uri: str) -> None:
    fence()  # or files that only a late run has would get into the generation of the other run
    if not create_only(uri, file.read_bytes()):
        raise Fenced(
            f"{uri}: another run writes this generation at the same time; nothing was published. "
            "Run again"
        )
