"""The way of a batch's rows to their experts and back, on one process or over a group of them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .. import ops
from .functions import exchange_counts, exchange_rows


class Dispatch:
    """The plan for ids [T, K], -1 for a dropped choice, of W processes with num_expert experts each.

    Between processes rows travel in order of expert, process by process; there `local` is the plan that puts the R rows
    received in order of this process's experts, one choice a row. On one process `local` is the plan of the tokens.
    """

    def __init__(self, ids: Tensor, num_expert: int, world_size: int, group: dist.ProcessGroup | None) -> None:
        self.shape = tuple(ids.shape)
        self.num_expert, self.world_size, self.group = num_expert, world_size, group
        self.plan = self.local = ops.dispatch(ids, num_expert * world_size)
        if world_size == 1:
            return
        counts = self.plan.tokens_per_expert
        received = exchange_counts(counts, world_size, group)
        # the one wait for the device: how many rows go where must be known on the host
        sizes = torch.stack([counts, received]).view(2, world_size, num_expert).sum(dim=-1).tolist()
        self.send, self.receive = sizes
        expert = torch.arange(num_expert, device=ids.device).repeat(world_size)
        expert = expert.repeat_interleave(received, output_size=sum(self.receive))
        self.local = ops.dispatch(expert[:, None], num_expert)

    def expert_counts(self) -> Tensor:
        """Rows of each expert here: [num_expert] int64 on the CPU."""
        return self.local.expert_offsets.diff().long().cpu()

    def to_process(self, tokens: Tensor) -> Tensor:
        """tokens [T, ...] to the rows [R, ...] received, in order of process, then expert."""
        rows = _gather(tokens, self.plan, sum(self.send))
        return exchange_rows(rows, self.send, self.receive, self.group)

    def from_process(self, rows: Tensor, weights: Tensor | None) -> Tensor:
        """The reverse: rows [R, ...] to tokens [T, ...], each token's K rows summed by weights [T, K] (None: ones)."""
        return _combine(exchange_rows(rows, self.receive, self.send, self.group), weights, self.plan)

    def to_experts(self, tokens: Tensor) -> Tensor:
        """tokens [T, ...] to the rows of the experts here, in order of expert."""
        if self.world_size > 1:
            rows = self.to_process(tokens)
            return _gather(rows, self.local, rows.shape[0])
        return _gather(tokens, self.plan, int(self.plan.expert_offsets[-1]))

    def from_experts(self, rows: Tensor, weights: Tensor | None) -> Tensor:
        """The reverse: rows [.., ...] to tokens [T, ...], each token's K rows summed by weights [T, K] (None: ones)."""
        if self.world_size > 1:
            return self.from_process(_combine(rows, None, self.local), weights)
        return _combine(rows, weights, self.plan)

    def to_choices(self, rows: Tensor) -> Tensor:
        """from_experts without the sum: [T * K, ...], zero for a dropped choice."""
        plan = self.plan
        each = plan._replace(token_slot=plan.token_slot.reshape(-1, 1))
        if self.world_size > 1:
            rows = exchange_rows(_combine(rows, None, self.local), self.receive, self.send, self.group)
        return _combine(rows, None, each)


def _gather(tokens: Tensor, plan: ops.DispatchPlan, count: int) -> Tensor:
    """The count rows in order of slot."""
    if not tokens.is_floating_point():
        return tokens[plan.slot_index[:count].long() // max(plan.token_slot.shape[1], 1)]
    rows = ops.gather(tokens.reshape(tokens.shape[0], _width(tokens)), plan)[:count]
    return rows.reshape(count, *tokens.shape[1:])


def _combine(rows: Tensor, weights: Tensor | None, plan: ops.DispatchPlan) -> Tensor:
    """The sum of each token's rows [n, ...], slots past n being nobody's."""
    flat = rows.reshape(rows.shape[0], _width(rows))
    missing = plan.slot_index.numel() - rows.shape[0]
    if missing:
        flat = torch.cat([flat, flat.new_zeros(missing, flat.shape[1])])
    if weights is not None:
        weights = weights.to(torch.float64 if rows.dtype == torch.float64 else torch.float32)
    return ops.combine(flat, weights, plan).reshape(plan.token_slot.shape[0], *rows.shape[1:])


def _width(rows: Tensor) -> int:
    return rows.shape[1:].numel()
