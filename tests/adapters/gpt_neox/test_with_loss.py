"""MoEWithLoss against the formulas in plain torch: gates of one and two, capacity, the dense MLP beside, the loss."""

import math
import types

import pytest
import torch
import torch.nn.functional as F

from megatron_adapters import gpt_neox

from .small import ParallelMLP

HIDDEN, EXPERTS, TOKENS = 8, 4, 24


def layer_of(**changes):
    expert = ParallelMLP(types.SimpleNamespace(activation="gelu", bias_gelu_fusion=False, hidden_size=HIDDEN))
    options = {"num_experts": EXPERTS, "k": 1, "capacity_factor": 1.0, "eval_capacity_factor": 2.0, "min_capacity": 2}
    layer = gpt_neox.MoEWithLoss(HIDDEN, expert, **options | changes)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.5)
    return layer


def mlp(expert, rows):
    inner = F.gelu(F.linear(rows, expert.dense_h_to_4h.weight, expert.dense_h_to_4h.bias))
    return F.linear(inner, expert.dense_4h_to_h.weight, expert.dense_4h_to_h.bias)


def reference(layer, x, ids, capacity, by_position=True):
    """Output and loss with experts already chosen; who comes first stays, all first choices before any second one."""
    rows = x.reshape(-1, HIDDEN)
    scores = (rows @ layer.deepspeed_moe.gate.wg.weight.t()).softmax(-1)
    kept, taken = torch.zeros_like(ids, dtype=torch.bool), [0] * EXPERTS
    for k in range(ids.shape[1]):
        for t in range(ids.shape[0]):
            e = ids[t, k].item()
            if capacity is None or taken[e] < capacity:
                kept[t, k], taken[e] = True, taken[e] + 1
    weights = scores.gather(1, ids) * kept
    if layer.k == 2:
        weights = weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).eps)
    output = torch.zeros_like(rows)
    for e, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
        output = output + (weights * (ids == e)).sum(1, keepdim=True) * mlp(expert, rows)
    share = F.one_hot(ids[:, 0], EXPERTS).float().mean(0)
    output = output.reshape(x.shape)
    if layer.use_residual:
        mix = F.linear(x, layer.coefficient.weight, layer.coefficient.bias).softmax(-1)
        output = output * mix[..., :1] + mlp(layer.mlp, x) * mix[..., 1:]
    return output, EXPERTS * (share * scores.mean(0)).sum(), taken


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("k", [1, 2])
def test_formulas(k, training, drop, residual):
    layer = layer_of(k=k, drop_tokens=drop, use_residual=residual, use_rts=False).train(training)
    x = torch.randn(4, TOKENS // 4, HIDDEN, requires_grad=True)
    torch.manual_seed(3)
    ids = layer.route(x.reshape(-1, HIDDEN)).topk_ids
    logits = x.detach().reshape(-1, HIDDEN) @ layer.deepspeed_moe.gate.wg.weight.t()
    assert torch.equal(ids[:, 0], logits.argmax(1))
    if k == 2 and not training:
        assert torch.equal(ids, logits.topk(2, dim=1).indices)
    torch.manual_seed(3)
    output, moe_loss, counts = layer(x)
    assert torch.equal(counts, ids[:, 0].bincount(minlength=EXPERTS))
    factor = 1.0 if training else 2.0
    capacity = max(math.ceil(k * factor * TOKENS / EXPERTS), 2) if drop else None
    assert layer.capacity(TOKENS) == capacity
    expected, expected_loss, taken = reference(layer, x, ids, capacity)
    if drop and training:
        assert max(taken) == capacity  # something was dropped
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moe_loss, expected_loss.detach())
    assert moe_loss.shape == () and not moe_loss.requires_grad
    parameters = list(layer.parameters())
    wanted = torch.autograd.grad(expected.sin().sum(), [x, *parameters], allow_unused=True)
    found = torch.autograd.grad(output.sin().sum(), [x, *parameters], allow_unused=True)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


def test_the_loss_is_trained_on_once_and_scaled():
    layer = layer_of(drop_tokens=False)
    x = torch.randn(TOKENS, HIDDEN)
    weight = layer.deepspeed_moe.gate.wg.weight
    (wanted,) = torch.autograd.grad(reference(layer, x, layer.route(x).topk_ids, None)[1], weight)
    for coefficient, scale in ((0.0, 1.0), (0.1, 1.0), (0.1, 8.0)):
        layer.loss_coefficient = coefficient
        gpt_neox.with_loss.loss_scale(x.device).fill_(scale)
        (found,) = torch.autograd.grad(layer(x)[0].sum() * 0, weight)
        torch.testing.assert_close(found, coefficient * scale * wanted, rtol=1e-5, atol=1e-7)
    gpt_neox.with_loss.loss_scale(x.device).fill_(1.0)
    layer.eval()
    (found,) = torch.autograd.grad(layer(x)[0].sum() * 0, weight)
    assert not found.any()


def test_random_token_selection():
    """Who stays is drawn, in training; the expert is full all the same, and evaluation keeps the first."""
    layer = layer_of()
    x = torch.randn(1, HIDDEN).repeat(TOKENS, 1)  # all to one expert, whose capacity is TOKENS / EXPERTS
    kept = [layer(x)[0].abs().sum(1) > 0 for _ in range(4)]
    assert all(k.sum() == TOKENS // EXPERTS for k in kept)
    assert any(not torch.equal(kept[0], k) for k in kept[1:])
    layer.eval()
    assert torch.equal(layer(x)[0].abs().sum(1) > 0, torch.arange(TOKENS) < 2 * TOKENS // EXPERTS)


def test_the_second_expert_is_sampled_by_its_share():
    layer = layer_of(k=2)
    with torch.no_grad():
        layer.deepspeed_moe.gate.wg.weight.zero_()
        layer.deepspeed_moe.gate.wg.weight[:, 0] = torch.tensor([2.0, 1.0, 0.0, 1.0])
    rows = torch.zeros(4000, HIDDEN)
    rows[:, 0] = 1
    second = layer.route(rows).topk_ids[:, 1].bincount(minlength=EXPERTS) / 4000
    expected = torch.tensor([-math.inf, 1.0, 0.0, 1.0]).softmax(0)
    torch.testing.assert_close(second, expected, rtol=0, atol=0.03)


def test_parameters():
    names = {name: tuple(p.shape) for name, p in layer_of(use_residual=True).state_dict().items()}
    expected = {"deepspeed_moe.gate.wg.weight": (EXPERTS, HIDDEN), "coefficient.weight": (2, HIDDEN),
                "coefficient.bias": (2,)}  # fmt: skip
    for place in ("mlp", *(f"deepspeed_moe.experts.deepspeed_experts.{i}" for i in range(EXPERTS))):
        expected |= {
            f"{place}.dense_h_to_4h.weight": (4 * HIDDEN, HIDDEN), f"{place}.dense_h_to_4h.bias": (4 * HIDDEN,),
            f"{place}.dense_4h_to_h.weight": (HIDDEN, 4 * HIDDEN), f"{place}.dense_4h_to_h.bias": (HIDDEN,),
        }  # fmt: skip
    assert names == expected


@pytest.mark.parametrize(
    "changes, message",
    [({"ep_size": 2}, "ep_size is not honoured"), ({"k": 3}, "k is not honoured"),
     ({"use_tutel": True}, "use_tutel is not honoured"), ({"noisy_gate_policy": "Jitter"}, "noisy_gate_policy"),
     ({"num_experts": 1, "k": 2}, "k must be between 1 and num_experts = 1")],
)  # fmt: skip
def test_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        layer_of(**changes)


def test_bad_input():
    with pytest.raises(ValueError, match=r"x must have shape \[\.\.\., 8\], got \[2, 3\]"):
        layer_of()(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="used_token must be None"):
        layer_of()(torch.zeros(2, HIDDEN), torch.ones(2))
    output, moe_loss, counts = layer_of(k=2)(torch.zeros(0, HIDDEN))
    assert output.shape == (0, HIDDEN) and moe_loss == 0 and counts.sum() == 0
