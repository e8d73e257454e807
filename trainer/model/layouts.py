"""Hugging Face's names for our models: config.json and parameters of Llama, Qwen2 and Qwen3.

Llama 2 and 3 (3.1 scales its rotary embedding), Qwen2 and 2.5 (biases of queries, keys and values)
and Qwen3 (norms of queries and keys) are one decoder with different settings. The names are those
of transformers 4.57 and 5. Needs no torch: the configuration loader reads config.json with it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from stages.storage.files import read_bytes
from trainer.config import ModelConfig

CONFIG = "config.json"
# settings that a training from a checkpoint may choose itself; `vocab_size` only a larger one
_FREE = {"attention", "init", "vocab_size"}
_NAMES = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "ffn_dim": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
# what transformers takes for a key that is not there
_DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 10_000.0}
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# settings of theirs that our model has only one value of
_REQUIRED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "use_sliding_window": False,
}
_ROPE_NAMES = {
    "rope_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_original_positions": "original_max_position_embeddings",
}

_OUTSIDE_BLOCKS = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_IN_BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


def hugging_face_name(name: str) -> str:
    """The name of a parameter of ours in LlamaForCausalLM, Qwen2ForCausalLM or Qwen3ForCausalLM.

    Only names differ: queries and keys are rotated by halves there too, so nothing is permuted.
    """
    if not name.startswith("blocks."):
        return _OUTSIDE_BLOCKS[name]
    _, number, in_block = name.split(".", 2)
    module, _, kind = in_block.rpartition(".")
    return f"model.layers.{number}.{_IN_BLOCK[module]}.{kind}"


# --- from a checkpoint of theirs ------------------------------------------------------------------


def read_config(folder: str) -> dict[str, Any]:
    """config.json of a folder or URL. ValueError if there is none, or it is not a JSON object."""
    try:
        values = json.loads(read_bytes(f"{folder}/{CONFIG}"))
    except FileNotFoundError:
        raise ValueError(
            f"{folder}: holds no {CONFIG}; name the folder of a Hugging Face checkpoint"
        ) from None
    if not isinstance(values, dict):
        raise ValueError(f"{folder}/{CONFIG}: expected a JSON object, found {type(values)}")
    return values


def model_settings(folder: str) -> dict[str, Any]:
    """The settings of [model] that a checkpoint's config.json determines.

    ValueError names the key of a model that ours is not.
    """
    values = read_config(folder)
    kind, rope = values.get("model_type"), _rope_values(values)
    if kind not in _ARCHITECTURES:
        _refuse(folder, "model_type", kind, " or ".join(_ARCHITECTURES))
    for key, required in _REQUIRED.items():
        if (value := values.get(key, required)) not in (required, None):
            _refuse(folder, key, value, required)
    for layer_type in values.get("layer_types") or ():
        if layer_type != "full_attention":
            _refuse(folder, "layer_types", layer_type, "full_attention")
    values = {**_DEFAULTS, **values}
    if kind == "llama" and values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = values.get("num_attention_heads")
    if missing := [key for key in _NAMES.values() if values.get(key) is None]:
        raise ValueError(f"{folder}/{CONFIG}: {', '.join(missing)} missing; add the model's")
    settings = {ours: values[theirs] for ours, theirs in _NAMES.items()}
    size = values.get("head_dim") or (128 if kind == "qwen3" else 0)
    return settings | {
        "norm_eps": float(settings["norm_eps"]),
        "head_dim": 0 if size * settings["num_heads"] == settings["dim"] else size,
        "qkv_bias": kind == "qwen2",
        "qk_norm": kind == "qwen3",
        "rope_theta": float(rope.get("rope_theta") or values["rope_theta"]),
        **_rope_settings(folder, rope),
    }


def disagreements(given: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """The settings of [model] that are `given` and that a checkpoint has otherwise, as it has them.

    A larger vocabulary is none: it adds rows to the embedding and the head.
    """
    theirs = model_settings(folder)
    different = {
        key: value
        for key, value in theirs.items()
        if key in given and key not in _FREE and given[key] != value
    }
    vocab_size = given.get("vocab_size", theirs["vocab_size"])
    if isinstance(vocab_size, int) and vocab_size < theirs["vocab_size"]:
        different["vocab_size"] = theirs["vocab_size"]
    return different


def _rope_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the rotary embedding: `rope_parameters` in transformers 5."""
    return dict(values.get("rope_parameters") or values.get("rope_scaling") or {})


def _rope_settings(folder: str, rope: Mapping[str, Any]) -> dict[str, Any]:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {}
    if kind != "llama3":
        _refuse(folder, "rope_scaling.rope_type", kind, "llama3")
    if missing := [name for name in _ROPE_NAMES.values() if name not in rope]:
        raise ValueError(f"{folder}/{CONFIG}: rope_scaling lacks {', '.join(missing)}")
    settings = {ours: float(rope[theirs]) for ours, theirs in _ROPE_NAMES.items()}
    return settings | {"rope_original_positions": int(settings["rope_original_positions"])}


def _refuse(folder: str, key: str, value: Any, expected: Any) -> None:
    raise ValueError(
        f"{folder}/{CONFIG}: {key} = {value!r} is not supported, only {expected}; "
        "start from a checkpoint of Llama 2 or 3, Qwen2 or Qwen3"
    )


# --- to a checkpoint of theirs --------------------------------------------------------------------


def architecture(config: ModelConfig) -> str:
    """The `model_type` that has a model's settings. ValueError if none has."""
    if config.qkv_bias and config.qk_norm:
        raise ValueError(
            "no architecture of transformers has both qkv_bias and qk_norm; "
            "only a model with one of them can be exported"
        )
    return "qwen2" if config.qkv_bias else "qwen3" if config.qk_norm else "llama"


def config_json(
    config: ModelConfig,
    *,
    dtype: str,
    max_positions: int,
    special_tokens: Mapping[str, int | None],
) -> bytes:
    """config.json of a model; `special_tokens` has bos_token_id and eos_token_id."""
    kind, settings = architecture(config), asdict(config)
    rope = None
    if config.rope_factor > 1:
        rope = {theirs: settings[ours] for ours, theirs in _ROPE_NAMES.items()}
        rope["rope_type"] = "llama3"
    values = {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        **{theirs: settings[ours] for ours, theirs in _NAMES.items()},
        "head_dim": config.head_size,
        "max_position_embeddings": max_positions,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        **special_tokens,
        "torch_dtype": dtype,
        # whose layout this is; without one, 4.57.6 warns that any tokenizer here is Mistral's
        "transformers_version": "4.57.1",
    }
    return json.dumps(values, indent=2).encode()
