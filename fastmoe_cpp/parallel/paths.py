"""The ways rows go from rank to rank, behind one interface. Which one a group gets is decided once, and printable."""

from __future__ import annotations

from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from .exchange import all_to_all_rows, exchange_counts


class Path(Protocol):
    """One way to exchange rows within a group, in collectives that every rank calls in the same order."""

    #: What is printed and what `ExpertParallel(path=...)` takes.
    name: str

    def counts(self, counts: Tensor, operation: str) -> Tensor:
        """Block r of counts [W, ...] goes to rank r; the blocks from every rank come back, as in exchange_counts."""
        ...

    def rows(self, rows: Tensor, send_counts: list[int], recv_counts: list[int], operation: str) -> Tensor:
        """Differentiable, as all_to_all_rows."""
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


PATHS: dict[str, type[AllToAllSingle]] = {AllToAllSingle.name: AllToAllSingle}


def check_path(wanted: str) -> None:
    """ValueError for a name that is neither a path's nor 'auto'."""
    if wanted != "auto" and wanted not in PATHS:
        raise ValueError(f"path must be one of 'auto', {', '.join(map(repr, PATHS))}, got {wanted!r}")


def choose_path(wanted: str, group: dist.ProcessGroup) -> Path:
    """The path called `wanted`, or for 'auto' the best that the group can do."""
    return PATHS[AllToAllSingle.name if wanted == "auto" else wanted](group)
