"""The routed experts where every rank of a group holds some of them: dispatch, experts, combine across ranks.

A token's row goes once to every rank that holds at least one of its experts, together with its K weights and ids. That
rank sums the token's experts by weight, and one row comes back, so a token costs 2 * min(K, W) rows at the most, not
2 * K. In one forward pass the group has four collectives, in backward three, whatever the data:

    forward: counts, (weights | ids), rows, and back the sums; backward: the same rows and weights, the other way

The counts are read on the host, once a pass: all_to_all_single takes its sizes there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .. import experts as one_rank
from .. import ops
from ..outputs import DispatchPlan
from .paths import Path
from .symmetric import SymmetricMemory


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad * ctx.scale, None


class ParallelExperts:
    """Computes an Experts module whose parameters are sharded by expert over the `size` ranks of a path's group.

    gradient_scale multiplies the gradients of the experts' parameters.
    """

    def __init__(self, path: Path | SymmetricMemory, rank: int, size: int, gradient_scale: float) -> None:
        self.path, self.rank, self.size, self.gradient_scale = path, rank, size, gradient_scale

    def __deepcopy__(self, memo: dict) -> ParallelExperts:
        # the group belongs to the process, not to the module
        return self

    def __repr__(self) -> str:
        return f"expert_parallel=rank {self.rank} of {self.size} by {self.path.name}"

    def draw(self, weight: Tensor, std: float) -> None:
        """Draws a weight from a normal distribution, other numbers for every rank's part of it."""
        if not isinstance(weight, DTensor) or weight.device.type != "cpu":
            weight.normal_(0.0, std)
            return
        # DTensor keeps no random state on the CPU: ranks of one seed would draw the same experts
        seed = int(torch.randint(2**62, ()))
        for dim, placement in enumerate(weight.placements):
            if not placement.is_replicate():
                seed = (seed * 1_000_003 + weight.device_mesh.get_local_rank(dim) + 1) % 2**62
        weight.to_local().normal_(0.0, std, generator=torch.Generator().manual_seed(seed))

    # traced, every pass's counts would be constants of a graph of its own
    @torch.compiler.disable
    def __call__(
        self,
        experts: one_rank.Experts,
        hidden_states: Tensor,
        topk_weights: Tensor,
        plan: DispatchPlan,
        beside: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Experts.forward: [T, H] of this rank's hidden_states [T, H] and topk_weights [T, K]. A collective.

        beside(hidden_states) [T, H] is added to it: computed while the sums are on their way, and its backward while
        their gradients are, where the path can go on meanwhile.
        """
        tokens, top_k = plan.token_slot.shape
        if tokens * top_k != plan.slot_index.numel():
            raise ValueError(f"plan must have {tokens * top_k} slots, got {plan.slot_index.numel()}")
        given, device = hidden_states, hidden_states.device.type
        if torch.is_autocast_enabled(device) and hidden_states.dtype != torch.float64:
            # what the experts would do first, before it is sent
            hidden_states = hidden_states.to(torch.get_autocast_dtype(device))
        each = experts.config.num_experts // self.size
        if isinstance(self.path, SymmetricMemory):
            compute = functools.partial(self._experts, experts)
            output = self.path.apply(compute, hidden_states, topk_weights, plan, each)
            return output if beside is None else output + beside(given)
        ids, ranks, pairs = torch.ops.fastmoe_cpp_symmetric.token_ranks(
            plan.token_slot, plan.expert_offsets, each, self.size
        )
        send_plan = ops.dispatch(ranks, self.size)
        send, recv, received_pairs = self._counts(send_plan.tokens_per_expert, pairs)
        send_plan = send_plan._replace(slot_index=send_plan.slot_index[: sum(send)])

        # ids below 1,024 are exact in float32
        choices = torch.cat([topk_weights, ids.to(topk_weights.dtype)], dim=1)
        choices = self._dispatch(choices, send_plan, send, recv, "expert-parallel dispatch of weights")
        rows = self._dispatch(hidden_states, send_plan, send, recv, "expert-parallel dispatch")
        plan = ops.dispatch(self._own(choices[:, top_k:].detach(), each), each)
        # only so many of the rows' K places are taken here
        plan = plan._replace(slot_index=plan.slot_index[:received_pairs])
        rows = self._experts(experts, rows, choices[:, :top_k], plan)
        if beside is None:
            return ops.combine(self.path.rows(rows, recv, send, "expert-parallel combine"), None, send_plan)
        arrive = self.path.begin(rows, recv, send, "expert-parallel combine")
        shared = beside(given)
        return ops.combine(arrive(), None, send_plan) + shared

    def _counts(self, rows_to: Tensor, pairs_to: Tensor) -> tuple[list[int], list[int], int]:
        """Rows to every rank, rows from every rank, and all pairs of token and expert among the latter."""
        sent = torch.stack([rows_to, pairs_to], dim=1)
        received = self.path.counts(sent, "expert-parallel counts")
        (send, _), (recv, pairs) = torch.stack([sent, received]).transpose(1, 2).tolist()
        return send, recv, sum(pairs)

    def _dispatch(self, x: Tensor, plan: DispatchPlan, send: list[int], recv: list[int], operation: str) -> Tensor:
        return self.path.rows(ops.gather(x, plan), send, recv, operation)

    def _own(self, ids: Tensor, each: int) -> Tensor:
        """Ids of received rows [R, K] as those of this rank's experts, -1 for other ranks'."""
        ids = ids.int() - self.rank * each
        return ids.masked_fill((ids < 0) | (ids >= each), -1)

    def _experts(self, experts: one_rank.Experts, rows: Tensor, weights: Tensor, plan: DispatchPlan) -> Tensor:
        c = experts.config

        def local(parameter: Tensor | None) -> Tensor | None:
            if parameter is None:
                return None
            if isinstance(parameter, DTensor):
                parameter = parameter.to_local()
            return parameter if self.gradient_scale == 1 else _ScaleGradient.apply(parameter, self.gradient_scale)

        return ops.experts(
            rows,
            local(experts.gate_up_proj),
            local(experts.down_proj),
            weights,
            plan,
            gate_up_bias=local(experts.gate_up_bias),
            down_bias=local(experts.down_bias),
            activation=c.activation,
            activation_alpha=c.activation_alpha,
            activation_limit=c.activation_limit,
            interleaved=c.interleaved,
            weight_on_input=c.weight_on_input,
            recompute=c.recompute,
        )
