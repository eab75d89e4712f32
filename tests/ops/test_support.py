"""The instruments themselves: a tolerance that lets a bug through, or a case list with holes, would fail no other
test."""

import pytest
import torch
from support import distributions, oracle, pairwise, samples, tolerance


@pytest.mark.parametrize("dtype", samples.DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_tolerance_refuses_a_wrong_swiglu_whatever_the_scale(dtype, scale):
    """gate and up swapped, on outputs as small as they come: an absolute tolerance of 1e-2 would pass it."""
    gate, up = samples.normal(64, 64, seed=1), samples.normal(64, 64, seed=2) * scale
    truth = oracle.activate(gate.to(dtype).double(), up.to(dtype).double(), "swiglu")
    eager = oracle.activate(gate.to(dtype), up.to(dtype), "swiglu")
    tolerance.close(eager, truth, eager)
    wrong = oracle.activate(up.to(dtype), gate.to(dtype), "swiglu")
    with pytest.raises(AssertionError, match="is off by"):
        tolerance.close(wrong, truth, eager)


@pytest.mark.parametrize("dtype", samples.DTYPES)
def test_tolerance_is_below_one_percent_of_the_rms(dtype):
    truth = samples.normal(1000)
    rounded = truth.to(dtype)
    tolerance.close(rounded, truth)
    with pytest.raises(AssertionError):
        tolerance.close((truth + 0.03 * tolerance.rms(truth)).to(dtype), truth)


def test_tolerance_compares_nan_shape_and_single_elements():
    truth = samples.normal(10)
    hole = truth.clone()
    hole[3] = float("nan")
    for wrong in (hole, truth[:9], truth.clone().index_fill_(0, torch.tensor([9]), 0.0)):
        with pytest.raises(AssertionError):
            tolerance.close(wrong, truth)
    with pytest.raises(AssertionError):
        tolerance.close(truth, hole)
    tolerance.close(hole, hole)


def test_covering_array_has_every_feasible_pair():
    values = {"t": (0, 1, 2, 7), "e": (1, 2, 8), "k": (1, 2, 8), "kind": ("a", "b", "c"), "flag": (False, True)}

    def feasible(case):
        return case["k"] <= case["e"] and not (case["t"] == 7 and case["e"] == 8)

    cases = pairwise.cover(values, feasible)
    assert all(feasible(c) for c in cases)
    wanted = set(pairwise.feasible_pairs(values, feasible))
    assert ("e", 8, "t", 7) not in wanted and ("e", 2, "k", 8) not in wanted and ("e", 8, "k", 8) in wanted
    assert wanted == set().union(*map(pairwise.pairs_of, cases))
    assert len(cases) < 40, "no better than all combinations"
    assert cases == pairwise.cover(values, feasible)


@pytest.mark.parametrize("name", distributions.NAMES)
def test_distributions_are_what_they_are_called(name):
    tokens, experts, top_k = 50, 8, 3
    ids, weights = distributions.ids(name, tokens, experts, top_k)
    assert ids.shape == weights.shape == (tokens, top_k)
    used = ids[ids >= 0].bincount(minlength=experts)
    if name == "all_to_one":
        assert (used > 0).sum() == 1
    elif name == "duplicates":
        assert (ids == ids[:, :1]).all() and (used > 0).all()
    else:
        for row in ids.tolist():
            live = [e for e in row if e >= 0]
            assert len(live) == len(set(live))
    if name.endswith("_empty"):
        assert used[distributions.empty_expert(name, experts)] == 0 and (used == 0).sum() == 1
    if name == "one_token":
        assert (ids >= 0).any(dim=1).sum() == 1
    if name == "dropped":
        assert 0 < (ids == -1).sum() < ids.numel()
    if name == "zipf":
        assert used[0] > 2 * used[-1]
    assert weights.isnan().any() == (name == "nan_rows")
