"""combine: each token's rows by weight, in order of k, and both gradients."""

import pytest
import torch
from support import distributions, matrix, oracle, pairwise, tolerance
from support.samples import DTYPES, LAYOUTS, dispatch, laid_out, normal, ops

CASES = pairwise.cover(
    {
        "T": matrix.TOKENS,
        "H": matrix.SIZES,
        "E": matrix.EXPERTS,
        "K": matrix.TOP_K,
        "dtype": DTYPES,
        "kind": distributions.NAMES,
        "weighted": (True, False),
        "capacity": ("none", 0, 2),
        "rows": LAYOUTS,
        "weights": LAYOUTS,
        "grad": LAYOUTS,
    },
    lambda c: (
        matrix.top_k(c) <= c["E"]
        and c["T"] * matrix.top_k(c) <= 3.3e4
        and c["T"] * matrix.top_k(c) * c["H"] <= 2e6
        and c["T"] * c["E"] <= 1e6
    ),
)


@pytest.mark.parametrize("case", CASES, ids=pairwise.name)
def test_combine(case, device):
    tokens, top_k, dtype = case["T"], matrix.top_k(case), case["dtype"]
    ids, weights = distributions.ids(case["kind"], tokens, case["E"], top_k, seed=1)
    plan = dispatch(ids.to(device), case["E"], capacity=None if case["capacity"] == "none" else case["capacity"])
    rows = normal(tokens * top_k, case["H"], seed=2, dtype=dtype, device=device)
    weights = weights.to(device=device, dtype=oracle.wide(dtype)) if case["weighted"] else None
    cotangent = normal(tokens, case["H"], seed=3, dtype=dtype, device=device)
    served = int(plan.expert_offsets[-1])

    def run(function, dtype, laid=False):
        given = [laid_out(rows.to(dtype), case["rows"] if laid else "contiguous").detach().clone()]
        given[0] = laid_out(given[0], case["rows"]) if laid else given[0]
        # nobody may read the rows of no slot
        given[0][served:] = float("nan") if laid else 0
        if weights is not None:
            given.append(laid_out(weights.to(oracle.wide(dtype)), case["weights"] if laid else "contiguous").detach())
        for t in given:
            t.requires_grad_()
        out = function(given[0], given[1] if weights is not None else None)
        return out.detach(), oracle.grads(
            out, given, laid_out(cotangent.to(dtype), case["grad"] if laid else "contiguous")
        )

    out, grads = run(lambda r, w: ops.combine(r, w, *plan[:3]), dtype, laid=True)
    truth, true_grads = run(lambda r, w: oracle.combine(r, w, plan.token_slot), torch.float64)
    eager, eager_grads = run(lambda r, w: oracle.combine(r, w, plan.token_slot), dtype)
    assert out.dtype == dtype
    tolerance.close(out, truth, eager)
    tolerance.close(grads[0], true_grads[0], eager_grads[0], factor=tolerance.BACKWARD, what="gradient of rows")
    assert (grads[0][served:] == 0).all()
    if weights is not None:
        assert grads[1].dtype == oracle.wide(dtype)
        tolerance.close(grads[1], true_grads[1], eager_grads[1], factor=tolerance.BACKWARD, units=8, what="of weights")
        assert (grads[1][plan.token_slot < 0] == 0).all()


def test_sums_in_order_of_k(device):
    """2^24 + 1 - 2^24 in float32 is 0 in this order and 1 in another."""
    ids = torch.tensor([[2, 1, 0], [0, 2, 1]], device=device)
    plan = dispatch(ids, 3)
    big = 2.0**24
    rows = torch.empty(6, 1, device=device)
    rows[plan.token_slot.long()] = torch.tensor([[[big], [1.0], [-big]], [[big], [-big], [1.0]]], device=device)
    assert ops.combine(rows, None, *plan[:3]).tolist() == [[0.0], [1.0]]


@pytest.mark.parametrize("wanted", range(4), ids="{:02b}".format)
@pytest.mark.parametrize("weighted", [False, True])
def test_every_subset_of_gradients(wanted, weighted, device):
    ids, weights = distributions.ids("dropped", 6, 4, 2)
    plan = dispatch(ids.to(device), 4)
    rows, grad = normal(12, 5, device=device), normal(6, 5, seed=1, device=device)
    weights = weights.to(device) if weighted else None
    mask = [bool(wanted >> i & 1) for i in range(2)]
    everything = ops.combine_backward(grad, rows, weights, *plan[:3], [True, True])
    for want, one, full in zip(
        mask, ops.combine_backward(grad, rows, weights, *plan[:3], mask), everything, strict=True
    ):
        assert torch.equal(one, full) if want else one.numel() == 0
