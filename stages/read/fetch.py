"""Make input files available as local files.

Common Crawl asks for few connections and patience (commoncrawl.org/faq): connections are limited
per node, by file locks that all processes of the node share, and after a refusal the client waits
longer.
"""

import fcntl
import hashlib
import os
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

import requests
import urllib3
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from stages.storage.errors import StorageError, explained
from stages.storage.files import open_fs
from stages.storage.locks import try_lock

USER_AGENT = "gristmill/0.1 (builds text corpora from web archives; python-requests)"
_CHUNK = 1 << 20
_PIECE = 32 << 20  # bytes of an object that are held in memory
_MAX_WAIT_SECONDS = 300.0
_DOWNLOAD = "gristmill-download-"


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


def printable(path: str) -> str:
    """A path as text: bytes of a file name that are not UTF-8 become escapes, such as \\xe9."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def is_http(path: str) -> bool:
    """Whether a path is an http URL."""
    return path.startswith(("http://", "https://"))


# --- downloads ------------------------------------------------------------------------------------


@contextmanager
def local_copy(path: str, *, options: FetchOptions) -> Iterator[Path]:
    """The path of a local file itself, or of a download that is deleted afterwards.

    FetchError if it cannot be downloaded completely.
    """
    if "://" not in path and printable(path) == path:
        yield Path(path)
        return
    if "://" not in path:  # Arrow takes no name that is not UTF-8
        with tempfile.TemporaryDirectory(prefix="gristmill-") as folder:
            link = Path(folder) / Path(printable(path)).name
            link.symlink_to(os.path.abspath(path))
            yield link
        return
    with download_file(path) as file:
        with connection_slot(options.connections):
            (_download_http if is_http(path) else _download_object)(path, file, options)
        file.flush()
        yield Path(file.name)


def download_file(path: str) -> IO[bytes]:
    """A temporary file for what is fetched of `path`; it is deleted when it is closed.

    Those that killed processes left are deleted now: a hundred of them would fill a disk.
    """
    suffix = "-" + Path(path.partition("?")[0]).name[-80:]
    file = tempfile.NamedTemporaryFile(prefix=_DOWNLOAD, suffix=suffix)
    fcntl.flock(file, fcntl.LOCK_EX)
    for other in Path(tempfile.gettempdir()).glob(f"{_DOWNLOAD}*"):
        with suppress(OSError):  # held, or not ours
            _delete_abandoned(other)
    return file


def _delete_abandoned(file: Path) -> None:
    """Delete a download that no process holds. BlockingIOError if one does."""
    with open(file, "rb") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # a new file is not locked at once
        if os.fstat(handle.fileno()).st_mtime < time.time() - 60:
            file.unlink()


@contextmanager
def connection_slot(connections: int) -> Iterator[None]:
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
    with _fetch_errors(path):
        fs.get_file(root, file.name)
        size = fs.info(root)["size"]
    _require_size(path, os.stat(file.name).st_size, size)


def object_size(path: str) -> int:
    """Bytes of an object. FetchError if there is none."""
    fs, root = open_fs(path)
    with _fetch_errors(path):
        size: int = fs.info(root)["size"]
    return size


def fetch_bytes(path: str, file: IO[bytes], start: int, end: int) -> None:
    """Write the bytes of an object from `start` to `end` to the same place of `file`.

    FetchError if they cannot be had.
    """
    fs, root = open_fs(path)
    for at in range(start, end, _PIECE):
        size = min(_PIECE, end - at)
        with _fetch_errors(path):
            data = fs.cat_file(root, start=at, end=at + size)
        _require_size(path, len(data), size)
        file.seek(at)
        file.write(data)
    file.flush()


@contextmanager
def _fetch_errors(path: str) -> Iterator[None]:
    try:
        with explained(path, "reading"):
            yield
    except StorageError as error:
        raise FetchError(str(error)) from error
    except OSError as error:
        raise FetchError(
            f"cannot fetch {path}: {error}; check the address and your credentials"
        ) from error


def _require_size(path: str, received: int, size: int) -> None:
    if received != size:
        raise FetchError(f"cannot fetch {path}: got {received:,} of {size:,} bytes; run again")


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
