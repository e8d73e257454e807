"""Weights in the names and files of transformers' LlamaForCausalLM, both ways."""

import json
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.config import ModelConfig


def to_hugging_face(
    state_dict: Mapping[str, Tensor],
    config: ModelConfig,
    *,
    max_positions: int = 2048,
    end_of_text: int | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights (whole tensors) under Llama's names, and the content of config.json.

    Only names differ: queries and keys are rotated by halves, as in transformers, so nothing is
    permuted. ValueError if names are missing or unknown.
    """
    names = _llama_names(config)
    _check_names(names.keys(), state_dict.keys())
    tensors = {theirs: state_dict[ours] for ours, theirs in names.items()}
    return tensors, {
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
        "eos_token_id": end_of_text,
        "torch_dtype": str(next(iter(tensors.values())).dtype).removeprefix("torch."),
    }


def from_hugging_face(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], ModelConfig]:
    """Our state dict and config from a Llama's.

    ValueError for settings that this model does not have, such as scaled RoPE and biases.
    """
    ours = _model_config(config)
    names = _llama_names(ours)
    expected = set(names.values())
    _check_names(expected, tensors.keys() - ({"lm_head.weight"} if ours.tie_embeddings else set()))
    return {name: tensors[theirs] for name, theirs in names.items()}, ours


def save_hugging_face(
    folder: Path,
    state_dict: Mapping[str, Tensor],
    config: ModelConfig,
    *,
    max_positions: int = 2048,
    end_of_text: int | None = None,
) -> None:
    """Write config.json and model.safetensors for transformers' `from_pretrained(folder)`."""
    from safetensors.torch import save_file

    tensors, settings = to_hugging_face(
        state_dict, config, max_positions=max_positions, end_of_text=end_of_text
    )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    (folder / "config.json").write_text(json.dumps(settings, indent=2))


_OUTSIDE = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}


_IN_BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


def _llama_names(config: ModelConfig) -> dict[str, str]:
    """Our parameter names → those of transformers' LlamaForCausalLM."""
    outside = {
        ours: theirs
        for ours, theirs in _OUTSIDE.items()
        if not (config.tie_embeddings and ours == "head")
    }
    blocks = {
        f"blocks.{n}.{ours}": f"model.layers.{n}.{theirs}"
        for n in range(config.num_layers)
        for ours, theirs in _IN_BLOCK.items()
    }
    return {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in (outside | blocks).items()}


def _check_names(expected: Set[str], actual: Set[str]) -> None:
    if expected != actual:
        missing, unknown = sorted(expected - actual), sorted(actual - expected)
        raise ValueError(
            f"weights do not fit the config: missing {missing[:3]}, unknown {unknown[:3]}"
        )


def _model_config(config: Mapping[str, Any]) -> ModelConfig:
    rope = config.get("rope_parameters") or {}  # transformers 5; earlier, rope_theta is outside
    scaling = config.get("rope_scaling") or (
        {} if rope.get("rope_type", "default") == "default" else rope
    )
    heads = config["num_attention_heads"]
    unsupported = {
        "model_type": config["model_type"] != "llama",
        "rope_scaling": bool(scaling) and scaling.get("rope_type", "default") != "default",
        "attention_bias": config.get("attention_bias", False),
        "mlp_bias": config.get("mlp_bias", False),
        "hidden_act": config["hidden_act"] != "silu",
        "head_dim": (config.get("head_dim") or config["hidden_size"] // heads) * heads
        != config["hidden_size"],
    }
    if keys := [key for key, is_set in unsupported.items() if is_set]:
        raise ValueError(f"config.json: this model does not support its {keys}")
    return ModelConfig(
        vocab_size=config["vocab_size"],
        dim=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        ffn_dim=config["intermediate_size"],
        rope_theta=config.get("rope_theta") or rope.get("rope_theta", 10_000.0),
        norm_eps=config["rms_norm_eps"],
        tie_embeddings=config.get("tie_word_embeddings", False),
    )
