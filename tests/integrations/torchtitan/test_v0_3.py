# ruff: noqa: E402
"""TorchTitan 0.3's own MoE module and its training hook, with its own parts and with ours by its override."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from ..conftest import require

require("torchtitan", "0.3")

from torch import nn
from torchtitan.components.optimizer.optimizer import register_moe_load_balancing_hook
from torchtitan.config.configurable import Configurable
from torchtitan.config.override import OverrideConfig, apply_overrides
from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher, LocalTokenDispatcher

from fastmoe_cpp.integrations.torchtitan import fast_moe
from fastmoe_cpp.integrations.torchtitan.v0_3 import FastMoEGroupedExperts, FastMoERoutedExperts, FastMoERouter

from .small_model import (
    DIM,
    Model,
    check_fifty_steps,
    check_output_gradients_and_counts,
    check_state_dicts,
    relative,
)

HIDDEN, EXPERTS, TOP_K = 16, 8, 3
TARGET = "fastmoe_cpp.integrations.torchtitan.v0_3.fast_moe"
CASES = {
    "defaults": {},
    "softmax": {"score_func": "softmax"},
    "normalised": {"route_norm": True, "route_scale": 2.5},
    "top_1": {"top_k": 1},
    "groups": {"num_expert_groups": 4, "num_limited_groups": 2, "route_norm": True, "shared": 2},
    "gate_bias": {"gate_bias": True},
    "no_balancing": {"load_balance_coeff": None, "shared": 1},
    "round_robin": {"_debug_force_load_balance": True},
}


def moe_config(*, gate_bias=False, shared=0, load_balance_coeff=1e-3, top_k=TOP_K, dispatcher=None, **router):
    def linear(inner, outer, bias=False):
        return Linear.Config(in_features=inner, out_features=outer, bias=bias)

    wide = HIDDEN * shared
    return MoE.Config(
        num_experts=EXPERTS,
        load_balance_coeff=load_balance_coeff,
        router=TokenChoiceTopKRouter.Config(
            num_experts=EXPERTS, top_k=top_k, gate=linear(DIM, EXPERTS, gate_bias), **router
        ),
        routed_experts=RoutedExperts.Config(
            inner_experts=GroupedExperts.Config(dim=DIM, hidden_dim=HIDDEN, num_experts=EXPERTS),
            token_dispatcher=dispatcher or LocalTokenDispatcher.Config(num_experts=EXPERTS, top_k=top_k),
        ),
        shared_experts=FeedForward.Config(w1=linear(DIM, wide), w2=linear(wide, DIM), w3=linear(DIM, wide))
        if shared
        else None,
    )


class Root(Configurable):
    """What stands for a trainer: the override walks its configuration."""

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        first: MoE.Config
        second: MoE.Config

    def __init__(self, config):
        pass


def pair(imports=(TARGET,), **settings):
    """The host's model, and one whose configuration went through `--override.imports`."""
    models = []
    for override in ([], list(imports)):
        root = Root.Config(first=moe_config(**settings), second=moe_config(**settings))
        apply_overrides(OverrideConfig(imports=override), root)
        models.append(Model(root.first.build(), root.second.build()))
    theirs, ours = models
    theirs.draw()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def loop(self, *, A, B_t, offs):  # noqa: N803
    rows, first = [], 0
    for expert, last in enumerate(offs.tolist()):
        rows.append(A[first:last] @ B_t[expert])
        first = last
    return torch.cat(rows)


@pytest.fixture
def float32(monkeypatch):
    """The host's experts are always bfloat16: without that, what they compute."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self)
    monkeypatch.setattr(GroupedExperts, "_grouped_mm", loop)


@pytest.mark.parametrize("case", CASES)
def test_output_gradients_and_counts(case, float32):
    theirs, ours = pair(**CASES[case])
    for layer in ("1", "2"):
        moe = ours.layers[layer].moe
        assert type(moe) is MoE and type(moe.router) is FastMoERouter
        assert type(moe.routed_experts) is FastMoERoutedExperts
        assert type(moe.routed_experts.inner_experts) is FastMoEGroupedExperts
    x = torch.randn(2, 33, DIM)
    counted = 2 * 33 * CASES[case].get("top_k", TOP_K)
    check_output_gradients_and_counts((theirs, ours), "tokens_per_expert_E", counted, x)
    counts = ours.layers["2"].moe.tokens_per_expert_E.clone()
    ours.eval()(x)
    assert torch.equal(counts, ours.layers["2"].moe.tokens_per_expert_E), "evaluation does not count"


def test_the_router_returns_what_the_host_s_does():
    theirs, ours = pair(route_norm=True)
    x, bias = torch.randn(2, 9, DIM), torch.randn(EXPERTS) * 0.1
    expected, actual = (model.layers["1"].moe.router(x, bias) for model in (theirs, ours))
    assert len(actual) == len(expected) == 3
    order = [ids.sort(dim=-1) for ids in (expected[1], actual[1])]
    assert torch.equal(order[0].values, order[1].values)
    weights = [w.gather(-1, o.indices) for w, o in zip((expected[0], actual[0]), order, strict=True)]
    assert relative(weights[1], weights[0]) < 1e-6 and relative(actual[2], expected[2]) < 1e-6
    for mine, host in zip(actual, expected, strict=True):
        assert mine.dtype == host.dtype and mine.shape == host.shape


def test_beside_the_host_s_bfloat16():
    """Unpatched: of the same routing, ours in bfloat16 is no further from float32 than the host's is."""
    theirs, ours = (model.layers["1"].moe.routed_experts for model in pair())
    x, scores = torch.randn(2, 64, DIM).bfloat16(), torch.rand(2, 64, TOP_K) + 0.1
    ids = torch.rand(2, 64, EXPERTS).topk(TOP_K).indices
    counts = torch.bincount(ids.flatten(), minlength=EXPERTS)
    ours.bfloat16(), theirs.bfloat16()
    actual, host = (experts(x, scores, ids, counts) for experts in (ours, theirs))
    exact = ours.float()(x.float(), scores, ids, counts)
    errors = [(y.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt() for y in (actual, host)]
    assert actual.dtype == host.dtype == torch.bfloat16
    assert 0 < errors[0] <= 1.1 * errors[1] < 0.01


def test_fifty_steps_with_the_hook(float32):
    dims = SimpleNamespace(ep_enabled=False, tp=1, get_optional_mesh=lambda name: None)

    def optimizer_of(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        register_moe_load_balancing_hook(optimizer, [model], dims)
        return optimizer

    counted = 2 * 2 * 16 * TOP_K
    check_fifty_steps(pair(route_norm=True), optimizer_of, "tokens_per_expert_E", "expert_bias_E", counted)


def test_state_dicts_go_both_ways(float32):
    models = pair(shared=1)
    state = models[0].state_dict()
    assert "layers.1.moe.routed_experts.inner_experts.w1_EFD" in state and "layers.1.moe.expert_bias_E" in state
    check_state_dicts(models, "expert_bias_E")


def test_initialised_by_the_host_s_rules():
    """param_init and the buffers' device survive the override."""
    config = moe_config()
    config.routed_experts.inner_experts.param_init = {name: nn.init.ones_ for name in ("w1_EFD", "w2_EDF", "w3_EFD")}
    with torch.device("meta"):
        moe = fast_moe(config).build()
    moe.router.gate._param_init = {"weight": nn.init.zeros_}
    moe.to_empty(device="cpu")
    moe.init_states(buffer_device=torch.device("cpu"))
    assert (moe.routed_experts.inner_experts.w2_EDF == 1).all() and not moe.router.gate.weight.any()
    assert not moe.expert_bias_E.any() and not moe.tokens_per_expert_E.any()
    assert moe(torch.randn(1, 5, DIM)).shape == (1, 5, DIM)


def test_compiles_in_one_graph():
    _, ours = pair(route_norm=True)
    moe = ours.layers["1"].moe.eval()
    torch._dynamo.reset()
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 9, DIM)
    assert relative(compiled(x), moe(x)) < 1e-6
    gradients = [torch.autograd.grad(f(x).square().sum(), list(moe.parameters())) for f in (moe, compiled)]
    for expected, actual in zip(*gradients, strict=True):
        assert relative(actual, expected) < 1e-5


def test_what_can_not_be_served_is_refused_by_name():
    dispatcher = AllToAllTokenDispatcher.Config(num_experts=EXPERTS, top_k=TOP_K)
    with pytest.raises(ValueError, match="whose routed_experts.token_dispatcher is a LocalTokenDispatcher.Config, got "
                       "AllToAllTokenDispatcher.Config: set the expert parallel degree to 1"):  # fmt: skip
        pair(dispatcher=dispatcher)

    class OtherExperts(GroupedExperts):
        @dataclass(kw_only=True, slots=True)
        class Config(GroupedExperts.Config):
            pass

    config = moe_config()
    config.routed_experts.inner_experts = OtherExperts.Config(dim=DIM, hidden_dim=HIDDEN, num_experts=EXPERTS)
    with pytest.raises(
        ValueError, match="whose routed_experts.inner_experts is a GroupedExperts.Config, got .*OtherExperts"
    ):
        fast_moe(config)
    with pytest.raises(ValueError, match="num_expert_groups must divide num_experts = 8 into groups .* got 3"):
        fast_moe(moe_config(num_expert_groups=3, num_limited_groups=1)).build()
