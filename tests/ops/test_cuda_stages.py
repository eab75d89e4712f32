"""The CUDA kernels of router, dispatch, combine and losses, run on memory filled with NaN, against float64 references
and exact plans over pairwise-covered cases."""

from __future__ import annotations

import math

import pytest
import torch
from support import distributions, oracle, pairwise, tolerance
from support.poison import poison
from support.samples import DTYPES, laid_out, normal, ops
from torch import Tensor

pytestmark = pytest.mark.cuda

TOKENS = (7, 0, 1, 2, 127, 128, 129, 4096)
EXPERTS = (8, 1, 2, 60, 128, 255, 257, 512, 1024)
TOP_K = (2, 1, 8, "E")
HIDDEN = (64, 1, 7, 8, 129, 896, 2048)
GROUPS = {8: 4, 60: 6, 128: 8, 255: 5, 512: 8, 1024: 16}


def top_k(case: pairwise.Case) -> int:
    return case["E"] if case["K"] == "E" else case["K"]


def feasible(case: pairwise.Case) -> bool:
    return top_k(case) <= case["E"] and case["T"] * top_k(case) * case.get("H", 16) <= 7e7


@pytest.fixture(autouse=True)
def poisoned() -> None:
    poison()


def randn(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Random numbers made on the GPU, for the large tensors."""
    g = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn(*shape, generator=g, device="cuda", dtype=torch.float32).to(dtype)


def units(dtype: torch.dtype, terms: int = 1) -> float:
    """What rounding is worth: float64 has no wider truth, so sums in another order differ by their own; and long sums
    in order of k err by more than eager torch's, which are trees."""
    return 64 if dtype == torch.float64 else max(2, terms / 16)


# --- router -----------------------------------------------------------------------------------------------------------


def expected_ids(keys: Tensor, k: int, groups: int, kept: int, group_score: str) -> Tensor:
    """Stable sorts: falling keys, of equals the lower id, then masked groups, then NaN."""
    nan = keys.isnan()
    keys = keys.masked_fill(nan, -math.inf)
    if groups > 1:
        best = keys.view(keys.shape[0], groups, keys.shape[1] // groups).sort(dim=-1, descending=True).values
        best = best[..., :2].sum(-1) if group_score == "top2_sum" else best[..., 0]
        chosen = best.sort(dim=-1, descending=True, stable=True).indices[:, :kept]
        mask = torch.ones_like(best, dtype=torch.bool).scatter(1, chosen, False)
        keys = keys.masked_fill(mask.repeat_interleave(keys.shape[1] // groups, dim=1), -math.inf)
    order = keys.sort(dim=-1, descending=True, stable=True).indices
    return order.gather(1, nan.gather(1, order).byte().sort(dim=-1, stable=True).indices)[:, :k]


ROUTE = pairwise.cover(
    {
        "T": TOKENS,
        "E": EXPERTS,
        "K": TOP_K,
        "dtype": DTYPES,
        "distribution": distributions.NAMES,
        "score": oracle.SCORE_FUNCTIONS,
        "select": ("scores", "bias", "given", "after", "replay"),
        "groups": ("none", "max", "top2_sum"),
        "renormalize": (True, False),
        "epsilon": (0.0, 0.5),
        "scaling": (1.0, 2.5),
        "layout": ("contiguous", "offset"),
    },
    feasible,
)


@pytest.mark.parametrize("case", ROUTE, ids=pairwise.name)
def test_route(case):
    T, E, k, dtype, name = case["T"], case["E"], top_k(case), case["dtype"], case["distribution"]
    wide = oracle.wide(dtype)
    logits = laid_out(distributions.logits(name, T, E).to("cuda", dtype), case["layout"])
    logits64 = logits.double()
    groups = GROUPS.get(E, 1) if case["groups"] != "none" else 1
    kept = max(math.ceil(k / (E // groups)), (groups + 1) // 2)
    after = case["select"] == "after"
    options = {
        "score_function": case["score"], "scores_after_topk": after, "renormalize": case["renormalize"],
        "renormalize_epsilon": case["epsilon"], "scaling_factor": case["scaling"],
    }  # fmt: skip
    given, selection, bias = {}, None, 0
    if case["select"] == "bias":
        bias = given["expert_bias"] = normal(E, seed=1, dtype=wide, device="cuda")
    elif case["select"] == "given":
        selection = given["selection_scores"] = (normal(T, E, seed=1, dtype=wide, device="cuda") * 4).round()
        selection[::5, E // 2] = math.nan
    elif case["select"] == "replay":
        given["topk_ids"] = distributions.ids(name, T, E, k)[0].cuda()
        if case["renormalize"]:
            given["topk_ids"] = given["topk_ids"].int()
    if groups > 1:
        given |= {"num_groups": groups, "topk_groups": kept, "group_score": case["groups"]}
    weights, ids, scores = ops.route(logits, k, **given, **options)
    assert (weights.dtype, ids.dtype, scores.dtype) == (wide, torch.int64, wide)

    arguments = (case["score"], after, case["renormalize"], case["epsilon"], case["scaling"])
    true_weights, true_scores = oracle.routing_weights(logits64, ids, *arguments)
    eager_weights, eager_scores = oracle.routing_weights(logits.to(wide), ids, *arguments)
    tolerance.close(scores, true_scores, eager_scores, units=units(dtype), what="scores")
    tolerance.close(weights, true_weights, eager_weights, units=units(dtype), what="weights")
    if case["select"] == "replay":
        assert torch.equal(ids, given["topk_ids"].long())
        return
    keys = selection if selection is not None else logits.to(wide) if after else scores
    if case["score"] == "softmax" and keys is scores:  # rows with a NaN: the kernel's keys are not in its results
        broken = logits.isnan().any(dim=1, keepdim=True)
        keys = torch.where(broken, oracle.finite_softmax(logits64).to(wide), scores)
    keys = keys + bias
    expected = expected_ids(keys, k, groups, kept, case["groups"])
    differs = (ids != expected).any(dim=1)
    if case["select"] == "bias" and case["score"] == "softmax" and name == "nan_rows":
        # rebuilt keys are near the kernel's, not equal: near ties may fall either way
        near = torch.isclose(keys.gather(1, ids), keys.gather(1, expected), rtol=0, atol=1e-6, equal_nan=True)
        differs &= ~near.all(dim=1)
    assert not differs.any(), f"row {int(differs.nonzero()[0])}"
    assert ((ids >= 0) & (ids < E)).all() and (ids.sort(dim=1).values.diff(dim=1) > 0).all()


BACKWARD = [c for c in ROUTE if c["distribution"] != "nan_rows"]


@pytest.mark.parametrize("wanted", ["weights", "scores", "both"])
@pytest.mark.parametrize("case", BACKWARD[::3], ids=pairwise.name)
def test_route_backward(case, wanted):
    T, E, k, dtype, name = case["T"], case["E"], top_k(case), case["dtype"], case["distribution"]
    wide = oracle.wide(dtype)
    logits = distributions.logits(name, T, E).to("cuda", dtype)
    ids = distributions.ids(name, T, E, k)[0].cuda()
    after = case["select"] == "after"
    arguments = (case["score"], after, case["renormalize"], case["epsilon"], case["scaling"])
    grads = [normal(T, k, seed=2, dtype=wide, device="cuda"), normal(T, E, seed=3, dtype=wide, device="cuda")]
    for i, other in enumerate(("scores", "weights")):
        if wanted == other:
            grads[i] = None
    got = ops.route_backward(*grads, logits, ids, *arguments)
    assert got.dtype == dtype

    def reference(kind: torch.dtype) -> Tensor:
        x = logits.to(kind).requires_grad_()
        outputs = oracle.routing_weights(x, ids, *arguments)
        pairs = [(o, g.to(kind)) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
        if not pairs:
            return torch.zeros_like(x)
        return torch.autograd.grad([o for o, _ in pairs], x, [g for _, g in pairs], materialize_grads=True)[0]

    lowest, highest = ids.masked_fill(ids < 0, E).min(dim=1).values, ids.max(dim=1).values
    if wanted == "weights" and case["renormalize"] and case["epsilon"] == 0 and (highest <= lowest).all():
        # a token with one expert, however often: the weights are constant
        assert got.abs().le(16 * torch.finfo(wide).eps * case["scaling"]).all()
        return
    truth, eager = reference(torch.float64), reference(wide).to(dtype)
    if dtype == torch.float64:  # softmax's gradient is a small difference: its error is of the gradients' size
        assert torch.allclose(got, truth, rtol=1e-12, atol=1e-13)
        return
    tolerance.close(got, truth, eager, factor=tolerance.BACKWARD, units=units(dtype), what="gradient")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", oracle.SCORE_FUNCTIONS)
def test_route_backward_keeps_nan_in_its_row(dtype, score):
    logits = normal(9, 60, dtype=dtype, device="cuda")
    logits[4, 7] = math.nan
    weights, ids, _ = ops.route(logits, 8, score_function=score)
    grad = ops.route_backward(torch.ones_like(weights), None, logits, ids, score, False, True, 0.0, 1.0)
    assert grad[4].isnan().any() and not grad[torch.arange(9, device="cuda") != 4].isnan().any()


@pytest.mark.parametrize("iterations", [1, 5, 0])
@pytest.mark.parametrize(
    ("T", "E", "dtype"),
    [(1, 8, torch.float32), (7, 1, torch.float64), (129, 60, torch.bfloat16), (4096, 257, torch.float32),
     (4099, 128, torch.float32), (300, 1024, torch.float64), (300, 1024, torch.float16), (0, 8, torch.float32)],
)  # fmt: skip
def test_sinkhorn(T, E, dtype, iterations):
    logits = normal(T, E, dtype=dtype, device="cuda")
    got = ops.sinkhorn(logits, iterations, 1e-3)
    if T:
        truth, eager = (oracle.sinkhorn(logits.to(d), iterations, 1e-3) for d in (torch.float64, got.dtype))
        tolerance.close(got, truth, eager, units=units(dtype), what="sinkhorn")
    assert got.dtype == oracle.wide(dtype)


OPERANDS = [(d, d) for d in DTYPES] + [
    (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float32),
    (torch.bfloat16, torch.float16), (torch.bfloat16, torch.float64),
]  # fmt: skip


@pytest.mark.parametrize(("x_type", "weight_type"), OPERANDS)
@pytest.mark.parametrize(("T", "H", "E"), [(129, 896, 60), (4096, 2048, 128), (7, 129, 257), (1, 1, 1), (0, 8, 4)])
def test_router_logits(T, H, E, x_type, weight_type):
    """Float32 results of 16-bit operands: nothing of the result may be rounded to the operands' type on the way."""
    x, weight = normal(T, H, dtype=x_type, device="cuda"), normal(E, H, seed=1, dtype=weight_type, device="cuda")
    bias = normal(E, seed=2, dtype=weight_type, device="cuda")
    grad_type = torch.float64 if torch.float64 in (x_type, weight_type) else torch.float32
    epsilon = 2e-6 if grad_type == torch.float32 else 1e-14

    def near(got: Tensor, a: Tensor, b: Tensor, plus: Tensor | float = 0.0, kind: torch.dtype = grad_type) -> None:
        """|got - (a @ b + plus)| against a bound for sums in `kind`, and the rounding of the result's own type."""
        truth = a.double() @ b.double() + plus
        bound = epsilon * (a.double().abs() @ b.double().abs() + 1) + torch.finfo(got.dtype).eps / 2 * truth.abs()
        assert got.shape == truth.shape and (got.double() - truth).abs().le(bound).all()

    logits = ops.router_logits(x, weight, bias)
    assert logits.dtype == grad_type
    near(logits, x, weight.T, bias.double())
    grad = normal(T, E, seed=3, dtype=grad_type, device="cuda")
    grad_x, grad_weight, grad_bias = ops.router_logits_backward(grad, x, weight, [True, True, True])
    assert (grad_x.dtype, grad_weight.dtype, grad_bias.dtype) == (x_type, weight_type, grad_type)
    if x_type == torch.bfloat16 and grad_type == torch.float32:
        epsilon = 2.0**-15  # of a bfloat16 result, from two parts of 8 bits
    near(grad_x, grad, weight)
    if weight_type == torch.float32:
        epsilon = 2e-6
    near(grad_weight, grad.T, x)
    near(grad_bias[None], torch.ones(1, T, device="cuda"), grad)
    for mask in ([True, False, False], [False, True, False], [False, False, True]):
        some = ops.router_logits_backward(grad, x, weight, mask)
        for wanted, part, whole in zip(mask, some, (grad_x, grad_weight, grad_bias), strict=True):
            assert torch.equal(part, whole) if wanted else part.numel() == 0


def test_router_logits_are_not_spoilt_by_infinity():
    """A bfloat16 split of an infinite gradient must not turn it into NaN (inf - inf)."""
    x, weight = torch.ones(2, 8, device="cuda", dtype=torch.bfloat16), torch.ones(4, 8, device="cuda").bfloat16()
    grad = torch.zeros(2, 4, device="cuda")
    grad[0, 0] = math.inf
    grad_x, _, _ = ops.router_logits_backward(grad, x, weight, [True, False, False])
    assert (grad_x[0] == math.inf).all() and (grad_x[1] == 0).all()


# --- dispatch ---------------------------------------------------------------------------------------------------------


def expected_plan(ids, E, weights=None, capacity=None, policy="position", padding=None) -> list[Tensor]:
    T, k = ids.shape
    expert = ids.long().flatten()
    live = expert >= 0
    if padding is not None:
        live &= ~padding.repeat_interleave(k)
    pairs = live.nonzero().flatten()
    counts = torch.bincount(expert[pairs], minlength=E)
    if capacity is not None:
        if policy == "probs":
            weight = weights.double().flatten()[pairs].nan_to_num(nan=-math.inf)
            pairs = pairs[weight.sort(descending=True, stable=True).indices]
        pairs = pairs[expert[pairs].sort(stable=True).indices]
        first = counts.cumsum(0) - counts
        rank = torch.arange(pairs.numel(), device=ids.device) - first[expert[pairs]]
        pairs = pairs[rank < capacity].sort().values
    pairs = pairs[expert[pairs].sort(stable=True).indices]
    slot_index = torch.full((T * k,), -1, dtype=torch.int32, device=ids.device)
    slot_index[: pairs.numel()] = pairs.int()
    token_slot = torch.full((T * k,), -1, dtype=torch.int32, device=ids.device)
    token_slot[pairs] = torch.arange(pairs.numel(), dtype=torch.int32, device=ids.device)
    offsets = torch.zeros(E + 1, dtype=torch.int32, device=ids.device)
    offsets[1:] = torch.bincount(expert[pairs], minlength=E).cumsum(0)
    return [slot_index, token_slot.view(T, k), offsets, counts]


DISPATCH = pairwise.cover(
    {
        "T": TOKENS,
        "E": EXPERTS,
        "K": TOP_K,
        "distribution": distributions.NAMES,
        "ids": (torch.int64, torch.int32),
        "capacity": (None, 0, 1, "half", "large"),
        "policy": ("position", "probs"),
        "weights": DTYPES,
        "padding": (False, True),
        "layout": ("contiguous", "strided"),
    },
    feasible,
)


@pytest.mark.parametrize("case", DISPATCH, ids=pairwise.name)
def test_dispatch(case):
    T, E, k = case["T"], case["E"], top_k(case)
    ids, weights = distributions.ids(case["distribution"], T, E, k)
    weights = (weights * 64).round() / 64  # ties, in every type
    ids, weights = laid_out(ids.to("cuda", case["ids"]), case["layout"]), weights.to("cuda", case["weights"])
    capacity = {"half": max(T * k // (2 * E), 1), "large": 2 * T + 1}.get(case["capacity"], case["capacity"])
    padding = torch.arange(T, device="cuda") % 3 == 1 if case["padding"] else None
    options = {"capacity": capacity, "drop_policy": case["policy"], "padding_mask": padding}
    got = ops.dispatch(ids, E, topk_weights=weights, **options)
    for name, part, expected in zip(
        ("slot_index", "token_slot", "expert_offsets", "tokens_per_expert"), got,
        expected_plan(ids, E, weights, capacity, case["policy"], padding), strict=True,
    ):  # fmt: skip
        assert part.dtype == expected.dtype and torch.equal(part, expected), name


@pytest.mark.parametrize("policy", ["position", "probs"])
@pytest.mark.parametrize(("T", "E", "k"), [(262144, 128, 8), (65536, 1024, 16), (1 << 20, 1, 1), (300001, 257, 3)])
def test_dispatch_of_many_pairs(T, E, k, policy):
    g = torch.Generator(device="cuda").manual_seed(0)
    ids = (torch.rand(T, k, generator=g, device="cuda") ** 2 * E).long()  # low ids are crowded, and repeat
    weights = torch.rand(T, k, generator=g, device="cuda")
    for capacity in (None, T * k // E // 2):
        got = ops.dispatch(ids, E, topk_weights=weights, capacity=capacity, drop_policy=policy)
        for part, expected in zip(got, expected_plan(ids, E, weights, capacity, policy), strict=True):
            assert torch.equal(part, expected)


# --- gather and combine -----------------------------------------------------------------------------------------------

ROWS = pairwise.cover(
    {
        "T": TOKENS,
        "H": HIDDEN,
        "E": EXPERTS,
        "K": (2, 1, 3, 8, 9, "E"),
        "dtype": DTYPES,
        "distribution": distributions.NAMES,
        "weights": (True, False),
        "capacity": (None, 2),
        "layout": ("contiguous", "offset", "strided"),
    },
    feasible,
)


@pytest.mark.parametrize("case", ROWS, ids=pairwise.name)
def test_gather_and_combine(case):
    T, H, E, k, dtype, layout = case["T"], case["H"], case["E"], top_k(case), case["dtype"], case["layout"]
    wide = oracle.wide(dtype)
    ids = distributions.ids(case["distribution"], T, E, k)[0].cuda()
    slot_index, token_slot, offsets, _ = ops.dispatch(ids, E, capacity=case["capacity"])
    plan = (slot_index, token_slot, offsets)
    served = slot_index[: int(offsets[-1])].long()
    token, n = served // k, served.numel()
    rows = laid_out(randn(T * k, H, seed=1, dtype=dtype), layout)
    rows[n:] = math.nan  # nobody's rows are never read
    x = laid_out(randn(T, H, seed=2, dtype=dtype), layout)
    weights = normal(T, k, seed=3, dtype=wide, device="cuda") if case["weights"] else None
    if weights is not None:
        weights[token_slot < 0] = math.nan  # nor are the weights of dropped pairs

    gathered = ops.gather(x, *plan)
    assert torch.equal(gathered[:n], x[token]) and not gathered[n:].any()

    def combined(kind: torch.dtype) -> Tensor:
        return oracle.combine(rows.to(kind), None if weights is None else weights.to(oracle.wide(kind)), token_slot)

    out = ops.combine(rows, weights, *plan)
    assert out.dtype == dtype
    tolerance.close(out, combined(torch.float64), combined(dtype), units=units(dtype, k), what="combine")
    ones = oracle.combine(rows.double(), None, token_slot), oracle.combine(rows, None, token_slot)
    tolerance.close(ops.gather_backward(rows, token_slot), *ones, units=units(dtype, k), what="gather_backward")

    grad = laid_out(randn(T, H, seed=4, dtype=dtype), layout)
    grad_rows, grad_weights = ops.combine_backward(grad, rows, weights, *plan, [True, True])
    pair_weights = torch.ones(T * k, dtype=wide, device="cuda") if weights is None else weights.flatten()
    assert torch.equal(grad_rows[:n], (pair_weights[served, None] * grad[token].to(wide)).to(dtype))
    assert not grad_rows[n:].any() and grad_rows.dtype == dtype
    products = grad[token].double() * rows[:n].double()
    dots, bound = torch.zeros(2, T * k, dtype=torch.float64, device="cuda")
    dots[served], bound[served] = products.sum(dim=1), products.abs().sum(dim=1)
    error = (grad_weights.flatten().double() - dots).abs()
    assert grad_weights.dtype == wide and error.le(4 * torch.finfo(wide).eps * bound).all()
    assert not grad_weights[token_slot < 0].any()
    only_rows = ops.combine_backward(grad, rows, weights, *plan, [True, False])
    only_weights = ops.combine_backward(grad, rows, weights, *plan, [False, True])
    assert torch.equal(only_rows[0], grad_rows) and only_rows[1].numel() == 0
    assert torch.equal(only_weights[1], grad_weights) and only_weights[0].numel() == 0


def test_a_nan_gradient_stays_in_its_token():
    ids = torch.tensor([[0, -1], [1, 0], [-1, -1]], device="cuda")
    plan = ops.dispatch(ids, 2)[:3]
    rows = normal(6, 16, dtype=torch.float32, device="cuda")
    grad = torch.ones(3, 16, device="cuda")
    grad[0] = grad[2] = math.nan
    grad_rows, grad_weights = ops.combine_backward(grad, rows, torch.ones(3, 2, device="cuda"), *plan, [True, True])
    assert grad_weights.isnan().tolist() == [[True, False], [False, False], [False, False]]
    assert grad_rows.isnan().all(dim=1).tolist() == [True, False, False, False, False, False]


def test_more_than_2_to_the_31_elements():
    T, k, H = 40000, 8, 8192
    if torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("needs 24 GB of free GPU memory")
    x = torch.randn(T, H, device="cuda", dtype=torch.bfloat16)
    ids = torch.randint(0, 64, (T, k), device="cuda")
    plan = ops.dispatch(ids, 64)[:3]
    rows = ops.gather(x, *plan)
    assert rows.numel() > 2**31 and torch.equal(rows[-3:], x[(plan[0][-3:] // k).long()])
    weights = torch.full((T, k), 0.125, device="cuda")
    assert torch.equal(ops.combine(rows, weights, *plan), x)
    grad_rows, grad_weights = ops.combine_backward(x, rows, weights, *plan, [True, True])
    assert torch.equal(grad_rows[-3:], rows[-3:] * 0.125)
    assert torch.allclose(grad_weights, x.float().square().sum(dim=1, keepdim=True).expand(T, k), rtol=1e-5)


# --- losses -----------------------------------------------------------------------------------------------------------

LOSSES = pairwise.cover(
    {
        "S": (1, 0, 2, 7, 64),
        "L": (7, 0, 1, 129, 4096),
        "E": (8, 1, 60, 257, 1024),
        "K": (2, 1, 8),
        "dtype": DTYPES,
        "counts": (torch.int64, torch.float32, torch.float64),
        "ids": (torch.int64, torch.int32),
        "padding": ("none", "some", "all"),
    },
    lambda c: c["K"] <= c["E"] and c["S"] * c["L"] * c["E"] <= 2e7,
)


@pytest.mark.parametrize("case", LOSSES, ids=pairwise.name)
def test_losses(case):
    S, L, E, k, dtype = case["S"], case["L"], case["E"], case["K"], case["dtype"]
    wide = oracle.wide(dtype)
    padding = None
    if case["padding"] != "none":
        padding = torch.arange(S * L, device="cuda").view(S, L) % 3 == 1
        padding |= case["padding"] == "all"
    live = torch.ones(S, L, dtype=torch.bool, device="cuda") if padding is None else ~padding

    ids = distributions.ids("dropped", S * L, E, k)[0].to("cuda", case["ids"]).view(S, L, k)
    counts = ops.expert_counts(ids, E, padding)
    hits = torch.zeros(S, E + 1, dtype=torch.int64, device="cuda")
    bins = (torch.where(live[..., None], ids.long(), -1) + 1).view(S, L * k)
    hits.scatter_add_(1, bins, torch.ones_like(bins))
    assert torch.equal(counts, hits[:, 1:])

    counts = counts.to(case["counts"])
    scores = randn(S, L, E, seed=1, dtype=dtype).abs()
    if padding is not None:
        scores[padding] = math.nan
    got = ops.balance_loss(scores, counts, 0.3, padding)
    truth, eager = (oracle.balance_loss(scores.to(d), counts, 0.3, padding) for d in (torch.float64, wide))
    assert got.shape == () and got.dtype == wide
    tolerance.close(got, truth, eager, units=units(dtype), what="balance loss")
    cotangent = torch.tensor(1.7, dtype=wide, device="cuda")
    grad = ops.balance_loss_backward(cotangent, scores, counts, 0.3, padding)
    expected = torch.where(live[..., None], 0.3 * cotangent.double() * counts.double()[:, None, :], 0.0)
    tolerance.close(grad, expected, what="gradient of scores")

    cotangent *= max(S * L, 1)  # as a loss scale would, so that float16 can hold the gradients
    logits, mask = 3 * randn(S * L, E, seed=2, dtype=dtype), None
    if padding is not None:
        mask = padding.view(-1)
        logits[mask] = math.nan
    got = ops.z_loss(logits, 0.3, mask)
    pair = []
    for kind in (torch.float64, wide):
        x = logits.to(kind).requires_grad_()
        loss = oracle.z_loss(x, 0.3, mask)
        pair.append((loss.detach(), torch.autograd.grad(loss, x, cotangent.to(kind))[0]))
    tolerance.close(got, pair[0][0], pair[1][0], units=units(dtype), what="z-loss")
    grad = ops.z_loss_backward(cotangent, logits, 0.3, mask)
    if live.any():
        truth, eager = pair[0][1], pair[1][1].to(dtype)
        tolerance.close(grad, truth, eager, factor=tolerance.BACKWARD, units=units(dtype), what="gradient of logits")
    else:
        assert not grad.any()


@pytest.mark.parametrize("zero_mean", [False, True])
@pytest.mark.parametrize("counts_type", [torch.int64, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("E", [1, 8, 257, 1024])
def test_update_expert_bias(E, dtype, counts_type, zero_mean):
    counts = torch.randint(0, 9, (E,), device="cuda").to(counts_type)
    bias = normal(E, dtype=dtype, device="cuda")
    step = 1e-3 * torch.sign(counts.double().mean() - counts.double())
    truth = bias.double() + (step - step.mean() if zero_mean else step)
    view = torch.zeros(2 * E, dtype=dtype, device="cuda")[::2]
    view.copy_(bias)
    for b in (bias, view):
        ops.update_expert_bias(b, counts, 1e-3, zero_mean)
        tolerance.close(b, truth, what="expert_bias")
