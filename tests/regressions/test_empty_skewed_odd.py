"""Failures of empty, skewed and oddly shaped work."""

import pytest
import torch
from support import oracle, tolerance
from support.samples import dispatch, experts_inputs, laid_out, leaves, normal, ops, run_experts

from fastmoe_cpp import MoE, MoEConfig, fused_experts

FLOATS = ("hidden_states", "gate_up_proj", "down_proj", "topk_weights")


def gradients(inputs, cotangent, **options):
    given = leaves(inputs)
    out = run_experts(given, **options)
    names = [n for n in given if given[n].is_floating_point()]
    return out, dict(zip(names, torch.autograd.grad(out, [given[n] for n in names], cotangent), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_rank_without_tokens_keeps_its_experts_in_the_graph(dtype, device):
    """With no token the experts were skipped, their gradients were None, and the next collective hung [Megatron-LM,
    TransformerEngine]."""
    layer = MoE(MoEConfig(hidden_size=8, intermediate_size=4, num_experts=6, top_k=2), device=device, dtype=dtype)
    x = torch.empty(0, 8, dtype=dtype, device=device, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape and y.requires_grad
    y.sum().backward()
    assert x.grad.shape == (0, 8)
    for name, p in layer.named_parameters():
        assert p.grad is not None and p.grad.shape == p.shape and (p.grad == 0).all(), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("idle", [0, 3, 5])
def test_an_expert_without_tokens_has_a_gradient_of_zeros(idle, dtype, device):
    """A group of size zero came back with a weight gradient that nobody had written [PyTorch]."""
    inputs = experts_inputs(40, 16, 8, 6, 1, dtype=dtype, device=device, bias=True)
    inputs["topk_ids"] = torch.where(inputs["topk_ids"] == idle, (idle + 1) % 6, inputs["topk_ids"])
    # what freed memory may hold
    del_me = [torch.full((6, 16, 16), float("nan"), dtype=dtype, device=device) for _ in range(8)]
    del del_me
    _, grads = gradients(inputs, normal(40, 16, dtype=dtype, device=device))
    for name in ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias"):
        assert (grads[name][idle] == 0).all() and grads[name].isfinite().all(), name
    plan = dispatch(inputs["topk_ids"], 6)
    rows = ops.gather(inputs["hidden_states"], *plan[:3]).requires_grad_()
    weight = inputs["gate_up_proj"].detach().requires_grad_()
    (grad,) = torch.autograd.grad(ops.grouped_linear(rows, weight, plan.expert_offsets).sum(), weight)
    assert (grad[idle] == 0).all() and grad.isfinite().all()


def test_rows_past_the_last_offset_are_zero_and_never_read(device):
    """They were uninitialised, and 0 x NaN is NaN, so one stray NaN spread through a whole gradient [PyTorch,
    TorchTitan]."""
    rows, weight = normal(10, 8, device=device), normal(3, 4, 8, seed=1, device=device)
    offsets = torch.tensor([0, 2, 2, 5], dtype=torch.int32, device=device)
    rows[5:] = float("nan")
    grad = normal(10, 4, seed=2, device=device)
    grad[5:] = float("nan")
    out = ops.grouped_linear(rows, weight, offsets)
    assert (out[5:] == 0).all() and out.isfinite().all()
    d_rows, d_weight, d_bias = ops.grouped_linear_backward(grad, rows, weight, offsets, [True] * 3)
    assert (d_rows[5:] == 0).all() and d_rows.isfinite().all() and d_weight.isfinite().all() and d_bias.isfinite().all()


@pytest.mark.parametrize("dynamic", [False, True])
def test_an_empty_call_works_compiled_as_it_does_eagerly(dynamic, device):
    """A call with no rows failed only under torch.compile [PyTorch]."""
    torch._dynamo.reset()
    made = experts_inputs(0, 8, 4, 3, 2, dtype=torch.float32, device=device)
    given = leaves(made)

    def call(x, up, down, w, ids):
        return fused_experts(x, up, down, ids, w)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for f in (call, compiled):
        out = f(*[given[n] for n in FLOATS], given["topk_ids"])
        assert out.shape == (0, 8)
        grads = torch.autograd.grad(out.sum(), [given[n] for n in FLOATS])
        assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("top_k", [1, 2, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_token(top_k, dtype, device):
    """A single token failed the look-up of a kernel's configuration [Liger-Kernel]."""
    inputs = experts_inputs(1, 64, 32, 6, top_k, dtype=dtype, device=device)
    cotangent = normal(1, 64, seed=3, dtype=dtype, device=device)
    out, grads = gradients(inputs, cotangent)
    floats = [inputs[n].double().requires_grad_() for n in FLOATS]
    truth = oracle.experts(*floats, inputs["topk_ids"])
    eager = oracle.experts(*[inputs[n] for n in FLOATS], inputs["topk_ids"])
    tolerance.close(out, truth, eager)
    for name, t in zip(FLOATS, torch.autograd.grad(truth, floats, cotangent.double()), strict=True):
        tolerance.close(grads[name], t, of=dtype, units=8, what=name)


@pytest.mark.parametrize("expert", [0, 3, 7])
def test_every_token_to_one_expert(expert, device):
    """All tokens on one expert hung, or ran out of memory without saying how much it wanted [several]."""
    inputs = experts_inputs(700, 24, 16, 8, 2, device=device)
    inputs["topk_ids"] = torch.full((700, 2), expert, device=device)
    cotangent = normal(700, 24, seed=3, device=device)
    out, grads = gradients(inputs, cotangent)
    floats = [inputs[n].clone().requires_grad_() for n in FLOATS]
    truth = oracle.experts(*floats, inputs["topk_ids"])
    tolerance.close(out, truth)
    for name, t in zip(FLOATS, torch.autograd.grad(truth, floats, cotangent), strict=True):
        tolerance.close(grads[name], t, what=name)


def test_running_out_of_memory_names_the_size(device):
    """An allocation that can't be had says how many bytes it asked for."""
    tokens, hidden = 2**20, 2**21
    x = torch.zeros(1, 1, device=device).expand(tokens, hidden)
    plan = dispatch(torch.zeros(tokens, 1, dtype=torch.int64, device=device), 1)
    with pytest.raises(RuntimeError, match=r"(?i)allocate.*\d+(\.\d+)? ?(bytes|[GT]iB)"):
        ops.gather(x, *plan[:3])


@pytest.mark.cuda
@pytest.mark.parametrize("what", ["tokens", "pre_activation", "weights"])
def test_more_than_two_to_the_31_elements(what):
    """Row times stride in 32 bits wrapped around and read or wrote somewhere else [MegaBlocks, Liger-Kernel, SGLang,
    TorchTitan, DeepSpeed]."""
    if torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        pytest.skip("needs 60 GiB of GPU memory")
    dtype = torch.bfloat16
    tokens, hidden, inner, experts = {
        "tokens": (2**31 // 8192 + 300, 8192, 16, 3),
        "pre_activation": (2**31 // 4096 + 300, 64, 2048, 3),
        "weights": (1000, 4096, 2048, 130),
    }[what]
    assert max(tokens * hidden, tokens * 2 * inner, experts * 2 * inner * hidden) > 2**31
    g = torch.Generator("cuda").manual_seed(0)

    def draw(*shape, std=1.0):
        return torch.randn(shape, generator=g, dtype=dtype, device="cuda").mul_(std)

    x, up, down = (
        draw(tokens, hidden),
        draw(experts, 2 * inner, hidden, std=hidden**-0.5),
        draw(experts, hidden, inner, std=inner**-0.5),
    )
    ids = (torch.arange(tokens, device="cuda") % experts)[:, None]
    weights = torch.ones(tokens, 1, device="cuda")
    plan = dispatch(ids, experts)
    out = ops.experts(x, up, down, weights, *plan[:3])
    # the first tokens, and the last ones of every expert: the far ends of every buffer
    some = [0, 1, 2, *range(tokens - 2 * experts, tokens)]

    def alone(t, dtype):
        e = t % experts
        values = x[t : t + 1], up[e : e + 1], down[e : e + 1]
        return oracle.experts(*[v.to(dtype) for v in values], weights[:1].to(oracle.wide(dtype)), ids[:1])[0]

    exact, eager = (torch.stack([alone(t, d) for t in some]) for d in (torch.float64, dtype))
    tolerance.close(out[some], exact, eager)
    del out
    if what == "tokens":
        rows = ops.gather(x, *plan[:3])
        assert torch.equal(rows[-5:], x[plan.slot_index[-5:].long()])
        back = ops.combine(rows, None, *plan[:3])
        assert torch.equal(back[-5:], x[-5:]) and torch.equal(back[tokens // 2], x[tokens // 2])
        assert torch.equal(ops.gather_backward(rows, plan.token_slot)[-5:], x[-5:])


ODD = (1, 3, 7, 12, 17, 31, 33, 63, 65, 100, 127, 129, 136, 200, 255, 257, 320, 896)


@pytest.mark.parametrize("hidden", ODD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sizes_that_are_no_multiple_of_anything(hidden, dtype, device):
    """Strides off 16 bytes raised, a hidden size off 256 left a tail of zeros, blocks of 128 were required [TorchTitan,
    transformers, vLLM, MegaBlocks]."""
    inner = ODD[(ODD.index(hidden) * 7 + 3) % len(ODD)]
    inputs = experts_inputs(37, hidden, inner, 3, 2, dtype=dtype, device=device)
    cotangent = normal(37, hidden, seed=3, dtype=dtype, device=device)
    out, grads = gradients(inputs, cotangent)

    def reference(dtype):
        given = {n: inputs[n].to(dtype if n != "topk_weights" else oracle.wide(dtype)).requires_grad_() for n in FLOATS}
        y = oracle.experts(*given.values(), inputs["topk_ids"])
        return y, dict(zip(FLOATS, torch.autograd.grad(y, list(given.values()), cotangent.to(dtype)), strict=True))

    truth, true_grads = reference(torch.float64)
    eager, eager_grads = reference(dtype)
    tolerance.close(out, truth, eager)
    for name in FLOATS:
        tolerance.close(
            grads[name], true_grads[name], eager_grads[name], factor=tolerance.BACKWARD, of=dtype, what=name
        )
    # a tail of zeros would pass no tolerance above; say so plainly
    assert (
        (out[:, -1] != 0).any()
        and (grads["gate_up_proj"][..., -1] != 0).any()
        and (grads["down_proj"][..., -1] != 0).any()
    )


@pytest.mark.parametrize("layout", ["transposed", "strided", "offset"])
@pytest.mark.parametrize("name", FLOATS)
def test_strided_views_are_read_as_what_they_are(name, layout, device):
    """A view's strides were taken for contiguous ones, and other numbers were read [Liger-Kernel]."""
    inputs = experts_inputs(33, 24, 16, 5, 2, dtype=torch.float32, device=device)
    cotangent = normal(33, 24, seed=3, dtype=torch.float32, device=device)
    out, grads = gradients(inputs, cotangent)
    view = laid_out(inputs[name], layout)
    assert view.stride() != inputs[name].stride() or layout == "offset"
    same_out, same_grads = gradients(inputs | {name: view}, cotangent)
    tolerance.close(same_out, out.double())
    for n in FLOATS:
        tolerance.close(same_grads[n], grads[n].double(), units=16, what=n)
    turned = laid_out(cotangent, layout)
    _, again = gradients(inputs, turned)
    for n in FLOATS:
        assert torch.equal(again[n], grads[n])


def test_capacity_above_the_tokens_is_clamped_and_zero_is_not_none(device):
    """A capacity above the token count crashed; a capacity of 0 was read as 'not set' [DeepSpeed, Tutel]."""
    inputs = experts_inputs(9, 8, 4, 3, 2, device=device)
    unlimited = dispatch(inputs["topk_ids"], 3)
    for capacity in (9, 10, 2**31, 2**40, 2**62):
        for a, b in zip(dispatch(inputs["topk_ids"], 3, capacity=capacity), unlimited, strict=True):
            assert torch.equal(a, b)
    nothing = dispatch(inputs["topk_ids"], 3, capacity=0)
    assert (nothing.token_slot == -1).all() and (nothing.expert_offsets == 0).all()
    assert torch.equal(nothing.tokens_per_expert, unlimited.tokens_per_expert)
    assert (run_experts(inputs, nothing) == 0).all() and (run_experts(inputs, unlimited) != 0).any()
    for factor in (None, 0.0, 100.0):
        layer = MoE(
            MoEConfig(hidden_size=8, intermediate_size=4, num_experts=3, top_k=2, capacity_factor=factor), device=device
        )
        out = layer.forward_with_routing(normal(9, 8, dtype=torch.float32, device=device))
        assert bool(out.dropped.all()) == (factor == 0.0) and bool(out.dropped.any()) == (factor == 0.0)


def test_padding_takes_no_capacity_and_counts_in_no_loss(device):
    """Padding tokens filled the experts and bent the balance loss [Megatron-LM, transformers]."""
    ids = torch.zeros(6, 1, dtype=torch.int64, device=device)
    padding = torch.tensor([True, True, False, False, True, False], device=device)
    plan = dispatch(ids, 2, capacity=2, padding_mask=padding)
    assert (plan.token_slot >= 0).flatten().tolist() == [False, False, True, True, False, False]
    assert plan.tokens_per_expert.tolist() == [3, 0]
    layer = MoE(MoEConfig(hidden_size=8, intermediate_size=4, num_experts=6, top_k=2), device=device)
    x = normal(6, 8, dtype=torch.float32, device=device)
    alone, masked = layer.forward_with_routing(x[~padding]), layer.forward_with_routing(x, padding)
    for name in ("balance_loss", "z_loss"):
        torch.testing.assert_close(getattr(alone, name), getattr(masked, name), rtol=1e-6, atol=0)
    assert torch.equal(alone.tokens_per_expert, masked.tokens_per_expert)
    tolerance.close(masked.hidden_states[~padding], alone.hidden_states.double(), units=16)
    assert (masked.hidden_states[padding] == 0).all()
