"""Rows between the ranks of a group: the one collective of expert parallelism, with its gradient and its errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._extension import require
from ..groups import describe, failed, resolve

require()
_collectives = torch.ops._c10d_functional


def _counts(name: str, counts: Sequence[int] | Tensor, size: int) -> list[int]:
    if isinstance(counts, Tensor):
        if counts.device.type != "cpu" or counts.dtype not in (torch.int32, torch.int64):
            raise TypeError(
                f"{name} must be a list of int or an int32 or int64 tensor on the CPU, "
                f"got {counts.dtype} on {counts.device}"
            )
        counts = counts.tolist()
    counts = list(counts)
    if len(counts) != size:
        raise ValueError(f"{name} must hold {size} counts, one for each rank of the group, got {len(counts)}")
    if any(isinstance(c, bool) or not isinstance(c, int) or c < 0 for c in counts):
        raise ValueError(f"{name} must hold integers of at least 0, got {counts}")
    return counts


def _exchange(rows: Tensor, send: list[int], recv: list[int], group: dist.ProcessGroup, operation: str) -> Tensor:
    """Of integers, which have no gradient."""
    try:
        received = _collectives.all_to_all_single(rows.contiguous(), recv, send, group.group_name)
        return _collectives.wait_tensor(received)
    except RuntimeError as error:
        raise failed(f"{operation} of {rows.shape[0]} rows", group, error) from error


def all_to_all_rows(
    rows: Tensor,
    send_counts: Sequence[int] | Tensor,
    recv_counts: Sequence[int] | Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    operation: str = "all_to_all_rows",
) -> Tensor:
    """Sends consecutive rows [N, ...] to the ranks of a group; returns what they sent here, [sum(recv_counts), ...].

    send_counts (W integers, sum N) are the rows for each rank, in rank order; recv_counts are the rows from each, which
    the caller knows (exchange_counts). Both are lists or integer tensors on the CPU. A differentiable collective: every
    rank of the group calls it, also with no row at all, with the same dtype, the same trailing sizes and the same
    requires_grad; the gradient goes back the same way in a second collective. group None is the default group.
    operation is what errors call it.

    Raises ValueError or TypeError for counts that do not fit, and ExchangeError where the collective fails or runs into
    the group's timeout.
    """
    group = resolve(group)
    send = _counts("send_counts", send_counts, group.size())
    recv = _counts("recv_counts", recv_counts, group.size())
    if rows.dim() < 1:
        raise ValueError("rows must have shape [N, ...], got a scalar")
    if sum(send) != rows.shape[0]:
        raise ValueError(f"send_counts must sum to the {rows.shape[0]} rows, got {send} with sum {sum(send)}")
    if not rows.is_floating_point():
        return _exchange(rows, send, recv, group, operation)
    tail = rows.shape[1:]
    flat = rows.reshape(rows.shape[0], tail.numel())
    received = torch.ops.fastmoe_cpp.exchange(flat, send, recv, group.group_name, operation, describe(group))
    return received.reshape(sum(recv), *tail)


class _Way(NamedTuple):
    """One exchange as begin and end know it: counts there and back, and what errors call it."""

    send: list[int]
    recv: list[int]
    group: dist.ProcessGroup
    operation: str

    def back(self) -> _Way:
        return _Way(self.recv, self.send, self.group, f"{self.operation} backward")

    def begin(self, rows: Tensor) -> Tensor:
        """The collective's result, which nobody may read before end."""
        try:
            return _collectives.all_to_all_single(rows.contiguous(), self.recv, self.send, self.group.group_name)
        except RuntimeError as error:
            raise failed(f"{self.operation} of {rows.shape[0]} rows", self.group, error) from error

    def end(self, rows: Tensor) -> Tensor:
        try:
            return _collectives.wait_tensor(rows)
        except RuntimeError as error:
            raise failed(f"{self.operation} of {sum(self.send)} rows", self.group, error) from error


class _Begin(torch.autograd.Function):
    """Backward ends what _End's backward began, which comes by `returning`: a gradient has the shape of its tensor."""

    @staticmethod
    def forward(ctx, rows: Tensor, way: _Way, returning: list[Tensor]) -> Tensor:
        ctx.way, ctx.returning = way, returning
        return way.begin(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return ctx.way.back().end(ctx.returning.pop()), None, None


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, way: _Way, returning: list[Tensor]) -> Tensor:
        ctx.way, ctx.returning = way, returning
        return way.end(rows).view_as(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        ctx.returning.append(ctx.way.back().begin(grad))
        return grad, None, None


def begin_rows(
    rows: Tensor, send_counts: list[int], recv_counts: list[int], group: dist.ProcessGroup, operation: str
) -> Callable[[], Tensor]:
    """all_to_all_rows of rows [N, H] in two halves: what the returned function, called once, waits for and returns.

    Work between the two runs beside the exchange, and its backward beside the exchange of the gradient.
    """
    way = _Way(send_counts, recv_counts, group, operation)
    returning: list[Tensor] = []
    under_way = _Begin.apply(rows, way, returning)
    return lambda: _End.apply(under_way, way, returning)


@torch.no_grad()
def exchange_counts(
    counts: Tensor, group: dist.ProcessGroup | None = None, *, operation: str = "exchange_counts"
) -> Tensor:
    """Sends block r of counts [W * n] or [W, ...] to rank r; returns the blocks from every rank, in rank order.

    counts is an integer tensor of the same shape and dtype on every rank, on the group's device; so is the result.
    Rank r thus learns from tokens per expert [W * E_local] how many rows every rank has for each of its experts.
    """
    group = resolve(group)
    size = group.size()
    if counts.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"counts must be int32 or int64, got {counts.dtype}")
    if counts.dim() < 1 or counts.shape[0] % size:
        raise ValueError(f"counts must have a first size that {size} ranks divide, got {list(counts.shape)}")
    each = [counts.shape[0] // size] * size
    return _exchange(counts, each, each, group, operation)
