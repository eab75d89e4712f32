# ruff: noqa: E402
"""Whole models of transformers 5 with our experts, beside the same models with their own eager ones."""

import copy
import json

import pytest
import torch

from ..conftest import require

require("transformers", "5")

from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DogeConfig,
    DogeForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from fastmoe_cpp.integrations.transformers import experts, register, replace_moe_blocks

from . import families


def pair(family, **changes):
    """The model with its eager experts, and a copy with ours."""
    theirs = families.make(family, **changes)
    ours = replace_moe_blocks(copy.deepcopy(theirs))
    assert theirs.config._experts_implementation == "eager"
    return theirs, ours


def served(model):
    return [module for module in model.modules() if experts.takes_experts(module)]


def relative(actual, expected):
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.fixture
def calls(monkeypatch):
    """How often our function ran: a model that never asks for it would agree with itself."""
    counted = []

    def counting(self, *args):
        counted.append(self)
        return experts.experts_forward(self, *args)

    monkeypatch.setattr(
        experts, "register", lambda: experts.registry.ALL_EXPERTS_FUNCTIONS.register("fastmoe_cpp", counting)
    )
    yield counted
    experts.registry.ALL_EXPERTS_FUNCTIONS.register("fastmoe_cpp", experts.experts_forward)


@pytest.mark.parametrize("family", families.MAIN + families.MORE)
def test_logits_loss_and_every_gradient(family, calls):
    theirs, ours = pair(family)
    ids = families.tokens()
    expected = theirs(ids, labels=ids)
    expected.loss.backward()
    assert not calls
    actual = ours(ids, labels=ids)
    actual.loss.backward()
    assert len(calls) == len(served(ours)) >= 1
    assert relative(actual.logits, expected.logits) < 3e-6
    assert relative(actual.loss, expected.loss) < 1e-6
    grads = {name: p.grad for name, p in ours.named_parameters()}
    checked = 0
    for name, parameter in theirs.named_parameters():
        if parameter.grad is None or parameter.grad.abs().max() < 1e-7:  # unused, or nothing but rounding
            assert grads[name] is None or grads[name].abs().max() < 1e-6, name
            continue
        assert relative(grads[name], parameter.grad) < 3e-5, name
        checked += "experts." in name
    assert checked >= 2


ROUTED = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "minimax", "jamba", "phimoe")


@pytest.mark.parametrize("family", ROUTED)
def test_router_logits_and_balance_loss(family):
    """They are recorded as before, and the balance loss alone trains the routers as before."""
    theirs, ours = pair(family)
    ids = families.tokens()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    results = [model(ids, attention_mask=mask, labels=ids, output_router_logits=True) for model in (theirs, ours)]
    assert len(results[0].router_logits) == len(results[1].router_logits) >= 1
    for expected, actual in zip(*(result.router_logits for result in results), strict=True):
        assert relative(actual, expected) < 3e-6
    assert relative(results[1].aux_loss, results[0].aux_loss) < 1e-6
    for result in results:
        result.aux_loss.backward()
    gates = [
        name for name, p in theirs.named_parameters() if p.grad is not None and ("gate.w" in name or "router" in name)
    ]
    assert gates
    grads = dict(ours.named_parameters())
    for name in gates:
        expected = theirs.get_parameter(name).grad
        assert expected.abs().max() > 0 and relative(grads[name].grad, expected) < 3e-5, name


@pytest.mark.parametrize("family", families.MAIN)
def test_fifty_steps_of_training(family):
    """AdamW on text-like data: the same losses, which fall."""
    models = pair(family)
    ids = families.tokens(4, 16)
    losses = []
    for model in models:
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, foreach=True)
        mine = []
        for _ in range(50):
            loss = model(ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            mine.append(float(loss))
        losses.append(mine)
    assert losses[0][-1] < 0.8 * losses[0][0]
    worst = max(abs(a - b) / a for a, b in zip(*losses, strict=True))
    assert worst < 1e-4


@pytest.mark.parametrize("family", families.MAIN)
def test_generate_token_for_token(family):
    theirs, ours = pair(family)
    ids = families.tokens(2, 6)
    kwargs = {"max_new_tokens": 20, "do_sample": False, "attention_mask": torch.ones_like(ids), "eos_token_id": None}
    expected = theirs.generate(ids, **kwargs)
    assert expected.shape == (2, 26)
    assert torch.equal(ours.generate(ids, **kwargs), expected)


@pytest.mark.parametrize("family", families.MAIN)
def test_save_and_load(family, tmp_path):
    """The files are those of the model without us, bit by bit; loading asks for ours by name."""
    theirs, ours = pair(family)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name
    assert "fastmoe_cpp" not in json.dumps(json.loads((tmp_path / "ours/config.json").read_text()))
    register()
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", experts_implementation="fastmoe_cpp", attn_implementation="eager"
    ).eval()
    assert all(module.config._experts_implementation == "fastmoe_cpp" for module in served(loaded))
    before, after = ours.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys() == theirs.state_dict().keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    ids = families.tokens()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, ours(ids).logits)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "hy_v4"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(family, reentrant):
    """The bits of the gradients without it."""
    model = replace_moe_blocks(families.make(family)).train()
    ids = families.tokens()

    def grads():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    again = grads()
    assert plain.keys() == again.keys()
    for name, grad in plain.items():
        assert torch.equal(again[name], grad), name


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_compiles_in_one_graph(family):
    model = replace_moe_blocks(families.make(family))
    ids = families.tokens()
    torch._dynamo.reset()
    compiled = torch.compile(lambda ids: model(ids, use_cache=False).logits, fullgraph=True, backend="aot_eager")
    assert relative(compiled(ids), model(ids, use_cache=False).logits) < 1e-6
    model.zero_grad()
    compiled(ids).square().mean().backward()
    compiled_grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(ids, use_cache=False).logits.square().mean().backward()
    assert any("experts." in name for name in compiled_grads)
    for name, grad in compiled_grads.items():
        assert relative(grad, model.get_parameter(name).grad) < 1e-5, name


def test_bfloat16_and_autocast_train():
    """A bfloat16 model, and a float32 one under autocast: finite, and near the eager model's loss."""
    for dtype in (torch.bfloat16, torch.float32):
        theirs, ours = (model.to(dtype) for model in pair("gpt_oss"))
        ids = families.tokens()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            expected, actual = theirs(ids, labels=ids).loss, ours(ids, labels=ids).loss
        actual.backward()
        assert relative(actual, expected) < 0.02
        assert all(p.grad.isfinite().all() for p in ours.parameters() if p.grad is not None)


def test_a_dense_model_is_refused():
    """transformers itself would take the name and go on without a word."""
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 16}
    model = LlamaForCausalLM(LlamaConfig(**small, intermediate_size=16))
    with pytest.raises(ValueError, match="LlamaForCausalLM can't be served: .* none of its modules are experts"):
        replace_moe_blocks(model)


def test_experts_outside_the_registry_are_refused_by_name():
    config = Llama4TextConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8, vocab_size=16,
        intermediate_size=16, intermediate_size_mlp=16, num_local_experts=2, interleave_moe_layer_step=1,
        pad_token_id=0,
    )  # fmt: skip
    before = config._experts_implementation
    model = Llama4ForCausalLM(config)
    with pytest.raises(ValueError, match="Llama4ForCausalLM can't be served: .* its experts are Llama4TextExperts"):
        replace_moe_blocks(model)
    assert model.config._experts_implementation in (before, "eager")


def test_experts_that_are_named_moe_are_refused_by_name():
    config = DogeConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=16,
        intermediate_size=16, is_moe=True, num_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    with pytest.raises(ValueError, match="DogeForCausalLM can't be served: .* its experts are DogeCDMoE"):
        replace_moe_blocks(DogeForCausalLM(config))


def test_a_copy_of_the_configuration_is_reached(calls):
    """Dots3-Note's vision tower keeps one a layer, which the model's set_experts_implementation does not know of."""
    theirs = families.make("mixtral")
    ours = copy.deepcopy(theirs)
    own = served(ours)[-1]
    own.config = copy.deepcopy(own.config)
    replace_moe_blocks(ours)
    ids = families.tokens()
    assert relative(ours(ids).logits, theirs(ids).logits) < 3e-6
    assert own in calls


def test_what_is_no_pretrained_model_is_refused():
    inner = families.make("mixtral")
    with pytest.raises(ValueError, match="must be a transformers PreTrainedModel, got Sequential"):
        replace_moe_blocks(nn.Sequential(inner))


def test_quantised_experts_are_refused_by_name():
    model = families.make("mixtral")
    experts_of = served(model)[-1]
    down = experts_of.down_proj.detach().to(torch.float8_e4m3fn)
    experts_of.down_proj = nn.Parameter(down, requires_grad=False)
    with pytest.raises(ValueError, match=r"MixtralForCausalLM can't be served: .*down_proj is torch.float8_e4m3fn"):
        replace_moe_blocks(model)
    assert model.config._experts_implementation == "eager"
    experts_of.gate_up_proj = nn.Parameter(experts_of.gate_up_proj.detach().to(torch.int8), requires_grad=False)
    register()
    model.set_experts_implementation("fastmoe_cpp")
    with pytest.raises(TypeError, match="MixtralExperts's weights must be of a floating dtype .* got torch.int8"):
        model(families.tokens())
