"""A hundred steps on several ranks are one rank's; float32 is as near to the truth as eager torch; bad set-ups."""

import copy

import pytest
import torch
import torch.distributed as dist
from modules.cases import config
from support.distributions import ids as ids_of
from support.ranks import device, run_ranks
from support.tolerance import BACKWARD, close
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

from distributed.layers import batch, ep_mesh, full, near, pair
from fastmoe_cpp import MoE, reference
from fastmoe_cpp.parallel import (
    ExpertParallel,
    ExpertTensorParallel,
    average_gradients,
    clip_grad_norm_,
    parameter_groups,
)

STEPS = 100
TRAINED = config(
    {"score_function": "sigmoid", "expert_bias": True, "expert_bias_update_rate": 0.01, "renormalize_epsilon": 1e-20,
     "balance_loss": "batch", "balance_loss_coefficient": 0.05, "z_loss_coefficient": 0.01},
    shared_intermediate_size=10, shared_expert_gate=True,
)  # fmt: skip


class Model(nn.Module):
    """Two residual MoE layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"moe": MoE(TRAINED, dtype=torch.float64)}) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer["moe"](x)
        return x


def train(model, inputs, targets, mesh=None):
    """Losses and gradient norms of STEPS steps on this rank's [STEPS, S, L, H]; the loss is the mean over all ranks."""
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=3e-3, foreach=True)
    losses, norms = [], []
    for x, y in zip(inputs, targets, strict=True):
        loss = (model(x) - y).square().mean()
        loss.backward()
        if mesh is not None:
            average_gradients(model, mesh)
            loss = loss.detach()
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        norms.append(clip_grad_norm_(model, 0.1).item())
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        for layer in model.layers:
            layer["moe"].update_expert_bias()
    return losses, norms


def check_training(rank, ranks, mesh=None, **style):
    torch.manual_seed(0)
    whole = Model().to(device())
    # a step's tokens grow more alike: uniform to all to few experts
    inputs = torch.randn(STEPS, 4, 3, 16, dtype=torch.float64)
    inputs = inputs + torch.linspace(0, 3, STEPS)[:, None, None, None] * torch.randn(16, dtype=torch.float64)
    inputs, targets = (x.to(device()) for x in (inputs, torch.randn_like(inputs)))
    spread = copy.deepcopy(whole)
    if dist.get_rank():
        for p in spread.parameters():
            p.data.zero_()  # every rank starts with rank 0's weights
    kind = ExpertParallel if mesh is None else ExpertTensorParallel
    mesh = mesh or ep_mesh(ranks)
    parallelize_module(spread, mesh, {"layers.*.moe": kind(**style)})
    path = style.get("path", "all_to_all_single")
    assert f"expert_parallel=rank {rank} of {ranks} by {path}" in repr(spread)
    got = train(spread, inputs.chunk(ranks, 1)[rank], targets.chunk(ranks, 1)[rank], mesh)
    if dist.get_rank():
        for q in spread.parameters():
            full(q)
        return
    expected = train(whole, inputs, targets)
    for what, one, many in zip(("losses", "norms"), expected, got, strict=True):
        near(torch.tensor(many), torch.tensor(one), what, rtol=1e-9)
    assert max(expected[1]) > 0.1, "no gradient was clipped"
    for (name, p), q in zip(whole.named_parameters(), spread.parameters(), strict=True):
        near(full(q, p).detach(), p.detach(), name, rtol=1e-7)
    for one, many in zip(whole.layers, spread.layers, strict=True):
        assert torch.equal(one["moe"].router.expert_bias, many["moe"].router.expert_bias)
        assert one["moe"].router.expert_bias.abs().max() > 0


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_hundred_steps_are_one_ranks(ranks, backend, enough):
    enough(ranks)
    run_ranks(check_training, ranks, ranks, backend=backend)


def check_narrow_types(rank, ranks, mesh=None):
    mesh = mesh or ep_mesh(ranks)
    sequences = [6, 2][:ranks]
    own = slice(sum(sequences[:rank]), sum(sequences[: rank + 1]))
    for dtype in (torch.float32, torch.bfloat16):
        for routing in ("uniform", "zipf", "all_to_one"):
            c = config({"renormalize": False}, hidden_size=64, intermediate_size=32)
            whole, spread = pair(c, mesh, dtype=dtype)
            eager = {n: p.detach().clone() for n, p in whole.named_parameters()}
            truth = {n: p.double() for n, p in eager.items()}
            inputs, cotangents = (batch(sequences, c.hidden_size, seed, dtype) for seed in (0, 1))
            ids = ids_of(routing, sum(sequences) * 2, c.num_experts, c.top_k)[0].to(device())
            x = inputs[rank].clone().requires_grad_()
            out = spread.forward_with_routing(x, topk_ids=ids[own.start * 2 : own.stop * 2]).hidden_states
            out.backward(cotangents[rank] * ranks)
            average_gradients(spread, mesh)
            results = []
            for parameters in (truth, eager):
                wide = parameters["router.weight"].dtype
                y = torch.cat(inputs).to(wide).requires_grad_()
                leaves = {n: p.requires_grad_() for n, p in parameters.items()}
                z = reference.moe(y, leaves, c, topk_ids=ids).hidden_states
                z.backward(torch.cat(cotangents).to(wide))
                results.append({"output": z[own], "x": y.grad[own]} | {n: p.grad for n, p in leaves.items()})
            ours = {"output": out, "x": x.grad / ranks}
            ours |= {n: full(p.grad, eager[n]) for n, p in spread.named_parameters()}
            for name, tensor in ours.items():
                close(
                    tensor, results[0][name], results[1][name], what=f"{name}, {dtype}, {routing}",
                    factor=2.0 if name == "output" else BACKWARD,
                )  # fmt: skip


def test_float32_and_bfloat16_are_as_near_as_eager_torch(backend):
    run_ranks(check_narrow_types, 2, 2, backend=backend)


def refused(rank, ranks, kind):
    """One sentence, the same on every rank, at set-up."""
    mesh = ep_mesh(ranks)
    fields, dtype, style = {}, torch.float32, {}
    if kind == "hidden_size":
        fields = {"hidden_size": 16 + 8 * rank}
    elif kind == "num_experts":
        fields = {"num_experts": 8 - 3 * rank, "top_k": 2}
    elif kind == "top_k":
        fields = {"top_k": 2 + rank}
    elif kind == "dtype":
        dtype = torch.bfloat16 if rank else torch.float32
    elif kind == "divides":
        fields = {"num_experts": 7}
    module = nn.Linear(2, 2) if kind == "module" else MoE(config(**fields), device=device(), dtype=dtype)
    try:
        parallelize_module(nn.ModuleDict({"moe": module}), mesh, {"moe": ExpertParallel(**style)})
    except ValueError as error:
        return str(error)
    return "accepted"


def check_all_settings(rank, ranks):
    check_settings(rank, ranks)
    return {
        kind: refused(rank, ranks, kind)
        for kind in ("hidden_size", "num_experts", "top_k", "dtype", "divides", "module", "fine")
    }


def check_settings(rank, ranks):
    """What the style's arguments do, and what a layer that has it refuses."""
    mesh = ep_mesh(ranks)
    c = config({"balance_loss_coefficient": 0.1})
    x = batch([2, 3], c.hidden_size)[rank]
    grads = []
    for gradient in ("mean", "sum"):
        _, spread = pair(c, mesh, gradient=gradient)
        spread(x).square().sum().backward()
        grads.append({n: full(p.grad) for n, p in spread.named_parameters()})
    for name, mean in grads[0].items():
        near(grads[1][name], mean * ranks if "experts" in name else mean, name)

    whole = MoE(c, device=device())
    whole.router.weight.data.fill_(rank)
    spread.load_state_dict(whole.state_dict())
    assert torch.equal(spread.router.weight, whole.router.weight.double())
    for name, p in spread.experts.named_parameters():
        assert torch.equal(p.to_local(), whole.experts.get_parameter(name).double().chunk(ranks)[rank]), name
    torch.manual_seed(5)
    spread.reset_parameters()
    drawn = full(spread.experts.gate_up_proj).detach()
    first, second = drawn.chunk(2)
    assert 0.9 * c.initializer_range < drawn.std() < 1.1 * c.initializer_range
    assert abs(float((first * second).mean())) < 0.2 * c.initializer_range**2, "ranks drew the same experts"
    routers = [torch.empty_like(spread.router.weight) for _ in range(ranks)]
    dist.all_gather(routers, spread.router.weight.detach())
    assert torch.equal(*routers)

    with pytest.raises(ValueError, match="ExpertParallel must be applied to a layer once"):
        parallelize_module(spread, mesh, ExpertParallel())
    two = init_device_mesh(device().type, (ranks, 1), mesh_dim_names=("ep", "tp"))
    with pytest.raises(ValueError, match="ExpertParallel needs a mesh of one dimension"):
        ExpertParallel()._apply(MoE(c), two)
    sharded = MoE(c, device=device())
    fully_shard(sharded, mesh=mesh)
    with pytest.raises(ValueError, match="ExpertParallel must be applied before fully_shard"):
        parallelize_module(sharded, mesh, ExpertParallel())


def test_ranks_that_differ_are_refused_on_every_rank(backend):
    answers = run_ranks(check_all_settings, 2, 2, backend=backend)
    same = "must be the same on every rank, got"
    expected = {
        "hidden_size": f"ExpertParallel: hidden_size {same} 16 on rank 0 and 24 on rank 1",
        "num_experts": f"ExpertParallel: num_experts {same} 8 on rank 0 and 5 on rank 1",
        "top_k": f"ExpertParallel: top_k {same} 2 on rank 0 and 3 on rank 1",
        "dtype": f"ExpertParallel: experts.down_proj's dtype {same} torch.float32 on rank 0 and torch.bfloat16 on "
        "rank 1",
        "divides": "ExpertParallel needs a number of ranks that divides num_experts = 7, got 2",
        "module": "ExpertParallel parallelizes fastmoe_cpp.MoE layers, got Linear",
        "fine": "accepted",
    }
    for rank, answer in enumerate(answers):
        assert {kind: text.split(" (this is")[0] for kind, text in answer.items()} == expected
        assert f"(this is rank {rank} of 2 in group" in answer["top_k"]


def test_the_style_refuses_what_it_does_not_know():
    for wrong, message in (
        ({"gradient": "average"}, "gradient must be one of 'mean', 'sum', got 'average'"),
        ({"path": "nvshmem"}, "path must be one of 'auto', 'all_to_all_single', 'symmetric_memory', got 'nvshmem'"),
        ({"path": "symmetric_memory"}, "max_tokens must be given for symmetric memory"),
        ({"max_rows": 4}, "max_tokens must be given for symmetric memory"),
        ({"path": "all_to_all_single", "max_tokens": 4}, "max_tokens must be None for path 'all_to_all_single'"),
        ({"chunks": 0}, "chunks must be an integer of at least 1, got 0"),
        ({"chunks": 2, "max_tokens": 8}, "chunks must be 1 with max_tokens, for symmetric memory has none, got 2"),
        ({"max_tokens": 0}, "max_tokens must be an integer of at least 1 or None, got 0"),
        ({"max_tokens": 8, "max_rows": 2.5}, "max_rows must be an integer of at least 1 or None, got 2.5"),
    ):
        with pytest.raises(ValueError, match=message):
            ExpertParallel(**wrong)
