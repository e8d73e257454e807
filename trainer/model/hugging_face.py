"""Export a checkpoint in the names and files of transformers (`layouts`), with its tokenizer."""

import json
import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from stages.formats.tokenizer import Tokenizer
from stages.formats.tokenizer_export import save_hugging_face_tokenizer
from stages.storage.catalog import read_catalog
from stages.storage.files import is_local, open_fs, scratch_folder
from trainer.checkpoint_files import Meta, inspect_files, locate, model_settings, read_state
from trainer.config import ModelConfig
from trainer.data.generations import load_generation_tokenizer
from trainer.model.layouts import CONFIG, config_json, hugging_face_name
from trainer.model.llama import Transformer

_LOG, _NO_TOKENIZER = logging.getLogger(__name__), "exported without a tokenizer: %s"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def export_hugging_face(
    folder: Path | str,
    output: Path | str,
    *,
    dtype: str = "bfloat16",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a checkpoint for transformers' AutoModelForCausalLM: `save_hugging_face`.

    In this process alone, without a process group; holds the weights of one file at a time. Both
    may be URLs, by way of the temporary folder. The same checkpoint and options give the same
    bytes. ValueError if the folder is not a checkpoint or is damaged. The tokenizer is that of a
    generation that was trained on; where that is gone, a warning says why there is none.
    """
    target = locate(output)
    with _local_copy(locate(folder)) as source, scratch_folder("gristmill-export") as scratch:
        meta, fault = inspect_files(source, 0, 1)
        if meta is None or fault is not None:
            raise ValueError(f"{folder}: {fault}; export another checkpoint")
        _clear_export(target)
        local = Path(target) if is_local(target) else scratch
        save_hugging_face(
            local,
            ModelConfig(**model_settings(meta)),
            lambda tensors: _read_weights(source, tensors),
            dtype=dtype,
            shard_bytes=shard_bytes,
            max_positions=_max_positions(meta),
            tokenizer=_tokenizer(meta),
        )
        if not is_local(target):
            _upload(scratch, target)


def save_hugging_face(
    folder: Path,
    config: ModelConfig,
    read: Callable[[dict[str, Tensor]], None],
    *,
    dtype: str = "bfloat16",
    shard_bytes: int = SHARD_BYTES,
    max_positions: int,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Write configuration, tokenizer and weights, these in files of up to `shard_bytes`.

    `read` fills the tensors that it is given, by our names. config.json is written last: a folder
    that has it is complete.
    """
    special_tokens = {
        "bos_token_id": tokenizer.begin_of_text if tokenizer else None,
        "eos_token_id": tokenizer.end_of_text if tokenizer else None,
    }
    settings = config_json(
        config, dtype=dtype, max_positions=max_positions, special_tokens=special_tokens
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()
    if tokenizer:
        _save_tokenizer(tokenizer, folder)
    _write_weights(folder, config, read, DTYPES[dtype], shard_bytes)
    (folder / "generation_config.json").write_text(json.dumps(special_tokens, indent=2))
    (folder / CONFIG).write_bytes(settings)


# in the folder of an export: what is beside it may be removed by the next one
MARK = ".gristmill-export"


def _clear_export(target: str) -> None:
    """Remove an earlier export, config.json first; ValueError for a folder that holds anything
    else.
    """
    fs, path = open_fs(target)
    files = sorted(fs.find(path), key=lambda file: not file.endswith(f"/{CONFIG}"))
    if files and not any(file.endswith(f"/{MARK}") for file in files):
        raise ValueError(
            f"{target}: holds {len(files)} files and no earlier export; name another folder"
        )
    for file in files:
        fs.rm_file(file)


def _upload(folder: Path, target: str) -> None:
    """Copy the files of an export, config.json last."""
    fs, path = open_fs(target)
    for file in sorted(folder.iterdir(), key=lambda file: file.name == CONFIG):
        fs.put_file(str(file), f"{path}/{file.name}")


# --- weights --------------------------------------------------------------------------------------


def _write_weights(
    folder: Path,
    config: ModelConfig,
    read: Callable[[dict[str, Tensor]], None],
    dtype: torch.dtype,
    shard_bytes: int,
) -> None:
    """Write the files one after another, so that memory holds one at a time.

    torch's HuggingFaceStorageWriter (2.13) would need all weights in memory.
    """
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Transformer(config).named_parameters()}
    sizes = {name: shape.numel() * dtype.itemsize for name, shape in shapes.items()}
    shards, weight_map = _split_names(sizes, shard_bytes), dict[str, str]()
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else WEIGHTS
        tensors = {name: torch.empty(shapes[name], dtype=dtype) for name in names}
        read(tensors)
        stored = {hugging_face_name(name): tensor for name, tensor in tensors.items()}
        save_file(stored, folder / file, {"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors (0.8) lets only the owner read it
        weight_map |= dict.fromkeys(stored, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2))


def _split_names(sizes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    """Names in files of up to `shard_bytes`, in order; a larger tensor has a file of its own."""
    shards, room = list[list[str]](), 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    return shards


def _read_weights(folder: str, tensors: dict[str, Tensor]) -> None:
    """Read weights of a local checkpoint, rounded to the kind of the tensors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as intended
        read_state(folder, {"model": tensors}, no_dist=True)


@contextmanager
def _local_copy(folder: str) -> Iterator[str]:
    """The checkpoint's folder itself, or a copy of one on an object store."""
    if is_local(folder):
        yield folder
        return
    with scratch_folder("gristmill-checkpoint") as scratch:
        fs, path = open_fs(folder)
        fs.get(f"{path}/", f"{scratch}/", recursive=True)
        yield str(scratch)


# --- what the training knows ----------------------------------------------------------------------


def _max_positions(meta: Meta) -> int:
    """The length of the rows of the training, or what the model was made for before, if longer."""
    extra: Mapping[str, Any] = meta["extra"]
    lengths: Sequence[int | None] = (
        (extra.get("supply") or {}).get("seq_len"),
        (extra.get("init") or {}).get("max_positions"),
    )
    return max(filter(None, lengths), default=2048)


def _tokenizer(meta: Meta) -> Tokenizer | None:
    """The tokenizer of the rows that were trained on; None, with a warning, if it is gone."""
    digest = (meta["extra"].get("supply") or {}).get("tokenizer_sha256")
    sources = (meta["extra"].get("totals") or {}).get("sources") or {}
    reason = "the checkpoint names no generation"
    for run, source in sources.items():
        try:
            return _load_tokenizer(run, source["rows"], digest)
        except (OSError, ValueError) as error:
            reason = str(error)
    _LOG.warning(_NO_TOKENIZER, reason)
    return None


def _load_tokenizer(run: str, names: Collection[str], digest: str | None) -> Tokenizer:
    """The tokenizer of the first of these generations that the run still has.

    A `digest` of None, in checkpoints of earlier versions, is any.
    """
    entry = next((entry for entry in read_catalog(run) if entry["name"] in names), None)
    if entry is None:
        raise ValueError(f"{run}: has none of the generations {', '.join(names)}")
    tokenizer = load_generation_tokenizer(run, entry)
    if digest not in (None, tokenizer.digest):
        raise ValueError(f"{run}: {entry['name']} has another tokenizer than the checkpoint")
    return tokenizer


def _save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    try:
        save_hugging_face_tokenizer(tokenizer, folder)
    except ValueError as error:  # it cannot be had there; the weights can
        _LOG.warning(_NO_TOKENIZER, error)
