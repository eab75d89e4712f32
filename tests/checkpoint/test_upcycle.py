"""Dense models of transformers turned into MoE models that compute what the dense ones do."""

from __future__ import annotations

import json

import pytest
import torch

from fastmoe_cpp import MoE
from fastmoe_cpp.__main__ import main
from fastmoe_cpp.checkpoint import Checkpoint, CheckpointError, ConfigError, LayoutError, load_moe, upcycle
from fastmoe_cpp.checkpoint.mergekit import generator_of

from . import make

transformers = pytest.importorskip("transformers", minversion="5.0", reason="needs transformers 5")

SMALL = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
         "rope_parameters": {"rope_type": "default", "rope_theta": 777.0}}  # fmt: skip
FAMILIES = {
    "llama": ("Llama", {"rms_norm_eps": 1e-3}),
    "mistral": ("Mistral", {"sliding_window": 5, "head_dim": 8}),
    "qwen2": ("Qwen2", {}),
    "tied": ("Qwen2", {"tie_word_embeddings": True}),
}


def make_dense(folder, family: str, seed: int = 0, dtype: torch.dtype = torch.float64, **changes):
    name, sizes = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **sizes, **changes})
    config._attn_implementation = config._experts_implementation = "eager"
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def dense(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, make_dense(folder, request.param), folder


def logits(model) -> torch.Tensor:
    ids = torch.arange(24).reshape(2, 12) % 49 + 1
    with torch.no_grad():
        return model(input_ids=ids).logits


def load(folder):
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float64,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model.eval()


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    # the routing weights are float32 there
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.square().mean().sqrt()))


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_copied_experts_compute_what_the_dense_model_does(dense, tmp_path, top_k):
    family, model, folder = dense
    done = upcycle(folder, tmp_path / "moe", num_experts=4, top_k=top_k, router_std=1.0)
    moe = load(tmp_path / "moe")
    assert done.layout == moe.config.model_type == ("mixtral" if family in ("llama", "mistral") else "qwen2_moe")
    assert moe.config.num_experts_per_tok == top_k
    same(logits(moe), logits(model))


@pytest.mark.parametrize("layout", ["mixtral_packed", "qwen2_moe", "qwen2_moe_packed"])
def test_other_layouts(tmp_path, layout):
    model = make_dense(tmp_path / "dense", "llama")
    upcycle(tmp_path / "dense", tmp_path / "moe", num_experts=3, to=layout)
    same(logits(load(tmp_path / "moe")), logits(model))


def test_split_experts_sum_to_the_dense_mlp(dense, tmp_path):
    """All of them chosen with equal weights are the dense model; so is, in every layer, their mean."""
    _, model, folder = dense
    upcycle(folder, tmp_path / "moe", mode="split", num_experts=8, granularity=4, top_k=8, router_init="zeros")
    moe = load(tmp_path / "moe")
    same(logits(moe), logits(model))
    opened = Checkpoint(tmp_path / "moe")
    assert opened.moe.intermediate_size == 6
    for n in range(2):
        layer = MoE(opened.moe, dtype=torch.float64)
        load_moe(layer, opened, n)
        x = torch.randn(5, 16, dtype=torch.float64)
        gate, up = (x @ layer.experts.gate_up_proj.mT).chunk(2, dim=-1)
        each = (torch.nn.functional.silu(gate) * up) @ layer.experts.down_proj.mT
        with torch.no_grad():
            torch.testing.assert_close(each.mean(0), model.model.layers[n].mlp(x), rtol=1e-9, atol=1e-9)
            # every slice is another one, and the second round repeats the first
            assert not torch.allclose(each[0], each[1]) and torch.equal(each[:4], each[4:])


def test_merged_experts_are_the_models_given(tmp_path):
    models = [make_dense(tmp_path / f"d{i}", "qwen2", seed=i) for i in range(3)]
    experts = [tmp_path / "d1", tmp_path / "d2"]
    upcycle(tmp_path / "d0", tmp_path / "moe", mode="merge", experts=experts, top_k=1)
    found = make.read(tmp_path / "moe")
    for i, model in enumerate(models[1:]):
        weight = model.model.layers[1].mlp.up_proj.weight
        assert torch.equal(found[f"model.layers.1.mlp.experts.{i}.up_proj.weight"], weight)
    assert torch.equal(found["model.embed_tokens.weight"], models[0].model.embed_tokens.weight)
    make_dense(tmp_path / "odd", "qwen2", intermediate_size=32)
    with pytest.raises(CheckpointError, match="odd: intermediate_size must be 24, as in .*d0, got 32"):
        upcycle(tmp_path / "d0", tmp_path / "b", mode="merge", experts=[tmp_path / "odd"])


def test_seeded_and_sixteen_bits(tmp_path):
    make_dense(tmp_path / "dense", "llama", dtype=torch.bfloat16)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        upcycle(tmp_path / "dense", tmp_path / name, num_experts=4, seed=seed)
    a, b, c = (make.read(tmp_path / name) for name in "abc")
    make.same_bits(a, b)
    router = [f"model.layers.{n}.block_sparse_moe.gate.weight" for n in range(2)]
    assert all(not torch.equal(a[name], c[name]) and a[name].dtype == torch.bfloat16 for name in router)
    assert not torch.equal(a[router[0]], a[router[1]])
    assert a[router[0]].float().std() == pytest.approx(0.02, rel=0.3)


def test_the_shared_expert_adds_nothing_and_learns(tmp_path):
    make_dense(tmp_path / "dense", "qwen2")
    upcycle(tmp_path / "dense", tmp_path / "moe", num_experts=4, shared_size=8)
    moe = load(tmp_path / "moe").train()
    shared = moe.model.layers[0].mlp.shared_expert
    assert shared.up_proj.weight.shape == (8, 16) and bool((shared.down_proj.weight == 0).all())
    moe(input_ids=torch.arange(12)[None]).logits.square().mean().backward()
    assert float(shared.down_proj.weight.grad.abs().max()) > 0


def test_the_command(tmp_path, capsys):
    make_dense(tmp_path / "dense", "llama")
    arguments = ["upcycle", str(tmp_path / "dense"), str(tmp_path / "moe"), "--num-experts", "4", "--quiet"]
    assert main([*arguments, "--mode", "split", "--top-k", "2"]) == 0
    text = capsys.readouterr().out
    assert "llama -> mixtral, 2 MoE layers" in text and "note: top_k = 2 of 4 slices" in text
    assert (tmp_path / "moe" / "generation_config.json").is_file()
    assert main(["inspect", str(tmp_path / "moe")]) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_experts": None}, "num_experts must be given for mode 'copy'"),
        ({"num_experts": 4, "top_k": 5}, "top_k must be at most num_experts = 4, got 5"),
        ({"num_experts": 4, "mode": "halve"}, "mode must be one of copy, split, merge, got 'halve'"),
        ({"num_experts": 5, "mode": "split"}, "granularity must divide .*intermediate_size = 24, got 5"),
        ({"num_experts": 6, "mode": "split", "granularity": 4}, "num_experts must be a multiple of granularity = 4"),
        ({"num_experts": 4, "granularity": 2}, "granularity belongs to mode 'split'"),
        ({"num_experts": 4, "mode": "merge"}, "experts must be given for mode 'merge'"),
        ({"num_experts": 4, "to": "olmoe"}, "becomes a mixtral or qwen2_moe one"),
        ({"num_experts": 4, "to": "mixtrel"}, "the layout must be one of"),
        ({"num_experts": 4, "shared_size": 4}, "shared_size belongs to qwen2_moe"),
        ({"num_experts": 4, "router_std": float("nan")}, "router_std must be a number between 0 and 1000"),
        ({"num_experts": 4, "router_std": float("inf")}, "router_std must be a number between 0 and 1000"),
        ({"num_experts": 4, "router_std": 1e39}, "router_std must be a number between 0 and 1000"),
    ],
)
def test_settings_that_are_refused(tmp_path_factory, options, words):
    root = tmp_path_factory.getbasetemp() / "refused"
    if not root.exists():
        make_dense(root / "dense", "llama")
    with pytest.raises(CheckpointError, match=words):
        upcycle(root / "dense", root / "moe", **options)
    assert {f.name for f in root.iterdir()} == {"dense"}


def test_models_that_are_refused(tmp_path):
    make_dense(tmp_path / "qwen", "qwen2")
    with pytest.raises(LayoutError, match="layers.0.self_attn.k_proj.bias has no place in a mixtral model"):
        upcycle(tmp_path / "qwen", tmp_path / "moe", num_experts=4, to="mixtral")
    make_dense(tmp_path / "mistral", "mistral")
    with pytest.raises(LayoutError, match="sliding_window = 5 has no place in a qwen2_moe model"):
        upcycle(tmp_path / "mistral", tmp_path / "moe", num_experts=4, to="qwen2_moe")
    make_dense(tmp_path / "biased", "llama", mlp_bias=True)
    with pytest.raises(ConfigError, match="mlp_bias must be false"):
        upcycle(tmp_path / "biased", tmp_path / "moe", num_experts=4)
    config = json.loads((tmp_path / "qwen" / "config.json").read_text())
    (tmp_path / "qwen" / "config.json").write_text(json.dumps({**config, "model_type": "phi"}))
    with pytest.raises(ConfigError, match="model_type must be one of llama, mistral, qwen2, got 'phi'"):
        upcycle(tmp_path / "qwen", tmp_path / "moe", num_experts=4)
    (tmp_path / "qwen" / "config.json").write_text(json.dumps({**config, "intermediate_size": 25}))
    with pytest.raises(CheckpointError, match=r"gate_proj.weight must have shape \[25, 16\], it has \[24, 16\]"):
        upcycle(tmp_path / "qwen", tmp_path / "moe", num_experts=4)
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize("seed", [2**43, 35184372088832, 2**63 - 1])
def test_any_seed_of_torch_draws(seed):
    assert generator_of(seed, 3).initial_seed() == ((seed << 20) + 3) % 2**63
    assert generator_of(7, 3).initial_seed() == (7 << 20) + 3
