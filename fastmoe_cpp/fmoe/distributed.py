"""Data parallelism whose group depends on the parameter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from .utils import get_rank_0_in_comm, get_torch_default_comm

_DEFAULTS = ("dp", "gate", "moe", "world")
_HALF = (torch.float16, torch.bfloat16)


class DistributedGroupedDataParallel(nn.Module):
    """Averages each gradient over the group that its parameter's ``dp_comm`` names.

    A parameter without the tag is 'dp'; one tagged 'none' is left alone; {name}_group is the group of the tag name, and
    dp, gate, moe and world are all processes where they are not given. need_sync copies the parameters of each group's
    first process to the others. Gradients are exchanged by allreduce_gradients(), after backward, on every process.
    """

    def __init__(self, module: nn.Module, auto_allreduce: bool = False, need_sync: bool = True, **groups: Any) -> None:
        super().__init__()
        if auto_allreduce:
            raise ValueError(
                "auto_allreduce must be False: call allreduce_gradients() after backward instead, got True"
            )
        other = [name for name in groups if not name.endswith("_group")]
        if other:
            raise TypeError(
                f"DistributedGroupedDataParallel takes groups, each named {{tag}}_group, got the argument {other[0]!r}"
            )
        self.module = module
        self.comms: dict[str, dist.ProcessGroup] = {
            name.removesuffix("_group"): group for name, group in groups.items() if group is not None
        }
        for name in _DEFAULTS:
            if name not in self.comms:
                self.comms[name] = get_torch_default_comm()
        if need_sync:
            self._sync_params()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's."""
        return self.module(*args, **kwargs)

    def allreduce_gradients(
        self, no_scale: bool = False, reduce_after: bool = False, fp32_allreduce: bool = False
    ) -> None:
        """Every gradient becomes its mean over the group of its parameter, or with no_scale the sum.

        reduce_after divides after the sum instead of before; fp32_allreduce sums 16-bit gradients in float32. A
        parameter that has a gradient on some processes of its group counts as zero on the others and has one there
        afterwards; one that has none anywhere stays without.
        """
        for group, parameters in self._by_group(p for p in self.module.parameters() if p.requires_grad):
            used = torch.tensor(
                [p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device
            )
            dist.all_reduce(used, group=group)
            parameters = [p for p, n in zip(parameters, used.tolist(), strict=True) if n]
            if not parameters:
                continue
            for p in parameters:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
            grads = [p.grad.detach() for p in parameters]
            flat = _flatten_dense_tensors(grads)
            if fp32_allreduce and flat.dtype in _HALF:
                flat = flat.float()
            if not no_scale and not reduce_after:
                flat /= group.size()
            dist.all_reduce(flat, group=group)
            if not no_scale and reduce_after:
                flat /= group.size()
            for grad, reduced in zip(grads, _unflatten_dense_tensors(flat, grads), strict=True):
                grad.copy_(reduced)

    def allreduce_params(self, *args: Any, **kwargs: Any) -> None:
        """allreduce_gradients(), by its old name: gradients, not parameters."""
        self.allreduce_gradients(*args, **kwargs)

    @torch.no_grad()
    def _sync_params(self) -> None:
        for group, parameters in self._by_group(self.module.parameters()):
            flat = _flatten_dense_tensors([p.detach() for p in parameters])
            dist.broadcast(flat, get_rank_0_in_comm(group), group=group)
            for parameter, value in zip(parameters, _unflatten_dense_tensors(flat, parameters), strict=True):
                parameter.copy_(value)

    def _by_group(self, parameters: Iterable[Tensor]) -> list[tuple[dist.ProcessGroup, list[Tensor]]]:
        """The parameters to be exchanged, those of one tag, dtype and device together, in the module's order."""
        buckets: dict[tuple, list[Tensor]] = {}
        for parameter in parameters:
            tag = getattr(parameter, "dp_comm", "dp")
            if tag == "none":
                continue
            if tag not in self.comms:
                name = next(n for n, p in self.module.named_parameters() if p is parameter)
                raise ValueError(
                    f"{name} has the tag {tag!r}, for which there is no group: give {tag}_group, or tag it 'none' to "
                    "leave it out"
                )
            buckets.setdefault((tag, parameter.dtype, parameter.device), []).append(parameter)
        return [(self.comms[tag], bucket) for (tag, _, _), bucket in buckets.items()]
