"""Weight gradients that backward adds to a buffer in float32, as Megatron's gradient_accumulation_fusion does it.

A buffer is a weight's attribute ``main_grad``, of its shape, contiguous, float32 (float64 for float64 weights). Where
the weight also has ``grad_added_to_main_grad``, backward sets that to True and gives ``weight.grad`` a tensor without
meaning, so that the data-parallel wrapper's hook runs and can tell; it throws the tensor away. Otherwise
``weight.grad`` stays None.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _C, ops
from .outputs import DispatchPlan

_ops = torch.ops.fastmoe_cpp
_WEIGHTS = ("gate_up_proj", "down_proj")


def _buffer(name: str, weight: Tensor) -> Tensor | None:
    """The weight's main_grad, None where it has none; ValueError where it does not fit."""
    buffer = getattr(weight, "main_grad", None)
    if buffer is None:
        return None
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if not isinstance(buffer, Tensor) or buffer.shape != weight.shape or buffer.dtype != dtype:
        found = f"{buffer.dtype} {list(buffer.shape)}" if isinstance(buffer, Tensor) else type(buffer).__name__
        raise ValueError(f"{name}.main_grad must be a {dtype} tensor {list(weight.shape)}, got {found}")
    return buffer


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, gate_up_proj, down_proj, topk_weights, gate_up_bias, down_bias, plan, *options):
        # the weights themselves: it is they who have a main_grad, when backward comes
        ctx.weights = (gate_up_proj, down_proj)
        ctx.biases = (gate_up_bias, down_bias)
        *curve, recompute, narrow = options
        cast = [*ctx.weights, *ctx.biases]
        if narrow:
            cast = [None if t is None else t.to(hidden_states.dtype) for t in cast]
        given = (hidden_states, *cast[:2], topk_weights, *plan[:3], *cast[2:])
        output, pre_activation = _ops.experts_forward(*given, *curve, not recompute)
        ctx.save_for_backward(*given, None if recompute else pre_activation)
        ctx.curve = curve
        ctx.own = not recompute and _C.saves_for_itself()
        ctx.overwritten = False
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        buffers = [
            _buffer(name, weight) if wanted else None
            for name, weight, wanted in zip(_WEIGHTS, ctx.weights, ctx.needs_input_grad[1:3], strict=True)
        ]
        if ctx.overwritten:
            raise RuntimeError(
                "experts: a backward that failed has overwritten what forward kept; run forward again, or let backward "
                "keep the graph (retain_graph=True)"
            )
        wanted = list(ctx.needs_input_grad[:6])
        saved = ctx.saved_tensors
        ctx.overwritten = ctx.own and _C.last_use(saved[-1], grad_output)
        x, up, down, weights, up_bias, down_bias = _ops.experts_backward_accumulate(
            grad_output, *saved, *ctx.curve, wanted, *buffers, saved[-1] if ctx.overwritten else None
        )
        found: list[Tensor | None] = [x, up, down, weights, up_bias, down_bias]
        for i, like in zip((1, 2, 4, 5), (*ctx.weights, *ctx.biases), strict=True):
            if wanted[i]:
                found[i] = found[i].to(like.dtype)
        for i, weight, buffer in zip((1, 2), ctx.weights, buffers, strict=True):
            if buffer is not None:
                found[i] = _in_place_of_grad(weight)
        return *(t if w else None for t, w in zip(found, wanted, strict=True)), None, *[None] * (len(ctx.curve) + 2)


def _in_place_of_grad(weight: Tensor) -> Tensor | None:
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    make = torch.zeros_like if getattr(weight, "zero_out_wgrad", False) else torch.empty_like
    return make(weight, requires_grad=False)


@torch.compiler.disable
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
    """ops.experts, whose backward adds the gradients of gate_up_proj and down_proj to their main_grad, if there is one.

    The sum is float32's: on the CPU and on Hopper GPUs the products themselves are added in float32, on CUDA's portable
    path their result in the weights' dtype is. A weight without a main_grad gets its gradient as usual, and so does
    everything else. Eager: it ends a graph of torch.compile. Raises ValueError for a main_grad of another shape or
    dtype.
    """
    options: dict[str, Any] = {
        "activation": activation, "activation_alpha": activation_alpha, "activation_limit": activation_limit,
        "interleaved": interleaved, "weight_on_input": weight_on_input, "recompute": recompute,
    }  # fmt: skip
    weights = (gate_up_proj, down_proj)
    fused = [_buffer(name, weight) is not None for name, weight in zip(_WEIGHTS, weights, strict=True)]
    if not torch.is_grad_enabled() or not any(f and w.requires_grad for f, w in zip(fused, weights, strict=True)):
        return ops.experts(
            hidden_states, *weights, topk_weights, plan, gate_up_bias=gate_up_bias, down_bias=down_bias, **options
        )
    device = hidden_states.device.type
    narrow = torch.is_autocast_enabled(device) and hidden_states.dtype != torch.float64
    if narrow:
        hidden_states = hidden_states.to(torch.get_autocast_dtype(device))
    topk_weights = topk_weights.to(torch.float64 if hidden_states.dtype == torch.float64 else torch.float32)
    return _Experts.apply(
        hidden_states, *weights, topk_weights, gate_up_bias, down_bias, plan, *options.values(), narrow
    )
