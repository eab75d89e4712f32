"""router_logits, route and sinkhorn against the float64 oracle: selection exactly, weights, scores and gradients in
tolerance."""

import math

import pytest
import torch
from support import distributions, matrix, oracle, pairwise, tolerance
from support.samples import DTYPES, LAYOUTS, laid_out, normal, ops

EXPERTS = (*matrix.EXPERTS, 256, 1024)
KINDS = ("uniform", "zipf", "all_to_one", "first_empty", "middle_empty", "last_empty", "ties", "nan_rows")


# router_logits

LOGITS_CASES = pairwise.cover(
    {
        "T": matrix.TOKENS,
        "H": matrix.SIZES,
        "E": EXPERTS,
        "x": DTYPES,
        "weight": DTYPES,
        "bias": ("none", *DTYPES),
        "x_layout": LAYOUTS,
        "weight_layout": LAYOUTS,
    },
    lambda c: c["T"] * c["H"] * c["E"] <= 3e7 and c["T"] * max(c["H"], c["E"]) <= 2e6 and c["E"] * c["H"] <= 2.2e6,
)


@pytest.mark.parametrize("case", LOGITS_CASES, ids=pairwise.name)
def test_router_logits(case, device):
    """Products in float32 or wider whatever the operands, and each gradient in its operand's dtype."""
    values = {
        "x": normal(case["T"], case["H"], seed=1, dtype=case["x"], device=device),
        "weight": normal(case["E"], case["H"], seed=2, std=case["H"] ** -0.5, dtype=case["weight"], device=device),
    }
    if case["bias"] != "none":
        values["bias"] = normal(case["E"], seed=3, dtype=case["bias"], device=device)
    layouts = {"x": case["x_layout"], "weight": case["weight_layout"], "bias": "contiguous"}
    kind = torch.float64 if torch.float64 in (case["x"], case["weight"]) else torch.float32
    cotangent = normal(case["T"], case["E"], seed=9, dtype=kind, device=device)

    def run(function, cast=lambda t: t):
        given = {k: laid_out(cast(v), layouts[k]).detach().requires_grad_() for k, v in values.items()}
        out = function(given["x"], given["weight"], given.get("bias"))
        return out.detach(), oracle.grads(out, list(given.values()), cotangent.to(out.dtype))

    out, grads = run(ops.router_logits)
    truth, true_grads = run(oracle.router_logits, torch.Tensor.double)
    eager, eager_grads = run(oracle.router_logits)
    assert out.dtype == kind
    # tensor cores cut, and do not round, the sum they add 16 products to
    units = 8 + case["H"] // 64 if device == "cuda" and case["x"] == torch.bfloat16 else 8
    tolerance.close(out, truth, eager, units=units)
    for (name, value), a, b, c in zip(values.items(), grads, true_grads, eager_grads, strict=True):
        assert a.dtype == value.dtype
        tolerance.close(a, b, c, factor=tolerance.BACKWARD, units=8 if a.dtype == kind else 2, what=name)


# route

ROUTE_CASES = pairwise.cover(
    {
        "T": matrix.TOKENS,
        "E": EXPERTS,
        "K": matrix.TOP_K,
        "dtype": DTYPES,
        "function": oracle.SCORE_FUNCTIONS,
        "after": (False, True),
        "renormalize": (False, True),
        "epsilon": (0.0, 1e-20, 0.3),
        "scaling": (1.0, 2.5, -0.5),
        "expert_bias": ("none", *DTYPES),
        "selection": ("none", *DTYPES),
        "groups": ((1, 1), (2, 1), (4, 2), (4, 4), (8, 3)),
        "worth": ("max", "top2_sum"),
        "kind": KINDS,
        "replay": ("no", torch.int32, torch.int64),
        "layout": LAYOUTS,
    },
    lambda c: (
        matrix.top_k(c) <= c["E"]
        and c["T"] * c["E"] <= 7e4
        and c["E"] % c["groups"][0] == 0
        and matrix.top_k(c) <= c["E"] // c["groups"][0] * c["groups"][1]
        and (c["groups"][0] == 1 or c["E"] // c["groups"][0] >= 2)
        # what a group of NaN is worth is nobody's business
        and (c["groups"][0] == 1 or c["kind"] != "nan_rows")
    ),
)


def near_ties(keys, top, dtype):
    """Rows whose ranking rounding may decide: two keys that differ, by less than the keys' precision."""
    ranked = keys.nan_to_num(nan=-math.inf).sort(dim=1, descending=True).values[:, : top + 1]
    gap = (ranked[:, :-1] - ranked[:, 1:]).nan_to_num(nan=0.0)
    return ((gap > 0) & (gap <= 16 * torch.finfo(dtype).eps * ranked[:, :-1].abs())).any(dim=1)


def check_selection(ids, keys, top_k, dtype, groups=(1, 1), worth="max"):
    tokens, experts = keys.shape
    assert ids.shape == (tokens, top_k) and ids.dtype == torch.int64
    assert ((ids >= 0) & (ids < experts)).all()
    assert all(len(set(row)) == top_k for row in ids.tolist()), "ids of a token are distinct"
    allowed, doubtful = None, near_ties(keys, top_k, dtype)
    if groups[0] > 1:
        allowed, value = oracle.group_mask(keys, *groups, worth)
        unsure = near_ties(value, groups[1], dtype)
        doubtful |= unsure
    expected = oracle.select(keys, top_k, allowed)
    wrong = (ids != expected).any(dim=1)
    assert not (wrong & ~doubtful).any(), (
        f"row {int((wrong & ~doubtful).nonzero()[0])} chose {ids[wrong & ~doubtful][0].tolist()}, "
        f"expected {expected[wrong & ~doubtful][0].tolist()}"
    )
    assert tokens < 20 or doubtful.float().mean() <= 0.2, "the keys are too close for a test"
    # where rounding decided, the keys chosen are as good
    for t in (wrong & doubtful & (groups[0] == 1)).nonzero().flatten().tolist():
        a, b = keys[t, ids[t]], keys[t, expected[t]]
        torch.testing.assert_close(a, b, rtol=32 * torch.finfo(dtype).eps, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", ROUTE_CASES, ids=pairwise.name)
def test_route(case, device):
    tokens, experts, top_k, dtype = case["T"], case["E"], matrix.top_k(case), case["dtype"]
    wide = oracle.wide(dtype)
    logits = distributions.logits(case["kind"], tokens, experts, seed=1).to(dtype)
    options = {
        "score_function": case["function"],
        "scores_after_topk": case["after"],
        "renormalize": case["renormalize"],
        "renormalize_epsilon": case["epsilon"],
        "scaling_factor": case["scaling"],
        "num_groups": case["groups"][0],
        "topk_groups": case["groups"][1],
        "group_score": case["worth"],
    }
    choose = {}
    if case["expert_bias"] != "none":
        choose["expert_bias"] = (normal(experts, seed=2) * 16).round().div(16).to(case["expert_bias"])
    if case["selection"] != "none":
        choose["selection_scores"] = distributions.logits("uniform", tokens, experts, seed=3).to(case["selection"])
    given = laid_out(logits.to(device), case["layout"]).requires_grad_()
    replayed = {}
    if case["replay"] != "no":
        ids = distributions.ids("dropped", tokens, experts, top_k, seed=4)[0].to(case["replay"])
        replayed["topk_ids"] = laid_out(ids.to(device), case["layout"])
    weights, ids, scores = ops.route(
        given, top_k, **options, **replayed, **{k: v.to(device) for k, v in choose.items()}
    )
    assert weights.dtype == scores.dtype == wide and ids.dtype == torch.int64
    assert weights.requires_grad and scores.requires_grad and not ids.requires_grad
    if replayed:
        assert torch.equal(ids, replayed["topk_ids"].long())
    else:
        keys = oracle.selection_keys(logits, case["function"], case["after"], **choose)
        # a key is a float32 sum even of float64 parts unless the logits are float64
        check_selection(ids.cpu(), keys, top_k, wide, case["groups"], case["worth"])

    def reference(dtype):
        leaf = logits.to(device=device, dtype=dtype).requires_grad_()
        return leaf, *oracle.routing_weights(
            leaf, ids, case["function"], case["after"], case["renormalize"], case["epsilon"], case["scaling"]
        )

    exact, true_weights, true_scores = reference(torch.float64)
    plain, eager_weights, eager_scores = reference(wide)
    tolerance.close(weights, true_weights, eager_weights, units=8, what="weights")
    tolerance.close(scores, true_scores, eager_scores, units=8, what="scores")
    assert (weights[ids < 0] == 0).all()

    g_weights = normal(tokens, top_k, seed=5, dtype=wide, device=device)
    g_scores = normal(tokens, experts, seed=6, dtype=wide, device=device)
    # one weight divided by itself: its gradient is nothing, or the little that an epsilon leaves
    constant = top_k == 1 and (case["renormalize"] or (case["after"] and case["function"] == "softmax"))
    clean = ~logits.isnan().any(dim=1)
    magnitude = 0.0
    if tokens and constant:
        magnitude = abs(case["scaling"]) * float(g_weights.abs().amax())
    elif case["function"] == "softmax" and (true_scores[clean] > 0.99).any():
        # of a score near one, what is left of the cotangent after its mean is taken away
        magnitude = abs(case["scaling"]) * float(torch.cat([g_weights, g_scores], dim=1).abs().amax()) / 2
    for name, gw, gs in (("weights", 1, 0), ("scores", 0, 1), ("both", 1, 1)):

        def grad(leaf, w, s, gw=gw, gs=gs):
            outs = [o for o, on in ((w, gw), (s, gs)) if on]
            cots = [c.to(w.dtype) for c, on in ((g_weights, gw), (g_scores, gs)) if on]
            return torch.autograd.grad(outs, leaf, cots, retain_graph=True)[0]

        actual = grad(given, weights, scores)
        truth, eager = grad(exact, true_weights, true_scores), grad(plain, eager_weights, eager_scores)
        assert actual.dtype == dtype
        tolerance.close(
            actual[clean], truth[clean], eager[clean].to(dtype), factor=tolerance.BACKWARD, units=8, what=f"by {name}",
            magnitude=magnitude if gw or not constant else 0.0,
        )  # fmt: skip


@pytest.mark.parametrize("function", oracle.SCORE_FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_logits_rank_last_and_reach_only_their_row(function, dtype, device):
    """Softmax makes a row's every weight NaN; elementwise functions only the NaN entries."""
    logits = (normal(6, 9, seed=1) * 4).round().div(4).to(dtype)
    logits[1, 2] = logits[1, 7] = math.nan
    logits[4] = math.nan
    weights, ids, scores = ops.route(logits.to(device), 7, score_function=function, renormalize=False)
    assert sorted(ids[1].tolist()) == [0, 1, 3, 4, 5, 6, 8]
    assert ids[4].tolist() == list(range(7))
    finite = [0, 2, 3, 5]
    assert not weights[finite].isnan().any() and not scores[finite].isnan().any()
    assert weights[4].isnan().all() and scores[4].isnan().all()
    if function == "softmax":
        assert weights[1].isnan().all() and scores[1].isnan().all()
    else:
        assert not weights[1].isnan().any() and scores[1].isnan().sum() == 2
    nine = ops.route(logits.to(device), 9, score_function=function)[1]
    assert nine[1, 7:].tolist() == [2, 7] and sorted(nine[4].tolist()) == list(range(9))


@pytest.mark.parametrize("function", oracle.SCORE_FUNCTIONS)
@pytest.mark.parametrize("after", [False, True])
def test_extreme_logits_stay_finite(function, after, device):
    """Softmax subtracts the maximum, softplus doesn't overflow, and the gradient is finite too."""
    logits = torch.tensor([[1e4, 0.0, -1e4, 5.0], [-1e4, -1e4, -1e4, -1e4], [88.0, 89.0, 100.0, 1e30]], device=device)
    logits.requires_grad_()
    weights, ids, scores = ops.route(logits, 2, score_function=function, scores_after_topk=after, renormalize=False)
    exact = logits.detach().double().requires_grad_()
    true_weights, true_scores = oracle.routing_weights(exact, ids, function, after, renormalize=False)
    tolerance.close(weights, true_weights, units=16)
    tolerance.close(scores, true_scores, units=16)
    (grad,) = torch.autograd.grad(weights.sum() + (scores * scores.detach()).sum().clamp(max=1e30), logits)
    assert grad.isfinite().all()


def test_masked_groups_are_chosen_only_after_all_allowed_experts(device):
    """DeepSeek-V3's limit: two groups of four, keys below zero, and an allowed expert that is worse than a masked
    one."""
    logits = torch.tensor([[5.0, -9.0, -9.0, -9.0, 4.0, 4.0, 4.0, 3.0]], device=device)
    one = {"score_function": "sigmoid", "num_groups": 2, "topk_groups": 1, "scores_after_topk": True}
    assert ops.route(logits, 4, group_score="max", **one)[1].tolist() == [[0, 1, 2, 3]]
    assert ops.route(logits, 4, group_score="top2_sum", **one)[1].tolist() == [[4, 5, 6, 7]]
    bias = torch.tensor([0.0, 20.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], device=device)
    assert ops.route(logits, 4, group_score="top2_sum", expert_bias=bias, **one)[1].tolist() == [[1, 0, 2, 3]]
    lone_group = torch.full((1, 8), math.nan, device=device)
    lone_group[0, 5] = 1.0
    ids = ops.route(lone_group, 4, **one)[1][0].tolist()
    assert ids[0] == 5 and len(set(ids)) == 4


@pytest.mark.parametrize("experts", [255, 256, 257, 512, 1024])
def test_every_expert_can_be_chosen(experts, device):
    logits = torch.eye(experts, device=device) * 8
    weights, ids, _ = ops.route(logits, 1)
    assert ids.flatten().tolist() == list(range(experts))
    tail = torch.arange(experts, dtype=torch.float32, device=device)[None] / 64
    assert ops.route(tail, 8)[1][0].tolist() == list(range(experts - 1, experts - 9, -1))


def test_bias_and_selection_scores_get_no_gradient(device):
    logits = normal(5, 6, dtype=torch.float32, device=device).requires_grad_()
    bias = normal(6, seed=1, dtype=torch.float32, device=device).requires_grad_()
    selection = normal(5, 6, seed=2, dtype=torch.float32, device=device).requires_grad_()
    weights, _, scores = ops.route(logits, 2, expert_bias=bias, selection_scores=selection)
    grads = torch.autograd.grad(
        weights.square().sum() + scores.square().sum(), [logits, bias, selection], allow_unused=True
    )
    assert grads[0].abs().sum() > 0 and grads[1] is None and grads[2] is None


# sinkhorn


@pytest.mark.parametrize("iterations", [0, 1, 2, 7, 40])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (7, 3), (129, 60), (300, 257)])
def test_sinkhorn(shape, dtype, iterations, device):
    logits = normal(*shape, seed=1, dtype=dtype, device=device).requires_grad_()
    out = ops.sinkhorn(logits, iterations)
    assert out.dtype == oracle.wide(dtype) and not out.requires_grad and out.shape == shape
    truth = oracle.sinkhorn(logits.detach().double(), iterations)
    eager = oracle.sinkhorn(logits.detach().to(out.dtype), iterations)
    tolerance.close(out, truth, eager, units=16)


def test_sinkhorn_balances_the_selection(device):
    """A column everybody prefers is evened out: every expert ends with its share."""
    logits = normal(400, 8, seed=1, device=device)
    logits[:, 3] += 6
    favoured = ops.route(logits, 1)[1].flatten().bincount(minlength=8)
    evened = ops.route(logits, 1, selection_scores=ops.sinkhorn(logits))[1].flatten().bincount(minlength=8)
    assert favoured[3] > 350 and evened.max() < 80 and evened.min() > 25
    assert (
        ops.sinkhorn(logits, 0, 1e-6)
        .sum(dim=0)
        .allclose(torch.full((8,), 1 / 8, dtype=torch.float64, device=device), atol=1e-3)
    )


def test_sinkhorn_of_nothing(device):
    assert ops.sinkhorn(torch.empty(0, 4, device=device)).shape == (0, 4)
    assert ops.sinkhorn(torch.empty(0, 4, device=device), 3).shape == (0, 4)
