# ruff: noqa: E402
"""Models of transformers 4 with our blocks, beside the same models with their own."""

import copy
import pickle

import pytest
import torch

from ..conftest import require

require("transformers", "4")

from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from fastmoe_cpp.integrations.transformers import blocks, register, replace_moe_blocks

COMMON = {
    "vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "intermediate_size": 24, "num_experts_per_tok": 2, "initializer_range": 0.15, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "mixtral": lambda **k: MixtralConfig(**COMMON | k, num_local_experts=6),
    "qwen2_moe": lambda **k: Qwen2MoeConfig(
        **COMMON | k, num_experts=6, moe_intermediate_size=16, shared_expert_intermediate_size=20
    ),
    "qwen3_moe": lambda **k: Qwen3MoeConfig(
        **COMMON | k, num_experts=6, moe_intermediate_size=16, head_dim=8, norm_topk_prob=True
    ),
    "olmoe": lambda **k: OlmoeConfig(**COMMON | k, num_experts=6),
    "deepseek_v3": lambda **k: DeepseekV3Config(
        **COMMON | k, n_routed_experts=8, n_group=4, topk_group=2, moe_intermediate_size=16, first_k_dense_replace=1,
        q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    ),
}  # fmt: skip
NAMES = {family.module: (family.gate, family.up, family.down) for family in blocks.FAMILIES}
WITH_LOGITS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")


def make(family, **changes):
    model = AutoModelForCausalLM.from_config(FAMILIES[family](**changes), attn_implementation="eager").eval()
    with torch.no_grad():
        for name, tensor in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                tensor.copy_(torch.randn(tensor.shape) * 0.2)
    return model


def pair(family, **changes):
    theirs = make(family, **changes)
    ours = replace_moe_blocks(copy.deepcopy(theirs))
    assert block_of(ours) is not None and block_of(theirs) is None
    return theirs, ours


def block_of(model):
    """The last of our blocks."""
    found = [m for m in model.modules() if isinstance(m, (blocks._SoftmaxBlock, blocks._DeepseekBlock))]
    return found[-1] if found else None


def tokens(batch=2, length=12):
    return torch.randint(3, 48, (batch, length))


def relative(actual, expected):
    return float((actual - expected).abs().max() / expected.abs().max())


def gradients(model, family):
    """By the host's names."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, blocks.StackedExperts):
            inner = module.config.intermediate_size
            gate, up, down = NAMES[family]
            for expert in range(module.config.num_experts):
                grad = module.gate_up_proj.grad[expert]
                found[f"{name}.{expert}.{gate}.weight"], found[f"{name}.{expert}.{up}.weight"] = (
                    grad[:inner],
                    grad[inner:],
                )
                found[f"{name}.{expert}.{down}.weight"] = module.down_proj.grad[expert]
    for name, parameter in model.named_parameters():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            found[name] = parameter.grad
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_loss_and_every_gradient(family):
    theirs, ours = pair(family)
    ids = tokens()
    results = [model(ids, labels=ids) for model in (theirs, ours)]
    for result in results:
        result.loss.backward()
    assert relative(results[1].logits, results[0].logits) < 3e-6
    assert relative(results[1].loss, results[0].loss) < 1e-6
    grads = gradients(ours, family)
    expected = dict(theirs.named_parameters())
    assert grads.keys() == expected.keys()
    for name, parameter in expected.items():
        if parameter.grad is None or not parameter.grad.any():  # an expert that no token chose
            assert grads[name] is None or (grads[name] == 0).all(), name
        else:
            assert relative(grads[name], parameter.grad) < 3e-5, name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_block_returns_what_its_block_returned(family, dtype):
    theirs, ours = pair(family)
    if family == "deepseek_v3" and dtype == torch.float64:
        pytest.skip("the host's block can't compute in float64")
    path = next(name for name, m in ours.named_modules() if m is block_of(ours))
    one, other = theirs.get_submodule(path).to(dtype), ours.get_submodule(path).to(dtype)
    assert isinstance(other, type(one))
    x = torch.randn(3, 5, 32, dtype=dtype)
    expected, actual = one(x), other(x)
    if family in WITH_LOGITS:
        assert isinstance(actual, tuple) and len(actual) == len(expected) == 2
        assert torch.equal(actual[1], expected[1]) and actual[1].dtype == dtype
        expected, actual = expected[0], actual[0]
    assert actual.dtype == dtype and actual.shape == x.shape
    # the host keeps float64 scores in float32
    bound = {torch.float64: 3e-6, torch.float32: 3e-6, torch.bfloat16: 0.02}[dtype]
    assert relative(actual.double(), expected.double()) < bound


@pytest.mark.parametrize("family", WITH_LOGITS)
def test_router_logits_and_balance_loss(family):
    theirs, ours = pair(family)
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    results = [model(ids, attention_mask=mask, labels=ids, output_router_logits=True) for model in (theirs, ours)]
    assert len(results[1].router_logits) == len(results[0].router_logits) == 2
    for expected, actual in zip(*(result.router_logits for result in results), strict=True):
        assert relative(actual, expected) < 3e-6
    assert relative(results[1].aux_loss, results[0].aux_loss) < 1e-6
    for result in results:
        result.aux_loss.backward()
    for name, parameter in theirs.named_parameters():
        if name.endswith("mlp.gate.weight") or "sparse_moe.gate" in name:
            assert parameter.grad.abs().max() > 0
            assert relative(ours.get_parameter(name).grad, parameter.grad) < 3e-5, name


@pytest.mark.parametrize("family", WITH_LOGITS)
def test_a_model_that_has_returned_its_router_logits_is_served(family):
    """The host then leaves the blocks' own forward in some blocks themselves, where it would hide ours."""
    model, ids = make(family), tokens()
    expected = model(ids, output_router_logits=True)
    served = replace_moe_blocks(copy.deepcopy(model))
    assert all("forward" not in vars(module) for module in served.modules())
    actual = served(ids, output_router_logits=True)
    assert relative(actual.logits, expected.logits) < 1e-5
    for one, other in zip(actual.router_logits, expected.router_logits, strict=True):
        assert relative(one, other) < 3e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_fifty_steps_of_training(family):
    ids = tokens(4, 16)
    losses = []
    for model in pair(family):
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, foreach=True)
        mine = []
        for parameter in model.parameters():  # a single expert without tokens takes its step as a stacked one does
            parameter.grad = torch.zeros_like(parameter)
        for _ in range(50):
            loss = model(ids, labels=ids).loss
            optimizer.zero_grad(set_to_none=False)
            loss.backward()
            optimizer.step()
            mine.append(float(loss))
        losses.append(mine)
    assert losses[0][-1] < 0.8 * losses[0][0]
    assert max(abs(a - b) / a for a, b in zip(*losses, strict=True)) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_token_for_token(family):
    theirs, ours = pair(family)
    ids = tokens(2, 6)
    kwargs = {"max_new_tokens": 20, "do_sample": False, "attention_mask": torch.ones_like(ids), "eos_token_id": None}
    expected = theirs.generate(ids, **kwargs)
    assert expected.shape == (2, 26)
    assert torch.equal(ours.generate(ids, **kwargs), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load(family, tmp_path):
    """The files are those of the model without us; state dicts go both ways."""
    theirs, ours = pair(family)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name
    ids = tokens()
    loaded = replace_moe_blocks(
        AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    ).eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, ours(ids).logits)
    state = theirs.state_dict()
    assert ours.state_dict().keys() == state.keys()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(1.5)
    other = make(family)
    other.load_state_dict(ours.state_dict())
    ours.load_state_dict(state)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, state[name]), name
        assert "bias" in name or torch.equal(other.state_dict()[name], state[name] * 1.5), name


def test_a_wrong_state_dict_is_refused_as_the_host_does():
    ours = replace_moe_blocks(make("qwen3_moe"))
    prefix = "model.layers.1.mlp.experts."
    state = ours.state_dict()
    del state[f"{prefix}3.up_proj.weight"]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{prefix}3.up_proj.weight"'):
        ours.load_state_dict(state)
    state = ours.state_dict() | {f"{prefix}6.up_proj.weight": torch.zeros(16, 32)}
    with pytest.raises(RuntimeError, match=f'Unexpected key.*"{prefix}6.up_proj.weight"'):
        ours.load_state_dict(state)
    state = ours.state_dict() | {f"{prefix}0.down_proj.weight": torch.zeros(32, 15)}
    with pytest.raises(RuntimeError, match=r"0.down_proj.weight must have shape \[32, 16\], got \[32, 15\]"):
        ours.load_state_dict(state)


def test_training_mode_jitter_and_frozen_weights_stay():
    model = make("mixtral", router_jitter_noise=0.3).train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    replace_moe_blocks(model)
    block = block_of(model)
    assert block.training and block.experts.training
    assert not any(p.requires_grad for p in model.parameters())
    x = torch.randn(2, 4, 32)
    before = x.clone()
    # the jitter scales router and experts alike; the caller's tensor is not touched
    assert not torch.equal(block(x)[1], block(x)[1])
    assert torch.equal(x, before)
    block.eval()
    assert torch.equal(block(x)[1], block(x)[1])


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_gradient_checkpointing_and_pickle(family):
    model = replace_moe_blocks(make(family)).train()
    ids = tokens()

    def grads():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for name, grad in grads().items():
        # not to the bit: transformers 4 then attends without its cache, on some CPUs by other sums, as it does with
        # blocks of its own
        assert (grad - plain[name]).abs().max() <= 2e-6 * plain[name].abs().max(), name
    again = pickle.loads(pickle.dumps(model)).eval()
    model.eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_a_block_compiles_in_one_graph(family):
    block = block_of(replace_moe_blocks(make(family)))
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 7, 32)
    expected, actual = block(x), compiled(x)
    if isinstance(expected, tuple):
        expected, actual = expected[0], actual[0]
    assert relative(actual, expected) < 1e-6


def test_refused_by_name_and_left_as_they_were():
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 16,
        "intermediate_size": 16,
    }
    dense = AutoModelForCausalLM.from_config(LlamaConfig(**small))
    with pytest.raises(ValueError, match="LlamaForCausalLM can't be served: .* found none"):
        replace_moe_blocks(dense)
    gpt_oss = AutoModelForCausalLM.from_config(GptOssConfig(**small, num_local_experts=4, head_dim=8))
    with pytest.raises(ValueError, match="GptOssForCausalLM can't be served: .* found GptOssExperts"):
        replace_moe_blocks(gpt_oss)
    model = make("qwen3_moe", hidden_act="mish")
    with pytest.raises(ValueError, match="Qwen3MoeForCausalLM can't be served: .* its activation is MishActivation"):
        replace_moe_blocks(model)
    assert block_of(model) is None


def adapter(model, experts):
    experts[2].up_proj = nn.Sequential(experts[2].up_proj)
    return r"experts\.2\.up_proj is a Sequential and not a plain Linear"


def mixed_dtypes(model, experts):
    experts[1].double()
    return r"experts\.1\.gate_proj differs from experts\.0 \(\[16, 32\] torch.float32 .* here \[16, 32\] torch.float64"


def half_frozen(model, experts):
    experts[4].down_proj.requires_grad_(False)
    return r"experts\.4\.down_proj differs .*requires_grad=False"


def empty(model, experts):
    experts.to("meta")
    return r"experts\.0\.gate_proj has no values yet"


def hooked(model, experts):
    experts[5].gate_proj.register_forward_hook(print)
    return r"experts\.5 has hooks"


def patched(model, experts):
    model.model.layers[1].mlp.forward = lambda x: (x, None)
    return "its forward was replaced"


@pytest.mark.parametrize(
    "change", [adapter, mixed_dtypes, half_frozen, empty, hooked, patched], ids=lambda f: f.__name__
)
def test_a_block_that_was_changed_is_refused(change):
    """In the second block: the first one is left as it was too."""
    model = make("qwen3_moe")
    message = change(model, model.model.layers[1].mlp.experts)
    with pytest.raises(ValueError, match=f"of model.layers.1.mlp, {message}"):
        replace_moe_blocks(model)
    assert block_of(model) is None


def test_twice_is_refused():
    model = replace_moe_blocks(make("olmoe"))
    with pytest.raises(ValueError, match="OlmoeForCausalLM's MoE blocks were replaced before: model.layers.0.mlp"):
        replace_moe_blocks(model)


def test_there_is_no_registry():
    with pytest.raises(ImportError, match=r"register\(\) needs transformers 5.* use replace_moe_blocks\(model\)"):
        register()
