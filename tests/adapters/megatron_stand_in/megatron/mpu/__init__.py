"""Model parallelism: the groups, and the two functions at the borders of a tensor-parallel region."""

import torch
import torch.distributed as dist

from .initialize import *  # noqa: F403
from .initialize import get_tensor_model_parallel_group


def _sum(tensor):
    tensor = tensor.clone()
    dist.all_reduce(tensor, group=get_tensor_model_parallel_group())
    return tensor


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        return _sum(gradient)


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return _sum(tensor)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


copy_to_tensor_model_parallel_region = _Copy.apply
reduce_from_tensor_model_parallel_region = _Reduce.apply


def set_defaults_if_not_set_tensor_model_parallel_attributes(parameter):
    for name, value in {"tensor_model_parallel": False, "partition_dim": -1, "partition_stride": 1}.items():
        if not hasattr(parameter, name):
            setattr(parameter, name, value)
