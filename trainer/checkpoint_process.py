"""Write checkpoints in a process of its own, from memory that it shares with the trainer.

    trainer   copies its tensors into the memory, allocated once and pinned for a GPU, and trains
              on; a thread agrees on the plan with the other ranks (`trainer.checkpoint`)
    writer    python -m trainer.checkpoint_process: writes this rank's file from the memory, and
              answers where each tensor is in it

Writing then takes neither the GIL nor new memory from the training. The writer has no part in
collectives: if it fails or dies, the thread has an error for all ranks, and the next save starts
another. It dies with the trainer, so that it never writes into the folder of the next attempt.

torch's AsyncCheckpointerType.PROCESS was read (2.13) and not taken: it joins a process group of its
own under a host name that has to resolve, finishes its writes after the trainer was killed, fails
every later save once it has died, and shares memory by /dev/shm, which has 64 MB in many
containers. Ours is an anonymous file (memfd), limited by the machine's memory alone.
"""

import copy
import ctypes
import dataclasses
import io
import logging
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from trainer.checkpoint_files import writer_of

_ALIGNMENT = 64  # bytes; of each tensor in the memory
_PR_SET_PDEATHSIG = 1  # prctl(2)
_LOG = logging.getLogger(__name__)


class ProcessWriter(AsyncStager):
    """Stages the state of a rank for `async_save`, and writes it by another process.

    Use it from the thread that trains: the process dies with the thread that has started it.
    """

    _synchronize_after_execute = False  # `stage` returns when all is copied

    def __init__(self) -> None:
        self._memory: SharedMemory | None = None
        self._child: _Child | None = None

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Copy all tensors to the shared memory; the state with these in their places.

        The memory of the save before is used again, so that has to be finished.
        """
        sizes = [_aligned(tensor.nbytes) for tensor in _local_tensors(state_dict)]
        if self._memory is None or self._memory.size < sum(sizes):
            self.close()  # free the smaller one first
            self._memory = SharedMemory(sum(sizes))
        if self._child is None:
            self._child = _Child(self._memory)
        staged: dict[str, Any] = _Stage(self._memory).copy(state_dict)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return staged

    def synchronize_staging(self) -> None:
        """Do nothing: `stage` has waited."""

    def close(self) -> None:
        """End the process and free the memory; a write that is in progress is cut off."""
        if self._child is not None:
            self._child.close()
        self._child = self._memory = None

    def writer(self, folder: str) -> Any:
        """A DCP writer to a folder that lets the process write this rank's file."""
        writer = writer_of(folder)
        # replaced in the instance, since there are two classes of writers
        writer.write_data = lambda plan, planner: self._write(folder, plan, planner)  # type: ignore[method-assign]
        return writer

    def _write(
        self, folder: str, plan: SavePlan, planner: SavePlanner
    ) -> "Future[list[WriteResult]]":
        assert self._memory is not None and self._child is not None
        contents = {
            item.index: self._memory.locate(data) if isinstance(data, Tensor) else data.getvalue()
            for item in plan.items
            for data in (planner.resolve_data(item),)
        }
        try:
            results = self._child.call(
                folder, dataclasses.replace(plan, planner_data=None), contents
            )
        except ChildProcessError:
            self._child = None
            raise
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future


class SharedMemory:
    """Host memory that two processes map; pinned where there is a GPU.

    All of it is allocated at once, unless `file` is that of another process. OSError if the machine
    does not have so much.
    """

    def __init__(self, size: int, file: int | None = None) -> None:
        self.size = max(size, 1)
        self.file = os.memfd_create("gristmill-checkpoint") if file is None else file
        if file is None:
            os.posix_fallocate(self.file, 0, self.size)
        self._bytes = mmap.mmap(self.file, self.size)
        self._whole = torch.frombuffer(self._bytes, dtype=torch.uint8)
        pinned = torch.cuda.is_available() and _pin(self._whole)
        weakref.finalize(self, _release, self._whole, self.file, pinned)

    def view(self, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """The tensor at an offset in bytes."""
        count = torch.Size(shape).numel()
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        # of its own storage: torch copies a tensor that is saved as a part of a larger one
        return torch.frombuffer(self._bytes, dtype=dtype, count=count, offset=offset).view(shape)

    def locate(self, tensor: Tensor) -> tuple[int, torch.dtype, tuple[int, ...]]:
        """What `view` needs to make this tensor, which is one of its own, in another process."""
        assert tensor.is_contiguous()
        offset = tensor.data_ptr() - self._whole.data_ptr() if tensor.numel() else 0
        return offset, tensor.dtype, tuple(tensor.shape)


class _Stage:
    """Copies the tensors of a state into the memory, one after another."""

    def __init__(self, memory: SharedMemory) -> None:
        self._memory, self._offset = memory, 0

    def copy(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self.copy(item) for key, item in value.items()}
        if isinstance(value, DTensor):
            # by the protocol of wrapper subclasses: `from_local` would move it back to the GPU
            names, context = value.__tensor_flatten__()  # type: ignore[no-untyped-call]
            inner = {name: getattr(value, name) for name in names}
            inner["_local_tensor"] = self.copy(inner["_local_tensor"])
            make: Any = DTensor.__tensor_unflatten__
            return make(inner, context, value.shape, value.stride())
        if isinstance(value, Tensor):
            copied = self._memory.view(self._offset, value.dtype, tuple(value.shape))
            self._offset += _aligned(value.nbytes)
            return copied.copy_(value.detach(), non_blocking=True)
        return copy.deepcopy(value)


def _local_tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of a state that this rank holds, in the order in which they are copied."""
    if isinstance(value, dict):
        for item in value.values():
            yield from _local_tensors(item)
    elif isinstance(value, DTensor):
        yield value.to_local()
    elif isinstance(value, Tensor):
        yield value


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _pin(memory: Tensor) -> bool:
    """Page-lock the memory, for copies at full speed; False, with a warning, if CUDA refuses."""
    cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    error = cudart.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
    if int(error) != 0:
        _LOG.warning("checkpoints are staged in memory that is not pinned: CUDA error %s", error)
    return int(error) == 0


def _release(memory: Tensor, file: int, pinned: bool) -> None:
    if pinned:
        cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        cudart.cudaHostUnregister(memory.data_ptr())
    os.close(file)


# --- the process ----------------------------------------------------------------------------------


class _Child:
    """The writing process, as the trainer sees it."""

    def __init__(self, memory: SharedMemory) -> None:
        ours, theirs = socket.socketpair()
        numbers = (memory.file, memory.size, theirs.fileno(), os.getpid())
        # blocked there for good: a signal to the whole job is for the trainer, which then saves
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            self._process = subprocess.Popen(
                # -P: modules of the current folder must not take the place of ours
                [sys.executable, "-P", "-m", "trainer.checkpoint_process", *map(str, numbers)],
                pass_fds=[memory.file, theirs.fileno()],
                # the trainer's modules, and no GPU: torch would take memory of it
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(sys.path),
                    "CUDA_VISIBLE_DEVICES": "",
                },
                stdin=subprocess.DEVNULL,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        self._connection = Connection(ours.detach())
        self.close = weakref.finalize(self, _end, self._process, self._connection)

    def call(self, *request: Any) -> list[WriteResult]:
        """What the process answers. Its error if it failed, ChildProcessError if it died."""
        try:
            self._connection.send(request)
            answer = self._connection.recv()
        except (EOFError, OSError):
            code = self._process.wait()
            raise ChildProcessError(
                f"the process that writes checkpoints died with exit code {code}; "
                "-9 may be the kernel's, short of memory"
            ) from None
        if isinstance(answer, BaseException):
            raise answer
        results: list[WriteResult] = answer
        return results


def _end(process: "subprocess.Popen[bytes]", connection: Connection) -> None:
    connection.close()
    process.kill()  # whatever it may be writing, nobody waits for it
    process.wait()


def _serve(file: int, size: int, connection: int, trainer: int) -> None:
    """Answer requests until the trainer closes the connection."""
    _die_with(trainer)
    memory, requests = SharedMemory(size, file), Connection(connection)
    with suppress(EOFError, ConnectionError):
        while True:
            requests.send(_answer(memory, *requests.recv()))


def _answer(memory: SharedMemory, folder: str, plan: SavePlan, contents: dict[Any, Any]) -> Any:
    """Where each item was written, or the error."""

    def resolve(item: WriteItem) -> Tensor | io.BytesIO:
        content = contents[item.index]
        return io.BytesIO(content) if isinstance(content, bytes) else memory.view(*content)

    planner: Any = SimpleNamespace(resolve_data=resolve)  # all that a writer asks of one
    try:
        return writer_of(folder).write_data(plan, planner).wait()
    except Exception as error:
        return _picklable(error)


def _die_with(trainer: int) -> None:
    """Have the kernel kill this process when the trainer dies, however that happens."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != trainer:  # it died before
        os._exit(1)


def _picklable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # pickle raises whatever the class raises
        return RuntimeError(repr(error))
    return error


if __name__ == "__main__":
    _serve(*map(int, sys.argv[1:]))
