"""Export the weights of a checkpoint for transformers."""

import warnings
from pathlib import Path

import torch

from stages.storage.files import is_local, open_fs, scratch_folder
from trainer.checkpoint_files import inspect_files, locate, model_settings, read_state
from trainer.config import ModelConfig
from trainer.model.hugging_face import save_hugging_face
from trainer.model.llama import Transformer


def export_hugging_face(
    folder: Path | str,
    output: Path | str,
    *,
    max_positions: int | None = None,
    end_of_text: int | None = None,
) -> None:
    """Write the weights of a checkpoint, float32, for transformers (`save_hugging_face`).

    In this process alone, without a process group; holds the weights, not the optimizer's state.
    Both may be URLs, by way of the temporary folder. `max_positions` is by default the length of
    the rows that it was trained on. ValueError if the folder is not a checkpoint or is damaged.
    """
    folder, target = locate(folder), locate(output)
    meta, fault = inspect_files(folder, 0, 1)
    if meta is None or fault is not None:
        raise ValueError(f"{folder}: {fault}; export another checkpoint")
    config = ModelConfig(**model_settings(meta))
    with torch.device("meta"):
        model = Transformer(config)
    state = {"model": model.to_empty(device="cpu").state_dict()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as intended
        read_state(folder, state, no_dist=True)
    max_positions = max_positions or meta["extra"].get("supply", {}).get("seq_len") or 2048
    with scratch_folder("gristmill-export") as scratch:
        save_hugging_face(
            Path(target) if is_local(target) else scratch,
            state["model"],
            config,
            max_positions=max_positions,
            end_of_text=end_of_text,
        )
        if not is_local(target):
            fs, path = open_fs(target)
            fs.put(f"{scratch}/", f"{path}/", recursive=True)
