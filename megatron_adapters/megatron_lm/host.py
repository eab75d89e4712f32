"""The running host: its modules, arguments and process groups, found when they are needed."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.distributed as dist


def module(name: str) -> Any:
    """A module of the host by its name below ``megatron``, such as 'mpu'; ImportError where there is no host."""
    full = f"megatron.{name}" if name else "megatron"
    try:
        return importlib.import_module(full)
    except ModuleNotFoundError as error:
        if error.name is not None and full.startswith(error.name):
            raise ImportError(f"{full} is not there to be imported: run from a Megatron-LM checkout") from error
        raise


def get_args() -> Any:
    """The host's parsed arguments."""
    return module("").get_args()


def num_microbatches() -> int:
    """How many micro-batches a step of the host has now."""
    return module("").get_num_microbatches()


def size(group: dist.ProcessGroup | None) -> int:
    """Ranks of a group; 1 without torch.distributed."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def data_parallel_group() -> dist.ProcessGroup | None:
    """The host's data-parallel group, or None where torch.distributed is not initialised."""
    return module("mpu").get_data_parallel_group() if dist.is_available() and dist.is_initialized() else None


def unwrap(model: Any) -> Any:
    """The model inside its wrappers (Float16Module, DistributedDataParallel), the first where it is a list of one."""
    if isinstance(model, list | tuple):
        if len(model) != 1:
            raise ValueError(f"model must be one part, interleaved pipeline stages are not honoured, got {len(model)}")
        model = model[0]
    while hasattr(model, "module"):
        model = model.module
    return model


def is_expert(parameter: torch.Tensor) -> bool:
    """Whether a parameter belongs to experts that other data-parallel ranks don't hold."""
    return getattr(parameter, "dp_comm", "dp") == "none"
