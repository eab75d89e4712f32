"""The forms of the balance loss against their definitions, and their way to the router's gradient."""

import pytest
import torch

from fastmoe_cpp import losses
from modules.cases import EXPERTS, HIDDEN, TOP_K, config, make

FORMS = ("switch", "huggingface", "batch", "sequence", "global")


def by_definition(form, probs, ids, mask):
    """Token by token: E * sum over experts of share * mean probability, over tokens that are not padding."""
    sequences = range(probs.shape[0]) if form == "sequence" else [slice(None)]
    total = 0.0
    for s in sequences:
        p, i = probs[s].reshape(-1, EXPERTS), ids[s].reshape(-1, TOP_K)
        real = ~mask[s].reshape(-1)
        p, i = p[real], i[real]
        if form == "switch":
            i = i[:, :1]
        n = len(p)
        if n == 0:
            continue
        for e in range(EXPERTS):
            choices = int((i == e).sum())
            share = choices / n if form in ("switch", "huggingface") else choices / (n * TOP_K)
            total += EXPERTS * share * float(p[:, e].sum()) / n
    return total / (len(probs) if form == "sequence" else 1)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_forms(form, padded, device):
    probs = torch.randn(3, 11, EXPERTS, device=device, dtype=torch.float64).softmax(-1).requires_grad_()
    ids = probs.topk(TOP_K).indices
    mask = torch.zeros(3, 11, dtype=torch.bool, device=device)
    if padded:
        mask = torch.rand(3, 11, device=device) < 0.4
        mask[1] = True
    loss = losses.balance_loss(probs, ids, form, padding_mask=mask if padded else None)
    assert loss.item() == pytest.approx(by_definition(form, probs.detach(), ids, mask), rel=1e-12)
    grad = torch.autograd.grad(loss, probs)[0]
    # linear in the probabilities
    assert (grad * probs).sum().item() == pytest.approx(loss.item(), rel=1e-12)
    assert (grad[mask] == 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_an_even_router_costs_one_and_one_expert_costs_all(form, device):
    even = torch.full((EXPERTS, EXPERTS), 1 / EXPERTS, device=device, dtype=torch.float64)
    ids = (torch.arange(EXPERTS, device=device)[:, None] + torch.arange(TOP_K, device=device)) % EXPERTS
    assert losses.balance_loss(even, ids, form).item() == pytest.approx(TOP_K if form == "huggingface" else 1)
    collapsed = torch.zeros(5, EXPERTS, device=device, dtype=torch.float64)
    collapsed[:, 2] = 1
    loss = losses.balance_loss(collapsed, torch.full((5, 1), 2, device=device), form)
    assert loss.item() == pytest.approx(EXPERTS)


@pytest.mark.parametrize("form", FORMS)
def test_no_tokens_cost_nothing(form, device):
    for shape in ((0,), (0, 4), (3, 0)):
        probs = torch.zeros(*shape, EXPERTS, device=device, requires_grad=True)
        loss = losses.balance_loss(probs, torch.zeros(*shape, TOP_K, device=device, dtype=torch.long), form)
        assert loss.item() == 0
        loss.backward()
        assert probs.grad.shape == probs.shape


def test_global_counts_come_from_elsewhere(device):
    probs = torch.rand(6, EXPERTS, device=device, dtype=torch.float64)
    counts = torch.randint(1, 9, (EXPERTS,), device=device)
    ids = torch.zeros(6, TOP_K, dtype=torch.long, device=device)
    loss = losses.balance_loss(probs, ids, "global", global_counts=counts)
    expected = EXPERTS * (counts / counts.sum() * probs.mean(0)).sum()
    torch.testing.assert_close(loss, expected)


def test_what_is_refused():
    probs, ids = torch.rand(3, 4), torch.zeros(3, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="form must be one of 'switch', .*, got 'cv'"):
        losses.balance_loss(probs, ids, "cv")
    with pytest.raises(ValueError, match="global_counts must be None for the form 'batch', got a tensor"):
        losses.balance_loss(probs, ids, "batch", global_counts=torch.ones(4))
    with pytest.raises(ValueError, match="router_logits must hold the logits of at least one layer, got none"):
        losses.huggingface([], 4, 2)
    with pytest.raises(ValueError, match=r"router_logits must be \[B \* L, 4\], got \[3, 5\]"):
        losses.huggingface([torch.rand(3, 5)], 4, 2)


def test_z_loss(device):
    logits = torch.randn(9, EXPERTS, device=device, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(9, device=device) % 3 == 0
    expected = logits[~mask].exp().sum(-1).log().square().mean()
    loss = losses.z_loss(logits, mask)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (loss, expected)))


# --- the losses of a layer --------------------------------------------------------------------------------------------

ROUTERS = {
    "softmax": {},
    "after": {"scores_after_topk": True, "renormalize": False},
    "sigmoid": {"score_function": "sigmoid", "expert_bias": True},
    "sqrtsoftplus": {"score_function": "sqrtsoftplus"},
}


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("form", [*FORMS, "z"])
def test_the_auxiliary_loss_alone_trains_the_router(form, router, device):
    chosen = {"z_loss_coefficient": 0.5} if form == "z" else {"balance_loss": form, "balance_loss_coefficient": 0.5}
    layer = make(config(ROUTERS[router] | chosen), device)
    x = torch.randn(2, 16, HIDDEN, device=device, dtype=torch.float64, requires_grad=True)
    out = layer.forward_with_routing(x)
    out.aux_loss.backward()
    assert layer.router.weight.grad.norm() > 1e-4 and x.grad.norm() > 1e-4
    assert layer.experts.gate_up_proj.grad is None
    # along the gradient the loss falls
    with torch.no_grad():
        layer.router.weight -= 1e-3 * layer.router.weight.grad / layer.router.weight.grad.norm()
        if layer.router.tokens_per_expert is not None:
            layer.router.tokens_per_expert.zero_()
    again = layer.forward_with_routing(x)
    if torch.equal(again.topk_ids, out.topk_ids):
        assert again.aux_loss < out.aux_loss


def test_descent_on_the_balance_loss_evens_the_load(device):
    layer = make(config({"balance_loss_coefficient": 1.0}), device)
    x = torch.randn(256, HIDDEN, device=device, dtype=torch.float64) + 1
    optimizer = torch.optim.SGD(layer.router.parameters(), lr=0.2)
    first = None
    for _ in range(60):
        out = layer.forward_with_routing(x)
        first = first if first is not None else out.tokens_per_expert
        optimizer.zero_grad()
        out.aux_loss.backward()
        optimizer.step()
    assert out.tokens_per_expert.max() < 0.75 * first.max()
    assert out.balance_loss < 1.2


@pytest.mark.parametrize("form", FORMS)
def test_forward_adds_the_gradient_that_forward_with_routing_returns(form, device):
    router = {"balance_loss": form, "balance_loss_coefficient": 0.3, "z_loss_coefficient": 0.2}
    x = torch.randn(2, 8, HIDDEN, device=device, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(x)
    for scale in (1.0, 0.25, 0.0, torch.tensor(0.5, device=device)):
        torch.manual_seed(5)
        layer = make(config(router), device)
        out = layer.forward_with_routing(x)
        parameters = [x, *layer.parameters()]
        expected = torch.autograd.grad((out.hidden_states * grad).sum() + scale * out.aux_loss, parameters)
        layer.update_expert_bias()
        layer.aux_loss_scale = scale
        ours = torch.autograd.grad((layer(x) * grad).sum(), parameters)
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_evaluation_adds_no_gradient(device):
    layer = make(config({"balance_loss_coefficient": 10.0}), device).eval()
    x = torch.randn(8, HIDDEN, device=device, dtype=torch.float64)
    plain = make(config(), device)
    plain.load_state_dict(layer.state_dict())
    grads = [torch.autograd.grad(m(x).square().sum(), m.router.weight)[0] for m in (layer, plain)]
    assert torch.equal(*grads)


# --- invariances ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "router", [{"balance_loss": "sequence", "balance_loss_coefficient": 0.3, "z_loss_coefficient": 0.2}]
)
def test_micro_batches_of_whole_sequences_change_nothing(router, device):
    """The mean over micro-batches, as gradient accumulation takes it, is the loss of the batch."""
    layer = make(config(router), device)
    x = torch.randn(6, 5, HIDDEN, device=device, dtype=torch.float64)
    grad = torch.randn_like(x)
    whole = torch.autograd.grad((layer(x) * grad).sum() / 6, list(layer.parameters()))
    layer.aux_loss_scale = 1 / 6
    whole_scaled = torch.autograd.grad((layer(x) * grad).sum() / 6, list(layer.parameters()))
    assert not torch.allclose(whole[0], whole_scaled[0])
    for n in (2, 3, 6):
        layer.aux_loss_scale = 1 / n
        parts = [
            torch.autograd.grad((layer(xs) * gs).sum() / 6, list(layer.parameters()))
            for xs, gs in zip(x.chunk(n), grad.chunk(n), strict=True)
        ]
        for total, *pieces in zip(whole, *parts, strict=True):
            torch.testing.assert_close(sum(pieces), total)


def test_the_global_loss_counts_all_micro_batches(device):
    layer = make(config({"balance_loss": "global", "balance_loss_coefficient": 1.0}), device)
    x = torch.randn(30, HIDDEN, device=device, dtype=torch.float64)
    parts = [layer.forward_with_routing(piece) for piece in x.split(10)]
    counts = sum(p.tokens_per_expert for p in parts)
    assert torch.equal(layer.router.tokens_per_expert, counts)
    # the last one has seen them all
    share = counts / counts.sum()
    expected = EXPERTS * (share * parts[-1].router_scores.mean(0)).sum()
    torch.testing.assert_close(parts[-1].balance_loss, expected)
    layer.update_expert_bias()
    torch.testing.assert_close(layer.forward_with_routing(x[:10]).balance_loss, parts[0].balance_loss)
    # evaluation counts its own tokens and leaves the window alone
    window = layer.router.tokens_per_expert.clone()
    alone = layer.eval().forward_with_routing(x).balance_loss
    torch.testing.assert_close(alone, losses.balance_loss(
        layer.forward_with_routing(x).router_scores, layer.forward_with_routing(x).topk_ids, "batch"))  # fmt: skip
    assert torch.equal(layer.router.tokens_per_expert, window)


@pytest.mark.parametrize("form", [*FORMS, "z"])
def test_padding_is_as_if_it_were_not_there(form, device):
    chosen = {"z_loss_coefficient": 0.5} if form == "z" else {"balance_loss": form, "balance_loss_coefficient": 0.5}
    layer = make(config(chosen), device)
    x = torch.randn(1, 9, HIDDEN, device=device, dtype=torch.float64)
    padded = torch.cat([x, torch.randn(1, 6, HIDDEN, device=device, dtype=torch.float64)], dim=1)
    mask = torch.arange(15, device=device)[None] >= 9
    with_padding = layer.forward_with_routing(padded, mask)
    layer.update_expert_bias()
    without = layer.forward_with_routing(x)
    torch.testing.assert_close(with_padding.aux_loss, without.aux_loss)
    assert torch.equal(with_padding.tokens_per_expert, without.tokens_per_expert)


@pytest.mark.parametrize("shape", [(5, HIDDEN), (2, 3, HIDDEN)], ids=str)
def test_an_output_that_trains_losses_may_be_changed_in_place(shape, device):
    layer = make(config({"balance_loss_coefficient": 0.5, "z_loss_coefficient": 0.1}), device)
    x = torch.randn(shape, device=device, dtype=torch.float64)
    gradients = []
    for in_place in (True, False):
        y = layer(x)
        y = y.add_(x) if in_place else y + x
        gradients.append(torch.autograd.grad(y.square().sum(), list(layer.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_losses_train_where_every_token_is_dropped(device):
    layer = make(config({"balance_loss_coefficient": 0.5}, capacity_factor=0.0), device)
    x = torch.randn(6, HIDDEN, device=device, dtype=torch.float64)
    actual = torch.autograd.grad(layer(x).sum(), layer.router.weight)[0]
    expected = torch.autograd.grad(layer.forward_with_routing(x).aux_loss, layer.router.weight)[0]
    assert expected.abs().max() > 0 and torch.allclose(actual, expected, rtol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_probabilities_of_16_bits(dtype, form, device):
    probs = torch.rand(600, 4, device=device).softmax(-1).to(dtype)
    ids = torch.randint(0, 4, (600, 2), device=device)
    actual, expected = (losses.balance_loss(p, ids, form) for p in (probs, probs.double()))
    assert abs(actual.item() / expected.item() - 1) < 1e-5
