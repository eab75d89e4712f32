"""What holds of every Mixture-of-Experts layer, on configurations and inputs that hypothesis draws."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmoe_cpp import MoE, MoEConfig, RouterConfig, reference

routers = st.builds(
    RouterConfig,
    score_function=st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"]),
    scores_after_topk=st.booleans(),
    renormalize=st.booleans(),
    scaling_factor=st.sampled_from([1.0, 2.5]),
    bias=st.booleans(),
    expert_bias=st.booleans(),
)


@st.composite
def layers(draw, **fixed):
    """A float64 layer in evaluation mode, and hidden states [T, H] for it."""
    experts = draw(st.integers(1, 12))
    c = MoEConfig(
        hidden_size=draw(st.integers(1, 9)),
        intermediate_size=draw(st.integers(1, 9)),
        num_experts=experts,
        top_k=draw(st.integers(min(2, experts), experts)),
        router=draw(routers),
        activation=draw(st.sampled_from(["swiglu", "geglu", "clamped_swiglu", "relu2", "gelu_tanh"])),
        bias=draw(st.booleans()),
        weight_on_input=draw(st.booleans()),
        shared_intermediate_size=draw(st.sampled_from([None, 3])),
    )
    c = dataclasses.replace(c, **fixed)
    torch.manual_seed(draw(st.integers(0, 2**31)))
    layer = MoE(c, dtype=torch.float64).eval()
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
        if layer.router.expert_bias is not None:
            layer.router.expert_bias.normal_(0, 0.3)
    return layer, torch.randn(draw(st.integers(0, 25)), c.hidden_size, dtype=torch.float64)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@given(layers(), st.randoms(use_true_random=False))
def test_permuting_tokens_permutes_outputs(drawn, random):
    layer, x = drawn
    order = list(range(len(x)))
    random.shuffle(order)
    close(layer(x[order]), layer(x)[order])


@given(layers(), st.integers(0, 25))
def test_splitting_the_batch_changes_nothing(drawn, at):
    layer, x = drawn
    at = min(at, len(x))
    close(torch.cat([layer(x[:at]), layer(x[at:])]), layer(x))


@given(layers(), st.sampled_from([None, 0.0, 0.3, 1.0, 1.7]), st.sampled_from(["position", "probs"]), st.booleans())
def test_counts_sum_to_the_pairs(drawn, factor, policy, padded):
    layer, x = drawn
    c = dataclasses.replace(layer.config, eval_capacity_factor=factor, drop_policy=policy)
    limited = MoE(c, dtype=torch.float64).eval()
    limited.load_state_dict(layer.state_dict())
    mask = torch.rand(len(x)) < 0.3 if padded else None
    out = limited.forward_with_routing(x, mask)
    real = len(x) - (int(mask.sum()) if padded else 0)
    assert out.tokens_per_expert.sum() == real * c.top_k
    capacity = c.capacity(len(x), training=False)
    limit = out.tokens_per_expert if capacity is None else out.tokens_per_expert.clamp(max=capacity)
    assert (~out.dropped).sum() == limit.sum()
    assert all(len(set(row)) == c.top_k for row in out.topk_ids.tolist())


@given(layers(weight_on_input=False, shared_intermediate_size=None))
def test_identical_experts_are_one_dense_mlp(drawn):
    layer, x = drawn
    with torch.no_grad():
        for p in layer.experts.parameters():
            p.copy_(p[:1].expand_as(p))
    c, e = layer.config, layer.experts
    out = layer.forward_with_routing(x)
    inner = torch.nn.functional.linear(x, e.gate_up_proj[0], e.gate_up_bias[0] if c.bias else None)
    inner = reference.activate(inner, c.activation, c.activation_alpha, c.activation_limit)
    dense = torch.nn.functional.linear(inner, e.down_proj[0], e.down_bias[0] if c.bias else None)
    close(out.hidden_states, dense * out.topk_weights.sum(1, keepdim=True))
    if c.router.renormalize:
        close(out.topk_weights.sum(1), torch.full((len(x),), c.router.scaling_factor, dtype=torch.float64))


@given(layers(), st.randoms(use_true_random=False))
def test_relabelling_experts_changes_nothing(drawn, random):
    layer, x = drawn
    order = list(range(layer.config.num_experts))
    random.shuffle(order)
    state = {
        name: t if name.startswith("shared") else t[order] for name, t in layer.state_dict().items()
    }  # fmt: skip
    other = MoE(layer.config, dtype=torch.float64).eval()
    other.load_state_dict(state)
    a, b = layer.forward_with_routing(x), other.forward_with_routing(x)
    close(a.hidden_states, b.hidden_states)
    assert torch.equal(a.tokens_per_expert[order], b.tokens_per_expert)
    assert torch.equal(a.topk_ids.sort(1).values, torch.tensor(order)[b.topk_ids].sort(1).values)


@given(layers(), st.integers(1, 6))
def test_interleaving_rows_is_the_same_layer(drawn, _):
    layer, x = drawn
    if not layer.config.gated:
        return
    other = MoE(dataclasses.replace(layer.config, interleaved=True), dtype=torch.float64).eval()

    def interleave(t):
        return torch.stack(t.chunk(2, dim=1), dim=2).flatten(1, 2)

    state = layer.state_dict()
    for name in ("experts.gate_up_proj", "experts.gate_up_bias"):
        if name in state:
            state[name] = interleave(state[name])
    other.load_state_dict(state)
    close(other(x), layer(x))


@given(layers())
def test_gradients_are_those_of_the_reference(drawn):
    layer, x = drawn
    x.requires_grad_()
    named = dict(layer.named_parameters())
    out = layer.forward_with_routing(x)
    expected = reference.moe(x, named | dict(layer.named_buffers()), layer.config)
    grad = torch.randn_like(x)
    for ours, theirs in zip(
        *(torch.autograd.grad((o.hidden_states * grad).sum(), [x, *named.values()], allow_unused=True)
          for o in (out, expected)),
        strict=True,
    ):  # fmt: skip
        if theirs is None:
            assert ours is None or (ours == 0).all()
        else:
            size = theirs.abs().max().item() if theirs.numel() else 0
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10 * size + 1e-12)


@pytest.mark.parametrize("k", [1, 2])
def test_double_backward_is_refused_in_one_sentence(k):
    layer = MoE(MoEConfig(4, 3, 3, k, router=RouterConfig(renormalize=False)))
    x = torch.randn(5, 4, requires_grad=True)
    grad = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="has no gradient of its own: differentiate through this layer once"):
        grad.sum().backward()
