"""The routed experts where every rank of a group holds some of them: dispatch, experts, combine across ranks.

A token's row goes once to every rank that holds at least one of its experts, together with its K weights and ids. That
rank sums the token's experts by weight, and one row comes back, so a token costs 2 * min(K, W) rows at the most, not
2 * K. In one forward pass the group has four collectives, in backward three, whatever the data:

    forward: counts, (weights | ids), rows, and back the sums; backward: the same rows and weights, the other way

The counts are read on the host, once a pass: all_to_all_single takes its sizes there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from .. import experts as one_rank
from .. import ops
from ..outputs import DispatchPlan
from .paths import Path


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad * ctx.scale, None


def experts_of_pairs(plan: DispatchPlan) -> Tensor:
    """[T, K] int64: the expert that serves each pair, -1 where the pair is dropped."""
    return torch.searchsorted(plan.expert_offsets, plan.token_slot, right=True) - 1


def ranks_of_tokens(ranks: Tensor, size: int) -> Tensor:
    """Ranks of pairs [T, K] (-1 for none) to the distinct ranks of each token [T, min(K, size)], ascending, then -1."""
    ranks = torch.where(ranks < 0, size, ranks).sort(dim=1).values
    again = F.pad(ranks[:, 1:] == ranks[:, :-1], (1, 0))
    ranks = ranks.masked_fill(again, size).sort(dim=1).values[:, : min(ranks.shape[1], size)]
    return ranks.masked_fill(ranks == size, -1)


class ParallelExperts:
    """Computes an Experts module whose parameters are sharded by expert over the `size` ranks of a path's group.

    gradient_scale multiplies the gradients of the experts' parameters.
    """

    def __init__(self, path: Path, rank: int, size: int, gradient_scale: float) -> None:
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
        self, experts: one_rank.Experts, hidden_states: Tensor, topk_weights: Tensor, plan: DispatchPlan
    ) -> Tensor:
        """Experts.forward: [T, H] of this rank's hidden_states [T, H] and topk_weights [T, K]. A collective."""
        tokens, top_k = plan.token_slot.shape
        if tokens * top_k != plan.slot_index.numel():
            raise ValueError(f"plan must have {tokens * top_k} slots, got {plan.slot_index.numel()}")
        device = hidden_states.device.type
        if torch.is_autocast_enabled(device) and hidden_states.dtype != torch.float64:
            # what the experts would do first, before it is sent
            hidden_states = hidden_states.to(torch.get_autocast_dtype(device))
        each = experts.config.num_experts // self.size
        ids = experts_of_pairs(plan)
        ranks = torch.where(ids < 0, -1, ids // each)
        send_plan = ops.dispatch(ranks_of_tokens(ranks, self.size), self.size)
        send, recv, width, pairs = self._counts(ranks, send_plan.tokens_per_expert)
        send_plan = send_plan._replace(slot_index=send_plan.slot_index[: sum(send)])

        # ids below 1,024 are exact in float32
        choices = torch.cat([topk_weights, ids.to(topk_weights.dtype)], dim=1)
        choices = self._dispatch(choices, send_plan, send, recv, "expert-parallel dispatch of weights")
        rows = self._dispatch(hidden_states, send_plan, send, recv, "expert-parallel dispatch")
        weights, local_ids = self._own(choices, top_k, each, width)
        plan = ops.dispatch(local_ids, each)
        # only so many of a row's `width` places are taken
        rows = self._experts(experts, rows, weights, plan._replace(slot_index=plan.slot_index[:pairs]))
        rows = self.path.rows(rows, recv, send, "expert-parallel combine")
        return ops.combine(rows, None, send_plan)

    def _counts(self, ranks: Tensor, rows_to: Tensor) -> tuple[list[int], list[int], int, int]:
        """Rows to and from every rank; of the latter's experts here, the most that one row has, and those of all."""
        together = (ranks[:, :, None] == ranks[:, None, :]).sum(dim=-1).masked_fill(ranks < 0, 0)
        widest = torch.zeros_like(rows_to).scatter_reduce_(
            0, ranks.clamp(min=0).flatten(), together.flatten(), "amax", include_self=True
        )
        pairs = torch.zeros_like(rows_to).scatter_add_(0, ranks.clamp(min=0).flatten(), (ranks >= 0).flatten().long())
        sent = torch.stack([rows_to, widest, pairs], dim=1)
        received = self.path.counts(sent, "expert-parallel counts")
        on_host = torch.stack([sent, received]).tolist()
        send, recv = ([rows for rows, *_ in side] for side in on_host)
        _, widths, pairs_from = zip(*on_host[1], strict=True)
        return send, recv, max(1, *widths), sum(pairs_from)

    def _dispatch(self, x: Tensor, plan: DispatchPlan, send: list[int], recv: list[int], operation: str) -> Tensor:
        return self.path.rows(ops.gather(x, plan), send, recv, operation)

    def _own(self, choices: Tensor, top_k: int, each: int, width: int) -> tuple[Tensor, Tensor]:
        """Weights and local ids [R, width] of the choices [R, 2 * K] that fall on this rank, in order of k; then -1."""
        weights, ids = choices[:, :top_k], choices[:, top_k:].detach().long() - self.rank * each
        ids = ids.masked_fill((ids < 0) | (ids >= each), -1)
        if width < top_k:
            order = (ids < 0).to(torch.int8).sort(dim=1, stable=True).indices[:, :width]
            weights, ids = weights.gather(1, order), ids.gather(1, order)
        return weights, ids

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
