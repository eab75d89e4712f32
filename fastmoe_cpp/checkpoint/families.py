"""config.json of the transformers families: to a MoEConfig, which layers are sparse, and from one family to another.

Missing fields have the defaults of the family's configuration class in transformers 5; DeepSeek version 1 those of the
code published with the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from .. import hosts
from ..config import MoEConfig, RouterConfig
from .errors import ConfigError, LayoutError
from .layouts.base import chooses_alike, effective_renormalize

_COMMON = {"hidden_act": "silu", "initializer_range": 0.02}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 14336, "hidden_size": 4096,
                "router_jitter_noise": 0.0, "num_hidden_layers": 32},
    "qwen2_moe": {"num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "hidden_size": 2048,
                  "shared_expert_intermediate_size": 5632, "norm_topk_prob": False, "decoder_sparse_step": 1,
                  "num_hidden_layers": 24},
    "qwen3_moe": {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "hidden_size": 2048,
                  "norm_topk_prob": False, "decoder_sparse_step": 1, "num_hidden_layers": 24},
    "olmoe": {"num_experts": 64, "num_experts_per_tok": 8, "intermediate_size": 2048, "hidden_size": 2048,
              "norm_topk_prob": False, "num_hidden_layers": 16},
    "deepseek": {"num_experts_per_tok": None, "n_routed_experts": None, "n_shared_experts": None,
                 "moe_intermediate_size": 1407, "hidden_size": 4096, "norm_topk_prob": False, "moe_layer_freq": 1,
                 "first_k_dense_replace": 0, "scoring_func": "softmax", "num_hidden_layers": 30},
    "deepseek_v3": {"num_experts_per_tok": 8, "n_routed_experts": 256, "n_shared_experts": 1, "hidden_size": 7168,
                    "moe_intermediate_size": 2048, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "n_group": 8,
                    "topk_group": 4, "first_k_dense_replace": 3, "num_hidden_layers": 61},
    "gpt_oss": {"num_local_experts": 128, "num_experts_per_tok": 4, "intermediate_size": 2880, "hidden_size": 2880,
                "num_hidden_layers": 36},
}  # fmt: skip
_EXPERTS = {"deepseek": "n_routed_experts", "deepseek_v3": "n_routed_experts", "mixtral": "num_local_experts",
            "gpt_oss": "num_local_experts"}  # fmt: skip
_INTEGERS = (
    "hidden_size", "intermediate_size", "moe_intermediate_size", "num_experts", "num_local_experts", "n_routed_experts",
    "num_experts_per_tok", "n_shared_experts", "shared_expert_intermediate_size", "n_group", "topk_group",
)  # fmt: skip
FAMILIES = tuple(_DEFAULTS)
LAYERS_LIMIT = 10_000


def fields_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with its family's defaults, and the number of experts under the family's own name."""
    family = config.get("model_type")
    if not isinstance(family, str) or family not in _DEFAULTS:
        raise ConfigError(
            f"config.json: model_type must be one of {', '.join(FAMILIES)}, got {family!r:.60}",
            expected=FAMILIES,
            found=family,
        )
    fields = dict(config)
    own = _EXPERTS.get(family, "num_experts")
    for other in ("num_experts", "num_local_experts", "n_routed_experts"):
        if other in fields and own not in fields:
            fields[own] = fields[other]
    defaults = _COMMON | _DEFAULTS[family]
    fields = defaults | {name: value for name, value in fields.items() if value is not None or name not in defaults}
    for name in _INTEGERS:
        value = fields.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31):
            raise ConfigError(f"config.json: {name} must be an integer of at least 0, got {value!r:.60}", found=value)
    return fields


def moe_of(config: Mapping[str, Any]) -> MoEConfig:
    """The MoE layers of a transformers configuration; ConfigError where it makes no sense or is not known."""
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, Mapping) else quantised
        raise ConfigError(
            f"config.json: the weights must be of 16, 32 or 64 bits, they are quantised ({method}): write them "
            "unquantised first", found=method,
        )  # fmt: skip
    fields = fields_of(config)
    family = fields["model_type"]
    scoring = {"deepseek": "softmax", "deepseek_v3": "sigmoid"}.get(family)
    if scoring and fields.get("scoring_func", scoring) != scoring:
        raise ConfigError(f"config.json: scoring_func must be {scoring!r} for {family}, got {fields['scoring_func']!r}")
    try:
        if family == "deepseek":
            return _deepseek(fields)
        return MoEConfig.from_hf(SimpleNamespace(**fields))
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"config.json: {error}") from None


def _deepseek(fields: Mapping[str, Any]) -> MoEConfig:
    shared = fields["n_shared_experts"]
    return MoEConfig(
        fields["hidden_size"],
        fields["moe_intermediate_size"],
        fields["n_routed_experts"],
        fields["num_experts_per_tok"],
        activation=hosts.activation(SimpleNamespace(**fields)),
        shared_intermediate_size=shared * fields["moe_intermediate_size"] if shared else None,
        initializer_range=fields["initializer_range"],
        router=RouterConfig(renormalize=bool(fields["norm_topk_prob"])),
    )


def sparse_layers(config: Mapping[str, Any]) -> list[int]:
    """The layers that have experts, by number."""
    fields = fields_of(config)
    layers = fields["num_hidden_layers"]
    dense = fields.get("mlp_only_layers") or []
    numbers = {"num_hidden_layers": layers} | {
        name: fields[name]
        for name in ("decoder_sparse_step", "moe_layer_freq", "first_k_dense_replace")
        if name in fields
    }
    for name, value in numbers.items():
        low = 0 if name == "first_k_dense_replace" else 1
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= LAYERS_LIMIT:
            raise ConfigError(f"config.json: {name} must be an integer of at least {low}, got {value!r}", found=value)
    if not isinstance(dense, list):
        raise ConfigError(f"config.json: mlp_only_layers must be a list, got {dense!r}", found=dense)
    step, every = numbers.get("decoder_sparse_step", 1), numbers.get("moe_layer_freq", 1)
    first = numbers.get("first_k_dense_replace", 0)
    return [n for n in range(layers) if n not in dense and (n + 1) % step == 0 and n >= first and n % every == 0]


def extra_layers(config: Mapping[str, Any]) -> int:
    """Layers after the last that a checkpoint may hold (multi-token prediction)."""
    extra = config.get("num_nextn_predict_layers", config.get("num_mtp_layers", 0)) or 0
    return extra if isinstance(extra, int) and 0 <= extra <= LAYERS_LIMIT else 0


def canonical(moe: MoEConfig) -> MoEConfig:
    """What evaluation computes: without training's settings, storage, and differences that change no number."""
    router = moe.router
    after = router.scores_after_topk and not (router.score_function == "softmax" and chooses_alike(moe))
    groups = router.num_groups > 1
    plain = RouterConfig(
        score_function=router.score_function,
        scores_after_topk=after,
        renormalize=effective_renormalize(moe),
        scaling_factor=router.scaling_factor,
        num_groups=router.num_groups,
        topk_groups=router.topk_groups if groups else 1,
        group_score=router.group_score if groups else "max",
        bias=router.bias,
        expert_bias=router.expert_bias,
        sinkhorn=router.sinkhorn,
    )
    clamped = moe.activation == "clamped_swiglu"
    return MoEConfig(
        moe.hidden_size, moe.intermediate_size, moe.num_experts, moe.top_k, router=plain, activation=moe.activation,
        activation_alpha=moe.activation_alpha if clamped else 1.702,
        activation_limit=moe.activation_limit if clamped else 7.0,
        bias=moe.bias, weight_on_input=moe.weight_on_input, shared_intermediate_size=moe.shared_intermediate_size,
        shared_expert_gate=moe.shared_expert_gate,
    )  # fmt: skip


def differing_fields(wanted: MoEConfig, offered: MoEConfig) -> dict[str, tuple[Any, Any]]:
    """Fields in which what two configurations compute differs, the router's as 'router.<field>', with both values."""
    found = {}
    a, b = canonical(wanted), canonical(offered)
    for prefix, owner_a, owner_b in (("", a, b), ("router.", a.router, b.router)):
        for field in dataclasses.fields(owner_a):
            one, other = getattr(owner_a, field.name), getattr(owner_b, field.name)
            if field.name != "router" and one != other:
                found[prefix + field.name] = (one, other)
    return found


def differences(wanted: MoEConfig, offered: MoEConfig) -> list[str]:
    """differing_fields() as 'field = wanted (it has offered)'."""
    return [f"{name} = {a!r} (it has {b!r})" for name, (a, b) in differing_fields(wanted, offered).items()]


_LLAMA = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act",
    "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "bos_token_id", "eos_token_id",
    "pad_token_id", "tie_word_embeddings", "rope_theta", "rope_scaling", "rope_parameters", "attention_dropout",
    "torch_dtype", "dtype",
)  # fmt: skip


def translate(config: Mapping[str, Any], moe: MoEConfig, family: str, layout: str) -> dict[str, Any]:
    """The configuration of the same model in another family, or LayoutError with what that family can't hold.

    layout is the source's: beside a configuration of another family it has to be named.
    Mixtral and DeepSeek version 1 share their attention (Llama's); every other family has its own.
    """
    source = config["model_type"]
    if source == family:
        return dict(config)
    if {source, family} != {"mixtral", "deepseek"}:
        raise LayoutError(
            f"a {family} model can't hold a {source} model: their attention differs (the MoE layers alone can move to "
            f"a {family} model TARGET whose config.json describes the same layers: --layout {layout} --config "
            "TARGET/config.json --moe-only)", expected=family, found=source,
        )  # fmt: skip
    new: dict[str, Any] = {name: config[name] for name in _LLAMA if name in config}
    heads, hidden = config.get("num_attention_heads", 32), config.get("hidden_size", 4096)
    refused = []
    if config.get("head_dim") not in (None, hidden // heads):
        refused.append(f"head_dim = {config['head_dim']}")
    if config.get("sliding_window") is not None:
        refused.append(f"sliding_window = {config['sliding_window']}")
    if config.get("attention_bias"):
        refused.append("attention_bias = True")
    if family == "mixtral" and sparse_layers(config) != list(range(fields_of(config)["num_hidden_layers"])):
        refused.append("dense layers")
    if family == "mixtral":
        new |= {
            "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k, "intermediate_size": moe.intermediate_size, "sliding_window": None,
        }  # fmt: skip
    else:
        code = "deepseek-ai/deepseek-moe-16b-base--"
        new |= {
            "model_type": "deepseek", "architectures": ["DeepseekForCausalLM"], "n_routed_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k, "moe_intermediate_size": moe.intermediate_size,
            "intermediate_size": moe.intermediate_size, "n_shared_experts": None, "moe_layer_freq": 1,
            "first_k_dense_replace": 0, "norm_topk_prob": effective_renormalize(moe), "scoring_func": "softmax",
            "auto_map": {"AutoConfig": code + "configuration_deepseek.DeepseekConfig",
                         "AutoModelForCausalLM": code + "modeling_deepseek.DeepseekForCausalLM"},
        }  # fmt: skip
    refused += differences(moe, moe_of(new))
    if refused:
        raise LayoutError(f"a {family} model can't hold this {source} model: {'; '.join(refused)}")
    return new
