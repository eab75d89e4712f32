"""The same layer on one rank and spread over several, and each rank's part of a batch."""

from __future__ import annotations

import copy

import torch
from modules.cases import CASES, make
from support.ranks import device
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

from fastmoe_cpp import MoE, MoEConfig
from fastmoe_cpp.parallel import ExpertParallel, ExpertTensorParallel

#: Sequences of LENGTH tokens of each rank: even, uneven, ranks with none, none at all.
SEQUENCES = {
    1: [[5], [0]],
    2: [[4, 4], [1, 6], [0, 4], [3, 0], [0, 0]],
    3: [[2, 2, 2], [4, 0, 1]],
    4: [[3, 3, 3, 3], [1, 5, 0, 2], [0, 0, 3, 0]],
}
LENGTH = 2


def mesh_of(**sizes: int) -> DeviceMesh:
    return init_device_mesh(device().type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def ep_mesh(ranks: int) -> DeviceMesh:
    return mesh_of(ep=ranks)


def pair(case: str | MoEConfig, mesh: DeviceMesh, dtype=torch.float64, **style) -> tuple[MoE, MoE]:
    """A layer on this rank alone, and its twin over the mesh: parts of experts over a last dimension 'tp'."""
    torch.manual_seed(0)
    whole = make(case, device(), dtype)
    spread = nn.ModuleDict({"moe": copy.deepcopy(whole)})
    kind = ExpertTensorParallel if mesh.mesh_dim_names[-1] == "tp" else ExpertParallel
    parallelize_module(spread, mesh, {"moe": kind(**style)})
    return whole, spread["moe"]


def batch(sequences: list[int], hidden: int, seed: int = 0, dtype=torch.float64) -> list[Tensor]:
    """Each rank's [S, LENGTH, H], the same list on every rank; ranks differ in what they prefer."""
    g = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(s, LENGTH, hidden, generator=g, dtype=torch.float64) for s in sequences]
    return [(x + 0.3 * rank).to(device(), dtype) for rank, x in enumerate(drawn)]


def full(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """The whole tensor; with gate and up rows one after the other as one rank's `like` has them."""
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor if like is None or tensor.dim() == like.dim() else tensor.flatten(1, 2)


def near(actual: Tensor, expected: Tensor, what: str, rtol: float = 1e-11) -> None:
    """Relative to the largest entry."""
    size = expected.detach().abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=rtol * size + 1e-13, msg=lambda m: f"{what}: {m}")


__all__ = ["CASES", "LENGTH", "SEQUENCES", "batch", "ep_mesh", "full", "mesh_of", "near", "pair"]
