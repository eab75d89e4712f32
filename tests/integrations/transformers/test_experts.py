# ruff: noqa: E402
"""Ours for the experts of every class that uses transformers' registry, beside that class's own eager code."""

import copy
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ..conftest import require

require("transformers", "5")

import transformers
from support.tolerance import close
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

from fastmoe_cpp.integrations.transformers import experts, register

from . import decorated

T, K = 23, 3
FLOAT32_ALONE = {"OpenAIPrivacyFilterExperts"}  # all of it


@pytest.fixture(autouse=True, scope="module")
def registered():
    register()


def routing(tokens=T, experts=decorated.EXPERTS, top_k=K, dtype=torch.float64):
    """Distinct ids and weights; the last expert is never chosen, the first more often than the others."""
    scores = torch.rand(tokens, experts - 1)
    scores[:, 0] += 0.4
    return scores.topk(top_k).indices, torch.rand(tokens, top_k, dtype=dtype) + 0.1


def run(module, implementation, x, ids, weights, grad):
    module.config._experts_implementation = implementation
    module.zero_grad(set_to_none=True)
    x, weights = x.detach().clone().requires_grad_(), weights.detach().clone().requires_grad_()
    y = module(x, ids, weights)
    y.backward(grad.to(y.dtype))
    return {"output": y.detach(), "x": x.grad, "weights": weights.grad} | {
        name: p.grad for name, p in module.named_parameters()
    }


def agree(ours, theirs, bound):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert ours[name] is not None and ours[name].dtype == expected.dtype, name
        assert expected.abs().max() > 0, name
        error = (ours[name] - expected).abs().max() / expected.abs().max()
        assert error <= bound, f"{name} is off by {error:.1e} of its largest value"


def test_the_walk_finds_the_library():
    """All of them: a class that is new in a release is walked too, and none is found twice under one name."""
    found = decorated.classes()
    models = Path(transformers.__file__).parent / "models"
    written = sum(
        len(re.findall(r"^@use_experts_implementation", path.read_text(), re.MULTILINE))
        for path in models.glob("*/modeling_*.py")
    )
    assert len(found) == written >= 35
    for family in ("Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "GptOss", "NemotronH"):
        assert f"{family}Experts" in found


@pytest.mark.parametrize("act", ["silu", "quick_gelu"])
@pytest.mark.parametrize("name", decorated.classes())
def test_every_class(name, act):
    """Output, and gradients of input, routing weights and every parameter. silu is fused, quick_gelu is theirs."""
    module = decorated.make(name, act)
    assert experts.takes_experts(module)
    ids, weights = routing()
    x, grad = torch.randn(T, 24, dtype=torch.float64), torch.randn(T, 24, dtype=torch.float64)
    theirs = run(module, "eager", x, ids, weights, grad)
    ours = run(module, "fastmoe_cpp", x, ids, weights, grad)
    agree(ours, theirs, 3e-6 if decorated.in_float32(name) else 1e-13)


CLAMPED = ("GptOssExperts", "OpenAIPrivacyFilterExperts", "MiniMaxM3VLExperts")


@pytest.mark.parametrize("name", decorated.classes())
def test_the_fused_operator_serves(name):
    """A class that falls out of the fused path is slower, so that is a decision and not an accident."""
    module = decorated.make(name, "silu")
    expected = "swiglu" if module.has_gate else "silu"
    if name in CLAMPED:
        expected = "clamped_swiglu"
    elif "_apply_gate" in inspect.getsource(type(module)) or getattr(module, "has_post_expert_norm", False):
        expected = None
    found = experts.fused_activation(module)
    assert (None if found is None else found.name) == expected


@pytest.mark.parametrize("act", ["silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2", "gelu_10"])
@pytest.mark.parametrize("name", ["MixtralExperts", "NemotronHExperts"])
def test_activations(name, act):
    module = decorated.make(name, act)
    fused = experts.fused_activation(module)
    assert (fused is None) == (act == "gelu_10" or (act == "relu2" and module.has_gate))
    ids, weights = routing()
    x, grad = torch.randn(T, 24, dtype=torch.float64), torch.randn(T, 24, dtype=torch.float64)
    agree(
        run(module, "fastmoe_cpp", x, ids, weights, grad), run(module, "eager", x, ids, weights, grad),
        1e-13,
    )  # fmt: skip


LAYOUTS = [
    name
    for name in (
        "MixtralExperts",
        "NemotronHExperts",
        "GptOssExperts",
        "OpenAIPrivacyFilterExperts",
        "DeepseekV4Experts",
        "MuseSparkExperts",
    )
    if name in decorated.classes()
]


@pytest.mark.parametrize("name", LAYOUTS)
def test_expert_parallel_sentinels(name):
    """An index of num_experts or more: no output, no gradient, even where its weight is not zero."""
    module = decorated.make(name, "silu", torch.float32)
    ids, weights = routing(dtype=torch.float32)
    x, grad = torch.randn(T, 24), torch.randn(T, 24)
    gone = torch.rand(T, K) < 0.4
    gone[0] = True
    theirs = run(module, "eager", x, ids, weights.masked_fill(gone, 0.0), grad)
    far = torch.where(torch.rand(T, K) < 0.5, decorated.EXPERTS, 1 << 40)
    ours = run(module, "fastmoe_cpp", x, torch.where(gone, far, ids), weights, grad)
    assert (ours["output"][0] == 0).all() and (ours["x"][0] == 0).all() and (ours["weights"][gone] == 0).all()
    theirs["weights"] = theirs["weights"].masked_fill(gone, 0.0)
    agree(ours, theirs, 3e-6)


@pytest.mark.parametrize("name", LAYOUTS)
def test_of_one_token_and_of_none(name):
    """Decoding's one token, and a rank without any: every weight still has a gradient."""
    module = decorated.make(name, "silu", torch.float32)
    ids, weights = routing(1, dtype=torch.float32)
    x, grad = torch.randn(1, 24), torch.randn(1, 24)
    ours, theirs = (run(module, i, x, ids, weights, grad) for i in ("fastmoe_cpp", "eager"))
    agree(ours, theirs, 3e-6)
    none = run(module, "fastmoe_cpp", x[:0], ids[:0], weights[:0], grad[:0])
    assert none["output"].shape == (0, 24)
    for parameter, gradient in none.items():
        assert gradient is not None and (gradient == 0).all(), parameter


def narrow_case(name, dtype):
    """A module, ids and weights, x and a gradient of 200 tokens, for bfloat16. Where the class clamps, what it clamps
    is exact in bfloat16 and is never the limit: no rounding takes a value, and its gradient, over the limit."""
    module = decorated.make(name, "silu", dtype)
    x, grad = torch.randn(200, 24, dtype=dtype), torch.randn(200, 24, dtype=dtype)
    if getattr(module, "limit", None) is not None:
        assert 0.875 < module.limit < 1.0
        x = x.sign()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_((parameter * 8).round() / 8)
    return module, *routing(200, dtype=torch.float32), x, grad


@pytest.mark.parametrize("name", LAYOUTS)
def test_bfloat16_within_twice_eager(name):
    """Against the float64 truth of the same bfloat16 weights: at most twice eager's error, three times backward."""
    module, ids, weights, x, grad = narrow_case(name, torch.bfloat16)
    exact = copy.deepcopy(module).double()
    if name in FLOAT32_ALONE:
        truth = run(exact.float(), "eager", x.float(), ids, weights, grad.float())
    else:
        truth = run(exact, "eager", x.double(), ids, weights.double(), grad.double())
    eager = run(module, "eager", x, ids, weights, grad)
    ours = run(module, "fastmoe_cpp", x, ids, weights, grad)
    if name in FLOAT32_ALONE:
        # it computes in float32 what we round to bfloat16: the yardstick is bfloat16's own rounding
        for key, expected in truth.items():
            error = (ours[key].float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
            assert error < 0.008, f"{key} is off by {error:.1e}"
        return
    for key, expected in truth.items():
        assert ours[key].dtype == eager[key].dtype, key
        close(ours[key], expected, eager[key], factor=2.0 if key == "output" else 3.0, what=key, of=torch.bfloat16)


@pytest.mark.parametrize("name", LAYOUTS)
def test_autocast(name):
    """float32 weights and input under bfloat16 autocast: float32 comes back, within twice the error of eager's."""
    module, ids, weights, x, grad = narrow_case(name, torch.float32)
    exact = copy.deepcopy(module).double()
    truth = run(exact, "eager", x.double(), ids, weights.double(), grad.double())
    with torch.autocast("cpu", torch.bfloat16):
        eager = run(module, "eager", x, ids, weights, grad)
        ours = run(module, "fastmoe_cpp", x, ids, weights, grad)
    for key, expected in truth.items():
        assert ours[key].dtype == torch.float32, key
        assert (ours[key] - expected).abs().max() > 1e-5, f"{key} was not computed in bfloat16"
        factor = 2.0 if key == "output" else 3.0
        close(ours[key], expected.double(), eager[key], factor=factor, what=key, of=torch.bfloat16)


@pytest.mark.parametrize("name", LAYOUTS)
def test_compiles_in_one_graph(name):
    module = decorated.make(name, "silu", torch.float32)
    module.config._experts_implementation = "fastmoe_cpp"
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for tokens in (T, 9):
        ids, weights = routing(tokens, dtype=torch.float32)
        x = torch.randn(tokens, 24, requires_grad=True)
        expected, actual = module(x, ids, weights), compiled(x, ids, weights)
        assert torch.equal(actual, expected)
        grads = [torch.autograd.grad(y.square().sum(), [x, *module.parameters()]) for y in (expected, actual)]
        for one, other in zip(*grads, strict=True):
            assert torch.equal(one, other)


@pytest.mark.cuda
@pytest.mark.parametrize("name", LAYOUTS)
def test_nothing_waits_for_the_device(name):
    module = decorated.make(name, "silu", torch.float32).cuda()
    module.config._experts_implementation = "fastmoe_cpp"
    ids, weights = routing(64, dtype=torch.float32)
    ids[::3, 0] = decorated.EXPERTS
    ids, weights, x = ids.cuda(), weights.cuda(), torch.randn(64, 24, device="cuda", requires_grad=True)
    module(x, ids, weights).sum().backward()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        module(x, ids, weights).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_gate_of_the_users_own():
    """A class we have never seen, with a gate of its own, biases and an ungated sibling: its code runs between."""

    @use_experts_implementation(has_bias=True)
    class Own(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts = 4
            self.gate_up_proj, self.gate_up_proj_bias = weight(4, 10, 6), weight(4, 10)
            self.down_proj, self.down_proj_bias = weight(4, 6, 5), weight(4, 6)
            self.power = weight(())

        def _apply_gate(self, gate_up):
            gate, up = gate_up.chunk(2, dim=-1)
            return torch.tanh(gate * self.power) + up

        def forward(self, hidden_states, top_k_index, top_k_weights):
            rows = torch.zeros_like(hidden_states)
            for e in range(self.num_experts):
                t, k = torch.where(top_k_index == e)
                inner = hidden_states[t] @ self.gate_up_proj[e].T + self.gate_up_proj_bias[e]
                outer = self._apply_gate(inner) @ self.down_proj[e].T + self.down_proj_bias[e]
                rows = rows.index_add(0, t, outer * top_k_weights[t, k, None])
            return rows

    def weight(*shape):
        return nn.Parameter(torch.randn(*shape, dtype=torch.float64))

    module = Own(SimpleNamespace(_experts_implementation="eager"))
    assert experts.fused_activation(module) is None
    ids, weights = routing(11, 5, 2)
    x, grad = torch.randn(11, 6, dtype=torch.float64), torch.randn(11, 6, dtype=torch.float64)
    theirs, ours = (run(module, i, x, ids, weights, grad) for i in ("eager", "fastmoe_cpp"))
    agree(ours, theirs, 1e-13)


def test_a_gate_put_on_one_module():
    """Patched onto an instance, it is not the class's gate any more."""
    module = decorated.make("MixtralExperts", "silu")
    module._apply_gate = lambda gate_up: gate_up.chunk(2, dim=-1)[1] * 2.0
    assert experts.fused_activation(module) is None
    ids, weights = routing()
    module.config._experts_implementation = "fastmoe_cpp"
    x = torch.randn(T, 24, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for e in range(decorated.EXPERTS):
        t, k = torch.where(ids == e)
        up = x[t] @ module.gate_up_proj[e][20:].T * 2.0
        expected.index_add_(0, t, up @ module.down_proj[e].T * weights[t, k, None])
    torch.testing.assert_close(module(x, ids, weights), expected, rtol=1e-12, atol=1e-12)


def test_a_wider_input_takes_the_weights_dtype():
    """A norm kept in float32 before bfloat16 experts: computed in bfloat16, returned in the input's dtype."""
    module = decorated.make("MixtralExperts", "silu", torch.bfloat16)
    module.config._experts_implementation = "fastmoe_cpp"
    ids, weights = routing(dtype=torch.float32)
    x = torch.randn(T, 24)
    y = module(x, ids, weights)
    assert y.dtype == torch.float32
    assert torch.equal(y, module(x.bfloat16(), ids, weights).float())


def test_registering_twice_is_registering():
    register()
    register()
    assert ALL_EXPERTS_FUNCTIONS["fastmoe_cpp"] is experts.experts_forward


def test_a_part_we_do_not_know_is_refused_by_name(monkeypatch):
    """A release whose decorator has a new argument: experts that ask for it are not computed without it."""
    module = decorated.make("MixtralExperts", "silu")
    module.config._experts_implementation = "fastmoe_cpp"
    monkeypatch.setattr(experts, "_UNKNOWN", ("has_third_projection",))
    ids, weights = routing()
    x = torch.randn(T, 24, dtype=torch.float64)
    module(x, ids, weights)
    module.has_third_projection = True
    with pytest.raises(NotImplementedError, match=r"does not know what MixtralExperts.has_third_projection asks"):
        module(x, ids, weights)
