"""The same numbers as FastMoE's own Python, where FASTMOE_CPP_FASTMOE names a checkout of it.

Its native module needs CUDA; a few lines of torch stand in for what one process calls of it.
"""

import os
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch.utils import _pytree

import fastmoe_cpp.fmoe as ours

CHECKOUT = os.environ.get("FASTMOE_CPP_FASTMOE", "")
pytestmark = pytest.mark.skipif(not CHECKOUT, reason="FASTMOE_CPP_FASTMOE names no checkout of FastMoE")

E, D, H, T = 5, 8, 12, 30


def native():
    module = types.ModuleType("fmoe_cuda")

    def expert_count(gate, counts):
        flat = gate.flatten()
        counts += torch.bincount(flat[flat >= 0], minlength=counts.numel()).to(counts.dtype)

    def assign_pos(cumulated, gate, pos):
        flat = gate.flatten()
        dropped_last = torch.where(flat < 0, cumulated.numel(), flat)
        pos.copy_(torch.argsort(dropped_last, stable=True)[: pos.numel()])

    def prune_gate_by_capacity(gate, capacity, num_expert, world_size):
        left, kept = capacity.tolist(), gate.clone()
        flat = kept.view(-1)
        for i, e in enumerate(flat.tolist()):
            left[e] -= 1
            if left[e] < 0:
                flat[i] = -1
        return kept

    def limit_by_capacity(counts, capacity, num_expert, world_size):
        return torch.minimum(counts, capacity.long())

    def linear_forward(inp, counts, weight, bias):
        rows = inp.split(counts.tolist())
        return torch.cat([F.linear(x, weight[e], bias[e]) for e, x in enumerate(rows)])

    def linear_backward(grad, inp, counts, weight, bias):
        inp, weight, bias = (t.detach().requires_grad_() for t in (inp, weight, bias))
        with torch.enable_grad():
            output = linear_forward(inp, counts, weight, bias)
        return torch.autograd.grad(output, (inp, weight, bias), grad)

    for function in (
        expert_count, assign_pos, prune_gate_by_capacity, limit_by_capacity, linear_forward, linear_backward,
    ):  # fmt: skip
        setattr(module, function.__name__, function)
    return module


@pytest.fixture(scope="module")
def host():
    tree = types.ModuleType("tree")
    tree.map_structure = _pytree.tree_map
    tree.flatten = lambda value: _pytree.tree_flatten(value)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "fmoe_cuda", native())
        patch.setitem(sys.modules, "tree", tree)
        patch.syspath_prepend(CHECKOUT)
        import fmoe
        import fmoe.gates

        assert fmoe.__file__.startswith(CHECKOUT)
        with pytest.raises(ImportError, match="fmoe is imported already"):
            ours.install()
        yield fmoe
        for name in [n for n in sys.modules if n.split(".")[0] == "fmoe"]:
            del sys.modules[name]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("name", "top_k"),
    [("NaiveGate", 3), ("GShardGate", 2), ("DCGate", 2), ("SwitchGate", 1), ("NoisyGate", 2), ("ZeroGate", 2)],
)
@pytest.mark.parametrize("activation", [F.gelu, torch.tanh])
def test_the_same_numbers(host, name, top_k, training, activation):
    if name == "ZeroGate" or (name == "NoisyGate" and not training):
        pytest.skip("FastMoE fails there: ids on one axis, and 0 / 0 without noise")
    make = {"d_model": D, "d_hidden": H, "activation": activation, "top_k": top_k}
    theirs = host.FMoETransformerMLP(E, gate=getattr(host.gates, name), **make)
    mine = ours.FMoETransformerMLP(E, gate=getattr(ours.gates, name), **make)
    mine.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        for parameter in mine.parameters():
            parameter.normal_(0, 0.5)
    theirs.load_state_dict(mine.state_dict())
    for layer in (theirs.train(training), mine.train(training)):
        if hasattr(layer.gate, "capacity"):
            layer.gate.capacity = (0.8, 0.5)
    if name == "NoisyGate":
        # there ids have one axis, which its layer takes for one choice a token
        forward = theirs.gate.forward
        theirs.gate.forward = lambda x: (lambda ids, scores: (ids.view(-1, top_k), scores))(*forward(x))
    results = []
    for layer in (theirs, mine):
        x = torch.randn(3, T // 3, D, generator=torch.Generator().manual_seed(1)).requires_grad_()
        torch.manual_seed(2)
        output = layer(x)
        loss = layer.gate.get_loss()
        ((output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum() + 2 * loss.sum()).backward()
        grads = {n: p.grad for n, p in layer.gate.named_parameters()} | {"x": x.grad}
        experts = layer.experts
        grads |= {f"{i}.{part}": getattr(experts[i], part).weight.grad for i in range(E) for part in ("htoh4", "h4toh")}
        results.append({"output": output, "loss": loss} | grads)
    for key, expected in results[0].items():
        if expected is None:
            continue
        torch.testing.assert_close(results[1][key].view_as(expected), expected, rtol=1e-4, atol=2e-5, msg=key)
