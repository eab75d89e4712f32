"""The layer: Megatron-Core's MoELayer, its way of a token replaced by ours."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastmoe_cpp import ops
from fastmoe_cpp.outputs import DispatchPlan
from fastmoe_cpp.parallel import all_to_all_rows, exchange_counts

from .configuration import check
from .experts import GroupedExperts
from .router import TopKRouter


def moe_submodules(shared_experts: Any = None) -> MoESubmodules:
    """Our experts and router as the parts of a MoELayer; shared_experts is the host's builder of them, by default its
    SharedExpertMLP on its own linear layers."""
    if shared_experts is None:
        local = LocalSpecProvider()
        linears = MLPSubmodules(linear_fc1=local.column_parallel_linear(), linear_fc2=local.row_parallel_linear())
        shared_experts = functools.partial(SharedExpertMLP, submodules=linears)
    return MoESubmodules(experts=GroupedExperts, shared_experts=shared_experts, router=TopKRouter)


class FastMoELayer(MoELayer):
    """A MoELayer whose routed tokens go through our operators: router, dispatch, experts, combine.

    Its ``router`` and ``experts`` are ours whatever the submodules name; ``shared_experts`` are the host's. No token is
    copied on one rank; over expert-parallel ranks rows travel once each way. Raises ArgumentError, naming the field,
    for a configuration that is not honoured.
    """

    def __init__(
        self,
        config: Any,
        submodules: Any = None,
        layer_number: int | None = None,
        pg_collection: Any = None,
        is_mtp_layer: bool = False,
        name: str | None = None,
    ) -> None:
        check(config)
        shared = getattr(submodules, "shared_experts", None)
        submodules = moe_submodules() if submodules is None else submodules
        submodules = dataclasses.replace(submodules, experts=GroupedExperts, router=TopKRouter)
        if shared is None and config.moe_shared_expert_intermediate_size is not None:
            submodules = dataclasses.replace(submodules, shared_experts=moe_submodules().shared_experts)
        rest = {"is_mtp_layer": is_mtp_layer, "name": name}
        known = inspect.signature(MoELayer.__init__).parameters
        rest = {key: value for key, value in rest.items() if key in known}
        # the one of the host's dispatchers that asks for nothing; it is not used
        dispatcher, config.moe_token_dispatcher_type = config.moe_token_dispatcher_type, "allgather"
        try:
            super().__init__(config, submodules, layer_number, pg_collection, **rest)
        finally:
            config.moe_token_dispatcher_type = dispatcher
        self.token_dispatcher = None
        self.moe_config = self.router.moe_config

    def forward(
        self, hidden_states: Tensor, intermediate_tensors: Any = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """hidden_states [s, b, H] to one tensor of its shape and dtype, and no bias.

        padding_mask [b, s] bool is True for padding: such tokens get no expert (the shared ones still see them), take
        no capacity and count in no loss and no load.
        """
        if intermediate_tensors is not None:
            raise ValueError("intermediate_tensors must be None: the layer is computed whole, got tensors")
        if self.training and self.attn_tp_group.size() > 1 and not self.config.sequence_parallel:
            raise ValueError(
                "sequence_parallel must be True where tensor parallelism and MoE are trained together, got False"
            )
        hidden_size = self.moe_config.hidden_size
        if hidden_states.dim() != 3 or hidden_states.shape[-1] != hidden_size:
            raise ValueError(f"hidden_states must have shape [s, b, {hidden_size}], got {list(hidden_states.shape)}")
        if padding_mask is not None:
            expected = [hidden_states.shape[1], hidden_states.shape[0]]
            if list(padding_mask.shape) != expected:
                raise ValueError(f"padding_mask must have shape [b, s] = {expected}, got {list(padding_mask.shape)}")
            padding_mask = padding_mask.transpose(0, 1).bool()
        if self.moe_layer_recompute and self.training:
            if hidden_states.is_cuda:
                return tensor_parallel.checkpoint(self._compute, False, hidden_states, padding_mask), None
            # the host's also keeps the states of CUDA's generators
            return checkpoint(self._compute, hidden_states, padding_mask, use_reentrant=True), None
        return self._compute(hidden_states, padding_mask), None

    def _compute(self, hidden_states: Tensor, padding_mask: Tensor | None) -> Tensor:
        shared = self.shared_experts_compute(hidden_states)
        routing = self.router.route(hidden_states, padding_mask)
        c = self.moe_config
        x = hidden_states.reshape(-1, c.hidden_size)
        plan = ops.dispatch(
            routing.topk_ids,
            c.num_experts,
            topk_weights=routing.topk_weights.detach() if c.drop_policy == "probs" else None,
            capacity=c.capacity(x.shape[0], self.training),
            drop_policy=c.drop_policy,
            padding_mask=None if padding_mask is None else padding_mask.reshape(-1),
        )
        if self.ep_group.size() == 1:
            output = self.experts.compute(x, routing.topk_weights, plan)
        else:
            output = self._over_ranks(x, routing.topk_weights, plan)
        output = output.to(hidden_states.dtype).reshape(hidden_states.shape)
        return output if shared is None else output + shared

    def _over_ranks(self, x: Tensor, topk_weights: Tensor, plan: DispatchPlan) -> Tensor:
        """[T, H]: rows to the ranks of their experts and back. The numbers of rows are read back to the host once."""
        ranks, local = self.ep_group.size(), self.num_local_experts
        here = plan.expert_offsets.diff().long()  # [ranks * local] rows for each expert
        there = exchange_counts(here, self.ep_group)  # the same, from each rank for the experts of this one
        send, receive = torch.stack([here, there]).reshape(2, ranks, local).sum(dim=2).tolist()
        rows = ops.gather(x, plan)
        slots = rows.shape[0]
        weights: Tensor | None = topk_weights
        if self.moe_config.weight_on_input:
            rows = rows * topk_weights.reshape(-1)[plan.slot_index.long().clamp(min=0)][:, None].to(rows.dtype)
            weights = None
        rows = all_to_all_rows(rows[: sum(send)], send, receive, self.ep_group, operation="expert dispatch")
        ids = torch.arange(local, device=x.device).repeat(ranks)
        ids = ids.repeat_interleave(there, output_size=sum(receive))
        one = torch.ones(rows.shape[0], 1, dtype=torch.float32, device=x.device)
        rows = self.experts.compute(rows, one, ops.dispatch(ids[:, None], local))
        rows = all_to_all_rows(rows, receive, send, self.ep_group, operation="expert combine")
        if rows.shape[0] < slots:
            rows = torch.cat([rows, rows.new_zeros(slots - rows.shape[0], rows.shape[1])])
        return ops.combine(rows, weights, plan)
