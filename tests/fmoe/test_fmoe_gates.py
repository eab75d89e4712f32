"""Every gate against its formulas: ids, scores, loss, and the gradients of input and weights."""

import copy
import math

import fmoe_reference as reference
import pytest
import torch
import torch.nn.functional as F

from fastmoe_cpp.fmoe.gates import (
    DCGate,
    FasterGate,
    GShardGate,
    NaiveGate,
    NoisyGate,
    SwipeGate,
    SwitchGate,
    ZeroGate,
    gen_faster_gate,
)

D, E, T = 12, 6, 40


def tokens(dtype=torch.float64, count=T):
    return (torch.randn(count, D, dtype=torch.float64) * 2).to(dtype).requires_grad_()


def logits(gate, x):
    return F.linear(x, gate.gate.weight, gate.gate.bias)


def check(gate, x, actual, expected, loss):
    """The same ids, and the same scores, loss and gradients of both."""
    ids, scores = actual
    assert torch.equal(ids, expected[0]) and ids.dtype == torch.int64
    torch.testing.assert_close(scores, expected[1], rtol=1e-11, atol=1e-13)
    weights = torch.linspace(-1, 2, scores.numel(), dtype=scores.dtype).reshape(scores.shape)
    wanted = [x, *gate.parameters()]
    total, reference_total = (scores * weights).sum(), (expected[1] * weights).sum()
    if loss is not None:
        actual_loss = gate.get_loss(clear=False)
        torch.testing.assert_close(actual_loss, loss, rtol=1e-11, atol=1e-13)
        assert gate.has_loss and gate.get_loss() is actual_loss and not gate.has_loss
        total, reference_total = total + 3 * actual_loss, reference_total + 3 * loss
        alone = torch.autograd.grad(actual_loss, wanted[1:], retain_graph=True, allow_unused=True)
        assert any(g is not None and g.abs().max() > 0 for g in alone)
    ours = torch.autograd.grad(total, wanted, allow_unused=True)
    theirs = torch.autograd.grad(reference_total, wanted, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=float(b.abs().max()) * 1e-11 + 1e-14)


@pytest.mark.parametrize("k", [1, 2, E])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.filterwarnings("ignore:NaiveGate")
def test_naive(k, bias):
    gate, x = NaiveGate(D, 3, 2, k, gate_bias=bias).double(), tokens()
    assert gate.gate.weight.shape == (E, D) and (gate.gate.bias is None) == (not bias)
    check(gate, x, gate(x), reference.naive(logits(gate, x), k), None)
    assert torch.equal(gate.get_loss(), torch.zeros(1))
    ids, scores, all_scores = gate(x, return_all_scores=True)
    torch.testing.assert_close(all_scores, logits(gate, x))


def test_top_1_warns_that_the_gate_does_not_learn():
    with pytest.warns(UserWarning, match="top_k is 1, so every score is 1 and the gate gets no gradient"):
        NaiveGate(D, E, 1, 1)


def test_naive_in_16_bits_routes_in_float32():
    gate, x = NaiveGate(D, E, 1).bfloat16(), tokens(torch.bfloat16)
    ids, scores = gate(x)
    exact = reference.naive(logits(copy.deepcopy(gate).float(), x.float()), 2)
    assert torch.equal(ids, exact[0]) and scores.dtype == torch.bfloat16
    assert torch.equal(scores, exact[1].bfloat16())


def test_ties_go_to_the_lower_id_and_nan_is_last():
    gate = NaiveGate(D, E, 1)
    torch.nn.init.zeros_(gate.gate.weight)
    with torch.no_grad():
        gate.gate.bias.copy_(torch.tensor([0.0, 1, math.nan, 1, 0, 0]))
    ids, _ = gate(torch.randn(3, D))
    assert ids.tolist() == [[1, 3]] * 3


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("random_routing", [True, False])
@pytest.mark.parametrize("cls", [GShardGate, DCGate])
def test_gshard_and_dc(cls, training, random_routing):
    rates = (0.9, 0.2)
    gate = cls(D, E, 1, capacity=rates, random_routing=random_routing).double().train(training)
    x = tokens()
    torch.manual_seed(5)
    actual = gate(x)
    torch.manual_seed(5)
    drawn = torch.rand(T) if random_routing else None
    capacity = math.ceil(rates[0 if training else 1] * T)
    if cls is GShardGate:
        capacity = capacity * 2 // E
    expected = reference.gshard(logits(gate, x), E, [capacity] * E, drawn)
    dropped = (expected[0] < 0).sum()
    assert (0 < dropped < 2 * T) or not (random_routing or cls is GShardGate)
    check(gate, x, actual, expected, expected[2])


def test_gshard_loss_of_an_even_router():
    gate = GShardGate(D, E, 1)
    torch.nn.init.zeros_(gate.gate.weight)
    torch.nn.init.zeros_(gate.gate.bias)
    gate(torch.randn(T, D))
    # every token's first choice is expert 0, every probability 1 / E: mean of (1, 0 ..) / E, times E^2
    torch.testing.assert_close(gate.get_loss(), torch.tensor(1.0))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rates", [(1.2, 2.4), (0.3, 0.5)])
def test_switch(training, rates):
    gate, x = SwitchGate(D, E, 1, capacity=rates).double().train(training), tokens()
    torch.manual_seed(6)
    actual = gate(x)
    torch.manual_seed(6)
    noise = torch.rand(T, E, dtype=torch.float64) * 0.2 + 0.9 if training else 0.0
    capacity = math.ceil(rates[0 if training else 1] * T / E)
    expected = reference.switch(logits(gate, x) + noise, [capacity] * E)
    check(gate, x, actual, expected, expected[2])


def test_switch_drops_everything_at_capacity_0():
    gate = SwitchGate(D, E, 1, capacity=(0, 0))
    ids, _ = gate(torch.randn(T, D))
    assert (ids == -1).all() and gate.get_loss() == 0


@pytest.mark.parametrize("k", [1, 2, 3])
def test_noisy_in_training(k):
    gate, x = NoisyGate(D, E, 1, k).double(), tokens()
    with torch.no_grad():
        gate.w_gate.mul_(3)
    torch.manual_seed(7)
    actual = gate(x)
    torch.manual_seed(7)
    noise = torch.randn(T, E, dtype=torch.float64)
    deviation = F.softplus(x @ gate.w_noise) + 1e-2
    expected = reference.noisy(x @ gate.w_gate, deviation, noise, k)
    check(gate, x, actual, expected, expected[2])


@pytest.mark.parametrize("k", [2, E])
def test_noisy_in_evaluation_counts_tokens(k):
    gate, x = NoisyGate(D, E, 1, k).double().eval(), tokens()
    ids, scores = expected = reference.naive(x @ gate.w_gate, k)
    importance = torch.stack([(scores * (ids == e)).sum() for e in range(E)])
    load = torch.bincount(ids.flatten(), minlength=E).double()
    loss = reference.cv_squared(importance) + reference.cv_squared(load)
    check(gate, x, gate(x), expected, loss)


def test_noisy_of_one_expert():
    gate = NoisyGate(D, 1, 1, 1)
    ids, scores = gate(tokens(torch.float32))
    assert gate.get_loss() == 0 and (ids == 0).all() and (scores == 1).all()


@pytest.mark.parametrize("k", [1, 3])
def test_zero(k):
    gate = ZeroGate(D, E, 1, k)
    ids, scores = gate(torch.randn(T, D))
    assert torch.equal(ids, torch.zeros(T, k, dtype=torch.int64)) and torch.equal(scores, torch.full((T, k), 1 / k))
    assert not gate.has_loss


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:NaiveGate")
def test_swipe_on_one_process_is_top_k(training):
    gate, x = SwipeGate(D, E, 1, 3).double().train(training), tokens()
    check(gate, x, gate(x), reference.naive(logits(gate, x), 3), None)
    assert gate.get_loss() is None


@pytest.mark.parametrize("fraction", ["0", "0.14", "0.3", "1"])
@pytest.mark.parametrize("node", [0, 1])
def test_faster(monkeypatch, fraction, node):
    monkeypatch.setenv("FMOE_TOPO_GPUS_PER_NODE", "2")
    monkeypatch.setenv("FMOE_TOPO_OUTGOING_FRACTION", fraction)
    gate, x = FasterGate(D, 2, 4, node).double(), tokens()
    scores = logits(gate, x)
    outside = torch.arange(8) // 4 != node
    expected = reference.faster(scores, outside, int(T * float(fraction)))
    assert not torch.equal(expected[0], reference.naive(scores, 2)[0]) or fraction == "1"
    check(gate, x, gate(x), expected, reference.gshard_loss(scores, 2))


def test_faster_without_other_nodes_is_top_2():
    gate, x = gen_faster_gate(3)(D, E, 1).double(), tokens()
    check(gate, x, gate(x), reference.naive(logits(gate, x), 2), reference.gshard_loss(logits(gate, x), E))


@pytest.mark.parametrize("cls", [NaiveGate, NoisyGate, GShardGate, DCGate, SwitchGate, SwipeGate, ZeroGate])
def test_no_tokens(cls):
    gate = cls(D, E, 1, 1 if cls is SwitchGate else 2)
    ids, scores = gate(torch.randn(0, D))
    assert ids.shape == scores.shape == (0, 1 if cls is SwitchGate else 2)
    if gate.has_loss and cls is not NoisyGate:
        assert gate.get_loss() == 0


def test_a_gate_with_a_loss_is_copied_without_it():
    gate = GShardGate(D, E, 1)
    gate(tokens(torch.float32))
    assert not copy.deepcopy(gate).has_loss and gate.has_loss


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: NaiveGate(D, 2, 2, 5), "top_k must be an integer between 1 and world_size . num_expert = 4, got 5"),
        (lambda: NoisyGate(D, 2, 2, 0), "top_k must be an integer between 1 and .* got 0"),
        (lambda: GShardGate(D, 2, 2, 3), "GShardGate: topk must be 2, got 3"),
        (lambda: DCGate(D, 2, 2, 1), "DCGate: topk must be 2, got 1"),
        (lambda: SwitchGate(D, 2, 2, 2), "SwitchGate: topk must be 1, got 2"),
        (lambda: SwitchGate(D, 2, 2, capacity=1.2), "capacity must be two numbers .* got 1.2"),
        (lambda: gen_faster_gate(0)(D, 2, 2, 3), "top_k must be 2, got 3"),
        (lambda: FasterGate(D, 2, 1, 7), "node 7 must hold at least 2 of the 2 experts"),
        (lambda: NaiveGate(D, 0, 2), "num_expert must be an integer of at least 1, got 0"),
        (lambda: NaiveGate(D, E, 1)(torch.randn(3, D + 1)), r"must have shape \[T, 12\], got \[3, 13\]"),
    ],
)
def test_refused_in_one_sentence(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_a_dict_is_refused_by_the_gate():
    with pytest.raises(TypeError, match="NaiveGate takes one tensor .* got dict"):
        NaiveGate(D, E, 1)({"x": torch.randn(3, D)})


@pytest.mark.parametrize("name", ["FMOE_TOPO_GPUS_PER_NODE", "FMOE_TOPO_OUTGOING_FRACTION"])
def test_faster_names_a_bad_variable(monkeypatch, name):
    monkeypatch.setenv(name, "many")
    with pytest.raises(ValueError, match=f"{name} must be a number of at least .* got 'many'"):
        FasterGate(D, E, 1, 0)
