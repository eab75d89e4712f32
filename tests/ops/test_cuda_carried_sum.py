"""The sum of the slots' input gradients into tokens by some blocks of the gate-and-up weight gradient's kernel: the
bits of both are those of the one without the other."""

from __future__ import annotations

import pytest
import torch
from support.poison import poison
from support.samples import dispatch, experts_inputs, normal, ops

from fastmoe_cpp import explain

pytestmark = pytest.mark.cuda

# T, H, I, E, K: every number of rows that a step takes together, more than one step a token, ragged numbers of tokens,
# rows that are no whole number of a warp's chunks
SIZES = [
    (33001, 1024, 512, 16, 1), (16385, 1032, 512, 16, 2), (11111, 1024, 1024, 16, 3), (4225, 1000, 768, 32, 8),
    (3361, 1024, 768, 32, 10),
]  # fmt: skip
HIDDEN, GATE_UP = 0, 1


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    monkeypatch.delenv("FASTMOE_CPP_PATH", raising=False)
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the Hopper kernels need compute capability 9.0")


def is_carried(sizes, dtype) -> bool:
    _, *products = explain.explain(sizes, str(dtype).removeprefix("torch."), "swiglu", explain.here())
    return "multiprocessors sum the slots' input gradients" in products[4]


def backward(inputs, cotangent, wanted, weight_on_input=False, main_grad=None):
    """The gradients of hidden_states and gate_up_proj, of which `wanted` are wanted."""
    plan = dispatch(inputs["topk_ids"], inputs["gate_up_proj"].shape[0])
    mask = [i in wanted for i in range(6)]
    poison()
    return ops.experts_backward_accumulate(
        cotangent, inputs["hidden_states"], inputs["gate_up_proj"], inputs["down_proj"], inputs["topk_weights"],
        *plan[:3], None, None, None, "swiglu", 1.702, 7.0, False, weight_on_input, mask, main_grad, None,
    )[:2]  # fmt: skip


def made(sizes, dtype, distribution="uniform"):
    inputs = experts_inputs(*sizes, dtype=dtype, device="cuda", distribution=distribution)
    return inputs, normal(*sizes[:2], seed=9, dtype=dtype, device="cuda")


@pytest.mark.parametrize("weight_on_input", [False, True])
@pytest.mark.parametrize("distribution", ["uniform", "zipf", "dropped"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_bits_of_each_alone(sizes, dtype, distribution, weight_on_input):
    assert is_carried(sizes, dtype)
    inputs, cotangent = made(sizes, dtype, distribution)
    if weight_on_input and distribution == "dropped":  # the weight of a pair that is dropped
        inputs["topk_weights"][inputs["topk_ids"] < 0] = torch.nan
    hidden, gate_up = backward(inputs, cotangent, {HIDDEN, GATE_UP}, weight_on_input)
    assert hidden.isfinite().all() and hidden.any()
    assert torch.equal(hidden, backward(inputs, cotangent, {HIDDEN}, weight_on_input)[HIDDEN])
    assert torch.equal(gate_up, backward(inputs, cotangent, {GATE_UP}, weight_on_input)[GATE_UP])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_beside_a_gradient_that_is_added_to_main_grad(sizes):
    assert is_carried(sizes, torch.bfloat16)
    inputs, cotangent = made(sizes, torch.bfloat16, "zipf")
    both, alone = (torch.ones_like(inputs["gate_up_proj"], dtype=torch.float32) for _ in range(2))
    hidden, _ = backward(inputs, cotangent, {HIDDEN, GATE_UP}, main_grad=both)
    backward(inputs, cotangent, {GATE_UP}, main_grad=alone)
    assert torch.equal(hidden, backward(inputs, cotangent, {HIDDEN})[HIDDEN])
    assert torch.equal(both, alone) and (both != 1).any()


@pytest.mark.parametrize("distribution", ["uniform", "zipf"])
def test_the_same_bits_again(distribution):
    inputs, cotangent = made(SIZES[3], torch.bfloat16, distribution)
    first = backward(inputs, cotangent, {HIDDEN, GATE_UP})
    for _ in range(50):
        again = backward(inputs, cotangent, {HIDDEN, GATE_UP})
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_small_layers_sum_alone():
    assert not is_carried((4096, 1024, 768, 32, 2), torch.bfloat16)
