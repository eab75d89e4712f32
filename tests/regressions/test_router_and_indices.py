"""Failures of routers and of the indices they hand on."""

import math
import os
import subprocess
import sys
import warnings

import pytest
import torch
from support import oracle, tolerance
from support.samples import dispatch, experts_inputs, leaves, normal, ops, run_experts

from fastmoe_cpp import MoE, MoEConfig, RouterConfig


def config(**changes):
    return MoEConfig(**{"hidden_size": 8, "intermediate_size": 4, "num_experts": 6, "top_k": 2} | changes)


@pytest.mark.parametrize("top_k", [1, 2, 8, 60])
@pytest.mark.parametrize("experts", [60, 256, 257])
def test_nan_rows_still_choose_distinct_experts_in_range(experts, top_k, device):
    """A NaN row chose expert 0 K times, or id E + 1, and wild pointers followed [vLLM, SGLang]."""
    logits = normal(9, experts, dtype=torch.float32, device=device)
    logits[2] = math.nan
    logits[5, 1:] = math.nan
    weights, ids, _ = ops.route(logits, top_k)
    for row in ids.tolist():
        assert len(set(row)) == top_k and 0 <= min(row) and max(row) < experts
    assert ids[5, 0] == 0 and ids[2].tolist() == list(range(top_k))
    # and the rest of the layer keeps the damage in its row
    inputs = experts_inputs(9, 8, 4, experts, top_k, dtype=torch.float32, device=device)
    out = run_experts(inputs | {"topk_ids": ids, "topk_weights": weights})
    assert out[[0, 1, 3, 4, 6, 7, 8]].isfinite().all() and out[2].isnan().all() and out[5].isnan().all()


def test_minus_one_is_dropped_everywhere(device):
    """Negative ids, which expert parallelism uses for another rank's experts, were illegal [AITER,
    TransformerEngine]."""
    inputs = experts_inputs(6, 8, 4, 3, 2, device=device)
    inputs["topk_ids"] = torch.tensor([[0, -1], [-1, -1], [-1, 2], [1, 0], [2, -1], [-1, 1]], device=device)
    live = inputs["topk_ids"] >= 0
    logits = normal(6, 3, device=device)
    weights, ids, _ = ops.route(logits, 2, topk_ids=inputs["topk_ids"])
    assert torch.equal(ids, inputs["topk_ids"]) and (weights[~live] == 0).all() and not weights.isnan().any()
    plan = dispatch(ids, 3)
    assert torch.equal(plan.token_slot >= 0, live) and int(plan.expert_offsets[-1]) == int(live.sum())
    assert ops.expert_counts(ids[None], 3)[0].tolist() == plan.tokens_per_expert.tolist() == [2, 2, 2]
    given = leaves(inputs)
    out = run_experts(given, plan)
    assert (out[1] == 0).all()
    (grad,) = torch.autograd.grad(out.sum(), given["topk_weights"])
    assert (grad[~live] == 0).all() and (grad[live] != 0).all()
    rows = ops.gather(inputs["hidden_states"], *plan[:3])
    assert (rows[int(live.sum()) :] == 0).all()


def test_an_id_above_the_experts_is_an_error_and_writes_nothing():
    """An id of E wrote out of bounds, and atomics made the order of rows differ from run to run [FastMoE]."""
    for bad in (3, 4, 2**20):
        with pytest.raises(ValueError, match=f"^topk_ids must be -1 or between 0 and 2, got {bad}"):
            ops.dispatch(torch.tensor([[0, 1], [bad, 2]]), 3)


@pytest.mark.cuda
@pytest.mark.parametrize("bad", [3, -2])
def test_an_id_above_the_experts_traps_on_the_gpu(bad):
    """The same, where nothing may wait for the device: the kernel says the sentence and stops. In a process of its
    own."""
    script = (
        "import torch, fastmoe_cpp\n"
        f"ids = torch.tensor([[0, 1], [{bad}, 2]], device='cuda')\n"
        "torch.ops.fastmoe_cpp.dispatch(ids, 3)\n"
        "torch.cuda.synchronize()\n"
    )
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root)
    assert done.returncode != 0
    assert "topk_ids" in done.stdout + done.stderr and str(bad) in done.stdout + done.stderr


def test_plans_keep_the_order_of_pairs(device):
    """The order of rows within an expert depended on a race [FastMoE]."""
    ids = torch.randint(0, 7, (3000, 3), generator=torch.Generator().manual_seed(0))
    plans = [dispatch(ids.to(device), 7) for _ in range(5)]
    expected = torch.sort(ids.flatten(), stable=True).indices
    for plan in plans:
        assert torch.equal(plan.slot_index.cpu().long(), expected)


@pytest.mark.parametrize("experts", [255, 256, 257, 512, 1024])
def test_experts_above_255_are_chosen(experts, device):
    """Experts above id 255 were never chosen: an 8-bit index [imp]."""
    logits = torch.zeros(experts, experts, device=device)
    logits[torch.arange(experts), torch.arange(experts)] = 1
    ids = ops.route(logits, 1)[1]
    assert ids.flatten().tolist() == list(range(experts))
    assert dispatch(ids, experts).tokens_per_expert.tolist() == [1] * experts
    assert ops.expert_counts(ids[None], experts)[0].tolist() == [1] * experts


@pytest.mark.parametrize("top_k", [0, -1, 7])
def test_top_k_out_of_range_is_refused_by_the_constructor(top_k):
    """K above the number of experts failed deep inside a kernel [FastMoE]."""
    with pytest.raises(ValueError, match=rf"top_k .*got {top_k}") as caught:
        config(top_k=top_k)
    assert top_k < 1 or "6" in str(caught.value)


@pytest.mark.parametrize("experts", [2, 8, 60, 128, 257, 1024])
@pytest.mark.parametrize("function", oracle.SCORE_FUNCTIONS)
def test_ties_go_to_the_lower_id(experts, function, device):
    """A kernel broke ties differently from torch, so two paths routed a token differently [vLLM, TorchTitan]."""
    top_k = min(8, experts)
    flat = torch.full((5, experts), 0.3, device=device)
    assert ops.route(flat, top_k, score_function=function)[1].tolist() == [list(range(top_k))] * 5
    two_levels = torch.randint(0, 2, (64, experts), generator=torch.Generator().manual_seed(0)).float()
    expected = two_levels.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    for after in (False, True):
        ids = ops.route(two_levels.to(device), top_k, score_function=function, scores_after_topk=after)[1]
        assert torch.equal(ids.cpu(), expected)


def test_softmax_before_or_after_top_k_is_a_choice(device):
    """Only one order was offered, and models trained in the other one lost accuracy [Megatron-LM]."""
    logits = normal(7, 6, device=device)
    before, ids, _ = ops.route(logits, 2, renormalize=False)
    after, same_ids, _ = ops.route(logits, 2, renormalize=False, scores_after_topk=True)
    assert torch.equal(ids, same_ids)
    tolerance.close(before, torch.softmax(logits, dim=1).gather(1, ids))
    tolerance.close(after, torch.softmax(logits.gather(1, ids), dim=1))
    assert not torch.allclose(before, after, rtol=1e-2)
    for flag, expected in ((False, before), (True, after)):
        layer = MoE(config(router=RouterConfig(renormalize=False, scores_after_topk=flag)), device=device).double()
        with torch.no_grad():
            layer.router.weight.copy_(torch.eye(6, 8))
        x = torch.cat([logits, logits.new_zeros(7, 2)], dim=1)
        tolerance.close(layer.router(x).topk_weights.double(), expected, units=64)


def test_a_bfloat16_router_routes_in_float32(device):
    """Logits rounded to bfloat16 made ties and unstable training [MegaBlocks, SGLang]."""
    layer = MoE(config(hidden_size=64, num_experts=64), device=device, dtype=torch.bfloat16)
    x = normal(200, 64, dtype=torch.bfloat16, device=device)
    out = layer.forward_with_routing(x)
    assert out.router_logits.dtype == out.router_scores.dtype == out.topk_weights.dtype == torch.float32
    truth = x.double() @ layer.router.weight.detach().double().T
    tolerance.close(out.router_logits, truth, x.float() @ layer.router.weight.detach().float().T, units=8)
    rounded = truth.to(torch.bfloat16)
    assert (rounded.sort(dim=1).values.diff(dim=1) == 0).any(), "bfloat16 logits would tie"
    assert not (out.router_logits.sort(dim=1).values.diff(dim=1) == 0).any()


def test_one_expert_with_renormalisation_warns_that_the_router_learns_nothing(device):
    """With K = 1 a renormalised weight is always 1: the router got no gradient, and nobody was told [MiniMind]."""
    norms = []
    for renormalize in (True, False):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            one = config(top_k=1, router=RouterConfig(renormalize=renormalize), initializer_range=0.5)
        assert len(caught) == renormalize and all("top_k is 1" in str(w.message) for w in caught)
        layer = MoE(one, device=device)
        layer(normal(20, 8, dtype=torch.float32, device=device)).square().sum().backward()
        norms.append(float(layer.router.weight.grad.norm()))
    assert norms[0] < 1e-6 * norms[1] and norms[1] > 1e-3


@pytest.mark.parametrize("form", ["switch", "huggingface", "batch", "sequence", "global"])
def test_balance_loss_at_perfect_and_at_no_balance(form, device):
    """A loss by standard deviation had a NaN gradient exactly at perfect balance [vmoe]."""
    from fastmoe_cpp import losses

    ids = torch.arange(6, device=device).reshape(1, 6, 1)
    for probs in (
        torch.full((1, 6, 6), 1 / 6),
        torch.nn.functional.one_hot(torch.zeros(1, 6, dtype=torch.int64), 6).float(),
    ):
        for chosen in (ids, torch.zeros_like(ids)):
            leaf = probs.to(device).clone().requires_grad_()
            loss = losses.balance_loss(leaf, chosen, form)
            (grad,) = torch.autograd.grad(loss, leaf)
            assert loss.isfinite() and grad.isfinite().all()
    even = losses.balance_loss(torch.full((1, 6, 6), 1 / 6, device=device), ids, form)
    torch.testing.assert_close(even.item(), 1.0, rtol=1e-6, atol=0)
    one = torch.zeros(1, 6, 6, device=device)
    one[..., 0] = 1
    torch.testing.assert_close(losses.balance_loss(one, torch.zeros_like(ids), form).item(), 6.0, rtol=1e-6, atol=0)
