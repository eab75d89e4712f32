"""The ways rows go from rank to rank, behind one interface. Which one a group gets is decided once, and printable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from . import symmetric
from .exchange import all_to_all_rows, begin_rows, exchange_counts
from .symmetric import Needs, SymmetricMemory


class Path(Protocol):
    """One way to exchange rows within a group, in collectives that every rank calls in the same order.

    SymmetricMemory has `apply` in place of the two functions: there the whole pass is its own.
    """

    #: What is printed and what `ExpertParallel(path=...)` takes.
    name: str

    def counts(self, counts: Tensor, operation: str) -> Tensor:
        """Block r of counts [W, ...] goes to rank r; the blocks from every rank come back, as in exchange_counts."""
        ...

    def rows(self, rows: Tensor, send_counts: list[int], recv_counts: list[int], operation: str) -> Tensor:
        """Differentiable, as all_to_all_rows."""
        ...

    def begin(
        self, rows: Tensor, send_counts: list[int], recv_counts: list[int], operation: str
    ) -> Callable[[], Tensor]:
        """rows, but the caller goes on: the result waits, and returns them. Called once."""
        ...


class AllToAllSingle:
    """torch.distributed's all_to_all_single: any backend that has it (gloo, NCCL, MPI), on the CPU and on GPUs."""

    name = "all_to_all_single"

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def counts(self, counts: Tensor, operation: str) -> Tensor:
        return exchange_counts(counts, self.group, operation=operation)

    def rows(self, rows: Tensor, send_counts: list[int], recv_counts: list[int], operation: str) -> Tensor:
        return all_to_all_rows(rows, send_counts, recv_counts, self.group, operation=operation)

    def begin(
        self, rows: Tensor, send_counts: list[int], recv_counts: list[int], operation: str
    ) -> Callable[[], Tensor]:
        return begin_rows(rows, send_counts, recv_counts, self.group, operation)


PATHS = (AllToAllSingle.name, SymmetricMemory.name)


def check_path(wanted: str, max_tokens: int | None, max_rows: int | None) -> None:
    """ValueError for a name that is neither a path's nor 'auto', and for bounds that the path has not or lacks."""
    if wanted != "auto" and wanted not in PATHS:
        raise ValueError(f"path must be one of 'auto', {', '.join(map(repr, PATHS))}, got {wanted!r}")
    for name, bound in (("max_tokens", max_tokens), ("max_rows", max_rows)):
        if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int) or bound < 1):
            raise ValueError(f"{name} must be an integer of at least 1 or None, got {bound!r}")
        if bound is not None and wanted == AllToAllSingle.name:
            raise ValueError(f"{name} must be None for path {wanted!r}, which has no bound, got {bound}")
    if max_tokens is None and (wanted == SymmetricMemory.name or max_rows is not None):
        raise ValueError("max_tokens must be given for symmetric memory, which is set up once for the largest call")


def choose_path(
    wanted: str, group: dist.ProcessGroup, device: torch.device, needs: Needs | None
) -> Path | SymmetricMemory:
    """The path called `wanted`, or for 'auto' the best that the group can do. A collective.

    needs is None where no max_tokens was given. ValueError, the same on every rank, for what the group can't do.
    """
    if wanted == AllToAllSingle.name or needs is None:
        return AllToAllSingle(group)
    reason = symmetric.lacks(group, device)
    if reason is None:
        return SymmetricMemory(group, device, needs)
    if wanted == "auto":
        return AllToAllSingle(group)
    raise ValueError(f"path {wanted!r} needs GPUs of one host on NVLink, and this group is none: {reason}")
