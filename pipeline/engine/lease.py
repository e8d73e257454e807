"""One run at a time in a directory: the second is refused and told who holds it.

On a local disk the kernel's lock on the lease file decides: a killed run frees it at once, a
suspended one keeps it. On an object store there is no such lock: the holder renews the file, and a
lease that has not been renewed for a minute, by the clock of the one who asks, is free. Who takes
it writes the next higher token into it, by a write that the store refuses if another was faster
(`replace_if`). A run that was suspended past that minute finds another token, and may not publish.
"""

import _thread
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, NamedTuple

from stages.storage.files import is_local, read_version, replace_if

RENEW_SECONDS, STALE_SECONDS = 10, 60


class Held(RuntimeError):
    """Another run works in the directory; the message names it."""


class Fenced(Held):
    """This process held the directory, and another took it over meanwhile: what it had in mind to
    write is not written.
    """


class _Lease(NamedTuple):
    """A lease on an object store: its file, and what that says: who, since when, the token, and a
    nonce of this holder's.
    """

    uri: str
    record: dict[str, Any]

    def is_ours(self, found: dict[str, Any]) -> bool:
        return bool(found.get("nonce") == self.record["nonce"])

    def renewed(self, at: float) -> bytes:
        return json.dumps({**self.record, "renewed": at}).encode()


_held: list[_Lease] = []  # by this process; a lock of the process, as that of a local lease is


@contextmanager
def lease(directory: str) -> Iterator[None]:
    """Hold the run directory while the block runs. Held if another run does."""
    with _local_lease(directory) if is_local(directory) else _remote_lease(directory):
        yield


def is_held(directory: str) -> bool:
    """Whether somebody works in a directory at this moment. Nothing is written."""
    if not is_local(directory):
        current, _ = _read(f"{directory.rstrip('/')}/lease.json")
        return time.time() - float(current.get("renewed", 0.0)) < STALE_SECONDS
    with (
        suppress(FileNotFoundError),
        open(os.path.join(directory.removeprefix("file://"), "lease.json"), "r+") as file,
    ):
        try:
            _lock(file, directory)
        except Held:
            return True
    return False


def fence() -> None:
    """To be called before anything is published: Fenced if a directory that this process holds was
    taken over.
    """
    for held in list(_held):
        current, _ = _read(held.uri)
        if not held.is_ours(current):
            who = f"process {current.get('pid')} on {current.get('host')}"
            raise Fenced(
                f"{held.uri}: this run did not renew its lease for {STALE_SECONDS} s and lost it to {who} (token "
                f"{current.get('token')}, ours {held.record['token']}); it publishes nothing more, the other goes on from there"
            )


def _holder() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _refusal(directory: str, holder: dict[str, Any]) -> Held:
    who = f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"
    return Held(
        f"{directory} is in use by {who}; wait for it, stop it, or set another run.directory"
    )


@contextmanager
def _local_lease(directory: str) -> Iterator[None]:
    path = os.path.join(directory.removeprefix("file://"), "lease.json")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "a+") as file:
        _lock(file, directory)
        file.truncate(0)
        json.dump(_holder(), file)
        file.flush()
        yield


def _lock(file: IO[str], directory: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        text = file.read()
        raise _refusal(directory, json.loads(text) if text else {}) from None


@contextmanager
def _remote_lease(directory: str) -> Iterator[None]:
    held = _take(directory)
    _held.append(held)
    stop, lost = threading.Event(), threading.Event()
    thread = threading.Thread(target=_keep, args=(held, stop, lost), daemon=True)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        if lost.is_set():
            fence()
        raise
    finally:
        stop.set()
        _held.remove(held)
        thread.join()
        with suppress(OSError):  # the store is away: the lease is free in a minute
            _renew(held, at=0.0)


def _take(directory: str) -> _Lease:
    uri = f"{directory.rstrip('/')}/lease.json"
    current, version = _read(uri)
    if time.time() - current.get("renewed", 0.0) < STALE_SECONDS:
        raise _refusal(directory, current)
    held = _Lease(
        uri, {**_holder(), "token": current.get("token", 0) + 1, "nonce": uuid.uuid4().hex}
    )
    taken = replace_if(uri, held.renewed(time.time()), version)
    current, _ = _read(uri)  # looked at again, for stores whose writes have no conditions
    if not taken or not held.is_ours(current):
        raise _refusal(directory, current)
    return held


def _keep(held: _Lease, stop: threading.Event, lost: threading.Event) -> None:
    while not stop.wait(RENEW_SECONDS):
        try:
            if not _renew(held, at=time.time()) and not stop.is_set():
                lost.set()
                # taken over while this run was cut off: two must not work here
                _thread.interrupt_main()
                return
        except OSError:
            continue  # the store is away for a moment; the lease stands for a minute


def _renew(held: _Lease, *, at: float) -> bool:
    """Write the lease anew, or free it with time 0: its token stays there, so that the next is
    higher. False if it is lost.
    """
    current, version = _read(held.uri)
    if held.is_ours(current):
        replace_if(
            held.uri, held.renewed(at), version
        )  # refused if it is taken at this moment: the next call finds that
    return held.is_ours(current)


def _read(uri: str) -> tuple[dict[str, Any], str | None]:
    data, version = read_version(uri)
    return json.loads(data or b"{}"), version
