"""grouped_linear: each expert's rows by its own weight, and the three gradients."""

import pytest
import torch
from support import matrix, oracle, pairwise, tolerance
from support.samples import DTYPES, laid_out, normal, ops

LOADS = ("even", "zipf", "all_to_first", "all_to_last", "middle_empty", "none")


def feasible(case):
    rows, work = case["S"], case["S"] * case["in"] * case["out"]
    return work <= 1e7 and case["E"] * case["in"] * case["out"] <= 3e6 and rows * max(case["in"], case["out"]) <= 4e6


CASES = pairwise.cover(
    {
        "S": matrix.TOKENS,
        "in": matrix.SIZES,
        "out": matrix.SIZES,
        "E": matrix.EXPERTS,
        "dtype": DTYPES,
        "load": LOADS,
        "bias": (False, True),
        "tail": (False, True),
        "weight": ("contiguous", "transposed", "strided"),
        "rows": ("contiguous", "transposed", "strided", "offset"),
    },
    feasible,
)


def offsets_of(load, rows, experts, tail):
    served = rows * 2 // 3 if tail else rows
    share = torch.ones(experts, dtype=torch.float64)
    if load == "zipf":
        share = 1 / torch.arange(1, experts + 1, dtype=torch.float64)
    elif load == "middle_empty" and experts > 1:
        share[experts // 2] = 0
    elif load == "all_to_first":
        share[1:] = 0
    elif load == "all_to_last":
        share[:-1] = 0
    elif load == "none":
        served = 0
    ends = (share.cumsum(0) / share.sum() * served).round().int()
    return torch.cat([torch.zeros(1, dtype=torch.int32), ends])


@pytest.mark.parametrize("case", CASES, ids=pairwise.name)
def test_against_oracle(case, device):
    dtype = case["dtype"]
    offsets = offsets_of(case["load"], case["S"], case["E"], case["tail"])
    values = {
        "rows": normal(case["S"], case["in"], seed=1, dtype=dtype, device=device),
        "weight": normal(
            case["E"], case["out"], case["in"], seed=2, std=case["in"] ** -0.5, dtype=dtype, device=device
        ),
    }
    if case["bias"]:
        values["bias"] = normal(case["E"], case["out"], seed=3, dtype=dtype, device=device)
    cotangent = normal(case["S"], case["out"], seed=9, dtype=dtype, device=device)

    def run(function, dtype, layout=lambda name, t: t):
        given = {k: layout(k, v.to(dtype)).detach().requires_grad_() for k, v in values.items()}
        out = function(given["rows"], given["weight"], given.get("bias"))
        return out.detach(), oracle.grads(out, list(given.values()), cotangent.to(dtype))

    def operator(rows, weight, bias):
        return ops.grouped_linear(rows, weight, offsets.to(device), bias)

    def reference(rows, weight, bias):
        return oracle.grouped_linear(rows, weight, offsets.tolist(), bias)

    out, grads = run(operator, dtype, lambda name, t: laid_out(t, case.get(name, "contiguous")))
    truth, true_grads = run(reference, torch.float64)
    eager, eager_grads = run(reference, dtype)
    assert out.dtype == dtype
    assert (out[int(offsets[-1]) :] == 0).all() and (grads[0][int(offsets[-1]) :] == 0).all()
    tolerance.close(out, truth, eager, what="output")
    for name, a, b, c in zip(values, grads, true_grads, eager_grads, strict=True):
        tolerance.close(a, b, c, factor=tolerance.BACKWARD, what=f"gradient of {name}")


@pytest.mark.parametrize("wanted", range(8), ids="{:03b}".format)
def test_every_subset_of_gradients(wanted, device):
    rows, weight = normal(6, 5, device=device), normal(3, 4, 5, seed=1, device=device)
    grad = normal(6, 4, seed=2, device=device)
    offsets = torch.tensor([0, 2, 2, 5], dtype=torch.int32, device=device)
    mask = [bool(wanted >> i & 1) for i in range(3)]
    everything = ops.grouped_linear_backward(grad, rows, weight, offsets, [True] * 3)
    for want, one, full in zip(
        mask, ops.grouped_linear_backward(grad, rows, weight, offsets, mask), everything, strict=True
    ):
        assert torch.equal(one, full) if want else one.numel() == 0
