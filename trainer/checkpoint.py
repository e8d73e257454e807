"""Checkpoints by torch.distributed.checkpoint: written beside the training, whole or not there, for
any number of ranks.

    FOLDER/step-00000100/__0_0.distcp   the part of rank 0: weights and optimiser state, and so on for each rank
    FOLDER/step-00000100/.metadata      where each tensor's pieces lie
    FOLDER/step-00000100/meta.json      written last: what makes the folder a checkpoint; sha256 of every other file

A folder without meta.json was cut off while it was written or removed. FOLDER is one that every
rank sees: of a disk, or a URL that fsspec knows (s3://BUCKET/RUN), where one PUT makes meta.json.
Retries are the client's: for S3 set AWS_RETRY_MODE and AWS_MAX_ATTEMPTS. A save that is killed may
leave parts of an upload, which only a lifecycle rule of the bucket removes.
"""

import base64
import hashlib
import itertools
import json
import logging
import math
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import fsspec
import torch
import torch.distributed as dist
from fsspec.implementations.local import LocalFileSystem
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.optim import Optimizer

from trainer.config import RENAMED_KEYS, CheckpointConfig, ModelConfig
from trainer.model.hugging_face import save_hugging_face
from trainer.model.llama import Transformer

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
    """A checkpoint that passed: the number of steps it was taken after, and the `extra` it was
    saved with.
    """

    step: int
    folder: str  # absolute path or URL
    extra: dict[str, Any]
    metric: float | None


class Checkpoints:
    """The checkpoints of a run, in a local folder or at a URL. All ranks make one and call its
    methods in step, but `poll`.

    At most one save is in flight. Writing, hashing, meta.json and pruning happen in a thread, whose
    exchanges go over a gloo group of their own: over the group of the training they would meet its
    collectives in another order on each rank.

    ValueError for a URL of an unknown kind, with * ? [ in it, or made a Path, or a config that
    would keep nothing; ImportError, which says what to install, where fsspec lacks the client.
    """

    def __init__(self, folder: Path | str, config: CheckpointConfig) -> None:
        if config.keep_last < 1 or config.keep_best < 0:
            raise ValueError(
                f"checkpoint.keep_last {config.keep_last} must be 1 or more, keep_best {config.keep_best} 0 or more"
            )
        (self._files, self._folder), self._config = _locate(folder), config
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._rank = 0 if self._group is None else dist.get_rank()
        self._ranks = 1 if self._group is None else dist.get_world_size()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._faulty: set[str] = set()  # found by `latest`; removed once there is a newer one

    def save(
        self,
        step: int,
        model: Transformer,
        optimizer: Optimizer,
        extra: dict[str, Any],
        *,
        metric: float | None = None,
    ) -> None:
        """Save the state after `step` steps; first waits for the save before, and raises
        CheckpointError if that failed.

        Asynchronous: returns when the state is copied to host memory, and the caller may train on;
        the checkpoint exists once its meta.json does. What was written is read back for its sha256,
        which from object storage is a download of each rank's own file. `extra` is for JSON (finite
        numbers; else ValueError) and rank 0's counts. `metric`, lower is better, picks the best;
        None and NaN are never among them.
        """
        self.finish()
        meta = _describe(step, model, optimizer, extra, metric)
        folder = f"{self._folder}/{self._of_first(partial(self._new_folder, step))}"
        writer, state = _writer(self._files, folder), _state(model, optimizer)
        if not self._config.asynchronous:
            with _as_errors(folder):
                save(state, storage_writer=writer, process_group=self._group)
            self._commit(folder, meta)
            return
        # the writer stages as well (2.13): it copies to new host memory, and blocks until that is
        # done; where a torch's writer is no stager, async_save takes its own default, which does
        # the same
        written = async_save(state, storage_writer=writer, process_group=self._group)
        assert isinstance(written, Future)
        self._pending = self._thread.submit(self._commit, folder, meta, written)

    def poll(self) -> bool:
        """Whether a save is still being written, as this rank sees it.

        Exchanges nothing, raises nothing.
        """
        return self._pending is not None and not self._pending.done()

    def finish(self) -> None:
        """Wait for the save in flight, if any. CheckpointError, on all ranks alike, if it failed;
        those before it remain.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def latest(self) -> Saved | None:
        """The newest checkpoint whose files all have their size and sha256; None when there is
        none. The same on all ranks.

        Each rank hashes a share of the files: of object storage all of the checkpoint is downloaded
        once, and again, each rank its files, by `load`. What fails is passed over with a warning,
        and removed by the next save. CheckpointError when there are checkpoints and all fail, as to
        begin anew is for a person to decide; when the bucket is absent; when the store does not
        answer, which is no fault of a checkpoint.
        """
        self.finish()
        faults: list[str] = []
        for name in self._of_first(lambda: _committed(self._files, self._folder)):
            folder = f"{self._folder}/{name}"
            findings = self._of_all(partial(_inspect, self._files, folder, self._rank, self._ranks))
            meta, fault = (
                findings[0][0],
                next((fault for _, fault in findings if fault is not None), None),
            )
            if meta is not None and fault is None:
                return Saved(meta["step"], folder, meta["extra"], meta["metric"])
            faults.append(f"{folder}: {fault}")
            self._faulty.add(name)
            if self._rank == 0:
                _LOG.warning("checkpoint passed over: %s", faults[-1])
        if faults:
            raise CheckpointError(
                f"no checkpoint can be used; restore one, or move them away to begin anew: {'; '.join(faults)}"
            )
        return None

    def load(self, saved: Saved, model: Transformer, optimizer: Optimizer) -> None:
        """Put a checkpoint's weights, optimiser state and CPU random state in place, on this number
        of ranks.

        Learning rate, betas, weight decay remain those of `optimizer`: the config's. ValueError,
        before anything is changed, for a model of another config or another kind of optimiser.
        CheckpointError if reading fails: the model is then undefined.
        """
        self.finish()
        meta = self._of_first(partial(_read_meta, self._files, saved.folder))
        _check_fits(saved.folder, meta, model, optimizer)
        optimizer.zero_grad(
            set_to_none=True
        )  # with gradients there, torch would not make the state that is to be filled
        optimizer.state.clear()
        if meta["moments"]:
            weights, moments = get_state_dict(model, optimizer)
            _read(
                self._files,
                saved.folder,
                {"model": weights, "optimizer": moments["state"]},
                process_group=self._group,
            )
            set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
        else:
            weights = get_model_state_dict(model)
            _read(self._files, saved.folder, {"model": weights}, process_group=self._group)
            set_model_state_dict(model, weights)
        torch.set_rng_state(
            torch.frombuffer(bytearray(base64.b64decode(meta["rng"])), dtype=torch.uint8)
        )

    # --- in the thread, when asynchronous ---------------------------------------------------------

    def _commit(self, folder: str, meta: _Meta, written: "Future[Any] | None" = None) -> None:
        """Once the data are stored everywhere: hash them, make the folder a checkpoint, remove what
        is superseded.
        """
        if written is not None:
            with _as_errors(folder):
                written.result()
        parts = self._of_all(lambda: _hashes(self._files, folder, self._rank))
        meta["files"] = {name: entry for part in parts for name, entry in part.items()}
        self._of_first(partial(self._publish, folder, meta))

    def _publish(self, folder: str, meta: _Meta) -> None:
        unknown = _names(self._files, folder) ^ meta["files"].keys()
        if unknown:
            raise CheckpointError(
                f"{folder}: {sorted(unknown)} on one side only: every rank must see the same folder"
            )
        _write_meta(self._files, folder, meta)
        self._prune()

    def _prune(self) -> None:
        """Remove what is neither among the last nor the best.

        What has a meta.json that cannot be read stays.
        """
        oldest_first = [
            name
            for name in reversed(_committed(self._files, self._folder))
            if name not in self._faulty
        ]
        found = (
            (name, _inspect_meta(self._files, f"{self._folder}/{name}")[0]) for name in oldest_first
        )
        metas = {name: meta for name, meta in found if meta is not None}
        newest = list(
            {meta["step"]: name for name, meta in metas.items()}.values()
        )  # a step saved again counts once
        last = newest[-self._config.keep_last :]
        ranked = [name for name in reversed(newest) if metas[name]["metric"] is not None]
        best = sorted(ranked, key=lambda name: metas[name]["metric"])[
            : self._config.keep_best
        ]  # of equals the newest
        for name in {*metas, *self._faulty} - {*last, *best}:
            _remove(self._files, f"{self._folder}/{name}")
        self._faulty.clear()

    def _new_folder(self, step: int) -> str:
        """Make the folder of a save, once those cut off are removed.

        A checkpoint of this step stays until the new one is one.
        """
        committed = _committed(self._files, self._folder)
        for name in _names(self._files, self._folder):
            if _NAME.fullmatch(name) and name not in committed:
                _remove(self._files, f"{self._folder}/{name}")
        there = _names(self._files, self._folder)  # anew: what could not be removed keeps its name
        names = (f"step-{step:08}" + (f"-{n}" if n else "") for n in itertools.count())
        name = next(name for name in names if name not in there)
        if _is_local(self._files):  # elsewhere a file's name makes its folders
            os.makedirs(f"{self._folder}/{name}")
            _sync(self._folder)
        return name

    # --- between ranks ----------------------------------------------------------------------------

    def _of_all(self, action: Callable[[], _T]) -> list[_T]:
        """The results of all ranks; if it fails on any, CheckpointError on every one, so that none
        waits for another.
        """
        answer, failure = None, None
        try:
            answer = action()
        except Exception as error:  # whatever it is: the other ranks wait for ours
            failure = (
                str(error)
                if isinstance(error, CheckpointError)
                else f"rank {self._rank}: {error!r}"
            )
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


def committed(folder: Path | str) -> dict[int, str]:
    """The checkpoints of a folder or URL, whole or damaged, by their step, rising."""
    files, root = _locate(folder)
    return {int(name.split("-")[1]): f"{root}/{name}" for name in reversed(_committed(files, root))}


def export_hugging_face(
    folder: Path | str,
    output: Path | str,
    *,
    max_positions: int | None = None,
    end_of_text: int | None = None,
) -> None:
    """Write the weights of a checkpoint, float32, for transformers' LlamaForCausalLM (see
    `save_hugging_face`).

    In this process alone, without a process group; holds the weights, not the optimiser's state.
    Both may be URLs, by way of the temporary folder. `max_positions` is by default the length of
    the rows that it was trained on. ValueError for a folder that is no checkpoint or whose files
    are not what was saved.
    """
    (files, folder), (store, target) = _locate(folder), _locate(output)
    meta, fault = _inspect(files, folder, 0, 1)
    if meta is None or fault is not None:
        raise ValueError(f"{folder}: {fault}; export another checkpoint")
    config = ModelConfig(**_model_settings(meta))
    with torch.device("meta"):
        model = Transformer(config)
    state = {"model": model.to_empty(device="cpu").state_dict()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as we ask for
        _read(files, folder, state, no_dist=True)
    max_positions = max_positions or meta["extra"].get("supply", {}).get("seq_len") or 2048
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(target if _is_local(store) else scratch)
        save_hugging_face(
            place, state["model"], config, max_positions=max_positions, end_of_text=end_of_text
        )
        if not _is_local(store):
            store.put(f"{scratch}/", f"{target}/", recursive=True)


# --- state ----------------------------------------------------------------------------------------


def _describe(
    step: int, model: Transformer, optimizer: Optimizer, extra: dict[str, Any], metric: float | None
) -> _Meta:
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
    """What DCP writes. Without the optimiser's hyperparameters, and without its state as long as it
    has none.

    torch would make one by a step with zero gradients, which counts in bias correction: no longer
    the same run.
    """
    if not optimizer.state:
        return {"model": get_model_state_dict(model)}
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments["state"]}


def _check_fits(folder: str, meta: _Meta, model: Transformer, optimizer: Optimizer) -> None:
    ours = asdict(model.config)
    other = [
        f"{key}={value} where the config has {ours.get(key)}"
        for key, value in _model_settings(meta).items()
        if key not in _FREE and value != ours.get(key)
    ]
    if other:
        raise ValueError(
            f"{folder}: saved of another model: {', '.join(other)}; restore them, or train into a new directory"
        )
    if meta["optimizer"] != type(optimizer).__name__:
        raise ValueError(
            f"{folder}: saved with {meta['optimizer']}, the config has {type(optimizer).__name__}; restore it"
        )


@contextmanager
def _as_errors(folder: str) -> Iterator[None]:
    """DCP's exception is no Exception (2.13), so that handlers of the caller would miss it."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise CheckpointError(f"{folder}: rank {rank}: {cause!r}") from error


# --- files ----------------------------------------------------------------------------------------


def _locate(folder: Path | str) -> tuple[Any, str]:
    """The file system of a folder, and its absolute path or URL there."""
    if re.match(r"\w{2,}:/(?!/)", str(folder)):
        raise ValueError(
            f"'{folder}' is a URL that was made a Path and lost a slash; pass it as a string"
        )
    if "://" in str(folder) and set(str(folder)) & set("*?["):
        raise ValueError(
            f"'{folder}': fsspec removes by pattern, and would take * ? [ for one; name another folder"
        )
    # a rank that listed a folder before another wrote its meta.json would not find it
    files, path = fsspec.core.url_to_fs(str(folder), use_listings_cache=False)
    return files, path if _is_local(files) else files.unstrip_protocol(path)


def _is_local(files: Any) -> bool:
    return isinstance(files, LocalFileSystem)


def _names(files: Any, folder: str) -> set[str]:
    """What a folder holds; none when it is absent, but CheckpointError when its bucket is."""
    try:
        return {path.rstrip("/").rpartition("/")[2] for path in files.ls(folder, detail=False)}
    except FileNotFoundError as error:
        # a bucket mistyped is not a run that begins, and torch's writer would make it
        bucket = fsspec.core.url_to_fs(folder)[1].partition("/")[0]
        if not files.exists(bucket or "/"):
            raise CheckpointError(
                f"{folder}: bucket '{bucket}' cannot be reached ({error}); make it, or name another"
            ) from None
        return set()


def _committed(files: Any, folder: str) -> list[str]:
    """Names of the checkpoints in a folder, the newest first."""
    matches = [match for name in _names(files, folder) if (match := _NAME.fullmatch(name))]
    # by listing: `exists` of a store that does not answer is False, and what is not committed is
    # removed
    numbers = {
        m[0]: (int(m[1]), int(m[2] or 0))
        for m in matches
        if META in _names(files, f"{folder}/{m[0]}")
    }
    return sorted(numbers, key=numbers.__getitem__, reverse=True)


def _faults(files: Any) -> tuple[type[Exception], ...]:
    """Errors that are a checkpoint's own fault.

    A store's, but for absence, may pass, and must not cost the checkpoint.
    """
    return (OSError if _is_local(files) else FileNotFoundError, ValueError)


def _inspect(files: Any, folder: str, rank: int, ranks: int) -> tuple[_Meta | None, str | None]:
    """meta.json, and what is wrong with it or this rank's share of the files; raises only where a
    store does not answer.
    """
    meta, fault = _inspect_meta(files, folder)
    if meta is None:
        return None, fault
    for name, expected in sorted(meta["files"].items())[rank::ranks]:
        try:
            found = _entry(files, f"{folder}/{name}", of_size=expected["bytes"])
        except _faults(files) as error:
            return meta, f"{name} cannot be read: {error}"
        if found != expected:
            return meta, f"{name}: expected {expected}, found {found}"
    return meta, None


def _inspect_meta(files: Any, folder: str) -> tuple[_Meta | None, str | None]:
    try:
        return _read_meta(files, folder), None
    except _faults(files) as error:
        return None, str(error)


def _read_meta(files: Any, folder: str) -> _Meta:
    """ValueError when it is no meta.json of ours, FileNotFoundError when there is none."""
    meta: Any = json.loads(files.cat_file(f"{folder}/{META}"))
    version = meta.get("version") if isinstance(meta, dict) else None
    if version != VERSION:
        raise ValueError(f"{META} of version {version}, this code reads {VERSION}")
    return dict(meta)


def _model_settings(meta: _Meta) -> dict[str, Any]:
    """The settings of a saved model under their current names."""
    return {
        RENAMED_KEYS.get(f"model.{key}", key).removeprefix("model."): value
        for key, value in meta["model"].items()
    }


def _writer(files: Any, folder: str) -> FileSystemWriter:
    """One file a rank.

    Given the address alone torch takes the same, but would wait for the GPU every 10 MB (2.13,
    read).
    """
    if _is_local(files):
        return FileSystemWriter(folder, single_file_per_rank=True, sync_files=True)
    from torch.distributed.checkpoint._fsspec_filesystem import (
        FsspecWriter,  # private (2.13): it stages, and there is no other
    )

    return FsspecWriter(
        folder, single_file_per_rank=True, sync_files=False
    )  # a file without a number would sync(2) the machine


def _read(files: Any, folder: str, state: dict[str, Any], **options: Any) -> None:
    """Into the tensors of `state`. Of object storage each rank first copies the files it needs to
    the temporary folder.

    torch jumps about in them: through a window of 50 MB over S3, 63 MB in 60 tensors took 209 MB of
    reads.
    """
    source = folder if _is_local(files) else f"simplecache::{folder}"
    with _as_errors(folder):
        try:
            load(state, checkpoint_id=source, **options)
        finally:
            if source != folder:
                fsspec.core.url_to_fs(source)[
                    0
                ].clear_cache()  # fsspec makes one a thread: it is the one that `load` used


def _hashes(files: Any, folder: str, rank: int) -> dict[str, dict[str, Any]]:
    """Entries of the files that a rank has written, by DCP's names; read again, from the page cache
    if that is large enough.
    """
    ours = [
        name
        for name in _names(files, folder)
        if name.startswith(f"__{rank}_") or (name == ".metadata" and rank == 0)
    ]
    return {name: _entry(files, f"{folder}/{name}") for name in ours}


def _entry(files: Any, path: str, *, of_size: int | None = None) -> dict[str, Any]:
    """Size and sha256; without the latter, which costs a reading, if the size is not `of_size`."""
    size = files.size(path)
    if of_size not in (None, size):
        return {"bytes": size}
    with files.open(path, "rb") as stream:
        return {"bytes": size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _write_meta(files: Any, folder: str, meta: _Meta) -> None:
    """Atomically and durably: a store's PUT is both; on disks DCP has synced the files but not
    their names.
    """
    text = json.dumps(meta, indent=1)
    if not _is_local(files):
        files.pipe_file(f"{folder}/{META}", text.encode())
        return
    temporary = f"{folder}/{META}.tmp"
    with open(temporary, "w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    _sync(folder)
    os.replace(temporary, f"{folder}/{META}")
    _sync(folder)


def _sync(folder: str) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(files: Any, folder: str) -> None:
    """meta.json first: killed half-way, the rest is no checkpoint, and the next save removes it."""
    with suppress(FileNotFoundError):
        files.rm_file(f"{folder}/{META}")
    with suppress(OSError):
        files.rm(folder, recursive=True)
