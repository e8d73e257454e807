"""Checkpoints by torch.distributed.checkpoint: written beside the training, whole or not there, for any number of ranks.

    FOLDER/step-00000100/__0_0.distcp   the part of rank 0: weights and optimiser state, and so on for each rank
    FOLDER/step-00000100/.metadata      where each tensor's pieces lie
    FOLDER/step-00000100/meta.json      written last: what makes the folder a checkpoint; sha256 of every other file

A folder without meta.json was cut off while it was written or removed. FOLDER is one that every rank sees.
"""

import base64
import hashlib
import itertools
import json
import logging
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_model_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.optim import Optimizer

from trainer.config import CheckpointConfig, ModelConfig
from trainer.model import Transformer, save_hugging_face

VERSION = 1
META = "meta.json"
_NAME = re.compile(r"step-(\d+)(?:-(\d+))?")  # the second number: a step that was saved again
_FREE = {"attention"}  # of ModelConfig: how, not what; the kernel may change between save and load
_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")
_Meta = dict[str, Any]


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none of those that are there can be used."""


class Saved(NamedTuple):
    """A checkpoint that passed: the number of steps it was taken after, and the `extra` it was saved with."""

    step: int
    folder: Path
    extra: dict[str, Any]
    metric: float | None


class Checkpoints:
    """The checkpoints of a run in a local folder. All ranks make one and call its methods in step, but `poll`.

    At most one save is in flight. Writing, hashing, meta.json and pruning happen in a thread, whose exchanges go over a gloo
    group of their own: over the group of the training they would meet its collectives in another order on each rank.

    ValueError for a folder on object storage, or a config that would keep nothing.
    """

    def __init__(self, folder: Path | str, config: CheckpointConfig) -> None:
        # Path("s3://x") is s3:/x
        if "://" in str(folder) or re.match(r"\w{2,}:/", str(folder)):
            raise ValueError(f"checkpoints are written to local disks, not '{folder}'; name a folder that every rank sees")
        if config.keep_last < 1 or config.keep_best < 0:
            raise ValueError(f"checkpoint.keep_last {config.keep_last} must be 1 or more, keep_best {config.keep_best} 0 or more")
        self._folder, self._config = Path(folder), config
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._rank = 0 if self._group is None else dist.get_rank()
        self._ranks = 1 if self._group is None else dist.get_world_size()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._faulty: set[str] = set()  # found by `latest`; removed once there is a newer one

    def save(
        self, step: int, model: Transformer, optimizer: Optimizer, extra: dict[str, Any], *, metric: float | None = None
    ) -> None:
        """Save the state after `step` steps; first waits for the save before, and raises CheckpointError if that failed.

        Asynchronous: returns when the state is copied to host memory, and the caller may train on; the checkpoint exists once
        its meta.json does. `extra` is for JSON (finite numbers; else ValueError) and rank 0's counts. `metric`, lower is
        better, picks the best; None and NaN are never among them.
        """
        self.finish()
        meta = _describe(step, model, optimizer, extra, metric)
        folder = self._folder / self._of_first(partial(self._new_folder, step))
        writer = FileSystemWriter(folder, single_file_per_rank=True, sync_files=True)
        state = _state(model, optimizer)
        if not self._config.asynchronous:
            with _as_errors(folder):
                save(state, storage_writer=writer, process_group=self._group)
            self._commit(folder, meta)
            return
        # the writer stages as well (2.13): it copies to new host memory, and blocks until that is done; where a torch's writer
        # is no stager, async_save takes its own default, which does the same
        written = async_save(state, storage_writer=writer, process_group=self._group)
        assert isinstance(written, Future)
        self._pending = self._thread.submit(self._commit, folder, meta, written)

    def poll(self) -> bool:
        """Whether a save is still being written, as this rank sees it. Exchanges nothing, raises nothing."""
        return self._pending is not None and not self._pending.done()

    def finish(self) -> None:
        """Wait for the save in flight, if any. CheckpointError, on all ranks alike, if it failed; those before it remain."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def latest(self) -> Saved | None:
        """The newest checkpoint whose files all have their size and sha256; None when there is none. The same on all ranks.

        Each rank hashes a share of the files. What fails is passed over with a warning, and removed by the next save.
        CheckpointError when there are checkpoints and all fail: to begin anew is for a person to decide.
        """
        self.finish()
        faults: list[str] = []
        for name in self._of_first(lambda: _committed(self._folder)):
            folder = self._folder / name
            findings = self._of_all(partial(_inspect, folder, self._rank, self._ranks))
            meta, fault = findings[0][0], next((fault for _, fault in findings if fault is not None), None)
            if meta is not None and fault is None:
                return Saved(meta["step"], folder, meta["extra"], meta["metric"])
            faults.append(f"{folder}: {fault}")
            self._faulty.add(name)
            if self._rank == 0:
                _LOG.warning("checkpoint passed over: %s", faults[-1])
        if faults:
            raise CheckpointError(f"no checkpoint can be used; restore one, or move them away to begin anew: {'; '.join(faults)}")
        return None

    def load(self, saved: Saved, model: Transformer, optimizer: Optimizer) -> None:
        """Put a checkpoint's weights, optimiser state and CPU random state in place, on this number of ranks.

        Learning rate, betas, weight decay remain those of `optimizer`: the config's. ValueError, before anything is changed,
        for a model of another config or another kind of optimiser. CheckpointError if reading fails: the model is then undefined.
        """
        self.finish()
        meta = self._of_first(partial(_read_meta, saved.folder))
        _check_fits(saved.folder, meta, model, optimizer)
        optimizer.zero_grad(set_to_none=True)  # with gradients there, torch would not make the state that is to be filled
        optimizer.state.clear()
        if meta["moments"]:
            weights, moments = get_state_dict(model, optimizer)
            self._read(saved.folder, {"model": weights, "optimizer": moments["state"]})
            set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
        else:
            weights = get_model_state_dict(model)
            self._read(saved.folder, {"model": weights})
            set_model_state_dict(model, weights)
        torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(meta["rng"])), dtype=torch.uint8))

    def _read(self, folder: Path, state: dict[str, Any]) -> None:
        """Into the tensors of `state`."""
        with _as_errors(folder):
            load(state, storage_reader=FileSystemReader(folder), process_group=self._group)

    # --- in the thread, when asynchronous -----------------------------------------------------------------------------

    def _commit(self, folder: Path, meta: _Meta, written: "Future[Any] | None" = None) -> None:
        """Once the data are on disk everywhere: hash them, make the folder a checkpoint, remove what is superseded."""
        if written is not None:
            with _as_errors(folder):
                written.result()
        parts = self._of_all(lambda: _hashes(folder, self._rank))
        meta["files"] = {name: entry for part in parts for name, entry in part.items()}
        self._of_first(partial(self._publish, folder, meta))

    def _publish(self, folder: Path, meta: _Meta) -> None:
        unknown = {path.name for path in folder.iterdir()} ^ meta["files"].keys()
        if unknown:
            raise CheckpointError(f"{folder}: {sorted(unknown)} on one side only: every rank must see the same folder")
        _write_meta(folder, meta)
        self._prune()

    def _prune(self) -> None:
        """Remove what is neither among the last nor the best. What has a meta.json that cannot be read stays."""
        oldest_first = [name for name in reversed(_committed(self._folder)) if name not in self._faulty]
        metas = {name: meta for name in oldest_first if (meta := _inspect_meta(self._folder / name)[0]) is not None}
        newest = list({meta["step"]: name for name, meta in metas.items()}.values())  # a step saved again counts once
        last = newest[-self._config.keep_last :]
        ranked = [name for name in reversed(newest) if metas[name]["metric"] is not None]
        best = sorted(ranked, key=lambda name: metas[name]["metric"])[: self._config.keep_best]  # of equals the newest
        for name in {*metas, *self._faulty} - {*last, *best}:
            _remove(self._folder / name)
        self._faulty.clear()

    def _new_folder(self, step: int) -> str:
        """Make the folder of a save, once those cut off are removed. A checkpoint of this step stays until the new one is one."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._folder.iterdir():
            if _NAME.fullmatch(path.name) and not (path / META).exists():
                _remove(path)
        names = (f"step-{step:08}" + (f"-{n}" if n else "") for n in itertools.count())
        name = next(name for name in names if not (self._folder / name).exists())
        (self._folder / name).mkdir()
        _sync(self._folder)
        return name

    # --- between ranks ------------------------------------------------------------------------------------------------

    def _of_all(self, action: Callable[[], _T]) -> list[_T]:
        """The results of all ranks; if it fails on any, CheckpointError on every one, so that none waits for another."""
        answer, failure = None, None
        try:
            answer = action()
        except Exception as error:  # whatever it is: the other ranks wait for ours
            failure = str(error) if isinstance(error, CheckpointError) else f"rank {self._rank}: {error!r}"
        answers: list[Any] = [(answer, failure)] * self._ranks
        if self._group is not None:
            dist.all_gather_object(answers, (answer, failure), group=self._group)
        for _, failed in answers:
            if failed is not None:
                raise CheckpointError(failed)
        return [found for found, _ in answers]

    def _of_first(self, action: Callable[[], _T]) -> _T:
        """What rank 0 alone does; its result on all."""
        first: _T = self._of_all(lambda: action() if self._rank == 0 else None)[0]  # type: ignore[assignment]
        return first


def export_hugging_face(folder: Path, output: Path, *, max_positions: int = 2048, end_of_text: int | None = None) -> None:
    """Write the weights of a checkpoint, float32, for transformers' LlamaForCausalLM (see `save_hugging_face`).

    In this process alone, without a process group; holds the weights, not the optimiser's state. ValueError for a folder that
    is no checkpoint or whose files are not what was saved.
    """
    meta, fault = _inspect(folder, 0, 1)
    if meta is None or fault is not None:
        raise ValueError(f"{folder}: {fault}; export another checkpoint")
    config = ModelConfig(**meta["model"])
    with torch.device("meta"):
        model = Transformer(config)
    state = {"model": model.to_empty(device="cpu").state_dict()}
    with _as_errors(folder), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as we ask for
        load(state, storage_reader=FileSystemReader(folder), no_dist=True)
    save_hugging_face(output, state["model"], config, max_positions=max_positions, end_of_text=end_of_text)


# --- state ------------------------------------------------------------------------------------------------------------


def _describe(step: int, model: Transformer, optimizer: Optimizer, extra: dict[str, Any], metric: float | None) -> _Meta:
    """meta.json but for `files`, as it is now: what the caller changes later does not reach it."""
    meta = {
        "version": VERSION,
        "step": step,
        "metric": metric if metric is not None and math.isfinite(metric) else None,
        "model": asdict(model.config),
        "optimizer": type(optimizer).__name__,
        "moments": bool(optimizer.state),
        "torch": torch.__version__,
        "rng": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
        "extra": extra,
    }
    copied: _Meta = json.loads(json.dumps(meta, allow_nan=False))
    return copied


def _state(model: Transformer, optimizer: Optimizer) -> dict[str, Any]:
    """What DCP writes. Without the optimiser's hyperparameters, and without its state as long as it has none.

    torch would make one by a step with zero gradients, which counts in bias correction: no longer the same run.
    """
    if not optimizer.state:
        return {"model": get_model_state_dict(model)}
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments["state"]}


def _check_fits(folder: Path, meta: _Meta, model: Transformer, optimizer: Optimizer) -> None:
    ours = asdict(model.config)
    other = [
        f"{key}={value} where the config has {ours.get(key)}"
        for key, value in meta["model"].items()
        if key not in _FREE and value != ours.get(key)
    ]
    if other:
        raise ValueError(f"{folder}: saved of another model: {', '.join(other)}; restore them, or train into a new directory")
    if meta["optimizer"] != type(optimizer).__name__:
        raise ValueError(f"{folder}: saved with {meta['optimizer']}, the config has {type(optimizer).__name__}; restore it")


@contextmanager
def _as_errors(folder: Path) -> Iterator[None]:
    """DCP's exception is no Exception (2.13), so that handlers of the caller would miss it."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise CheckpointError(f"{folder}: rank {rank}: {cause!r}") from error


# --- files ------------------------------------------------------------------------------------------------------------


def _committed(folder: Path) -> list[str]:
    """Names of the checkpoints in a folder, the newest first."""
    if not folder.is_dir():
        return []
    matches = [_NAME.fullmatch(path.name) for path in folder.iterdir() if (path / META).exists()]
    numbers = {match[0]: (int(match[1]), int(match[2] or 0)) for match in matches if match}
    return sorted(numbers, key=numbers.__getitem__, reverse=True)


def _inspect(folder: Path, rank: int, ranks: int) -> tuple[_Meta | None, str | None]:
    """meta.json, and what is wrong with it or with this rank's share of the files; never raises for what is on disk."""
    meta, fault = _inspect_meta(folder)
    if meta is None:
        return None, fault
    for name, expected in sorted(meta["files"].items())[rank::ranks]:
        try:
            found = _entry(folder / name, hashed=(folder / name).stat().st_size == expected["bytes"])
        except OSError as error:
            return meta, f"{name} cannot be read: {error}"
        if found != expected:
            return meta, f"{name}: expected {expected}, found {found}"
    return meta, None


def _inspect_meta(folder: Path) -> tuple[_Meta | None, str | None]:
    try:
        return _read_meta(folder), None
    except (OSError, ValueError) as error:
        return None, str(error)


def _read_meta(folder: Path) -> _Meta:
    """ValueError when it is no meta.json of ours, OSError when there is none."""
    meta: Any = json.loads((folder / META).read_bytes())
    version = meta.get("version") if isinstance(meta, dict) else None
    if version != VERSION:
        raise ValueError(f"{META} of version {version}, this code reads {VERSION}")
    return dict(meta)


def _hashes(folder: Path, rank: int) -> dict[str, dict[str, Any]]:
    """Entries of the files that a rank has written, by DCP's names; read again, from the page cache if that is large enough."""
    paths = [*folder.glob(f"__{rank}_*"), *([folder / ".metadata"] if rank == 0 else [])]
    return {path.name: _entry(path) for path in paths}


def _entry(path: Path, *, hashed: bool = True) -> dict[str, Any]:
    size = path.stat().st_size
    if not hashed:
        return {"bytes": size}
    with open(path, "rb") as stream:
        return {"bytes": size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _write_meta(folder: Path, meta: _Meta) -> None:
    """Atomically and durably: DCP has synced the files but not their names."""
    temporary = folder / f"{META}.tmp"
    with open(temporary, "w") as stream:
        json.dump(meta, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    _sync(folder)
    os.replace(temporary, folder / META)
    _sync(folder)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(folder: Path) -> None:
    """meta.json first: killed half-way, the rest is no checkpoint."""
    (folder / META).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
