"""Megatron-Core's own MoE layer, built from the arguments and loaded with the weights that convert() writes."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastmoe_cpp import MoE
from fastmoe_cpp.checkpoint import Checkpoint, convert, load_moe

from . import make

if os.environ.get("FASTMOE_CPP_HOST") != "megatron-core":
    pytest.skip("needs megatron-core in an environment of its own: make test-hosts", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "adapters"))
from megatron_core import host  # noqa: E402  the tests of the adapter: one process, no GPU
from megatron_core.conftest import one_rank  # noqa: E402, F401

KINDS = [kind for kind, layouts in make.HOLDERS.items() if "megatron_sequential" in layouts]


FUNCTIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh")}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_its_layer_takes_what_we_write(kind, tmp_path):
    tensors = {}
    for n in range(2):
        tensors |= make.layer_tensors(kind, kind, make.parts(kind, n, torch.float32), n)
    source = make.write(tmp_path / "source", tensors, make.CONFIGS[kind])
    convert(source, tmp_path / "megatron", "megatron_sequential")
    arguments = dict(Checkpoint(tmp_path / "megatron").own["host"])
    if arguments["activation_func"] == "quick_gelu":
        from megatron.core.fusions.fused_bias_geglu import quick_gelu

        arguments["activation_func"] = quick_gelu
    else:
        arguments["activation_func"] = FUNCTIONS[arguments["activation_func"]]
    config = host.config(**{"hidden_size": make.H, **arguments})
    theirs = host.host_layer(config).eval()
    prefix = "decoder.layers.1.mlp."
    found = make.read(tmp_path / "megatron")
    report = theirs.load_state_dict(
        {n.removeprefix(prefix): t for n, t in found.items() if n.startswith(prefix)}, strict=False
    )
    assert not report.unexpected_keys and not [n for n in report.missing_keys if not n.endswith("_extra_state")]

    ours = MoE(Checkpoint(source).moe)
    load_moe(ours, source, 1)
    x = torch.randn(5, 3, make.H)
    expected = theirs(x)[0]
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5 * float(expected.square().mean().sqrt()))


FAMILIES = {
    "Mixtral": {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2Moe": {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 20, "num_experts": 4,
                 "num_experts_per_tok": 2, "intermediate_size": 28, "mlp_only_layers": [0]},
    "Qwen3Moe": {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 28,
                 "head_dim": 6, "norm_topk_prob": True, "decoder_sparse_step": 2},
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_its_whole_model_takes_what_we_write(family, tmp_path):
    """A transformers model, converted: Megatron's GPTModel, built from config.json's arguments, has its logits."""
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=32, rope_parameters={"rope_type": "default", "rope_theta": 500.0}, rms_norm_eps=1e-3,
        use_sliding_window=False, sliding_window=None, **FAMILIES[family],
    )  # fmt: skip
    config._attn_implementation = config._experts_implementation = "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        parameter.normal_(0, 0.3)
    model.save_pretrained(tmp_path / "source")
    ids = torch.arange(24).reshape(2, 12) * 7 % 50
    expected = model(input_ids=ids).logits

    convert(tmp_path / "source", tmp_path / "megatron", "megatron_sequential")
    own = Checkpoint(tmp_path / "megatron").own
    arguments = own["host"] | {"activation_func": FUNCTIONS[own["host"]["activation_func"]]}
    megatron = host.config(**arguments, masked_softmax_fusion=False, apply_rope_fusion=False)
    spec = host.get_gpt_decoder_block_spec(megatron, use_transformer_engine=False)
    theirs = host.GPTModel(config=megatron, transformer_layer_spec=spec, **own["model"]).eval()
    report = theirs.load_state_dict(make.read(tmp_path / "megatron"), strict=False)
    assert not report.unexpected_keys and not [n for n in report.missing_keys if not n.endswith("_extra_state")]
    mask = torch.triu(torch.ones(12, 12, dtype=torch.bool), 1)[None, None]
    found = theirs(ids, torch.arange(12).expand(2, -1), mask)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.square().mean().sqrt()))

    for way in ("mixtral" if family == "Mixtral" else config.model_type, "megatron_grouped"):
        convert(tmp_path / "megatron", tmp_path / way, way)
    make.same_bits(make.read(tmp_path / config.model_type), make.read(tmp_path / "source"))
    convert(tmp_path / "megatron_grouped", tmp_path / "back", config.model_type)
    make.same_bits(make.read(tmp_path / "back"), make.read(tmp_path / "source"))
