"""mergekit-moe itself, on small random models: what it writes is read, checked, loaded and run by ours and by transformers.

Runs where mergekit is installed: `make test-hosts HOSTS="mergekit mergekit-old"`, with a release from before and one from
after its shared gates were mended.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HOST = os.environ.get("FASTMOE_CPP_HOST", "")
if HOST.startswith("mergekit"):
    import mergekit  # noqa: F401
    import transformers
else:
    pytest.skip("needs mergekit in an environment of its own: make test-hosts", allow_module_level=True)

from fastmoe_cpp import MoE  # noqa: E402
from fastmoe_cpp.__main__ import main  # noqa: E402
from fastmoe_cpp.checkpoint import Checkpoint, ShapeError, convert, inspect, load_moe  # noqa: E402

from . import make  # noqa: E402

OLD = tuple(map(int, importlib.metadata.version("mergekit").split(".")[:2])) < (0, 1)
H, LAYERS, EXPERTS = 16, 2, 4
SIZES = {"vocab_size": 30, "hidden_size": H, "intermediate_size": 24, "num_hidden_layers": LAYERS,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1,
         "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
WORDS = ["<pad>", "<s>", "</s>", "<unk>", *"red green blue one two three cat dog bird write read sum list code".split()]
PROMPTS = ["red cat", "green dog write", "one two sum", "code list", "bird read blue"]
RANDOM = ("random", "uniform_random")
GATES = (*RANDOM, "cheap_embed", "hidden", "hidden_avg", "hidden_last")


def dense(folder: Path, family: str, seed: int) -> Path:
    """A random dense model and a tokenizer of a few words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**SIZES)
    if hasattr(config, "sliding_window"):
        config.sliding_window = None
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Base and experts of each family."""
    root = tmp_path_factory.mktemp("dense")
    return {f: [dense(root / f"{f}{i}", f, i) for i in range(EXPERTS + 2)] for f in ("Llama", "Mistral", "Qwen2")}


def merge(
    models: list[Path], out: Path, gate: str, *, shared: bool = False, prompts_of_shared: bool = True, **changes
) -> Path:
    """Runs mergekit-moe: the first model is the base, the last the shared expert."""
    experts = []
    for path, prompt in zip(models[1 : EXPERTS + 1], PROMPTS, strict=False):
        expert = {"source_model": str(path), "positive_prompts": [prompt, prompt + " read"]}
        if prompt == PROMPTS[1]:
            expert["negative_prompts"] = ["three"]
        experts.append(expert)
    config = {"base_model": str(models[0]), "gate_mode": gate, "dtype": "float32", "experts": experts, **changes}
    if shared:
        config["shared_experts"] = [
            {"source_model": str(models[-1]), "positive_prompts": [PROMPTS[4]], "residual_scale": 0.5}
        ]
        if not prompts_of_shared:
            del config["shared_experts"][0]["positive_prompts"]
    yaml = out.with_suffix(".yml")
    yaml.write_text(json.dumps(config))  # JSON is YAML
    run = subprocess.run(
        [sys.executable, "-m", "mergekit.scripts.moe", str(yaml), str(out), "--device", "cpu"],
        capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return out


def load(folder: Path):
    """transformers' model, in double precision and eager."""
    later = int(transformers.__version__.split(".")[0]) >= 5
    options = {"dtype": torch.float64, "experts_implementation": "eager"} if later else {"torch_dtype": torch.float64}
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True, **options
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model.eval()


class InPlace(torch.nn.Module):
    """Our layer where transformers' block was, with what that block returned."""

    def __init__(self, layer: MoE, with_logits: bool) -> None:
        super().__init__()
        self.layer, self.with_logits = layer, with_logits

    def forward(self, hidden_states: torch.Tensor):
        out = self.layer.forward_with_routing(hidden_states)
        return (out.hidden_states, out.router_logits) if self.with_logits else out.hidden_states


@torch.no_grad()
def same_logits(folder: Path) -> None:
    """The model's logits with transformers' blocks and with ours, loaded by load_moe."""
    model = load(folder)
    ids = torch.arange(36).reshape(3, 12) % 30
    theirs = model(input_ids=ids).logits
    opened = Checkpoint(folder)
    assert [block.number for block in opened.layers] == list(range(LAYERS))
    assert opened.moe.num_experts == EXPERTS and opened.moe.top_k == 2
    for block in opened.layers:
        layer = MoE(opened.moe, dtype=torch.float64)
        load_moe(layer, opened, block.number)
        host = model.model.layers[block.number]
        old = hasattr(host, "block_sparse_moe")
        with_logits = int(transformers.__version__.split(".")[0]) < 5
        setattr(host, "block_sparse_moe" if old else "mlp", InPlace(layer, with_logits))
    ours = model(input_ids=ids).logits
    # routing weights are float32 on both sides
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.square().mean().sqrt()))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_every_gate_mode(models, tmp_path, family, gate):
    """Llama becomes Mixtral, in the spelling of that release, and Qwen2 Qwen2-MoE with a shared expert."""
    shared = family == "Qwen2"
    if shared and gate == "random" and OLD:
        prompts = True  # with prompts even old releases draw its gate
    else:
        prompts = gate not in RANDOM or (shared and gate == "uniform_random")
    out = merge(
        models[family],
        tmp_path / "out",
        gate,
        shared=shared,
        prompts_of_shared=prompts if gate != "random" or OLD else False,
    )
    found = inspect(out, values=True)
    assert found.all_problems == []
    assert found.layout == ("qwen2_moe" if shared else "mixtral" if OLD else "mixtral_packed")
    same_logits(out)
    # and through another layout and back the same bits
    convert(out, tmp_path / "megatron", "megatron_grouped")
    convert(tmp_path / "megatron", tmp_path / "back", found.layout)
    make.same_bits(make.read(tmp_path / "back"), make.read(out))


@pytest.mark.parametrize("arrangement", ["Mistral", "Llama with a shared expert"])
def test_other_arrangements(models, tmp_path, arrangement):
    """Mistral becomes Mixtral; Llama with a shared expert, asked for Qwen, becomes Qwen2-MoE with biases of 0."""
    if arrangement == "Mistral":
        same_logits(merge(models["Mistral"], tmp_path / "out", "hidden"))
    else:
        out = merge(models["Llama"], tmp_path / "out", "hidden", shared=True, architecture="qwen")
        assert Checkpoint(out).layout.name == "qwen2_moe"
        same_logits(out)


def test_deepseek_output(models, tmp_path):
    """DeepSeek version 1 has no class in transformers: read by ours, and beside its Mixtral twin."""
    out = merge(models["Llama"], tmp_path / "out", "cheap_embed", shared=True, architecture="deepseek")
    opened = Checkpoint(out)
    assert opened.layout.name == "deepseek" and opened.moe.shared_intermediate_size == 24
    assert inspect(out, values=True).all_problems == []
    layer = MoE(opened.moe)
    load_moe(layer, opened, 1)
    dense_mlps = [make.read(path) for path in models["Llama"]]
    for i in range(EXPERTS):
        gate_up = torch.cat([dense_mlps[i + 1][f"model.layers.1.mlp.{p}_proj.weight"] for p in ("gate", "up")])
        assert torch.equal(layer.experts.gate_up_proj[i], gate_up)
    down = dense_mlps[-1]["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(layer.shared_experts.down_proj, down * 0.5)  # residual_scale


@pytest.mark.skipif(not OLD, reason="this release of mergekit writes the shared gate")
def test_the_shared_gate_that_old_releases_leave_out(models, tmp_path, caplog, capsys):
    """[0, H] where [1, H] is due: one sentence, nothing loaded or written; --repair-shared-gate draws it anew."""
    out = merge(models["Qwen2"], tmp_path / "out", "random", shared=True, prompts_of_shared=False)
    name = "model.layers.0.mlp.shared_expert_gate.weight"
    assert make.read(out)[name].shape == (0, H)
    layer = MoE(Checkpoint(out).moe)
    before = {n: t.clone() for n, t in layer.state_dict().items()}
    with pytest.raises(
        ShapeError, match=rf"{name} must have shape \[1, {H}\], it has \[0, {H}\]: mergekit.*--repair"
    ) as error:
        load_moe(layer, out, 0)
    assert (error.value.tensor, error.value.expected, error.value.found) == (name, (1, H), (0, H))
    make.same_bits(layer.state_dict(), before)

    arguments = ["convert", str(out), str(tmp_path / "mended"), "--to", "qwen2_moe", "--quiet"]
    assert main(arguments) == 1 and not (tmp_path / "mended").exists()
    assert f"{name} must have shape [1, {H}], it has [0, {H}]" in capsys.readouterr().err
    assert main(["inspect", str(out)]) == 1
    assert f"{LAYERS} problems" in capsys.readouterr().out
    with caplog.at_level(logging.WARNING, logger="fastmoe_cpp.checkpoint"):
        assert main([*arguments, "--repair-shared-gate"]) == 0
    assert sum("drawn anew" in record.getMessage() for record in caplog.records) == LAYERS
    mended, broken = make.read(tmp_path / "mended"), make.read(out)
    gates = [n for n in broken if n.endswith("shared_expert_gate.weight")]
    assert all(
        mended[n].shape == (1, H) and bool(mended[n].isfinite().all()) and bool((mended[n] != 0).any()) for n in gates
    )
    make.same_bits({n: mended[n] for n in mended if n not in gates}, {n: broken[n] for n in broken if n not in gates})
    same_logits(tmp_path / "mended")


@pytest.mark.skipif(OLD, reason="this release of mergekit has no Qwen3")
def test_qwen3_output(tmp_path):
    paths = [dense(tmp_path / f"q{i}", "Qwen3", i) for i in range(EXPERTS + 1)]
    out = merge(paths, tmp_path / "out", "hidden")
    assert Checkpoint(out).layout.name == "qwen3_moe_packed"
    same_logits(out)
