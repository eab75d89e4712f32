"""Experts of which every rank of a group holds a part of the intermediate size, for the same tokens on every rank.

A rank's part of the gate and up rows and of the down columns gives a part of every output's sum, so that a forward pass
has one all_reduce, of the outputs [T, H], and a backward pass two, of the gradients of hidden_states [T, H] and of the
routing weights [T, K] (Megatron-LM, arXiv 1909.08053, section 3). Everything outside of the experts is computed by
every rank alike.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from ..config import MoEConfig
from ..groups import describe, failed
from .agreement import gathered

_collectives = torch.ops._c10d_functional


def has_halves(config: MoEConfig) -> bool:
    """Whether gate_up_proj is gate rows, then up rows, of which a rank has a part each."""
    return config.gated and not config.interleaved


def in_halves(name: str, parameter: Tensor) -> bool:
    """Whether an expert parameter is kept as [E, 2, I, ...], gate and up apart."""
    return name.startswith("gate_up") and parameter.dim() == (3 if name.endswith("bias") else 4)


def to_parts(name: str, parameter: Tensor, config: MoEConfig) -> tuple[Tensor, Placement]:
    """The parameter of that name as it is sharded over the group, and how.

    A rank's gate and up rows are not one slice of [E, 2 * I, ...], so that is kept as [E, 2, I, ...].
    """
    if name == "down_bias":
        return parameter, Replicate()
    if name == "down_proj":
        return parameter, Shard(2)
    return (parameter.unflatten(1, (2, -1)), Shard(2)) if has_halves(config) else (parameter, Shard(1))


def _checksum(tensor: Tensor) -> int:
    """Of its bits, so that equal NaN are equal."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return int(tensor.detach().contiguous().view(integers).sum(dtype=torch.int64))


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states: Tensor, topk_weights: Tensor, ranks: TensorParallel):
        ctx.ranks = ranks
        return hidden_states.view_as(hidden_states), topk_weights.view_as(topk_weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        names = ("hidden_states' gradient", "routing weights' gradient")
        wanted = list(zip(names, grads, ctx.needs_input_grad, strict=False))
        under_way = [ctx.ranks.begin(grad, name) if needed else None for name, grad, needed in wanted]
        sums = [None if x is None else ctx.ranks.end(x, name) for x, name in zip(under_way, names, strict=True)]
        return *sums, None


class _Begin(torch.autograd.Function):
    """The gradient of the sum is that of each summand, the same on every rank."""

    @staticmethod
    def forward(ctx, partial: Tensor, ranks: TensorParallel) -> Tensor:
        return ranks.begin(partial, "outputs")

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return grad, None


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx, under_way: Tensor, ranks: TensorParallel) -> Tensor:
        return ranks.end(under_way, "outputs").view_as(under_way)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return grad, None


class _OnOneRank(torch.autograd.Function):
    """Of a tensor that every rank adds: itself on the first rank and 0 on the others, its whole gradient on all."""

    @staticmethod
    def forward(ctx, tensor: Tensor, first: bool) -> Tensor:
        return tensor.view_as(tensor) if first else torch.zeros_like(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return grad, None


class TensorParallel:
    """A group whose ranks have the same tokens and each a part of every expert's intermediate size."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self._checked = False

    def __repr__(self) -> str:
        return f"expert_tensor_parallel=rank {self.rank} of {self.size}"

    def check_tokens(self, hidden_states: Tensor, topk_weights: Tensor, choices: Tensor) -> None:
        """Raises a ValueError on every rank of the group unless all have the same tokens, in the first call with any.

        It waits for the device; a first call that a CUDA graph captures is not checked.
        """
        capturing = hidden_states.is_cuda and torch.cuda.is_current_stream_capturing()
        if self._checked or capturing or self.size == 1:
            return
        named = {"hidden_states": hidden_states, "routing weights": topk_weights, "choices of experts": choices}
        own = {name: (list(x.shape), str(x.dtype), _checksum(x)) for name, x in named.items()}
        found = gathered("ExpertTensorParallel", own, self.group)
        for name in own:
            other = next((rank for rank, each in enumerate(found) if each[name] != found[0][name]), None)
            if other is not None:
                shapes = [f"{each[name][1]} {each[name][0]}" for each in (found[0], found[other])]
                differ = f"{shapes[0]} on rank 0 and {shapes[1]}" if shapes[0] != shapes[1] else "other values"
                raise ValueError(
                    f"ExpertTensorParallel: {name} must be the same on every rank that holds parts of the same "
                    f"experts, got {differ} on rank {other} (this is {describe(self.group)})"
                )
        self._checked = hidden_states.shape[0] > 0

    def enter(self, hidden_states: Tensor, topk_weights: Tensor) -> tuple[Tensor, Tensor]:
        """Themselves, for each rank to compute a part with: backward sums their gradients over the group."""
        return _Enter.apply(hidden_states, topk_weights, self)

    def begin_sum(self, partial: Tensor) -> Callable[[], Tensor]:
        """The sum of partial [T, H] over the group: what the returned function, called once, waits for and returns."""
        under_way = _Begin.apply(partial, self)
        return lambda: _End.apply(under_way, self)

    def once(self, bias: Tensor) -> Tensor:
        """A whole parameter to add on every rank: in the sum it is there once, and every rank has all its gradient."""
        return _OnOneRank.apply(bias, self.rank == 0)

    def begin(self, tensor: Tensor, what: str) -> Tensor:
        """The group's sum, which nobody may read before end."""
        try:
            return _collectives.all_reduce(tensor.contiguous(), "sum", self.group.group_name)
        except RuntimeError as error:
            raise self._failed(tensor, what, error) from error

    def end(self, tensor: Tensor, what: str) -> Tensor:
        try:
            return _collectives.wait_tensor(tensor)
        except RuntimeError as error:
            raise self._failed(tensor, what, error) from error

    def _failed(self, tensor: Tensor, what: str, error: RuntimeError) -> dist.DistBackendError:
        return failed(f"expert-tensor-parallel sum of {what} {list(tensor.shape)}", self.group, error)
