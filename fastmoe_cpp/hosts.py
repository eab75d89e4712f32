"""The MoE blocks of transformers' models as the fields of a MoEConfig, and their weights into a layer.

The facts are those of transformers 5: where each family keeps its sizes, what its router does, how its block is built.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

_GATED_OF_HIDDEN_ACT = {
    "silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "gelu_new": "geglu_tanh", "gelu_pytorch_tanh": "geglu_tanh",
    "relu": "reglu",
}  # fmt: skip


def activation(config: Any) -> str:
    """MoEConfig.activation of a gated MLP with the configuration's hidden_act; ValueError for an unknown one."""
    if config.hidden_act not in _GATED_OF_HIDDEN_ACT:
        known = ", ".join(repr(a) for a in _GATED_OF_HIDDEN_ACT)
        raise ValueError(f"hidden_act must be one of {known}, got {config.hidden_act!r}")
    return _GATED_OF_HIDDEN_ACT[config.hidden_act]


def _mixtral(c: Any) -> dict[str, Any]:
    jitter = getattr(c, "router_jitter_noise", 0.0)
    return {
        "intermediate_size": c.intermediate_size,
        "num_experts": c.num_local_experts,
        "router": {"jitter_eps": jitter, "jitter_experts": jitter > 0},
    }


def _qwen3_moe(c: Any) -> dict[str, Any]:
    return {
        "intermediate_size": c.moe_intermediate_size,
        "num_experts": c.num_experts,
        "router": {"renormalize": c.norm_topk_prob},
    }


def _qwen2_moe(c: Any) -> dict[str, Any]:
    shared = {"shared_intermediate_size": c.shared_expert_intermediate_size, "shared_expert_gate": True}
    return _qwen3_moe(c) | shared


def _olmoe(c: Any) -> dict[str, Any]:
    return {
        "intermediate_size": c.intermediate_size,
        "num_experts": c.num_experts,
        "router": {"renormalize": c.norm_topk_prob},
    }


def _deepseek_v3(c: Any) -> dict[str, Any]:
    return {
        "intermediate_size": c.moe_intermediate_size,
        "num_experts": c.n_routed_experts,
        "shared_intermediate_size": c.moe_intermediate_size * c.n_shared_experts if c.n_shared_experts else None,
        "router": {
            "score_function": "sigmoid",
            "renormalize": bool(c.norm_topk_prob),
            "renormalize_epsilon": 1e-20,
            "scaling_factor": c.routed_scaling_factor,
            "num_groups": c.n_group or 1,
            "topk_groups": c.topk_group or 1,
            "group_score": "top2_sum",
            "expert_bias": True,
        },
    }


def _gpt_oss(c: Any) -> dict[str, Any]:
    return {
        "intermediate_size": c.intermediate_size,
        "num_experts": c.num_local_experts,
        "activation": "clamped_swiglu",
        "activation_alpha": getattr(c, "swiglu_alpha", 1.702),
        "activation_limit": getattr(c, "swiglu_limit", 7.0),
        "bias": True,
        "interleaved": True,
        "router": {"scores_after_topk": True, "renormalize": False, "bias": True},
    }


_FAMILIES = {
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "olmoe": _olmoe,
    "deepseek_v3": _deepseek_v3,
    "gpt_oss": _gpt_oss,
}


def layer_fields(config: Any) -> dict[str, Any]:
    """The fields of MoEConfig for a transformers configuration; 'router' holds those of RouterConfig.

    Raises ValueError for a family or an activation that is not known.
    """
    family = getattr(config, "model_type", None)
    if family not in _FAMILIES:
        known = ", ".join(repr(f) for f in _FAMILIES)
        raise ValueError(f"config.model_type must be one of {known}, got {family!r}")
    return {
        "hidden_size": config.hidden_size,
        "top_k": config.num_experts_per_tok,
        "activation": activation(config),
        "initializer_range": getattr(config, "initializer_range", 0.02),
    } | _FAMILIES[family](config)


# Sizes as published in each model's config.json.
_PUBLISHED: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": {
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen1.5-moe-a2.7b": {
        "model_type": "qwen2_moe", "hidden_size": 2048, "moe_intermediate_size": 1408, "num_experts": 60,
        "num_experts_per_tok": 4, "norm_topk_prob": False, "shared_expert_intermediate_size": 5632,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128,
        "num_experts_per_tok": 8, "norm_topk_prob": True,
    },
    "olmoe-1b-7b": {
        "model_type": "olmoe", "hidden_size": 2048, "intermediate_size": 1024, "num_experts": 64,
        "num_experts_per_tok": 8, "norm_topk_prob": False,
    },
    "deepseek-v3": {
        "model_type": "deepseek_v3", "hidden_size": 7168, "moe_intermediate_size": 2048, "n_routed_experts": 256,
        "num_experts_per_tok": 8, "norm_topk_prob": True, "n_shared_experts": 1, "routed_scaling_factor": 2.5,
        "n_group": 8, "topk_group": 4,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_local_experts": 32,
        "num_experts_per_tok": 4,
    },
    "gpt-oss-120b": {
        "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_local_experts": 128,
        "num_experts_per_tok": 4,
    },
}  # fmt: skip


def published(name: str) -> Any:
    """What layer_fields reads of a published model's configuration; ValueError for a name that is not known."""
    if name not in _PUBLISHED:
        known = ", ".join(repr(n) for n in _PUBLISHED)
        raise ValueError(f"the preset's name must be one of {known}, got {name!r}")
    return SimpleNamespace(hidden_act="silu", **_PUBLISHED[name])


@torch.no_grad()
def load_block(layer: torch.nn.Module, block: torch.nn.Module) -> None:
    """Copies the weights of a transformers MoE block (version 5: stacked experts) into a MoE made by from_hf.

    Raises ValueError, and changes nothing, where a tensor is missing on either side or its shape differs.
    """
    source = dict(block.named_parameters()) | dict(block.named_buffers())
    # a copy to meta does nothing and raises nothing
    for owner, tensors in (("block", source), ("layer", dict(layer.named_parameters()) | dict(layer.named_buffers()))):
        if empty := [name for name, tensor in tensors.items() if tensor.is_meta]:
            raise ValueError(f"the {owner}'s {empty[0]} must be on a real device, it is on meta: it has no values yet")
    # gpt-oss keeps its experts as [E, in, out]
    transposed = "experts.gate_up_proj_bias" in source
    renamed = {
        "gate.weight": "router.weight",
        "gate.e_score_correction_bias": "router.expert_bias",
        "experts.gate_up_proj_bias": "experts.gate_up_bias",
        "experts.down_proj_bias": "experts.down_bias",
        "shared_expert_gate.weight": "shared_experts.gate",
    }
    found: dict[str, torch.Tensor] = {}
    for name, tensor in source.items():
        parts = name.split(".")
        if parts[0] in ("shared_expert", "shared_experts"):
            if parts[1] == "down_proj":
                found["shared_experts.down_proj"] = tensor
            elif parts[1] == "gate_proj":
                up = source[f"{parts[0]}.up_proj.weight"]
                found["shared_experts.gate_up_proj"] = torch.cat([tensor, up.to(tensor.device)])
            continue
        if transposed and name in ("experts.gate_up_proj", "experts.down_proj"):
            tensor = tensor.transpose(1, 2)
        found[renamed.get(name, name)] = tensor
    target = layer.state_dict(keep_vars=True)
    if missing := sorted(set(target) ^ set(found)):
        raise ValueError(f"the block and the layer must have the same tensors, one side lacks {', '.join(missing)}")
    for name, tensor in found.items():
        if tensor.shape != target[name].shape:
            raise ValueError(f"{name} must have shape {list(target[name].shape)}, the block has {list(tensor.shape)}")
    for name, tensor in found.items():
        target[name].copy_(tensor)
