"""TransformerConfig's fields: what each becomes, or why it is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import activations as host_activations
from megatron.core import package_info

from fastmoe_cpp import MoEConfig, RouterConfig

from ..arguments import Argument, ArgumentError, contradiction, read

HOST = "Megatron-Core"
NUMBER = (int, float)
#: Megatron-Core's balance losses and their forms here.
BALANCE_LOSSES = {"aux_loss": "batch", "seq_aux_loss": "sequence", "global_aux_loss": "global"}
_ROUTER_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


def _honoured(name: str, kind: Any, default: Any, becomes: str, **rest: Any) -> Argument:
    return Argument(name=name, kind=kind, default=default, becomes=becomes, **rest)


def _refused(name: str, default: Any, why: str, *harmless: Any) -> Argument:
    return Argument(name=name, kind=object, default=default, refused=why, harmless=harmless)


_FLEX = "it belongs to the flex dispatcher"
_GTP = "generalized tensor parallelism of experts"
_INFERENCE = "it belongs to the inference-optimized layers"
_LOCAL = "kernels of the host alone use it"
_NOTHING = "nothing to do: same result"

#: Every field of TransformerConfig that speaks of experts, routers or MoE.
FIELDS: tuple[Argument, ...] = (
    _honoured("num_moe_experts", int, None, "num_experts", minimum=1),
    _honoured("moe_router_topk", int, 2, "top_k", minimum=1),
    _honoured("moe_ffn_hidden_size", int, None, "intermediate_size; by default ffn_hidden_size", minimum=1),
    _honoured("moe_layer_freq", (int, list), 1, "which layers are MoE: the host's block spec"),
    _honoured("moe_shared_expert_intermediate_size", int, None, "the host's shared experts, beside ours", minimum=1),
    _honoured("moe_shared_expert_gate", bool, False, "the gate of the host's shared experts"),
    _honoured(
        "moe_router_load_balancing_type", (str, list), "aux_loss",
        "the balance losses, 'sinkhorn' or 'none'; 'quantile_balancing' is refused",
    ),
    _honoured("moe_aux_loss_coeff", (int, float, list), 0.0, "coefficients of the balance losses"),
    _honoured("moe_z_loss_coeff", NUMBER, None, "router.z_loss_coefficient"),
    _honoured("moe_router_num_groups", int, None, "router.num_groups", minimum=1),
    _honoured("moe_router_group_topk", int, None, "router.topk_groups", minimum=1),
    _honoured(
        "moe_router_topk_limited_devices", int, None, "router.topk_groups, with num_groups = expert-parallel size"
    ),
    _honoured("moe_router_pre_softmax", bool, False, "not router.scores_after_topk"),
    _honoured("moe_router_topk_scaling_factor", NUMBER, None, "router.scaling_factor"),
    _honoured(
        "moe_router_score_function", str, "softmax", "router.score_function",
        choices=("softmax", "sigmoid", "sqrtsoftplus"),
    ),
    _honoured(
        "moe_router_dtype", str, None, "router.dtype; by default the hidden states' dtype",
        choices=tuple(_ROUTER_DTYPES),
    ),
    _honoured("moe_router_enable_expert_bias", bool, False, "router.expert_bias"),
    _honoured("moe_router_bias_update_rate", NUMBER, 1e-3, "the host's update in finalize_model_grads"),
    _honoured("moe_router_force_load_balancing", bool, False, "random logits, for benchmarks: the host's function"),
    _honoured("moe_router_force_biased", NUMBER, None, "biased random logits, for benchmarks: the host's function"),
    _honoured("moe_enable_routing_replay", bool, False, "the host's RouterReplay records and replays our ids"),
    _honoured("moe_input_jitter_eps", NUMBER, None, "router.jitter_eps (the host's sampler, in evaluation too)"),
    _honoured("moe_expert_capacity_factor", NUMBER, None, "capacity_factor and eval_capacity_factor"),
    _honoured("moe_token_drop_policy", str, "probs", "drop_policy", choices=("probs", "position")),
    _honoured(
        "moe_pad_expert_input_to_capacity", bool, False,
        "our layer pads nothing: same result; with our parts in the host's layer, the host pads",
    ),
    _honoured("moe_apply_probs_on_input", bool, False, "weight_on_input (top-k of 1 only, as in the host)"),
    _honoured("moe_grad_scale_func", object, None, "scale of the auxiliary losses: the host's schedules"),
    _honoured("moe_per_layer_logging", bool, False, "the host's metrics, which we record"),
    _honoured("moe_layer_recompute", bool, False, "recompute_modules=['moe']"),
    _honoured("moe_grouped_gemm", bool, False, "names of the state_dict: TEGroupedMLP's instead of SequentialMLP's"),
    _honoured(
        "moe_token_dispatcher_type", str, "allgather", "our own exchange: same result; 'flex' is refused",
        choices=("allgather", "alltoall"),
    ),
    _honoured("moe_permute_fusion", bool, False, "always: the experts' kernels gather rows themselves"),
    _honoured("moe_router_fusion", bool, False, "always: one operator scores and selects"),
    _honoured("expert_model_parallel_size", int, 1, "ranks the experts are spread over", minimum=1),
    _refused("expert_tensor_parallel_size", None, "experts are not split across tensor-parallel ranks", 1),
    _refused("expert_tensor_parallel_num_weight_shards", None, _GTP, 1),
    _refused("expert_gtp_weight_remat_size", 1, _GTP),
    _refused("moe_latent_size", None, "experts work in the model's width"),
    _refused("moe_shared_expert_overlap", False, "shared experts run before the exchange, not beside it"),
    _refused("use_grouped_gemm_for_shared_expert", False, _LOCAL),
    _refused("moe_shared_expert_glu_interleave_size", None, _LOCAL),
    _refused("moe_mlp_glu_interleave_size", None, "weights hold gate rows, then up rows"),
    _refused("moe_single_grouped_weight", False, _LOCAL),
    _refused("moe_single_grouped_bias", False, _LOCAL),
    _refused("moe_router_quantile_balancing_ema", 0.0, "quantile balancing is not available"),
    _refused("moe_router_padding_for_quantization", False, "there is no fp8 or fp4 path"),
    _refused("moe_router_padding_for_fp8", False, "there is no fp8 path"),
    _refused("moe_token_dropping", False, "the host does not implement it either: set moe_expert_capacity_factor"),
    _refused("moe_expert_rank_capacity_factor", None, _FLEX),
    _refused("moe_enable_deepep", False, _FLEX),
    _refused("moe_flex_dispatcher_backend", "deepep", _FLEX),
    _refused("moe_flex_dispatcher_num_sms", None, _FLEX),
    _refused("moe_deepep_num_sms", None, _FLEX, 20),
    _refused("moe_hybridep_num_sms", None, _FLEX, 16),
    _refused("moe_hybridep_num_blocks_permute", None, _FLEX),
    _refused("moe_hybridep_num_blocks_unpermute", None, _FLEX),
    _refused("moe_hybridep_num_sms_preprocessing", 108, _FLEX),
    _refused("moe_hybridep_pad_uneven_dispatch_inputs", False, _FLEX),
    _refused("moe_permute_fusion_into_hybridep", False, _FLEX),
    _refused("moe_ncclep_static_shape", False, _FLEX),
    _refused("moe_ncclep_zero_copy", False, _FLEX),
    _refused("moe_paged_stash", False, _FLEX),
    _refused("moe_paged_stash_page_size", 64, _FLEX),
    _refused("moe_paged_stash_buffer_size_factor_cuda", 1.1, _FLEX),
    _refused("moe_paged_stash_buffer_size_factor_cpu", 0.0, _FLEX),
    _refused("moe_pad_experts_for_cuda_graph_inference", False, _INFERENCE),
    _refused("inference_moe_disable_fused_quant_kernels", False, _INFERENCE),
    _refused("inference_moe_token_dispatcher_type", "nvls", _INFERENCE, "nccl"),
    _refused("overlap_moe_expert_parallel_comm", False, "the exchange is not overlapped with another micro-batch"),
    _refused("overlap_dispatch_backward_with_experts_wgrad", False, "weight gradients are not delayed"),
)  # fmt: skip

#: Fields about the whole model that an MoE layer must honour as well.
MODEL_FIELDS: tuple[Argument, ...] = (
    _honoured("hidden_size", int, 0, "hidden_size", minimum=1),
    _honoured("ffn_hidden_size", int, None, "default of moe_ffn_hidden_size", minimum=1),
    _honoured("gated_linear_unit", bool, False, "activation"),
    _honoured("activation_func", object, F.gelu, "activation"),
    _honoured("glu_linear_offset", NUMBER, 0.0, "activation 'clamped_swiglu' at 1"),
    _honoured("activation_func_clamp_value", NUMBER, None, "activation_limit of 'clamped_swiglu'"),
    _honoured("add_bias_linear", bool, True, "bias, and router.bias"),
    _honoured("calculate_per_token_loss", bool, False, "scale of the auxiliary losses, as in the host"),
    _refused("fp8", None, "there is no fp8 path"),
    _refused("fp4", None, "there is no fp4 path"),
    _refused("delay_wgrad_compute", False, "weight gradients are not delayed"),
    _refused("use_te_activation_func", False, "the activation is a part of our kernels"),
    _refused("use_transformer_engine_op_fuser", False, "the experts are not Transformer Engine's"),
    _refused("activation_func_fp8_input_store", False, "there is no fp8 path"),
)

_UNGATED: dict[Callable, str] = {
    F.gelu: "gelu", F.silu: "silu", F.relu: "relu", host_activations.squared_relu: "relu2",
    host_activations.fast_gelu: "gelu_tanh",
}  # fmt: skip
_GATED: dict[Callable, str] = {
    F.silu: "swiglu", F.gelu: "geglu", F.relu: "reglu", host_activations.fast_gelu: "geglu_tanh",
}  # fmt: skip


def check(config: Any) -> dict[str, Any]:
    """The values of FIELDS and MODEL_FIELDS in a TransformerConfig, by name.

    Raises ArgumentError, one sentence with the field, what is allowed and what was found, for a value that is not
    honoured, for an unknown ``moe_*`` field (of a release newer than this adapter) and for a contradiction.
    """
    known = {row.name for row in FIELDS}
    for name in vars(config):
        if name.startswith("moe_") and name not in known:
            raise ArgumentError(
                f"{HOST}: the field {name} is not known to this adapter, which was made for fields of release 0.19"
            )
    if getattr(config, "moe_token_dispatcher_type", None) == "flex":
        raise ArgumentError(
            f"{HOST}: moe_token_dispatcher_type 'flex' is not honoured (DeepEP and its kin): use 'allgather' or "
            "'alltoall'"
        )
    present = [row for row in (*FIELDS, *MODEL_FIELDS) if hasattr(config, row.name)]
    try:
        values = read(config, present, HOST)
    except ArgumentError as error:
        # fields of a dataclass, not options of a command line
        message = str(error)
        for row in present:
            message = message.replace("--" + row.name.replace("_", "-") + " ", row.name + " ")
        raise ArgumentError(message) from None
    values |= {row.name: row.default for row in (*FIELDS, *MODEL_FIELDS) if row.name not in values}
    if values["num_moe_experts"] is None:
        raise ArgumentError(f"{HOST}: num_moe_experts must be an integer of at least 1, got None")
    if getattr(config, "transformer_impl", None) == "inference_optimized":
        raise ArgumentError(
            f"{HOST}: transformer_impl 'inference_optimized' is not honoured, use 'local' or 'transformer_engine'"
        )
    if getattr(config, "mtp_num_layers", None) and package_info.VERSION[:2] < (0, 18):
        # its layers tell MoELayer alone, and no subclass, that they are for prediction: their losses' scale and place
        raise ArgumentError(
            f"{HOST}: mtp_num_layers needs release 0.18 or newer, got {config.mtp_num_layers} with "
            f"{'.'.join(map(str, package_info.VERSION[:3]))}"
        )
    field = "cuda_graph_modules" if hasattr(config, "cuda_graph_modules") else "cuda_graph_scope"  # until 0.17
    parts = getattr(config, field, None) or ()
    graphs = {getattr(m, "name", str(m)) for m in (parts.split(",") if isinstance(parts, str) else parts)}
    if partial := sorted(graphs & {"moe_router", "moe_preprocess"}):
        raise ArgumentError(f"{HOST}: {field} {partial} is not honoured: the layer is captured whole or not at all")
    offloaded = set(getattr(config, "offload_modules", None) or ()) & {"expert_fc1", "moe_act", "fused_group_mlp"}
    if offloaded and getattr(config, "fine_grained_activation_offloading", False):
        raise ArgumentError(
            f"{HOST}: offload_modules {sorted(offloaded)} is not honoured: our experts keep other activations"
        )
    _check_routing(values)
    return values


def aux_losses(values: dict[str, Any]) -> dict[str, float]:
    """Coefficients above 0 by Megatron-Core's name of the balance loss."""
    types, coefficients = values["moe_router_load_balancing_type"], values["moe_aux_loss_coeff"]
    if isinstance(types, str):
        types, coefficients = [types], [coefficients]
    return {t: float(c) for t, c in zip(types, coefficients, strict=True) if c > 0}


def _check_routing(values: dict[str, Any]) -> None:
    types, coefficients = values["moe_router_load_balancing_type"], values["moe_aux_loss_coeff"]
    allowed = (*BALANCE_LOSSES, "none", "sinkhorn")
    for kind in [types] if isinstance(types, str) else types:
        if kind == "quantile_balancing":
            raise ArgumentError(f"{HOST}: moe_router_load_balancing_type 'quantile_balancing' is not honoured")
        if kind not in allowed:
            words = ", ".join(map(repr, allowed))
            raise ArgumentError(f"{HOST}: moe_router_load_balancing_type must be one of {words}, got {kind!r}")
    if isinstance(types, list) != isinstance(coefficients, list) or (
        isinstance(types, list) and (len(types) != len(coefficients) or len(set(types)) != len(types))
    ):
        raise ArgumentError(
            f"{HOST}: moe_aux_loss_coeff must hold one coefficient for each of the (different) "
            f"moe_router_load_balancing_type {types!r}, got {coefficients!r}"
        )
    if isinstance(types, list) and "sinkhorn" in types:
        raise ArgumentError(f"{HOST}: moe_router_load_balancing_type 'sinkhorn' stands alone, got {types!r}")
    for name, value in aux_losses(values).items():
        if name not in BALANCE_LOSSES:
            raise contradiction(HOST, "moe_aux_loss_coeff", value, "moe_router_load_balancing_type", name,
                                "it has no auxiliary loss")  # fmt: skip
    if types == "sinkhorn":
        for name in ("moe_router_enable_expert_bias", "moe_router_group_topk", "moe_router_topk_scaling_factor"):
            if values[name]:
                raise contradiction(HOST, name, values[name], "moe_router_load_balancing_type", types,
                                    "Sinkhorn's routing has none")  # fmt: skip
    if values["moe_router_enable_expert_bias"] and values["moe_router_score_function"] == "softmax":
        raise contradiction(HOST, "moe_router_enable_expert_bias", True, "moe_router_score_function", "softmax",
                            "the bias is added to sigmoid or sqrtsoftplus scores")  # fmt: skip
    if values["moe_apply_probs_on_input"] and values["moe_router_topk"] != 1:
        raise contradiction(HOST, "moe_apply_probs_on_input", True, "moe_router_topk", values["moe_router_topk"],
                            "weights on the input need a top-k of 1")  # fmt: skip
    if values["moe_router_group_topk"] and not values["moe_router_num_groups"]:
        raise contradiction(HOST, "moe_router_group_topk", values["moe_router_group_topk"], "moe_router_num_groups",
                            None, "they come together")  # fmt: skip


def _activation(values: dict[str, Any]) -> dict[str, Any]:
    function, offset, clamp = (
        values[name] for name in ("activation_func", "glu_linear_offset", "activation_func_clamp_value")
    )
    name = getattr(function, "__name__", repr(function))
    if values["gated_linear_unit"] and function is host_activations.quick_gelu:
        if offset != 1 or clamp is None:
            raise ArgumentError(
                f"{HOST}: activation_func quick_gelu, gated, must have glu_linear_offset 1 and an "
                f"activation_func_clamp_value (gpt-oss), got {offset!r} and {clamp!r}"
            )
        return {"activation": "clamped_swiglu", "activation_limit": float(clamp)}
    known = _GATED if values["gated_linear_unit"] else _UNGATED
    if function not in known:
        words = ", ".join(sorted(getattr(f, "__name__", repr(f)) for f in known))
        gated = "gated" if values["gated_linear_unit"] else "not gated"
        raise ArgumentError(f"{HOST}: activation_func ({gated}) must be one of {words}, got {name}")
    if values["gated_linear_unit"] and (offset or clamp is not None):
        raise ArgumentError(
            f"{HOST}: glu_linear_offset and activation_func_clamp_value are honoured for quick_gelu alone, got "
            f"{offset!r} and {clamp!r} with {name}"
        )
    return {"activation": known[function]}


def group_score_terms(values: dict[str, Any]) -> int:
    """How many of its best scores a group is worth the sum of: moe_router_topk // moe_router_group_topk."""
    return values["moe_router_topk"] // values["moe_router_group_topk"] if values["moe_router_group_topk"] else 0


def moe_config(config: Any) -> MoEConfig:
    """The MoEConfig of a TransformerConfig: routed experts and router (the host makes the shared experts itself).

    Raises ArgumentError for a field that is not honoured and for several balance losses at once, of which a MoEConfig
    holds one (``FastMoELayer`` has them all).
    """
    values = check(config)
    losses = aux_losses(values)
    if len(losses) > 1:
        raise ArgumentError(f"{HOST}: moe_aux_loss_coeff must be above 0 for at most one loss here, got {losses}")
    form, coefficient = next(((BALANCE_LOSSES[n], c) for n, c in losses.items()), ("batch", 0.0))
    return layer_config(config, values, form, coefficient)


def layer_config(config: Any, values: dict[str, Any], form: str = "batch", coefficient: float = 0.0) -> MoEConfig:
    """The MoEConfig of checked values."""
    top_k, scores = values["moe_router_topk"], values["moe_router_score_function"]
    sinkhorn = values["moe_router_load_balancing_type"] == "sinkhorn"
    if sinkhorn:
        scores = "sigmoid" if top_k == 1 else "softmax"
    terms = group_score_terms(values)
    groups = {}
    if terms:
        groups = {"num_groups": values["moe_router_num_groups"], "topk_groups": values["moe_router_group_topk"]}
        groups["group_score"] = "max" if terms <= 1 else "top2_sum"
    # 0 and None: no scaling
    scaling = {"scaling_factor": float(s)} if (s := values["moe_router_topk_scaling_factor"]) else {}
    jitter = values["moe_input_jitter_eps"]
    router = RouterConfig(
        score_function=scores,
        scores_after_topk=scores == "softmax" and not sinkhorn and not values["moe_router_pre_softmax"],
        renormalize=scores != "softmax" and not sinkhorn and top_k > 1,
        renormalize_epsilon=1e-20,
        bias=values["add_bias_linear"],
        expert_bias=values["moe_router_enable_expert_bias"],
        expert_bias_update_rate=float(values["moe_router_bias_update_rate"]),
        sinkhorn=sinkhorn,
        jitter_eps=0.0 if jitter is None else float(jitter),
        dtype=_ROUTER_DTYPES.get(values["moe_router_dtype"], config.params_dtype),
        balance_loss=form,
        balance_loss_coefficient=coefficient,
        z_loss_coefficient=float(values["moe_z_loss_coeff"] or 0.0),
        **groups,
        **scaling,
    )
    capacity = values["moe_expert_capacity_factor"]
    return MoEConfig(
        hidden_size=values["hidden_size"],
        intermediate_size=values["moe_ffn_hidden_size"] or values["ffn_hidden_size"] or 4 * values["hidden_size"],
        num_experts=values["num_moe_experts"],
        top_k=top_k,
        router=router,
        **_activation(values),
        bias=values["add_bias_linear"],
        weight_on_input=values["moe_apply_probs_on_input"],
        capacity_factor=None if capacity is None else float(capacity),
        eval_capacity_factor=None if capacity is None else float(capacity),
        drop_policy=values["moe_token_drop_policy"],
        initializer_range=float(getattr(config, "init_method_std", 0.02)),
    )
