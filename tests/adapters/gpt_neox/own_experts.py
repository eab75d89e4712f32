"""Our layer beside the host's own ParallelDroplessMoE, megablocks in plain torch. Run by test_real.py alone."""

import importlib
import sys
import types

import pytest
import torch
from torch import nn

from megatron_adapters import gpt_neox

HIDDEN, EXPERTS = 16, 4


def _sort(ids, bits):
    order = torch.sort(ids, stable=True)
    return order.values, order.indices


def _scatter(rows, indices, bin_ids, weights, bins, top_k):
    weighted = rows * weights[indices, None]
    return torch.zeros(len(indices) // top_k, rows.shape[1], dtype=rows.dtype).index_add(0, indices // top_k, weighted)


def _gmm(rows, weight, counts, trans_b=False):
    parts = [
        part @ (w.t() if trans_b else w) for part, w in zip(rows.split(counts.tolist()), weight, strict=True)
    ]  # fmt: skip
    return torch.cat(parts)


@pytest.fixture(scope="module")
def own(host, era):
    """The class that install() has replaced."""
    ops = types.ModuleType("megablocks.ops")
    ops.sort, ops.scatter = _sort, _scatter
    ops.histogram = lambda ids, experts: torch.bincount(ids, minlength=experts)
    ops.inclusive_cumsum = lambda counts, axis: counts.cumsum(axis)
    ops.gather = lambda rows, indices, bin_ids, bins, top_k: rows[indices // top_k]
    package = types.ModuleType("megablocks")
    package.ops = ops
    package.grouped_gemm_util = types.SimpleNamespace(ops=types.SimpleNamespace(gmm=_gmm))
    sys.modules |= {"megablocks": package, "megablocks.ops": ops}
    replaced = sys.modules.pop("megatron.model.moe")
    module = importlib.import_module("megatron.model.moe")
    sys.modules["megatron.model.moe"] = replaced
    assert module.ParallelDroplessMoE is not gpt_neox.ParallelDroplessMoE
    return module.ParallelDroplessMoE


def start(tensor):
    return nn.init.normal_(tensor, 0.0, 0.3)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("router", ["sinkhorn", "topk"])
def test_same_values_and_gradients(own, host, router, top_k, activation, training):
    args = host.arguments(
        moe_num_experts=EXPERTS, moe_top_k=top_k, moe_router_type=router, activation=activation, intermediate_size=24
    )
    theirs, ours = own(args, start, start).train(training), gpt_neox.ParallelDroplessMoE(args, start, start)
    ours.train(training).load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for scale in (0.3, 3.0):  # few and many steps of Sinkhorn's
        x = scale * torch.randn(9, 3, HIDDEN)
        results = []
        for layer in (theirs, ours):
            layer.zero_grad()
            given = x.clone().requires_grad_()
            output, bias = layer(given)
            assert bias is None
            output.sin().sum().backward()
            results.append([output.detach(), given.grad, *(p.grad for p in layer.parameters())])
        for found, expected in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-4 * expected.square().mean().sqrt().item())


@pytest.mark.parametrize("hidden", [16, 64, 80])
def test_width_and_parameters(own, host, hidden):
    args = host.arguments(moe_num_experts=EXPERTS, hidden_size=hidden, activation="gelu")
    theirs, ours = own(args, start, start), gpt_neox.ParallelDroplessMoE(args, start, start)
    shapes = [{name: tuple(p.shape) for name, p in layer.named_parameters()} for layer in (theirs, ours)]
    assert shapes[0] == shapes[1]
    for name, parameter in ours.named_parameters():
        marks = [getattr(p, "model_parallel", None) for p in (dict(theirs.named_parameters())[name], parameter)]
        assert marks[0] == marks[1], name


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "reglu"])
def test_width_of_gated_experts(own, host, activation):
    """As the host's class of gated experts, which its layer doesn't use, has it."""
    args = host.arguments(moe_num_experts=EXPERTS, activation=activation)
    theirs = sys.modules["megatron.model.moe_mlp"].ParallelGroupedLLaMAMLP(args, start, start)
    ours = gpt_neox.ParallelDroplessMoE(args, start, start).experts.mlp
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    ours.load_state_dict(theirs.state_dict())
