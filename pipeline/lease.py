"""One run at a time in a directory: the second is refused and told who holds it.

On a local disk the kernel's lock on the lease file decides, so a killed run frees it at once. On an object store there is no
such lock: the holder renews the file, and a lease that has not been renewed for a minute is free.
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
from contextlib import contextmanager
from typing import IO, Any

from stages.ledger import is_local, read_bytes, write_atomically

RENEW_SECONDS, STALE_SECONDS = 10, 60


class Held(RuntimeError):
    """Another run works in the directory; the message names it."""


@contextmanager
def lease(directory: str) -> Iterator[None]:
    """Hold the run directory while the block runs. Held if another run does."""
    with _local_lease(directory) if is_local(directory) else _remote_lease(directory):
        yield


def _holder() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}


def _refusal(directory: str, holder: dict[str, Any]) -> Held:
    who = f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"
    return Held(f"{directory} is in use by {who}; wait for it, stop it, or set another run.directory")


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
    uri, mine = f"{directory.rstrip('/')}/lease.json", uuid.uuid4().hex
    current = _read(uri)
    if current and time.time() - current["renewed"] < STALE_SECONDS:
        raise _refusal(directory, current)
    stop = threading.Event()

    def renew() -> None:
        write_atomically(uri, json.dumps({**_holder(), "token": mine, "renewed": time.time()}).encode())

    renew()
    if (now := _read(uri)) and now["token"] != mine:
        raise _refusal(directory, now)

    def keep() -> None:
        while not stop.wait(RENEW_SECONDS):
            try:
                current = _read(uri)
                if current and current["token"] != mine:
                    _thread.interrupt_main()  # taken over while this run was cut off: two must not work here
                    return
                renew()
            except OSError:
                continue  # the store is away for a moment; the lease stands for a minute

    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        if (last := _read(uri)) and last["token"] == mine:
            write_atomically(uri, json.dumps({**_holder(), "token": mine, "renewed": 0}).encode())


def _read(uri: str) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads(read_bytes(uri))
        return record
    except FileNotFoundError:
        return None
