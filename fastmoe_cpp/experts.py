"""The experts: routed ones over a plan, shared ones over every token, and the routed ones as a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import main_grad, ops
from .config import MoEConfig
from .outputs import DispatchPlan
from .reference import activate


class SpreadExperts(Protocol):
    """What computes an Experts module of which other ranks hold a part: parallel.experts.ParallelExperts is one."""

    def __call__(
        self,
        experts: Experts,
        hidden_states: Tensor,
        topk_weights: Tensor,
        plan: DispatchPlan,
        beside: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Experts.forward."""

    def draw(self, weight: Tensor, std: float) -> None:
        """Draws a weight from a normal distribution, other numbers for every rank's part of it."""


class Experts(nn.Module):
    """The routed experts of a MoEConfig, stored as checkpoints store them.

    ``gate_up_proj [E, 2 * I, H]`` (gate rows, then up rows; alternating where interleaved; ``[E, I, H]`` for ungated
    activations), ``down_proj [E, H, I]``, and where configured ``gate_up_bias [E, 2 * I]`` and ``down_bias [E, H]``.
    """

    def __init__(
        self, config: MoEConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        #: What computes the experts where other ranks hold some of them (parallel.ExpertParallel sets it).
        self.parallel: SpreadExperts | None = None
        experts, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.gate_up_proj = parameter(experts, config.gate_up_size, hidden)
        self.down_proj = parameter(experts, hidden, inner)
        self.register_parameter("gate_up_bias", parameter(experts, config.gate_up_size) if config.bias else None)
        self.register_parameter("down_bias", parameter(experts, hidden) if config.bias else None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Weights from a normal distribution of standard deviation initializer_range, biases 0."""
        for weight in (self.gate_up_proj, self.down_proj):
            if self.parallel is None:
                weight.normal_(0.0, self.config.initializer_range)
            else:
                self.parallel.draw(weight, self.config.initializer_range)
        for bias in (self.gate_up_bias, self.down_bias):
            if bias is not None:
                bias.zero_()

    def forward(
        self,
        hidden_states: Tensor,
        topk_weights: Tensor,
        plan: DispatchPlan,
        beside: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """[T, H] of hidden_states [T, H] and topk_weights [T, K] over the plan that ops.dispatch made of the ids.

        beside(hidden_states) [T, H], such as the shared experts, is added; over ranks it hides their exchange.
        """
        if self.parallel is not None:
            return self.parallel(self, hidden_states, topk_weights, plan, beside)
        c = self.config
        experts = main_grad.experts if c.gradient_accumulation_fusion else ops.experts
        output = experts(
            hidden_states,
            self.gate_up_proj,
            self.down_proj,
            topk_weights,
            plan,
            gate_up_bias=self.gate_up_bias,
            down_bias=self.down_bias,
            activation=c.activation,
            activation_alpha=c.activation_alpha,
            activation_limit=c.activation_limit,
            interleaved=c.interleaved,
            weight_on_input=c.weight_on_input,
            recompute=c.recompute,
        )
        return output if beside is None else output + beside(hidden_states)

    def extra_repr(self) -> str:
        """Sizes for repr()."""
        c = self.config
        return (
            f"num_experts={c.num_experts}, hidden_size={c.hidden_size}, intermediate_size={c.intermediate_size}, "
            f"activation={c.activation!r}, bias={c.bias}" + (f", {self.parallel}" if self.parallel else "")
        )


class SharedExperts(nn.Module):
    """The experts every token visits, as one MLP: ``gate_up_proj [2 * I, H]`` (or ``[I, H]``), ``down_proj [H, I]``.

    With shared_expert_gate also ``gate [1, H]``: the output is scaled by sigmoid(x @ gate.T), one number a token.
    """

    def __init__(
        self, config: MoEConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        if config.shared_intermediate_size is None:
            raise ValueError("MoEConfig.shared_intermediate_size must be an integer of at least 1, got None")
        self.config = config
        hidden, inner = config.hidden_size, config.shared_intermediate_size

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.gate_up_proj = parameter(inner * (2 if config.gated else 1), hidden)
        self.down_proj = parameter(hidden, inner)
        self.register_parameter("gate", parameter(1, hidden) if config.shared_expert_gate else None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Every weight from a normal distribution of standard deviation initializer_range."""
        for weight in self.parameters():
            weight.normal_(0.0, self.config.initializer_range)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., H] to [..., H]."""
        c = self.config
        inner = activate(
            F.linear(hidden_states, self.gate_up_proj), c.activation, c.activation_alpha, c.activation_limit
        )
        output = F.linear(inner, self.down_proj)
        if self.gate is None:
            return output
        return torch.sigmoid(F.linear(hidden_states, self.gate)) * output

    def extra_repr(self) -> str:
        """Sizes for repr()."""
        c = self.config
        return (
            f"hidden_size={c.hidden_size}, intermediate_size={c.shared_intermediate_size}, "
            f"activation={c.activation!r}, gate={c.shared_expert_gate}"
        )


def fused_experts(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    activation: str = "swiglu",
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation_alpha: float = 1.702,
    activation_limit: float = 7.0,
    interleaved: bool = False,
    weight_on_input: bool = False,
    capacity: int | None = None,
    drop_policy: str = "position",
    padding_mask: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """Each token's K experts, summed by weight: hidden_states [..., H] to [..., H] in its dtype.

    gate_up_proj [E, 2 * I, H] (gate rows, then up rows, or interleaved; [E, I, H] ungated), down_proj [E, H, I] and the
    optional biases [E, 2 * I], [E, H] have hidden_states' dtype. topk_ids [..., K] is int32 or int64, -1 for a dropped
    pair; topk_weights [..., K] is of any floating dtype. capacity is the most tokens an expert takes, None without
    limit; padding_mask [...] bool is True for padding. Gradients go to hidden_states, the projections, the biases and
    topk_weights.

    Raises ValueError for shapes that do not fit or (on the CPU) an id outside -1 .. E - 1, and TypeError for dtypes
    that do not fit: one sentence with the argument, what was expected and what was given. On CUDA an id out of range
    is found by the kernel, without waiting for the device: it prints the sentence and traps.
    """
    if hidden_states.dim() < 1:
        raise ValueError("hidden_states must have shape [..., H], got a scalar")
    leading = hidden_states.shape[:-1]
    for name, tensor in {"topk_ids": topk_ids, "topk_weights": topk_weights}.items():
        if tensor.dim() < 1 or tensor.shape[:-1] != leading or tensor.shape[-1] < 1:
            expected = ", ".join([*map(str, leading), "K"])
            raise ValueError(
                f"{name} must have shape [{expected}] with K of at least 1 for hidden_states "
                f"{list(hidden_states.shape)}, got {list(tensor.shape)}"
            )
    if topk_weights.shape != topk_ids.shape:
        raise ValueError(
            f"topk_weights must have shape {list(topk_ids.shape)} as topk_ids, got {list(topk_weights.shape)}"
        )
    if padding_mask is not None:
        check_padding_mask(padding_mask, hidden_states)
        padding_mask = padding_mask.reshape(-1)
    if gate_up_proj.dim() != 3:
        raise ValueError(f"gate_up_proj must have shape [E, 2 * I, H], got {list(gate_up_proj.shape)}")
    if not topk_weights.is_floating_point():
        raise TypeError(f"topk_weights must be of a floating dtype, got {topk_weights.dtype}")
    topk_ids = topk_ids.reshape(-1, topk_ids.shape[-1])
    weights_dtype = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
    weights = topk_weights.reshape(-1, topk_weights.shape[-1]).to(weights_dtype)
    plan = ops.dispatch(
        topk_ids,
        gate_up_proj.shape[0],
        topk_weights=weights.detach() if drop_policy == "probs" else None,
        capacity=capacity,
        drop_policy=drop_policy,
        padding_mask=padding_mask,
    )
    output = ops.experts(
        hidden_states.reshape(-1, hidden_states.shape[-1]),
        gate_up_proj,
        down_proj,
        weights,
        plan,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        activation=activation,
        activation_alpha=activation_alpha,
        activation_limit=activation_limit,
        interleaved=interleaved,
        weight_on_input=weight_on_input,
        recompute=recompute,
    )
    return output.reshape(hidden_states.shape)


def check_padding_mask(padding_mask: Tensor, hidden_states: Tensor) -> None:
    """Raises unless padding_mask is bool and [...] for hidden_states [..., H]."""
    if padding_mask.dtype != torch.bool:
        raise TypeError(f"padding_mask must be bool, True for padding, got {padding_mask.dtype}")
    if padding_mask.shape != hidden_states.shape[:-1]:
        raise ValueError(
            f"padding_mask must have shape {list(hidden_states.shape[:-1])} for hidden_states "
            f"{list(hidden_states.shape)}, got {list(padding_mask.shape)}"
        )
