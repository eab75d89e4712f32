"""expert_counts, balance_loss, z_loss and update_expert_bias against the oracle."""

import pytest
import torch
from support import distributions, matrix, oracle, pairwise, tolerance
from support.samples import DTYPES, LAYOUTS, laid_out, normal, ops

SEQUENCES = (1, 0, 2, 5)
LENGTHS = (1, 0, 7, 128, 129, 1000)
PADDING = ("none", "some", "all", "nobody")


def padding_of(kind, *shape):
    g = torch.Generator().manual_seed(13)
    return {
        "none": None,
        "some": torch.rand(*shape, generator=g) < 0.4,
        "all": torch.ones(*shape, dtype=torch.bool),
        "nobody": torch.zeros(*shape, dtype=torch.bool),
    }[kind]


@pytest.mark.parametrize(
    "case",
    pairwise.cover(
        {
            "S": SEQUENCES,
            "L": LENGTHS,
            "K": (1, 2, 8),
            "E": (*matrix.EXPERTS, 1024),
            "ids": (torch.int64, torch.int32),
            "kind": distributions.NAMES,
            "padding": PADDING,
            "layout": LAYOUTS,
        },
        lambda c: c["K"] <= c["E"] and c["S"] * c["L"] * c["E"] <= 5e5,
    ),
    ids=pairwise.name,
)
def test_expert_counts(case, device):
    shape = (case["S"], case["L"])
    ids = distributions.ids(case["kind"], shape[0] * shape[1], case["E"], case["K"])[0].reshape(*shape, case["K"])
    padding = padding_of(case["padding"], *shape)
    given = laid_out(ids.to(device=device, dtype=case["ids"]), case["layout"])
    out = ops.expert_counts(given, case["E"], None if padding is None else padding.to(device))
    assert out.dtype == torch.int64
    assert torch.equal(out.cpu(), oracle.expert_counts(ids, case["E"], padding))


@pytest.mark.parametrize(
    "case",
    pairwise.cover(
        {
            "S": SEQUENCES,
            "L": LENGTHS,
            "E": (*matrix.EXPERTS, 1024),
            "dtype": DTYPES,
            "counts": (torch.int64, torch.float32, torch.float64),
            "scale": (1.0, 1e-3, -2.0),
            "padding": PADDING,
            "layout": LAYOUTS,
        },
        lambda c: c["S"] * c["L"] * c["E"] <= 2e6,
    ),
    ids=pairwise.name,
)
def test_balance_loss(case, device):
    shape, dtype = (case["S"], case["L"], case["E"]), case["dtype"]
    scores = torch.softmax(normal(*shape, seed=1), dim=-1).to(device=device, dtype=dtype)
    counts = torch.randint(0, 50, (case["S"], case["E"]), generator=torch.Generator().manual_seed(2))
    counts = (
        counts.to(device=device, dtype=case["counts"])
        if case["counts"] == torch.int64
        else (counts.to(device=device, dtype=case["counts"]) / 7)
    )
    padding = padding_of(case["padding"], *shape[:2])
    padding = None if padding is None else padding.to(device)
    leaf = laid_out(scores, case["layout"]).detach().requires_grad_()
    loss = ops.balance_loss(leaf, counts, case["scale"], padding)
    assert loss.shape == () and loss.dtype == oracle.wide(dtype)
    exact, plain = scores.double().requires_grad_(), scores.to(loss.dtype).requires_grad_()
    truth = oracle.balance_loss(exact, counts.double(), case["scale"], padding)
    eager = oracle.balance_loss(plain, counts, case["scale"], padding)
    # positive terms: one long sum in float32
    tolerance.close(loss, truth, eager, units=32)
    cotangent = torch.tensor(0.7, dtype=loss.dtype, device=device)
    grads = [
        torch.autograd.grad(a, b, cotangent.to(a.dtype))[0] for a, b in ((loss, leaf), (truth, exact), (eager, plain))
    ]
    assert grads[0].dtype == dtype
    tolerance.close(grads[0], grads[1], grads[2].to(dtype), factor=tolerance.BACKWARD)
    if padding is not None:
        assert (grads[0][padding] == 0).all()


def test_balance_loss_gives_counts_no_gradient(device):
    counts = torch.ones(1, 3, device=device, requires_grad=True)
    scores = torch.rand(1, 4, 3, device=device, requires_grad=True)
    loss = ops.balance_loss(scores, counts, 1.0)
    assert torch.autograd.grad(loss, [scores, counts], allow_unused=True)[1] is None


def test_balance_loss_skips_padding_that_is_nan(device):
    scores = torch.rand(2, 4, 3, device=device)
    padding = torch.tensor([[False, True, False, True], [True, False, False, False]], device=device)
    clean = ops.balance_loss(scores, torch.ones(2, 3, device=device), 1.0, padding)
    poisoned = scores.masked_fill(padding[..., None], float("nan")).requires_grad_()
    loss = ops.balance_loss(poisoned, torch.ones(2, 3, device=device), 1.0, padding)
    assert torch.equal(loss, clean)
    (grad,) = torch.autograd.grad(loss, poisoned)
    assert (grad[padding] == 0).all() and grad.isfinite().all()


@pytest.mark.parametrize(
    "case",
    pairwise.cover(
        {
            "T": matrix.TOKENS,
            "E": (*matrix.EXPERTS, 1024),
            "dtype": DTYPES,
            "scale": (1.0, 1e-3, -2.0),
            "padding": PADDING,
            "layout": LAYOUTS,
        },
        lambda c: c["T"] * c["E"] <= 3e6,
    ),
    ids=pairwise.name,
)
def test_z_loss(case, device):
    tokens, dtype = case["T"], case["dtype"]
    logits = normal(tokens, case["E"], seed=1, std=2.0, dtype=dtype, device=device)
    padding = padding_of(case["padding"], tokens)
    padding = None if padding is None else padding.to(device)
    leaf = laid_out(logits, case["layout"]).detach().requires_grad_()
    loss = ops.z_loss(leaf, case["scale"], padding)
    assert loss.shape == () and loss.dtype == oracle.wide(dtype)
    exact, plain = logits.double().requires_grad_(), logits.to(loss.dtype).requires_grad_()
    truth = oracle.z_loss(exact, case["scale"], padding)
    eager = oracle.z_loss(plain, case["scale"], padding)
    tolerance.close(loss, truth, eager, units=32)
    if tokens == 0 or case["padding"] == "all":
        assert loss == 0
    cotangent = torch.tensor(0.7, dtype=loss.dtype, device=device)
    grads = [
        torch.autograd.grad(a, b, cotangent.to(a.dtype))[0] for a, b in ((loss, leaf), (truth, exact), (eager, plain))
    ]
    assert grads[0].dtype == dtype
    tolerance.close(grads[0], grads[1], grads[2].to(dtype), factor=tolerance.BACKWARD, units=8)


def test_z_loss_of_extreme_and_padded_nan_logits(device):
    logits = torch.tensor([[1e4, 0.0], [-1e4, -1e4], [float("nan"), 1.0]], device=device, requires_grad=True)
    padding = torch.tensor([False, False, True], device=device)
    loss = ops.z_loss(logits, 1.0, padding)
    torch.testing.assert_close(loss.item(), 1e8, rtol=1e-4, atol=0)
    (grad,) = torch.autograd.grad(loss, logits)
    assert grad.isfinite().all() and (grad[2] == 0).all()


@pytest.mark.parametrize("zero_mean", [False, True])
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("counts_dtype", [torch.int64, torch.float32, torch.float64])
@pytest.mark.parametrize("experts", [1, 2, 8, 60, 257, 1024])
def test_update_expert_bias(experts, counts_dtype, bias_dtype, zero_mean, device):
    bias = normal(experts, seed=1, dtype=bias_dtype, device=device)
    counts = torch.randint(0, 5, (experts,), generator=torch.Generator().manual_seed(2)).to(device, counts_dtype)
    expected = oracle.update_expert_bias(bias, counts, 1e-2, zero_mean)
    version = bias._version
    assert ops.update_expert_bias(bias, counts, 1e-2, zero_mean) is None
    assert bias._version > version
    tolerance.close(bias, expected, units=16)


def test_update_expert_bias_moves_against_the_load(device):
    """Overloaded down, underloaded up, exactly the mean not at all; and it writes through strides."""
    storage = torch.zeros(8, device=device)
    ops.update_expert_bias(storage[::2], torch.tensor([4, 0, 2, 2], device=device), 0.5)
    assert storage.tolist() == [-0.5, 0, 0.5, 0, 0, 0, 0, 0]
    leaf = torch.zeros(4, device=device, requires_grad=True)
    with pytest.raises(ValueError, match="^expert_bias must not require a gradient"):
        ops.update_expert_bias(leaf, torch.tensor([4, 0, 2, 2], device=device), 0.5)
