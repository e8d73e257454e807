"""Makes inputs local: what the user named becomes a list of files, and each becomes a path on this
machine.

Common Crawl asks for few connections and patience (commoncrawl.org/faq): connections are limited
per node, by locks on files that every process of the node shares, and refusals are answered by
waiting longer.
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
_LISTING = ".paths.gz"
_CHUNK = 1 << 20
_MAX_WAIT_SECONDS = 300.0


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class FetchOptions:
    """How to download, politely.

    `connections` is per node. `attempts` includes the first and is counted anew after each further
    MB of progress. The wait after attempt n is `backoff_seconds` x 2^(n - 1), more or less by up to
    half, at most 5 minutes. `timeout_seconds` is for connecting, and for each wait for bytes.
    """

    connections: int = Field(default=4, ge=1)
    attempts: int = Field(default=8, ge=1)
    backoff_seconds: float = Field(default=2.0, ge=0)
    timeout_seconds: float = Field(default=60.0, gt=0)


class FetchError(OSError):
    """A file could not be had; the message says which, what the server answered, how often we
    asked, what to do.
    """


# -- which files
# -------------------------------------------------------------------------------------------------------


def expand_inputs(paths: list[str], *, base_uri: str) -> list[str]:
    """The files that `paths` name, in that order (sorted within a folder or pattern), each once.

    A path is a local file, folder (all files in it that we can read, at any depth) or pattern, the
    same on s3://, an http address, or a listing of Common Crawl (*.paths.gz, wherever it lies),
    whose lines are appended to `base_uri`. ValueError names a path that matches nothing.
    """
    found: dict[str, None] = {}
    for path in paths:
        matches = _expand(path, base_uri)
        if not matches:
            raise ValueError(
                f"input {path!r} matches no file; folders are searched for {', '.join(SUFFIXES)}"
            )
        found.update(dict.fromkeys(matches))
    return list(found)


def _expand(path: str, base_uri: str) -> list[str]:
    if path.endswith(_LISTING) and not glob.has_magic(path):
        return [f"{base_uri.rstrip('/')}/{line.lstrip('/')}" for line in _listing_lines(path)]
    if path.startswith(("http://", "https://")):
        return [path]
    if path.startswith("s3://"):
        return _expand_remote(path)
    return _expand_local(path)


def _listing_lines(path: str) -> list[str]:
    if not path.startswith("s3://") and not _is_http(path) and not Path(path).is_file():
        return []
    with (
        local_copy(path, options=FetchOptions()) as local,
        gzip.open(local, "rt", encoding="utf-8") as lines,
    ):
        return [line.strip() for line in lines if line.strip()]


def _expand_local(path: str) -> list[str]:
    if Path(path).is_file():  # first, so that a name with brackets is a name
        return [path]
    if Path(path).is_dir():
        return _readable(str(file) for file in Path(path).rglob("*") if file.is_file())
    return sorted(file for file in glob.glob(path, recursive=True) if Path(file).is_file())


def _expand_remote(path: str) -> list[str]:
    fs, root = open_fs(path)
    if glob.has_magic(path):
        return sorted(fs.unstrip_protocol(name) for name in fs.glob(root))
    try:
        if fs.isfile(root):
            return [path]
        return _readable(fs.unstrip_protocol(name) for name in fs.find(root))
    except FileNotFoundError:  # a bucket that does not exist
        return []


def _readable(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name.lower().endswith(SUFFIXES))


def _is_http(path: str) -> bool:
    return path.startswith(("http://", "https://"))


def fingerprint(path: str) -> str:
    """Changes when the file does: size and time of a local file, size and etag on s3; an http
    address is its own.

    A relative path is of a file that a Ray job was sent with: each node unpacks a copy at a time of
    its own, so its content counts. FileNotFoundError if there is no such file.
    """
    if _is_http(path):
        return path
    if path.startswith("s3://"):
        info = open_fs(path)[0].info(path)
        return f"{info['size']}:{info.get('ETag', '').strip(chr(34))}"
    stat = os.stat(path)
    return f"{stat.st_size}:{stat.st_mtime_ns if os.path.isabs(path) else file_sha256(Path(path))}"


# -- one file, made local
# ----------------------------------------------------------------------------------------------


@contextmanager
def local_copy(path: str, *, options: FetchOptions) -> Iterator[Path]:
    """A local path with the content of `path`: a local file itself, else a download that is removed
    afterwards.

    FetchError if it cannot be had whole.
    """
    if not _is_http(path) and "://" not in path:
        yield Path(path)
        return
    suffix = "-" + Path(path.partition("?")[0]).name[-80:]
    with tempfile.NamedTemporaryFile(prefix="gristmill-", suffix=suffix) as file:
        with _slot(options.connections):
            (_download_http if _is_http(path) else _download_object)(path, file, options)
        file.flush()
        yield Path(file.name)


@contextmanager
def _slot(connections: int) -> Iterator[None]:
    """Hold one of the node's `connections` slots. A slot is a lock, not a file: a killed process
    gives it back.
    """
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


# -- HTTP: ask, resume, wait
# -------------------------------------------------------------------------------------------

# 403 is Common Crawl's answer to those who ask too fast
_RETRY_STATUS = frozenset({403, 408, 425, 429, 500, 502, 503, 504})


class _Failure(NamedTuple):
    """Why an attempt ended; `wait_seconds` is what the server asked for, None if nothing."""

    reason: str
    wait_seconds: float | None = None
    final: bool = False


class _Body(NamedTuple):
    """What the server says of the file: `size` in bytes; `validator`, which tells this version from
    later ones.
    """

    size: int | None
    validator: str | None


def _download_http(url: str, file: IO[bytes], options: FetchOptions) -> None:
    """Write the whole of `url` to `file`.

    Asks again from where a connection broke, or from the start if need be.
    """
    known = _Body(None, None)
    attempt, best = 0, 0
    with requests.Session() as session:
        while True:
            attempt += 1
            known, failure = _attempt(session, url, file, known, options.timeout_seconds)
            if failure is None:
                return
            if (
                file.tell() >= best + _CHUNK
            ):  # progress: a large file over a shaky link may take many attempts
                attempt, best = 1, file.tell()
            if failure.final or attempt >= options.attempts:
                raise FetchError(_complaint(url, attempt, failure, file.tell(), known))
            time.sleep(_wait(url, attempt, failure, options))


def _attempt(
    session: requests.Session, url: str, file: IO[bytes], known: _Body, timeout: float
) -> tuple[_Body, _Failure | None]:
    """One request for what is missing.

    Leaves `file` at the end of what is there, which may be the start again.
    """
    headers = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity"}
    start = file.tell()
    if start and known.validator is None:
        start = _restart(file)  # nothing shows that the file is still the same
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": known.validator or ""}
    try:
        with session.get(url, headers=headers, stream=True, timeout=timeout) as response:
            if response.status_code == 416:
                _restart(file)
                return _Body(None, None), _Failure(
                    "the server has less than we hold; starting again"
                )
            if response.status_code not in (200, 206):
                return known, _refusal(response)
            known = _accept(response, file, start)
            for chunk in response.raw.stream(
                _CHUNK, decode_content=False
            ):  # a .gz sent as an encoding stays a .gz
                file.write(chunk)
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        return known, _Failure(f"{type(error).__name__}: {error}")
    return known, _check_size(file, known)


def _accept(response: requests.Response, file: IO[bytes], start: int) -> _Body:
    """Place `file` where this answer begins: behind what we hold if the server resumes there, else
    at its start.
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
            return _Body(int(total) if total.isdigit() else None, validator)
        _restart(file)
        raise requests.RequestException(
            f"asked for bytes {start}-, got Content-Range {span!r}; starting again"
        )
    _restart(file)
    length = response.headers.get("Content-Length", "")
    return _Body(int(length) if length.isdigit() else None, validator)


def _restart(file: IO[bytes]) -> int:
    file.seek(0)
    file.truncate()
    return 0


def _check_size(file: IO[bytes], known: _Body) -> _Failure | None:
    """A connection closed early may look like the end.

    Without a size from the server there is nothing to check.
    """
    got = file.tell()
    if known.size is None or got == known.size:
        return None
    if got > known.size:
        _restart(file)
    return _Failure(f"got {got:,} of {known.size:,} bytes")


def _refusal(response: requests.Response) -> _Failure:
    status = f"status {response.status_code} {response.reason}"
    if response.status_code not in _RETRY_STATUS:
        return _Failure(status, final=True)
    after = response.headers.get("Retry-After", "")
    return _Failure(
        status, float(after) if after.isdigit() else None
    )  # the form with a date is rare: own wait


def _wait(url: str, attempt: int, failure: _Failure, options: FetchOptions) -> float:
    """Seconds before the next attempt; jitter keeps the nodes of a cluster from asking in step."""
    draw = random.Random(hashlib.sha256(f"{url} {attempt}".encode()).digest()).random()
    wait: float = options.backoff_seconds * 2 ** (attempt - 1) * (0.5 + draw)
    return min(max(wait, failure.wait_seconds or 0.0), _MAX_WAIT_SECONDS)


def _complaint(url: str, attempt: int, failure: _Failure, held: int, known: _Body) -> str:
    advice = {
        "status 403": "the server refuses: ask with fewer connections, later, or check your access",
        "status 404": "check the address",
        "status 429": "the server is overrun: ask with fewer connections or raise backoff_seconds",
        "status 503": "the server is overrun: ask with fewer connections or raise backoff_seconds",
    }.get(failure.reason[:10], "run again later; finished inputs are not fetched again")
    size = "unknown" if known.size is None else f"{known.size:,}"
    return f"cannot fetch {url}: {failure.reason}, attempt {attempt}, {held:,} of {size} bytes; {advice}"
