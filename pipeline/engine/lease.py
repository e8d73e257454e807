"""The lease of a directory: one run at a time. A second run is refused with the holder's name.

On a local disk a lock on the lease file decides (`stages.storage.locks`). An object store has no
locks: the holder renews the lease file, and a lease is free if its holder freed it, or if the file
did not change while the process that asks for it watched for a minute. Clocks are never compared,
so none has to be right. The process that takes it writes the next higher token, in a write that the
store refuses if another was faster (`replace_if`). A run that was suspended past that minute finds
another token, and may not publish.
"""

import _thread
import itertools
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from stages.storage.files import is_local, local_path, read_version, replace_if
from stages.storage.locks import is_locked, try_lock

RENEW_SECONDS, STALE_SECONDS, POLL_SECONDS = 10, 60, 1
_LOG = logging.getLogger(__name__)


class Held(RuntimeError):
    """Another run holds the directory; the message names it."""


class Fenced(Held):
    """This process lost its lease to another run; what it was about to write is not written."""


class _Lease(NamedTuple):
    """A lease on an object store: its file and content (host, pid, since, token, random nonce).

    `counter` makes each renewal another content: whoever watches the file sees it change.
    """

    uri: str
    record: dict[str, Any]
    counter: "itertools.count[int]"

    def is_ours(self, current: dict[str, Any]) -> bool:
        return bool(current.get("nonce") == self.record["nonce"])

    def renewed(self, at: float) -> bytes:
        """The content at a renewal. Its time is for people, and 0 says that the lease is free."""
        return json.dumps({**self.record, "renewed": at, "renewals": next(self.counter)}).encode()


_leases: list[_Lease] = []  # of this process; like a local lock they belong to the process


@contextmanager
def lease(directory: str) -> Iterator[None]:
    """Hold the lease of a directory while the block runs. Held if another run holds it."""
    with _local_lease(directory) if is_local(directory) else _remote_lease(directory):
        yield


def is_held(directory: str) -> bool:
    """Whether a run holds a directory. Writes nothing; on an object store it may take a minute."""
    if is_local(directory):
        return is_locked(_local_file(directory))
    try:
        _wait_until_free(directory)
        return False
    except Held:
        return True


def fence() -> None:
    """Raise Fenced if this process lost a lease. To be called before anything is published."""
    for ours in list(_leases):
        current, _ = _read_lease(ours.uri)
        if not ours.is_ours(current):
            who = f"process {current.get('pid')} on {current.get('host')}"
            raise Fenced(
                f"{ours.uri}: this run did not renew its lease for {STALE_SECONDS} s and lost "
                f"it to {who} (token {current.get('token')}, ours {ours.record['token']}); it "
                "publishes nothing more, the other goes on from there"
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


def _uri(directory: str) -> str:
    return f"{directory.rstrip('/')}/lease.json"


# --- on a local disk ------------------------------------------------------------------------------


def _local_file(directory: str) -> Path:
    return local_path(_uri(directory))


@contextmanager
def _local_lease(directory: str) -> Iterator[None]:
    path = _local_file(directory)
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            file = stack.enter_context(try_lock(path))
        except BlockingIOError:
            raise _refusal(directory, json.loads(path.read_text() or "{}")) from None
        file.truncate(0)
        json.dump(_holder(), file)
        file.flush()
        yield


# --- on an object store ---------------------------------------------------------------------------


@contextmanager
def _remote_lease(directory: str) -> Iterator[None]:
    ours = _take(directory)
    _leases.append(ours)
    stop, lost = threading.Event(), threading.Event()
    thread = threading.Thread(target=_keep, args=(ours, stop, lost), daemon=True)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        if lost.is_set():
            fence()
        raise
    finally:
        stop.set()
        _leases.remove(ours)
        thread.join()
        with suppress(OSError):  # the store does not answer: the lease is free in a minute
            _renew(ours, at=0.0)


def _take(directory: str) -> _Lease:
    uri = _uri(directory)
    current, version = _wait_until_free(directory)
    token = current.get("token", 0) + 1
    ours = _Lease(uri, {**_holder(), "token": token, "nonce": uuid.uuid4().hex}, itertools.count())
    taken = replace_if(uri, ours.renewed(time.time()), version)
    current, _ = _read_lease(uri)  # again, for stores without conditional writes
    if not taken or not ours.is_ours(current):
        raise _refusal(directory, current)
    return ours


def _wait_until_free(directory: str) -> tuple[dict[str, Any], str | None]:
    """The lease file and its version, free; Held once another process renews it.

    By this process's own clock: how long a file stays unchanged needs no other.
    """
    uri = _uri(directory)
    current, version = _read_lease(uri)
    if any(ours.is_ours(current) for ours in _leases):
        raise _refusal(directory, current)
    began = time.monotonic()
    if _is_taken(current):
        _LOG.warning("%s: looking for up to %s s whether its holder is alive", uri, STALE_SECONDS)
    while _is_taken(current) and time.monotonic() - began < STALE_SECONDS:
        time.sleep(POLL_SECONDS)
        latest, latest_version = _read_lease(uri)
        if latest_version != version and _is_taken(latest):
            raise _refusal(directory, latest)
        current, version = latest, latest_version
    # once more: the version may be an earlier one than that of the content it was read with
    latest, latest_version = _read_lease(uri)
    if latest_version != version and _is_taken(latest):
        raise _refusal(directory, latest)
    return latest, latest_version


def _is_taken(record: dict[str, Any]) -> bool:
    return float(record.get("renewed", 0.0)) != 0.0


def _keep(ours: _Lease, stop: threading.Event, lost: threading.Event) -> None:
    while not stop.wait(RENEW_SECONDS):
        try:
            if not _renew(ours, at=time.time()) and not stop.is_set():
                lost.set()
                # taken over while this run was cut off: two must not work here
                _thread.interrupt_main()
                return
        except OSError:
            continue  # the store is away for a moment; the lease is valid for a minute


def _renew(ours: _Lease, *, at: float) -> bool:
    """Renew the lease, or free it with time 0; its token stays, so that the next one is higher.

    False if it is lost.
    """
    current, version = _read_lease(ours.uri)
    if ours.is_ours(current):
        # refused if it is taken at this moment: the next call sees that
        replace_if(ours.uri, ours.renewed(at), version)
    return ours.is_ours(current)


def _read_lease(uri: str) -> tuple[dict[str, Any], str | None]:
    data, version = read_version(uri)
    return json.loads(data or b"{}"), version
