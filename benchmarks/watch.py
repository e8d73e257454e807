"""What a process and its descendants use: CPU seconds, peak memory. Linux only, from /proc.

A process's peak is its VmHWM, not ru_maxrss, which a child inherits from its parent. A sum over
processes is one of proportional set sizes, so that memory they share (Ray's object store) counts
once.
"""

import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

MB = 1_000_000
SPAWN = multiprocessing.get_context("spawn")


class Usage(NamedTuple):
    """Of a process and its descendants: wall and CPU seconds since the mark, the largest process,
    the largest sum (bytes).
    """

    wall: float
    cpu: float
    peak: int
    total: int


class Cost(NamedTuple):
    """Of a command: wall seconds, CPU seconds with all it started; the load average before it."""

    wall: float
    cpu: float
    load: float


class ChildError(RuntimeError):
    """A watched process ended without a result."""


def cost_of(command: Sequence[str], *, log: Path, **options: Any) -> Cost:
    """Run a command to its end, its output to `log`; SystemExit with the last of it if it fails.

    CPU time is that of the command and all its descendants, sampled ten times a second: what a
    process does after its last sample is missed. Ray's daemons and datatrove's forkserver remain
    descendants; seen against a mark in the environment of all processes, 1 % was missed.
    """
    load, start = os.getloadavg()[0], time.monotonic()
    seen: dict[int, float] = {}
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, **options)
        while process.poll() is None:
            seen |= cpu_of_descendants(process.pid)
            time.sleep(0.1)
    wall = time.monotonic() - start
    if process.returncode:
        raise SystemExit(f"{command}: exit code {process.returncode}\n{log.read_text()[-2000:]}")
    return Cost(wall, sum(seen.values()), load)


def watched(call: Callable[..., Any], *args: Any, limit: float = 3600) -> tuple[Any, Usage]:
    """What `call(mark, *args)` returns in a process of its own, and what that and its descendants
    used.

    CPU time is counted from the moment it calls `mark`. TimeoutError after `limit` seconds; nothing
    is left running.
    """
    here, there = SPAWN.Pipe()
    process = SPAWN.Process(target=_child, args=(there, call, args))
    process.start()
    there.close()
    watch = Watch(process.pid or 0)
    try:
        while True:
            if not here.poll(max(0.0, limit - watch.usage().wall)):
                raise TimeoutError
            kind, value = here.recv()
            if kind == "mark":
                watch.mark()
            elif kind == "error":
                raise ChildError(value)
            else:
                return value, watch.usage()
    except EOFError:
        raise ChildError(f"exit code {process.exitcode}") from None
    finally:
        watch.end(kill=True)
        process.join()


def _child(pipe: Any, call: Callable[..., Any], args: Sequence[Any]) -> None:
    try:
        pipe.send(("result", call(lambda: pipe.send(("mark", None)), *args)))
    except Exception as error:
        pipe.send(("error", f"{type(error).__name__}: {str(error)[:300]}"))


class Watch:
    """Samples /proc for a process and its descendants every half second."""

    def __init__(self, pid: int) -> None:
        self._pid, self._start, self._before = pid, time.monotonic(), 0.0
        self._cpu: dict[int, float] = {}
        self._peaks: dict[int, int] = {}
        self._total = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def mark(self) -> None:
        """Count time from now on."""
        self._sample()
        self._start, self._before = time.monotonic(), sum(self._cpu.values())

    def usage(self) -> Usage:
        self._sample()
        cpu = sum(self._cpu.values()) - self._before
        return Usage(
            time.monotonic() - self._start, cpu, max(self._peaks.values(), default=0), self._total
        )

    def end(self, *, kill: bool) -> None:
        self._ended.set()
        self._thread.join()
        for pid in cpu_of_descendants(self._pid) if kill else ():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def _run(self) -> None:
        while not self._ended.wait(0.5):
            self._sample()

    def _sample(self) -> None:
        total = 0
        for pid, cpu in cpu_of_descendants(self._pid).items():
            self._cpu[pid] = cpu
            self._peaks[pid] = max(self._peaks.get(pid, 0), _status(pid, "VmHWM"))
            total += _status(pid, "Pss", file="smaps_rollup")
        self._total = max(self._total, total)


def peak_bytes() -> int:
    """The most this process has held in memory."""
    return _status(os.getpid(), "VmHWM")


def cpu_of_descendants(root: int) -> dict[int, float]:
    """CPU seconds so far by pid, of a live process and all below it."""
    tick, parents, cpu = os.sysconf("SC_CLK_TCK"), {}, {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(entry)] = int(fields[1])
        cpu[int(entry)] = (int(fields[11]) + int(fields[12])) / tick
    found, wave = {root}, {root}
    while wave:
        wave = {p for p, parent in parents.items() if parent in wave} - found
        found |= wave
    return {pid: cpu[pid] for pid in found if pid in cpu}


def _status(pid: int, name: str, *, file: str = "status") -> int:
    """Bytes of a line of /proc/PID/status; 0 when the process has gone."""
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)
