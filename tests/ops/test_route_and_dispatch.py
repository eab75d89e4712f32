"""Router logits, route and dispatch in one call: the same as the three, and of the few tokens that a GPU takes in one
launch, logits against float64 on memory filled with NaN and everything after them to the bit."""

from __future__ import annotations

import pytest
import torch
from support import pairwise
from support.poison import poison
from support.samples import normal

from fastmoe_cpp import ops
from fastmoe_cpp.outputs import DispatchPlan, RouterOutput

OPTIONS = {
    "plain": {},
    "raw": {"renormalize": False},
    "after": {"scores_after_topk": True},
    "groups": {"num_groups": 4, "topk_groups": 2},
    "pairs": {"num_groups": 2, "topk_groups": 1, "group_score": "top2_sum", "renormalize_epsilon": 1e-20},
    "scaled": {"scaling_factor": 2.5},
}
ONE_LAUNCH = ("bfloat16 bfloat16", "bfloat16 float32", "float16 float16", "float16 float32", "float32 float32")


def feasible(case) -> bool:
    options = OPTIONS[case["options"]]
    groups = options.get("num_groups", 1)
    kept = case["E"] // groups * options.get("topk_groups", 1)
    return case["E"] % groups == 0 and case["K"] <= kept and (case["options"] != "pairs" or case["E"] >= 4)


CASES = pairwise.cover(
    {
        "T": (1, 2, 3, 4, 5, 7, 8, 9, 0, 33), "E": (8, 1, 2, 31, 60, 128, 256, 257, 512, 1024), "K": (2, 1, 4, 8),
        "H": (64, 8, 24, 264, 2048, 7168, 20), "dtypes": (*ONE_LAUNCH, "float32 bfloat16", "float64 float64"),
        "bias": (False, True), "expert_bias": (False, True), "score_function": ("softmax", "sigmoid", "sqrtsoftplus"),
        "options": tuple(OPTIONS), "values": ("normal", "equal", "nan", "inf"),
    },
    feasible, seed=3, tries=3,
)  # fmt: skip


def takes_few(case) -> bool:
    fits = 1 <= case["T"] <= 8 and case["H"] % 8 == 0 and case["dtypes"] in ONE_LAUNCH
    return fits and torch.cuda.get_device_capability() >= (9, 0)


def operands(case, device):
    x_dtype, w_dtype = (getattr(torch, name) for name in case["dtypes"].split())
    x = normal(case["T"], case["H"], seed=1, device=device).to(x_dtype)
    w = (normal(case["E"], case["H"], seed=2, device=device) * case["H"] ** -0.5).to(w_dtype)
    if case["values"] == "equal":
        w = w[:1].expand_as(w).contiguous()  # every expert ties with every other
    elif case["values"] in ("nan", "inf"):
        x[1::2, 3] = float(case["values"])
    bias = normal(case["E"], seed=3, device=device).to(w_dtype) if case["bias"] else None
    options = {"score_function": case["score_function"], **OPTIONS[case["options"]]}
    if case["expert_bias"]:
        options["expert_bias"] = normal(case["E"], seed=4, device=device).float()
    return x, w, bias, options


def check_choice(routing, plan, case, options) -> None:
    """What follows from the logits, by the operators that take logits and ids: equal to the bit, NaN included."""
    expected = ops.route(routing.logits, case["K"], **options)
    for name, wanted in zip(RouterOutput._fields[1:], expected, strict=True):
        torch.testing.assert_close(getattr(routing, name), wanted, rtol=0, atol=0, equal_nan=True, msg=name)
    for name, got, wanted in zip(DispatchPlan._fields, plan, ops.dispatch(routing.topk_ids, case["E"]), strict=True):
        assert torch.equal(got, wanted) and got.dtype == wanted.dtype, name


@pytest.mark.parametrize("case", CASES, ids=pairwise.name)
def test_the_three_in_one(case, device):
    x, w, bias, options = operands(case, device)
    if device == "cuda":
        poison()
    with torch.no_grad():
        routing, plan = ops.route_and_dispatch(x, w, bias, case["K"], **options)
        logits = ops.router_logits(x, w, bias)
    assert routing.logits.dtype == logits.dtype and routing.logits.shape == logits.shape
    torch.testing.assert_close(routing.logits, logits, rtol=0, atol=0, equal_nan=True)
    if device == "cuda" and takes_few(case):
        exact = x.double() @ w.double().t() + (0 if bias is None else bias.double())
        usual = exact.isfinite()
        torch.testing.assert_close(logits[~usual], exact[~usual].float(), equal_nan=True)
        size = x.double().abs() @ w.double().abs().t() + 1
        assert ((logits.double() - exact) / size)[usual].abs().lt(1e-6).all()
    check_choice(routing, plan, case, options)


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_gradients_are_those_of_the_three(tokens, device):
    found = []
    for together in (False, True):
        x = normal(tokens, 32, seed=1, device=device).float().requires_grad_()
        w = normal(12, 32, seed=2, device=device).float().requires_grad_()
        b = normal(12, seed=3, device=device).float().requires_grad_()
        if together:
            routing, _ = ops.route_and_dispatch(x, w, b, 3, score_function="sigmoid")
        else:
            logits = ops.router_logits(x, w, b)
            routing = RouterOutput(logits, *ops.route(logits, 3, score_function="sigmoid"))
        loss = (routing.topk_weights * torch.arange(3.0, device=device)).sum() + routing.logits.square().sum()
        found.append((loss, *torch.autograd.grad(loss, (x, w, b))))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.cuda
@pytest.mark.parametrize("tokens", [1, 8])
def test_a_token_has_the_logits_it_has_alone(tokens):
    x, w = normal(8, 2048, seed=1, device="cuda").bfloat16(), normal(128, 2048, seed=2, device="cuda").bfloat16()
    with torch.no_grad():
        whole = ops.route_and_dispatch(x, w, None, 8)[0].logits
        part = ops.route_and_dispatch(x[:tokens].clone(), w, None, 8)[0].logits
    assert torch.equal(whole[:tokens], part)


@pytest.mark.cuda
def test_it_is_one_launch_and_waits_for_nothing():
    x, w = normal(4, 2048, seed=1, device="cuda").bfloat16(), normal(128, 2048, seed=2, device="cuda").bfloat16()
    run = torch.no_grad()(lambda: ops.route_and_dispatch(x, w, None, 8))
    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    kernels = [event.key for event in profile.key_averages() if event.self_device_time_total]
    if torch.cuda.get_device_capability() >= (9, 0):
        assert len(kernels) == 1 and "route_few" in kernels[0]
    else:
        assert len(kernels) == 3
