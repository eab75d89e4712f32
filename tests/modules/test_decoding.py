"""Without gradients the layer routes by one operator: the same numbers as with them, and who watches or replaces the
router is still called."""

import pytest
import torch
from torch import nn

from fastmoe_cpp import MoE, MoEConfig, RouterConfig, ops
from modules.cases import CASES, HIDDEN, make


@pytest.fixture
def by_one_operator(monkeypatch) -> list[int]:
    """The tokens of every call of the one operator."""
    calls = []
    operator = ops.route_and_dispatch

    def watched(hidden_states, *args, **kwargs):
        calls.append(len(hidden_states))
        return operator(hidden_states, *args, **kwargs)

    monkeypatch.setattr(ops, "route_and_dispatch", watched)
    return calls


@pytest.mark.parametrize("tokens", [0, 1, 8, 9, 33])
@pytest.mark.parametrize("case", CASES)
def test_the_numbers_are_those_with_gradients(case, tokens, device):
    layer = make(case, device=device).eval()
    x = torch.randn(tokens, HIDDEN, dtype=next(layer.parameters()).dtype, device=device)
    with torch.no_grad():
        without, plain = layer.forward_with_routing(x), layer(x)
    given = layer.forward_with_routing(x)
    assert torch.equal(plain, without.hidden_states)
    for name, one, other in zip(given._fields, without, given, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=0, atol=0, equal_nan=True, msg=name)


def layer_of(device, **router) -> MoE:
    return MoE(MoEConfig(16, 8, 8, 2, router=RouterConfig(**router)), device=device)


@pytest.mark.parametrize("training", [False, True])
def test_inference_takes_it(training, by_one_operator, device):
    layer, x = layer_of(device, expert_bias=True).train(training), torch.randn(3, 16, device=device)
    with torch.no_grad():
        layer(x)
    layer(x)
    assert by_one_operator == [3]
    # two passes of three tokens that ask for two experts each
    assert layer.router.tokens_per_expert.sum() == (12 if training else 0)


def hooked(layer, calls):
    layer.router.register_forward_hook(lambda *_: calls.append("hook"))


def hooked_before(layer, calls):
    layer.router.register_forward_pre_hook(lambda *_: calls.append("pre-hook"))


def hooked_everywhere(layer, calls):
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: calls.append("global") or None)
    calls.handles.append(handle)


def patched(layer, calls):
    forward = layer.router.forward

    def instead(*args, **kwargs):
        calls.append("patched")
        return forward(*args, **kwargs)

    layer.router.forward = instead


def replaced(layer, calls):
    class Mine(type(layer.router)):
        def forward(self, *args, **kwargs):
            calls.append("mine")
            return super().forward(*args, **kwargs)

    layer.router.__class__ = Mine


class Calls(list):
    def __init__(self) -> None:
        super().__init__()
        self.handles = []


@pytest.mark.parametrize("watch", [hooked, hooked_before, hooked_everywhere, patched, replaced])
def test_whoever_watches_the_router_is_called(watch, by_one_operator, device):
    layer, x, calls = layer_of(device).eval(), torch.randn(3, 16, device=device), Calls()
    with torch.no_grad():
        expected = layer(x)
        watch(layer, calls)
        try:
            assert torch.equal(layer(x), expected)
        finally:
            for handle in calls.handles:
                handle.remove()
    assert calls and by_one_operator == [3]


@pytest.mark.parametrize("router", [{"jitter_eps": 0.1}, {"sinkhorn": True}, {"dtype": torch.bfloat16}])
def test_what_it_cannot_do_goes_another_way(router, by_one_operator, device):
    layer, x = layer_of(device, **router).train(), torch.randn(3, 16, device=device)
    with torch.no_grad():
        layer(x)
    assert by_one_operator == []


def test_capacity_and_padding_go_another_way(by_one_operator, device):
    x = torch.randn(3, 16, device=device)
    with torch.no_grad():
        MoE(MoEConfig(16, 8, 8, 2, eval_capacity_factor=1.0), device=device).eval()(x)
        layer_of(device)(x, torch.tensor([False, True, False], device=device))
    assert by_one_operator == []
