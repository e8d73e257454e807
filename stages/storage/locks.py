"""Exclusive locks between processes of one machine, by flock on a file.

The kernel frees a lock when its holder ends, however that comes about; a suspended process keeps
it.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def lock(path: Path) -> Iterator[IO[str]]:
    """Hold the lock on a file, which is made if absent, while the block runs; waits for it."""
    with _open_locked(path, fcntl.LOCK_EX) as file:
        yield file


@contextmanager
def try_lock(path: Path) -> Iterator[IO[str]]:
    """The same without waiting: BlockingIOError if another process holds the lock."""
    with _open_locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB) as file:
        yield file


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock on a file. Writes nothing."""
    try:
        with _open_locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB, mode="r+"):
            return False
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True


@contextmanager
def _open_locked(path: Path, operation: int, *, mode: str = "a+") -> Iterator[IO[str]]:
    with open(path, mode) as file:
        fcntl.flock(file, operation)
        holder = os.getpid()
        try:
            yield file
        finally:
            # closing the file is not enough: a forked process may have inherited it; and such a
            # process must not release the lock when it leaves the block
            if os.getpid() == holder:
                fcntl.flock(file, fcntl.LOCK_UN)
