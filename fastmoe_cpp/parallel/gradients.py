"""Gradients over several ranks: averaged where a parameter is whole, and their norm with each expert counted once."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from ..groups import failed

#: Elements of one all_reduce, at the most beside a single larger gradient.
BUCKET = 2**25


def _all_reduce(tensor: Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup, operation: str) -> None:
    try:
        dist.all_reduce(tensor, op=op, group=group)
    except RuntimeError as error:
        raise failed(operation, group, error) from error


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _sharding_groups(name: str, parameter: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The groups over which a parameter is in parts; none for a whole one. ValueError for pending sums."""
    if not isinstance(parameter, DTensor):
        return ()
    groups = []
    for dim, placement in enumerate(parameter.placements):
        if placement.is_partial():
            raise ValueError(f"{name} must be sharded or replicated, got placements {parameter.placements}")
        if not isinstance(placement, Replicate):
            groups.append(parameter.device_mesh.get_group(dim))
    return tuple(groups)


def _gradients(named: list[tuple[str, Tensor]]) -> list[Tensor]:
    return [_local(p.grad.detach()) for _, p in named if p.grad is not None]


def _listed(parameters: Iterable[Tensor] | Tensor | nn.Module) -> list[tuple[str, Tensor]]:
    if isinstance(parameters, nn.Module):
        named = list(parameters.named_parameters())
    else:
        listed = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        named = [(f"parameters[{i}]", p) for i, p in enumerate(listed)]
    return [(name, p) for name, p in named if p.requires_grad]


def parameter_groups(model: nn.Module) -> list[dict[str, list[Tensor]]]:
    """The parameters that want a gradient, as an optimizer's groups: those of each device mesh in a group of their own.

    An optimizer that updates many tensors at once (foreach, its default on GPUs, or fused) refuses to mix plain tensors
    with DTensors, or DTensors of several meshes: ``AdamW(parameter_groups(model), lr=...)``. Without DTensors it is one
    group.
    """
    groups: dict[DeviceMesh | None, list[Tensor]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            groups.setdefault(mesh, []).append(parameter)
    return [{"params": parameters} for parameters in groups.values()]


@torch.no_grad()
def grad_norm(parameters: Iterable[Tensor] | Tensor | nn.Module, norm_type: float = 2.0) -> Tensor:
    """The norm of all gradients as one vector, the same scalar on every rank.

    DTensors (experts over an expert-parallel mesh, anything under fully_shard, or both) are summed over the mesh
    dimensions that shard them, so that every expert counts once; plain tensors are taken to be the same on every rank.
    A collective: every rank passes the same parameters, with or without gradients. Computed in float32 or wider.
    """
    if not norm_type > 0:
        raise ValueError(f"norm_type must be a positive number or infinity, got {norm_type}")
    named = _listed(parameters)
    by_groups: dict[tuple[str, ...], tuple[tuple[dist.ProcessGroup, ...], list[tuple[str, Tensor]]]] = {}
    for name, parameter in named:
        groups = _sharding_groups(name, parameter)
        by_groups.setdefault(tuple(g.group_name for g in groups), (groups, []))[1].append((name, parameter))
    device = _local(named[0][1]).device if named else torch.device("cpu")
    wide = torch.float64 if any(p.dtype == torch.float64 for _, p in named) else torch.float32
    total = torch.zeros((), dtype=wide, device=device)
    largest = norm_type == math.inf
    for groups, members in by_groups.values():
        part = torch.zeros((), dtype=wide, device=device)
        grads = _gradients(members)
        if grads:
            norms = torch.stack([n.to(device, wide) for n in torch._foreach_norm(grads, norm_type, dtype=wide)])
            part = norms.max() if largest else norms.pow(norm_type).sum()
        for group in groups:
            _all_reduce(part, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group, "grad_norm")
        total = torch.maximum(total, part) if largest else total + part
    return total if largest else total.pow(1.0 / norm_type)


@torch.no_grad()
def clip_grad_norm_(
    parameters: Iterable[Tensor] | Tensor | nn.Module,
    max_norm: float,
    norm_type: float = 2.0,
    *,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """torch.nn.utils.clip_grad_norm_ for models of which each rank holds some experts; returns grad_norm.

    Gradients are scaled in place where the norm is above max_norm, by the same factor on every rank. Call it after the
    gradients are averaged. Raises RuntimeError for a norm that is not finite, if asked to.
    """
    if max_norm < 0:
        raise ValueError(f"max_norm must be at least 0, got {max_norm}")
    named = _listed(parameters)
    norm = grad_norm([p for _, p in named], norm_type)
    if error_if_nonfinite and not bool(norm.isfinite()):
        raise RuntimeError(f"the gradients' norm of order {norm_type} is {norm.item()}")
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for grad in _gradients(named):
        grad.mul_(scale.to(grad.device, grad.dtype))
    return norm


@torch.no_grad()
def average_gradients(module: nn.Module, mesh: DeviceMesh) -> None:
    """Averages every gradient over the dimensions of the mesh that do not shard its parameter: data parallelism.

    For models without fully_shard or DistributedDataParallel: a whole parameter's gradient is averaged over all of
    mesh, that of experts spread by ExpertParallel over mesh["ep"] over the other dimensions alone. A parameter without
    a gradient counts as zero, and has one afterwards. A collective.
    """
    named = _listed(module)
    for _, parameter in named:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    sharded = [{g.group_name for g in _sharding_groups(name, p)} for name, p in named]
    for dim in range(mesh.ndim):
        group = mesh.get_group(dim)
        if group.size() == 1:
            continue
        whole = [_local(p.grad) for (_, p), names in zip(named, sharded, strict=True) if group.group_name not in names]
        for bucket in _buckets(whole):
            flat = _flatten_dense_tensors(bucket)
            _all_reduce(flat, dist.ReduceOp.SUM, group, "average_gradients")
            flat.div_(group.size())
            for grad, mean in zip(bucket, _unflatten_dense_tensors(flat, bucket), strict=True):
                grad.copy_(mean)


def _buckets(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Tensors of one dtype and device a bucket, in order, of BUCKET elements or so."""
    buckets: list[list[Tensor]] = []
    open_bucket: dict[tuple, list[Tensor]] = {}
    for tensor in tensors:
        kind = (tensor.dtype, tensor.device)
        bucket = open_bucket.get(kind)
        if bucket is None or sum(t.numel() for t in bucket) + tensor.numel() > BUCKET:
            bucket = open_bucket[kind] = []
            buckets.append(bucket)
        bucket.append(tensor)
    return buckets
