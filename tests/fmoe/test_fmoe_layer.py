"""FMoE and FMoETransformerMLP against the sum over experts by its formula: outputs and every gradient."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fmoe_cases import H, T, assert_same, by_formula, gradients, make, tokens
from support.tolerance import BACKWARD, close
from torch import nn

from fastmoe_cpp.fmoe.gates import (
    DCGate,
    GShardGate,
    NaiveGate,
    NoisyGate,
    SwipeGate,
    SwitchGate,
    ZeroGate,
    gen_faster_gate,
)

ACTIVATIONS = {
    "module gelu": (nn.GELU(), "gelu"),
    "module gelu tanh": (nn.GELU(approximate="tanh"), "gelu_tanh"),
    "module relu": (nn.ReLU(), "relu"),
    "module silu": (nn.SiLU(), "silu"),
    "gelu": (F.gelu, "gelu"),
    "gelu tanh": (partial(F.gelu, approximate="tanh"), "gelu_tanh"),
    "relu": (F.relu, "relu"),
    "torch.relu": (torch.relu, "relu"),
    "silu": (F.silu, "silu"),
    "tanh": (torch.tanh, None),
    "lambda": (lambda x: F.relu(x) ** 2, None),
    "prelu": (nn.PReLU(init=0.3), None),
    "partial of another": (partial(F.leaky_relu, negative_slope=0.2), None),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation(name):
    activation, fused = ACTIVATIONS[name]
    layer, x = make(activation=copy.deepcopy(activation)), tokens()
    assert layer.experts.fused_activation() == fused
    output, expected = layer(x), by_formula(layer, x)
    assert_same(gradients(layer, x, output) | {"y": output}, gradients(layer, x, expected) | {"y": expected})


GATES = {
    "naive": (NaiveGate, 3),
    "noisy": (NoisyGate, 2),
    "gshard": (GShardGate, 2),
    "dc": (DCGate, 2),
    "switch": (SwitchGate, 1),
    "swipe": (SwipeGate, 2),
    "faster": (gen_faster_gate(0), 2),
    "zero": (ZeroGate, 2),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [F.gelu, torch.tanh])
@pytest.mark.parametrize("name", GATES)
def test_every_gate(name, activation, training):
    gate, top_k = GATES[name]
    layer, x = make(gate, top_k, activation).train(training), tokens()
    if name in ("gshard", "dc", "switch"):
        layer.gate.capacity = (0.8, 0.5)
    torch.manual_seed(3)
    output = layer(x)
    loss = layer.gate.get_loss()
    expected = by_formula(layer, x, seed=3)
    assert_same(gradients(layer, x, output) | {"y": output}, gradients(layer, x, expected) | {"y": expected})
    assert (loss is None) == (name in ("swipe", "zero"))


@pytest.mark.parametrize("shape", [(3, 7), (2, 1, 4), (0,), (1,), (0, 5)])
@pytest.mark.parametrize("activation", [F.gelu, torch.tanh])
def test_shapes(shape, activation):
    layer, x = make(activation=activation), tokens(*shape)
    output = layer(x)
    assert output.shape == x.shape
    output.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    if x.numel():
        assert_same({"y": output}, {"y": by_formula(layer, x)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", [F.gelu, torch.tanh])
def test_dtypes(dtype, activation):
    layer, x = make(activation=activation, dtype=dtype), tokens(dtype=dtype)
    exact, x64 = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    output, truth, eager = layer(x), by_formula(exact, x64), by_formula(layer, x)
    assert output.dtype == dtype
    close(output, truth, eager, units=4.0, of=dtype)
    truths, eagers = gradients(exact, x64, truth), gradients(layer, x, eager)
    for name, grad in gradients(layer, x, output).items():
        close(grad, truths[name], eagers[name], factor=BACKWARD, what=name, units=8.0, of=dtype)


@pytest.mark.parametrize("activation", [F.gelu, torch.tanh])
def test_autocast(activation):
    layer, x = make(activation=activation, dtype=torch.float32), tokens(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().max() > 0 for p in layer.parameters())
    exact = by_formula(copy.deepcopy(layer).double(), x.double())
    assert (output - exact).abs().max() < 0.03 * exact.abs().max()


def test_input_of_another_dtype_is_cast_to_the_weights():
    layer = make(dtype=torch.float32)
    x = tokens()
    assert layer(x).dtype == torch.float32


def test_hooks_on_the_experts_run_and_change_nothing_else():
    layer, x = make(), tokens()
    seen = []
    layer.experts.htoh4.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    expected = by_formula(layer, x)
    assert_same({"y": layer(x)}, {"y": expected})
    assert seen == [(T * 2, H)]
