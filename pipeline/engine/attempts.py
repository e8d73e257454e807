"""What is known of a worker that died: its node, the last lines of its log, and memory.

A dead worker reports nothing. So each attempt leaves a record before it starts, and the next
attempt, which Ray mostly starts on the same machine, completes it. A worker that died with its
node, as when a spot machine is taken away, says nothing about its unit.
"""

import os
import socket
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

_LINES, _CHARS = 40, 4000  # of a log: enough for the stack of a crash
# a cluster notices that a node is gone after 15 to 30 s (Ray 2.60: 5 checks, 3 s apart)
NODE_CHECK_SECONDS = 40.0


def attempt() -> dict[str, Any]:
    """This process as it starts a unit; what the machine does not report is missing.

    `log` is the file of its standard error, `available_bytes` memory on the machine, and
    `kernel_kills` the processes killed for memory since the machine booted (Linux only).
    """
    record: dict[str, Any] = {
        "started": round(time.time(), 3),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "node": _own_node(),
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


def crashed(dead: Sequence[dict[str, Any]], *, limit: int) -> list[dict[str, Any]]:
    """Those of dead attempts whose node lives: their process crashed.

    Before that is said of `limit` attempts, nodes other than this one have NODE_CHECK_SECONDS to be
    found dead.
    """
    here, until = _own_node(), time.monotonic() + NODE_CHECK_SECONDS
    while True:
        alive = live_nodes()
        found = [a for a in dead if a.get("node") is None or a["node"] in alive]
        elsewhere = any(a.get("node") not in (None, here) for a in found)
        if len(found) < limit or not elsewhere or time.monotonic() > until:
            return found
        time.sleep(1)


def live_nodes() -> set[str]:
    """Ids of the cluster's nodes that are alive; none without a cluster."""
    if _own_node() is None:
        return set()
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return {node["NodeID"] for node in nodes if node["Alive"]}


def _own_node() -> str | None:
    """The id of the cluster's node that this process runs on; None without Ray."""
    ray = sys.modules.get("ray")
    return str(ray.get_runtime_context().get_node_id()) if ray and ray.is_initialized() else None


def _kernel_value(file: str, name: str) -> int:
    """The number after a name in one of the kernel's tables; 0 if it is not there."""
    rows = (line.split() for line in Path(file).read_text().splitlines())
    return next((int(row[1]) for row in rows if row[0] == name), 0)
