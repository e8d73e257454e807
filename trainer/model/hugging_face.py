"""Export the weights of a checkpoint in the names and files of transformers' LlamaForCausalLM."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from stages.storage.files import is_local, open_fs, scratch_folder
from trainer.checkpoint_files import inspect_files, locate, model_settings, read_state
from trainer.config import ModelConfig
from trainer.model.llama import Transformer

_OUTSIDE_BLOCKS = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_IN_BLOCK = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.query.weight": "self_attn.q_proj.weight",
    "attention.key.weight": "self_attn.k_proj.weight",
    "attention.value.weight": "self_attn.v_proj.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp.gate.weight": "mlp.gate_proj.weight",
    "mlp.up.weight": "mlp.up_proj.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
}


def export_hugging_face(folder: Path | str, output: Path | str) -> None:
    """Write the weights of a checkpoint, float32, for transformers (`save_hugging_face`).

    In this process alone, without a process group; holds the weights, not the optimizer's state.
    Both may be URLs, by way of the temporary folder. ValueError if the folder is not a checkpoint
    or is damaged.
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
    # the length of the rows that it was trained on
    max_positions = meta["extra"].get("supply", {}).get("seq_len") or 2048
    with scratch_folder("gristmill-export") as scratch:
        local = Path(target) if is_local(target) else scratch
        save_hugging_face(local, state["model"], config, max_positions=max_positions)
        if not is_local(target):
            fs, path = open_fs(target)
            fs.put(f"{scratch}/", f"{path}/", recursive=True)


def save_hugging_face(
    folder: Path, state_dict: Mapping[str, Tensor], config: ModelConfig, *, max_positions: int
) -> None:
    """Write config.json and model.safetensors for transformers' `from_pretrained(folder)`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {llama_name(name): tensor.contiguous() for name, tensor in state_dict.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.dim // config.num_heads,
        "max_position_embeddings": max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(settings, indent=2))


def llama_name(name: str) -> str:
    """The name of a parameter of ours in LlamaForCausalLM.

    Only names differ: queries and keys are rotated by halves there too, so nothing is permuted.
    """
    if not name.startswith("blocks."):
        return _OUTSIDE_BLOCKS[name]
    _, number, in_block = name.split(".", 2)
    return f"model.layers.{number}.{_IN_BLOCK[in_block]}"
