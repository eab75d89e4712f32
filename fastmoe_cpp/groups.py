"""Process groups: which one is meant, what it is called, and what to raise where one of its collectives fails."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

#: A collective failed or ran out of time; the message names it, the group, this rank and the cause.
#: (A torch that was built without torch.distributed has no such class, and one rank needs none.)
ExchangeError: type[RuntimeError] = getattr(dist, "DistBackendError", RuntimeError)


def resolve(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The group itself, or for None the default one; raises RuntimeError where this process is in none."""
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("torch.distributed must be initialized (init_process_group, or torchrun), and is not")
    if group is None:
        return dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"group must be a ProcessGroup that this rank is in, got {group!r}")
    return group


def describe(group: dist.ProcessGroup) -> str:
    """'rank 1 of 4 in group 'ep' (global rank 5)'."""
    name = group.group_desc if group.group_desc not in ("", "undefined") else group.group_name
    return f"rank {group.rank()} of {group.size()} in group {name!r} (global rank {dist.get_rank()})"


def failed(operation: str, group: dist.ProcessGroup, error: BaseException) -> ExchangeError:
    """What to raise from a collective's error."""
    cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ExchangeError(f"{operation} failed on {describe(group)}: {cause}")


def sum_over_ranks(counts: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """A copy of counts summed over a group's ranks, or counts itself where there is no group."""
    if group is None:
        return counts
    counts = counts.clone()
    try:
        dist.all_reduce(counts, group=group)
    except RuntimeError as error:
        raise failed("sum_over_ranks", group, error) from error
    return counts
