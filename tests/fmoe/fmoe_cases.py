"""A layer of a test's size, and the same computed by its formula."""

import fmoe_reference as reference
import torch
from torch import nn

from fastmoe_cpp.fmoe import FMoETransformerMLP
from fastmoe_cpp.fmoe.gates import NaiveGate

T, D, H, E = 23, 10, 14, 5


def make(gate=NaiveGate, top_k=2, activation=None, dtype=torch.float64, **kwargs):
    """A layer whose experts' weights are large enough to tell them apart."""
    layer = FMoETransformerMLP(E, D, H, activation or nn.GELU(), gate=gate, top_k=top_k, **kwargs)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "experts" in name and "activation" not in name:
                parameter.normal_(0, 0.4)
    return layer.to(dtype)


def tokens(*shape, dtype=torch.float64, device="cpu"):
    return torch.randn(*(shape or (T,)), D, dtype=torch.float64).to(device, dtype).requires_grad_()


def gradients(layer, x, output):
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype, device=output.device).reshape(output.shape)
    wanted = {"x": x} | dict(layer.named_parameters())
    grads = torch.autograd.grad((output * weights).sum(), list(wanted.values()), allow_unused=True, retain_graph=True)
    return dict(zip(wanted, grads, strict=True))


def assert_same(actual, expected, relative=1e-11):
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        if tensor is None or expected[name] is None:
            # one that nothing reaches
            assert all(t is None or not t.any() for t in (tensor, expected[name])), name
            continue
        size = float(expected[name].detach().abs().max()) if tensor.numel() else 0.0
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=relative * size + 1e-14, msg=name)


def by_formula(layer, x, seed=None):
    """The gate's own choices (its tests are elsewhere), the experts by hand."""
    if seed is not None:
        torch.manual_seed(seed)
    flat = x.reshape(-1, x.shape[-1])
    ids, scores = layer.gate(flat)
    experts = reference.mlps(layer.experts.htoh4, layer.experts.h4toh, layer.experts.activation)
    return reference.moe(flat, ids, scores, experts).reshape(x.shape)
