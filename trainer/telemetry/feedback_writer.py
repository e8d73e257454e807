"""Write the feedback of a trainer (`trainer.telemetry.feedback`) from a thread of its own."""

import re
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime

from stages.storage.files import is_local, local_path, open_fs, write_atomically
from trainer.telemetry.feedback import (
    VERSION,
    OtherVersion,
    Report,
    Summary,
    append_line,
    last_line,
    read_summary,
    to_json,
)


class Writer:
    """Writes the lines of a trainer to a folder, local or a URI.

    For rank 0; one live attempt per trainer.

    `previous` is the last line of the attempt before, None for a first start. An attempt should
    write a line as it begins, or a restart that dies before its first line is not counted. A slow
    or absent store never delays a step: a thread writes the lines, a line is dropped while the one
    before it is being written, and the last error is kept in `error`.
    At the start the store must answer. ValueError for a name that is not a file name, and for
    feedback of another version.
    """

    def __init__(
        self,
        folder: str,
        *,
        trainer: str,
        incarnation: str = "",
        every_seconds: float = 30.0,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}", trainer, re.ASCII):
            raise ValueError(
                f"a trainer is named by letters, digits, '.', '_' and '-', got {trainer!r}"
            )
        # kept, because fsspec would make another client in each thread that writes a line
        self._fs, root = open_fs(folder)
        self._fs.makedirs(root, exist_ok=True)
        self._uri = f"{folder.rstrip('/')}/{trainer}"
        self._trainer, self._incarnation = trainer, incarnation or uuid.uuid4().hex[:12]
        self._every, self._monotonic, self._wall = every_seconds, monotonic, wall
        self._start = self._next = monotonic()
        self._thread: threading.Thread | None = None
        self.previous = _last_summary(folder.rstrip("/"), trainer)
        self._sequence = 0 if self.previous is None else self.previous.sequence + 1
        self.error: str | None = None

    def due(self) -> bool:
        """Whether `every_seconds` have passed since the last line; true before the first."""
        return self._monotonic() >= self._next

    def write(self, report: Report) -> None:
        """Write a line, whether due or not."""
        now = self._monotonic()
        self._next = now + self._every
        if not self.flush(timeout_seconds=0):
            return
        line = self._line(report, now)
        # a daemon: a store that hangs must not keep the process from ending
        self._thread = threading.Thread(target=self._put, args=(self._sequence, line), daemon=True)
        self._sequence += 1
        self._thread.start()

    def flush(self, *, timeout_seconds: float = 10.0) -> bool:
        """Wait for the line that is being written; False if it takes longer."""
        if self._thread is not None:
            self._thread.join(timeout_seconds)
        return self._thread is None or not self._thread.is_alive()

    def close(self, report: Report, *, timeout_seconds: float = 10.0) -> None:
        """Write the last line, of state "stopped" or "failed", if the store takes it in time."""
        if self.flush(timeout_seconds=timeout_seconds):
            self.write(report)
            self.flush(timeout_seconds=timeout_seconds)

    def _line(self, report: Report, now: float) -> bytes:
        record = {
            "version": VERSION,
            "trainer": self._trainer,
            "incarnation": self._incarnation,
            "sequence": self._sequence,
            "time": datetime.fromtimestamp(self._wall(), UTC).isoformat(),
            "monotonic_seconds": now - self._start,
            "every_seconds": self._every,
            **asdict(report),
        }
        return to_json(record)

    def _put(self, sequence: int, line: bytes) -> None:
        try:
            if is_local(self._uri):
                append_line(str(local_path(f"{self._uri}.jsonl")), line)
                write_atomically(f"{self._uri}.json", line)
            else:
                self._fs.pipe_file(f"{self._uri}/{sequence:09}.json", line)
                self._fs.pipe_file(f"{self._uri}.json", line)  # one PUT is atomic
        # each store's client has its own errors, and none of them may stop the training
        except Exception as error:
            self.error = repr(error)


def _last_summary(folder: str, trainer: str) -> Summary | None:
    """The last summary of an earlier attempt.

    A kill may have come between line and summary, so both are read.
    """
    uri = f"{folder}/{trainer}"
    try:
        summary = read_summary(folder, trainer)
    except FileNotFoundError:
        return None
    except OtherVersion:
        raise
    except ValueError as error:
        raise ValueError(f"{uri}.json: {error}; remove it, or name the trainer otherwise") from None
    return max(summary, last_line(uri) or summary, key=lambda line: line.sequence)
