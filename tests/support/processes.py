"""Processes of tests: functions of test modules called in one, and those that this one started."""

import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any


def call_command(function: Callable, *arguments: Any) -> list[str]:
    """The command that calls a top-level function with `arguments`, as strings, in a new Python."""
    module, name = function.__module__, function.__name__
    code = f"import sys; from {module} import {name}; {name}(*sys.argv[1:])"
    return [sys.executable, "-c", code, *map(str, arguments)]


def descendants(name: str) -> list[int]:
    """Ids of the living processes that this one started, directly or not, whose command begins so.

    Another Ray on this machine, as that of a second pytest worker, is not seen.
    """
    import psutil

    ids = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            if " ".join(process.cmdline()).startswith(name):
                ids.append(process.pid)
    return sorted(ids)


def wait_for_exit(process_id: int) -> None:
    """Return when the process is gone: Ray kills one some time after it has answered that it did."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        psutil.Process(process_id).wait(timeout=60)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on at this moment."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
