"""FMoE with experts, gates, masks and hooks of the user's own, against the sum over experts by its formula."""

import copy

import fmoe_reference as reference
import pytest
import torch
import torch.nn.functional as F
from fmoe_cases import D, E, H, T, assert_same, by_formula, gradients, make, tokens
from torch import nn

from fastmoe_cpp.fmoe import FMoE, FMoELinear, FMoETransformerMLP
from fastmoe_cpp.fmoe.gates import GShardGate, NaiveGate, NoisyGate, ZeroGate
from fastmoe_cpp.fmoe.layers import _fmoe_general_global_forward
from fastmoe_cpp.fmoe.linear import MOELinear
from fastmoe_cpp.fmoe.transformer import _Expert

# --- experts of the user's own ----------------------------------------------------------------------------------------


class OneArgument(nn.Module):
    def __init__(self, d_model):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(d_model, 2 * d_model), nn.Tanh(), nn.Linear(2 * d_model, d_model))

    def forward(self, x):
        return self.model(x)


class TwoArguments(nn.Module):
    def __init__(self, d_model):
        super().__init__()
        self.linear = nn.Linear(d_model, d_model)
        self.counts = []

    def forward(self, x, fwd_expert_count=None):
        assert fwd_expert_count.tolist() == [x.shape[0]]
        return self.linear(x).sin()


def alone(experts):
    return [lambda x, e=e: e(x, torch.tensor([x.shape[0]])) if isinstance(e, TwoArguments) else e(x) for e in experts]


@pytest.mark.parametrize(
    "expert", [OneArgument, TwoArguments, [OneArgument, TwoArguments, OneArgument], lambda d: nn.Linear(d, d)]
)
@pytest.mark.parametrize("top_k", [2, 3])
def test_any_expert(expert, top_k):
    layer = FMoE(4, D, expert=expert, top_k=top_k).double()
    assert layer.num_expert == len(layer.experts) == (3 if isinstance(expert, list) else 4)
    x = tokens()
    ids, scores = layer.gate(x)
    output, expected = layer(x), reference.moe(x, ids, scores, alone(layer.experts))
    assert_same(gradients(layer, x, output) | {"y": output}, gradients(layer, x, expected) | {"y": expected})


def test_an_expert_without_tokens_has_zero_gradients():
    layer = FMoE(3, D, expert=OneArgument, gate=ZeroGate).double()
    layer(tokens()).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    assert all(not p.grad.any() for e in layer.experts[1:] for p in e.parameters())


class Stacked(FMoE):
    """As FastMoE's own tests and older code do it: all experts in one module."""

    def __init__(self, activation=F.gelu, **kwargs):
        super().__init__(num_expert=E, d_model=D, **kwargs)
        self.experts = _Expert(E, D, H, activation)
        nn.init.normal_(self.experts.htoh4.weight)
        nn.init.normal_(self.experts.h4toh.weight)


@pytest.mark.parametrize("activation", [F.gelu, torch.tanh])
def test_experts_in_one_module(activation):
    layer, x = Stacked(activation).double(), tokens()
    output, expected = layer(x), by_formula(layer, x)
    assert_same(gradients(layer, x, output) | {"y": output}, gradients(layer, x, expected) | {"y": expected})


@pytest.mark.parametrize("training", [True, False])
def test_an_activation_with_dropout_as_transformer_xl_has_it(training):
    layer, x = make(activation=nn.Sequential(nn.ReLU(), nn.Dropout(0.5))).train(training), tokens()
    assert layer.experts.fused_activation() == (None if training else "relu")
    torch.manual_seed(1)
    output = layer(x)
    if training:
        # dropout draws anew: without it the output is another
        assert not torch.allclose(output, layer(x))
    layer.eval()
    expected = by_formula(layer, x)
    assert torch.allclose(output, expected) == (not training)
    seen = []
    layer.experts.activation[0].register_forward_hook(lambda module, args, y: seen.append(y))
    assert torch.allclose(layer(x), expected) and len(seen) == 1


def test_expert_fn_of_a_subclass_is_used():
    class Doubled(Stacked):
        def expert_fn(self, inp, fwd_expert_count):
            return 2 * super().expert_fn(inp, fwd_expert_count)

    layer, x = Doubled().double(), tokens()
    assert_same({"y": layer(x)}, {"y": 2 * by_formula(layer, x)})


class Pair(nn.Module):
    """Two tensors in, two out, of another width each."""

    def __init__(self, d_model):
        super().__init__()
        self.a, self.b = nn.Linear(d_model, d_model), nn.Linear(3, 4)

    def forward(self, inp, count):
        if isinstance(inp, list):
            return [self.a(inp[0]), self.b(inp[1]) + inp[0].sum(-1, keepdim=True)]
        return {"x": self.a(inp["x"]), "z": self.b(inp["y"])}


class FirstGate(NaiveGate):
    def forward(self, inp, return_all_scores=False):
        return super().forward(inp[0] if isinstance(inp, list) else inp["x"], return_all_scores)


@pytest.mark.parametrize("kind", [list, dict])
def test_trees(kind):
    layer = FMoE(E, D, expert=Pair, gate=FirstGate).double()
    x, y = tokens(), torch.randn(T, 3, dtype=torch.float64, requires_grad=True)
    inp = [x, y] if kind is list else {"x": x, "y": y}
    output = layer(inp)
    ids, scores = layer.gate(inp)
    for leaf in (0, 1):
        key = leaf if kind is list else "xz"[leaf]

        def expert(e, row, key=key):
            parts = [row[:, :D], row[:, D:]]
            return e(parts if kind is list else dict(zip("xy", parts, strict=True)), None)[key]

        both = torch.cat([x, y], dim=1)
        rows = [
            sum(scores[t, k] * expert(layer.experts[int(ids[t, k])], both[t : t + 1])[0] for k in range(2))
            for t in range(T)
        ]
        expected = torch.stack(rows)
        assert output[key].shape == (T, D if leaf == 0 else 4)
        assert_same(gradients(layer, x, output[key]), gradients(layer, x, expected))
        assert_same({"y": output[key]}, {"y": expected})


def test_rows_of_more_axes_and_integers():
    class Picture(nn.Module):
        def __init__(self, d_model):
            super().__init__()
            self.conv = nn.Conv1d(2, 3, 1)

        def forward(self, inp, count):
            return self.conv(inp["picture"]) * inp["factor"][:, None, None]

    class ByFeature(NaiveGate):
        def forward(self, inp):
            return super().forward(inp["picture"].flatten(1))

    layer = FMoE(3, 12, expert=Picture, gate=ByFeature).double()
    inp = {"picture": torch.randn(T, 2, 6, dtype=torch.float64), "factor": torch.randint(1, 9, (T,))}
    ids, scores = layer.gate(inp)
    expected = torch.stack([
        sum(
            scores[t, k] * layer.experts[int(ids[t, k])].conv(inp["picture"][t : t + 1])[0] * inp["factor"][t]
            for k in range(2)
        )
        for t in range(T)
    ])  # fmt: skip
    assert_same({"y": layer(inp)}, {"y": expected})


# --- masks, hooks, gates of the user's own ----------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [F.gelu, torch.tanh])
def test_mask(activation):
    filler = torch.randn(D, dtype=torch.float64, requires_grad=True)
    each = torch.randn(2, D, dtype=torch.float64)
    mask = torch.randint(0, 4, (T,))
    mask[:4] = torch.arange(4)
    layer = make(activation=activation, mask=mask.view(1, T), mask_dict={1: filler, 2: each})
    x = tokens()
    output = layer(x)
    ids, scores = layer.gate(x)
    experts = reference.mlps(layer.experts.htoh4, layer.experts.h4toh, activation)
    expected = torch.stack([
        reference.moe(x[t : t + 1], ids[t : t + 1], scores[t : t + 1], experts)[0] if mask[t] == 0
        else filler * scores[t].sum() if mask[t] == 1
        else (each * scores[t, :, None]).sum(0) if mask[t] == 2
        else torch.zeros_like(x[t])
        for t in range(T)
    ])  # fmt: skip
    assert_same(gradients(layer, x, output) | {"y": output}, gradients(layer, x, expected) | {"y": expected})
    weights = torch.randn_like(output)
    ours, theirs = (torch.autograd.grad((y * weights).sum(), filler)[0] for y in (output, expected))
    torch.testing.assert_close(ours, theirs)


def test_the_gate_sees_masked_tokens():
    layer = make(GShardGate, mask=torch.ones(T), mask_dict={1: torch.zeros(D, dtype=torch.float64)})
    output = layer(tokens())
    assert not output.any() and layer.gate.get_loss() > 0


def test_gate_hook():
    calls = []
    layer = make(gate_hook=lambda *args: calls.append(args))
    x = tokens()
    layer(x)
    ((ids, scores, nothing),) = calls
    assert torch.equal(ids, layer.gate(x)[0]) and torch.equal(scores, layer.gate(x)[1]) and nothing is None


class FlatGate(nn.Module):
    """Returns what FastMoE's noisy and zero gates do: one axis of ids, an axis more of scores."""

    def __init__(self, d_model, num_expert, world_size, top_k=2):
        super().__init__()
        self.top_k, self.experts = top_k, num_expert * world_size

    def forward(self, inp):
        ids = torch.arange(inp.shape[0] * self.top_k) % (self.experts + 1) - 1
        return ids, torch.arange(inp.shape[0] * self.top_k, dtype=inp.dtype).view(-1, 1, self.top_k)


def test_a_gate_of_other_shapes():
    layer, x = make(FlatGate, 3), tokens()
    ids, scores = (t.reshape(T, 3) for t in layer.gate(x))
    assert (ids == -1).any()
    experts = reference.mlps(layer.experts.htoh4, layer.experts.h4toh, F.gelu)
    assert_same({"y": layer(x)}, {"y": reference.moe(x, ids, scores, experts)})


def test_general_forward():
    x = tokens()
    gate = torch.randint(-1, E, (T, 2))
    output = _fmoe_general_global_forward(x, gate, lambda rows, counts: rows * 3, E, 1)
    assert_same({"y": output}, {"y": x.repeat_interleave(2, 0) * 3 * (gate.view(-1, 1) >= 0)})
    one = _fmoe_general_global_forward(x, gate[:, 0], lambda rows, counts: rows, E, 1, experts=None)
    assert_same({"y": one}, {"y": x * (gate[:, :1] >= 0)})
    for none in (gate[:0], gate[:0, 0]):
        assert _fmoe_general_global_forward(x[:0], none, lambda rows, counts: rows, E, 1).shape == (0, D)


def test_linear():
    linear = FMoELinear(3, 4, 5).double()
    assert linear.weight.shape == (3, 5, 4) and not linear.bias.any()
    assert FMoELinear(3, 4, 5, bias=False).bias is None
    assert repr(linear) == "FMoELinear(num_expert=3, in_features=4, out_features=5, bias=True, rank=0)"
    nn.init.normal_(linear.bias)
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    output = linear(x, torch.tensor([2, 0, 4]))
    expected = torch.cat(
        [F.linear(x[:2], linear.weight[0], linear.bias[0]), F.linear(x[2:], linear.weight[2], linear.bias[2])]
    )
    assert_same(gradients(linear, x, output) | {"y": output}, gradients(linear, x, expected) | {"y": expected})
    assert torch.equal(MOELinear.apply(x, torch.tensor([2, 0, 4]), linear.weight, linear.bias), output)
    assert_same({"y": MOELinear.apply(x, torch.tensor([0, 6, 0]), linear.weight)}, {"y": F.linear(x, linear.weight[1])})
    with pytest.raises(ValueError, match="fwd_expert_count must sum to the number of rows, 6, got 5"):
        linear(x, torch.tensor([2, 0, 3]))
    with pytest.raises(ValueError, match=r"fwd_expert_count must have shape \[3\]"):
        linear(x, torch.tensor([2, 4]))


def test_the_layer_is_copied_after_a_pass():
    layer, x = make(GShardGate), tokens()
    layer(x)
    assert_same(dict(copy.deepcopy(layer).named_parameters()), dict(layer.named_parameters()))


@pytest.mark.parametrize(
    ("make_layer", "error", "says"),
    [
        (lambda: FMoE(0, D, expert=OneArgument), ValueError, "num_expert must be an integer of at least 1, got 0"),
        (lambda: FMoE(None, D, expert=OneArgument), ValueError, "num_expert must be an integer .* got None"),
        (lambda: FMoE(2, D, expert=OneArgument, top_k=3), ValueError, "top_k must be .* = 2, got 3"),
        (lambda: FMoE(2, D, expert=OneArgument, gate=NaiveGate(D, 2, 1)), TypeError, "gate must be a class"),
        (lambda: FMoE(2, D, expert=OneArgument, gate=NoisyGate, gate_bias=False), ValueError, "gate_bias must be True"),
        (lambda: FMoE(2, D, expert=OneArgument, mask=torch.zeros(3)), ValueError, "mask and mask_dict must be given"),
        (lambda: FMoE(2, D)(torch.randn(3, D)), ValueError, "made with expert=None, so it must set self.experts"),
        (lambda: FMoE(2, D, expert=OneArgument, world_size=2)(torch.randn(3, D)), RuntimeError, "must be initialised"),
        (lambda: FMoETransformerMLP(2, D, H, expert=OneArgument), TypeError, "expert must not be given"),
        (lambda: FMoETransformerMLP(2, D, H, activation="gelu"), TypeError, "activation must be a module or"),
        (lambda: FMoETransformerMLP(2, D, H)(torch.randn(3, D + 1)), ValueError, r"must have shape \[..., 10\], got"),
        (lambda: FMoE(2, D, expert=Pair)([torch.randn(3, D), torch.randn(2, 3)]), ValueError,
         r"one batch size, got \[3, 2\]"),
        (lambda: FMoE(2, D, expert=OneArgument, mask=torch.zeros(2), mask_dict={})(torch.randn(3, D)), ValueError,
         "mask must have one value for each of the 3 tokens"),
        (lambda: FMoE(4, D, expert=OneArgument, gate=WideGate)(torch.randn(3, D)), ValueError,
         r"WideGate must return indices \[3, 2\] for 3 tokens and top_k 2, got \[3, 3\]"),
    ],
)  # fmt: skip
def test_refused_in_one_sentence(make_layer, error, says):
    with pytest.raises(error, match=says):
        make_layer()


class WideGate(NaiveGate):
    def forward(self, inp):
        ids, scores = super().forward(inp)
        return torch.cat([ids, ids[:, :1]], 1), torch.cat([scores, scores[:, :1]], 1)


def test_an_id_out_of_range_is_refused():
    class Outside(NaiveGate):
        def forward(self, inp):
            ids, scores = super().forward(inp)
            return ids + 1, scores

    with pytest.raises(ValueError, match="topk_ids .*-1.* 4.* got 5"):
        layer = make(Outside)
        layer.gate.gate.bias.data[E - 1] = 100
        layer(tokens())


@pytest.mark.parametrize("variable", ["FMOE_FASTER_SCHEDULE_ENABLE", "FMOE_FASTER_SHADOW_ENABLE"])
def test_a_schedule_that_is_not_there_is_refused_by_name(monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    with pytest.raises(ValueError, match=f"{variable} asks for FasterMoE's schedule"):
        make()
    monkeypatch.setenv(variable, "OFF")
    make()
