"""mergekit-moe itself, on small random models: what it writes is read, checked and run by ours and by transformers.

Runs where mergekit is installed: `make test-hosts HOSTS="mergekit mergekit-old"`, with a release from before and one
from after its shared gates were mended.
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
SIZES = {"vocab_size": 260, "hidden_size": H, "intermediate_size": 24, "num_hidden_layers": LAYERS,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1,
         "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
# the last token alone makes a gate of the first layer in two of the modes, so no two end alike
PROMPTS = ["red cat", "green dog", "one two sum", "write code", "bird calls"]
RANDOM = ("random", "uniform_random")
GATES = (*RANDOM, "cheap_embed", "hidden", "hidden_avg", "hidden_last")


def dense(folder: Path, family: str, seed: int) -> Path:
    """A random dense model and a tokenizer."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel

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
    # a token a byte: what transformers 5 turns every Qwen2 tokenizer into keeps its meaning
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *sorted(ByteLevel.alphabet())])}
    tokenizer = Tokenizer(BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def merge(models: list[Path], gate: str, *, shared: bool = False, shared_prompts: bool = True, **changes) -> dict:
    """A configuration of mergekit-moe: the first model is the base and the shared expert, the others the experts."""
    experts = []
    for path, prompt in zip(models[1:], PROMPTS, strict=False):
        expert = {"source_model": str(path), "positive_prompts": [prompt, prompt + " read"]}
        if prompt == PROMPTS[1]:
            expert["negative_prompts"] = ["three"]
        experts.append(expert)
    config = {"base_model": str(models[0]), "gate_mode": gate, "dtype": "float32", "experts": experts, **changes}
    if shared:
        config["shared_experts"] = [{"source_model": str(models[0]), "residual_scale": 0.5}]
        if shared_prompts:
            config["shared_experts"][0]["positive_prompts"] = [PROMPTS[4]]
    return config


# One process runs mergekit-moe's command for every configuration: importing it takes longer than all of them.
DRIVER = """
import json, sys, traceback
from mergekit.scripts.moe import main
for name, config in json.load(open("merges.json")).items():
    open(name + ".yml", "w").write(json.dumps(config))  # JSON is YAML
    try:
        main([name + ".yml", name, "--device", "cpu"], standalone_mode=False)
    except BaseException:
        open(name + ".error", "w").write(traceback.format_exc())
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with the dense models and every merge of this file."""
    root = tmp_path_factory.mktemp("mergekit")
    families = ("Llama", "Mistral", "Qwen2", *([] if OLD else ["Qwen3"]))
    models = {f: [dense(root / f"{f}{i}", f, i) for i in range(EXPERTS + 1)] for f in families}
    merges = {f"Llama-{gate}": merge(models["Llama"], gate) for gate in GATES}
    for gate in GATES:
        # the mended releases draw the gate of a shared expert without prompts, where gates are random
        shared_prompts = OLD or gate != "random"
        merges[f"Qwen2-{gate}"] = merge(models["Qwen2"], gate, shared=True, shared_prompts=shared_prompts)
    merges["mistral"] = merge(models["Mistral"], "hidden")
    merges["qwen-of-llama"] = merge(models["Llama"], "hidden", shared=True, architecture="qwen")
    if OLD:  # which expects the folder to be there
        (root / "deepseek").mkdir()
    merges["deepseek"] = merge(
        models["Llama"], "cheap_embed", shared=True, shared_prompts=False, architecture="deepseek"
    )
    merges["broken"] = merge(models["Qwen2"], "random", shared=True, shared_prompts=False)
    if not OLD:
        merges["qwen3"] = merge(models["Qwen3"], "hidden")
    (root / "merges.json").write_text(json.dumps(merges))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", DRIVER], cwd=root, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    for error in root.glob("*.error"):
        raise AssertionError(f"{error.name}: {error.read_text()[-3000:]}")
    return root


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
    # gates that can't be told apart would make a choice of experts arbitrary
    assert all(layer.router.closest < 0.999 and layer.router.norm_min > 0 for layer in inspect(folder).layers)
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
def test_every_gate_mode(root, tmp_path, family, gate):
    """Llama becomes Mixtral, in the spelling of that release, and Qwen2 Qwen2-MoE with a shared expert."""
    out = root / f"{family}-{gate}"
    found = inspect(out, values=True)
    assert found.all_problems == []
    assert found.layout == ("qwen2_moe" if family == "Qwen2" else "mixtral" if OLD else "mixtral_packed")
    same_logits(out)
    # and through another layout and back the same bits
    convert(out, tmp_path / "megatron", "megatron_grouped")
    convert(tmp_path / "megatron", tmp_path / "back", found.layout)
    make.same_bits(make.read(tmp_path / "back"), make.read(out))


@pytest.mark.parametrize("name", ["mistral", "qwen-of-llama", *([] if OLD else ["qwen3"])])
def test_other_arrangements(root, name):
    """Mistral becomes Mixtral; Llama with a shared expert can become Qwen2-MoE; Qwen3 becomes Qwen3-MoE."""
    layouts = {
        "mistral": "mixtral" if OLD else "mixtral_packed",
        "qwen-of-llama": "qwen2_moe",
        "qwen3": "qwen3_moe_packed",
    }
    assert Checkpoint(root / name).layout.name == layouts[name]
    same_logits(root / name)


def test_deepseek_output(root):
    """DeepSeek version 1 has no class in transformers: the layer holds the dense models' MLPs."""
    out = root / "deepseek"
    opened = Checkpoint(out)
    assert opened.layout.name == "deepseek" and opened.moe.shared_intermediate_size == 24
    assert inspect(out, values=True).all_problems == []
    layer = MoE(opened.moe)
    load_moe(layer, opened, 1)
    mlps = [make.read(root / f"Llama{i}") for i in range(EXPERTS + 1)]
    for i in range(EXPERTS):
        gate_up = torch.cat([mlps[i + 1][f"model.layers.1.mlp.{p}_proj.weight"] for p in ("gate", "up")])
        assert torch.equal(layer.experts.gate_up_proj[i], gate_up)
    shared = mlps[0]["model.layers.1.mlp.down_proj.weight"] * 0.5  # residual_scale
    assert torch.equal(layer.shared_experts.down_proj, shared)


def test_a_shared_gate_without_prompts(root, tmp_path, caplog, capsys):
    """Old releases write [0, H] where [1, H] is due: one sentence, nothing loaded or written; the option mends it."""
    out = root / "broken"
    name = "model.layers.0.mlp.shared_expert_gate.weight"
    if not OLD:
        assert make.read(out)[name].shape == (1, H) and inspect(out).all_problems == []
        return
    assert make.read(out)[name].shape == (0, H)
    layer = MoE(Checkpoint(out).moe)
    before = {n: t.clone() for n, t in layer.state_dict().items()}
    words = rf"{name} must have shape \[1, {H}\], it has \[0, {H}\]: mergekit.*--repair"
    with pytest.raises(ShapeError, match=words) as error:
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
    for gate in gates:
        assert mended[gate].shape == (1, H) and bool((mended[gate] != 0).all())
    make.same_bits({n: mended[n] for n in mended if n not in gates}, {n: broken[n] for n in broken if n not in gates})
    same_logits(tmp_path / "mended")
