"""DistributedGroupedDataParallel on gloo, and one state dict of experts that lie on two processes."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.ranks import run_ranks
from torch import nn

from fastmoe_cpp.fmoe import (
    DistributedGroupedDataParallel,
    FMoE,
    FMoETransformerMLP,
    merged_state_dict,
    split_state_dict,
)
from fastmoe_cpp.fmoe.layers import mark_module_parallel_comm
from fastmoe_cpp.fmoe.transformer import _Expert

W, D, H, LOCAL = 2, 6, 8, 2
TAGS = ("dp", "gate", "moe", "world", "none", "own", None)


class Tagged(nn.Module):
    """One parameter a tag, None being without one."""

    def __init__(self, rank, dtype=torch.float32):
        super().__init__()
        self.layers = nn.ModuleDict({str(tag): nn.Linear(3, 2, bias=False, dtype=dtype) for tag in TAGS})
        for index, (tag, layer) in enumerate(self.layers.items()):
            nn.init.constant_(layer.weight, 10.0 * index + rank)
            if tag != "None":
                mark_module_parallel_comm(layer, tag)

    def forward(self, x):
        return sum(layer(x) for layer in self.layers.values())


def gradient(rank, tag):
    return torch.randn(2, 3, generator=torch.Generator().manual_seed(100 * rank + TAGS.index(tag)))


def reduced(rank, dtype, options, groups):
    model = DistributedGroupedDataParallel(Tagged(rank, dtype), need_sync=False, **groups)
    for tag in TAGS:
        model.module.layers[str(tag)].weight.grad = gradient(rank, tag).to(dtype)
    getattr(model, "allreduce_params" if options else "allreduce_gradients")(**options)
    return {tag: model.module.layers[str(tag)].weight.grad for tag in TAGS}


OPTIONS = {
    "mean": {},
    "sum": {"no_scale": True},
    "after": {"reduce_after": True},
    "sum after": {"no_scale": True, "reduce_after": True},
    "float32": {"fp32_allreduce": True},
}


def data_parallel(rank):
    alone = [dist.new_group([r]) for r in range(W)]
    groups = {"own_group": alone[rank], "dp_group": None}
    results = {
        (name, dtype): reduced(rank, dtype, options, groups)
        for name, options in OPTIONS.items()
        for dtype in (torch.float32, torch.bfloat16, torch.float64)
    }
    synced = DistributedGroupedDataParallel(Tagged(rank), **groups)
    results["synced"] = {tag: synced.module.layers[str(tag)].weight.detach() for tag in TAGS}
    results["forward"] = torch.equal(synced(torch.ones(1, 3)), synced.module(torch.ones(1, 3)))

    partly = DistributedGroupedDataParallel(Tagged(rank), need_sync=False, **groups)
    if rank == 1:
        partly.module.layers["dp"].weight.grad = torch.ones(2, 3)
    partly.module.layers["gate"].weight.requires_grad_(False)
    partly.allreduce_gradients()
    results["partly"] = {tag: partly.module.layers[str(tag)].weight.grad for tag in TAGS}

    results["refused"] = []
    for make in (
        lambda: DistributedGroupedDataParallel(Tagged(rank)),
        lambda: DistributedGroupedDataParallel(Tagged(rank), auto_allreduce=True),
        lambda: DistributedGroupedDataParallel(Tagged(rank), device_ids=[0]),
    ):
        try:
            make()
        except (TypeError, ValueError) as error:
            results["refused"].append(str(error))
    return results


def test_data_parallel():
    results = run_ranks(data_parallel, W)
    for name, options in OPTIONS.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for tag in TAGS:
                both = torch.stack([gradient(r, tag).to(dtype).double() for r in range(W)])
                for rank, result in enumerate(results):
                    expected = both[rank]
                    if tag not in ("none", "own"):
                        expected = both.sum(0) if options.get("no_scale") else both.mean(0)
                    actual = result[name, dtype][tag]
                    assert actual.dtype == dtype
                    # of two 16-bit terms there is one rounding with float32 sums, and one of the sum without
                    torch.testing.assert_close(
                        actual.double(), expected, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps * 1e-2
                    )
    for rank, result in enumerate(results):
        for index, tag in enumerate(TAGS):
            value = 10.0 * index + (rank if tag in ("none", "own") else 0)
            assert (result["synced"][tag] == value).all(), tag
        assert result["forward"]
        assert torch.equal(result["partly"]["dp"], torch.full((2, 3), 0.5))
        assert all(result["partly"][tag] is None for tag in TAGS if tag != "dp")
        missing, automatic, other = result["refused"]
        assert missing.startswith("layers.own.weight has the tag 'own', for which there is no group: give own_group")
        assert automatic.startswith("auto_allreduce must be False")
        assert "got the argument 'device_ids'" in other


def test_without_processes_it_is_refused():
    with pytest.raises(RuntimeError, match="torch.distributed must be initialised"):
        DistributedGroupedDataParallel(nn.Linear(2, 2))


# --- a training step, and checkpoints ---------------------------------------------------------------------------------


class Stacked(FMoE):
    def __init__(self, **kwargs):
        super().__init__(d_model=D, **kwargs)
        self.experts = _Expert(kwargs["num_expert"], D, H, F.silu)
        mark_module_parallel_comm(self.experts, "none")
        mark_module_parallel_comm(self.gate, "gate")


class Net(nn.Module):
    def __init__(self, world_size):
        super().__init__()
        size = {"num_expert": W * LOCAL // world_size, "world_size": world_size}
        self.first = nn.Linear(D, D)
        self.blocks = nn.ModuleList([FMoETransformerMLP(d_model=D, d_hidden=H, **size), Stacked(**size)])
        self.own = FMoE(d_model=D, expert=lambda d: nn.Linear(d, d), **size)
        self.own.mark_parallel_comm()

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.own(x)


class Odd(FMoE):
    """Experts in one module whose parameters' axes mean nobody knows what."""

    def __init__(self):
        super().__init__(2, D, W)
        self.experts = nn.Bilinear(D, D, D)


def batch(rank):
    return torch.randn(11, D, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def train_a_step(rank):
    torch.manual_seed(rank)
    net = Net(W).double()
    model = DistributedGroupedDataParallel(net)
    start = merged_state_dict(net, every_rank=True)
    model(batch(rank)).square().mean().backward()
    model.allreduce_gradients()
    grads = {n: p.grad for n, p in net.named_parameters()}
    # the way to the gradient of the mean loss for the experts too
    net.zero_grad()
    (model(batch(rank)).square().mean() / W).backward()
    model.allreduce_gradients(no_scale=True)
    for name, parameter in net.named_parameters():
        expected = grads[name] / (W if ".experts." in name else 1)
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-13, msg=name)
        parameter.grad = grads[name]
    torch.optim.SGD(net.parameters(), 0.1).step()
    end = merged_state_dict(net)
    fresh = Net(W).double()
    fresh.load_state_dict(split_state_dict(fresh, start))
    again = fresh(batch(rank)).detach()
    # and of a file from before experts had a name each
    block = fresh.blocks[0]
    stacked = {k: v for k, v in start.items() if not k.startswith("blocks.0.experts.")} | {
        f"blocks.0.experts.{name}": torch.cat([start[f"blocks.0.experts.{e}.{name}"] for e in range(W * LOCAL)])
        for name in ("htoh4.weight", "htoh4.bias", "h4toh.weight", "h4toh.bias")
    }
    nn.init.zeros_(block.experts.htoh4.weight)
    fresh.load_state_dict(split_state_dict(fresh, stacked))
    torch.testing.assert_close(fresh(batch(rank)).detach(), again, rtol=0, atol=0)
    for wrong in (3, 5):
        few = {k: v for k, v in start.items() if ".experts.3." not in k or wrong != 3}
        if wrong == 5:
            few |= {k.replace("experts.3", "experts.4"): v for k, v in start.items() if "experts.3" in k}
        try:
            split_state_dict(fresh, few)
        except ValueError as error:
            assert "4 experts over its 2 processes" in str(error)
        else:
            raise AssertionError
    odd = ""
    try:
        merged_state_dict(Odd())
    except ValueError as error:
        odd = str(error)
    return {"start": start, "end": end, "grads": grads, "again": again, "odd": odd}


def test_a_training_step_and_one_checkpoint():
    results = run_ranks(train_a_step, W)
    net = Net(1).double()
    start = results[0]["start"]
    assert start.keys() == results[1]["start"].keys() == net.state_dict().keys()
    assert all(torch.equal(v, results[1]["start"][k]) for k, v in start.items())
    net.load_state_dict(start)
    outputs = [net(batch(r)) for r in range(W)]
    for result, output in zip(results, outputs, strict=True):
        torch.testing.assert_close(result["again"], output.detach(), rtol=1e-10, atol=1e-12)
    # the mean loss over processes is what data parallelism minimises; an expert gets the sum of the processes'
    sum(y.square().mean() for y in outputs).backward()
    grads = {n: p.grad for n, p in net.named_parameters()}
    for name in results[0]["grads"]:
        both = [r["grads"][name] for r in results]
        if ".experts." not in name:
            torch.testing.assert_close(both[0], both[1], rtol=0, atol=0)
            torch.testing.assert_close(both[0], grads[name] / W, rtol=1e-9, atol=1e-13)
        elif name.startswith("own"):
            for rank in range(W):
                owned = name.split(".")
                owned[2] = str(int(owned[2]) + rank * LOCAL)
                torch.testing.assert_close(both[rank], grads[".".join(owned)], rtol=1e-9, atol=1e-13)
        else:
            torch.testing.assert_close(torch.cat(both), grads[name], rtol=1e-9, atol=1e-13)
    # the end: the first process alone has the file, and it is the same step in one process
    assert results[1]["end"] == {}
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter -= 0.1 * grads[name] / (1 if ".experts." in name else W)
    end = net.state_dict()
    assert end.keys() == results[0]["end"].keys()
    for name, value in results[0]["end"].items():
        torch.testing.assert_close(value, end[name], rtol=1e-9, atol=1e-12, msg=name)
    for result in results:
        assert result["odd"].startswith("experts.weight must belong to a FMoELinear, whose first axis is the experts")
        assert result["odd"].endswith("belongs to a Bilinear")
