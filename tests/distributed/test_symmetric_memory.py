"""Rows through symmetric memory: the same bits as through all_to_all_single, bounds, sharing, absent ranks.

On the CPU the ranks map each other's files (support.shared_memory); where there are two GPUs, they are the real thing.
"""

import time
from dataclasses import replace

import pytest
import torch
from modules.cases import config
from support import shared_memory
from support.distributions import ids as ids_of
from support.ranks import device, run_ranks
from torch import nn
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint

from distributed.layers import batch, ep_mesh, full, pair
from distributed.test_expert_parallel import TWELVE, check_ranks
from distributed.test_training import check_training
from fastmoe_cpp import MoE
from fastmoe_cpp.parallel import ExchangeError, ExpertParallel

SYMMETRIC = {"path": "symmetric_memory", "max_tokens": 32}
ROUTINGS = ("uniform", "zipf", "all_to_one", "last_empty", "duplicates", "dropped")


def on_cpu_too(rank, function, *args, **style):
    """function(rank, *args, **style) where the CPU has symmetric memory."""
    shared_memory.provide()
    return function(rank, *args, **style)


def one_step(rank, ranks, **style):
    if ranks < 4:
        check_ranks(rank, ranks, **SYMMETRIC)
    if ranks > 1:
        check_ranks(rank, ranks, **SYMMETRIC, max_rows=32 * ranks)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_one_step_is_one_ranks(ranks, backend, enough):
    enough(ranks)
    run_ranks(on_cpu_too, ranks, one_step, ranks, backend=backend)


def hundred_steps(rank, ranks):
    check_training(rank, ranks, **SYMMETRIC, max_rows=32 * ranks)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_hundred_steps_are_one_ranks(ranks, backend, enough):
    enough(ranks)
    run_ranks(on_cpu_too, ranks, hundred_steps, ranks, backend=backend)


def results(layer, x, ids, cotangent):
    x = x.clone().requires_grad_()
    y = layer.forward_with_routing(x, topk_ids=ids).hidden_states
    y.backward(cotangent)
    grads = [x.grad, *(full(p.grad) for p in layer.parameters())]
    for p in layer.parameters():
        p.grad = None
    return [y.detach(), *grads]


def same_bits(rank, ranks, hidden, inner):
    mesh = ep_mesh(ranks)
    shape = replace(TWELVE, hidden_size=hidden, intermediate_size=inner)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        _, plain = pair(shape, mesh, dtype=dtype, path="all_to_all_single")
        others = [pair(shape, mesh, dtype=dtype, **SYMMETRIC, **more)[1] for more in ({}, {"max_rows": 32 * ranks})]
        for routing in ROUTINGS:
            for sequences in ([5, 5, 5, 5][:ranks], [16, 0, 3, 1][:ranks], [0, 2, 0, 0][:ranks]):
                x, cotangent = (batch(sequences, hidden, seed, dtype)[rank] for seed in (0, 1))
                ids = ids_of(routing, x.shape[0] * 2, 12, 5, seed=rank)[0].to(device())
                expected = results(plain, x, ids, cotangent)
                for other in others:
                    for i, (a, b) in enumerate(zip(results(other, x, ids, cotangent), expected, strict=True)):
                        assert torch.equal(a, b), (i, dtype, routing, sequences, (a - b).abs().max())


@pytest.mark.parametrize("hidden", [16, 7])
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_same_bits_as_all_to_all_single(ranks, hidden, backend, enough):
    enough(ranks)
    run_ranks(on_cpu_too, ranks, same_bits, ranks, hidden, 12, backend=backend)


class Two(nn.Module):
    """Layers of different sizes in one workspace, recomputed, the first without a gradient of its input."""

    def __init__(self, **style):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.then = (pair(config(top_k=k), ep_mesh(2), **style)[1] for k in (3, 2))

    def forward(self, x):
        return checkpoint(self.then, self.first(x), use_reentrant=False)


def shares(rank):
    models = [Two(path="all_to_all_single"), Two(**SYMMETRIC), Two(path="auto", max_tokens=64, max_rows=128)]
    assert "symmetric_memory" in repr(models[1]) and "symmetric_memory" in repr(models[2])
    for seed in range(5):
        x = batch([4, 6], 16, seed)[rank]
        made = []
        for model in models:
            with torch.no_grad():
                model(x)
            y = model(x)
            y.square().sum().backward()
            made.append([y.detach(), *(full(p.grad) for p in model.parameters())])
            model.zero_grad()
        for other in made[1:]:
            for a, b in zip(other, made[0], strict=True):
                assert torch.equal(a, b)
    first = models[1].first
    (grad,) = torch.autograd.grad(first(x).square().sum(), first.router.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="has no gradient of its own: differentiate through this layer once"):
        grad.sum().backward()


def test_layers_share_a_workspace(backend):
    run_ranks(on_cpu_too, 2, shares, backend=backend)


def bounds(rank):
    mesh = ep_mesh(2)
    _, spread = pair(config(), mesh, path="symmetric_memory", max_tokens=4, max_rows=5)
    x = batch([2, 2], 16)[rank]
    ids = torch.zeros(4, 3, dtype=torch.int64)
    spread.forward_with_routing(x[:1], topk_ids=ids[:2])
    where = f"rank {rank} of 2 in group"
    with pytest.raises(ValueError, match=f"max_tokens = 4 tokens on every rank, got 6 on {where}"):
        spread(torch.cat([x, x[:1]]))
    # all eight rows go to the first rank
    if rank == 0:
        sentence = "expert-parallel dispatch: rank 0 of 2 gets 8 rows, which is more than max_rows = 5"
        with pytest.raises(ValueError, match=sentence):
            spread.forward_with_routing(x, topk_ids=ids)
        return
    spread.experts.parallel.path.workspace.timeout_ms = 500
    start = time.monotonic()
    sentence = "expert-parallel combine failed on rank 1 of 2: rank 0 did not come within 500 ms"
    with pytest.raises(ExchangeError, match=sentence):
        spread.forward_with_routing(x, topk_ids=ids)
    assert 0.4 < time.monotonic() - start < 10


def test_bounds_and_a_rank_that_does_not_come():
    run_ranks(on_cpu_too, 2, bounds)


def incapable(rank):
    """Groups without symmetric memory: refused on every rank, and 'auto' is all_to_all_single."""
    assert "by all_to_all_single" in repr(pair(config(), ep_mesh(2), max_tokens=8, max_rows=16)[1])
    try:
        pair(config(), ep_mesh(2), path="symmetric_memory", max_tokens=8)
    except ValueError as error:
        refused = str(error)
    try:
        parallelize_module(MoE(config()), ep_mesh(2), ExpertParallel(max_tokens=8 + rank))
    except ValueError as error:
        return refused, str(error)
    return refused, "accepted"


def test_groups_without_it():
    for refused, differs in run_ranks(incapable, 2):
        assert refused == (
            "path 'symmetric_memory' needs GPUs of one host on NVLink, and this group is none: its tensors are on cpu, "
            "and it takes CUDA"
        )
        assert differs.startswith("ExpertParallel: max_tokens must be the same on every rank, got 8 on rank 0 and 9 on")
