"""FastMoE's building blocks: counting a gate's choices, and moving rows to experts and back, on one process or many.

Symbols: T tokens, K choices a token, W processes of ``num_expert`` experts each, E = W * num_expert, N the choices that
are not dropped. Expert e is local expert e % num_expert of process e // num_expert. A choice of -1 is dropped.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from .. import ops, parallel
from .utils import get_torch_default_comm, group_of

# Not kept alive: its threads must end where the program destroys it, and not with the interpreter.
_moe_group: Callable[[], dist.ProcessGroup | None] | None = None


def ensure_comm(t: Tensor, comm: dist.ProcessGroup | None) -> None:
    """Makes comm (None: all processes) the group that gates and functions use when none is named.

    FMoE does so before each pass, so layers of different groups can be mixed. t, a tensor, is not looked at.
    """
    global _moe_group
    group = get_torch_default_comm() if comm is None else comm
    _moe_group = weakref.ref(group) if isinstance(group, dist.ProcessGroup) else lambda: group


def get_moe_group() -> dist.ProcessGroup | None:
    """The group of the last ensure_comm(), None before the first and once that group is gone."""
    return None if _moe_group is None else _moe_group()


def exchange_counts(counts: Tensor, world_size: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """counts [W * n], n for each process, become [W * n], n from each; counts itself where world_size is 1.

    group None is that of the last ensure_comm(), or all processes. Raises ValueError unless it has W processes.
    """
    if world_size == 1:
        return counts
    group = get_moe_group() if group is None else group
    return parallel.exchange_counts(counts, group_of(group, world_size, "moe_group"), operation="counts of tokens")


def exchange_rows(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup | None = None) -> Tensor:
    """Rows [sum(send), ...] in order of destination become [sum(receive), ...] in order of source; differentiable."""
    group = get_moe_group() if group is None else group
    group = group_of(group, len(send), "moe_group")
    return parallel.all_to_all_rows(rows, send, receive, group, operation="exchange of tokens")


def count_by_gate(
    gate: Tensor, num_expert: int, world_size: int, require_pos: bool = True
) -> tuple[Tensor | None, Tensor, Tensor]:
    """pos [N], the choices of gate [T] or [T, K] in order of expert, and how many each expert gets, int64.

    local_expert_count [E] counts this process's choices; global_expert_count [W * num_expert] the choices that every
    process in turn sends to each expert of this one. pos, None unless required, numbers choices t * K + k and is stable
    within an expert. Raises ValueError for an id outside -1 .. E - 1.
    """
    with torch.no_grad():
        plan = ops.dispatch(gate.reshape(-1, 1), num_expert * world_size)
        local = plan.tokens_per_expert
        global_ = exchange_counts(local, world_size)
        pos = plan.slot_index[: int(plan.expert_offsets[-1])].long() if require_pos else None
    return pos, local, global_


def prepare_forward(gate: Tensor, num_expert: int, world_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """What a pass needs of gate [T] or [T, K]: pos, the two counts, fwd_expert_count [num_expert] and fwd_batch_size.

    The counts are on the CPU, pos on gate's device. fwd_expert_count is the number of rows of each expert here,
    fwd_batch_size their sum.
    """
    pos, local, global_ = count_by_gate(gate, num_expert, world_size)
    assert pos is not None
    local, global_ = local.cpu(), global_.cpu()
    here = global_.view(world_size, num_expert).sum(dim=0)
    return pos, local, global_, here, int(here.sum())


def _per_process(counts: Tensor, world_size: int) -> list[int]:
    return counts.reshape(world_size, -1).sum(dim=1).tolist()


def _by_expert(global_expert_count: Tensor, world_size: int, device: torch.device) -> Tensor:
    """Received rows lie in order of process, then expert; this permutation puts them in order of expert, then process.

    [sum(global_expert_count)] int64.
    """
    expert = torch.arange(global_expert_count.numel() // world_size).repeat(world_size)
    return torch.argsort(expert.repeat_interleave(global_expert_count.cpu()), stable=True).to(device)


class MOEScatter:
    """Rows to their experts."""

    @staticmethod
    def apply(
        inp: Tensor,
        pos: Tensor,
        local_expert_count: Tensor,
        global_expert_count: Tensor,
        fwd_batch_size: int,
        world_size: int,
    ) -> Tensor:
        """inp[pos], exchanged between processes: [fwd_batch_size, ...] in order of this process's experts.

        inp is [T, ...], pos [N] the token of each choice, in order of expert; the counts are prepare_forward()'s.
        """
        rows = inp.index_select(0, pos)
        if world_size > 1:
            rows = exchange_rows(
                rows, _per_process(local_expert_count, world_size), _per_process(global_expert_count, world_size)
            )
            rows = rows.index_select(0, _by_expert(global_expert_count, world_size, rows.device))
        if rows.shape[0] != fwd_batch_size:
            raise ValueError(
                f"fwd_batch_size must be the number of rows received, {rows.shape[0]}, got {fwd_batch_size}"
            )
        return rows


class MOEGather:
    """Rows back from their experts."""

    @staticmethod
    def apply(
        global_output_buf: Tensor,
        pos: Tensor,
        local_expert_count: Tensor,
        global_expert_count: Tensor,
        local_batch_size: int,
        world_size: int,
    ) -> Tensor:
        """[local_batch_size, ...]: row i of those that MOEScatter sent away lies at pos[i]; the rest is zero."""
        rows = global_output_buf
        if world_size > 1:
            back = torch.argsort(_by_expert(global_expert_count, world_size, rows.device))
            rows = exchange_rows(
                rows.index_select(0, back),
                _per_process(global_expert_count, world_size),
                _per_process(local_expert_count, world_size),
            )
        return rows.new_zeros(local_batch_size, *rows.shape[1:]).index_copy(0, pos, rows)


def _slices(size: int, world_size: int) -> list[int]:
    """Where each process's part of size rows begins, and the end of the last: parts differ by one row at most."""
    return [size * r // world_size for r in range(world_size + 1)]


def _gather_parts(part: Tensor, sizes: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """Every process's part [sizes[r], ...], one after the other."""
    padded = part.new_zeros(max(sizes), *part.shape[1:])
    padded[: part.shape[0]] = part
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([p[:n] for p, n in zip(parts, sizes, strict=True)])


class AllGather(Function):
    """Every process's rows, one after the other, on all of them. Backward takes this process's part of the gradient."""

    @staticmethod
    def forward(ctx, inp: Tensor, rank: int, world_size: int, group: dist.ProcessGroup | None) -> Tensor:
        mine = torch.tensor([inp.shape[0]], device=inp.device)
        gathered = [torch.empty_like(mine) for _ in range(world_size)]
        dist.all_gather(gathered, mine, group=group)
        sizes = torch.cat(gathered).tolist()
        ctx.begin, ctx.size = sum(sizes[:rank]), inp.shape[0]
        return _gather_parts(inp, sizes, group)

    @staticmethod
    def backward(ctx, grad_out: Tensor):
        return grad_out[ctx.begin : ctx.begin + ctx.size], None, None, None


class Slice(Function):
    """This process's part of rows that all processes hold alike; backward gathers every part's gradient.

    Process r of W takes rows B * r // W to B * (r + 1) // W of B: every row is some process's, whatever B is.
    """

    @staticmethod
    def forward(ctx, inp: Tensor, rank: int, world_size: int, group: dist.ProcessGroup | None) -> Tensor:
        bounds = _slices(inp.shape[0], world_size)
        ctx.bounds, ctx.group = bounds, group
        return inp[bounds[rank] : bounds[rank + 1]].clone()

    @staticmethod
    def backward(ctx, grad_out: Tensor):
        sizes = [end - begin for begin, end in zip(ctx.bounds, ctx.bounds[1:], strict=False)]
        return _gather_parts(grad_out.contiguous(), sizes, ctx.group), None, None, None
