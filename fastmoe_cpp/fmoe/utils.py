"""Process groups by FastMoE's names, and the checks that its layers and gates share."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def get_torch_default_comm() -> dist.ProcessGroup:
    """The group of all processes. Raises RuntimeError before torch.distributed.init_process_group()."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "torch.distributed must be initialised (torch.distributed.init_process_group) before processes exchange "
            "tokens or gradients, and it is not"
        )
    return dist.group.WORLD


def get_rank_0_in_comm(comm: dist.ProcessGroup) -> int:
    """The global rank of a group's first process."""
    return dist.get_global_rank(comm, 0)


def group_of(comm: dist.ProcessGroup | None, world_size: int, name: str) -> dist.ProcessGroup:
    """comm, or all processes where it is None; ValueError unless it has world_size processes, this one among them."""
    group = get_torch_default_comm() if comm is None else comm
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"{name} must be a ProcessGroup that this process is in, got {group!r}")
    if group.size() != world_size:
        which = "all processes" if comm is None else name
        raise ValueError(f"world_size must be the number of processes in {which}, {group.size()}, got {world_size}")
    return group


def positive(owner: str, **sizes: Any) -> None:
    """ValueError, naming the argument, unless every value is an integer of at least 1."""
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{owner}: {name} must be an integer of at least 1, got {value!r}")
