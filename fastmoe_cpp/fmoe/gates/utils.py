"""Capacity, and the loss that GShard, DC and Faster gates share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import ops
from ..functions import count_by_gate, exchange_counts


@torch.no_grad()
def prune_by_count(topk_idx: Tensor, allowed: Tensor) -> Tensor:
    """topk_idx [T] or [T, K] with -1 for the choices beyond an expert's allowed [E], the first ones being kept."""
    flat = topk_idx.reshape(-1, 1)
    plan = ops.dispatch(flat, allowed.numel())
    expert = flat[:, 0].clamp(min=0).long()
    place = plan.token_slot[:, 0] - plan.expert_offsets[:-1][expert]
    keep = (plan.token_slot[:, 0] >= 0) & (place < allowed[expert])
    return torch.where(keep.view(topk_idx.shape), topk_idx, -1)


def grant(asked: Tensor, capacity: Tensor | int, world_size: int) -> Tensor:
    """Of asked [W * n], what each process in turn wants of n experts, as much as capacity leaves: [W * n]."""
    asked = asked.view(world_size, -1)
    before = asked.cumsum(0) - asked
    return torch.minimum(asked, (capacity - before).clamp(min=0)).reshape(-1)


@torch.no_grad()
def limit_by_capacity(
    topk_idx: Tensor, num_expert: int, world_size: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    """At most capacity choices for each expert, of all processes together; the rest becomes -1.

    Served are processes in order of rank, choices in order of token. Returns new_lec [W * num_expert], what this
    process may send, new_gec [W * num_expert], what this one receives from each, both int64, and the choices.
    """
    _, _, asked = count_by_gate(topk_idx, num_expert, world_size, require_pos=False)
    granted = grant(asked, capacity, world_size)
    mine = exchange_counts(granted, world_size)
    return mine, granted, prune_by_count(topk_idx, mine)


def capacity_of(rates: tuple[float, float], training: bool, tokens: int) -> int:
    """ceil(rate * tokens), of the first rate in training and the second in evaluation."""
    return math.ceil(rates[0 if training else 1] * tokens)


def check_capacity(owner: str, capacity: tuple[float, float]) -> tuple[float, float]:
    """Two rates of at least 0, in training and in evaluation; ValueError otherwise."""
    fine = isinstance(capacity, tuple | list) and len(capacity) == 2
    if not fine or not all(isinstance(c, int | float) and math.isfinite(c) and c >= 0 for c in capacity):
        raise ValueError(
            f"{owner}: capacity must be two numbers of at least 0, in training and in evaluation, got {capacity!r}"
        )
    return capacity


def gshard_loss(probs: Tensor, ids: Tensor, num_expert: int) -> Tensor:
    """mean over experts of c_e * m_e, times num_expert^2 (one process's experts): a scalar, 0 of no tokens.

    c_e is the share of tokens whose first choice ids[:, 0] is e, m_e the mean of probs[:, e] (arXiv 2006.16668).
    """
    tokens, experts = probs.shape
    counts = ops.expert_counts(ids[None, :, :1], experts).to(probs.dtype)
    return ops.balance_loss(probs[None], counts, num_expert**2 / (experts * max(tokens, 1) ** 2))


@torch.no_grad()
def drop_second_at_random(ids: Tensor, scores: Tensor) -> Tensor:
    """ids [T, 2] without the second choice where twice its score is below a uniform random number, one a token."""
    drawn = torch.rand(ids.shape[0], device=ids.device)
    return torch.stack([ids[:, 0], torch.where(2 * scores[:, 1] < drawn, -1, ids[:, 1])], dim=1)
