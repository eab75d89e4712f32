"""The routed experts where every rank of a group holds some of them: dispatch, experts, combine across ranks.

A token's row goes once to every rank that holds at least one of its experts, together with its K weights and ids. That
rank sums the token's experts by weight, and one row comes back, so a token costs 2 * min(K, W) rows at the most, not
2 * K. In one forward pass the group has four collectives, in backward three, whatever the data:

    forward: counts, (weights | ids), rows, and back the sums; backward: the same rows and weights, the other way

The counts are read on the host, once a pass: all_to_all_single takes its sizes there.

Where ranks also hold parts of the same experts (tensor.py), all of this goes on between those that hold the same part,
and what comes back is summed over the parts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .. import experts as one_rank
from .. import ops
from ..outputs import DispatchPlan
from .paths import Path
from .symmetric import SymmetricMemory
from .tensor import TensorParallel, in_halves


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad * ctx.scale, None


@dataclass
class _Chunk:
    """Some of the tokens: their rows [t, H], choices [t, 2 * K] and the plan by ranks; counts there and back."""

    rows: Tensor
    choices: Tensor
    plan: DispatchPlan
    there: tuple[list[int], list[int]] = ([], [])
    back: tuple[list[int], list[int]] = ([], [])
    pairs: int = 0  #: of token and expert, that the other ranks send here


class ParallelExperts:
    """Computes an Experts module whose parameters are sharded by expert over the `size` ranks of a path's group.

    gradient_scale multiplies the gradients of the experts' parameters. Tokens go in `chunks` parts, of which one is
    computed while another travels. tensor has the ranks that hold parts of each expert; with them path may be None,
    where every rank has a part of all experts.
    """

    def __init__(
        self,
        path: Path | SymmetricMemory | None,
        rank: int,
        size: int,
        gradient_scale: float,
        chunks: int = 1,
        tensor: TensorParallel | None = None,
    ) -> None:
        self.path, self.rank, self.size, self.gradient_scale = path, rank, size, gradient_scale
        self.chunks, self.tensor = chunks, tensor

    def __deepcopy__(self, memo: dict) -> ParallelExperts:
        # the group belongs to the process, not to the module
        return self

    def __repr__(self) -> str:
        if self.path is None:
            return repr(self.tensor)
        chunks = f" in {self.chunks} chunks" if self.chunks > 1 else ""
        return f"expert_parallel=rank {self.rank} of {self.size} by {self.path.name}{chunks}" + (
            "" if self.tensor is None else f", {self.tensor}"
        )

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
        device = hidden_states.device.type
        added = None if beside is None else functools.cache(functools.partial(beside, hidden_states))
        if torch.is_autocast_enabled(device) and hidden_states.dtype != torch.float64:
            # what the experts would do first, before it is sent
            hidden_states = hidden_states.to(torch.get_autocast_dtype(device))
        if self.tensor is None:
            output = self._across(experts, hidden_states, topk_weights, plan, added)
        else:
            self.tensor.check_tokens(hidden_states, topk_weights, plan.token_slot)
            hidden_states, topk_weights = self.tensor.enter(hidden_states, topk_weights)
            wait = self.tensor.begin_sum(self._across(experts, hidden_states, topk_weights, plan, added))
            if added is not None:
                added()
            output = wait()
        return output if added is None else output + added()

    def _across(
        self,
        experts: one_rank.Experts,
        hidden_states: Tensor,
        topk_weights: Tensor,
        plan: DispatchPlan,
        beside: Callable[[], object] | None,
    ) -> Tensor:
        """[T, H] of the experts of all ranks of the path's group, each as much of it as is here.

        beside() is called while the sums are on their way, where the path can go on meanwhile.
        """
        if self.path is None:
            return self._experts(experts, hidden_states, topk_weights, plan)
        each, top_k = experts.config.num_experts // self.size, topk_weights.shape[1]
        if isinstance(self.path, SymmetricMemory):
            compute = functools.partial(self._experts, experts)
            return self.path.apply(compute, hidden_states, topk_weights, plan, each)
        chunks = self._chunks(hidden_states, topk_weights, plan, each)
        alone = len(chunks) == 1 and beside is None
        go = self._at_once if alone else self.path.begin
        coming = []
        for chunk in chunks:
            choices, rows = (ops.gather(x, chunk.plan) for x in (chunk.choices, chunk.rows))
            wait_for_choices = go(choices, *chunk.there, "expert-parallel dispatch of weights")
            coming.append((wait_for_choices, go(rows, *chunk.there, "expert-parallel dispatch")))
        returning = []
        for chunk, (wait_for_choices, wait_for_rows) in zip(chunks, coming, strict=True):
            choices, rows = wait_for_choices(), wait_for_rows()
            plan = ops.dispatch(self._own(choices[:, top_k:].detach(), each), each)
            # only so many of the rows' K places are taken here
            plan = plan._replace(slot_index=plan.slot_index[: chunk.pairs])
            rows = self._experts(experts, rows, choices[:, :top_k], plan)
            returning.append(go(rows, *chunk.back, "expert-parallel combine"))
        if beside is not None:
            beside()
        outputs = [ops.combine(wait(), None, chunk.plan) for chunk, wait in zip(chunks, returning, strict=True)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _chunks(self, hidden_states: Tensor, topk_weights: Tensor, plan: DispatchPlan, each: int) -> list[_Chunk]:
        """The tokens in consecutive parts of nearly equal size, as many parts on every rank. A collective."""
        tokens = hidden_states.shape[0]
        starts = [tokens * i // self.chunks for i in range(self.chunks + 1)]
        chunks, sent = [], []
        for first, last in zip(starts, starts[1:], strict=False):
            ids, ranks, pairs = torch.ops.fastmoe_cpp_symmetric.token_ranks(
                plan.token_slot[first:last], plan.expert_offsets, each, self.size
            )
            # ids below 1,024 are exact in float32
            choices = torch.cat([topk_weights[first:last], ids.to(topk_weights.dtype)], dim=1)
            chunks.append(_Chunk(hidden_states[first:last], choices, ops.dispatch(ranks, self.size)))
            sent.append(torch.stack([chunks[-1].plan.tokens_per_expert, pairs], dim=1))
        counts = torch.stack(sent, dim=1)
        received = self.path.counts(counts, "expert-parallel counts")
        # [chunks, 2 counts, 2 ways, W]
        for chunk, ((send, recv), (_, pairs)) in zip(
            chunks, torch.stack([counts, received]).permute(2, 3, 0, 1).tolist(), strict=True
        ):
            chunk.there, chunk.back, chunk.pairs = (send, recv), (recv, send), sum(pairs)
            chunk.plan = chunk.plan._replace(slot_index=chunk.plan.slot_index[: sum(send)])
        return chunks

    def _at_once(self, rows: Tensor, send: list[int], recv: list[int], operation: str) -> Callable[[], Tensor]:
        received = self.path.rows(rows, send, recv, operation)
        return lambda: received

    def _own(self, ids: Tensor, each: int) -> Tensor:
        """Ids of received rows [R, K] as those of this rank's experts, -1 for other ranks'."""
        ids = ids.int() - self.rank * each
        return ids.masked_fill((ids < 0) | (ids >= each), -1)

    def _experts(self, experts: one_rank.Experts, rows: Tensor, weights: Tensor, plan: DispatchPlan) -> Tensor:
        c = experts.config

        def local(name: str) -> Tensor | None:
            parameter = getattr(experts, name)
            if parameter is None:
                return None
            if isinstance(parameter, DTensor):
                halves = in_halves(name, parameter)
                parameter = parameter.to_local()
                parameter = parameter.flatten(1, 2) if halves else parameter
            if name == "down_bias" and self.tensor is not None:
                parameter = self.tensor.once(parameter)
            return parameter if self.gradient_scale == 1 else _ScaleGradient.apply(parameter, self.gradient_scale)

        return ops.experts(
            rows,
            local("gate_up_proj"),
            local("down_proj"),
            weights,
            plan,
            gate_up_bias=local("gate_up_bias"),
            down_bias=local("down_bias"),
            activation=c.activation,
            activation_alpha=c.activation_alpha,
            activation_limit=c.activation_limit,
            interleaved=c.interleaved,
            weight_on_input=c.weight_on_input,
            recompute=c.recompute,
        )
