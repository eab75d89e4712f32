"""The plain-torch reference against formulas written out another way: token by token, in numpy or with lists."""

import math

import numpy as np
import pytest
import torch

from fastmoe_cpp import ops, reference


def softmax(row):
    e = np.exp(row - row.max())
    return e / e.sum()


SCORES = {
    "softmax": softmax,
    "sigmoid": lambda row: 1 / (1 + np.exp(-row)),
    "sqrtsoftplus": lambda row: np.sqrt(np.log1p(np.exp(row))),
}


def best(keys, count):
    """Ids of the largest keys, the lower id first among equals, NaN last."""
    return sorted(range(len(keys)), key=lambda e: (math.isnan(keys[e]), -keys[e] if keys[e] == keys[e] else 0, e))[
        :count
    ]


def route_row(logits, k, score, after, renorm, eps, scale, bias=None, selection=None, groups=1, kept=1, how="max"):
    scores = SCORES[score](logits)
    keys = selection if selection is not None else logits if after else scores
    keys = keys + (0 if bias is None else bias)
    if groups > 1:
        size = len(keys) // groups
        worth = [sorted(keys[g * size : (g + 1) * size])[::-1] for g in range(groups)]
        worth = [w[0] if how == "max" else w[0] + w[1] for w in worth]
        chosen = best(worth, kept)
        keys = np.array([keys[e] if e // size in chosen else -np.inf for e in range(len(keys))])
    ids = best(keys, k)
    weights = SCORES[score](logits[ids]) if after else scores[ids]
    if renorm:
        weights = weights / (weights.sum() + eps)
    return weights * scale, ids, scores


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("renorm,eps,scale", [(False, 0.0, 1.0), (True, 0.0, 2.5), (True, 1e-2, 1.0)])
@pytest.mark.parametrize("how", ["plain", "bias", "selection", "groups_max", "groups_top2"])
def test_route(score, after, renorm, eps, scale, how):
    logits = torch.randn(17, 12, dtype=torch.float64)
    extra, row_extra = {}, lambda t: {}
    if how == "bias":
        bias = torch.randn(12, dtype=torch.float64)
        extra, row_extra = {"expert_bias": bias}, lambda t: {"bias": bias.numpy()}
    elif how == "selection":
        selection = torch.randn(17, 12, dtype=torch.float64)
        extra, row_extra = {"selection_scores": selection}, lambda t: {"selection": selection[t].numpy()}
    elif how.startswith("groups"):
        name = {"groups_max": "max", "groups_top2": "top2_sum"}[how]
        extra = {"num_groups": 4, "topk_groups": 2, "group_score": name}
        row_extra = lambda t: {"groups": 4, "kept": 2, "how": name}  # noqa: E731
    weights, ids, scores = reference.route(
        logits, 3, score_function=score, scores_after_topk=after, renormalize=renorm, renormalize_epsilon=eps,
        scaling_factor=scale, **extra,
    )  # fmt: skip
    assert ids.dtype == torch.int64 and weights.dtype == torch.float64
    for t in range(17):
        w, i, s = route_row(logits[t].numpy(), 3, score, after, renorm, eps, scale, **row_extra(t))
        assert ids[t].tolist() == i
        np.testing.assert_allclose(weights[t].numpy(), w, rtol=1e-12)
        np.testing.assert_allclose(scores[t].numpy(), s, rtol=1e-12)


def test_route_is_float32_for_narrower_logits():
    weights, _, scores = reference.route(torch.randn(3, 5).bfloat16(), 2)
    assert weights.dtype == scores.dtype == torch.float32


def test_ties_go_to_the_lower_id_and_nan_ranks_last():
    nan = math.nan
    logits = torch.tensor([[1.0, 2, 2, 2], [nan, nan, 0, 1], [nan] * 4, [0, -math.inf, nan, -math.inf]])
    for score in SCORES:
        ids = reference.route(logits, 3, score_function=score)[1]
        assert ids.tolist() == [[1, 2, 3], [3, 2, 0], [0, 1, 2], [0, 1, 3]], score
    weights, _, scores = reference.route(logits, 3, score_function="softmax", renormalize=False)
    assert weights[0].isfinite().all() and scores[0].isfinite().all()
    assert weights[1].isnan().all() and scores[1].isnan().all()
    scores = reference.route(logits, 3, score_function="sigmoid")[2]
    assert scores.isnan().tolist() == logits.isnan().tolist()


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("renorm", [False, True])
@pytest.mark.parametrize("score", SCORES)
def test_replay(score, after, renorm):
    logits = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, 3], [5, -1], [-1, 2], [-1, -1], [1, 0]], dtype=torch.int32)
    kwargs = {"score_function": score, "scores_after_topk": after, "renormalize": renorm}
    weights, same, _ = reference.route(logits, 2, topk_ids=ids, **kwargs)
    assert same.tolist() == ids.tolist() and same.dtype == torch.int64
    for t, row in enumerate(ids.tolist()):
        there = [e for e in row if e >= 0]
        chosen = logits[t].detach().numpy()
        if there:
            expected = SCORES[score](chosen[there]) if after else SCORES[score](chosen)[there]
            if renorm:
                expected = expected / expected.sum()
            np.testing.assert_allclose(weights[t][ids[t] >= 0].detach().numpy(), expected, rtol=1e-12)
        assert (weights[t][ids[t] < 0] == 0).all()
    weights.sum().backward()
    assert logits.grad.isfinite().all() and (logits.grad[3] == 0).all()
    assert torch.autograd.gradcheck(lambda x: reference.route(x, 2, topk_ids=ids, **kwargs)[0], logits)


@pytest.mark.parametrize("tokens", [1, 7, 64])
@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_sinkhorn(tokens, iterations):
    logits = torch.randn(tokens, 5, dtype=torch.float64)
    cost = np.exp(logits.numpy())
    d0, d1 = np.ones(tokens), np.ones(5)
    for _ in range(iterations or 10_000):
        d0 = 1 / tokens / ((cost * d1).sum(1) + 1e-8)
        new = 1 / 5 / ((cost * d0[:, None]).sum(0) + 1e-8)
        moved, d1 = np.abs(new - d1).mean(), new
        if iterations == 0 and moved <= 1e-4:
            break
    result = reference.sinkhorn(logits, iterations)
    np.testing.assert_allclose(result.numpy(), d1 * cost * d0[:, None], rtol=1e-12)
    np.testing.assert_allclose(result.sum(0).numpy(), 1 / 5, rtol=1e-5)
    assert reference.sinkhorn(logits.float()).dtype == torch.float32
    assert reference.sinkhorn(logits[:0]).shape == (0, 5)


def plan_by_lists(ids, experts, weights=None, capacity=None, policy="position", padding=None):
    k = len(ids[0]) if ids else 1
    wanting = [[] for _ in range(experts)]
    for t, row in enumerate(ids):
        for j, e in enumerate(row):
            if e >= 0 and not (padding and padding[t]):
                wanting[e].append(t * k + j)
    counts = [len(w) for w in wanting]
    if capacity is not None:
        if policy == "probs":
            wanting = [sorted(sorted(w, key=lambda p: (-weights[p // k][p % k], p))[:capacity]) for w in wanting]
        else:
            wanting = [w[:capacity] for w in wanting]
    return wanting, counts


@pytest.mark.parametrize("capacity", [None, 0, 1, 3, 1000])
@pytest.mark.parametrize("policy", ["position", "probs"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 20])
def test_dispatch(capacity, policy, padded, tokens):
    ids = torch.rand(tokens, 6).argsort(1)[:, :2]
    ids[torch.rand(tokens, 2) < 0.2] = -1
    weights = torch.randint(0, 3, (tokens, 2)) / 2.0  # ties
    mask = torch.rand(tokens) < 0.3 if padded else None
    plan = reference.dispatch(
        ids, 6, topk_weights=weights, capacity=capacity, drop_policy=policy, padding_mask=mask
    )  # fmt: skip
    wanting, counts = plan_by_lists(
        ids.tolist(), 6, weights.tolist(), capacity, policy, mask.tolist() if padded else None
    )
    assert plan.tokens_per_expert.tolist() == counts
    offsets = plan.expert_offsets.tolist()
    assert offsets == [0, *np.cumsum([len(w) for w in wanting])]
    assert [plan.slot_index[a:b].tolist() for a, b in zip(offsets, offsets[1:], strict=False)] == wanting
    slots = torch.full((tokens * 2,), -1)
    for slot, pair in enumerate(p for w in wanting for p in w):
        slots[pair] = slot
    assert plan.token_slot.flatten().tolist() == slots.tolist()
    assert {t.dtype for t in plan[:3]} == {torch.int32} and plan.tokens_per_expert.dtype == torch.int64


def test_a_nan_weight_is_dropped_before_any_number_as_the_operator_does():
    ids = torch.zeros(5, 1, dtype=torch.long)
    weights = torch.tensor([[0.1], [math.nan], [0.3], [-math.inf], [0.2]])
    plans = [
        f(ids, 1, topk_weights=weights, capacity=3, drop_policy="probs") for f in (reference.dispatch, ops.dispatch)
    ]
    for plan in plans:
        assert plan.slot_index[:3].tolist() == [0, 2, 4]
        assert plan.expert_offsets.tolist() == [0, 3]


@pytest.mark.parametrize("bad", [-2, 4])
def test_dispatch_refuses_ids_out_of_range(bad):
    with pytest.raises(ValueError, match=f"topk_ids must be -1 or between 0 and 3, got {bad}"):
        reference.dispatch(torch.tensor([[0, bad]]), 4)


def erf(x):
    return np.vectorize(math.erf)(x)


CURVES = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * (1 + erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}
GATES = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}


def activate(x, name, alpha=1.702, limit=7.0):
    if name in CURVES:
        return CURVES[name](x)
    gate, up = np.split(x, 2, -1)
    if name == "clamped_swiglu":
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        return gate / (1 + np.exp(-alpha * gate)) * (up + 1)
    return CURVES[GATES[name]](gate) * up


@pytest.mark.parametrize("activation", [*CURVES, *GATES, "clamped_swiglu"])
@pytest.mark.parametrize("weight_on_input", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_experts(activation, weight_on_input, bias, interleaved):
    gated = activation not in CURVES
    if interleaved and not gated:
        interleaved = False
    tokens, hidden, inner, experts, k = 9, 5, 4, 6, 3
    rows = inner * (2 if gated else 1)
    x = torch.randn(tokens, hidden, dtype=torch.float64)
    up = torch.randn(experts, rows, hidden, dtype=torch.float64) * 2
    down = torch.randn(experts, hidden, inner, dtype=torch.float64)
    up_bias = torch.randn(experts, rows, dtype=torch.float64) if bias else None
    down_bias = torch.randn(experts, hidden, dtype=torch.float64) if bias else None
    ids = torch.rand(tokens, experts).argsort(1)[:, :k]
    ids[2, 1] = ids[4, 0] = -1
    weights = torch.rand(tokens, k, dtype=torch.float64)
    plan = reference.dispatch(ids, experts)
    output = reference.experts(
        x, up, down, weights, *plan[:3], gate_up_bias=up_bias, down_bias=down_bias, activation=activation,
        activation_alpha=1.3, activation_limit=1.5, interleaved=interleaved, weight_on_input=weight_on_input,
    )  # fmt: skip
    order = [*range(0, rows, 2), *range(1, rows, 2)] if interleaved else list(range(rows))
    for t in range(tokens):
        expected = np.zeros(hidden)
        for j in range(k):
            e, w = int(ids[t, j]), float(weights[t, j])
            if e < 0:
                continue
            pre = up[e].numpy() @ x[t].numpy() * (w if weight_on_input else 1)
            pre = (pre + (up_bias[e].numpy() if bias else 0))[order]
            y = down[e].numpy() @ activate(pre, activation, 1.3, 1.5) + (down_bias[e].numpy() if bias else 0)
            expected += y * (1 if weight_on_input else w)
        np.testing.assert_allclose(output[t].numpy(), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("gate,up,passes", [
    (1.5, 0.5, (1, 1)), (0.5, 1.5, (1, 1)), (-1.5, -1.5, (1, 1)), (1.6, 0.5, (0, 1)), (0.5, 1.6, (1, 0)),
    (0.5, -1.6, (1, 0)), (-1.6, 0.5, (1, 1)), (1.6, 1.6, (0, 0)),
])  # fmt: skip
def test_clamped_swiglu_has_a_gradient_at_its_limits_and_none_beyond(gate, up, passes):
    x = torch.tensor([gate, up], dtype=torch.float64, requires_grad=True)
    value = reference.activate(x, "clamped_swiglu", 1.3, 1.5)
    (grad,) = torch.autograd.grad(value, x)
    g, u = min(gate, 1.5), min(max(up, -1.5), 1.5)
    sigmoid = 1 / (1 + math.exp(-1.3 * g))
    assert value.item() == pytest.approx(g * sigmoid * (u + 1), rel=1e-12)
    slope = sigmoid + 1.3 * g * sigmoid * (1 - sigmoid)
    assert grad.tolist() == pytest.approx([passes[0] * slope * (u + 1), passes[1] * g * sigmoid], rel=1e-12)


def test_activate_refuses_an_unknown_name():
    with pytest.raises(ValueError, match="activation must be one of 'swiglu', .*, got 'tanh'"):
        reference.activate(torch.zeros(2), "tanh")


def test_gather_linear_and_combine_are_the_stages_of_experts():
    ids = torch.tensor([[0, 2], [-1, 1], [2, 0], [2, -1]])
    plan = reference.dispatch(ids, 4)
    x, weight = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 5, 3, dtype=torch.float64)
    bias = torch.randn(4, 5, dtype=torch.float64)
    rows = reference.gather(x, *plan[:3])
    assert rows.shape == (8, 3) and (rows[6:] == 0).all()
    assert torch.equal(rows[:6], x[[0, 2, 1, 0, 2, 3]])
    out = reference.grouped_linear(rows, weight, plan.expert_offsets, bias)
    torch.testing.assert_close(out[2], weight[1] @ x[1] + bias[1])
    assert out.shape == (8, 5) and (out[6:] == 0).all()
    weights = torch.rand(4, 2, dtype=torch.float64)
    y = reference.combine(out, weights, *plan[:3])
    torch.testing.assert_close(
        y[0], weights[0, 0] * (weight[0] @ x[0] + bias[0]) + weights[0, 1] * (weight[2] @ x[0] + bias[2])
    )
    torch.testing.assert_close(y[1], weights[1, 1] * (weight[1] @ x[1] + bias[1]))
    ones = reference.combine(out, None, *plan[:3])
    torch.testing.assert_close(ones[3], weight[2] @ x[3] + bias[2])


def test_combine_sums_in_float32_and_rounds_once():
    rows = torch.tensor([[256.0], [1.0], [1.0]]).bfloat16()  # 256 + 1 is 256 in bfloat16
    plan = reference.dispatch(torch.tensor([[0, 1, 2]]), 3)
    assert reference.combine(rows, None, *plan[:3]).item() == 258.0


def test_counts_and_losses():
    ids = torch.tensor([[[0, 1], [1, -1], [3, 1]], [[2, 3], [2, 0], [0, 1]]])
    mask = torch.tensor([[False, False, True], [False, False, False]])
    assert reference.expert_counts(ids, 5).tolist() == [[1, 3, 0, 1, 0], [2, 1, 2, 1, 0]]
    assert reference.expert_counts(ids, 5, mask).tolist() == [[1, 2, 0, 0, 0], [2, 1, 2, 1, 0]]
    scores = torch.rand(2, 3, 5, dtype=torch.float64)
    counts = reference.expert_counts(ids, 5, mask)
    expected = sum(
        0.3 * int(counts[s, e]) * float(scores[s, t, e])
        for s in range(2) for t in range(3) for e in range(5) if not mask[s, t]
    )  # fmt: skip
    assert reference.balance_loss(scores, counts, 0.3, mask).item() == pytest.approx(expected, rel=1e-12)
    logits = torch.randn(4, 5, dtype=torch.float64)
    by_hand = [math.log(np.exp(row.numpy()).sum()) ** 2 for row in logits]
    assert reference.z_loss(logits, 2.0).item() == pytest.approx(2 * np.mean(by_hand), rel=1e-12)
    some = torch.tensor([True, False, True, False])
    assert reference.z_loss(logits, 1.0, some).item() == pytest.approx(np.mean(by_hand[1::2]), rel=1e-12)
    assert reference.z_loss(logits[:0]).item() == 0 and reference.z_loss(logits, 1.0, some | True).item() == 0


def test_update_expert_bias():
    bias = torch.zeros(4)
    reference.update_expert_bias(bias, torch.tensor([9, 1, 4, 2]), 0.5)  # the mean is 4
    assert bias.tolist() == [-0.5, 0.5, 0, 0.5]
    bias = torch.zeros(4)
    reference.update_expert_bias(bias, torch.tensor([9, 1, 4, 2]), 0.5, zero_mean=True)
    assert bias.tolist() == [-0.625, 0.375, -0.125, 0.375]
