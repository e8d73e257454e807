"""What is known of a worker that died: its host, the last lines of its log, and memory.

A dead worker reports nothing. So each attempt leaves a record before it starts, and the next
attempt, which Ray mostly starts on the same machine, completes it.
"""

import os
import socket
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

_LINES, _CHARS = 40, 4000  # of a log: enough for the stack of a crash


def attempt() -> dict[str, Any]:
    """This process as it starts a unit; what the machine does not report is missing.

    `log` is the file of its standard error, `available_bytes` memory on the machine, and
    `kernel_kills` the processes killed for memory since the machine booted (Linux only).
    """
    record: dict[str, Any] = {
        "started": round(time.time(), 3),
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }
    with suppress(OSError):
        record["log"] = os.readlink("/proc/self/fd/2")
        record["available_bytes"] = 1024 * _kernel_value("/proc/meminfo", "MemAvailable:")
        record["worker_bytes"] = 1024 * _kernel_value("/proc/self/status", "VmRSS:")
        record["kernel_kills"] = _kernel_value("/proc/vmstat", "oom_kill")
    return record


def post_mortem(dead: dict[str, Any]) -> dict[str, Any]:
    """The record of an attempt whose worker died, completed if this is the same machine."""
    if dead["host"] != socket.gethostname() or "log_tail" in dead:
        return dead
    evidence: dict[str, Any] = {"log_tail": ""}
    with suppress(OSError, KeyError):
        if os.path.isfile(dead["log"]):  # not a terminal
            with open(dead["log"], errors="replace") as log:
                evidence["log_tail"] = "".join(deque(log, _LINES))[-_CHARS:]
        kills = _kernel_value("/proc/vmstat", "oom_kill")
        evidence["kernel_kills_since"] = kills - dead["kernel_kills"]
    return dead | evidence


def _kernel_value(file: str, name: str) -> int:
    """The number after a name in one of the kernel's tables; 0 if it is not there."""
    rows = (line.split() for line in Path(file).read_text().splitlines())
    return next((int(row[1]) for row in rows if row[0] == name), 0)
