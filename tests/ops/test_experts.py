"""experts, the grouped MLP: outputs and all six gradients against the float64 oracle, over every shape, dtype and
option."""

import pytest
import torch
from support import matrix, oracle, pairwise, tolerance
from support.distributions import NAMES
from support.samples import DTYPES, dispatch, experts_inputs, laid_out, leaves, normal, ops, run_experts

OPTIONS = {
    "distribution": NAMES,
    "activation": oracle.ACTIVATIONS,
    "bias": ("none", "up", "down", "both"),
    "interleaved": (False, True),
    "weight_on_input": (False, True),
    "recompute": (False, True),
    "weights": ("contiguous", "transposed"),
    "x": ("contiguous", "transposed", "strided", "offset"),
}
CASES = matrix.experts_cases(matrix.CPU, **OPTIONS)
LARGE = []
if torch.cuda.is_available():
    LARGE = [c for c in matrix.experts_cases(matrix.CUDA, seed=1, **OPTIONS) if not matrix.affordable(matrix.CPU)(c)]
LEAVES = ("hidden_states", "gate_up_proj", "down_proj", "topk_weights", "gate_up_bias", "down_bias")


def oracle_run(inputs, dtype, cotangent, interleaved, weight_on_input, activation):
    """Output and gradients of the oracle in a dtype."""
    cast = {
        k: (v.detach().to(oracle.wide(dtype) if k == "topk_weights" else dtype).requires_grad_() if k in LEAVES else v)
        for k, v in inputs.items()
    }
    out = oracle.experts(
        cast["hidden_states"], cast["gate_up_proj"], cast["down_proj"], cast["topk_weights"], cast["topk_ids"],
        gate_up_bias=cast.get("gate_up_bias"), down_bias=cast.get("down_bias"), activation=activation,
        interleaved=interleaved, weight_on_input=weight_on_input,
    )  # fmt: skip
    names = [n for n in LEAVES if n in cast]
    return out.detach(), dict(zip(names, oracle.grads(out, [cast[n] for n in names], cotangent.to(dtype)), strict=True))


def eager_runs(inputs, dtype, cotangent, **options):
    """What the oracle in a dtype returns; of few slots and a small I, with the sums over H in four orders.

    Behind relu one of few hidden units may be all that is left of a token. Of one unit's gradient, whose H terms may
    cancel, one order's error can be next to nothing by luck.
    """
    hidden, orders = cotangent.shape[1], torch.Generator().manual_seed(0)
    dims = {"hidden_states": 1, "gate_up_proj": 2, "down_proj": 1, "down_bias": 1}
    units = inputs["topk_ids"].numel() * inputs["down_proj"].shape[2]
    for i in range(4 if units <= 256 else 1):
        order = torch.randperm(hidden, generator=orders) if i else torch.arange(hidden)
        order = order.to(cotangent.device)
        back = order.argsort()
        shuffled = {k: v.index_select(dims[k], order) if k in dims and v is not None else v for k, v in inputs.items()}
        out, grads = oracle_run(shuffled, dtype, cotangent[:, order], **options)
        yield out[:, back], {k: g.index_select(dims[k], back) if k in dims else g for k, g in grads.items()}


def check(case, device):
    dtype, activation = case["dtype"], case["activation"]
    inputs = experts_inputs(
        case["T"], case["H"], case["I"], case["E"], matrix.top_k(case), dtype=dtype, device=device,
        distribution=case["distribution"], activation=activation, bias=case["bias"], interleaved=case["interleaved"],
    )  # fmt: skip
    cotangent = normal(case["T"], case["H"], seed=9, dtype=dtype, device=device)
    given = leaves(inputs)
    for name in ("gate_up_proj", "down_proj"):
        given[name] = laid_out(given[name].detach(), case["weights"]).requires_grad_()
    given["hidden_states"] = laid_out(given["hidden_states"].detach(), case["x"]).requires_grad_()
    options = {k: case[k] for k in ("activation", "interleaved", "weight_on_input")}
    out = run_experts(given, recompute=case["recompute"], **options)
    assert out.dtype == dtype and out.is_contiguous()
    names = [n for n in LEAVES if n in given]
    grads = dict(zip(names, torch.autograd.grad(out, [given[n] for n in names], cotangent), strict=True))
    truth, true_grads = oracle_run(inputs, torch.float64, cotangent, **options)
    eager, eager_grads = zip(*eager_runs(inputs, dtype, cotangent, **options), strict=True)
    tolerance.close(out, truth, eager, what="output")
    # A NaN weight makes its token's row of the output NaN. How far it spreads backward within that token and its
    # experts is the activation's affair (0 * NaN behind a relu); nobody else may see it.
    broken = inputs["topk_weights"].isnan().any(dim=1)
    # a weight's gradient is a product of two rows, whose terms may cancel
    rows = (cotangent.double().norm(dim=1) * truth.norm(dim=1))[~broken]
    product = float(rows.max()) if rows.numel() else 0.0
    reached = torch.zeros(case["E"], dtype=torch.bool, device=device)
    reached[inputs["topk_ids"][broken].flatten()] = True
    for name in names:
        assert grads[name].dtype == given[name].dtype
        clean = ~broken if name in ("hidden_states", "topk_weights") else ~reached
        tolerance.close(
            grads[name][clean], true_grads[name][clean], [g[name][clean] for g in eager_grads],
            factor=tolerance.BACKWARD, of=dtype, what=f"gradient of {name}", units=4,
            magnitude=product if name == "topk_weights" else 0.0,
        )  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=pairwise.name)
def test_against_oracle(case, device):
    check(case, device)


@pytest.mark.cuda
@pytest.mark.parametrize("case", LARGE, ids=pairwise.name)
def test_against_oracle_large(case):
    check(case, "cuda")


@pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activation_at_its_corners(activation, dtype, device):
    """One expert of identity projections: the activation itself at 0, at its limits, far out, and NaN in its own
    place."""
    points = torch.tensor(
        [0.0, -0.0, 1.0, -1.0, 6.9, 7.0, 7.1, -6.9, -7.0, -7.1, 30.0, -30.0, 0.01, -4.0, float("nan")]
    )
    gate, up = (t.flatten() for t in torch.meshgrid(points, points, indexing="ij"))
    gated = activation in oracle.GATED
    x = torch.stack([gate, up] if gated else [gate, gate], dim=1).to(device=device, dtype=dtype)
    if not gated:
        x = x[:, :1]
    size = x.shape[1]
    inputs = {
        "hidden_states": x,
        "gate_up_proj": torch.eye(size, dtype=dtype, device=device)[None],
        "down_proj": torch.zeros(1, size, 1, dtype=dtype, device=device),
        "topk_weights": torch.ones(x.shape[0], 1, dtype=oracle.wide(dtype), device=device),
        "topk_ids": torch.zeros(x.shape[0], 1, dtype=torch.int64, device=device),
    }
    inputs["down_proj"][0, 0, 0] = 1
    given = leaves(inputs)
    out = run_experts(given, activation=activation)[:, 0]
    pre = x.double().requires_grad_()
    # a NaN anywhere in a row meets 0 * NaN in the projection
    clean = ~pre.isnan().any(dim=1)
    halves = (pre[:, 0], pre[:, 1]) if gated else (pre[:, 0], None)
    truth = oracle.activate(*halves, activation)
    with torch.no_grad():
        eager = oracle.activate(x[:, 0], x[:, 1] if gated else None, activation)
    assert out[~clean].isnan().all()
    tolerance.close(out[clean], truth[clean], eager[clean])
    (grad,) = torch.autograd.grad(out[clean].sum(), given["hidden_states"])
    (true_grad,) = torch.autograd.grad(truth[clean].sum(), pre)
    leaf = x.clone().requires_grad_()
    value = oracle.activate(leaf[:, 0], leaf[:, 1] if gated else None, activation)
    (eager_grad,) = torch.autograd.grad(value[clean].sum(), leaf)
    tolerance.close(grad[clean], true_grad[clean], eager_grad[clean], factor=tolerance.BACKWARD, units=4)


@pytest.mark.parametrize("alpha,limit", [(1.702, 7.0), (1.0, 0.5), (2.5, 1.0)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_clamped_swiglu_uses_its_constants(alpha, limit, interleaved, device):
    inputs = experts_inputs(9, 6, 5, 3, 2, activation="clamped_swiglu", bias=True, device=device)
    given = leaves(inputs)
    options = {"activation": "clamped_swiglu", "interleaved": interleaved}
    out = run_experts(given, activation_alpha=alpha, activation_limit=limit, **options)
    names = [n for n in LEAVES if n in given]
    ref = leaves(inputs)
    truth = oracle.experts(
        ref["hidden_states"], ref["gate_up_proj"], ref["down_proj"], ref["topk_weights"], ref["topk_ids"],
        gate_up_bias=ref["gate_up_bias"], down_bias=ref["down_bias"], alpha=alpha, limit=limit, **options,
    )  # fmt: skip
    tolerance.close(out, truth, units=16)
    cotangent = normal(9, 6, seed=9, device=device)
    for name, a, b in zip(
        names,
        torch.autograd.grad(out, [given[n] for n in names], cotangent),
        torch.autograd.grad(truth, [ref[n] for n in names], cotangent),
        strict=True,
    ):
        tolerance.close(a, b, units=32, what=name)


@pytest.mark.parametrize("capacity", [0, 1, 3, 10**6])
def test_pairs_over_capacity_contribute_nothing(capacity, device):
    """Dropped pairs: no output, and exactly zero gradient of their routing weights."""
    inputs = experts_inputs(20, 8, 6, 4, 3, device=device, bias=True)
    plan = dispatch(inputs["topk_ids"], 4, capacity=capacity)
    kept = plan.token_slot >= 0
    assert int(kept.sum()) == sum(min(capacity, int(n)) for n in plan.tokens_per_expert)
    given = leaves(inputs)
    out = run_experts(given, plan)
    ids = torch.where(kept, inputs["topk_ids"], -1)
    ref = leaves(inputs)
    truth = oracle.experts(
        ref["hidden_states"], ref["gate_up_proj"], ref["down_proj"], ref["topk_weights"], ids,
        gate_up_bias=ref["gate_up_bias"], down_bias=ref["down_bias"],
    )  # fmt: skip
    tolerance.close(out, truth, units=16)
    names = [n for n in LEAVES if n in given]
    cotangent = normal(20, 8, seed=9, device=device)
    grads = torch.autograd.grad(out, [given[n] for n in names], cotangent)
    for name, a, b in zip(names, grads, oracle.grads(truth, [ref[n] for n in names], cotangent), strict=True):
        tolerance.close(a, b, units=32, what=name)
    assert (grads[names.index("topk_weights")][~kept] == 0).all()
    assert (out[~kept.any(dim=1)] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_expert_of_many_rows(dtype, device):
    """More rows than any block or part of a sum holds: every one of them counts in the weights' gradients."""
    tokens = 9001
    inputs = experts_inputs(tokens, 9, 6, 2, 1, dtype=dtype, device=device, bias=True)
    inputs["topk_ids"] = torch.ones_like(inputs["topk_ids"])
    # one sign, so that a missing part is a missing share
    inputs["hidden_states"] = inputs["hidden_states"].abs()
    cotangent = normal(tokens, 9, seed=9, dtype=dtype, device=device).abs()
    given = leaves(inputs)
    out = run_experts(given)
    options = {"interleaved": False, "weight_on_input": False, "activation": "swiglu"}
    truth, true_grads = oracle_run(inputs, torch.float64, cotangent, **options)
    eager, eager_grads = oracle_run(inputs, dtype, cotangent, **options)
    tolerance.close(out, truth, eager)
    names = [n for n in LEAVES if n in given]
    for name, grad in zip(names, torch.autograd.grad(out, [given[n] for n in names], cotangent), strict=True):
        tolerance.close(
            grad, true_grads[name], eager_grads[name], factor=tolerance.BACKWARD, of=dtype, units=4, what=name
        )


@pytest.mark.parametrize("weights_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_routing_weights_of_any_floating_dtype(dtype, weights_dtype, device):
    """They are converted once, and their gradient comes back in their own dtype."""
    inputs = experts_inputs(6, 8, 4, 3, 2, dtype=dtype, device=device)
    weights = inputs["topk_weights"].to(weights_dtype).requires_grad_()
    out = run_experts(inputs | {"topk_weights": weights})
    same = run_experts(inputs | {"topk_weights": weights.detach().to(oracle.wide(dtype))})
    assert torch.equal(out, same) and out.dtype == dtype
    (grad,) = torch.autograd.grad(out.float().sum(), weights)
    assert grad.dtype == weights_dtype and grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_recompute_gives_the_same_bits(dtype, bias, device):
    """The pre-activation computed again in backward is the one forward had."""
    inputs = experts_inputs(33, 24, 16, 5, 2, dtype=dtype, device=device, bias=bias)
    cotangent = normal(33, 24, seed=9, dtype=dtype, device=device)
    results = []
    for recompute in (False, True):
        given = leaves(inputs)
        out = run_experts(given, recompute=recompute)
        results.append([out, *torch.autograd.grad(out, [given[n] for n in LEAVES if n in given], cotangent)])
    for kept, again in zip(*results, strict=True):
        assert torch.equal(kept, again)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("weight_on_input", [False, True])
@pytest.mark.parametrize("kind,extra", [("dropped", 0), ("dropped", 2), ("nobody", 0), ("nobody", 1), ("uniform", 0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_plan_of_fewer_slots_than_pairs(dtype, kind, extra, weight_on_input, recompute, device):
    """Slots that nobody has can be cut off: the same bits, and as many rows less."""
    tokens, experts, top_k, hidden, inner = 40, 8, 4, 128, 64
    options = {"dtype": dtype, "device": device, "bias": True}
    inputs = experts_inputs(
        tokens, hidden, inner, experts, top_k, distribution=kind.replace("nobody", "uniform"), **options
    )
    if kind == "nobody":
        inputs["topk_ids"].fill_(-1)
    plan = dispatch(inputs["topk_ids"], experts)
    served = int(plan.expert_offsets[-1])
    cut = (plan.slot_index[: served + extra], *plan[1:3])
    cotangent = normal(tokens, hidden, seed=9, dtype=dtype, device=device)
    results = []
    for p in (plan[:3], cut):
        given = leaves(inputs)
        out = run_experts(given, p, weight_on_input=weight_on_input, recompute=recompute)
        rows = ops.gather(given["hidden_states"], *p)
        summed = ops.combine(rows, given["topk_weights"], *p)
        assert rows.shape == (p[0].numel(), hidden)
        kept = [out, summed, rows[:served]]
        for made in (out, summed):
            kept += torch.autograd.grad(
                made, [given[n] for n in LEAVES if n in given], cotangent, allow_unused=True, retain_graph=True
            )
        results.append(kept)
    for full, few in zip(*results, strict=True):
        assert (full is None and few is None) or torch.equal(full, few)
    if served and device == "cpu":
        with pytest.raises(
            ValueError, match=f"expert_offsets must end at or below the number of rows {served - 1}, got"
        ):
            run_experts(inputs, (plan.slot_index[: served - 1], *plan[1:3]))


@pytest.mark.parametrize("wanted", range(64), ids="{:06b}".format)
def test_every_subset_of_gradients(wanted, device):
    """A gradient nobody wants is an empty tensor, and what others get does not depend on it."""
    inputs = experts_inputs(6, 7, 4, 3, 2, device=device, bias=True)
    plan = dispatch(inputs["topk_ids"], 3)
    grad = normal(6, 7, seed=9, device=device)
    mask = [bool(wanted >> i & 1) for i in range(6)]

    def backward(output_mask):
        return ops.experts_backward(
            grad, inputs["hidden_states"], inputs["gate_up_proj"], inputs["down_proj"], inputs["topk_weights"],
            *plan[:3], inputs["gate_up_bias"], inputs["down_bias"], None, "swiglu", 1.702, 7.0, False, False,
            output_mask,
        )  # fmt: skip

    everything, some = backward([True] * 6), backward(mask)
    for want, one, full in zip(mask, some, everything, strict=True):
        if want:
            assert torch.equal(one, full)
        else:
            assert one.numel() == 0


def test_forward_op_keeps_the_pre_activation_gate_half_first(device):
    """pre_activation [P, 2I] by slot: x @ gate_up.T + bias, de-interleaved, so that backward need not know the
    layout."""
    inputs = experts_inputs(6, 7, 4, 3, 2, device=device, bias=True)
    plan = dispatch(inputs["topk_ids"], 3)
    for interleaved in (False, True):
        args = (
            inputs["hidden_states"], inputs["gate_up_proj"], inputs["down_proj"], inputs["topk_weights"], *plan[:3],
            inputs["gate_up_bias"], inputs["down_bias"], "swiglu", 1.702, 7.0, interleaved, False,
        )  # fmt: skip
        out, pre = ops.experts_forward(*args, True)
        same, nothing = ops.experts_forward(*args, False)
        assert torch.equal(out, same) and nothing.numel() == 0
        expert = inputs["topk_ids"].flatten()[plan.slot_index.long()]
        x = inputs["hidden_states"][plan.slot_index.long() // 2]
        rows = torch.einsum("sh,suh->su", x, inputs["gate_up_proj"][expert]) + inputs["gate_up_bias"][expert]
        tolerance.close(pre, torch.cat(oracle.split(rows, True, interleaved), dim=1), units=16)
