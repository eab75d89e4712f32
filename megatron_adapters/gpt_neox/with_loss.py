"""The MoE layer of GPT-NeoX's moe_loss era: DeepSpeed's interface, gates of one or two experts with a capacity."""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmoe_cpp import losses, ops

from .arguments import HOST, ArgumentError

#: What the gradient of a loss is multiplied by where backward begins (loss scaling, accumulation), by device. Kept by
#: ``install``; the moe_losses' own gradients are scaled by it.
_loss_scales: dict[torch.device, Tensor] = {}


def loss_scale(device: torch.device) -> Tensor:
    """The scalar on a device that scales the gradients of moe_losses; 1 where nobody sets it."""
    if device not in _loss_scales:
        _loss_scales[device] = torch.ones((), device=device)
    return _loss_scales[device]


class Routing(NamedTuple):
    """What the gate decided for T tokens."""

    topk_ids: Tensor  #: [T, K] int64
    scores: Tensor  #: [T, E] float32 softmax
    moe_loss: Tensor  #: scalar, float32
    priority: Tensor  #: [T, K]: who stays where an expert is full, the largest first


class _Linear(nn.Module):
    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(like.weight.detach().clone())
        self.bias = nn.Parameter(like.bias.detach().clone())


class _Expert(nn.Module):
    """The host's ParallelMLP's tensors: ``dense_h_to_4h`` and ``dense_4h_to_h``, weight and bias."""

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        self.dense_h_to_4h, self.dense_4h_to_h = _Linear(like.dense_h_to_4h), _Linear(like.dense_4h_to_h)


class _Gate(nn.Module):
    def __init__(self, hidden: int, experts: int, device: torch.device) -> None:
        super().__init__()
        self.wg = nn.Linear(hidden, experts, bias=False, device=device, dtype=torch.float32)


class _Experts(nn.Module):
    def __init__(self, expert: nn.Module, experts: int) -> None:
        super().__init__()
        self.deepspeed_experts = nn.ModuleList(_Expert(expert) for _ in range(experts))


class _Gated(nn.Module):
    def __init__(self, hidden: int, expert: nn.Module, experts: int) -> None:
        super().__init__()
        self.gate = _Gate(hidden, experts, expert.dense_h_to_4h.weight.device)
        self.experts = _Experts(expert, experts)


class MoEWithLoss(nn.Module):
    """In the place of DeepSpeed's MoE, with its arguments, its parameters' names and its three values.

    expert is the host's ParallelMLP; every expert starts as a copy of it. ``forward`` returns the output, moe_loss (a
    scalar of x's dtype on x's device on every path) and the counts [E]. In training, with ``loss_coefficient`` above 0,
    the gradient of loss_coefficient * moe_loss flows with the output's, once, scaled as the loss is; the moe_loss
    returned is detached, so that whoever adds it to a loss adds a number.
    """

    def __init__(
        self,
        hidden_size: int,
        expert: nn.Module,
        num_experts: int = 1,
        ep_size: int = 1,
        k: int = 1,
        capacity_factor: float = 1.0,
        eval_capacity_factor: float = 1.0,
        min_capacity: int = 4,
        use_residual: bool = False,
        noisy_gate_policy: str | None = None,
        drop_tokens: bool = True,
        use_rts: bool = True,
        use_tutel: bool = False,
        enable_expert_tensor_parallelism: bool = False,
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("ep_size", ep_size, (1,)),
            ("k", k, (1, 2)),
            ("noisy_gate_policy", noisy_gate_policy, (None,)),
            ("use_tutel", use_tutel, (False,)),
            ("enable_expert_tensor_parallelism", enable_expert_tensor_parallelism, (False,)),
        ):
            if value not in allowed:
                words = " or ".join(map(repr, allowed))
                raise ArgumentError(f"{HOST}: {name} is not honoured: it must be {words}, got {value!r}")
        if not 1 <= k <= num_experts:
            raise ArgumentError(f"{HOST}: k must be between 1 and num_experts = {num_experts}, got {k}")
        self.hidden_size, self.num_experts, self.k = hidden_size, num_experts, k
        self.capacity_factor, self.eval_capacity_factor = capacity_factor, eval_capacity_factor
        self.min_capacity, self.drop_tokens, self.use_rts = min_capacity, drop_tokens, use_rts
        self.activation = _activation_of(expert)
        self.loss_coefficient = 0.0
        self.deepspeed_moe = _Gated(hidden_size, expert, num_experts)
        self.use_residual = use_residual
        self.mlp: nn.Module | None = None
        if use_residual:
            self.mlp = copy.deepcopy(expert)
            weight = expert.dense_h_to_4h.weight
            self.coefficient = nn.Linear(hidden_size, 2, device=weight.device, dtype=weight.dtype)

    def capacity(self, tokens: int) -> int | None:
        """The most tokens an expert takes: ceil(k * factor * tokens / num_experts), at least min_capacity."""
        if not self.drop_tokens:
            return None
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        return max(math.ceil(tokens / self.num_experts * factor * self.k), self.min_capacity)

    def route(self, rows: Tensor) -> Routing:
        """rows [T, H] to experts: the best, and with k of 2 the best of the rest (in training with Gumbel noise)."""
        logits = ops.router_logits(rows.float(), self.deepspeed_moe.gate.wg.weight)
        _, first, scores = ops.route(logits, 1, renormalize=False)
        counts = ops.expert_counts(first[None], self.num_experts)
        # E * sum over e of (share of the first choices) * (mean probability)
        tokens = max(rows.shape[0], 1)
        moe_loss = ops.balance_loss(scores[None], counts.float() / tokens**2, float(self.num_experts))
        if self.k == 1:
            random = self.use_rts and self.training
            priority = torch.rand_like(scores[:, :1]) if random else _by_position(first)
            return Routing(first, scores, moe_loss, priority)
        rest = logits.detach()
        if self.training:
            rest = rest - torch.empty_like(rest).exponential_().log()
        second = ops.route(rest.scatter(1, first, -math.inf), 1, renormalize=False)[1]
        ids = torch.cat([first, second], dim=1)
        # every first choice before every second one, as in the host
        return Routing(ids, scores, moe_loss, _by_position(ids.t().reshape(-1, 1)).reshape(2, -1).t())

    def forward(self, hidden_states: Tensor, used_token: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., H] to (output of its shape and dtype, moe_loss, exp_counts [E] int64 of the first choices)."""
        if used_token is not None:
            raise ValueError("used_token must be None: there is no mask of used tokens here, got a tensor")
        if hidden_states.shape[-1] != self.hidden_size:
            raise ValueError(f"x must have shape [..., {self.hidden_size}], got {list(hidden_states.shape)}")
        rows = hidden_states.reshape(-1, self.hidden_size)
        routing = self.route(rows)
        plan = ops.dispatch(
            routing.topk_ids,
            self.num_experts,
            topk_weights=routing.priority,
            capacity=self.capacity(rows.shape[0]),
            drop_policy="probs",
        )
        weights = routing.scores.gather(1, routing.topk_ids)
        if self.k == 2:
            # of the experts that have room
            weights = weights * (plan.token_slot >= 0)
            weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=torch.finfo(weights.dtype).eps)
        output = self._experts(rows, weights, plan).reshape(hidden_states.shape)
        if self.mlp is not None:
            dense = self.mlp(hidden_states)
            if isinstance(dense, tuple):
                dense, bias = dense
                dense = dense if bias is None else dense + bias
            share = torch.softmax(self.coefficient(hidden_states), dim=-1)
            output = output * share[..., :1] + dense * share[..., 1:]
        if self.training and self.loss_coefficient > 0 and torch.is_grad_enabled():
            scaled = self.loss_coefficient * routing.moe_loss
            output = losses.add_gradient(output, scaled, loss_scale(output.device))
        counts = ops.expert_counts(routing.topk_ids[None, :, :1], self.num_experts)[0]
        return output, routing.moe_loss.detach().to(hidden_states.dtype), counts

    def _experts(self, rows: Tensor, weights: Tensor, plan: Any) -> Tensor:
        experts = self.deepspeed_moe.experts.deepspeed_experts

        def stacked(linear: str, kind: str) -> Tensor:
            return torch.stack([getattr(getattr(expert, linear), kind) for expert in experts])

        return ops.experts(
            rows,
            stacked("dense_h_to_4h", "weight"),
            stacked("dense_4h_to_h", "weight"),
            weights,
            plan,
            gate_up_bias=stacked("dense_h_to_4h", "bias"),
            down_bias=stacked("dense_4h_to_h", "bias"),
            activation=self.activation,
        )


def _by_position(ids: Tensor) -> Tensor:
    """[N, 1] that falls with the row, exactly: what makes 'probs' keep the first."""
    count = ids.shape[0]
    return torch.arange(count, 0, -1, dtype=torch.float64, device=ids.device).reshape(-1, 1)


def _activation_of(expert: nn.Module) -> str:
    name = getattr(expert, "activation_type", None)
    known = {"gelu": "gelu", "relu": "relu", "silu": "silu", "swish": "silu"}
    if name not in known:
        raise ArgumentError(f"{HOST}: activation of the experts must be one of {', '.join(known)}, got {name!r}")
    return "gelu_tanh" if name == "gelu" and getattr(expert, "bias_gelu_fusion", False) else known[name]
