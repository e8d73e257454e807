"""Published generations as the trainer sees them: listed in the catalog, verified before a row is
read, never trusted later.

    RUN/catalog.jsonl                            one line per generation, with the sha256 of its manifest
    RUN/generations/gen-0001/manifest.json       rows, tokens, sha256 of every shard
    RUN/generations/gen-0001/index.json          what StreamingDataset and its readers go by
    RUN/generations/gen-0001/provenance.parquet  row -> spans of documents
    RUN/generations/gen-0001/held_out/           rows for evaluation alone, with an index and provenance of their own; or none

The catalog vouches for the manifest, the manifest for every shard. RUN is a folder, or a URL that
fsspec knows (s3://BUCKET/RUN). There each node copies the shards before they are read, and renames
each into its place once its sha256 is right:

    CACHE/<of the run>/gen-0001/                  index, shards, and last in manifest.sha256 of which manifest they are
    CACHE/<of the run>/gen-0001.copying           locked by who copies
"""

import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import fsspec

from stages.formats import mds

Mode = Literal["full", "quick"]


class GenerationFault(RuntimeError):
    """A generation is not what was published, or cannot be read: which, which file, expected,
    found, what to do.
    """


class Manifest(NamedTuple):
    """A generation that passed. `sha256` is of its manifest.json; `shard_rows` are rows by shard,
    in the order of the index.
    """

    run: str
    name: str
    sha256: str
    rows: int
    tokens: int
    seq_len: int
    tokenizer: str
    shard_rows: tuple[int, ...]


class Document(NamedTuple):
    """A document's span: tokens [start, start + length) of `row` of a generation, from the
    document's token `offset` on.
    """

    row: int
    doc_id: int
    start: int
    length: int
    offset: int
    url: str | None


def fault(name: str, file: str, *, expected: object, found: object, do: str) -> GenerationFault:
    """The one form of these messages."""
    return GenerationFault(f"generation {name}: {file}: expected {expected}, found {found}; {do}")


def is_remote(run: str) -> bool:
    """Whether a run lies on an object store."""
    return "://" in run.removeprefix("file://")


def folder_of(run: str, name: str, cache: str = "") -> Path:
    """Where the shards of a generation lie, or are copied to: below `cache`, by default a folder
    among the temporary files.
    """
    if not is_remote(run):
        return Path(run.removeprefix("file://")) / "generations" / name
    root = Path(cache or f"{tempfile.gettempdir()}/gristmill-{os.getuid()}")
    return root / hashlib.sha256(run.rstrip("/").encode()).hexdigest()[:16] / name.replace("/", "-")


def read_catalog(run: str) -> list[dict[str, Any]]:
    """Entries of the catalog, oldest first; [] where there is none.

    GenerationFault for a line that is no entry.
    """
    (fs, root), path, entries = _open(run), f"{run}/catalog.jsonl", []
    try:
        lines = fs.cat_file(f"{root}/catalog.jsonl").splitlines()
    except FileNotFoundError:
        return []
    for number, line in enumerate(lines):
        try:
            entry = json.loads(line)
            entries.append(
                {
                    **entry,
                    "name": str(entry["name"]),
                    "manifest_sha256": str(entry["manifest_sha256"]),
                }
            )
        except (ValueError, LookupError, TypeError) as error:
            raise GenerationFault(
                f"{path}: line {number + 1} is no entry of a catalog: {error!r}; restore the file"
            ) from error
    return entries


def verify_generation(
    run: str, entry: Mapping[str, Any], *, mode: Mode, cache: str = ""
) -> Manifest:
    """Check a generation against the catalog's `entry`. GenerationFault names the first thing that
    is wrong.

    Quick: manifest against catalog, index against manifest, presence and size of every shard. Full:
    sha256 of every shard as well, files side by side; a generation that passed is not hashed again
    by this process. This is less than `mds_verify`, which ran when it was published: bytes with the
    published sha256 need no second look inside, and here they are read once. On an object store
    either mode checks manifest and index alone, and `stage` the shards.
    """
    return _verify(
        run, _read_manifest(run, entry), entry["manifest_sha256"], mode=mode, cache=cache
    )


def verify_held_out(run: str, entry: Mapping[str, Any], *, cache: str = "") -> Manifest | None:
    """Check in full what a generation holds out for evaluation, None where that is nothing. What is
    remote is copied.

    It is a generation in itself, to `trainer.data` too, of the name "gen-0001/held_out", and its
    rows are in no other.
    """
    part = _part(_read_manifest(run, entry), f"{entry['name']}/held_out")
    if part["rows"] == 0:
        return None
    found = _verify(run, part, entry["manifest_sha256"], mode="full", cache=cache)
    stage(found, mode="full", cache=cache)
    return found


def stage(manifest: Manifest, *, mode: Mode, cache: str = "") -> None:
    """Copy what this node lacks of a generation on an object store; of one on a disk, nothing.

    A shard that is there is taken by its size, in mode "full" by its sha256; one that is copied
    always by that. Of several processes one copies, and the others wait for it. GenerationFault
    names the first shard that cannot be had, or that was asked for twice and is not what was
    published.
    """
    if not is_remote(manifest.run):
        return
    folder, (fs, root) = folder_of(manifest.run, manifest.name, cache), _open(manifest.run)
    entry, key = (
        {"name": manifest.name.partition("/")[0], "manifest_sha256": manifest.sha256},
        (str(folder), manifest.sha256),
    )
    part = _part(_read_manifest(manifest.run, entry), manifest.name)
    _index(manifest.run, part, manifest.sha256, folder)
    trusted = mode == "quick" or key in _hashed
    copy = partial(_copy, fs, f"{root}/generations/{manifest.name}", folder, manifest.name, trusted)
    with _alone(folder), ThreadPoolExecutor(8) as pool:
        for first in range(
            0, len(part["shards"]), 8
        ):  # eight at a time: a process that ends waits for those under way
            list(pool.map(copy, part["shards"][first : first + 8]))
    if mode == "full":
        _hashed.add(key)


def documents_of(run: str, name: str, rows: Iterable[int]) -> list[Document]:
    """The documents that rows of a generation are made of, in the order of the rows and of the
    spans within them.
    """
    import pyarrow.parquet as pq  # only where somebody asks: a training node need not carry it

    (fs, root), wanted = _open(run), [("row", "in", sorted(set(rows)))]
    # no threads: one of Arrow's that still holds a Python file when Python ends aborts the process
    with fs.open(f"{root}/generations/{name}/provenance.parquet", "rb") as stream:
        table = pq.read_table(
            stream,
            columns=list(Document._fields),
            filters=wanted,
            use_threads=False,
            pre_buffer=False,
        )
    return [
        Document(**span)
        for span in table.sort_by([("row", "ascending"), ("start", "ascending")]).to_pylist()
    ]


_RESTORE = "restore the generation from a copy, or leave it out of `generations`"
_hashed: set[tuple[str, str]] = (
    set()
)  # folder and manifest of generations whose shards this process has hashed


@contextmanager
def _readable(name: str, file: str = "", *, remote: bool = False) -> Iterator[None]:
    """Of a disk that cannot be read the generation is at fault; of a store that does not answer it
    is not.
    """
    try:
        yield
    except OSError as error:
        if remote and not isinstance(error, FileNotFoundError):
            raise
        told, found = file or str(error.filename), error.strerror or error
        raise fault(name, told, expected="a readable file", found=found, do=_RESTORE) from error


def _verify(
    run: str, manifest: Mapping[str, Any], sha256: str, *, mode: Mode, cache: str
) -> Manifest:
    name, folder = manifest["name"], folder_of(run, manifest["name"], cache)
    with _readable(name, remote=is_remote(run)):
        shard_rows = _index(run, manifest, sha256, folder)
        for shard in () if is_remote(run) else manifest["shards"]:
            _check_size(folder, name, shard)
        if mode == "full" and not is_remote(run) and (str(folder), sha256) not in _hashed:
            _check_hashes(folder, name, manifest["shards"])
            _hashed.add((str(folder), sha256))
    shape = {key: manifest[key] for key in ("rows", "tokens", "seq_len", "tokenizer")}
    return Manifest(run, name, sha256, **shape, shard_rows=tuple(shard_rows))


def _part(manifest: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The manifest of a generation, or of what it holds out: of 0 rows where that is nothing."""
    return {
        **manifest,
        **((manifest.get("held_out") or {"rows": 0}) if "/" in name else {}),
        "name": name,
    }


def _index(run: str, manifest: Mapping[str, Any], sha256: str, folder: Path) -> list[int]:
    """Rows of each shard by the index, which is copied where it is not there."""
    if not is_remote(run):
        return _check_index(folder, manifest)
    with _alone(folder):
        mark = folder / "manifest.sha256"
        with suppress(OSError, GenerationFault):
            if mark.read_text() == sha256:
                return _check_index(folder, manifest)
        shutil.rmtree(
            folder, ignore_errors=True
        )  # damaged, or of another generation that was published under this name
        folder.mkdir()
        (folder / mds.INDEX).write_bytes(_read(run, manifest["name"], mds.INDEX))
        rows = _check_index(folder, manifest)
        mark.write_text(sha256)
        return rows


def _copy(
    fs: Any, source: str, folder: Path, name: str, trusted: bool, shard: Mapping[str, Any]
) -> None:
    path = folder / shard["basename"]
    if (
        path.is_file()
        and path.stat().st_size == shard["bytes"]
        and (trusted or _sha256(path) == shard["sha256"])
    ):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(
        f"{path.name}.{socket.gethostname()}.tmp"
    )  # what a kill leaves is overwritten
    for _ in range(2):
        with _readable(name, shard["basename"], remote=True):
            fs.get_file(f"{source}/{shard['basename']}", str(temporary))
        found = _sha256(temporary)
        if found == shard["sha256"]:
            temporary.replace(path)
            return
    raise fault(
        name, shard["basename"], expected=f"sha256 {shard['sha256']}", found=found, do=_RESTORE
    )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.copying", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(
                file, fcntl.LOCK_UN
            )  # to close it is not enough: a loader's process may have inherited it


def _open(run: str) -> tuple[Any, str]:
    """The file system of a run, and its path there, with the retries of `stages.ledger.open_fs`."""
    os.environ.setdefault("AWS_RETRY_MODE", "adaptive")
    os.environ.setdefault("AWS_MAX_ATTEMPTS", "6")
    fs, path = fsspec.core.url_to_fs(run, use_listings_cache=False)
    return fs, path.rstrip("/")


def _read(run: str, name: str, file: str) -> bytes:
    fs, root = _open(run)
    with _readable(name, file, remote=is_remote(run)):
        return bytes(fs.cat_file(f"{root}/generations/{name}/{file}"))


def _read_manifest(run: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    data = _read(run, entry["name"], "manifest.json")
    found = hashlib.sha256(data).hexdigest()
    if found != entry["manifest_sha256"]:
        raise fault(
            entry["name"],
            "manifest.json",
            expected=f"sha256 {entry['manifest_sha256']}",
            found=found,
            do=_RESTORE,
        )
    manifest: dict[str, Any] = json.loads(data)  # the very bytes that were published
    for key in ("rows", "tokens", "seq_len", "tokenizer"):
        if entry.get(key, manifest[key]) != manifest[key]:
            raise fault(
                entry["name"],
                f"{key} in catalog.jsonl",
                expected=manifest[key],
                found=entry[key],
                do=_RESTORE,
            )
    return manifest


def _check_index(folder: Path, manifest: Mapping[str, Any]) -> list[int]:
    """Rows of each shard; an index with other shards, rows or columns than the manifest's is a
    fault.
    """
    name = manifest["name"]
    try:
        shards = mds.read_index(folder)["shards"]
    except ValueError as error:
        raise fault(
            name, mds.INDEX, expected="an index of MDS shards", found=error, do=_RESTORE
        ) from error
    listed = [
        ((shard["zip_data"] or shard["raw_data"])["basename"], shard["samples"]) for shard in shards
    ]
    named = [(shard["basename"], shard["rows"]) for shard in manifest["shards"]]
    total = sum(rows for _, rows in listed)
    if total != manifest["rows"]:
        raise fault(
            name, mds.INDEX, expected=f"{manifest['rows']} rows", found=f"{total} rows", do=_RESTORE
        )
    for expected, found in zip(named, listed, strict=False):
        if expected != found:
            raise fault(
                name, mds.INDEX, expected=f"(shard, rows) {expected}", found=found, do=_RESTORE
            )
    if len(named) != len(listed):
        raise fault(
            name,
            mds.INDEX,
            expected=f"{len(named)} shards",
            found=f"{len(listed)} shards",
            do=_RESTORE,
        )
    columns = {"tokens": f"ndarray:uint32:{manifest['seq_len']}", "spans": "ndarray:uint32"}
    for shard in shards:
        written = dict(zip(shard["column_names"], shard["column_encodings"], strict=True))
        if written != columns:
            raise fault(
                name,
                f"columns of {shard['raw_data']['basename']}",
                expected=columns,
                found=written,
                do=_RESTORE,
            )
    return [rows for _, rows in listed]


def _check_size(folder: Path, name: str, shard: Mapping[str, Any]) -> None:
    path = folder / shard["basename"]
    if not path.is_file():
        raise fault(name, shard["basename"], expected="a file", found="none", do=_RESTORE)
    if path.stat().st_size != shard["bytes"]:
        found = f"{path.stat().st_size} bytes"
        raise fault(
            name, shard["basename"], expected=f"{shard['bytes']} bytes", found=found, do=_RESTORE
        )


def _check_hashes(folder: Path, name: str, shards: list[dict[str, Any]]) -> None:
    # hashing releases the GIL; 16 threads keep a fast disk busy and are no harm to a slow one
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda shard: _sha256(folder / shard["basename"]), shards)
        for shard, digest in zip(shards, found, strict=True):
            if digest != shard["sha256"]:
                pool.shutdown(wait=False, cancel_futures=True)
                raise fault(
                    name,
                    shard["basename"],
                    expected=f"sha256 {shard['sha256']}",
                    found=digest,
                    do=_RESTORE,
                )


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
