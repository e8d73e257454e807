"""Start a training from a Hugging Face checkpoint: safetensors into a sharded model.

Only byte ranges are read, by way of fsspec: each rank reads its own rows of each tensor, from a
disk or an object store. Pickles (pytorch_model.bin) are never opened.

    8 bytes   length of the header, little-endian
    header    JSON: {name: {"dtype": "BF16", "shape": [4, 8], "data_offsets": [0, 64]}}
    data      the numbers of each tensor, row by row; offsets count from here
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from stages.storage.digests import bytes_sha256
from stages.storage.files import open_fs, read_bytes
from trainer.checkpoint_files import names_of, size_and_hash
from trainer.model.hugging_face import INDEX, WEIGHTS
from trainer.model.layouts import CONFIG, disagreements, hugging_face_name, read_config
from trainer.model.llama import Transformer, initial_values
from trainer.ranks import Ranks

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PADDED = {"embedding.weight", "head.weight"}  # may have more rows than the checkpoint's


class _Stored(NamedTuple):
    """A tensor of a safetensors file; `start` is the position of its first byte in the file."""

    uri: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


def load_pretrained(model: Transformer, *, seed: int, ranks: Ranks) -> dict[str, Any]:
    """Set the weights of `model` to those of `model.config.init`; a record for the checkpoints.

    Collective. Numbers of 16 bits become float32. Rows of the vocabulary that the checkpoint lacks
    are drawn as `init_weights` would. ValueError if the checkpoint is of another model, lacks a
    tensor, has another one, or is cut off. `seed` is the training's.
    """
    folder = model.config.init
    ranks.on_all(partial(_load_weights, model, folder, seed))
    positions = ranks.on_first(lambda: read_config(folder).get("max_position_embeddings"))
    return {"path": folder, "sha256": _digest(folder, ranks), "max_positions": positions}


def check_same_init(init: str, record: Mapping[str, Any] | None, *, ranks: Ranks) -> None:
    """ValueError if a training that resumes did not start from `init`. Collective.

    The weights are then those of its checkpoint. Only a folder of another name is read and hashed:
    it may be the same one, moved.
    """
    before = record["path"] if record else ""
    if init == before or (record and init and _digest(init, ranks) == record["sha256"]):
        return
    raise ValueError(
        f"model.init = '{init}', but this training started from '{before}'; "
        "restore it, or train into a new directory"
    )


# --- weights --------------------------------------------------------------------------------------


@torch.no_grad()
def _load_weights(model: Transformer, folder: str, seed: int) -> None:
    if different := disagreements(asdict(model.config), folder):
        raise ValueError(f"model: {folder} has {different}; leave these keys out of the config")
    stored = _stored_tensors(folder)
    _check_names(folder, model, stored)
    for name, parameter in model.named_parameters():
        tensor, layers = stored[hugging_face_name(name)], model.config.num_layers
        _check_shape(name, parameter, tensor)
        rows = _local_rows(parameter)
        first, end = (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (0, 0)
        values = _read_rows(tensor, first, min(end, tensor.shape[0]))
        if end > tensor.shape[0]:
            drawn = initial_values(name, parameter.shape, seed, layers)
            values = torch.cat([values.float(), drawn[max(first, tensor.shape[0]) : end]])
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        local.copy_(values)


def _local_rows(parameter: nn.Parameter) -> Tensor:
    """The numbers of the rows (of dimension 0) that this rank holds."""
    rows = torch.arange(parameter.shape[0], device=parameter.device)
    if not isinstance(parameter, DTensor):
        return rows
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(rows, mesh, placements, src_data_rank=None).to_local()


def _check_names(folder: str, model: Transformer, stored: Mapping[str, _Stored]) -> None:
    """ValueError unless the checkpoint has exactly the tensors of the model.

    Two kinds may be there, as transformers ignores them too: tables of the rotary embedding, and
    the head of a model whose head is the embedding.
    """
    expected = {hugging_face_name(name) for name, _ in model.named_parameters()}
    ignored = {name for name in stored if name.endswith("rotary_emb.inv_freq")}
    if model.config.tie_embeddings:
        ignored.add("lm_head.weight")
    missing, others = expected - stored.keys(), stored.keys() - expected - ignored
    if missing or others:
        raise ValueError(
            f"{folder}: tensors missing: {_listing(missing)}; tensors that the model of "
            f"{CONFIG} does not have: {_listing(others)}"
        )


def _check_shape(name: str, parameter: Tensor, tensor: _Stored) -> None:
    rows, *others = parameter.shape
    same_rows = tensor.shape[:1] == (rows,) or (name in _PADDED and tensor.shape[0] < rows)
    if not same_rows or tensor.shape[1:] != tuple(others):
        raise ValueError(
            f"{tensor.uri}: {hugging_face_name(name)} has the shape {list(tensor.shape)}, expected "
            f"{list(parameter.shape)}"
        )


def _listing(names: set[str]) -> str:
    first = sorted(names)[:5]
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return (", ".join(first) or "none") + more


# --- files ----------------------------------------------------------------------------------------


def _files(folder: str) -> list[str]:
    """The safetensors files of a checkpoint: the single one, or those of the index."""
    names = names_of(folder)
    if WEIGHTS in names:
        return [WEIGHTS]
    if INDEX not in names:
        raise ValueError(
            f"{folder}: has neither {WEIGHTS} nor {INDEX}; pickles are not read, save it with "
            "transformers' save_pretrained"
        )
    files = set(json.loads(read_bytes(f"{folder}/{INDEX}"))["weight_map"].values())
    if missing := files - names:
        raise ValueError(f"{folder}: {_listing(missing)} of {INDEX} missing; copy it completely")
    return sorted(files)


def _stored_tensors(folder: str) -> dict[str, _Stored]:
    return {
        name: tensor
        for file in _files(folder)
        for name, tensor in _read_header(f"{folder}/{file}").items()
    }


def _read_header(uri: str) -> dict[str, _Stored]:
    """The tensors of a file. ValueError if it is cut off, or has numbers of another kind."""
    fs, path = open_fs(uri)
    length = int.from_bytes(fs.cat_file(path, start=0, end=8), "little")
    data_start, size = 8 + length, fs.size(path)
    if data_start > size:
        raise ValueError(f"{uri}: is no safetensors file, or was cut off; copy it again")
    header = json.loads(fs.cat_file(path, start=8, end=data_start))
    header.pop("__metadata__", None)
    end = data_start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end != size:
        raise ValueError(f"{uri}: expected {end:,} bytes, found {size:,}; copy it again")
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise ValueError(
                f"{uri}: {name} is of {entry['dtype']}; only {', '.join(_DTYPES)} are read"
            )
    return {
        name: _Stored(
            uri,
            _DTYPES[entry["dtype"]],
            tuple(entry["shape"]),
            data_start + entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }


def _read_rows(tensor: _Stored, first: int, end: int) -> Tensor:
    """Rows [first, end) of a tensor; none if `end` does not exceed `first`."""
    shape = (max(0, end - first), *tensor.shape[1:])
    row_bytes = tensor.dtype.itemsize * torch.Size(tensor.shape[1:]).numel()
    if shape[0] == 0:
        return torch.empty(shape, dtype=tensor.dtype)
    fs, path = open_fs(tensor.uri)
    start = tensor.start + first * row_bytes
    data = fs.cat_file(path, start=start, end=start + shape[0] * row_bytes)
    return torch.frombuffer(bytearray(data), dtype=tensor.dtype).view(shape)


def _digest(folder: str, ranks: Ranks) -> str:
    """A sha256 over config.json and the files of weights, of which each rank hashes a share."""

    def hash_share() -> dict[str, Any]:
        names = sorted([CONFIG, *_files(folder)])[ranks.rank :: ranks.count]
        return {name: size_and_hash(f"{folder}/{name}") for name in names}

    shares = ranks.on_all(hash_share)
    hashes = {name: entry for share in shares for name, entry in share.items()}
    return bytes_sha256(json.dumps(hashes, sort_keys=True).encode())
