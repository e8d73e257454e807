"""Files of checkpoints: their names, hashes, reading and writing, on a disk or an object store.

    FOLDER/step-00000100/__0_0.distcp   weights and optimizer state of rank 0; one file per rank
    FOLDER/step-00000100/.metadata      where the pieces of each tensor are
    FOLDER/step-00000100/meta.json      written last: the sha256 of every other file

A folder without meta.json was cut off while it was written or removed. FOLDER is one that every
rank sees: on a disk, or a URL (s3://BUCKET/RUN), where meta.json appears in one PUT. A save that is
killed may leave parts of an upload, which only a lifecycle rule of the bucket removes.
"""

import itertools
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load

from stages.storage.digests import stream_sha256
from stages.storage.errors import full_disk
from stages.storage.files import (
    fs_options,
    is_local,
    open_fs,
    read_bytes,
    remove,
    remove_tree,
    sync_folder,
    write_atomically,
)
from trainer.config import CONFIG, RENAMED_KEYS

VERSION = 1
META = "meta.json"
Meta = dict[str, Any]
_NAME = re.compile(r"step-(\d+)(?:-(\d+))?")  # the second number: a step that was saved again


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none of the existing ones can be used."""


@contextmanager
def as_errors(folder: str) -> Iterator[None]:
    """Raise DCP's exception, which is not an Exception (torch 2.13), as CheckpointError."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        # torch reports a write that was cut short by a full disk as an unexpected position
        is_full = is_local(folder) and "unexpected pos" in str(cause)
        what = f"{full_disk(folder)} ({cause!r})" if is_full else repr(cause)
        raise CheckpointError(f"{folder}: rank {rank}: {what}") from error


# --- names ----------------------------------------------------------------------------------------


def locate(folder: Path | str) -> str:
    """The absolute path or the URL of a folder. ValueError for a URL that cannot be used."""
    uri = str(folder)
    if re.match(r"\w{2,}:/(?!/)", uri):
        raise ValueError(
            f"'{uri}' is a URL that was made a Path and lost a slash; pass it as a string"
        )
    if not is_local(uri) and set(uri) & set("*?["):
        raise ValueError(
            f"'{uri}': fsspec removes by pattern, and would take * ? [ for one; name another folder"
        )
    fs, path = open_fs(uri)
    return path if is_local(uri) else str(fs.unstrip_protocol(path))


def checkpoint_folder(training: str) -> str:
    """The folder or URL of a training's checkpoints, by its directory or by this folder itself."""
    if not Path(training, CONFIG).exists():
        return training
    config = json.loads(Path(training, CONFIG).read_bytes())
    if "checkpoint" not in config:
        raise ValueError(f"{training}: {CONFIG} is not of a training; name a training's directory")
    return config["checkpoint"]["folder"] or f"{training}/checkpoints"


def names_of(folder: str) -> set[str]:
    """Names in a folder; none if it is absent, but CheckpointError if its bucket is."""
    fs, path = open_fs(folder)
    try:
        return {name.rstrip("/").rpartition("/")[2] for name in fs.ls(path, detail=False)}
    except FileNotFoundError as error:
        # a mistyped bucket is not a run that begins, and torch's writer would create it
        bucket = path.partition("/")[0]
        if not fs.exists(bucket or "/"):
            raise CheckpointError(
                f"{folder}: bucket '{bucket}' cannot be reached ({error}); make it, or name another"
            ) from None
        return set()


def committed_names(folder: str) -> list[str]:
    """Names of the checkpoints in a folder, the newest first."""
    # by listing: with a store that does not answer `exists` is False, and folders that are not
    # committed are removed
    matches = [
        match
        for name in names_of(folder)
        if (match := _NAME.fullmatch(name)) and META in names_of(f"{folder}/{name}")
    ]
    matches.sort(key=lambda match: (int(match[1]), int(match[2] or 0)), reverse=True)
    return [match[0] for match in matches]


def committed(folder: Path | str) -> dict[int, str]:
    """The checkpoints of a folder or URL, whole or damaged, by step in ascending order."""
    root = locate(folder)
    return {int(name.split("-")[1]): f"{root}/{name}" for name in reversed(committed_names(root))}


def new_folder(folder: str, step: int) -> str:
    """Make the folder of a save, after removing those that were cut off; its name.

    An earlier checkpoint of this step stays until the new one is complete.
    """
    complete = committed_names(folder)
    for name in names_of(folder):
        if _NAME.fullmatch(name) and name not in complete:
            remove_checkpoint(f"{folder}/{name}")
    taken = names_of(folder)  # again: what could not be removed keeps its name
    names = (f"step-{step:08}" + (f"-{n}" if n else "") for n in itertools.count())
    name = next(name for name in names if name not in taken)
    if is_local(folder):  # elsewhere the names of files make their folders
        os.makedirs(f"{folder}/{name}")
        sync_folder(folder)
    return name


def remove_checkpoint(folder: str) -> None:
    """Remove a checkpoint, meta.json first.

    If killed half-way, the rest is not a checkpoint, and the next save removes it.
    """
    remove(f"{folder}/{META}")
    with suppress(OSError):
        remove_tree(folder)


# --- meta.json and hashes -------------------------------------------------------------------------


def inspect_files(folder: str, rank: int, ranks: int) -> tuple[Meta | None, str | None]:
    """meta.json, and what is wrong with it or with this rank's share of the files.

    Raises only if the store does not answer.
    """
    meta, fault = inspect_meta(folder)
    if meta is None:
        return None, fault
    for name, expected in sorted(meta["files"].items())[rank::ranks]:
        try:
            actual = size_and_hash(f"{folder}/{name}", expected_bytes=expected["bytes"])
        except _damage_errors(folder) as error:
            return meta, f"{name} cannot be read: {error}"
        if actual != expected:
            return meta, f"{name}: expected {expected}, found {actual}"
    return meta, None


def inspect_meta(folder: str) -> tuple[Meta | None, str | None]:
    """meta.json, or what is wrong with it."""
    try:
        return read_meta(folder), None
    except _damage_errors(folder) as error:
        return None, str(error)


def _damage_errors(folder: str) -> tuple[type[Exception], ...]:
    """Errors that mean that a checkpoint is damaged.

    A store's errors, except absence, may pass, and must not cost the checkpoint.
    """
    return (OSError if is_local(folder) else FileNotFoundError, ValueError)


def read_meta(folder: str) -> Meta:
    """meta.json. ValueError for one of another version, FileNotFoundError if there is none."""
    meta: Any = json.loads(read_bytes(f"{folder}/{META}"))
    version = meta.get("version") if isinstance(meta, dict) else None
    if version != VERSION:
        raise ValueError(f"{META} of version {version}, this code reads {VERSION}")
    return dict(meta)


def model_settings(meta: Meta) -> dict[str, Any]:
    """The settings of a saved model under their current names."""
    return {
        RENAMED_KEYS.get(f"model.{key}", key).removeprefix("model."): value
        for key, value in meta["model"].items()
    }


def write_meta(folder: str, meta: Meta) -> None:
    """Write meta.json atomically and durably.

    A store's PUT is both; on a disk DCP has synced the files but not their names.
    """
    if is_local(folder):
        sync_folder(folder)
    write_atomically(f"{folder}/{META}", json.dumps(meta, indent=1).encode())
    if is_local(folder):
        sync_folder(folder)


def hash_files(folder: str, rank: int) -> dict[str, dict[str, Any]]:
    """Size and sha256 of the files that a rank has written, by DCP's names.

    Read again, from the page cache if that is large enough.
    """
    prefixes = (f"__{rank}_", ".metadata") if rank == 0 else f"__{rank}_"
    return {
        name: size_and_hash(f"{folder}/{name}")
        for name in names_of(folder)
        if name.startswith(prefixes)
    }


def size_and_hash(uri: str, *, expected_bytes: int | None = None) -> dict[str, Any]:
    """Size and sha256; only the size if it is not `expected_bytes`, as hashing reads the file."""
    fs, path = open_fs(uri)
    size = fs.size(path)
    if expected_bytes not in (None, size):
        return {"bytes": size}
    with fs.open(path, "rb") as stream:
        return {"bytes": size, "sha256": stream_sha256(stream)}


# --- tensors --------------------------------------------------------------------------------------


def writer_of(folder: str) -> FileSystemWriter:
    """A writer of one file per rank.

    torch would choose the same by the address alone, but wait for the GPU every 10 MB (2.13, read).
    """
    if is_local(folder):
        return FileSystemWriter(folder, single_file_per_rank=True, sync_files=True)
    # private (2.13): it stages, and there is no other
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

    # sync_files would call sync(2), of the whole machine, for a file without a number
    options = fs_options(folder)
    return FsspecWriter(folder, single_file_per_rank=True, sync_files=False, **options)


def read_state(folder: str, state: dict[str, Any], **options: Any) -> None:
    """Read into the tensors of `state`.

    From object storage each rank first copies the files that it needs to the temporary folder.

    torch reads them in no order: over S3, through a window of 50 MB, 63 MB in 60 tensors took
    209 MB of reads.
    """
    with as_errors(folder):
        if is_local(folder):
            load(state, checkpoint_id=folder, **options)
            return
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

        protocol = folder.partition("://")[0]
        reader: Any = FsspecReader(f"simplecache::{folder}", **{protocol: fs_options(folder)})
        try:
            load(state, storage_reader=reader, **options)
        finally:
            reader.fs.fs.clear_cache()
