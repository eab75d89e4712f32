"""Memory nobody wrote is never exposed or read: results are the same whatever the allocator hands out."""

import contextlib

import pytest
import torch
from support.catalogue import CATALOGUE, Setting, calls, run, tensors
from support.samples import dispatch, experts_inputs, leaves, normal, ops, run_experts


@contextlib.contextmanager
def poisoned(device):
    """New memory is NaN, or the largest integer. On CUDA the caching allocator's free blocks are filled as well."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        if device == "cuda":
            blocks = [torch.full((n,), float("nan"), device=device) for n in (64, 512, 4096, 2**18, 2**20, 2**22)]
            del blocks
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def test_the_poison_works(device):
    with poisoned(device):
        assert torch.empty(100, device=device).isnan().all()
        assert (torch.empty(100, dtype=torch.int32, device=device) == 2**31 - 1).all()


def same_bits(a, b):
    assert a.shape == b.shape and a.dtype == b.dtype
    assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) and torch.equal(a.isnan(), b.isnan())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_every_operator_writes_all_it_returns(name, dtype, device):
    """Dropped pairs and capacity included: no NaN where inputs have none, and the same bits as with clean memory."""
    for clean, dirty in zip(
        calls(name, device=device, dtype=dtype), calls(name, device=device, dtype=dtype), strict=True
    ):
        expected = run(name, clean)
        with poisoned(device):
            actual = run(name, dirty)
        for a, b in zip(tensors(expected), tensors(actual), strict=True):
            same_bits(a, b)
            assert not b.is_floating_point() or b.isfinite().all()


@pytest.mark.parametrize(
    "tokens,experts,top_k,capacity", [(0, 5, 2, None), (1, 5, 2, None), (40, 9, 3, 2), (40, 300, 1, None), (7, 3, 3, 0)]
)
@pytest.mark.parametrize("distribution", ["uniform", "all_to_one", "one_token", "dropped", "first_empty", "last_empty"])
@pytest.mark.parametrize("recompute", [False, True])
def test_experts_forward_and_backward(tokens, experts, top_k, capacity, distribution, recompute, device):
    """Experts without tokens get a gradient of exact zeros, tokens without experts an output and gradient of exact
    zeros."""
    for dtype in (torch.float32, torch.bfloat16):
        inputs = experts_inputs(
            tokens, 16, 8, experts, top_k, dtype=dtype, device=device, distribution=distribution, bias=True
        )
        with poisoned(device):
            plan = dispatch(inputs["topk_ids"], experts, capacity=capacity)
            given = leaves(inputs)
            out = run_experts(given, plan, recompute=recompute)
            names = [n for n in given if given[n].is_floating_point()]
            cotangent = normal(tokens, 16, seed=3, dtype=dtype, device=device)
            grads = dict(zip(names, torch.autograd.grad(out, [given[n] for n in names], cotangent), strict=True))
        assert out.isfinite().all() and all(g.isfinite().all() for g in grads.values())
        kept = plan.token_slot >= 0
        idle = torch.ones(experts, dtype=torch.bool, device=device)
        idle[inputs["topk_ids"][kept]] = False
        for name in ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias"):
            assert (grads[name][idle] == 0).all(), name
        assert (out[~kept.any(dim=1)] == 0).all() and (grads["hidden_states"][~kept.any(dim=1)] == 0).all()
        assert (grads["topk_weights"][~kept] == 0).all()


def test_rows_of_no_slot_are_not_read(device):
    """0 * NaN is NaN: so NaN behind the last offset must not meet even a zero."""
    s = Setting(device, torch.float32)
    served = int(s.plan.expert_offsets[-1])
    slots = s.tokens * s.top_k
    assert served < slots
    rows, weight = s.new(slots, s.hidden), s.new(s.experts, s.inner, s.hidden)
    grad = s.new(slots, s.inner)
    poison_rows, poison_grad = rows.clone(), grad.clone()
    poison_rows[served:] = poison_grad[served:] = float("nan")
    offsets = s.plan.expert_offsets
    same_bits(ops.grouped_linear(poison_rows, weight, offsets), ops.grouped_linear(rows, weight, offsets))
    for a, b in zip(
        ops.grouped_linear_backward(poison_grad, poison_rows, weight, offsets, [True] * 3),
        ops.grouped_linear_backward(grad, rows, weight, offsets, [True] * 3),
        strict=True,
    ):
        same_bits(a, b)
        assert a.isfinite().all()
    same_bits(ops.gather_backward(poison_rows, s.plan.token_slot), ops.gather_backward(rows, s.plan.token_slot))
    same_bits(ops.combine(poison_rows, s.weights, *s.plan[:3]), ops.combine(rows, s.weights, *s.plan[:3]))
    out_grad = s.new(s.tokens, s.hidden)
    for a, b in zip(
        ops.combine_backward(out_grad, poison_rows, s.weights, *s.plan[:3], [True, True]),
        ops.combine_backward(out_grad, rows, s.weights, *s.plan[:3], [True, True]),
        strict=True,
    ):
        same_bits(a, b)


def test_slot_index_behind_the_last_offset_is_not_read(device):
    s = Setting(device, torch.float32)
    served = int(s.plan.expert_offsets[-1])
    wild = s.plan.slot_index.clone()
    wild[served:] = 2**31 - 1
    plan = (wild, *s.plan[1:3])
    x, rows, grad = s.new(s.tokens, s.hidden), s.new(s.tokens * s.top_k, s.hidden), s.new(s.tokens, s.hidden)
    same_bits(ops.gather(x, *plan), ops.gather(x, *s.plan[:3]))
    same_bits(ops.combine(rows, s.weights, *plan), ops.combine(rows, s.weights, *s.plan[:3]))
    for a, b in zip(
        ops.combine_backward(grad, rows, s.weights, *plan, [True, True]),
        ops.combine_backward(grad, rows, s.weights, *s.plan[:3], [True, True]),
        strict=True,
    ):
        same_bits(a, b)
    made = experts_inputs(s.tokens, s.hidden, 4, s.experts, s.top_k, dtype=torch.float32, device=device)
    made["topk_weights"] = s.weights
    results = []
    for p in (plan, s.plan[:3]):
        given = leaves(made)
        out = run_experts(given, p)
        results.append([out, *torch.autograd.grad(out.sum(), [v for v in given.values() if v.is_floating_point()])])
    for a, b in zip(*results, strict=True):
        same_bits(a, b)


def test_weights_of_dropped_pairs_are_not_read(device):
    """NaN weights at pairs that capacity or -1 dropped reach neither outputs nor gradients."""
    s = Setting(device, torch.float32)
    lost = s.plan.token_slot < 0
    assert lost.any()
    made = experts_inputs(s.tokens, s.hidden, 4, s.experts, s.top_k, dtype=torch.float32, device=device)
    results = []
    for poison in (False, True):
        for weight_on_input in (False, True):
            made["topk_weights"] = s.weights.masked_fill(lost, float("nan")) if poison else s.weights
            given = leaves(made)
            out = run_experts(given, s.plan, weight_on_input=weight_on_input)
            floats = [v for v in given.values() if v.is_floating_point()]
            results.append([out, *torch.autograd.grad(out.sum(), floats)])
    for clean, dirty in zip(results[:2], results[2:], strict=True):
        for a, b in zip(clean, dirty, strict=True):
            same_bits(a, b)
            assert b.isfinite().all()
