"""What the checks of the Megatron-LM adapters share: their register, comparisons, plain formulas."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron_host import EXPERTS, Host
from torch import Tensor, nn

STRATEGIES = (None, "naive", "noisy", "gshard", "switch", "swipe")
CHECKS: dict[str, Callable[[Host], None]] = {}


def check(function: Callable[[Host], None]) -> Callable[[Host], None]:
    CHECKS[function.__name__] = function
    return function


def strategy_arguments(strategy: str | None) -> list[str]:
    given = [] if strategy is None else ["--balance-strategy", strategy]
    return [*given, "--top-k", "1"] if strategy == "switch" else given


def close(found: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    """Within relative of the expected tensor's RMS."""
    assert found.shape == expected.shape
    rms = expected.double().square().mean().sqrt()
    error = (found.double() - expected.double()).abs().max()
    assert error <= relative * rms, f"off by {error:.3g} where the RMS is {rms:.3g}"


def all_close(found: dict[str, Tensor], expected: dict[str, Tensor], relative: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    largest = max(t.double().square().mean().sqrt() for t in expected.values())
    for name, tensor in expected.items():
        rms = tensor.double().square().mean().sqrt()
        error = (found[name].double() - tensor.double()).abs().max()
        # a gradient that is zero but for rounding is measured by the model's largest
        assert error <= relative * max(rms, 1e-2 * largest), f"{name} is off by {error:.3g} where its RMS is {rms:.3g}"


@torch.no_grad()
def copy_weights(weights: dict[str, Tensor], model: nn.Module) -> None:
    named = dict(model.named_parameters())
    assert named.keys() == weights.keys()
    for name, parameter in named.items():
        parameter.copy_(weights[name])


def plain_experts(layer: nn.Module, x: Tensor) -> Tensor:
    """The naive gate's layer in plain torch, expert by expert: x [T, H] to [T, H]."""
    logits = F.linear(x, layer.gate.gate.weight, layer.gate.gate.bias)
    top, ids = logits.topk(layer.top_k, dim=-1)
    weights = top.softmax(dim=-1)
    output = torch.zeros_like(x)
    first, second = layer.experts.htoh4, layer.experts.h4toh
    for k in range(layer.top_k):
        for e in range(EXPERTS):
            rows = (ids[:, k] == e).nonzero()[:, 0]
            inner = F.gelu(F.linear(x[rows], first.weight[e], first.bias[e]))
            y = F.linear(inner, second.weight[e], second.bias[e]) * weights[rows, k, None]
            output = output.index_add(0, rows, y)
    return output
