"""FSDP2 over one dimension of a mesh and expert parallelism over the other; checkpoints from m ranks to n."""

import math

import pytest
import torch
import torch.distributed as dist
from modules.cases import config
from safetensors.torch import load_file
from support.ranks import device, run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import parallelize_module

from distributed.layers import ep_mesh, full, near
from fastmoe_cpp import MoE, MoEConfig
from fastmoe_cpp.parallel import (
    ExpertParallel,
    average_gradients,
    clip_grad_norm_,
    export_safetensors,
    load_checkpoint,
    parameter_groups,
    save_checkpoint,
)

FIRST, THEN = 4, 3
HIDDEN = 16
CONFIG = config(
    {"expert_bias": True, "expert_bias_update_rate": 0.01, "balance_loss": "global", "balance_loss_coefficient": 0.05},
    bias=True,
    shared_intermediate_size=10,
)


class Block(nn.Module):
    def __init__(self, c: MoEConfig) -> None:
        super().__init__()
        self.mix = nn.Linear(HIDDEN, HIDDEN, dtype=torch.float64)
        self.moe = MoE(c, dtype=torch.float64)

    def forward(self, x):
        return x + self.moe(self.mix(x))


class Model(nn.Module):
    def __init__(self, *configs: MoEConfig) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(Block(c) for c in configs or (CONFIG, CONFIG))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def steps_of(first, last):
    g = torch.Generator().manual_seed(7)
    inputs = torch.randn(FIRST + THEN, 4, 5, HIDDEN, dtype=torch.float64, generator=g).to(device())
    return inputs[first:last]


def train(model, optimizer, first, last, rank=0, ranks=1, mesh=None):
    norms = []
    for x in steps_of(first, last):
        model(x.chunk(ranks)[rank]).square().mean().backward()
        if mesh is not None:
            average_gradients(model, mesh)
        norms.append(clip_grad_norm_(model, 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
        for layer in model.layers:
            layer.moe.update_expert_bias()
    return norms


def made(*configs):
    model = Model(*configs)
    return model, torch.optim.AdamW(parameter_groups(model), lr=1e-2, foreach=True)


def state_of(model, optimizer):
    """Every tensor, whole, by name: the model's and the optimizer's."""
    out = dict(model.state_dict())
    for name, p in model.named_parameters():
        out |= {f"{name}/{key}": value for key, value in optimizer.state[p].items()}
    return {name: full(tensor).detach().to("cpu", copy=True) for name, tensor in out.items()}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        near(full(got[name], tensor), tensor, name, rtol=1e-9)


def over_two_ranks(rank, folder):
    model = Model().to(device())
    mesh = ep_mesh(2)
    parallelize_module(model, mesh, {"layers.*.moe": ExpertParallel()})
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-2, foreach=True)
    norms = train(model, optimizer, 0, FIRST, rank, 2, mesh)
    save_checkpoint(folder, model, optimizer)
    wider = nn.ModuleDict(
        {"layers": nn.ModuleList(nn.ModuleDict({"moe": MoE(CONFIG, device=device())}) for _ in range(2))}
    )
    with pytest.raises(ValueError, match=r"router.weight must be torch.float32 \[8, 16\], the checkpoint"):
        load_checkpoint(folder, wider)
    return norms


def over_two_dimensions(rank, shape, before, after, export):
    """Fully sharded over all ranks, the experts over each dimension; a layer of them within the experts' weights."""
    model = Model().to(device())
    mesh = init_device_mesh(device().type, shape, mesh_dim_names=("dp", "ep"))
    everyone = mesh["dp", "ep"]._flatten("everyone")
    parallelize_module(model, mesh["ep"], {"layers.*.moe": ExpertParallel(balance_group=everyone.get_group())})
    fully_shard(model.layers[0].moe.experts, mesh=mesh["dp"])
    fully_shard(model.layers[1].moe.experts, mesh=mesh["dp"], shard_placement_fn=lambda p: Shard(1))
    for layer in model.layers:
        fully_shard(layer, mesh=everyone)
    fully_shard(model, mesh=everyone)
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-2, foreach=True)
    load_checkpoint(before, model, optimizer)
    loaded = state_of(model, optimizer)
    norms = train(model, optimizer, FIRST, FIRST + THEN, rank, mesh.size())
    save_checkpoint(after, model, optimizer)
    export_safetensors(export, model, {"format": "pt"})
    return loaded, norms


@pytest.mark.parametrize("shape", [(2, 2), (2, 1), (1, 2)])
def test_from_two_ranks_to_two_dimensions_to_one(shape, tmp_path, backend, enough):
    enough(math.prod(shape))
    before, after, export = (str(tmp_path / name) for name in ("before", "after", "model.safetensors"))
    whole, optimizer = made()
    norms = train(whole, optimizer, 0, FIRST)
    got = run_ranks(over_two_ranks, 2, before, backend=backend)
    assert got[0] == pytest.approx(norms, rel=1e-9) and got[0] == got[1]
    halfway = state_of(whole, optimizer)
    norms = train(whole, optimizer, FIRST, FIRST + THEN)
    results = run_ranks(over_two_dimensions, math.prod(shape), shape, before, after, export, backend=backend)
    for loaded, got_norms in results:
        assert_same(loaded, halfway)
        assert got_norms == pytest.approx(norms, rel=1e-9)
    finished = state_of(whole, optimizer)

    # one process without a process group
    assert not dist.is_initialized()
    alone, its_optimizer = made()
    load_checkpoint(after, alone, its_optimizer)
    assert_same(state_of(alone, its_optimizer), finished)
    exported = load_file(export)
    assert_same(exported, {name: t for name, t in finished.items() if "/" not in name})
    with pytest.raises(ValueError, match="folder must hold a checkpoint of save_checkpoint, there is none in"):
        load_checkpoint(tmp_path, alone)
    smaller = nn.ModuleDict({"layers": nn.ModuleList([whole.layers[0]])})
    with pytest.raises(ValueError, match=r"the model lacks layers\.1\."):
        load_checkpoint(after, smaller)
