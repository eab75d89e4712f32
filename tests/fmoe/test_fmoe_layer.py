"""FMoE and FMoETransformerMLP against the sum over experts by its formula: outputs and every gradient."""

import copy
from functools import partial

import fmoe_reference as reference
import pytest
import torch
import torch.nn.functional as F
from support.tolerance import BACKWARD, close
from torch import nn

from fastmoe_cpp.fmoe import FMoE, FMoELinear, FMoETransformerMLP
from fastmoe_cpp.fmoe.gates import (
    DCGate,
    GShardGate,
    NaiveGate,
    NoisyGate,
    SwipeGate,
    SwitchGate,
    ZeroGate,
    gen_faster_gate,
)
from fastmoe_cpp.fmoe.layers import _fmoe_general_global_forward
from fastmoe_cpp.fmoe.transformer import _Expert

T, D, H, E = 23, 10, 14, 5

ACTIVATIONS = {
    "module gelu": (nn.GELU(), "gelu"),
    "module gelu tanh": (nn.GELU(approximate="tanh"), "gelu_tanh"),
    "module relu": (nn.ReLU(), "relu"),
    "module silu": (nn.SiLU(), "silu"),
    "gelu": (F.gelu, "gelu"),
    "gelu tanh": (partial(F.gelu, approximate="tanh"), "gelu_tanh"),
    "relu": (F.relu, "relu"),
    "torch.relu": (torch.relu, "relu"),
    "silu": (F.silu, "silu"),
    "tanh": (torch.tanh, None),
    "lambda": (lambda x: F.relu(x) ** 2, None),
    "prelu": (nn.PReLU(init=0.3), None),
    "partial of another": (partial(F.leaky_relu, negative_slope=0.2), None),
}


def make(gate=NaiveGate, top_k=2, activation=None, dtype=torch.float64, **kwargs):
    """A layer whose experts' weights are large enough to tell them apart."""
    layer = FMoETransformerMLP(E, D, H, activation or nn.GELU(), gate=gate, top_k=top_k, **kwargs)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "experts" in name and "activation" not in name:
                parameter.normal_(0, 0.4)
    return layer.to(dtype)


def tokens(*shape, dtype=torch.float64):
    return torch.randn(*(shape or (T,)), D, dtype=torch.float64).to(dtype).requires_grad_()


def gradients(layer, x, output):
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).reshape(output.shape)
    wanted = {"x": x} | dict(layer.named_parameters())
    grads = torch.autograd.grad((output * weights).sum(), list(wanted.values()), allow_unused=True, retain_graph=True)
    return dict(zip(wanted, grads, strict=True))


def assert_same(actual, expected, relative=1e-11):
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        if tensor is None or expected[name] is None:
            # one that nothing reaches
            assert all(t is None or not t.any() for t in (tensor, expected[name])), name
            continue
        size = float(expected[name].detach().abs().max()) if tensor.numel() else 0.0
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=relative * size + 1e-14, msg=name)


def by_formula(layer, x, seed=None):
    """The gate's own choices (its tests are elsewhere), the experts by hand."""
    if seed is not None:
        torch.manual_seed(seed)
    flat = x.reshape(-1, D)
    ids, scores = layer.gate(flat)
    experts = reference.mlps(layer.experts.htoh4, layer.experts.h4toh, layer.experts.activation)
    return reference.moe(flat, ids, scores, experts).reshape(x.shape)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation(name):
    activation, fused = ACTIVATIONS[name]
    layer, x = make(activation=copy.deepcopy(activation)), tokens()
    assert layer.experts.fused_activation() == fused
    output, expected = layer(x), by_formula(layer, x)
    assert_same(gradients(layer, x, output) | {"y": output}, gradients(layer, x, expected) | {"y": expected})


GATES = {
    "naive": (NaiveGate, 3),
    "noisy": (NoisyGate, 2),
    "gshard": (GShardGate, 2),
    "dc": (DCGate, 2),
    "switch": (SwitchGate, 1),
    "swipe": (SwipeGate, 2),
    "faster": (gen_faster_gate(0), 2),
    "zero": (ZeroGate, 2),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [F.gelu, torch.tanh])
@pytest.mark.parametrize("name", GATES)
def test_every_gate(name, activation, training):
    gate, top_k = GATES[name]
    layer, x = make(gate, top_k, activation).train(training), tokens()
    if name in ("gshard", "dc", "switch"):
        layer.gate.capacity = (0.8, 0.5)
    torch.manual_seed(3)
    output = layer(x)
    loss = layer.gate.get_loss()
    expected = by_formula(layer, x, seed=3)
    assert_same(gradients(layer, x, output) | {"y": output}, gradients(layer, x, expected) | {"y": expected})
    assert (loss is None) == (name in ("swipe", "zero"))


@pytest.mark.parametrize("shape", [(3, 7), (2, 1, 4), (0,), (1,), (0, 5)])
@pytest.mark.parametrize("activation", [F.gelu, torch.tanh])
def test_shapes(shape, activation):
    layer, x = make(activation=activation), tokens(*shape)
    output = layer(x)
    assert output.shape == x.shape
    output.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    if x.numel():
        assert_same({"y": output}, {"y": by_formula(layer, x)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", [F.gelu, torch.tanh])
def test_dtypes(dtype, activation):
    layer, x = make(activation=activation, dtype=dtype), tokens(dtype=dtype)
    exact, x64 = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    output, truth, eager = layer(x), by_formula(exact, x64), by_formula(layer, x)
    assert output.dtype == dtype
    close(output, truth, eager, units=4.0, of=dtype)
    truths, eagers = gradients(exact, x64, truth), gradients(layer, x, eager)
    for name, grad in gradients(layer, x, output).items():
        close(grad, truths[name], eagers[name], factor=BACKWARD, what=name, units=8.0, of=dtype)


@pytest.mark.parametrize("activation", [F.gelu, torch.tanh])
def test_autocast(activation):
    layer, x = make(activation=activation, dtype=torch.float32), tokens(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().max() > 0 for p in layer.parameters())
    exact = by_formula(copy.deepcopy(layer).double(), x.double())
    assert (output - exact).abs().max() < 0.03 * exact.abs().max()


def test_input_of_another_dtype_is_cast_to_the_weights():
    layer = make(dtype=torch.float32)
    x = tokens()
    assert layer(x).dtype == torch.float32


def test_hooks_on_the_experts_run_and_change_nothing_else():
    layer, x = make(), tokens()
    seen = []
    layer.experts.htoh4.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    expected = by_formula(layer, x)
    assert_same({"y": layer(x)}, {"y": expected})
    assert seen == [(T * 2, H)]


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
    with pytest.raises(ValueError, match="fwd_expert_count must sum to the number of rows of inp, 6, got 5"):
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
