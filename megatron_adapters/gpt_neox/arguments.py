"""GPT-NeoX's arguments in both eras: what each becomes, or why it is refused."""

from __future__ import annotations

from typing import Any

from fastmoe_cpp import MoEConfig, RouterConfig

from ..arguments import Argument, ArgumentError, contradiction, read

ERA_NOW = "now"
ERA_MOE_LOSS = "moe_loss"
ERAS = (ERA_NOW, ERA_MOE_LOSS)
HOST = "GPT-NeoX"

_UNGATED = {"gelu": "gelu", "relu": "relu", "silu": "silu", "swish": "silu"}
_GATED = {"geglu": "geglu", "reglu": "reglu", "swiglu": "swiglu"}
#: Experts without a given width are rounded up to a multiple of this.
MULTIPLE_OF = 256

_COMMON = (
    Argument(name="hidden_size", kind=int, minimum=1, becomes="hidden_size"),
    Argument(name="gpt_j_residual", kind=bool, default=False, becomes="which path the transformer layer takes"),
    Argument(name="gpt_j_tied", kind=bool, default=False, becomes="one norm before attention and experts"),
    Argument(name="bias_gelu_fusion", kind=bool, default=False, becomes="activation 'gelu' is its tanh form"),
    Argument(name="model_parallel_size", kind=int, default=1, minimum=1, becomes="see the era's layer"),
)
_NOW = (
    Argument(name="moe_num_experts", kind=int, default=1, minimum=1, becomes="num_experts; 1: no MoE layer"),
    Argument(name="te_fp8_mha", kind=bool, default=False, becomes="the host's attention; not with gpt_j_residual"),
    Argument(name="moe_expert_interval", kind=int, default=1, minimum=1, becomes="every so many layers is MoE"),
    Argument(name="moe_top_k", kind=int, default=1, minimum=1, becomes="top_k"),
    Argument(
        name="moe_router_type", kind=str, default="sinkhorn", choices=("sinkhorn", "topk"), becomes="router.sinkhorn"
    ),
    Argument(name="moe_jitter_eps", kind=float, default=None, minimum=0, becomes="router.jitter_eps ('topk' alone)"),
    Argument(
        name="moe_lbl_in_fp32", kind=bool, default=False, refused="the host has no load-balancing loss in this era"
    ),
    Argument(
        name="activation", kind=str, default="gelu", choices=(*_UNGATED, *_GATED),
        becomes="activation; a gated one has its gate in experts.mlp.w1 and its other half in w3",
    ),
    Argument(
        name="intermediate_size", kind=int, default=None, minimum=1,
        becomes=f"intermediate_size; by default 4 * hidden (gated: 8/3), rounded up to {MULTIPLE_OF}",
    ),
    Argument(name="expansion_factor", kind=float, default=None, refused="the host's experts don't read it"),
    Argument(
        name="sequence_parallel", kind=bool, default=False,
        refused="a tensor-parallel rank's router would see a part of the sequence",
    ),
    Argument(name="te_layernorm_mlp", kind=bool, default=False, refused="it is the norm before the experts as well"),
)  # fmt: skip
_MOE_LOSS = (
    Argument(name="num_experts", kind=int, default=1, minimum=1, becomes="num_experts; 1: no MoE layer"),
    Argument(name="expert_interval", kind=int, default=2, minimum=1, becomes="every so many layers is MoE"),
    Argument(name="moe_top_k", kind=int, default=1, choices=(1, 2), becomes="top_k"),
    Argument(name="moe_loss_coeff", kind=float, default=0.1, minimum=0, becomes="router.balance_loss_coefficient"),
    Argument(name="moe_train_capacity_factor", kind=float, default=1.0, minimum=0, becomes="capacity_factor"),
    Argument(name="moe_eval_capacity_factor", kind=float, default=1.0, minimum=0, becomes="eval_capacity_factor"),
    Argument(name="moe_min_capacity", kind=int, default=4, minimum=0, becomes="the smallest capacity"),
    Argument(name="moe_token_dropping", kind=bool, default=True, becomes="whether there is a capacity"),
    Argument(name="moe_use_residual", kind=bool, default=True, becomes="a dense MLP beside the experts"),
    Argument(name="create_moe_param_group", kind=bool, default=True, becomes="the host's optimizer groups"),
    Argument(name="use_tutel", kind=bool, default=False, refused="Tutel's kernels are not used"),
    Argument(name="moe_expert_parallel_size", kind=int, default=1, refused="every rank holds every expert"),
    Argument(
        name="mlp_type", kind=str, default="regular", choices=("regular",),
        becomes="the host's experts are of this type whatever is set",
    ),
    Argument(name="activation", kind=str, default="gelu", choices=tuple(_UNGATED), becomes="activation"),
)  # fmt: skip

#: The tables by era.
TABLES: dict[str, tuple[Argument, ...]] = {ERA_NOW: _COMMON + _NOW, ERA_MOE_LOSS: _COMMON + _MOE_LOSS}


def check(args: Any, era: str) -> dict[str, Any]:
    """The values of an era's table in neox_args, by name.

    Raises ArgumentError, one sentence with the argument, what is allowed and what was found, for a value that is not
    honoured and for a contradiction; ValueError for an era that is not in ERAS.
    """
    if era not in ERAS:
        raise ValueError(f"era must be one of {', '.join(map(repr, ERAS))}, got {era!r}")
    values = read(args, TABLES[era], HOST)
    name = "moe_num_experts" if era == ERA_NOW else "num_experts"
    if values["moe_top_k"] > values[name]:
        raise contradiction(
            HOST, "moe_top_k", values["moe_top_k"], name, values[name], "there are no more experts to choose from"
        )
    if era == ERA_NOW:
        if values["moe_jitter_eps"] and values["moe_router_type"] == "sinkhorn":
            raise contradiction(
                HOST, "moe_jitter_eps", values["moe_jitter_eps"], "moe_router_type", "sinkhorn",
                "only the router 'topk' has jitter",
            )  # fmt: skip
        if values["te_fp8_mha"] and values["gpt_j_residual"] and values["moe_num_experts"] > 1:
            raise contradiction(
                HOST, "te_fp8_mha", True, "gpt_j_residual", True,
                "attention beside experts is computed without Transformer Engine's fp8",
            )  # fmt: skip
        if values["moe_num_experts"] % values["model_parallel_size"]:
            raise contradiction(
                HOST, "moe_num_experts", values["moe_num_experts"], "model_parallel_size",
                values["model_parallel_size"], "the tensor-parallel ranks share the experts evenly",
            )  # fmt: skip
    elif values["model_parallel_size"] > 1 and values[name] > 1:
        raise ArgumentError(
            f"{HOST}: --model-parallel-size is not honoured beside --num-experts in this era: leave it at 1, got "
            f"{values['model_parallel_size']!r}"
        )
    return values


def activation_of(values: dict[str, Any]) -> str:
    """The activation here by the host's name of it; its fused GELU is the tanh form."""
    name = values["activation"]
    if name == "gelu" and values["bias_gelu_fusion"]:
        return "gelu_tanh"
    return (_UNGATED | _GATED)[name]


def expert_width(args: Any) -> int:
    """F of the era 'now': intermediate_size, or 4 * hidden_size (gated: 8 / 3) rounded up to a multiple of 256."""
    values = check(args, ERA_NOW)
    if values["intermediate_size"] is not None:
        return values["intermediate_size"]
    hidden = values["hidden_size"]
    width = int(2 * hidden * 4 / 3) if values["activation"] in _GATED else 4 * hidden
    return -(-width // MULTIPLE_OF) * MULTIPLE_OF


def moe_config(args: Any, era: str = ERA_NOW) -> MoEConfig:
    """The MoEConfig of neox_args. Raises as ``check`` does.

    Of the era 'moe_loss' its capacity is the exact one: the host's smallest capacity and its dense MLP beside the
    experts are in ``MoEWithLoss``.
    """
    values = check(args, era)
    std = getattr(args, "init_method_std", None)
    start = {} if std is None else {"initializer_range": float(std)}
    top_k, hidden = values["moe_top_k"], values["hidden_size"]
    if era == ERA_NOW:
        sinkhorn = values["moe_router_type"] == "sinkhorn"
        router = RouterConfig(
            score_function="sigmoid" if sinkhorn and top_k == 1 else "softmax",
            renormalize=False,
            sinkhorn=sinkhorn,
            sinkhorn_iterations=3 if sinkhorn else 0,
            jitter_eps=float(values["moe_jitter_eps"] or 0.0),
        )
        return MoEConfig(
            hidden, expert_width(args), values["moe_num_experts"], top_k, router, activation_of(values), **start
        )
    router = RouterConfig(
        renormalize=top_k == 2, balance_loss="switch", balance_loss_coefficient=float(values["moe_loss_coeff"])
    )
    capacity = {}
    if values["moe_token_dropping"]:
        capacity = {
            "capacity_factor": float(values["moe_train_capacity_factor"]),
            "eval_capacity_factor": float(values["moe_eval_capacity_factor"]),
        }
    return MoEConfig(
        hidden, 4 * hidden, values["num_experts"], top_k, router, activation_of(values), bias=True, **capacity, **start
    )
