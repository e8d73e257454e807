"""List the input files that paths name, and make each available as a local file.

Common Crawl asks for few connections and patience (commoncrawl.org/faq): connections are limited
per node, by file locks that all processes of the node share, and after a refusal the client waits
longer.
"""

import glob
import gzip
import hashlib
import os
import random
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import requests
import urllib3
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from stages.storage.digests import file_sha256
from stages.storage.files import open_fs
from stages.storage.locks import try_lock

USER_AGENT = "gristmill/0.1 (builds text corpora from web archives; python-requests)"
SUFFIXES = (
    ".warc",
    ".warc.gz",
    ".wet",
    ".wet.gz",
    ".arc",
    ".arc.gz",
    ".jsonl",
    ".jsonl.gz",
    ".jsonl.zst",
    ".parquet",
)
_LISTING_SUFFIX = ".paths.gz"
_CHUNK = 1 << 20
_MAX_WAIT_SECONDS = 300.0


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class FetchOptions:
    """How to download, politely.

    `connections` is per node. `attempts` includes the first, and starts again after each further
    MB of progress. The wait after attempt n is `backoff_seconds` x 2^(n - 1), more or less by up to
    half, at most 5 minutes. `timeout_seconds` is for connecting, and for each wait for bytes.
    """

    connections: int = Field(default=4, ge=1)
    attempts: int = Field(default=8, ge=1)
    backoff_seconds: float = Field(default=2.0, ge=0)
    timeout_seconds: float = Field(default=60.0, gt=0)


class FetchError(OSError):
    """A file cannot be downloaded.

    The message names the file, the server's answer, the number of attempts, and what to do.
    """


# --- input files ----------------------------------------------------------------------------------


def expand_inputs(paths: list[str], *, base_uri: str) -> list[str]:
    """The files that `paths` name, in that order (sorted within a folder or pattern), each once.

    A path is a local file, folder (all files with known suffixes, at any depth) or pattern, the
    same on s3://, an http URL, or a Common Crawl listing (*.paths.gz, local or remote), whose lines
    are appended to `base_uri`. ValueError names a path that matches nothing.
    """
    files: dict[str, None] = {}
    for path in paths:
        matches = _files_at(path, base_uri)
        if not matches:
            raise ValueError(
                f"input {path!r} matches no file; folders are searched for {', '.join(SUFFIXES)}"
            )
        files.update(dict.fromkeys(matches))
    return list(files)


def _files_at(path: str, base_uri: str) -> list[str]:
    if path.endswith(_LISTING_SUFFIX) and not glob.has_magic(path):
        return [f"{base_uri.rstrip('/')}/{line.lstrip('/')}" for line in _listing_lines(path)]
    if path.startswith(("http://", "https://")):
        return [path]
    if path.startswith("s3://"):
        return _s3_files(path)
    return _local_files(path)


def _listing_lines(path: str) -> list[str]:
    if not path.startswith("s3://") and not _is_http(path) and not Path(path).is_file():
        return []
    with (
        local_copy(path, options=FetchOptions()) as local,
        gzip.open(local, "rt", encoding="utf-8") as lines,
    ):
        return [line.strip() for line in lines if line.strip()]


def _local_files(path: str) -> list[str]:
    if Path(path).is_file():  # before patterns: a name may have brackets
        return [path]
    if Path(path).is_dir():
        return _with_known_suffix(str(file) for file in Path(path).rglob("*") if file.is_file())
    return sorted(file for file in glob.glob(path, recursive=True) if Path(file).is_file())


def _s3_files(path: str) -> list[str]:
    fs, root = open_fs(path)
    if glob.has_magic(path):
        return sorted(fs.unstrip_protocol(name) for name in fs.glob(root))
    try:
        if fs.isfile(root):
            return [path]
        return _with_known_suffix(fs.unstrip_protocol(name) for name in fs.find(root))
    except FileNotFoundError:  # a bucket that does not exist
        return []


def _with_known_suffix(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name.lower().endswith(SUFFIXES))


def _is_http(path: str) -> bool:
    return path.startswith(("http://", "https://"))


def fingerprint(path: str) -> str:
    """A string that changes when the file does.

    Size and modification time of a local file, size and ETag on s3; of an http URL the URL itself.
    A relative path is a file sent with a Ray job, which each node unpacks at a different time: its
    content counts. FileNotFoundError if there is no such file.
    """
    if _is_http(path):
        return path
    if path.startswith("s3://"):
        info = open_fs(path)[0].info(path)
        return f"{info['size']}:{info.get('ETag', '').strip(chr(34))}"
    stat = os.stat(path)
    return f"{stat.st_size}:{stat.st_mtime_ns if os.path.isabs(path) else file_sha256(Path(path))}"


# --- downloads ------------------------------------------------------------------------------------


@contextmanager
def local_copy(path: str, *, options: FetchOptions) -> Iterator[Path]:
    """The path of a local file itself, or of a download that is deleted afterwards.

    FetchError if it cannot be downloaded completely.
    """
    if not _is_http(path) and "://" not in path:
        yield Path(path)
        return
    suffix = "-" + Path(path.partition("?")[0]).name[-80:]
    with tempfile.NamedTemporaryFile(prefix="gristmill-", suffix=suffix) as file:
        with _connection_slot(options.connections):
            (_download_http if _is_http(path) else _download_object)(path, file, options)
        file.flush()
        yield Path(file.name)


@contextmanager
def _connection_slot(connections: int) -> Iterator[None]:
    """Hold one of the node's `connections` slots, a file lock: a killed process releases it."""
    folder = Path(tempfile.gettempdir()) / f"gristmill-slots-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    while True:
        for number in range(connections):
            with ExitStack() as stack:
                try:
                    stack.enter_context(try_lock(folder / str(number)))
                except BlockingIOError:
                    continue
                yield
                return
        time.sleep(0.05)


def _download_object(path: str, file: IO[bytes], options: FetchOptions) -> None:
    fs, root = open_fs(path)  # which retries
    try:
        fs.get_file(root, file.name)
        size = fs.info(root)["size"]
    except OSError as error:
        raise FetchError(
            f"cannot fetch {path}: {error}; check the address and your credentials"
        ) from error
    if os.stat(file.name).st_size != size:
        raise FetchError(
            f"cannot fetch {path}: got {os.stat(file.name).st_size:,} of {size:,} bytes; run again"
        )


# --- HTTP with retries ----------------------------------------------------------------------------

# Common Crawl answers 403 to clients that send too many requests
_RETRY_STATUS = frozenset({403, 408, 425, 429, 500, 502, 503, 504})


class _Failure(NamedTuple):
    """Why an attempt failed; `wait_seconds` is what the server asked for, if anything."""

    reason: str
    wait_seconds: float | None = None
    final: bool = False


class _RemoteFile(NamedTuple):
    """What the server says about the file: its size in bytes, and a validator of this version."""

    size: int | None
    validator: str | None


def _download_http(url: str, file: IO[bytes], options: FetchOptions) -> None:
    """Write the whole of `url` to `file`, resuming after a broken connection where possible."""
    remote = _RemoteFile(None, None)
    attempt, best = 0, 0
    with requests.Session() as session:
        while True:
            attempt += 1
            remote, failure = _request_rest(session, url, file, remote, options.timeout_seconds)
            if failure is None:
                return
            # progress: a large file over a bad connection may take many attempts
            if file.tell() >= best + _CHUNK:
                attempt, best = 1, file.tell()
            if failure.final or attempt >= options.attempts:
                raise FetchError(_error_message(url, attempt, failure, file.tell(), remote))
            time.sleep(_wait_seconds(url, attempt, failure, options))


def _request_rest(
    session: requests.Session, url: str, file: IO[bytes], remote: _RemoteFile, timeout: float
) -> tuple[_RemoteFile, _Failure | None]:
    """Request the missing bytes once.

    `file` is then at the end of what has arrived, which may be the start again.
    """
    headers = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity"}
    start = file.tell()
    if start and remote.validator is None:
        start = _truncate(file)  # nothing shows that the file is still the same
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": remote.validator or ""}
    try:
        with session.get(url, headers=headers, stream=True, timeout=timeout) as response:
            if response.status_code == 416:
                _truncate(file)
                reason = "the server has fewer bytes than were downloaded; starting again"
                return _RemoteFile(None, None), _Failure(reason)
            if response.status_code not in (200, 206):
                return remote, _refusal(response)
            remote = _seek_to_body(response, file, start)
            # not decoded: a .gz sent with a content encoding stays a .gz
            for chunk in response.raw.stream(_CHUNK, decode_content=False):
                file.write(chunk)
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        return remote, _Failure(f"{type(error).__name__}: {error}")
    return remote, _check_size(file, remote)


def _seek_to_body(response: requests.Response, file: IO[bytes], start: int) -> _RemoteFile:
    """Move `file` to where this response begins: after what has arrived if the server resumes
    there, else to its start.
    """
    etag = response.headers.get("ETag")
    validator = (
        etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")
    )
    if response.status_code == 206:
        span, _, total = (
            response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
        )
        if span.startswith(f"{start}-"):
            return _RemoteFile(int(total) if total.isdigit() else None, validator)
        _truncate(file)
        raise requests.RequestException(
            f"asked for bytes {start}-, got Content-Range {span!r}; starting again"
        )
    _truncate(file)
    length = response.headers.get("Content-Length", "")
    return _RemoteFile(int(length) if length.isdigit() else None, validator)


def _truncate(file: IO[bytes]) -> int:
    file.seek(0)
    file.truncate()
    return 0


def _check_size(file: IO[bytes], remote: _RemoteFile) -> _Failure | None:
    """Compare with the size that the server sent: an early close may look like the end."""
    size = file.tell()
    if remote.size is None or size == remote.size:
        return None
    if size > remote.size:
        _truncate(file)
    return _Failure(f"got {size:,} of {remote.size:,} bytes")


def _refusal(response: requests.Response) -> _Failure:
    status = f"status {response.status_code} {response.reason}"
    if response.status_code not in _RETRY_STATUS:
        return _Failure(status, final=True)
    after = response.headers.get("Retry-After", "")
    # the form with a date is rare, and ignored
    return _Failure(status, float(after) if after.isdigit() else None)


def _wait_seconds(url: str, attempt: int, failure: _Failure, options: FetchOptions) -> float:
    """Seconds before the next attempt, with jitter: a cluster's nodes must not retry in step."""
    draw = random.Random(hashlib.sha256(f"{url} {attempt}".encode()).digest()).random()
    wait: float = options.backoff_seconds * 2 ** (attempt - 1) * (0.5 + draw)
    return min(max(wait, failure.wait_seconds or 0.0), _MAX_WAIT_SECONDS)


def _error_message(
    url: str, attempt: int, failure: _Failure, received: int, remote: _RemoteFile
) -> str:
    advice = {
        "status 403": "the server refuses: use fewer connections, try later, or check your access",
        "status 404": "check the address",
        "status 429": "the server is overloaded: use fewer connections or raise backoff_seconds",
        "status 503": "the server is overloaded: use fewer connections or raise backoff_seconds",
    }.get(failure.reason[:10], "run again later; finished inputs are not fetched again")
    size = "unknown" if remote.size is None else f"{remote.size:,}"
    return (
        f"cannot fetch {url}: {failure.reason}, attempt {attempt}, "
        f"{received:,} of {size} bytes; {advice}"
    )
