"""The operators of ``torch.ops.fastmoe_cpp``, typed: everything a module calls, and all of it traced by torch.compile.

Symbols: T tokens, H hidden size, I expert intermediate size, E experts, K experts a token, P = T * K slots (or fewer,
see DispatchPlan), S sequences of L tokens. Floating dtypes are float64, float32, bfloat16 and float16; sums, scores and
routing weights are float32, or float64 where their operands are. A wrong shape or value raises ValueError, a wrong
dtype TypeError: one sentence with the argument's name, what was expected and what was given. Nothing here waits for the
device. The same functions in plain torch, and their formulas, are in ``fastmoe_cpp.reference``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _extension
from .outputs import DispatchPlan, RouterOutput

_extension.require()
_ops = torch.ops.fastmoe_cpp


def _defaults(operator: str) -> dict[str, Any]:
    arguments = getattr(_ops, operator).default._schema.arguments
    return {a.name: a.default_value for a in arguments if a.has_default_value()}


_ROUTE, _DISPATCH, _EXPERTS = (_defaults(name) for name in ("route", "dispatch", "experts"))
_ROUTE_AND_DISPATCH = _defaults("route_and_dispatch")


def _changed(defaults: dict[str, Any], /, **options: Any) -> dict[str, Any]:
    """The options that are not the operator's defaults: to read one takes torch.ops as long as a small kernel runs."""
    if torch.compiler.is_compiling():
        return options
    return {n: v for n, v in options.items() if v is not (d := defaults[n]) and (d is None or v != d)}


def router_logits(hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """hidden_states [T, H] @ weight [E, H].T (+ bias [E]) in float32 or wider: [T, E]. Operands may differ in dtype."""
    return _ops.router_logits(hidden_states, weight, bias)


def route(
    logits: Tensor,
    top_k: int,
    *,
    expert_bias: Tensor | None = None,
    selection_scores: Tensor | None = None,
    topk_ids: Tensor | None = None,
    score_function: str = "softmax",
    scores_after_topk: bool = False,
    renormalize: bool = True,
    renormalize_epsilon: float = 0.0,
    scaling_factor: float = 1.0,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "max",
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [T, E] to topk_weights [T, K], topk_ids [T, K] int64 and scores [T, E].

    expert_bias [E] and selection_scores [T, E] choose experts and have no part in the weights. Ties go to the lower id,
    NaN ranks last, ids are distinct. Given topk_ids are replayed: -1 gets weight 0 and no gradient.
    """
    return _ops.route(
        logits,
        top_k,
        **_changed(
            _ROUTE,
            expert_bias=expert_bias,
            selection_scores=selection_scores,
            topk_ids=topk_ids,
            score_function=score_function,
            scores_after_topk=scores_after_topk,
            renormalize=renormalize,
            renormalize_epsilon=renormalize_epsilon,
            scaling_factor=scaling_factor,
            num_groups=num_groups,
            topk_groups=topk_groups,
            group_score=group_score,
        ),
    )


def sinkhorn(logits: Tensor, iterations: int = 0, tolerance: float = 1e-4) -> Tensor:
    """Sinkhorn's scaling of exp(logits) [T, E], for selection, without gradient. 0 iterations run to the tolerance."""
    return _ops.sinkhorn(logits, iterations, tolerance)


def dispatch(
    topk_ids: Tensor,
    num_experts: int,
    *,
    topk_weights: Tensor | None = None,
    capacity: int | None = None,
    drop_policy: str = "position",
    padding_mask: Tensor | None = None,
) -> DispatchPlan:
    """The plan for topk_ids [T, K] (int32 or int64, -1 is dropped), stable within an expert.

    capacity is the most pairs an expert keeps: the first, or with drop_policy 'probs' those of largest topk_weights.
    padding_mask [T] bool, True for padding, drops a token before capacity is counted.
    """
    return DispatchPlan(
        *_ops.dispatch(
            topk_ids,
            num_experts,
            **_changed(
                _DISPATCH,
                topk_weights=topk_weights,
                capacity=capacity,
                drop_policy=drop_policy,
                padding_mask=padding_mask,
            ),
        )
    )


def route_and_dispatch(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    top_k: int,
    *,
    expert_bias: Tensor | None = None,
    score_function: str = "softmax",
    scores_after_topk: bool = False,
    renormalize: bool = True,
    renormalize_epsilon: float = 0.0,
    scaling_factor: float = 1.0,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "max",
) -> tuple[RouterOutput, DispatchPlan]:
    """router_logits, route and dispatch (without capacity or padding) in one call, with the gradients of the three.

    hidden_states [T, H], weight [E, H], bias [E] and the options are theirs, and so are the results, to the bit.
    Without gradients, of at most 8 tokens and 64 pairs, it is one launch on compute capability 9.0 or newer.
    """
    out = _ops.route_and_dispatch(
        hidden_states,
        weight,
        bias,
        top_k,
        **_changed(
            _ROUTE_AND_DISPATCH,
            expert_bias=expert_bias,
            score_function=score_function,
            scores_after_topk=scores_after_topk,
            renormalize=renormalize,
            renormalize_epsilon=renormalize_epsilon,
            scaling_factor=scaling_factor,
            num_groups=num_groups,
            topk_groups=topk_groups,
            group_score=group_score,
        ),
    )
    return RouterOutput(*out[:4]), DispatchPlan(*out[4:])


def gather(hidden_states: Tensor, plan: DispatchPlan) -> Tensor:
    """Rows [P, H] of hidden_states [T, H] in slot order; slots of nobody are zero."""
    return _ops.gather(hidden_states, plan.slot_index, plan.token_slot, plan.expert_offsets)


def experts(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_weights: Tensor,
    plan: DispatchPlan,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "swiglu",
    activation_alpha: float = 1.702,
    activation_limit: float = 7.0,
    interleaved: bool = False,
    weight_on_input: bool = False,
    recompute: bool = False,
) -> Tensor:
    """The grouped MLP over a plan, summed into tokens: [T, H] in hidden_states' dtype (autocast's under autocast).

    gate_up_proj [E, 2 * I, H] ([E, I, H] ungated), down_proj [E, H, I] and biases [E, 2 * I], [E, H] have
    hidden_states' dtype; topk_weights [T, K] is float32, or float64 where hidden_states is.
    """
    return _ops.experts(
        hidden_states,
        gate_up_proj,
        down_proj,
        topk_weights,
        plan.slot_index,
        plan.token_slot,
        plan.expert_offsets,
        **_changed(
            _EXPERTS,
            gate_up_bias=gate_up_bias,
            down_bias=down_bias,
            activation=activation,
            activation_alpha=activation_alpha,
            activation_limit=activation_limit,
            interleaved=interleaved,
            weight_on_input=weight_on_input,
            recompute=recompute,
        ),
    )


def grouped_linear(rows: Tensor, weight: Tensor, expert_offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows [P, in] by weight [E, out, in] (+ bias [E, out]), each slot by its expert's: [P, out]."""
    return _ops.grouped_linear(rows, weight, expert_offsets, bias)


def combine(rows: Tensor, topk_weights: Tensor | None, plan: DispatchPlan) -> Tensor:
    """[T, H]: every token's K rows of [P, H], summed by weight in order of k. No weights are ones."""
    return _ops.combine(rows, topk_weights, plan.slot_index, plan.token_slot, plan.expert_offsets)


def expert_counts(topk_ids: Tensor, num_experts: int, padding_mask: Tensor | None = None) -> Tensor:
    """How often topk_ids [S, L, K] name each expert: [S, E] int64. -1 and padding [S, L] do not count."""
    return _ops.expert_counts(topk_ids, num_experts, padding_mask)


def balance_loss(scores: Tensor, tokens_per_expert: Tensor, scale: float, padding_mask: Tensor | None = None) -> Tensor:
    """scale * sum over s, e of tokens_per_expert [S, E] * (sum over l of scores [S, L, E]); a scalar."""
    return _ops.balance_loss(scores, tokens_per_expert, scale, padding_mask)


def z_loss(logits: Tensor, scale: float = 1.0, padding_mask: Tensor | None = None) -> Tensor:
    """scale * mean of logsumexp(logits [T, E])^2 over the tokens that are not padding [T]; a scalar, 0 of no tokens."""
    return _ops.z_loss(logits, scale, padding_mask)


def update_expert_bias(expert_bias: Tensor, tokens_per_expert: Tensor, rate: float, zero_mean: bool = False) -> None:
    """expert_bias [E] += rate * sign(mean(tokens_per_expert) - tokens_per_expert), in place."""
    _ops.update_expert_bias(expert_bias, tokens_per_expert, rate, zero_mean)


def accumulate_load(load: Tensor, tokens_per_expert: Tensor) -> None:
    """load [E] += tokens_per_expert [E], in place, but not while a backward pass runs.

    A forward pass inside a backward pass is activation checkpointing computing a layer again: its tokens were counted.
    """
    if torch.compiler.is_compiling():
        load.add_(_ops.outside_backward(tokens_per_expert))
    elif torch._C._current_graph_task_id() == -1:
        load.add_(tokens_per_expert)


def _outside_backward(counts: Tensor) -> Tensor:
    return counts.clone() if torch._C._current_graph_task_id() == -1 else torch.zeros_like(counts)


# An operator, so that compiled code asks when it runs and not when it is traced; without in-place arguments, which
# selective checkpointing of compiled code can't pass on.
_library = torch.library.Library("fastmoe_cpp", "FRAGMENT")
_library.define("outside_backward(Tensor counts) -> Tensor")
_library.impl("outside_backward", _outside_backward, "CompositeExplicitAutograd")
_library.impl("outside_backward", torch.empty_like, "Meta")
