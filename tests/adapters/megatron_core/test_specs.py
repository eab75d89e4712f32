"""Our layer in specs of layers and of blocks, its contract in the layer around it, recompute, padding, refusals."""

import functools

import pytest
import torch

from . import host
from .host import (
    ModuleSpec,
    TransformerBlock,
    build_module,
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_layer_local_submodules,
    megatron_core,
)


def block(c, spec):
    return TransformerBlock(config=c, spec=spec)


def mask():
    return torch.triu(torch.ones(host.SEQUENCE, host.SEQUENCE, dtype=torch.bool), 1)[None, None]


def test_layer_spec():
    c = host.config()
    spec = get_gpt_layer_local_spec(num_experts=host.EXPERTS)
    theirs = block(c, spec)
    ours = block(c, megatron_core.use_fastmoe_cpp(spec))
    assert [type(layer.mlp) for layer in ours.layers] == [megatron_core.FastMoELayer] * 2
    assert [type(layer.mlp) for layer in theirs.layers] == [host.MoELayer] * 2  # the given spec is as it was
    assert all(layer.is_moe_layer for layer in ours.layers)
    assert [layer.mlp.router.layer_number for layer in ours.layers] == [1, 2]
    ours.load_state_dict(theirs.state_dict())
    x = host.hidden_states()
    host.assert_close(ours(x, mask()).detach(), theirs(x, mask()).detach(), "output")


def test_block_of_dense_and_moe_layers():
    c = host.config(moe_layer_freq=2, ffn_hidden_size=20)
    ours = block(c, megatron_core.use_fastmoe_cpp(get_gpt_decoder_block_spec(c, use_transformer_engine=False)))
    assert [type(layer.mlp).__name__ for layer in ours.layers] == ["FastMoELayer", "MLP"]


def test_module_spec_of_an_older_release():
    spec = ModuleSpec(module=host.MoELayer, submodules=megatron_core.moe_submodules())
    layer = build_module(megatron_core.use_fastmoe_cpp(spec), config=host.config())
    assert type(layer) is megatron_core.FastMoELayer and layer(host.hidden_states())[1] is None


@host.before_0_18
def test_submodules_and_mlp():
    submodules = get_gpt_layer_local_submodules(num_experts=host.EXPERTS)
    assert megatron_core.use_fastmoe_cpp(submodules).mlp.func is megatron_core.FastMoELayer
    parts = megatron_core.use_fastmoe_cpp(submodules.mlp, parts_only=True)
    assert parts.func is host.MoELayer and parts.keywords["submodules"].router is megatron_core.TopKRouter


def test_installed():
    undo = megatron_core.install()
    try:
        c = host.config(moe_layer_freq=2, ffn_hidden_size=20)
        ours = block(c, get_gpt_decoder_block_spec(c, use_transformer_engine=False))
    finally:
        undo()
    assert [type(layer.mlp).__name__ for layer in ours.layers] == ["FastMoELayer", "MLP"]
    theirs = block(c, get_gpt_decoder_block_spec(c, use_transformer_engine=False))
    assert type(theirs.layers[0].mlp) is host.MoELayer


def test_a_spec_without_experts_is_refused():
    with pytest.raises(ValueError, match="spec must hold a MoELayer"):
        megatron_core.use_fastmoe_cpp(get_gpt_layer_local_spec())


def test_the_layer_by_itself():
    spec = functools.partial(megatron_core.FastMoELayer, submodules=megatron_core.moe_submodules())
    layer = spec(config=host.config(moe_shared_expert_intermediate_size=8))
    output, bias = layer(host.hidden_states())
    assert bias is None and output.shape == (host.SEQUENCE, host.BATCH, host.HIDDEN)
    assert type(layer.shared_experts).__name__ == "SharedExpertMLP"
    assert type(megatron_core.FastMoELayer(host.config())) is megatron_core.FastMoELayer


@pytest.mark.parametrize("how", ["field", "modules"])
def test_recompute(how):
    changes = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.5, "moe_z_loss_coeff": 0.1,
               "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}  # fmt: skip
    plain = host.our_layer(host.config(**changes), host.host_layer(host.config(**changes)))
    again = {"moe_layer_recompute": True}
    if how == "modules":
        again = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    ours = host.our_layer(host.config(**changes, **again), plain)
    assert ours.moe_layer_recompute and not plain.moe_layer_recompute
    x = host.hidden_states()
    found, expected = host.step(ours, x), host.step(plain, x)
    assert torch.equal(found[0], expected[0])
    for name, gradient in expected[1].items():
        assert torch.equal(found[1][name], gradient), name
    assert torch.equal(ours.router.local_tokens_per_expert, plain.router.local_tokens_per_expert)


def test_expert_parameters_are_marked():
    layer = host.our_layer(host.config(add_bias_linear=True))
    marked = {name for name, p in layer.named_parameters() if not getattr(p, "allreduce", True)}
    assert marked == {f"experts.linear_fc{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}


def test_start_of_the_weights():
    layer = host.our_layer(
        host.config(init_method_std=0.5, num_layers=8, add_bias_linear=True, moe_ffn_hidden_size=512)
    )
    fc1, fc2 = layer.experts.linear_fc1, layer.experts.linear_fc2
    assert fc1.weight.std().item() == pytest.approx(0.5, rel=0.05)
    assert fc2.weight.std().item() == pytest.approx(0.5 / 4, rel=0.05)  # scaled by sqrt(2 * layers)
    assert not fc1.bias.any() and not fc2.bias.any()
    assert not torch.equal(fc1.weight[0], fc1.weight[1])


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (7, 2)])
def test_odd_sizes(shape):
    layer = host.our_layer(host.config(moe_z_loss_coeff=0.1, moe_router_load_balancing_type="aux_loss",
                                       moe_aux_loss_coeff=0.1))  # fmt: skip
    x = torch.randn(*shape, host.HIDDEN, requires_grad=True)
    output, _ = layer(x)
    output.sum().backward()
    assert output.shape == x.shape and all(p.grad.isfinite().all() for p in layer.parameters())


def test_bad_input():
    layer = host.our_layer(host.config())
    x = host.hidden_states()
    with pytest.raises(ValueError, match=r"hidden_states must have shape \[s, b, 16\], got \[6, 3, 8\]"):
        layer(x[..., :8])
    with pytest.raises(ValueError, match=r"padding_mask must have shape \[b, s\] = \[3, 6\], got \[6, 3\]"):
        layer(x, padding_mask=torch.zeros(6, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="intermediate_tensors must be None"):
        layer(x, intermediate_tensors=(x, x))


@pytest.mark.parametrize("parts_only", [False, True], ids=["layer", "parts"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_gradient_accumulation_fusion(parts_only, wrapped):
    """Over micro-batches the experts' gradients are added to main_grad, and the wrapper's hook is told so."""
    c = host.config(params_dtype=torch.bfloat16, bf16=True)
    plain = host.our_layer(c, host.host_layer(c), parts_only)
    fused = host.our_layer(host.config(params_dtype=torch.bfloat16, bf16=True), plain, parts_only)
    fused.config.gradient_accumulation_fusion = True
    experts = [fused.experts.linear_fc1.weight, fused.experts.linear_fc2.weight]
    sums, sizes = [0.0, 0.0], [0.0, 0.0]
    for weight in experts:
        weight.main_grad = torch.zeros(weight.shape)
        if wrapped:
            weight.grad_added_to_main_grad = False
    for _ in range(3):
        x = host.hidden_states(torch.bfloat16)
        found, expected = host.step(fused, x), host.step(plain, x)
        assert torch.equal(found[0], expected[0])
        for name, gradient in expected[1].items():
            if "linear_fc" not in name:
                assert torch.equal(found[1][name], gradient), name
            else:
                assert (found[1][name] is not None) == wrapped
                i = int("fc2" in name)
                sums[i], sizes[i] = sums[i] + gradient.double(), sizes[i] + gradient.double().abs()
    for weight, total, size in zip(experts, sums, sizes, strict=True):
        assert not wrapped or weight.grad_added_to_main_grad
        # the other layer rounds every micro-batch's gradient
        assert ((weight.main_grad.double() - total).abs() <= 2**-8 * size + 1e-6 * size.max()).all() and size.any()
        assert (weight.main_grad != weight.main_grad.bfloat16()).any()
