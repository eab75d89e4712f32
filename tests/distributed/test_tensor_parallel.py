"""Parts of experts on every rank, alone and beside expert parallelism: what one rank computes, and bad set-ups."""

import copy
import os
import re
import signal
import types
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from modules.cases import config
from support import shared_memory
from support.ranks import RankFailed, device, run_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint

from distributed.layers import batch, full, mesh_of, near, pair
from distributed.test_expert_parallel import check_mesh
from distributed.test_training import check_narrow_types, check_training
from fastmoe_cpp import MoE
from fastmoe_cpp.parallel import ExpertParallel, ExpertTensorParallel, average_gradients, tensor

#: Ranks by mesh dimension.
MESHES = [{"tp": 2}, {"tp": 4}, {"ep": 2, "tp": 2}]
EVERYTHING = config(
    {"jitter_eps": 0.1, "expert_bias": True, "z_loss_coefficient": 0.1},
    bias=True, shared_intermediate_size=6, shared_expert_gate=True,
)  # fmt: skip


def ranks_of(sizes):
    return torch.Size(sizes.values()).numel()


def tokens_of(mesh):
    """The number of this rank's tokens among those of `ranks` ranks."""
    return (mesh.get_local_rank("ep"), mesh["ep"].size()) if "ep" in mesh.mesh_dim_names else (0, 1)


def check_ranks(rank, sizes, **style):
    if style.get("path") == "symmetric_memory":
        shared_memory.provide()
    mesh = mesh_of(**sizes)
    check_mesh(mesh, *tokens_of(mesh), **style)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_one_step_is_one_ranks(sizes, backend, enough):
    enough(ranks_of(sizes))
    run_ranks(check_ranks, ranks_of(sizes), sizes, backend=backend)


def through_symmetric_memory(rank, sizes):
    bounds = {"path": "symmetric_memory", "max_tokens": 32, "max_rows": 64}
    check_ranks(rank, sizes, cases=("gpt_oss", "deepseek", "llama4"), routings=("zipf", "last_empty"), **bounds)


def test_symmetric_memory_between_ranks_of_the_same_part(backend, enough):
    enough(4)
    run_ranks(through_symmetric_memory, 4, {"ep": 2, "tp": 2}, backend=backend)


def hundred_steps(rank):
    mesh = mesh_of(ep=2, tp=2)
    check_training(*tokens_of(mesh), mesh=mesh)


def test_a_hundred_steps_are_one_ranks(backend, enough):
    enough(4)
    run_ranks(hundred_steps, 4, backend=backend)


def narrow_types(rank):
    check_narrow_types(0, 1, mesh_of(tp=2))


def test_float32_and_bfloat16_are_as_near_as_eager_torch(backend, enough):
    enough(2)
    run_ranks(narrow_types, 2, backend=backend)


def gathered(x):
    found = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(found, x.contiguous())
    return found


def layer_by_itself(rank):
    """The same bits on every rank, however it is run; copies, new weights, one rank's weights, printing."""
    mesh = mesh_of(tp=2)
    for dtype, autocast in ((torch.float64, False), (torch.bfloat16, False), (torch.float32, True)):
        torch.manual_seed(1)
        whole, spread = pair(EVERYTHING, mesh, dtype=dtype)
        x = batch([6], 16, dtype=dtype)[0].requires_grad_()
        results = []
        for layer in (spread, copy.deepcopy(spread), whole, spread):
            torch.manual_seed(2)
            with torch.autocast(device().type, torch.bfloat16, enabled=autocast):
                y = checkpoint(layer, x, use_reentrant=False) if len(results) == 3 else layer(x)
            y.square().sum().backward()
            grads = [full(p.grad, q) for p, q in zip(layer.parameters(), whole.parameters(), strict=True)]
            results.append([y.detach(), x.grad, *grads])
            x.grad = None
            layer.zero_grad()
        first, copied, expected, recomputed = results
        for i, (a, b, c, d) in enumerate(zip(first, copied, expected, recomputed, strict=True)):
            assert torch.equal(a, b) and torch.equal(a, d)
            assert torch.equal(*gathered(a)), (i, dtype)
            near(a, c, f"{i}, {dtype}", rtol=1e-11 if dtype == torch.float64 else 3e-2)

    inner = EVERYTHING.intermediate_size
    assert (
        f"intermediate_size={inner}, activation='swiglu', bias=True, expert_tensor_parallel=rank {rank} of 2"
        in repr(spread)
    )
    given = {name: torch.randn_like(p) for name, p in whole.state_dict().items()}
    for layer in (whole, spread):
        layer.load_state_dict(given)
    for p, q in zip(spread.parameters(), whole.parameters(), strict=True):
        assert torch.equal(full(p, q), q)
    torch.manual_seed(5)
    spread.reset_parameters()
    drawn = full(spread.experts.gate_up_proj, whole.experts.gate_up_proj).detach()
    parts = drawn.unflatten(1, (2, 2, inner // 2))
    std = EVERYTHING.initializer_range
    assert 0.9 * std < drawn.std() < 1.1 * std
    assert abs(float((parts[:, :, 0] * parts[:, :, 1]).mean())) < 0.2 * std**2, "ranks drew the same parts"
    assert torch.equal(*gathered(spread.router.weight.detach()))


def test_the_layer_by_itself(backend, enough):
    enough(2)
    run_ranks(layer_by_itself, 2, backend=backend)


def collectives(rank):
    """One sum forward, with the shared experts under way beside it, and one for each gradient that is wanted."""
    _, spread = pair(replace(EVERYTHING, bias=False), mesh_of(tp=2))
    seen, calls = [], tensor._collectives

    def begin(x, *how):
        seen.append(tuple(x.shape))
        return calls.all_reduce(x, *how)

    def end(x):
        seen.append("end")
        return calls.wait_tensor(x)

    spread.shared_experts.register_forward_pre_hook(lambda *_: seen.append("shared"))
    tensor._collectives = types.SimpleNamespace(all_reduce=begin, wait_tensor=end)
    for tokens in (4, 0):
        for wanted in (True, False):
            seen.clear()
            x = batch([tokens // 2], 16)[0].requires_grad_(wanted)
            spread(x).sum().backward()
            rows, weights = (tokens, 16), (tokens, 3)
            grads = [rows, weights, "end", "end"] if wanted else [weights, "end"]
            assert seen == [rows, "shared", "end", *grads], seen


def test_the_collectives_do_not_depend_on_data(backend, enough):
    enough(2)
    run_ranks(collectives, 2, backend=backend)


def one_dies(rank):
    _, spread = pair(config(), mesh_of(tp=2))
    y = spread(batch([3], 16)[0].requires_grad_())
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    y.sum().backward()


def test_a_killed_rank_ends_the_other_which_names_the_sum_the_group_and_itself():
    with pytest.raises(RankFailed) as caught:
        run_ranks(one_dies, 2, timeout=60)
    text = str(caught.value)
    assert "rank 1 died with exit code -9" in text
    where = r"failed on rank 0 of 2 in group '.*' \(global rank 0\): "
    assert re.search(
        rf"expert-tensor-parallel sum of (outputs|(hidden_states'|routing weights') gradient) \[6, \d+\] {where}", text
    )


def other_tokens(rank):
    """Said in the first call that has tokens, on every rank."""
    mesh, said = mesh_of(tp=2), []
    x = batch([3], 16)[0]
    for inputs in (x[: 3 - rank], x + rank, x):
        _, spread = pair(config(), mesh)
        spread(x[:0])
        if inputs is x and rank == 1:
            spread.router.weight.data[0] += 1
        with pytest.raises(ValueError) as caught:
            spread(inputs)
        said.append(str(caught.value))
    assert all(f"(this is rank {rank} of 2 in group" in each for each in said)
    _, spread = pair(config(), mesh)
    spread(torch.full_like(x, float("nan")))
    return [each.split(" (this is")[0] for each in said]


def test_ranks_with_other_tokens():
    same = "must be the same on every rank that holds parts of the same experts, got"
    for said in run_ranks(other_tokens, 2):
        assert said == [
            f"ExpertTensorParallel: hidden_states {same} torch.float64 [6, 16] on rank 0 and torch.float64 [4, 16] on "
            "rank 1",
            f"ExpertTensorParallel: hidden_states {same} other values on rank 1",
            f"ExpertTensorParallel: routing weights {same} other values on rank 1",
        ]


def parallelized(layer, mesh, **style):
    return parallelize_module(nn.ModuleDict({"moe": layer}), mesh, {"moe": ExpertTensorParallel(**style)})["moe"]


def refused(rank, kind, sizes):
    """One sentence, the same on every rank, at set-up."""
    mesh, c, style = mesh_of(**sizes), config(), {}
    other = rank == dist.get_world_size() - 1
    if kind == "inner":
        c = config(intermediate_size=13)
    elif kind == "experts":
        c = config(num_experts=7)
    elif kind == "differs":
        c = config(top_k=3 - other)
    elif kind == "main_grad":
        c = config(gradient_accumulation_fusion=True)
    elif kind == "jitter":
        c = config({"jitter_eps": 0.1})
        torch.manual_seed(rank // 2 if other else 0)
    elif kind == "path":
        style = {"path": "symmetric_memory", "max_tokens": 8 + other}
    elif kind == "symmetric":
        style = {"path": "symmetric_memory", "max_tokens": 8}
        if mesh.ndim == 2 and mesh.get_local_rank("tp") == 1:
            shared_memory.provide()
    layer = nn.Linear(2, 2) if kind == "module" else MoE(c, device=device())
    try:
        parallelized(layer, mesh, **style)
    except ValueError as error:
        return re.sub(r" \(this is .*|, got DeviceMesh.*", "", str(error), flags=re.DOTALL)
    return "accepted"


def all_refused(rank, sizes, kinds):
    return {kind: refused(rank, kind, sizes) for kind in kinds}


NAME = "ExpertTensorParallel"
SAME = f"{NAME}: top_k must be the same on every rank, got 3 on"
OVER_ONE = {
    "inner": f"{NAME} needs a number of ranks that divides intermediate_size = 13, got 2",
    "differs": f"{SAME} rank 0 and 2 on rank 1",
    "main_grad": f"{NAME} shards weights as DTensors, which have no main_grad: gradient_accumulation_fusion must be "
    "False, got True",
    "module": f"{NAME} parallelizes fastmoe_cpp.MoE layers, got Linear",
    "path": f"{NAME}: max_tokens must be the same on every rank, got 8 on rank 0 and 9 on rank 1",
    "symmetric": f"path must be 'auto' over a mesh of one dimension, where {NAME} exchanges no rows, got "
    "'symmetric_memory'",
    "fine": "accepted",
}
OVER_TWO = {
    "inner": OVER_ONE["inner"],
    "experts": f"{NAME} needs a number of ranks that divides num_experts = 7, got 2",
    "differs": f"{SAME} global rank 0 and 2 on global rank 3",
    "jitter": f"{NAME}: with jitter_eps = 0.1 the ranks that have the same tokens must draw the same numbers, and the "
    "state of torch's random number generator differs: give them one seed",
    # of two groups of ranks of the same part one has none
    "symmetric": "path 'symmetric_memory' needs GPUs of one host on NVLink, and this group is none: its tensors are on "
    "cpu, and it takes CUDA",
}
OVER_THREE = {
    "fine": f"{NAME} needs a mesh of one or two dimensions, such as mesh['tp'] or mesh['ep', 'tp']",
}


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [({"tp": 2}, OVER_ONE), ({"ep": 2, "tp": 2}, OVER_TWO), ({"dp": 1, "ep": 1, "tp": 2}, OVER_THREE)],
    ids=["tp", "ep x tp", "dp x ep x tp"],
)
def test_bad_set_ups_are_refused_on_every_rank(sizes, expected):
    for answers in run_ranks(all_refused, ranks_of(sizes), sizes, list(expected)):
        assert answers == expected


def not_twice(rank):
    mesh = mesh_of(ep=1, tp=2)
    _, spread = pair(config(), mesh["tp"])
    both = "experts over one dimension and parts of them over another are one mesh"
    for kind, over in ((ExpertTensorParallel, mesh["tp"]), (ExpertParallel, mesh["ep"])):
        where = f"{kind.__name__} must be applied to a layer once, and this one has expert_tensor_parallel=rank {rank}"
        with pytest.raises(ValueError, match=where):
            parallelize_module(spread, over, kind())
    _, spread = pair(config(), mesh["ep"])
    with pytest.raises(ValueError, match=f"this one has expert_parallel=rank 0 of 1 by all_to_all_single: {both}"):
        parallelize_module(spread, mesh["tp"], ExpertTensorParallel())
    with pytest.raises(ValueError, match=r"ExpertParallel needs a mesh of one dimension.*ExpertTensorParallel takes"):
        parallelize_module(MoE(config()), mesh, ExpertParallel())
    sharded = MoE(config())
    fully_shard(sharded, mesh=mesh["tp"])
    with pytest.raises(ValueError, match="ExpertTensorParallel must be applied before fully_shard"):
        parallelize_module(sharded, mesh["tp"], ExpertTensorParallel())


def test_it_is_applied_once_and_first():
    run_ranks(not_twice, 2)


def grads_of_mean_and_sum(rank):
    """The parts' gradients are divided by the ranks that have other tokens, and by no more."""
    mesh = mesh_of(ep=2, tp=2)
    x = batch([2, 3], 16)[mesh.get_local_rank("ep")]
    grads = []
    for gradient in ("mean", "sum"):
        _, spread = pair(config(bias=True), mesh, gradient=gradient)
        spread(x).square().sum().backward()
        average_gradients(spread, mesh)
        grads.append({n: full(p.grad) for n, p in spread.named_parameters()})
    for name, mean in grads[0].items():
        near(grads[1][name], mean * 2 if "experts" in name else mean, name)


def test_mean_and_sum(backend, enough):
    enough(4)
    run_ranks(grads_of_mean_and_sum, 4, backend=backend)
