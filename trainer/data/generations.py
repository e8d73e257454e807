"""Published generations as the trainer reads them: verified before the first row is read.

`stages.storage.catalog` describes the files. From an object store each node copies the shards
before they are read, and renames each into its place once its sha256 is right:

    CACHE/<hash of RUN>/gen-0001/          index, shards, and last the file manifest.sha256
    CACHE/<hash of RUN>/gen-0001.copying   locked by the process that copies
"""

import itertools
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from stages.formats import mds
from stages.formats.tokenizer import Tokenizer, TokenizerOptions, load_tokenizer
from stages.storage.catalog import (
    generation_error,
    generation_uri,
    hash_mismatches,
    index_mismatches,
    raise_first,
    read_manifest,
    read_same_manifest,
    reading,
    size_mismatches,
    stored_files,
)
from stages.storage.digests import bytes_sha256, file_sha256
from stages.storage.files import is_local, local_path, open_fs, read_bytes, write_atomically
from stages.storage.locks import lock

Mode = Literal["full", "quick"]

# of tiktoken's encodings, for manifests of earlier versions
_VOCAB_SIZES = {
    **{"cl100k_base": 100_277, "o200k_base": 200_019, "o200k_harmony": 201_088},
    **{"gpt2": 50_257, "r50k_base": 50_257, "p50k_base": 50_281, "p50k_edit": 50_284},
}


class RowShape(NamedTuple):
    """What all rows of a training have in common; None where a manifest of an earlier version, or a
    checkpoint, does not say.

    Ids of tokens are below `vocab_size`. A tokenizer is its `tokenizer_sha256`: its file may be
    called otherwise.
    """

    seq_len: int | None = None
    tokenizer: str | None = None
    tokenizer_sha256: str | None = None
    vocab_size: int | None = None
    end_of_text: int | None = None
    add_begin_of_text: bool | None = None

    def differences(self, other: "RowShape") -> list[str]:
        """Keys of which both have a value, and not the same."""
        keys = [
            key
            for key, ours, theirs in zip(self._fields, self, other, strict=True)
            if None not in (ours, theirs) and ours != theirs
        ]
        if self.tokenizer_sha256 is not None is not other.tokenizer_sha256:
            return [key for key in keys if key != "tokenizer"]
        return keys

    def completed(self, other: "RowShape") -> "RowShape":
        """This with the values of another one where it has none."""
        known = {key: value for key, value in self._asdict().items() if value is not None}
        return other._replace(**known)

    def describe(self, keys: Sequence[str]) -> str:
        """'seq_len 2048, tokenizer cl100k_base'."""
        return ", ".join(f"{key} {getattr(self, key)}" for key in keys)


class Manifest(NamedTuple):
    """A split of a generation that was verified.

    `sha256` is of its manifest.json; `shard_rows` are rows by shard, in the order of the index.
    """

    run: str
    name: str
    sha256: str
    rows: int
    shape: RowShape
    shard_rows: tuple[int, ...]

    @property
    def seq_len(self) -> int:
        """Tokens of a row."""
        assert self.shape.seq_len is not None
        return self.shape.seq_len


class Share(NamedTuple):
    """Which shards a rank hashes: those of its number, modulo the number of ranks."""

    rank: int = 0
    ranks: int = 1

    def of(self, shards: Sequence[Any]) -> Sequence[Any]:
        """The shards of this rank; over all ranks each shard is hashed once."""
        return shards[self.rank :: self.ranks]


WHOLE = Share()


class Document(NamedTuple):
    """A document's span in a row of a generation.

    Tokens [start, start + length) of `row` are the document's, from its token `offset` on.
    """

    row: int
    doc_id: int
    start: int
    length: int
    offset: int
    url: str | None


def folder_of(run: str, name: str, cache: str = "") -> Path:
    """The local folder of a generation's shards, or of their copies for a remote run.

    Copies are below `cache`, by default a folder among the temporary files.
    """
    if is_local(run):
        return local_path(generation_uri(run, name))
    root = Path(cache or f"{tempfile.gettempdir()}/gristmill-{os.getuid()}")
    return root / bytes_sha256(run.rstrip("/").encode())[:16] / name.replace("/", "-")


def verify_generation(
    run: str,
    entry: Mapping[str, Any],
    *,
    mode: Mode,
    share: Share = WHOLE,
    cache: str = "",
) -> Manifest:
    """Check a generation against the catalog's `entry`. GenerationError names the first mismatch.

    Quick: manifest against catalog, index against manifest, presence and size of every shard. Full:
    sha256 of this rank's share of the shards as well, in parallel; this process does not hash a
    share that passed again. This is less than `mds_verify`, which ran when it was published: bytes
    with the published sha256 need no second look inside, and here they are read once. On an object
    store either mode checks manifest and index alone, and `stage` checks the shards.
    """
    return _verify(run, read_manifest(run, entry), entry, mode=mode, share=share, cache=cache)


def verify_held_out(run: str, entry: Mapping[str, Any], *, cache: str = "") -> Manifest | None:
    """Check the held-out split of a generation in full, after copying it if it is remote.

    None if there is none.

    It is a generation of its own here, named "gen-0001/held_out", and its rows are in no other.
    """
    split = _split(read_manifest(run, entry), f"{entry['name']}/held_out")
    if split["rows"] == 0:
        return None
    manifest = _verify(run, split, entry, mode="full", share=WHOLE, cache=cache)
    stage(manifest, mode="full", cache=cache)
    return manifest


def verify_whole(run: str, entry: Mapping[str, Any], *, cache: str = "") -> Manifest | None:
    """Check a generation in full, after copying it if it is remote; None if it has no rows."""
    manifest = verify_generation(run, entry, mode="full", cache=cache)
    stage(manifest, mode="full", cache=cache)
    return manifest if manifest.rows else None


def stage(manifest: Manifest, *, mode: Mode, cache: str = "") -> None:
    """Copy the shards of a remote generation that this node lacks; nothing for one on a disk.

    A shard that is there counts if its size is right, in mode "full" if its sha256 is; a copied one
    is always hashed. Of several processes one copies, and the others wait for it. GenerationError
    names the first shard that cannot be read, or was wrong in two downloads.
    """
    run, name = manifest.run, manifest.name
    if is_local(run):
        return
    folder, (fs, source) = folder_of(run, name, cache), open_fs(generation_uri(run, name))
    published = read_same_manifest(run, name.partition("/")[0], sha256=manifest.sha256)
    split, key = _split(published, name), (str(folder), manifest.sha256, WHOLE)
    _copy_index(run, split, manifest.sha256, folder)
    trusted = mode == "quick" or key in _hashed
    copy = partial(_copy_shard, fs, source, folder, manifest, trusted)
    with _copying_lock(folder), ThreadPoolExecutor(8) as pool:
        # eight at a time: a process that ends waits for those that have begun
        files = stored_files(split)
        for first in range(0, len(files), 8):
            list(pool.map(copy, files[first : first + 8]))
    if mode == "full":
        _hashed.add(key)


def load_generation_tokenizer(run: str, entry: Mapping[str, Any], *, cache: str = "") -> Tokenizer:
    """The tokenizer that a generation was packed with, from the generation's copy of its file.

    GenerationError if that is not what was published.
    """
    name, manifest = entry["name"], read_manifest(run, entry)
    options = TokenizerOptions(**manifest.get("tokenizer_options", {}))
    file = manifest.get("tokenizer_file")
    if file is None:  # a name of tiktoken's
        return load_tokenizer(manifest["tokenizer"], options)
    folder = folder_of(run, name, cache)
    with reading(run, name, file["basename"]):
        if not is_local(run):
            _copy_index(run, manifest, entry["manifest_sha256"], folder)
            data = read_bytes(f"{generation_uri(run, name)}/{file['basename']}")
            write_atomically(str(folder / file["basename"]), data)
        raise_first(name, size_mismatches(folder, [file]))
        raise_first(name, hash_mismatches(folder, [file]))
    return load_tokenizer(str(folder / file["basename"]), options)


def documents_of(run: str, name: str, rows: Iterable[int]) -> list[Document]:
    """The documents in some rows of a generation, in the order of rows and of the spans in each."""
    import pyarrow.parquet as pq  # here: a training node may do without it

    fs, path = open_fs(f"{generation_uri(run, name)}/provenance.parquet")
    # no threads: one of Arrow's that still holds a Python file when Python ends aborts the process
    with fs.open(path, "rb") as stream:
        table = pq.read_table(
            stream,
            columns=list(Document._fields),
            filters=[("row", "in", sorted(set(rows)))],
            use_threads=False,
            pre_buffer=False,
        )
    spans = table.sort_by([("row", "ascending"), ("start", "ascending")])
    return [Document(**span) for span in spans.to_pylist()]


def documents_from(run: str, name: str, hosts: Iterable[str]) -> Iterator[Document]:
    """The documents of a generation from some hosts and those below them, in the order of rows."""
    import pyarrow.parquet as pq

    wanted = tuple(f".{host.lower()}" for host in hosts)
    fs, path = open_fs(f"{generation_uri(run, name)}/provenance.parquet")
    with fs.open(path, "rb") as stream:  # written in the order of rows
        batches = pq.ParquetFile(stream).iter_batches(columns=Document._fields, use_threads=False)
        for span in itertools.chain.from_iterable(batch.to_pylist() for batch in batches):
            if f".{_host(span['url'])}".endswith(wanted):
                yield Document(**span)


def _host(url: str | None) -> str:
    try:
        return urlsplit(url or "").hostname or ""
    except ValueError:  # as of "http://["
        return ""


# folder, manifest's sha256 and share of the generations whose shards this process has hashed
_hashed: set[tuple[str, str, Share]] = set()


def _split(manifest: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A generation as its manifest has it, or its held-out split by the name 'gen-0001/held_out'.

    A split that does not exist has 0 rows.
    """
    held_out = {"tokenizer_file": None, **(manifest.get("held_out") or {"rows": 0})}
    return {**manifest, **(held_out if "/" in name else {}), "name": name}


def _verify(
    run: str,
    split: Mapping[str, Any],
    entry: Mapping[str, Any],
    *,
    mode: Mode,
    share: Share,
    cache: str,
) -> Manifest:
    name, sha256 = split["name"], entry["manifest_sha256"]
    folder, files = folder_of(run, name, cache), stored_files(split)
    with reading(run, name):
        if not is_local(run):
            _copy_index(run, split, sha256, folder)
        else:
            raise_first(name, index_mismatches(folder, split))
            raise_first(name, size_mismatches(folder, files))
            key = str(folder), sha256, share
            if mode == "full" and key not in _hashed:
                raise_first(name, hash_mismatches(folder, share.of(files)))
                _hashed.add(key)
    rows = tuple(shard["rows"] for shard in split["shards"])
    return Manifest(run, name, sha256, split["rows"], _shape(split), shard_rows=rows)


def _shape(split: Mapping[str, Any]) -> RowShape:
    shape = RowShape(*map(split.get, RowShape._fields))
    if shape.vocab_size is None:
        shape = shape._replace(vocab_size=_VOCAB_SIZES.get(split["tokenizer"]))
    return shape


def _copy_index(run: str, split: Mapping[str, Any], sha256: str, folder: Path) -> None:
    """Copy the index of a remote generation, unless the folder has the one of this manifest."""
    name, mark = split["name"], folder / "manifest.sha256"
    with _copying_lock(folder):
        with suppress(OSError):
            if mark.read_text() == sha256 and not index_mismatches(folder, split):
                return
        # damaged, or of another generation that was published under this name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        with reading(run, name, mds.INDEX):
            data = read_bytes(f"{generation_uri(run, name)}/{mds.INDEX}")
        (folder / mds.INDEX).write_bytes(data)
        raise_first(name, index_mismatches(folder, split))
        mark.write_text(sha256)


def _copy_shard(
    fs: Any, source: str, folder: Path, manifest: Manifest, trusted: bool, shard: Mapping[str, Any]
) -> None:
    """Copy a shard unless it is there; `trusted` says that its size is proof enough."""
    basename, path = shard["basename"], folder / shard["basename"]
    if not size_mismatches(folder, [shard]) and (trusted or file_sha256(path) == shard["sha256"]):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # a fixed name per node: what a killed process leaves is overwritten
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}.tmp")
    for _ in range(2):
        with reading(manifest.run, manifest.name, basename):
            fs.get_file(f"{source}/{basename}", str(temporary))
        sha256 = file_sha256(temporary)
        if sha256 == shard["sha256"]:
            temporary.replace(path)
            return
    expected = f"sha256 {shard['sha256']}"
    raise generation_error(manifest.name, basename, expected=expected, found=sha256)


@contextmanager
def _copying_lock(folder: Path) -> Iterator[None]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock(folder.with_name(f"{folder.name}.copying")):
        yield
