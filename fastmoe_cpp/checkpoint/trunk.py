"""The names of everything beside the MoE layers, between transformers and the hosts that have the same model.

TorchTitan has Qwen3 and DeepSeek-V3 with the tensors of transformers under other names. Other pairs keep their names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .errors import LayoutError
from .layouts import Layout
from .layouts.torchtitan import TorchTitan, TorchTitan03

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


def rename(
    names: list[str], source: Layout, target: Layout, hf_config: Mapping[str, Any] | None
) -> tuple[dict[str, str], list[str]]:
    """The target's name for each tensor beside the MoE layers, and notes for people.

    LayoutError where a tensor has no place in the target's model.
    """
    family = hf_config.get("model_type") if hf_config else None
    renamed = {name: name for name in names}
    notes: list[str] = []
    back = _maps(source, family)
    if back is not None and any(name in back[0].values() for name in names):
        renamed = {name: _one(name, _inverse(back[0]), _inverse(back[1]), "layers", "model.layers") for name in names}
    hugging_face = all(new.startswith(("model.", "lm_head.")) for new in renamed.values())
    if target.family is not None:
        for name, new in renamed.items():
            if not new.startswith(("model.", "lm_head.")):
                raise LayoutError(
                    f"{name} has no place in a {target.family} model: only the MoE layers can be written (--moe-only)",
                    tensor=name,
                )  # fmt: skip
        return renamed, notes
    forward = _maps(target, family)
    if forward is not None and hugging_face and names:
        derived = [name for name in names if name.endswith(_DERIVED)]
        if derived:
            notes.append(
                f"{len(derived)} tensors that are computed from the configuration were left out: {derived[0]}, ..."
            )
        renamed = {
            name: _one(new, *forward, "model.layers", "layers") for name, new in renamed.items() if name not in derived
        }
        missing = [name for name in renamed if not _known(renamed[name])]
        if missing:
            raise LayoutError(
                f"{missing[0]} has no place in TorchTitan's {family}: only the MoE layers can be written (--moe-only)",
                tensor=missing[0],
            )  # fmt: skip
    elif names and target.name != source.name:
        notes.append(
            f"{len(names)} tensors beside the MoE layers keep their names and bytes: {target.name} says how MoE layers "
            "are stored"
        )
    return renamed, notes


def _inverse(names: Mapping[str, str]) -> dict[str, str]:
    return {new: old for old, new in names.items()}


def _one(name: str, top: Mapping[str, str], layer: Mapping[str, str], before: str, after: str) -> str:
    if name in top:
        return top[name]
    match = re.fullmatch(re.escape(before) + r"\.(\d+)\.(.+)", name)
    if match and match[2] in layer:
        return f"{after}.{match[1]}.{layer[match[2]]}"
    return name


def _known(name: str) -> bool:
    return not name.startswith("model.")
