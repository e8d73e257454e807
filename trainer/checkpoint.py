"""Checkpoints by torch.distributed.checkpoint: written during training, for any number of ranks.

`trainer.checkpoint_files` describes the files. A checkpoint exists once its meta.json does.
"""

import base64
import json
import logging
import math
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.optim import Optimizer

from trainer.checkpoint_files import (
    VERSION,
    CheckpointError,
    Meta,
    as_errors,
    committed_names,
    hash_files,
    inspect_files,
    inspect_meta,
    locate,
    model_settings,
    names_of,
    new_folder,
    read_meta,
    read_state,
    remove_checkpoint,
    write_meta,
    writer_of,
)
from trainer.checkpoint_process import ProcessWriter
from trainer.config import CheckpointConfig, ModelConfig
from trainer.model.llama import Transformer
from trainer.ranks import Ranks, gather_objects

# settings that may change between save and load: the kernel; `init` is for `check_same_init`
_FREE = {"attention", "init"}
_LOG = logging.getLogger(__name__)


class Saved(NamedTuple):
    """A checkpoint whose files are whole: steps trained, the model's settings, and the `extra` that
    it was saved with.
    """

    step: int
    folder: str  # absolute path or URL
    model: dict[str, Any]
    extra: dict[str, Any]
    metric: float | None


class Checkpoints:
    """The checkpoints of a run, in a local folder or at a URL.

    All ranks make one and call its methods in the same order.

    At most one save is in flight. A process of its own writes; a thread tells it what, hashes,
    makes meta.json and removes old checkpoints. The thread exchanges data over a gloo group of its
    own: in the training's group it would meet the training's collectives in another order on each
    rank.

    ValueError for a URL of an unknown kind, with * ? [ in it, or made a Path; ImportError, which
    says what to install, where fsspec lacks the client.
    """

    def __init__(self, folder: Path | str, config: CheckpointConfig) -> None:
        self._folder, self._config = locate(folder), config
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        gather = partial(gather_objects, group=self._group)
        self._ranks = Ranks(gather=gather, own=(CheckpointError,), other=CheckpointError)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writer = ProcessWriter()
        self._pending: Future[None] | None = None
        self._damaged: set[str] = set()  # names from `latest`; removed once there is a newer one

    def save(
        self,
        step: int,
        model: Transformer,
        optimizer: Optimizer,
        extra: dict[str, Any],
        *,
        metric: float | None = None,
    ) -> None:
        """Save the state after `step` steps.

        Waits for the save before; CheckpointError if that failed.

        Asynchronous: returns when the state is copied to host memory, which stays allocated for the
        next save, and the caller may train on; the checkpoint exists once its meta.json does. What
        was written is read again for its sha256: from object storage that downloads each rank's own
        file. `extra` is for JSON (finite numbers; else ValueError), and rank 0's is saved.
        `metric`, lower is better, picks the best; None and NaN are never among them.
        """
        self.finish()
        meta = _describe(step, model, optimizer, extra, metric)
        folder = f"{self._folder}/{self._ranks.on_first(partial(new_folder, self._folder, step))}"
        state = _state(model, optimizer)
        if not self._config.asynchronous:
            with as_errors(folder):
                save(state, storage_writer=writer_of(folder), process_group=self._group)
            self._commit(folder, meta)
            return
        written = async_save(
            state,
            storage_writer=self._writer.writer(folder),
            process_group=self._group,
            async_stager=self._writer,
        )
        assert isinstance(written, Future)
        self._pending = self._thread.submit(self._commit, folder, meta, written)

    def finish(self) -> None:
        """Wait for the save in flight, if any.

        CheckpointError on all ranks if it failed; earlier checkpoints remain.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """End the process that writes; after a save in flight, it ends with this process."""
        if self._pending is None or self._pending.done():
            self._writer.close()

    def latest(self) -> Saved | None:
        """The newest checkpoint whose files all have their size and sha256, the same on all ranks.

        None if there is no checkpoint.

        Each rank hashes a share of the files: from object storage all of the checkpoint is
        downloaded once, and by `load` each rank's files again. A damaged one is skipped with a
        warning, and removed by the next save. CheckpointError if all are damaged, because a person
        must decide whether to start from the beginning; if the bucket is absent; if the store does
        not answer, which says nothing about a checkpoint.
        """
        self.finish()
        faults: list[str] = []
        for name in self._ranks.on_first(partial(committed_names, self._folder)):
            saved, fault = self._inspect(f"{self._folder}/{name}")
            if saved is not None:
                return saved
            faults.append(f"{self._folder}/{name}: {fault}")
            self._damaged.add(name)
            if self._ranks.leads:
                _LOG.warning("checkpoint skipped: %s", faults[-1])
        if faults:
            raise CheckpointError(
                "no checkpoint can be used; restore one, or move them away to start over: "
                + "; ".join(faults)
            )
        return None

    def open(self, folder: str) -> Saved:
        """A checkpoint of this or another run, after hashing its files. Collective.

        CheckpointError if it is damaged.
        """
        saved, fault = self._inspect(folder)
        if saved is None:
            raise CheckpointError(f"{folder}: {fault}")
        return saved

    def _inspect(self, folder: str) -> tuple[Saved | None, str | None]:
        """A checkpoint, or what is wrong with it; each rank hashes a share of its files."""
        inspect = partial(inspect_files, folder, self._ranks.rank, self._ranks.count)
        results = self._ranks.on_all(inspect)
        meta = results[0][0]
        fault = next((fault for _, fault in results if fault is not None), None)
        if meta is None or fault is not None:
            return None, fault
        return Saved(
            meta["step"], folder, model_settings(meta), meta["extra"], meta["metric"]
        ), None

    def load(self, saved: Saved, model: Transformer, optimizer: Optimizer) -> None:
        """Load weights, optimizer state and CPU random state, on any number of ranks.

        Learning rate, betas and weight decay remain those of `optimizer`, the config's. ValueError,
        before anything is changed, for a model of another config or another kind of optimizer.
        CheckpointError if reading fails: the model is then undefined.
        """
        self.finish()
        meta = self._ranks.on_first(partial(read_meta, saved.folder))
        _check_fits(saved.folder, meta, model, optimizer)
        # with gradients present, torch would not make the optimizer state that is to be filled
        optimizer.zero_grad(set_to_none=True)
        optimizer.state.clear()
        if meta["moments"]:
            weights, moments = get_state_dict(model, optimizer)
            state = {"model": weights, "optimizer": moments["state"]}
            read_state(saved.folder, state, process_group=self._group)
            set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
        else:
            weights = get_model_state_dict(model)
            read_state(saved.folder, {"model": weights}, process_group=self._group)
            set_model_state_dict(model, weights)
        torch.set_rng_state(
            torch.frombuffer(bytearray(base64.b64decode(meta["rng"])), dtype=torch.uint8)
        )

    # --- in the thread, when asynchronous ---------------------------------------------------------

    def _commit(self, folder: str, meta: Meta, written: "Future[Any] | None" = None) -> None:
        """When all ranks have stored their data: hash it, write meta.json, prune old ones."""
        if written is not None:
            with as_errors(folder):
                written.result()
        parts = self._ranks.on_all(partial(hash_files, folder, self._ranks.rank))
        meta["files"] = {name: entry for part in parts for name, entry in part.items()}
        self._ranks.on_first(partial(self._publish, folder, meta))

    def _publish(self, folder: str, meta: Meta) -> None:
        unknown = names_of(folder) ^ meta["files"].keys()
        if unknown:
            raise CheckpointError(
                f"{folder}: {sorted(unknown)} on one side only: every rank must see the same folder"
            )
        write_meta(folder, meta)
        self._prune()

    def _prune(self) -> None:
        """Remove the checkpoints that are neither among the last nor among the best.

        One with an unreadable meta.json stays.
        """
        names = [n for n in reversed(committed_names(self._folder)) if n not in self._damaged]
        inspected = ((name, inspect_meta(f"{self._folder}/{name}")[0]) for name in names)
        metas = {name: meta for name, meta in inspected if meta is not None}
        # oldest first; a step that was saved again counts once
        newest = list({meta["step"]: name for name, meta in metas.items()}.values())
        last = newest[-self._config.keep_last :]
        ranked = [name for name in reversed(newest) if metas[name]["metric"] is not None]
        best = sorted(ranked, key=lambda name: metas[name]["metric"])  # of equals the newest first
        for name in {*metas, *self._damaged} - {*last, *best[: self._config.keep_best]}:
            remove_checkpoint(f"{self._folder}/{name}")
        self._damaged.clear()


# --- state ----------------------------------------------------------------------------------------


def _describe(
    step: int, model: Transformer, optimizer: Optimizer, extra: dict[str, Any], metric: float | None
) -> Meta:
    """meta.json without `files`: a copy, which later changes by the caller do not reach."""
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
    copied: Meta = json.loads(json.dumps(meta, allow_nan=False))
    return copied


def _state(model: Transformer, optimizer: Optimizer) -> dict[str, Any]:
    """The state for DCP to write, without the optimizer's hyperparameters.

    The optimizer's state is left out as long as there is none.

    torch would make one with a step of zero gradients, which counts in the bias correction: the run
    would no longer be the same.
    """
    if not optimizer.state:
        return {"model": get_model_state_dict(model)}
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments["state"]}


def _check_fits(folder: str, meta: Meta, model: Transformer, optimizer: Optimizer) -> None:
    ours, theirs = asdict(model.config), asdict(ModelConfig(**model_settings(meta)))
    other = [
        f"{key}={value} where the config has {ours[key]}"
        for key, value in theirs.items()
        if key not in _FREE and value != ours[key]
    ]
    if other:
        raise ValueError(
            f"{folder}: saved of another model: {', '.join(other)}; "
            "restore them, or train into a new directory"
        )
    if meta["optimizer"] != type(optimizer).__name__:
        raise ValueError(
            f"{folder}: saved with {meta['optimizer']}, "
            f"the config has {type(optimizer).__name__}; restore it"
        )
