# ruff: noqa: E402
"""LoRA through peft on the experts of transformers' models, with our experts and with eager ones."""

import copy

import pytest
import torch

from ..conftest import require

require("peft", "0")
require("transformers", "5")

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from fastmoe_cpp.integrations.transformers import register, replace_moe_blocks

from ..transformers import families

FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "nemotron_h")


def adapted(family):
    """The eager model with LoRA on every expert's projections, and a copy of it with our experts."""
    torch.manual_seed(1)
    base = families.make(family)
    up = "up_proj" if family == "nemotron_h" else "gate_up_proj"
    config = LoraConfig(
        r=3, lora_alpha=6, lora_dropout=0.0, target_modules=["q_proj"],
        target_parameters=[f"experts.{up}", "experts.down_proj"],
    )  # fmt: skip
    theirs = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:  # which start at zero, and with them every gradient of lora_A
                parameter.copy_(torch.randn(parameter.shape) * 0.2)
    ours = copy.deepcopy(theirs)
    replace_moe_blocks(ours.get_base_model())
    return theirs, ours


def relative(actual, expected):
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_the_adapters_gradients(family):
    theirs, ours = adapted(family)
    ids = families.tokens()
    results = [model(input_ids=ids, labels=ids) for model in (theirs, ours)]
    for result in results:
        result.loss.backward()
    assert relative(results[1].logits, results[0].logits) < 3e-6
    grads = {name: p.grad for name, p in ours.named_parameters()}
    trained = 0
    for name, parameter in theirs.named_parameters():
        if not parameter.requires_grad:
            assert "lora" not in name and grads[name] is None, name
            continue
        assert relative(grads[name], parameter.grad) < 3e-5, name
        trained += "experts" in name
    assert trained >= 4
    # the adapter matters: without it the logits are others
    with ours.disable_adapter(), torch.no_grad():
        assert relative(ours(input_ids=ids).logits, results[0].logits) > 1e-2


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_training_moves_the_adapter_alone_and_it_is_saved_and_merged(family, tmp_path):
    _, model = adapted(family)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    ids = families.tokens(4, 16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(15):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.1
    for name, before in frozen.items():
        assert torch.equal(model.get_parameter(name), before), name
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path / "adapter")
    model.unload().save_pretrained(tmp_path / "base")
    register()
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", experts_implementation="fastmoe_cpp", attn_implementation="eager"
    ).eval()
    again = PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        assert relative(again(input_ids=ids).logits, expected) < 1e-6
        merged = again.merge_and_unload()
        assert relative(merged(input_ids=ids).logits, expected) < 1e-5


def test_a_wrapped_model_is_served_as_it_is():
    theirs, _ = adapted("mixtral")
    ids = families.tokens()
    expected = theirs(input_ids=ids).logits
    assert replace_moe_blocks(theirs) is theirs
    assert theirs.get_base_model().config._experts_implementation == "fastmoe_cpp"
    assert relative(theirs(input_ids=ids).logits, expected) < 3e-6
