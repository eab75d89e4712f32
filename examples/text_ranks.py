"""The processes of one run: who they are, what each takes of a batch, and how their results become one."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from text_data import BadInput
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

from fastmoe_cpp.parallel import ExpertParallel, ExpertTensorParallel, average_gradients, clip_grad_norm_


class Ranks:
    """A process alone, or one of those that torchrun started: `expert_parallel` of them share the experts.

    Each expert's parts are on `expert_tensor_parallel` of them, which have the same tokens.
    """

    def __init__(self, device: str, expert_parallel: int, expert_tensor_parallel: int) -> None:
        self.size, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        #: The parts of a batch, and which of them is this process's.
        self.shares, self.own_share = self.size // expert_tensor_parallel, self.rank // expert_tensor_parallel
        together = expert_parallel * expert_tensor_parallel
        options = f"--expert-parallel {expert_parallel}"
        if expert_tensor_parallel > 1:
            options += f" --expert-tensor-parallel {expert_tensor_parallel}"
        command = f"torchrun --nproc_per_node=N examples/train_text.py {options}"
        if self.size % together or (self.size > 1 and together == 1):
            raise BadInput(
                f"{options} needs a number of processes N that it divides, and this is one of {self.size}: {command}"
            )
        self.main = self.rank == 0
        self.mesh = None
        if self.size == 1:
            return
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        shape = (self.size // together, expert_parallel, expert_tensor_parallel)
        self.mesh = init_device_mesh(device, shape, mesh_dim_names=("dp", "ep", "tp"))
        self.batch_group = self.mesh["dp", "ep"]._flatten("batch").get_group()
        if not self.main:
            # one process speaks for all
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115

    def parallelize(self, model: nn.Module) -> None:
        if self.mesh is not None:
            over = tuple(name for name in ("ep", "tp") if self.mesh[name].size() > 1)
            style = ExpertTensorParallel if "tp" in over else ExpertParallel
            parallelize_module(model, self.mesh[over], {"blocks.*.moe": style(balance_group=self.batch_group)})

    def share(self, windows: Tensor) -> Tensor:
        """This process's windows of a batch's; together they are all of them."""
        return windows.tensor_split(self.shares)[self.own_share]

    def clip(self, model: nn.Module, max_norm: float) -> None:
        """Averages the gradients over the processes and clips their norm, in which every expert counts once."""
        if self.mesh is not None:
            average_gradients(model, self.mesh)
            clip_grad_norm_(model, max_norm)
        else:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)

    def total(self, *values: Tensor) -> list[Tensor]:
        """Tensors summed over the parts of a batch."""
        values = tuple(v.detach().clone() for v in values)
        if self.mesh is not None:
            for value in values:
                dist.all_reduce(value, group=self.batch_group)
        return list(values)

    def any(self, flag: bool, device: torch.device) -> bool:
        flags = torch.tensor(int(flag), device=device)
        if self.mesh is not None:
            dist.all_reduce(flags)
        return bool(flags)

    def close(self) -> None:
        if self.mesh is not None:
            dist.barrier()
            dist.destroy_process_group()


def whole(state: Any) -> Any:
    """A state_dict with every part of a tensor put together: what one process alone would have."""
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    if isinstance(state, list):
        return [whole(value) for value in state]
    if not isinstance(state, DTensor):
        return state
    tensor = state.full_tensor()
    # gate and up rows, apart where processes have parts of both
    return tensor.flatten(1, 2) if tensor.dim() == 4 else tensor


def spread_model(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A whole state_dict as the model's own is spread."""
    return {name: _like(tensor, state[name]) for name, tensor in model.state_dict().items()}


def spread_optimizer(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A whole state_dict of an optimizer, its tensors spread as the parameters they belong to."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        index: {key: _like(parameters[index], value) for key, value in values.items()}
        for index, values in state["state"].items()
    }
    return state | {"state": moments}


def _like(spread: Tensor, tensor: Any) -> Any:
    if not isinstance(spread, DTensor) or not isinstance(tensor, Tensor) or tensor.numel() != spread.numel():
        return tensor
    tensor = tensor.to(spread.device).reshape(spread.shape)
    return distribute_tensor(tensor, spread.device_mesh, spread.placements, src_data_rank=None)
