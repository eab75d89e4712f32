"""ParallelDroplessMoE against the formulas in plain torch; its parameters; two tensor-parallel ranks against one."""

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from support.ranks import run_ranks
from torch import nn

from megatron_adapters import gpt_neox

HIDDEN, WIDTH, EXPERTS, SEQUENCE, BATCH = 16, 24, 4, 7, 3


def arguments(**changes):
    fields = {
        "hidden_size": HIDDEN, "moe_num_experts": EXPERTS, "moe_top_k": 2, "moe_router_type": "sinkhorn",
        "activation": "gelu", "intermediate_size": WIDTH, "params_dtype": torch.float32, "model_parallel_size": 1,
    }  # fmt: skip
    return types.SimpleNamespace(**fields | changes)


def start(tensor):
    return nn.init.normal_(tensor, 0.0, 0.5)


def layer_of(**changes):
    return gpt_neox.ParallelDroplessMoE(arguments(**changes), start, start)


def sinkhorn(logits, iterations=3, tolerance=1e-4):
    """Alternately scaled rows and columns, ended early as the host ends it."""
    cost = logits.float().exp()
    tokens, experts = cost.shape
    columns = 1 / (experts * cost.sum(0))
    for _ in range(iterations):
        rows = 1 / tokens / ((cost * columns).sum(1) + 1e-8)
        before, columns = columns, 1 / experts / ((cost * rows[:, None]).sum(0) + 1e-8)
        if (before - columns).abs().mean() < tolerance:
            break
    return cost * columns * rows[:, None]


def reference(layer, x, router, top_k, activation):
    rows = x.reshape(-1, HIDDEN)
    logits = rows @ layer.router.layer.weight.t()
    if router == "sinkhorn" and top_k == 1:
        scores = logits.sigmoid()
    else:
        scores = logits.softmax(-1)
    chooser = sinkhorn(logits.detach()) if router == "sinkhorn" and layer.training else scores
    ids = chooser.topk(top_k, dim=1).indices
    curve = {"gelu": F.gelu, "relu": F.relu, "swish": F.silu, "swiglu": F.silu, "geglu": F.gelu, "reglu": F.relu}
    mlp = {name: w.view(EXPERTS, WIDTH, HIDDEN) for name, w in layer.experts.mlp.named_parameters()}
    output = torch.zeros_like(rows)
    for e in range(EXPERTS):
        inner = curve[activation](rows @ mlp["w1"][e].t())
        if "w3" in mlp:
            inner = inner * (rows @ mlp["w3"][e].t())
        weight = (scores.gather(1, ids) * (ids == e)).sum(1, keepdim=True)
        output = output + weight * (inner @ mlp["w2"][e])
    return output.reshape(x.shape)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "relu", "swish", "swiglu", "geglu", "reglu"])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("router", ["sinkhorn", "topk"])
def test_formulas(router, top_k, activation, training):
    layer = layer_of(moe_router_type=router, moe_top_k=top_k, activation=activation, params_dtype=torch.float64)
    layer.train(training)
    other = copy.deepcopy(layer)
    x = torch.randn(SEQUENCE, BATCH, HIDDEN, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    output, bias = layer(x)
    assert bias is None
    output.sin().sum().backward()
    expected = reference(other, y, router, top_k, activation)
    expected.sin().sum().backward()
    pairs = {"output": (output, expected), "x": (x.grad, y.grad)}
    pairs |= {n: (p.grad, q.grad) for (n, p), q in zip(layer.named_parameters(), other.parameters(), strict=True)}
    for name, (found, wanted) in pairs.items():
        assert (found - wanted).abs().max() <= 1e-11 * wanted.square().mean().sqrt(), name


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_sinkhorn(scale):
    logits = scale * torch.randn(50, EXPERTS)
    torch.testing.assert_close(gpt_neox.dropless.sinkhorn(logits), sinkhorn(logits), rtol=1e-5, atol=1e-9)


def test_jitter():
    layer = layer_of(moe_router_type="topk", moe_jitter_eps=0.3)
    x = torch.randn(SEQUENCE, BATCH, HIDDEN)
    rows = x.reshape(-1, HIDDEN)
    torch.manual_seed(4)
    found = layer.route(rows)
    torch.manual_seed(4)
    noise = torch.empty_like(rows).uniform_(0.7, 1.3)
    expected = ((rows * noise) @ layer.router.layer.weight.t()).softmax(-1).topk(2, dim=1)
    torch.testing.assert_close(found[0], expected.values)
    assert torch.equal(found[1], expected.indices)
    layer.eval()
    assert torch.equal(layer.route(rows)[0], layer.route(rows)[0])


@pytest.mark.parametrize(
    "hidden, given, activation, width",
    [(16, None, "gelu", 256), (64, None, "gelu", 256), (65, None, "gelu", 512), (16, 40, "gelu", 40),
     (96, None, "swiglu", 256), (100, None, "swiglu", 512), (16, 40, "swiglu", 40)],
)  # fmt: skip
def test_width(hidden, given, activation, width):
    args = arguments(hidden_size=hidden, intermediate_size=given, activation=activation)
    assert gpt_neox.expert_width(args) == width
    layer = gpt_neox.ParallelDroplessMoE(args, start, start)
    expected = {"router.layer.weight": (EXPERTS, hidden)}
    for name in ("w1", "w3", "w2") if activation == "swiglu" else ("w1", "w2"):
        expected[f"experts.mlp.{name}"] = (EXPERTS * width, hidden)
    assert {name: tuple(p.shape) for name, p in layer.state_dict().items()} == expected


def test_bad_input():
    with pytest.raises(ValueError, match=r"x must have shape \[s, b, 16\], got \[3, 16\]"):
        layer_of()(torch.randn(3, HIDDEN))


@pytest.mark.parametrize("shape", [(0, 2), (1, 1)])
def test_few_tokens(shape):
    layer = layer_of(moe_router_type="topk")
    x = torch.randn(*shape, HIDDEN, requires_grad=True)
    output, _ = layer(x)
    output.sum().backward()
    assert output.shape == x.shape and all(p.grad.isfinite().all() for p in layer.parameters())


def on_rank(rank, router):
    import torch.distributed as dist

    torch.manual_seed(3)
    one, changes = layer_of(moe_router_type=router), {"moe_router_type": router, "model_parallel_size": 2}
    layer = gpt_neox.ParallelDroplessMoE(arguments(**changes), start, start, group=dist.group.WORLD)
    drawn = layer.experts.mlp.w1.detach().clone()
    own = slice(rank * EXPERTS // 2 * WIDTH, (rank + 1) * EXPERTS // 2 * WIDTH)
    with torch.no_grad():
        layer.router.layer.weight.copy_(one.router.layer.weight)
        for name in ("w1", "w2"):
            getattr(layer.experts.mlp, name).copy_(getattr(one.experts.mlp, name)[own])
    x = torch.randn(SEQUENCE, BATCH, HIDDEN)
    results = []
    for each in (one, layer):
        given = x.clone().requires_grad_()
        output, _ = each(given)
        output.sin().sum().backward()
        results.append((output.detach(), given.grad, each.router.layer.weight.grad))
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    for name in ("w1", "w2"):
        expected = getattr(one.experts.mlp, name).grad[own]
        torch.testing.assert_close(getattr(layer.experts.mlp, name).grad, expected, rtol=1e-4, atol=1e-6)
    return drawn, torch.rand(1)


def both_routers(rank):
    return [on_rank(rank, router) for router in ("sinkhorn", "topk")]


def test_two_tensor_parallel_ranks():
    first, second = run_ranks(both_routers, 2)
    for (drawn, after), (other, other_after) in zip(first, second, strict=True):
        assert not torch.equal(drawn, other)  # every rank draws experts of its own
        assert torch.equal(after, other_after)  # and the generators go on together


def test_the_groups_size_is_checked():
    with pytest.raises(ValueError, match="must have model_parallel_size = 2 ranks, has 1"):
        gpt_neox.ParallelDroplessMoE(
            arguments(model_parallel_size=2), start, start, group=types.SimpleNamespace(size=lambda: 1)
        )
