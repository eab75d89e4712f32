"""dispatch and gather: plans exactly as a list-of-lists makes them, rows exactly as indexing does."""

import pytest
import torch
from support import distributions, matrix, oracle, pairwise, tolerance
from support.samples import DTYPES, LAYOUTS, dispatch, laid_out, normal, ops

KINDS = tuple(n for n in distributions.NAMES if n != "nan_rows")
CASES = pairwise.cover(
    {
        "T": matrix.TOKENS,
        "E": (*matrix.EXPERTS, 1024),
        "K": matrix.TOP_K,
        "ids": (torch.int64, torch.int32),
        "kind": KINDS,
        "capacity": ("none", 0, 1, 3, "half", 10**9),
        "policy": ("position", "probs"),
        "padding": ("none", "some", "all", "nobody"),
        "weights": ("none", *DTYPES),
        "layout": LAYOUTS,
    },
    lambda c: (
        matrix.top_k(c) <= c["E"]
        and c["T"] * matrix.top_k(c) <= 3.3e4
        and c["T"] * c["E"] <= 1e6
        and not (c["policy"] == "probs" and c["capacity"] != "none" and c["weights"] == "none")
    ),
)


def padding_of(kind, tokens):
    g = torch.Generator().manual_seed(11)
    return {
        "none": None,
        "some": torch.rand(tokens, generator=g) < 0.4,
        "all": torch.ones(tokens, dtype=torch.bool),
        "nobody": torch.zeros(tokens, dtype=torch.bool),
    }[kind]


@pytest.mark.parametrize("case", CASES, ids=pairwise.name)
def test_dispatch(case, device):
    tokens, experts, top_k = case["T"], case["E"], matrix.top_k(case)
    ids, weights = distributions.ids(case["kind"], tokens, experts, top_k, seed=1)
    # few distinct values, so that equal weights meet the capacity limit
    weights = (weights * 8).round() / 8
    capacity = {"none": None, "half": max(1, tokens * top_k // (2 * experts))}.get(case["capacity"], case["capacity"])
    padding = padding_of(case["padding"], tokens)
    options = {"capacity": capacity, "drop_policy": case["policy"]}
    if case["weights"] != "none":
        weights = weights.to(case["weights"])
        options["topk_weights"] = laid_out(weights.to(device), case["layout"])
    if padding is not None:
        options["padding_mask"] = padding.to(device)
    plan = dispatch(laid_out(ids.to(device=device, dtype=case["ids"]), case["layout"]), experts, **options)
    expected = oracle.dispatch(ids, experts, weights, capacity, case["policy"], padding)
    assert [t.dtype for t in plan] == [torch.int32] * 3 + [torch.int64]
    assert [list(t.shape) for t in plan] == [[tokens * top_k], [tokens, top_k], [experts + 1], [experts]]
    assert plan.tokens_per_expert.tolist() == expected.tokens_per_expert
    assert plan.expert_offsets.tolist() == expected.expert_offsets
    assert plan.token_slot.tolist() == expected.token_slot
    assert plan.slot_index[: expected.expert_offsets[-1]].tolist() == expected.slot_index


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 0.0, -0.0])
def test_probs_policy_with_weights_that_are_no_number(bad, device):
    """NaN is lighter than anything; the plan stays a plan."""
    ids = torch.zeros(6, 1, dtype=torch.int64, device=device)
    weights = torch.tensor([0.5, bad, 0.25, bad, 0.125, 0.75], device=device)[:, None]
    plan = dispatch(ids, 2, topk_weights=weights, capacity=3, drop_policy="probs")
    kept = (plan.token_slot >= 0).flatten().tolist()
    expected = {
        "nan": [True, False, True, False, False, True],
        "inf": [False, True, False, True, False, True],
    }.get(str(bad), [True, False, True, False, False, True])
    assert kept == expected and plan.expert_offsets.tolist() == [0, 3, 3]


def test_long_input_is_sorted_by_all_threads_and_stays_stable(device):
    """More pairs than one part of a parallel sort holds."""
    ids = torch.randint(-1, 60, (30000, 2), generator=torch.Generator().manual_seed(0))
    plan = dispatch(ids.to(device), 60)
    expected = torch.sort(ids.flatten(), stable=True).indices[int((ids == -1).sum()) :]
    assert torch.equal(plan.slot_index[: expected.numel()].cpu().long(), expected)
    served = int(plan.expert_offsets[-1])
    assert served == expected.numel() == int(plan.tokens_per_expert.sum())


GATHER_CASES = pairwise.cover(
    {
        "T": matrix.TOKENS,
        "H": matrix.SIZES,
        "E": matrix.EXPERTS,
        "K": matrix.TOP_K,
        "dtype": DTYPES,
        "kind": KINDS,
        "layout": LAYOUTS,
        "grad_layout": LAYOUTS,
        "capacity": ("none", 0, 2),
    },
    lambda c: (
        matrix.top_k(c) <= c["E"]
        and c["T"] * matrix.top_k(c) <= 3.3e4
        and c["T"] * matrix.top_k(c) * c["H"] <= 2e6
        and c["T"] * c["E"] <= 1e6
    ),
)


@pytest.mark.parametrize("case", GATHER_CASES, ids=pairwise.name)
def test_gather(case, device):
    """The same bits as indexing, zeros where a slot is nobody's; backward sums a token's slots in order of k."""
    tokens, top_k, dtype = case["T"], matrix.top_k(case), case["dtype"]
    ids = distributions.ids(case["kind"], tokens, case["E"], top_k, seed=1)[0]
    capacity = None if case["capacity"] == "none" else case["capacity"]
    plan = dispatch(ids.to(device), case["E"], capacity=capacity)
    x = normal(tokens, case["H"], seed=2, dtype=dtype, device=device)
    leaf = laid_out(x, case["layout"]).requires_grad_()
    rows = ops.gather(leaf, *plan[:3])
    assert torch.equal(rows, oracle.gather(x, oracle.dispatch(ids, case["E"], capacity=capacity), top_k))
    cotangent = normal(tokens * top_k, case["H"], seed=3, dtype=dtype, device=device)
    (grad,) = torch.autograd.grad(rows, leaf, laid_out(cotangent, case["grad_layout"]))
    truth = oracle.combine(cotangent.double(), None, plan.token_slot)
    tolerance.close(grad, truth, oracle.combine(cotangent, None, plan.token_slot))
    assert grad.dtype == dtype
