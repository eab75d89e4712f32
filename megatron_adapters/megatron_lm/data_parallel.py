"""Data parallelism for models whose experts differ from rank to rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from . import host


class DistributedDataParallel(nn.Module):
    """Megatron-LM's local DistributedDataParallel, which leaves experts on the rank that holds them.

    Gradients of parameters that all data-parallel ranks hold are averaged over them. Gradients of experts that this
    rank alone holds came from every rank's tokens, a sum over ranks whose losses are averaged: they are divided by the
    number of ranks and not exchanged. So one rank and n ranks have equal gradients.

    With use_contiguous_buffers gradients are accumulated in ``param.main_grad``, a view into one buffer a dtype and
    kind, in float32 with accumulate_allreduce_grads_in_fp32; otherwise in ``param.grad``, and ``main_grad`` is the same
    tensor after ``allreduce_gradients``.
    """

    def __init__(
        self,
        module: nn.Module,
        accumulate_allreduce_grads_in_fp32: bool = False,
        use_contiguous_buffers: bool = False,
    ) -> None:
        super().__init__()
        if accumulate_allreduce_grads_in_fp32 and not use_contiguous_buffers:
            raise ValueError(
                "use_contiguous_buffers must be True with accumulate_allreduce_grads_in_fp32: float32 gradients are "
                "kept in the contiguous buffers, got False"
            )
        self.module = module
        self.accumulate_allreduce_grads_in_fp32 = accumulate_allreduce_grads_in_fp32
        self.use_contiguous_buffers = use_contiguous_buffers
        self.group = host.data_parallel_group()
        self.ranks = host.size(self.group)
        # (dtype, whether of experts) -> gradients of all such parameters
        self._buffers_of: dict[tuple[torch.dtype, bool], Tensor] = {}
        if use_contiguous_buffers:
            self._allocate()

    def _trained(self) -> Iterator[nn.Parameter]:
        return (parameter for parameter in self.module.parameters() if parameter.requires_grad)

    def _allocate(self) -> None:
        kinds: dict[tuple[torch.dtype, bool], list[nn.Parameter]] = {}
        for parameter in self._trained():
            dtype = torch.float32 if self.accumulate_allreduce_grads_in_fp32 else parameter.dtype
            kinds.setdefault((dtype, host.is_expert(parameter)), []).append(parameter)
        for (dtype, expert), parameters in kinds.items():
            total = sum(parameter.numel() for parameter in parameters)
            buffer = torch.zeros(total, dtype=dtype, device=parameters[0].device)
            start = 0
            for parameter in parameters:
                parameter.main_grad = buffer[start : start + parameter.numel()].view(parameter.shape)
                parameter.register_post_accumulate_grad_hook(self._accumulate)
                start += parameter.numel()
            self._buffers_of[dtype, expert] = buffer

    @staticmethod
    def _accumulate(parameter: nn.Parameter) -> None:
        if parameter.grad is not None:
            parameter.main_grad.add_(parameter.grad)
            parameter.grad = None

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The module's forward."""
        return self.module(*inputs, **named)

    def zero_grad_buffer(self) -> None:
        """Zeros the contiguous buffers, at the beginning of a step."""
        if not self.use_contiguous_buffers:
            raise ValueError("zero_grad_buffer needs use_contiguous_buffers=True, got False")
        for buffer in self._buffers_of.values():
            buffer.zero_()

    @torch.no_grad()
    def broadcast_params(self) -> None:
        """Parameters of the group's first rank to the others; experts of their own stay."""
        if self.ranks == 1:
            return
        source = dist.get_global_rank(self.group, 0)
        for parameter in self.module.parameters():
            if not host.is_expert(parameter):
                dist.broadcast(parameter.data, src=source, group=self.group)

    def allreduce_gradients(self) -> None:
        """Averages gradients over the data-parallel ranks, experts in their place; once a step."""
        if self.use_contiguous_buffers:
            for (_, expert), buffer in self._buffers_of.items():
                self._average(buffer, expert)
            return
        self._reduce_gradients()
        for parameter in self._trained():
            if parameter.grad is None:  # the host's optimizers take main_grad of every parameter
                parameter.grad = torch.zeros_like(parameter)
            parameter.main_grad = parameter.grad

    def allreduce_params(self, reduce_after: bool = True, no_scale: bool = False, fp32_allreduce: bool = False) -> None:
        """v2.2's name: no_scale sums instead of averaging, fp32_allreduce exchanges in float32, reduce_after divides
        after the exchange."""
        self._reduce_gradients(reduce_after=reduce_after, no_scale=no_scale, fp32=fp32_allreduce)

    def _reduce_gradients(self, *, reduce_after: bool = False, no_scale: bool = False, fp32: bool = False) -> None:
        kinds: dict[tuple[torch.dtype, bool], list[Tensor]] = {}
        for parameter in self._trained():
            if parameter.grad is not None:
                kinds.setdefault((parameter.dtype, host.is_expert(parameter)), []).append(parameter.grad.data)
        for (_, expert), gradients in kinds.items():
            if expert:
                for gradient in gradients:
                    if not no_scale:
                        gradient /= self.ranks
                continue
            if self.ranks == 1:
                continue
            flat = _flatten_dense_tensors(gradients)
            flat = flat.float() if fp32 else flat
            self._average(flat, False, reduce_after=reduce_after, no_scale=no_scale)
            for gradient, reduced in zip(gradients, _unflatten_dense_tensors(flat, gradients), strict=True):
                gradient.copy_(reduced)

    def _average(self, flat: Tensor, expert: bool, *, reduce_after: bool = False, no_scale: bool = False) -> None:
        if not no_scale and not reduce_after:
            flat /= self.ranks
        if not expert and self.ranks > 1:
            dist.all_reduce(flat, group=self.group)
        if not no_scale and reduce_after:
            flat /= self.ranks

    def set_input_tensor(self, *inputs: Any, **named: Any) -> Any:
        """The module's."""
        return self.module.set_input_tensor(*inputs, **named)

    def state_dict(self, *inputs: Any, **named: Any) -> Any:
        """The module's, without a prefix for this wrapper."""
        return self.module.state_dict(*inputs, **named)

    def state_dict_for_save_checkpoint(self, *inputs: Any, **named: Any) -> Any:
        """The module's."""
        return self.module.state_dict_for_save_checkpoint(*inputs, **named)

    def load_state_dict(self, state_dict: Any, strict: bool = True) -> Any:
        """The module's."""
        return self.module.load_state_dict(state_dict, strict=strict)


class DistributedDataParallelV22(DistributedDataParallel):
    """v2.2's: ``(module)``, reduced by ``allreduce_params``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
