"""transformers' own models, saved by it: our layer computes what its block does, and it reads what we write."""

from __future__ import annotations

import pytest
import torch

from fastmoe_cpp import MoE
from fastmoe_cpp.checkpoint import Checkpoint, convert, inspect, load_moe

from . import make

transformers = pytest.importorskip("transformers", minversion="5.0", reason="needs transformers 5")

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}  # fmt: skip
FAMILIES = {
    "mixtral": ("Mixtral", {"intermediate_size": 12, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2Moe", {"moe_intermediate_size": 12, "shared_expert_intermediate_size": 20, "num_experts": 4,
                               "num_experts_per_tok": 2, "intermediate_size": 24}),
    "qwen3_moe": ("Qwen3Moe", {"moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2,
                               "intermediate_size": 24, "head_dim": 4, "norm_topk_prob": True,
                               "mlp_only_layers": [0]}),
    "olmoe": ("Olmoe", {"intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": ("DeepseekV3", {"moe_intermediate_size": 12, "n_routed_experts": 8, "num_experts_per_tok": 4,
                                   "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "intermediate_size": 24,
                                   "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
                                   "v_head_dim": 4, "num_key_value_heads": 4}),
    "gpt_oss": ("GptOss", {"intermediate_size": 12, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 4}),
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    """A small random model in double precision and the folder transformers saved it in."""
    name, sizes = FAMILIES[request.param]
    torch.manual_seed(3)
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **sizes})
    config._attn_implementation = config._experts_implementation = "eager"
    model = getattr(transformers, f"{name}ForCausalLM")(config).double().eval()
    with torch.no_grad():
        for parameter in (*model.parameters(), *(b for n, b in model.named_buffers() if n.endswith("correction_bias"))):
            parameter.normal_(0, 0.3)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return request.param, model, folder


def logits(model) -> torch.Tensor:
    ids = torch.arange(24).reshape(2, 12) % 49 + 1
    with torch.no_grad():
        return model(input_ids=ids).logits


def reloaded(model, folder) -> torch.Tensor:
    again, report = type(model).from_pretrained(
        folder,
        dtype=torch.float64,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return logits(again.eval())


@torch.no_grad()
def test_our_layer_computes_what_its_block_does(saved):
    _, model, folder = saved
    opened = Checkpoint(folder)
    assert inspect(folder, values=True).all_problems == []
    for block in opened.layers:
        layer = MoE(opened.moe, dtype=torch.float64)
        load_moe(layer, opened, block.number)
        x = torch.randn(2, 9, 16, dtype=torch.float64)
        theirs = model.model.layers[block.number].mlp(x)
        theirs = theirs[0] if isinstance(theirs, tuple) else theirs
        # routers run in float32 there
        torch.testing.assert_close(layer(x), theirs, rtol=1e-5, atol=1e-5 * float(theirs.square().mean().sqrt()))


def test_it_reads_what_we_write(saved, tmp_path):
    family, model, folder = saved
    before = logits(model)
    assert torch.equal(reloaded(model, folder), before)
    for way in make.HOLDERS[family]:
        convert(folder, tmp_path / way, way)
        back = tmp_path / way
        if not way.startswith(family):
            back = tmp_path / f"{way}-back"
            convert(tmp_path / way, back, family)
        assert torch.equal(reloaded(model, back), before), way


def test_packed_is_what_it_has_in_memory(saved, tmp_path):
    family, model, folder = saved
    if family == "gpt_oss":
        pytest.skip("gpt-oss has one spelling")
    convert(folder, tmp_path / "packed", f"{family}_packed")
    state = {n: t for n, t in model.state_dict().items() if ".mlp." in n}
    found = make.read(tmp_path / "packed")
    make.same_bits({n: found[n] for n in found if ".mlp." in n}, state)
