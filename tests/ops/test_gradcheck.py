"""Analytic gradients against finite differences in float64, with no tolerance for a second run that differs; and the
refusal of second derivatives."""

import itertools

import pytest
import torch
from support import oracle
from support.catalogue import DIFFERENTIABLE, Setting, calls, run, tensors
from support.samples import LAYOUTS, dispatch, experts_inputs, laid_out, leaves, normal, ops, run_experts

LEAVES = ("hidden_states", "gate_up_proj", "down_proj", "topk_weights", "gate_up_bias", "down_bias")


def check(function, *inputs):
    assert torch.autograd.gradcheck(function, inputs, nondet_tol=0.0, atol=1e-7, rtol=1e-6, eps=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_router_logits(bias, device):
    x, w, b = (normal(*s, seed=i, device=device).requires_grad_() for i, s in enumerate([(5, 4), (3, 4), (3,)]))
    check(ops.router_logits, x, w, b) if bias else check(ops.router_logits, x, w)


ROUTE = list(itertools.product(oracle.SCORE_FUNCTIONS, (False, True), (False, True), ("choose", "replay", "dropped")))


@pytest.mark.parametrize("function,after,renormalize,how", ROUTE)
def test_route(function, after, renormalize, how, device):
    # far enough apart that no step of finite differences changes the choice
    logits = torch.stack([torch.randperm(6) for _ in range(5)]).double().sub(2.5).div(2).to(device).requires_grad_()
    extra = {}
    if how != "choose":
        extra["topk_ids"] = torch.tensor([[0, 1, 2], [5, 3, 1], [4, 0, 2], [1, 2, 3], [5, 4, 3]], device=device)
    if how == "dropped":
        extra["topk_ids"][0, 1] = extra["topk_ids"][2, 0] = extra["topk_ids"][2, 2] = -1
        extra["topk_ids"][3] = -1

    def both(t):
        weights, _, scores = ops.route(
            t, 3, score_function=function, scores_after_topk=after, renormalize=renormalize, renormalize_epsilon=0.05,
            scaling_factor=1.7, **extra,
        )  # fmt: skip
        return weights, scores

    check(both, logits)
    check(lambda t: both(t)[0], logits)
    check(lambda t: both(t)[1], logits)


@pytest.mark.parametrize("capacity", [None, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gather_and_combine(capacity, layout, device):
    s = Setting(device, torch.float64, tokens=5, hidden=3, experts=3)
    plan = dispatch(s.ids, 3, capacity=capacity)
    x = laid_out(normal(5, 3, device=device), layout).requires_grad_()
    check(lambda t: ops.gather(t, *plan[:3]), x)
    rows = laid_out(normal(10, 3, seed=1, device=device), layout).requires_grad_()
    weights = s.weights.detach().requires_grad_()
    check(lambda r, w: ops.combine(r, w, *plan[:3]), rows, weights)
    check(lambda r: ops.combine(r, None, *plan[:3]), rows)


@pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
@pytest.mark.parametrize(
    "interleaved,weight_on_input,recompute", [(False, False, False), (True, True, True), (False, True, False)]
)
def test_experts(activation, interleaved, weight_on_input, recompute, device):
    """All six gradients; one expert gets no token and one pair is dropped."""
    inputs = experts_inputs(4, 3, 2, 3, 2, activation=activation, bias=True, device=device)
    # away from the corners of relu and clamp, where a finite difference means nothing
    inputs["topk_ids"] = torch.tensor([[0, 2], [2, 0], [-1, 2], [0, -1]], device=device)
    given = leaves(inputs)
    plan = dispatch(inputs["topk_ids"], 3)

    def function(*values):
        return run_experts(
            dict(zip(LEAVES, values, strict=True)), plan, activation=activation, interleaved=interleaved,
            weight_on_input=weight_on_input, recompute=recompute, activation_limit=1.5,
        )  # fmt: skip

    check(function, *[given[n] for n in LEAVES])


@pytest.mark.parametrize("layout", LAYOUTS[:3])
def test_grouped_linear(layout, device):
    rows, weight, bias = (
        laid_out(normal(*s, seed=i, device=device), layout if len(s) > 1 else "contiguous").requires_grad_()
        for i, s in enumerate([(7, 3), (4, 2, 3), (4, 2)])
    )
    offsets = torch.tensor([0, 2, 2, 5, 6], dtype=torch.int32, device=device)
    check(lambda r, w, b: ops.grouped_linear(r, w, offsets, b), rows, weight, bias)
    check(lambda r, w: ops.grouped_linear(r, w, offsets), rows, weight)


@pytest.mark.parametrize("padded", [False, True])
def test_losses(padded, device):
    padding = torch.tensor([[False, True, False, False], [True, False, False, True]], device=device) if padded else None
    scores = normal(2, 4, 3, device=device).requires_grad_()
    counts = torch.tensor([[3, 0, 5], [1, 1, 2]], device=device)
    check(lambda s: ops.balance_loss(s, counts, 0.3, padding), scores)
    logits = normal(4, 3, seed=1, device=device).requires_grad_()
    check(lambda t: ops.z_loss(t, 0.3, padding[0] if padded else None), logits)


@pytest.mark.parametrize("by", ["backward", "grad"])
# exchange is linear, and its own backward
@pytest.mark.parametrize("name", [n for n in DIFFERENTIABLE if n != "exchange"])
def test_second_derivative_is_refused_in_one_sentence_and_only_if_asked_for(name, by, device):
    """Also where torch.autograd.grad asks for one input's alone: not None, and not zeros."""
    for call in calls(name, device=device, dtype=torch.float64, grad=True):
        inputs = [t for t in (*call.args, *call.kwargs.values()) if torch.is_tensor(t) and t.requires_grad]
        outputs = [t for t in tensors(run(name, call)) if t.requires_grad]
        cotangents = [normal(*t.shape, seed=3, device=device).requires_grad_() for t in outputs]
        first = torch.autograd.grad(outputs, inputs, cotangents, create_graph=True, allow_unused=True)
        first = [g for g in first if g is not None and g.requires_grad]
        assert first, "create_graph alone must not fail"
        with pytest.raises(
            RuntimeError, match=r"^fastmoe_cpp::\w+ has no gradient of its own: differentiate .* once"
        ) as caught:
            if by == "backward":
                first[0].square().sum().backward()
            else:
                torch.autograd.grad(first[0].square().sum(), [*inputs, *cotangents], allow_unused=True)
        assert "\n" not in str(caught.value).strip()
