"""Work on crawled text in a child process, which the kernel kills if a document takes too long.

Documents are hostile: some take a parser or a regular expression minutes, some all memory, some
crash native code. So a child does the work on each document under a timer whose default action ends
the process, and under a memory limit. The parent sees the pipe close, gets a `Loss` for that
document, and starts the next child; other documents are not affected. The timer counts CPU time,
so that a busy machine does not change which documents are lost.
"""

import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

# wall-clock limit for a document that waits instead of working, as a multiple of the CPU time limit
WALL_FACTOR = 20
# children that the machine may kill one after the other, without a result between them; more often,
# it is short of memory, and the next one would be killed as well
KILLS = 3

_NO_START = "the child process of this worker cannot start"
_MAIN = "from stages.isolation.child import main; main()"

Work = Callable[[Any], Any]


class ChildKilled(RuntimeError):
    """The machine killed the child: mostly for memory that others took."""


class Limits(NamedTuple):
    """Of one document: CPU time in seconds, and bytes of memory beyond what the child has loaded.

    The child is replaced after `recycle_after` documents: parsers leak memory, and only a new
    process frees it for certain.
    """

    seconds: float
    memory_bytes: int
    recycle_after: int


class Loss(NamedTuple):
    """Why a document has no result: what it took, if that is known, and the limit of that."""

    reason: Literal["timeout", "memory", "crash", "error"]
    value: float | None = None
    limit: float | None = None

    def rejection(self, stage: str) -> tuple[str, float | None, tuple[float | None, float | None]]:
        """The rule that rejects the document, its value and its bound."""
        low = None if self.limit is None else 0.0
        return f"{stage}.{self.reason}", self.value, (low, self.limit)


class Child:
    """A child process for the work that `make(plan)` returns. `make` is a function of a module.

    It is started on first use, and replaced when it dies.
    """

    def __init__(self, make: Callable[[Any], Work], plan: Any, limits: Limits) -> None:
        self.make, self.plan, self.limits = make, plan, limits
        self.cpu_seconds = 0.0  # spent by all children so far
        self._process: subprocess.Popen[bytes] | None = None
        self._served = 0

    def result(self, item: Any) -> Any:
        """The result of an item, or its Loss: see `results`."""
        return self.results([item])[0]

    def results(self, items: Iterable[Any]) -> list[Any]:
        """The result of each item, or its Loss. No document makes it raise, or costs another one.

        Cheaper than one by one: 8 % of the stage extract with engine blocks. A child that the
        machine kills is replaced, and its document done again.
        RuntimeError if the child cannot start; ChildKilled after KILLS in a row.
        """
        pickled = [pickle.dumps(item) for item in items]
        results: list[Any] = []
        kills = 0
        while len(results) < len(pickled):
            if self._served >= self.limits.recycle_after:
                self.close()
            try:
                process = self._process = self._process or self._start()
                left = self.limits.recycle_after - self._served
                results += self._next_results(pickled[len(results) :][:left], process)
                kills = 0
            except ChildKilled:
                kills += 1
                if kills == KILLS:
                    raise
        return results

    def _next_results(
        self, items: Sequence[bytes], process: "subprocess.Popen[bytes]"
    ) -> list[Any]:
        """The results of the first items: of all, or up to the first that ends the child.

        ChildKilled if the machine killed it before the first result.
        """
        results: list[Any] = []
        try:
            # the child reads all before it answers, or both could wait for the other to read
            self._pipe.send_bytes(pickle.dumps(len(items)))
            for item in items:
                self._pipe.send_bytes(item)
            for _ in items:
                result, cpu_seconds = pickle.loads(self._pipe.recv_bytes())
                self.cpu_seconds += cpu_seconds
                results.append(pickle.loads(result))
                self._served += 1
        except (EOFError, OSError):
            code = process.wait()
            self._process = None
            if not _is_killed(code):
                results.append(self._loss(code))
            elif not results:
                raise ChildKilled(
                    f"the child process of this worker ended with exit code {code}: out of memory?"
                ) from None
        except BaseException:
            self.close()  # otherwise the next item would get this one's result
            raise
        return results

    def close(self) -> None:
        """End the child; the next document starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _start(self) -> "subprocess.Popen[bytes]":
        self._served = 0
        self._pipe, child_end = Pipe()
        paths = os.pathsep.join(filter(None, sys.path))
        with child_end:
            process = subprocess.Popen(
                # not -m: results are of this module's classes, and not of __main__'s
                [sys.executable, "-c", _MAIN, str(child_end.fileno())],
                pass_fds=[child_end.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            )
        try:
            self._pipe.send_bytes(pickle.dumps((self.make, self.plan, self.limits)))
            error = self._pipe.recv_bytes().decode()
        except (EOFError, OSError):
            error = f"it ended with exit code {process.wait()}: out of memory?"
            if _is_killed(process.wait()):
                raise ChildKilled(f"{_NO_START}: {error}") from None
        if error:
            raise RuntimeError(f"{_NO_START}: {error}")
        return process

    def _loss(self, code: int) -> Loss:
        if -code in (signal.SIGPROF, signal.SIGALRM):
            self.cpu_seconds += self.limits.seconds
            return Loss("timeout", self.limits.seconds, self.limits.seconds)
        return Loss("crash", float(code))


def _is_killed(code: int) -> bool:
    """Whether the machine ended a child: it catches all exceptions of a document itself."""
    return code > 0 or -code in (signal.SIGKILL, signal.SIGTERM)


_children: dict[Callable[[Any], Work], Child] = {}  # of this process, by `make`


def shared_child(make: Callable[[Any], Work], plan: Any, limits: Limits) -> Child:
    """This process's child for a kind of work: kept between units, replaced for another plan."""
    before = _children.get(make)
    if before is not None and (before.plan, before.limits) == (plan, limits):
        return before
    if before is not None:
        before.close()
    _children[make] = Child(make, plan, limits)
    return _children[make]


def serve(pipe: Connection) -> None:
    """Run the child: answer one document after the other until the parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what ends
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    try:
        make, plan, limits = pickle.loads(pipe.recv_bytes())
        work = make(plan)
    except Exception as error:
        pipe.send_bytes(f"{type(error).__name__}: {error}".encode("utf-8", "replace"))
        return
    _limit_memory(limits.memory_bytes)
    pipe.send_bytes(b"")
    before = 0.0
    while True:
        items = [pipe.recv_bytes() for _ in range(pickle.loads(pipe.recv_bytes()))]
        for item in items:
            signal.setitimer(signal.ITIMER_PROF, limits.seconds)
            signal.setitimer(signal.ITIMER_REAL, limits.seconds * WALL_FACTOR)
            result = _result(work, item, limits)
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            now = time.process_time()
            pipe.send_bytes(pickle.dumps((result, now - before)))
            before = now


def _limit_memory(more: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _result(work: Work, item: bytes, limits: Limits) -> bytes:
    """The result, pickled: what that takes counts too."""
    try:
        return pickle.dumps(work(pickle.loads(item)))
    except MemoryError:
        return pickle.dumps(Loss("memory", float(limits.memory_bytes), float(limits.memory_bytes)))
    except BaseException:  # libraries raise anything; a panic of Rust is no Exception
        return pickle.dumps(Loss("error"))


def main() -> None:
    """Run the child, in its own process."""
    with suppress(EOFError, BrokenPipeError):
        serve(Connection(int(sys.argv[1])))
