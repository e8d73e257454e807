"""List the input files that paths name, and identify their content."""

import glob
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from stages.read.compression import COMPRESSED_SUFFIXES, HEAD, Damaged, decompressed, kind_of
from stages.read.fetch import FetchOptions, is_http, local_copy
from stages.storage.digests import file_sha256
from stages.storage.files import open_fs

JSON_SUFFIXES = (
    *(name + packed for name in (".jsonl", ".ndjson") for packed in ("", *COMPRESSED_SUFFIXES)),
    *(f".json{packed}" for packed in COMPRESSED_SUFFIXES),  # .json may be anything
)
WARC_SUFFIXES = tuple(
    name + packed for name in (".warc", ".wet", ".arc") for packed in ("", ".gz", ".zst")
)
_SUFFIXES = (*WARC_SUFFIXES, *JSON_SUFFIXES, ".parquet")
_LISTING = re.compile(r"\.paths(\.(gz|zst|zstd|xz|bz2|txt))?$", re.IGNORECASE)
_UNFINISHED = (
    *(".tmp", ".temp", ".part", ".partial", ".crdownload", ".download", ".inprogress"),
    *(".filepart", "._copying_", ".swp", ".bak", "~"),
)


def expand_inputs(paths: list[str], *, base_uri: str) -> list[str]:
    """The files that `paths` name, in that order (sorted within a folder or pattern), each once.

    A path is a local file, folder (all files with known suffixes, at any depth) or pattern, the
    same on s3://, an http URL, or a listing like Common Crawl's (*.paths, compressed or not, local
    or remote), whose lines are addresses, or are appended to `base_uri`. In folders and patterns,
    files that are hidden (names that begin with . or _) or unfinished (.tmp) are no inputs.
    ValueError names a path that matches nothing, and a listing that cannot be read.
    """
    files: dict[str, None] = {}
    for path in paths:
        matches = _files_at(path)
        if not matches:
            raise ValueError(
                f"input {path!r} matches no file; folders are searched for WARC, WET, JSONL and "
                "Parquet files by their suffixes, without names that begin with . or _"
            )
        for match in matches:
            is_listing = _LISTING.search(match.partition("?")[0] if is_http(match) else match)
            files.update(dict.fromkeys(_listed_in(match, base_uri) if is_listing else [match]))
    return list(files)


def _files_at(path: str) -> list[str]:
    if is_http(path):
        return [path]
    if path.startswith("s3://"):
        return _s3_files(path)
    if Path(path).is_file():  # before patterns: a name may have brackets
        return [path]
    if Path(path).is_dir():
        names = (str(file) for file in Path(path).rglob("*") if file.is_file())
        return _inputs_below(path, names)
    return _matches(path, (f for f in glob.glob(path, recursive=True) if Path(f).is_file()))


def _s3_files(path: str) -> list[str]:
    fs, root = open_fs(path)
    if fs.isfile(root):
        return [path]
    if glob.has_magic(path):
        names = fs.glob(root, detail=True).items()
        files = (fs.unstrip_protocol(name) for name, info in names if info["type"] == "file")
        return _matches(path, files)
    try:
        return _inputs_below(path, (fs.unstrip_protocol(name) for name in fs.find(root)))
    except FileNotFoundError:  # a bucket that does not exist
        return []


def _inputs_below(folder: str, names: Iterable[str]) -> list[str]:
    with_suffix = (name for name in names if name.lower().endswith(_SUFFIXES))
    return sorted(name for name in with_suffix if is_input(name.removeprefix(folder)))


def _matches(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that a pattern is meant to match: dir/_* asks for what begins with _, dir/* not."""
    first_magic = re.search(r"[*?\[]", pattern)
    root = pattern[: pattern.rfind("/", 0, first_magic.start()) + 1] if first_magic else ""
    rest = pattern.removeprefix(root)
    return sorted(name for name in names if is_input(name.removeprefix(root), rest))


def is_input(name: str, pattern: str = "") -> bool:
    """Whether a name is neither hidden nor unfinished, or the pattern asks for such names."""
    first_letters = {part[:1] for part in pattern.split("/")}
    for part in filter(None, name.split("/")):
        if part[0] in "._" and part[0] not in first_letters:
            return False
        if part.lower().endswith(_UNFINISHED) and not pattern.lower().endswith(_UNFINISHED):
            return False
    return True


# --- listings -------------------------------------------------------------------------------------


def _listed_in(path: str, base_uri: str) -> list[str]:
    """The files that a listing names. ValueError if it names none, or cannot be read."""
    with local_copy(path, options=FetchOptions()) as local, open(local, "rb") as file:
        try:
            data = decompressed(file).read()
            # by the byte order mark: shells of Windows write UTF-16
            lines = data.decode(json.detect_encoding(data[:4])).splitlines()
        except (Damaged, UnicodeDecodeError) as error:
            raise ValueError(f"listing {path}: cannot be read ({error}); fetch it again") from error
    if (kind := kind_of(data[:HEAD])) is not None:
        raise ValueError(f"listing {path}: holds {kind}; a listing has an address on each line")
    names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not names:
        raise ValueError(f"listing {path}: names no file")
    return [_address(name, base_uri) for name in names]


def _address(name: str, base_uri: str) -> str:
    """The address of a line of a listing: itself, or below `base_uri`."""
    if "://" in name or not base_uri or (name.startswith("/") and Path(name).is_file()):
        return name
    return f"{base_uri.rstrip('/')}/{name.lstrip('/')}"


# --- identity -------------------------------------------------------------------------------------


def fingerprint(path: str) -> str:
    """A string that changes when the file does.

    Size and modification time of a local file, size and ETag on s3; of an http URL the URL itself.
    A relative path is a file sent with a Ray job, which each node unpacks at a different time: its
    content counts. FileNotFoundError if there is no such file.
    """
    if is_http(path):
        return path
    if path.startswith("s3://"):
        info = open_fs(path)[0].info(path)
        return f"{info['size']}:{info.get('ETag', '').strip(chr(34))}"
    stat = os.stat(path)
    return f"{stat.st_size}:{stat.st_mtime_ns if os.path.isabs(path) else file_sha256(Path(path))}"
