"""SWIPE: as many tokens for every process, by sending the overflow elsewhere instead of dropping it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ... import ops
from ..functions import exchange_counts, get_moe_group
from .naive_gate import NaiveGate


class SwipeGate(NaiveGate):
    """Top-k, where in training no process takes more than T * top_k choices, T the tokens of one process.

    The k-th choices are placed one k after the other. Where a process is full, what is over goes to the next one with
    room, to its expert k % num_expert. Scores are the softmax of the logits of the experts in the end. No loss.
    """

    @torch.no_grad()
    def swipe_once(self, idx: Tensor, capacity: Tensor | int, bias: int) -> tuple[Tensor, Tensor]:
        """One choice a token, idx [T], placed within what this process has left: the new [T] and the new capacity.

        capacity is what this process can still take, bias the local expert that overflow goes to.
        """
        world, capacity = self.world_size, int(capacity)
        if world == 1:
            taken = min(capacity, idx.numel())
            return idx, torch.tensor(capacity - taken)
        process = idx // self.num_expert
        wanted = ops.expert_counts(process.view(1, -1, 1), world)[0]
        asked = exchange_counts(wanted, world)
        # this process takes from the others in order of rank
        granted = torch.minimum(asked, (capacity - (asked.cumsum(0) - asked)).clamp(min=0))
        sent = exchange_counts(granted, world)
        group = get_moe_group()
        over = asked - granted
        dist.all_reduce(over, group=group)
        left = torch.full((1,), capacity, device=idx.device) - granted.sum()
        room = torch.empty(world, dtype=left.dtype, device=idx.device)
        dist.all_gather_into_tensor(room, left, group=group)
        moved = _fill(over, room)
        rank = dist.get_rank(group)
        sent_more = moved[rank]
        # the first choices of a process stay, in order of token; the others go where there is room, in order of rank
        plan = ops.dispatch(process[:, None], world)
        place = plan.token_slot[:, 0] - plan.expert_offsets[:-1][process]
        stays = place < (sent + sent_more)[process]
        free = (sent + sent_more) - torch.minimum(wanted, sent + sent_more)
        targets = torch.repeat_interleave(torch.arange(world, device=idx.device), free)
        new = idx.clone()
        new[~stays] = targets * self.num_expert + bias
        return new, (left[0] - moved[:, rank].sum()).cpu()

    def forward(self, inp: Tensor) -> tuple[Tensor, Tensor]:
        """inp [T, d_model] to ids [T, K] int64 and scores [T, K]."""
        ids, scores, _, logits = self.choose(inp)
        if not self.training:
            return ids, scores.to(inp.dtype)
        capacity: Tensor | int = logits.shape[0] * self.top_k
        columns = []
        for k in range(self.top_k):
            column, capacity = self.swipe_once(ids[:, k], capacity, k % self.num_expert)
            columns.append(column)
        ids = torch.stack(columns, dim=1)
        return ids, torch.softmax(logits.gather(1, ids), dim=-1).to(inp.dtype)


def _fill(over: Tensor, room: Tensor) -> Tensor:
    """How many of over[i] go to process j: [W, W], the sources in order filling the rooms in order.

    The same numbers on every process. Both are intervals on one line, and the answer is how much two of them overlap.
    """
    source_end, room_end = over.cumsum(0), room.cumsum(0)
    begin = torch.maximum((source_end - over)[:, None], (room_end - room)[None, :])
    end = torch.minimum(source_end[:, None], room_end[None, :])
    return (end - begin).clamp(min=0)
