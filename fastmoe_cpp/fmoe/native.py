"""What gates written for FastMoE call of its native module, by the names it has there; install() makes it fmoe_cuda.

E is the number of experts in all, n_worker processes of n_expert each.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from .. import ops
from .functions import exchange_counts
from .gates.utils import grant, prune_by_count


@torch.no_grad()
def expert_count(gate_idx: Tensor, counts: Tensor) -> None:
    """Adds to counts [E] how often gate_idx names each expert; -1 does not count."""
    counts += ops.expert_counts(gate_idx.reshape(1, -1, 1), counts.numel())[0].to(counts.dtype)


@torch.no_grad()
def assign_pos(cum_count: Tensor, gate: Tensor, pos: Tensor) -> None:
    """Writes to pos [N] the places of gate that name an expert, in order of expert, stable within one.

    cum_count [E] are the running sums of expert_count(), the last of them N; unlike FastMoE's it is left as it is.
    """
    pos.copy_(ops.dispatch(gate.reshape(-1, 1), cum_count.numel()).slot_index[: pos.numel()])


def expert_exchange(local_expert_count: Tensor, n_expert: int, n_worker: int) -> Tensor:
    """Counts [n_worker * n_expert] for each process to those from each, in the group of ensure_comm()."""
    return exchange_counts(local_expert_count, n_worker)


def limit_by_capacity(expert_count: Tensor, capacity: Tensor, n_expert: int, n_worker: int) -> Tensor:
    """Of what each process asks for, [n_worker * n_expert], what capacity [n_expert] grants, in order of rank."""
    return grant(expert_count, capacity, n_worker)


def prune_gate_by_capacity(gate_idx: Tensor, expert_count: Tensor, n_expert: int, n_worker: int) -> Tensor:
    """gate_idx with -1 for the choices beyond expert_count [E], the first ones being kept."""
    return prune_by_count(gate_idx, expert_count)


def __getattr__(name: str) -> NoReturn:
    raise AttributeError(
        f"fastmoe_cpp has no fmoe_cuda.{name}: it has what gates call, and fmoe.functions for the rest"
    )
