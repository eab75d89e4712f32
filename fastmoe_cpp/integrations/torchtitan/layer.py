"""What both series of TorchTitan share: its router's rule, and its experts' three weights on our operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import ops
from ...outputs import DispatchPlan


class Routing(NamedTuple):
    """What a router decided, by name; every field is always there."""

    topk_weights: Tensor  #: [T, K] float32
    topk_ids: Tensor  #: [T, K] int64
    scores: Tensor  #: [T, E] float32: the score function over all experts


@dataclass(frozen=True)
class RoutingRule:
    """The settings of TorchTitan's TokenChoiceTopKRouter."""

    top_k: int
    score_function: str
    renormalize: bool
    scaling_factor: float
    num_groups: int
    topk_groups: int
    round_robin: bool

    @classmethod
    def of(cls, router: Any) -> RoutingRule:
        """Of a router module; ValueError for a score function or a number of groups that it can't have."""
        if router.score_func not in ("softmax", "sigmoid"):
            raise ValueError(f"score_func must be 'softmax' or 'sigmoid', got {router.score_func!r}")
        groups, kept = router.num_expert_groups, router.num_limited_groups
        if groups is not None:
            if kept is None:
                raise ValueError("num_limited_groups must be set where num_expert_groups is, got None")
            if router.num_experts % groups or router.num_experts // groups < 2:
                raise ValueError(
                    f"num_expert_groups must divide num_experts = {router.num_experts} into groups of at least 2, "
                    f"got {groups}"
                )
        return cls(
            top_k=router.top_k,
            score_function=router.score_func,
            renormalize=router.route_norm,
            scaling_factor=router.route_scale,
            num_groups=groups or 1,
            topk_groups=kept if groups else 1,
            round_robin=router._debug_force_load_balance,
        )


def route(logits: Tensor, rule: RoutingRule, expert_bias: Tensor | None) -> Routing:
    """The K experts of each token: logits [T, E], and a bias [E] of the selection alone."""
    tokens, num_experts = logits.shape
    ids = None
    if rule.round_robin:
        ids = torch.arange(tokens * rule.top_k, device=logits.device).reshape(tokens, rule.top_k) % num_experts
    return Routing(
        *ops.route(
            logits if logits.dtype == torch.float64 else logits.float(),
            rule.top_k,
            expert_bias=expert_bias,
            topk_ids=ids,
            score_function=rule.score_function,
            renormalize=rule.renormalize,
            renormalize_epsilon=1e-20,
            scaling_factor=rule.scaling_factor,
            num_groups=rule.num_groups,
            topk_groups=rule.topk_groups,
            group_score="top2_sum",
        )
    )


class Assignment:
    """Which expert computes what, for an experts module.

    Neither a tuple nor a dataclass, so that FSDP, which casts the tensors in what a module is given to the dtype of its
    parameters, leaves the routing weights in float32.
    """

    __slots__ = ("plan", "topk_weights", "weight_on_input")

    def __init__(self, topk_weights: Tensor, plan: DispatchPlan, weight_on_input: bool) -> None:
        self.topk_weights = topk_weights
        self.plan = plan
        self.weight_on_input = weight_on_input


_ACTIVATION = ("swiglu", 1.702, 7.0)


class _Experts(torch.autograd.Function):
    # gate_up_proj is w1 and w3 in one: made for a pass and dropped after it, since keeping it for backward would hold
    # most of the experts' weights a second time, and under FSDP past their resharding.
    @staticmethod
    def forward(ctx, x, w1, w2, w3, topk_weights, slot_index, token_slot, expert_offsets, weight_on_input):
        output, pre_activation = torch.ops.fastmoe_cpp.experts_forward(
            x, torch.cat([w1, w3], dim=1), w2, topk_weights, slot_index, token_slot, expert_offsets, None, None,
            *_ACTIVATION, False, weight_on_input, any(ctx.needs_input_grad),
        )  # fmt: skip
        ctx.save_for_backward(x, w1, w2, w3, topk_weights, slot_index, token_slot, expert_offsets, pre_activation)
        ctx.weight_on_input = weight_on_input
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        x, w1, w2, w3, topk_weights, slot_index, token_slot, expert_offsets, pre_activation = ctx.saved_tensors
        for_x, for_w1, for_w2, for_w3, for_weights = ctx.needs_input_grad[:5]
        grad_x, grad_gate_up, grad_w2, grad_weights, _, _ = torch.ops.fastmoe_cpp.experts_backward(
            grad_output, x, torch.cat([w1, w3], dim=1), w2, topk_weights, slot_index, token_slot, expert_offsets, None,
            None, pre_activation, *_ACTIVATION, False, ctx.weight_on_input,
            [for_x, for_w1 or for_w3, for_w2, for_weights, False, False],
        )  # fmt: skip
        inner = w1.shape[1]
        return (
            grad_x if for_x else None,
            grad_gate_up[:, :inner] if for_w1 else None,
            grad_w2 if for_w2 else None,
            grad_gate_up[:, inner:] if for_w3 else None,
            grad_weights if for_weights else None,
            None, None, None, None,
        )  # fmt: skip


def experts(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, assignment: Assignment) -> Tensor:
    """x [T, H] to [T, H] in its dtype: w2 (silu(w1 x) * w3 x), summed over each token's experts by weight.

    w1 and w3 are [E, I, H], w2 [E, H, I], of x's dtype outside autocast.
    """
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        narrow = torch.get_autocast_dtype(x.device.type)
        x, w1, w2, w3 = (t.to(narrow) for t in (x, w1, w2, w3))
    plan = assignment.plan
    weights = assignment.topk_weights.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return _Experts.apply(
        x, w1, w2, w3, weights, plan.slot_index, plan.token_slot, plan.expert_offsets, assignment.weight_on_input
    ).to(dtype)
