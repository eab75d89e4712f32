"""Equal to transformers' own MoE blocks: outputs, and gradients of the input and of every weight."""

import contextlib
import dataclasses

import pytest
import torch
from torch.overrides import TorchFunctionMode

pytest.importorskip("transformers", minversion="5.10")

from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek_v3
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.mixtral import modeling_mixtral as mixtral
from transformers.models.olmoe import modeling_olmoe as olmoe
from transformers.models.qwen2_moe import modeling_qwen2_moe as qwen2_moe
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3_moe

from fastmoe_cpp import MoE, MoEConfig, losses

HIDDEN, EXPERTS = 48, 12
COMMON = {"hidden_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 2, "num_experts_per_tok": 3}
FAMILIES = {
    "mixtral": (
        mixtral.MixtralSparseMoeBlock,
        lambda: mixtral.MixtralConfig(**COMMON, intermediate_size=40, num_local_experts=EXPERTS),
    ),
    "qwen2_moe": (
        qwen2_moe.Qwen2MoeSparseMoeBlock,
        lambda: qwen2_moe.Qwen2MoeConfig(
            **COMMON, moe_intermediate_size=40, num_experts=EXPERTS, shared_expert_intermediate_size=56
        ),
    ),
    "qwen3_moe": (
        qwen3_moe.Qwen3MoeSparseMoeBlock,
        lambda: qwen3_moe.Qwen3MoeConfig(**COMMON, moe_intermediate_size=40, num_experts=EXPERTS, norm_topk_prob=True),
    ),
    "olmoe": (
        olmoe.OlmoeSparseMoeBlock,
        lambda: olmoe.OlmoeConfig(**COMMON, intermediate_size=40, num_experts=EXPERTS, hidden_act="gelu"),
    ),
    "deepseek_v3": (
        deepseek_v3.DeepseekV3MoE,
        lambda: deepseek_v3.DeepseekV3Config(
            **COMMON, moe_intermediate_size=40, n_routed_experts=EXPERTS, n_group=4, topk_group=2, n_shared_experts=2
        ),
    ),
    "gpt_oss": (
        gpt_oss.GptOssMLP,
        lambda: gpt_oss.GptOssConfig(**COMMON, intermediate_size=40, num_local_experts=EXPERTS),
    ),
}
RENAMED = {
    "gate.weight": "router.weight",
    "experts.gate_up_proj_bias": "experts.gate_up_bias",
    "experts.down_proj_bias": "experts.down_bias",
    "shared_expert_gate.weight": "shared_experts.gate",
}


def make(family, dtype, device):
    """The host's block in float64, the same rounded to dtype, and our layer with those weights."""
    kind, config = FAMILIES[family]
    config = config()
    config._experts_implementation = "eager"
    block = kind(config).to(device, dtype)
    with torch.no_grad():
        for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
            # wide enough for clamps to bite and routing to be decided; a 16-bit bias must stay what it is
            tensor.copy_(torch.randn(tensor.shape) * (0.3 if "bias" in name else 0.15))
            if "correction" in name:
                tensor.copy_((tensor * 8).round() / 8)
    exact = kind(config).to(device, torch.float64)
    exact.load_state_dict(block.state_dict())
    return exact, block, MoE.from_hf_block(block, config)


class StayWide(TorchFunctionMode):
    """The hosts' routers drop to float32 whatever they are given; for a float64 reference they must not."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        wide = args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64
        if wide and (func is torch.Tensor.float or (func is torch.Tensor.type and args[1:] == (torch.float32,))):
            return args[0]
        if wide and func is torch.nn.functional.softmax and kwargs.get("dtype") == torch.float32:
            kwargs = kwargs | {"dtype": torch.float64}
        return func(*args, **kwargs)


def run(block, x, grad):
    x = x.detach().clone().requires_grad_()
    with StayWide() if x.dtype == torch.float64 else contextlib.nullcontext():
        y = block(x)
    y = y[0] if isinstance(y, tuple) else y
    y.backward(grad)
    return y.detach(), {"x": x.grad} | {name: p.grad for name, p in block.named_parameters()}


def as_ours(grads):
    """The host's gradients under our names and layouts."""
    ours = {}
    for name, grad in grads.items():
        if name.startswith("shared_expert") and "gate_proj" in name:
            ours["shared_experts.gate_up_proj"] = torch.cat([grad, grads[name.replace("gate_proj", "up_proj")]])
        elif name.startswith("shared_expert") and "down_proj" in name:
            ours["shared_experts.down_proj"] = grad
        elif name.startswith("shared_expert") and "up_proj" in name:
            continue
        else:
            transposed = "experts.gate_up_proj_bias" in grads and name in ("experts.gate_up_proj", "experts.down_proj")
            ours[RENAMED.get(name, name)] = grad.mT if transposed else grad
    return ours


def decided(exact, layer, x, margin):
    """x with only those tokens whose choice of experts does not hang on rounding."""
    routed = layer.double() if x.dtype == torch.float64 else MoE(layer.config, device=x.device).double()
    routed.load_state_dict({k: v.double() if v.is_floating_point() else v for k, v in layer.state_dict().items()})
    noise = 1 + margin * torch.randn(16, *x.shape, dtype=torch.float64, device=x.device)
    ids = routed.router((x.double() * noise).reshape(-1, HIDDEN)).topk_ids.sort(-1).values
    ids = ids.reshape(16, x.shape[0], -1)
    return x[(ids == ids[0]).all(dim=(0, 2))]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_equal_to_transformers(family, dtype, device):
    exact, block, layer = make(family, dtype, device)
    x = torch.randn(192, HIDDEN, device=device, dtype=dtype)
    if dtype == torch.bfloat16:
        x = decided(exact, layer, x, margin=0.02)
    assert x.shape[0] >= 48
    x = x[: x.shape[0] // 2 * 2].reshape(2, -1, HIDDEN)
    grad = torch.randn_like(x)
    y_exact, g_exact = run(exact, x.double(), grad.double())
    y_host, g_host = run(block, x, grad)
    y, g = run(layer, x, grad)
    assert y.dtype == dtype and y.shape == x.shape
    g_exact, g_host = as_ours(g_exact), as_ours(g_host)
    assert set(g) == set(g_exact)
    tolerance = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: None}[dtype]
    for name in ["y", *g]:
        ours, host, expected = (y, y_host, y_exact) if name == "y" else (g[name], g_host[name], g_exact[name])
        assert ours.dtype == dtype, name
        size = expected.abs().max()
        if tolerance is not None:
            assert (ours - host).abs().max() <= tolerance * size, name
        if dtype == torch.float64:
            continue  # the host is the reference
        error, theirs = (ours - expected).abs().max(), (host - expected).abs().max()
        bar = (2 if name == "y" else 3) * theirs + torch.finfo(dtype).eps * size
        assert error <= bar, f"{name}: {error / size:.2e} of the largest, the host {theirs / size:.2e}"


@pytest.mark.parametrize("family", FAMILIES)
def test_config_is_read_from_the_host(family):
    config = FAMILIES[family][1]()
    c = MoEConfig.from_hf(config, capacity_factor=1.5)
    assert (c.hidden_size, c.intermediate_size, c.num_experts, c.top_k) == (HIDDEN, 40, EXPERTS, 3)
    assert c.capacity_factor == 1.5


def test_gpt_oss_has_its_own_curve():
    """Fields of the published configurations that the model honours from transformers 5.23 on."""
    config = FAMILIES["gpt_oss"][1]()
    plain = MoEConfig.from_hf(config)
    assert (plain.activation, plain.activation_alpha, plain.activation_limit) == ("clamped_swiglu", 1.702, 7.0)
    config.swiglu_alpha, config.swiglu_limit = 1.25, 0.5
    own = MoEConfig.from_hf(config)
    assert own == dataclasses.replace(plain, activation_alpha=1.25, activation_limit=0.5)


def test_defaults_of_the_host_agree_with_the_preset():
    published = {
        "mixtral-8x7b": mixtral.MixtralConfig(),
        "qwen1.5-moe-a2.7b": qwen2_moe.Qwen2MoeConfig(),
        "deepseek-v3": deepseek_v3.DeepseekV3Config(),
        "gpt-oss-120b": gpt_oss.GptOssConfig(),
    }
    for name, config in published.items():
        assert MoEConfig.from_hf(config) == MoEConfig.preset(name), name


def test_mixtrals_jitter(device):
    config = FAMILIES["mixtral"][1]()
    config.router_jitter_noise = 0.1
    config._experts_implementation = "eager"
    block = mixtral.MixtralSparseMoeBlock(config).to(device)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.2)
    layer = MoE.from_hf_block(block, config)
    x = torch.randn(2, 16, HIDDEN, device=device)
    torch.manual_seed(1)
    expected = block(x.clone())  # the host multiplies its input in place
    torch.manual_seed(1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(layer.eval()(x), expected, rtol=1e-2)


def test_a_block_that_does_not_fit_changes_nothing():
    config = FAMILIES["mixtral"][1]()
    block = mixtral.MixtralSparseMoeBlock(config)
    layer = MoE(MoEConfig.from_hf(config, intermediate_size=41))
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    with pytest.raises(ValueError, match=r"gate_up_proj must have shape \[12, 82, 48\], the block has \[12, 80, 48\]"):
        layer.load_hf_block(block)
    layer.load_state_dict(before)
    with pytest.raises(ValueError, match="one side lacks shared_experts.down_proj"):
        MoE(MoEConfig.from_hf(config, shared_intermediate_size=4)).load_hf_block(block)
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("masked", [False, True])
def test_balance_loss_over_layers(masked, device):
    logits = [torch.randn(2 * 9, EXPERTS, device=device, requires_grad=True) for _ in range(3)]
    mask = (torch.arange(9) < torch.tensor([[9], [5]])).long().to(device) if masked else None
    expected = mixtral.load_balancing_loss_func(tuple(logits), EXPERTS, 3, mask)
    loss = losses.huggingface(logits, EXPERTS, 3, mask)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    ours = torch.autograd.grad(loss, logits)
    for a, b in zip(ours, torch.autograd.grad(expected, logits), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("empty", ["layer", "block"])
def test_weights_without_values_are_refused(empty):
    kind, config = FAMILIES["mixtral"]
    block = kind(config())
    layer = MoE(MoEConfig.from_hf(config()), device="meta" if empty == "layer" else None)
    with pytest.raises(ValueError, match=f"^the {empty}'s .* must be on a real device, it is on meta"):
        layer.load_hf_block(block.to("meta") if empty == "block" else block)
