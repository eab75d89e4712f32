"""Two ranks with half of the tokens each train as one rank with all of them."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from fastmoe_cpp import monitor, reference
from modules.cases import HIDDEN, assert_same, config, make

ROUTER = {
    "score_function": "sigmoid",
    "expert_bias": True,
    "expert_bias_update_rate": 0.01,
    "balance_loss": "global",
    "balance_loss_coefficient": 0.5,
    "z_loss_coefficient": 0.1,
}


def train(tokens, group=None):
    """A step's gradients (mean over tokens) and the updated bias, of a layer that is the same on every rank."""
    torch.manual_seed(0)
    layer = make(config(ROUTER))
    layer.balance_group = group
    layer(tokens).square().sum(-1).mean().backward()
    layer.update_expert_bias(group)
    assert (layer.router.tokens_per_expert == 0).all()
    return {n: p.grad for n, p in layer.named_parameters()} | {"expert_bias": layer.router.expert_bias}


def counted(index, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=index, world_size=2)
    torch.manual_seed(0)
    layer = make(config(ROUTER | {"balance_loss": "batch"}))
    load = monitor.LoadMonitor(layer)
    model = DistributedDataParallel(layer)
    torch.manual_seed(index)
    expected = torch.zeros_like(layer.router.tokens_per_expert)
    for step in range(3):
        x = torch.randn(5 + 4 * index, HIDDEN, dtype=torch.float64) + step
        with torch.no_grad():
            expected += reference_counts(layer, x)
        model(x).sum().backward()
    assert torch.equal(layer.router.tokens_per_expert, expected)
    load.step()
    assert torch.equal(load.counts()[""][0], expected)
    dist.destroy_process_group()


def reference_counts(layer, x):
    named = dict(layer.named_parameters()) | dict(layer.named_buffers())
    return reference.moe(x, named, layer.config).tokens_per_expert


def test_data_parallel_ranks_count_their_own_tokens(tmp_path):
    """DistributedDataParallel spreads rank 0's buffers before every forward pass."""
    mp.spawn(counted, (str(tmp_path),), nprocs=2)


def rank(index, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=index, world_size=2)
    tokens = torch.load(f"{folder}/tokens.pt", weights_only=True)
    torch.save(train(tokens.chunk(2)[index], dist.group.WORLD), f"{folder}/{index}.pt")
    dist.destroy_process_group()


def test_two_ranks_are_one(tmp_path):
    tokens = torch.randn(2, 24, HIDDEN, dtype=torch.float64)
    tokens[1] += 0.5  # the ranks' loads differ
    torch.save(tokens.flatten(0, 1), tmp_path / "tokens.pt")
    mp.spawn(rank, (str(tmp_path),), nprocs=2)
    a, b = (torch.load(tmp_path / f"{i}.pt", weights_only=True) for i in range(2))
    whole = train(tokens.flatten(0, 1))
    assert torch.equal(a["expert_bias"], b["expert_bias"]) and torch.equal(a["expert_bias"], whole["expert_bias"])
    assert_same({n: (a[n] + b[n]) / 2 for n in whole}, whole, rtol=1e-11)
    alone = [train(half) for half in tokens]
    assert not torch.allclose(
        (alone[0]["router.weight"] + alone[1]["router.weight"]) / 2, whole["router.weight"], rtol=1e-4
    )
