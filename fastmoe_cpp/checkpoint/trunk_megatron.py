"""Megatron-Core's GPTModel beside its MoE layers: Mixtral, DeepSeek version 1, Qwen2-MoE and Qwen3-MoE, and back.

Megatron keeps query, key and value as one tensor in which every group of heads has its queries, its key and its value
under one another; gate and up of a dense MLP as one; and the norm before a projection inside that projection where
Transformer Engine runs it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..config import MoEConfig
from . import families
from .errors import ConfigError, LayoutError, MissingTensorError, ShapeError
from .rows import Tensor, View, stack

# heads, key and value heads, head size where config.json has none; epsilon and base of the rotation
_DEFAULTS: dict[str, tuple[int, int, int | None, float, float]] = {
    "mixtral": (32, 8, None, 1e-5, 1e6),
    "deepseek": (32, 32, None, 1e-6, 1e4),
    "qwen2_moe": (16, 16, None, 1e-6, 1e4),
    "qwen3_moe": (32, 4, 128, 1e-6, 1e4),
}
_TOP = {
    "model.embed_tokens.weight": "embedding.word_embeddings.weight",
    "model.norm.weight": "decoder.final_layernorm.weight",
    "lm_head.weight": "output_layer.weight",
}
_LAYER = {
    "self_attn.o_proj.weight": "self_attention.linear_proj.weight",
    "self_attn.q_norm.weight": "self_attention.q_layernorm.weight",
    "self_attn.k_norm.weight": "self_attention.k_layernorm.weight",
    "mlp.down_proj.weight": "mlp.linear_fc2.weight",
}
_BACK_TOP = {new: old for old, new in _TOP.items()}
_BACK_LAYER = {new: old for old, new in _LAYER.items()} | {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
}


def supported(config: Mapping[str, Any] | None) -> bool:
    """Whether Megatron's GPTModel has this family's attention."""
    return config is not None and config.get("model_type") in _DEFAULTS


def heads(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Query heads, key and value heads, features of a head."""
    heads, groups, size, _, _ = _DEFAULTS[config["model_type"]]
    heads = config.get("num_attention_heads") or heads
    groups = config.get("num_key_value_heads", heads if config["model_type"] == "deepseek" else groups) or heads
    for name, value in (("num_attention_heads", heads), ("num_key_value_heads", groups)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"config.json: {name} must be an integer of at least 1, got {value!r:.60}")
    size = config.get("head_dim") or size or families.fields_of(config)["hidden_size"] // heads
    if isinstance(size, bool) or not isinstance(size, int) or size < 1 or heads % groups:
        raise ConfigError(
            f"config.json: num_key_value_heads = {groups} must divide num_attention_heads = {heads}, and head_dim be "
            f"an integer of at least 1, got {size!r:.60}"
        )
    return heads, groups, size


def arguments(config: Mapping[str, Any] | None, moe: MoEConfig, names: list[str]) -> dict[str, Any]:
    """'config': fields of TransformerConfig beside those of the MoE layers; 'model': arguments of GPTModel."""
    if not supported(config):
        return {}
    assert config is not None
    fields = families.fields_of(config)
    query, groups, size = heads(config)
    _, _, _, epsilon, base = _DEFAULTS[config["model_type"]]
    rope = config.get("rope_parameters") or {}
    theta = rope.get("rope_theta") if isinstance(rope, Mapping) else None
    theta = theta or config.get("rope_theta", base)
    sparse = families.sparse_layers(config)
    return {
        "config": {
            "num_layers": fields["num_hidden_layers"],
            "hidden_size": fields["hidden_size"],
            "ffn_hidden_size": config.get("intermediate_size", moe.intermediate_size),
            "num_attention_heads": query,
            "num_query_groups": groups,
            "kv_channels": size,
            "normalization": "RMSNorm",
            "layernorm_epsilon": config.get("rms_norm_eps", epsilon),
            "add_qkv_bias": any(name.endswith(("self_attn.q_proj.bias", "linear_qkv.bias")) for name in names),
            "qk_layernorm": config["model_type"] == "qwen3_moe",
            "moe_layer_freq": [int(layer in sparse) for layer in range(fields["num_hidden_layers"])],
        },
        "model": {
            "vocab_size": config.get("vocab_size"),
            "max_sequence_length": config.get("max_position_embeddings"),
            "position_embedding_type": "rope",
            "rotary_base": theta,
            "share_embeddings_and_output_weights": bool(config.get("tie_word_embeddings")),
        },
    }  # fmt: skip


def notes(config: Mapping[str, Any]) -> list[str]:
    """What of the attention has no weight and is not among the arguments."""
    found = []
    window = config.get("sliding_window")
    if window is not None and config.get("use_sliding_window", config["model_type"] == "mixtral"):
        found.append(f"sliding_window = {window}: Megatron's window_size has to say so")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, Mapping) else rope
    if kind != "default":
        found.append(f"rope_type = {kind!r}: Megatron's rotary embedding has to be told")
    return found


def is_megatron(view: View) -> bool:
    """Whether these are Megatron's names."""
    return any(name in _BACK_TOP or name.startswith("decoder.layers.") for name in view)


def from_hf(view: View, config: Mapping[str, Any], transformer_engine: bool) -> View:
    """transformers' tensors as Megatron's; LayoutError where one has no place."""
    query, groups, size = heads(config)
    found: View = {}
    for name, tensor in view.items():
        match = re.fullmatch(r"model\.layers\.([0-9]+)\.(.+)", name)
        if name in _TOP:
            found[_TOP[name]] = tensor
            continue
        if match is None:
            raise _no_place(name)
        layer, below = f"decoder.layers.{match[1]}.", match[2]
        root = f"model.layers.{match[1]}."
        dense = root + "mlp.gate_proj.weight" in view
        if below in _LAYER:
            found[layer + _LAYER[below]] = tensor
        elif below == "input_layernorm.weight":
            inside = "self_attention.linear_qkv.layer_norm_weight"
            found[layer + (inside if transformer_engine else below)] = tensor
        elif below == "post_attention_layernorm.weight":
            inside = transformer_engine and dense
            found[layer + ("mlp.linear_fc1.layer_norm_weight" if inside else "pre_mlp_layernorm.weight")] = tensor
        elif qkv := re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)", below):
            if qkv[1] == "q":
                three = [_take(view, f"{root}self_attn.{p}_proj.{qkv[2]}") for p in "qkv"]
                for part, rows in zip(three, (query, groups, groups), strict=True):
                    _check_rows(part, rows * size)
                a_group = query // groups * size
                target = f"{layer}self_attention.linear_qkv.{qkv[2]}"
                found[target] = stack(target, [
                    piece for g in range(groups) for piece in (
                        three[0].cut(g * a_group, (g + 1) * a_group),
                        three[1].cut(g * size, (g + 1) * size),
                        three[2].cut(g * size, (g + 1) * size),
                    )
                ])  # fmt: skip
            else:
                _take(view, f"{root}self_attn.q_proj.{qkv[2]}")
        elif below == "mlp.gate_proj.weight":
            target = layer + "mlp.linear_fc1.weight"
            found[target] = stack(target, [tensor, _take(view, root + "mlp.up_proj.weight")])
        elif below == "mlp.up_proj.weight":
            _take(view, root + "mlp.gate_proj.weight")
        else:
            raise _no_place(name)
    return found


def to_hf(view: View, config: Mapping[str, Any]) -> View:
    """Megatron's tensors as transformers'; names that are not Megatron's stay."""
    query, groups, size = heads(config)
    found: View = {}
    for name, tensor in view.items():
        match = re.fullmatch(r"decoder\.layers\.([0-9]+)\.(.+)", name)
        if name in _BACK_TOP:
            found[_BACK_TOP[name]] = tensor
            continue
        root, below = (f"model.layers.{match[1]}.", match[2]) if match else ("", "")
        if below in _BACK_LAYER:
            found[root + _BACK_LAYER[below]] = tensor
        elif qkv := re.fullmatch(r"self_attention\.linear_qkv\.(weight|bias)", below):
            _check_rows(tensor, (query + 2 * groups) * size)
            a_group = query // groups * size
            stride = a_group + 2 * size
            for part, begin, end in (("q", 0, a_group), ("k", a_group, a_group + size), ("v", a_group + size, stride)):
                target = f"{root}self_attn.{part}_proj.{qkv[1]}"
                found[target] = stack(target, [tensor.cut(g * stride + begin, g * stride + end) for g in range(groups)])
        elif below == "mlp.linear_fc1.weight":
            half = tensor.shape[0] // 2
            found[root + "mlp.gate_proj.weight"] = tensor.cut(0, half)
            found[root + "mlp.up_proj.weight"] = tensor.cut(half, 2 * half)
        else:
            found[name] = tensor
    return found


def _take(view: View, name: str) -> Tensor:
    if name not in view:
        raise MissingTensorError(f"{name} is missing, and its neighbours are there", tensor=name)
    return view[name]


def _check_rows(tensor: Tensor, rows: int) -> None:
    if not tensor.shape or tensor.shape[0] != rows:
        name = tensor.rows[0][0] if tensor.rows else "a projection of the attention"
        raise ShapeError(
            f"{name} must have {rows} rows by config.json's heads, its shape is {list(tensor.shape)}",
            tensor=name, expected=rows, found=tensor.shape,
        )  # fmt: skip


def _no_place(name: str) -> LayoutError:
    return LayoutError(
        f"{name} has no place in Megatron's GPTModel: only the MoE layers can be written (--moe-only)", tensor=name
    )
