"""Gradient norm, clipping and overflow where every data-parallel rank has experts of its own."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import host
from .schedule import remember_optimizer


def _counts(parameter: Tensor, first_tensor_rank: bool) -> bool:
    """Whether this rank counts the parameter: shared ones and copies on other tensor-parallel ranks do not."""
    if getattr(parameter, "shared", False):
        return False
    return bool(getattr(parameter, "tensor_model_parallel", False)) or first_tensor_rank


def grad_norm(parameters: Iterable[Tensor] | Tensor, norm_type: float = 2.0) -> Tensor:
    """The norm of all gradients of the whole model, a float32 scalar, the same on every rank.

    Parameters count once over the model-parallel ranks; experts count on every data-parallel rank that holds some, so
    their sums are added over the data-parallel group. Gradients are as ``allreduce_gradients`` leaves them.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    norm_type = float(norm_type)
    if not norm_type > 0:
        raise ValueError(f"norm_type must be a number above 0, got {norm_type}")
    distributed = host.size(None) > 1
    mpu = host.module("mpu") if distributed else None
    first = mpu is None or mpu.get_tensor_model_parallel_rank() == 0
    parts: dict[bool, list[Tensor]] = {False: [], True: []}
    device = parameters[0].device if parameters else torch.device("cpu")
    for parameter in parameters:
        if parameter.grad is not None and _counts(parameter, first):
            norm = torch.linalg.vector_norm(parameter.grad.detach(), norm_type, dtype=torch.float32)
            parts[host.is_expert(parameter)].append(norm)
    largest = math.isinf(norm_type)

    def total(norms: list[Tensor]) -> Tensor:
        if not norms:
            return torch.zeros((), device=device)
        stacked = torch.stack([norm.to(device) for norm in norms])
        return stacked.max() if largest else (stacked**norm_type).sum()

    operation = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
    dense, experts = total(parts[False]), total(parts[True])
    if mpu is not None:  # also where this rank has no experts: every rank takes part in every exchange
        dist.all_reduce(experts, op=operation, group=mpu.get_data_parallel_group())
    norm = torch.maximum(dense, experts) if largest else dense + experts
    if mpu is not None:
        dist.all_reduce(norm, op=operation, group=mpu.get_model_parallel_group())
    return norm if largest else norm ** (1.0 / norm_type)


def clip_grad_norm(parameters: Iterable[Tensor] | Tensor, max_norm: float, norm_type: float = 2) -> float:
    """Scales all gradients, in place, so that ``grad_norm`` is at most max_norm; the norm before, as a number.

    Takes the place of the host's clip_grad_norm_fp32.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    norm = grad_norm(parameters, norm_type).item()
    factor = float(max_norm) / (norm + 1.0e-6)
    if factor < 1.0:
        gradients = [parameter.grad.detach() for parameter in parameters if parameter.grad is not None]
        torch._foreach_mul_(gradients, factor)
    return norm


def prepare_optimizer(optimizer: Any) -> Any:
    """The host's optimizer, fit for experts: its float32 copies carry the experts' tags, and a gradient that is not
    finite on one data-parallel rank skips the step on all, so that their loss scales stay alike."""
    for halves, mains in (
        ("float16_groups", "fp32_from_float16_groups"),
        ("fp16_groups", "fp32_from_fp16_groups"),
    ):
        for group, copies in zip(getattr(optimizer, halves, []), getattr(optimizer, mains, []), strict=True):
            for parameter, copy in zip(group, copies, strict=True):
                if hasattr(parameter, "dp_comm"):
                    copy.dp_comm = parameter.dp_comm
    if hasattr(optimizer, "params_have_main_grad"):  # DistributedDataParallel gives every parameter one
        optimizer.params_have_main_grad = True
    check = getattr(optimizer, "_unscale_main_grads_and_check_for_nan", None)
    if check is not None:

        def check_everywhere() -> bool:
            found = torch.tensor([float(check())], device=optimizer.found_inf.device)
            if host.size(None) > 1:
                dist.all_reduce(found, op=dist.ReduceOp.MAX, group=host.data_parallel_group())
            return bool(found.item() > 0)

        optimizer._unscale_main_grads_and_check_for_nan = check_everywhere
    remember_optimizer(optimizer)
    return optimizer
