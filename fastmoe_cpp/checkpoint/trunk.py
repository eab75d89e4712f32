"""The names of everything beside the MoE layers, between transformers and the hosts that have the same model.

TorchTitan has Qwen3 and DeepSeek-V3 with the tensors of transformers under other names, Megatron-Core (trunk_megatron)
Mixtral, DeepSeek version 1, Qwen2-MoE and Qwen3-MoE with some of them joined. Other pairs keep their names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from . import trunk_megatron
from .errors import LayoutError
from .files import TensorInfo
from .layouts import Layout
from .layouts.megatron_core import MegatronGrouped
from .layouts.torchtitan import TorchTitan, TorchTitan03
from .rows import View, whole

_LAYER = {
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.o_proj.weight": "attention.wo.weight",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
}
_QWEN3 = {
    "self_attn.q_proj.weight": "attention.wq.weight",
    "self_attn.k_proj.weight": "attention.wk.weight",
    "self_attn.v_proj.weight": "attention.wv.weight",
    "self_attn.q_norm.weight": "attention.q_norm.weight",
    "self_attn.k_norm.weight": "attention.k_norm.weight",
}
_DEEPSEEK_V3 = {
    "self_attn.q_proj.weight": "attention.wq.weight",
    "self_attn.q_a_proj.weight": "attention.wq_a.weight",
    "self_attn.q_a_layernorm.weight": "attention.q_norm.weight",
    "self_attn.q_b_proj.weight": "attention.wq_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attention.wkv_a.weight",
    "self_attn.kv_a_layernorm.weight": "attention.kv_norm.weight",
    "self_attn.kv_b_proj.weight": "attention.wkv_b.weight",
}
_TOP = {"model.embed_tokens.weight": "tok_embeddings.weight", "model.norm.weight": "norm.weight"}
#: Computed from the configuration, and in no host's files today.
_DERIVED = ("rotary_emb.inv_freq",)


def _maps(layout: Layout, family: str | None) -> tuple[dict[str, str], dict[str, str]] | None:
    """transformers' names to the layout's: of the whole model, and below a layer's prefix."""
    if not isinstance(layout, TorchTitan) or family not in ("qwen3_moe", "deepseek_v3"):
        return None
    later = isinstance(layout, TorchTitan03)
    own = dict(_QWEN3 if family == "qwen3_moe" else _DEEPSEEK_V3)
    if later and family == "qwen3_moe":
        own |= {f"self_attn.{n}_proj.weight": f"attention.qkv_linear.w{n}.weight" for n in "qkv"}
    return _TOP | {"lm_head.weight": "lm_head.weight" if later else "output.weight"}, _LAYER | own


def is_megatron(layout: Layout) -> bool:
    """Whether the layout is one of Megatron-Core's."""
    return isinstance(layout, MegatronGrouped)


def plan(
    infos: Mapping[str, TensorInfo], source: Layout, target: Layout, hf_config: Mapping[str, Any] | None
) -> tuple[View, list[str]]:
    """The target's tensors beside the MoE layers, as rows of the source's, and notes for people.

    LayoutError where a tensor has no place in the target's model.
    """
    family = hf_config.get("model_type") if hf_config else None
    notes: list[str] = []
    unwanted = _DERIVED + (("_extra_state",) if is_megatron(source) else ())
    view = {name: tensor for name, tensor in whole(infos).items() if not name.endswith(unwanted)}
    if left := len(infos) - len(view):
        notes.append(f"{left} tensors without weights (rotary frequencies, _extra_state) were left out")
    before = set(view)
    view = _to_hugging_face(view, source, hf_config)
    if target.family is not None:
        for name in view:
            if not name.startswith(("model.", "lm_head.")):
                raise LayoutError(
                    f"{name} has no place in a {target.family} model: only the MoE layers can be written (--moe-only)",
                    tensor=name,
                )  # fmt: skip
        return view, notes
    forward = _maps(target, family)
    hugging_face = bool(view) and all(name.startswith(("model.", "lm_head.")) for name in view)
    if hugging_face and is_megatron(target) and hf_config is not None and trunk_megatron.supported(hf_config):
        notes += trunk_megatron.notes(hf_config)
        return trunk_megatron.from_hf(view, hf_config, target.name == "megatron_grouped"), notes
    if hugging_face and forward is not None:
        embedding, head = "model.embed_tokens.weight", "lm_head.weight"
        if (hf_config or {}).get("tie_word_embeddings") and embedding in view and head not in view:
            view[head] = view[embedding]
            notes.append("the model is tied: TorchTitan's output layer is written as a second copy of its embedding")
        view = {_one(name, *forward, "model.layers", "layers"): tensor for name, tensor in view.items()}
        missing = [name for name in view if name.startswith("model.")]
        if missing:
            raise LayoutError(
                f"{missing[0]} has no place in TorchTitan's {family}: only the MoE layers can be written (--moe-only)",
                tensor=missing[0],
            )  # fmt: skip
    elif view and target.name != source.name and set(view) == before:
        notes.append(
            f"{len(view)} tensors beside the MoE layers keep their names and bytes: {target.name} says how MoE layers "
            "are stored"
        )
    return view, notes


def _to_hugging_face(view: View, source: Layout, hf_config: Mapping[str, Any] | None) -> View:
    """transformers' names, where the source's can be translated."""
    back = _maps(source, hf_config.get("model_type") if hf_config else None)
    if back is not None and any(name in back[0].values() for name in view):
        top, layer = _inverse(back[0]), _inverse(back[1])
        return {_one(name, top, layer, "layers", "model.layers"): tensor for name, tensor in view.items()}
    if is_megatron(source) and hf_config is not None and trunk_megatron.supported(hf_config):
        if trunk_megatron.is_megatron(view):
            return trunk_megatron.to_hf(view, hf_config)
    return view


def _inverse(names: Mapping[str, str]) -> dict[str, str]:
    return {new: old for old, new in names.items()}


def _one(name: str, top: Mapping[str, str], layer: Mapping[str, str], before: str, after: str) -> str:
    if name in top:
        return top[name]
    match = re.fullmatch(re.escape(before) + r"\.(\d+)\.(.+)", name)
    if match and match[2] in layer:
        return f"{after}.{match[1]}.{layer[match[2]]}"
    return name
