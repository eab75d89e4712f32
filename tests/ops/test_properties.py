"""What must hold of any plan and any routing, on cases hypothesis makes up."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import oracle, tolerance
from support.samples import dispatch, experts_inputs, normal, ops, run_experts

# `device` is the same for every example of a test
each_example = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
FINITE = st.floats(-30, 30, width=32)


@st.composite
def routings(draw, max_tokens=12, max_experts=9):
    """Ids [T, K] with duplicates and -1, experts, capacity, policy, weights of few values, padding."""
    tokens, experts, top_k = (
        draw(st.integers(0, max_tokens)),
        draw(st.integers(1, max_experts)),
        draw(st.integers(1, 5)),
    )
    pairs = tokens * top_k
    ids = draw(st.lists(st.integers(-1, experts - 1), min_size=pairs, max_size=pairs))
    weights = draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=pairs, max_size=pairs))
    padding = draw(st.none() | st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    return {
        "ids": torch.tensor(ids, dtype=torch.int64).reshape(tokens, top_k),
        "experts": experts,
        "weights": torch.tensor(weights, dtype=torch.float32).reshape(tokens, top_k),
        "capacity": draw(st.none() | st.integers(0, 6)),
        "policy": draw(st.sampled_from(["position", "probs"])),
        "padding": None if padding is None else torch.tensor(padding, dtype=torch.bool),
    }


def plan_of(r, device, ids=None):
    return dispatch(
        (r["ids"] if ids is None else ids).to(device), r["experts"], topk_weights=r["weights"].to(device),
        capacity=r["capacity"], drop_policy=r["policy"],
        padding_mask=None if r["padding"] is None else r["padding"].to(device),
    )  # fmt: skip


@each_example
@given(r=routings())
def test_a_plan_is_a_permutation_that_counts_right(r, device):
    plan = plan_of(r, device)
    ids, top_k = r["ids"], r["ids"].shape[1]
    offsets, table = plan.expert_offsets.tolist(), plan.token_slot.flatten().tolist()
    served = offsets[-1]
    slots = plan.slot_index[:served].tolist()
    assert offsets[0] == 0 and offsets == sorted(offsets) and served <= ids.numel()
    # slot_index and token_slot are inverse, and every live slot has one pair
    assert sorted(s for s in table if s >= 0) == list(range(served))
    assert [table[pair] for pair in slots] == list(range(served))
    wanted = ids.clone()
    if r["padding"] is not None:
        wanted[r["padding"]] = -1
    counts = wanted[wanted >= 0].bincount(minlength=r["experts"]).tolist()
    assert plan.tokens_per_expert.tolist() == counts and sum(counts) == int((wanted >= 0).sum())
    for e, asked in enumerate(counts):
        mine = slots[offsets[e] : offsets[e + 1]]
        assert mine == sorted(mine), "slots of an expert are in order of the pair"
        assert all(int(wanted.flatten()[p]) == e for p in mine)
        assert len(mine) == (asked if r["capacity"] is None else min(asked, r["capacity"]))
        lost = [p for p in range(ids.numel()) if int(wanted.flatten()[p]) == e and p not in mine]
        heavy = r["weights"].flatten().tolist()
        for a in mine:
            for b in lost:
                if r["policy"] == "position":
                    assert a < b
                else:
                    assert (-heavy[a], a) < (-heavy[b], b)
    assert top_k == plan.token_slot.shape[1]


@each_example
@given(r=routings(), seed=st.integers(0, 1000))
def test_relabelling_experts_moves_their_slices_and_nothing_else(r, seed, device):
    names = torch.randperm(r["experts"], generator=torch.Generator().manual_seed(seed))
    renamed = torch.where(r["ids"] >= 0, names[r["ids"].clamp(min=0)], -1)
    a, b = plan_of(r, device), plan_of(r, device, renamed)
    assert torch.equal(a.tokens_per_expert.cpu(), b.tokens_per_expert.cpu()[names])
    assert torch.equal(a.token_slot >= 0, b.token_slot >= 0)
    for e in range(r["experts"]):
        one = a.slot_index[a.expert_offsets[e] : a.expert_offsets[e + 1]]
        other = b.slot_index[b.expert_offsets[names[e]] : b.expert_offsets[names[e] + 1]]
        assert torch.equal(one, other)


@each_example
@given(r=routings(), hidden=st.integers(1, 5))
def test_gather_and_its_backward_are_adjoint(r, hidden, device):
    """<gather(x), rows> = <x, gather_backward(rows)>: exactly, on integers."""
    plan = plan_of(r, device)
    tokens, top_k = r["ids"].shape
    g = torch.Generator().manual_seed(0)
    x = torch.randint(-9, 9, (tokens, hidden), generator=g).double().to(device)
    rows = torch.randint(-9, 9, (tokens * top_k, hidden), generator=g).double().to(device)
    left = (ops.gather(x, *plan[:3]) * rows).sum()
    assert left == (x * ops.gather_backward(rows, plan.token_slot)).sum()


@each_example
@given(r=routings(), hidden=st.integers(1, 5))
def test_combine_and_its_backward_are_adjoint(r, hidden, device):
    plan = plan_of(r, device)
    tokens, top_k = r["ids"].shape
    g = torch.Generator().manual_seed(0)
    rows = torch.randint(-9, 9, (tokens * top_k, hidden), generator=g).double().to(device)
    grad = torch.randint(-9, 9, (tokens, hidden), generator=g).double().to(device)
    weights = r["weights"].double().to(device)
    grad_rows, grad_weights = ops.combine_backward(grad, rows, weights, *plan[:3], [True, True])
    left = (ops.combine(rows, weights, *plan[:3]) * grad).sum()
    assert left == (rows * grad_rows).sum() == (weights * grad_weights).sum()


@each_example
@given(r=routings(max_tokens=8))
def test_combine_of_gather_scales_by_the_kept_weights(r, device):
    plan = plan_of(r, device)
    x = torch.arange(r["ids"].shape[0] * 3, dtype=torch.float64, device=device).reshape(-1, 3)
    weights = r["weights"].double().to(device)
    kept = torch.where(plan.token_slot >= 0, weights, 0.0).sum(dim=1, keepdim=True)
    assert torch.equal(ops.combine(ops.gather(x, *plan[:3]), weights, *plan[:3]), x * kept)


@st.composite
def logit_rows(draw):
    tokens, experts = draw(st.integers(0, 5)), draw(st.integers(1, 9))
    number = FINITE | st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e30, -1e30, 5e-324])
    values = draw(st.lists(number, min_size=tokens * experts, max_size=tokens * experts))
    top_k = draw(st.integers(1, experts))
    groups = draw(st.sampled_from([g for g in (1, 2, 3, 4) if experts % g == 0]))
    kept = draw(st.integers(-(-top_k * groups // experts), groups))
    return torch.tensor(values, dtype=torch.float64).reshape(tokens, experts), top_k, groups, kept


@each_example
@given(
    drawn=logit_rows(),
    function=st.sampled_from(oracle.SCORE_FUNCTIONS),
    after=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_ids_are_distinct_and_in_range_whatever_the_logits(drawn, function, after, dtype, device):
    """NaN, infinities and overflow included; and a NaN is never preferred to a number."""
    values, top_k, groups, kept = drawn
    logits = values.to(dtype)
    weights, ids, scores = ops.route(
        logits.to(device), top_k, score_function=function, scores_after_topk=after, num_groups=groups, topk_groups=kept
    )
    ids = ids.cpu()
    assert ((ids >= 0) & (ids < logits.shape[1])).all()
    for row, chosen in zip(logits, ids.tolist(), strict=True):
        assert len(set(chosen)) == top_k
        if groups == 1 and not (function == "softmax" and not after and row.isinf().any()):
            numbers = int((~row.isnan()).sum())
            assert row[chosen].isnan().sum() == max(0, top_k - numbers)
    assert weights.shape == ids.shape and scores.shape == logits.shape


@each_example
@given(
    rows=st.lists(st.lists(st.integers(-6, 6), min_size=6, max_size=6), min_size=1, max_size=5),
    function=st.sampled_from(oracle.SCORE_FUNCTIONS),
    top_k=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_routing_treats_every_token_alone(rows, function, top_k, seed, device):
    """Permuting tokens permutes the result, bit by bit; of equal logits the lower id is chosen."""
    logits = torch.tensor(rows, dtype=torch.float32, device=device) / 2
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).to(device)
    whole = ops.route(logits, top_k, score_function=function)
    moved = ops.route(logits[order], top_k, score_function=function)
    for a, b in zip(whole, moved, strict=True):
        assert torch.equal(a[order], b)
    for row, chosen in zip(rows, whole[1].tolist(), strict=True):
        assert chosen == sorted(range(6), key=lambda e: (-row[e], e))[:top_k]


@each_example
@given(seed=st.integers(0, 10**6), tokens=st.integers(1, 9), capacity=st.none() | st.integers(0, 3))
def test_experts_treat_every_token_alone(seed, tokens, capacity, device):
    """Permuting tokens permutes outputs, relabelling experts changes nothing, splitting the batch changes nothing."""
    inputs = experts_inputs(tokens, 5, 4, 4, 2, dtype=torch.float64, device=device, seed=seed % 97)
    g = torch.Generator().manual_seed(seed)
    whole = run_experts(inputs)
    order = torch.randperm(tokens, generator=g).to(device)
    by_token = ("hidden_states", "topk_weights", "topk_ids")
    tolerance.close(run_experts(inputs | {n: inputs[n][order] for n in by_token}), whole[order], units=64)
    cut = int(torch.randint(0, tokens + 1, (1,), generator=g))
    halves = [
        run_experts(inputs | {n: inputs[n][part] for n in by_token}) for part in (slice(0, cut), slice(cut, None))
    ]
    tolerance.close(torch.cat(halves), whole, units=64)
    names = torch.randperm(4, generator=g).to(device)
    relabelled = inputs | {"topk_ids": names[inputs["topk_ids"]]}
    for name in ("gate_up_proj", "down_proj"):
        relabelled[name] = torch.empty_like(inputs[name])
        relabelled[name][names] = inputs[name]
    tolerance.close(run_experts(relabelled), whole, units=64)


@pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
def test_identical_experts_equal_a_dense_mlp(activation, device):
    inputs = experts_inputs(11, 6, 5, 4, 3, device=device, activation=activation)
    for name in ("gate_up_proj", "down_proj"):
        inputs[name] = inputs[name][:1].expand(4, -1, -1)
    act = oracle.activate(
        *oracle.split(inputs["hidden_states"] @ inputs["gate_up_proj"][0].T, activation in oracle.GATED, False),
        activation,
    )
    # weights of a token sum to one
    tolerance.close(run_experts(inputs, activation=activation), act @ inputs["down_proj"][0].T, units=64)


@each_example
@given(
    seed=st.integers(0, 1000),
    sequences=st.integers(1, 4),
    length=st.integers(0, 6),
    experts=st.integers(1, 5),
)
def test_balance_loss_is_linear_in_its_scores(seed, sequences, length, experts, device):
    scores = normal(sequences, length, experts, seed=seed, device=device)
    counts = torch.randint(0, 9, (sequences, experts), generator=torch.Generator().manual_seed(seed)).to(device)
    one = ops.balance_loss(scores, counts, 1.0)
    torch.testing.assert_close(ops.balance_loss(scores * 2, counts, 0.25), one / 2, rtol=1e-12, atol=1e-12)
    parts = sum(ops.balance_loss(scores[i : i + 1], counts[i : i + 1], 1.0) for i in range(sequences))
    torch.testing.assert_close(one, parts, rtol=1e-12, atol=1e-12)
