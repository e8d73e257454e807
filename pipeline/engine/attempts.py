"""What can be known of a worker that died with a unit: where it was, its log's last lines, whether
memory had run out.

A dead worker reports nothing. So each attempt leaves a record before it begins, and the next one,
which Ray starts most often on the same machine, completes it.
"""

import os
import socket
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

_LINES, _CHARS = 40, 4000  # of a log: the stack of a crash has about so many


def attempt() -> dict[str, Any]:
    """This process as it begins a unit; `available_bytes` of memory on the machine, `kernel_kills`
    for memory since it booted.

    `log` is the file of its standard error. What a machine does not tell (they are Linux's ways) is
    missing.
    """
    found: dict[str, Any] = {
        "started": round(time.time(), 3),
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }
    with suppress(OSError):
        found["log"] = os.readlink("/proc/self/fd/2")
        found["available_bytes"] = 1024 * _number("/proc/meminfo", "MemAvailable:")
        found["worker_bytes"] = 1024 * _number("/proc/self/status", "VmRSS:")
        found["kernel_kills"] = _number("/proc/vmstat", "oom_kill")
    return found


def post_mortem(dead: dict[str, Any]) -> dict[str, Any]:
    """The record of an attempt that ended without a word, completed by what its machine still
    knows; as it was on another one.
    """
    if dead["host"] != socket.gethostname() or "log_tail" in dead:
        return dead
    found: dict[str, Any] = {"log_tail": ""}
    with suppress(OSError, KeyError):
        if os.path.isfile(dead["log"]):  # and not a terminal
            with open(dead["log"], errors="replace") as log:
                found["log_tail"] = "".join(deque(log, _LINES))[-_CHARS:]
        found["kernel_kills_since"] = _number("/proc/vmstat", "oom_kill") - dead["kernel_kills"]
    return dead | found


def _number(file: str, name: str) -> int:
    """The number after a name in one of the kernel's tables; 0 if it is not there."""
    rows = (line.split() for line in Path(file).read_text().splitlines())
    return next((int(row[1]) for row in rows if row[0] == name), 0)
