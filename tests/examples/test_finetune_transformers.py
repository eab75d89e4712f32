"""The fine-tuning example, at a size that runs in seconds: from a configuration, and from a checkpoint's folder."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="4.57")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import finetune_transformers as example  # noqa: E402

SHORT = "--steps 4 --batch-size 2 --context 24 --eval-every 2 --sample 8".split()


def run(capsys, *arguments):
    example.main([*SHORT, *map(str, arguments)])
    return capsys.readouterr().out


@pytest.mark.parametrize("family", example.FAMILIES)
def test_a_family_beside_its_own_experts(family, folder, tmp_path, capsys):
    if family == "gpt_oss" and example.MAJOR < 5:
        pytest.skip("transformers 4's gpt-oss is not served")
    out = run(capsys, "--family", family, "--data", folder, "--compare", "--out", tmp_path / "out")
    gap = float(re.search(r"largest relative difference of a loss: (\S+)", out)[1])
    assert gap < 1e-5
    lines = re.findall(r"^ +(\d+) +([\d.]+) +([\d.]+)$", out, re.MULTILINE)
    assert [int(step) for step, *_ in lines] == [0, 2, 4]
    first, last = float(lines[0][1]), float(lines[-1][1])
    assert 7 < first < 10 and last < first - 0.3
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert saved.config.model_type == family


def test_it_learns(folder, tmp_path, capsys):
    out = run(
        capsys, "--data", folder, "--steps", 40, "--eval-every", 40, "--out", tmp_path, "--checkpoint-activations"
    )
    bits = [float(b) for b in re.findall(r"^ +\d+ +([\d.]+)$", out, re.MULTILINE)]
    assert bits[-1] < 0.5 * bits[0]


def checkpoint(folder: Path, text: Path) -> None:
    """A model and a tokenizer, as a hub's folder has them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet)
    tokenizer.train([str(p) for p in text.glob("*.py")], trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.save_pretrained(folder)
    config = transformers.OlmoeConfig(
        **example.SIZES | {"hidden_size": 32, "vocab_size": len(fast)}, num_experts=4, intermediate_size=16
    )
    transformers.OlmoeForCausalLM(config).save_pretrained(folder)


def test_a_checkpoint_s_folder(folder, tmp_path, capsys):
    checkpoint(tmp_path / "base", folder)
    out = run(
        capsys, "--model", tmp_path / "base", "--data", folder, "--compare", "--learning-rate", "2e-3",
        "--dtype", "bf16", "--out", tmp_path / "tuned",
    )  # fmt: skip
    assert "held-out bits a token" in out
    before, after = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("base", "tuned"))
    assert before.state_dict().keys() == after.state_dict().keys()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(before.state_dict()[name], after.state_dict()[name].float())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tuned")
    assert tokenizer.decode(tokenizer.encode("def f(x):")) == "def f(x):"


def test_low_rank_adapters(folder, tmp_path, capsys):
    missing = "transformers 5" if example.MAJOR < 5 else "peft: `pip install peft` installs it"
    if example.MAJOR < 5 or importlib.util.find_spec("peft") is None:
        with pytest.raises(SystemExit, match=f"--lora needs {missing}"):
            run(capsys, "--data", folder, "--lora", "--out", tmp_path)
        return
    out = run(capsys, "--data", folder, "--lora", "--compare", "--rank", 2, "--out", tmp_path / "adapter")
    total, trained = (
        int(n.replace(",", "")) for n in re.search(r"([\d,]+) parameters, ([\d,]+) trained", out).groups()
    )
    assert 0 < trained < total / 10
    assert float(re.search(r"largest relative difference of a loss: (\S+)", out)[1]) < 1e-5
    saved = (tmp_path / "adapter/adapter_config.json").read_text()
    assert "experts.gate_up_proj" in saved and "experts.down_proj" in saved
    assert (tmp_path / "adapter/adapter_model.safetensors").stat().st_size < 2_000_000


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "nowhere"], "--model: nowhere must be a folder with a config.json"),
        (["--data", "nowhere"], "--data: there is no folder or file nowhere"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--learning-rate", "0"], "--learning-rate must be above 0, got 0.0"),
        (["--sample", "-1"], "--sample must be at least 0, got -1"),
    ],
)
def test_bad_input_gets_one_sentence(arguments, message, tmp_path):
    with pytest.raises(SystemExit, match=re.escape(message)):
        example.main([*SHORT, *arguments, "--out", str(tmp_path)])


def test_a_dense_checkpoint_is_refused(folder, tmp_path):
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, vocab_size=300)).save_pretrained(tmp_path)
    checkpoint(tmp_path / "moe", folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tmp_path / "moe" / name).read_bytes())
    with pytest.raises(SystemExit, match="finetune_transformers: LlamaForCausalLM can't be served"):
        example.main([*SHORT, "--model", str(tmp_path), "--data", str(folder), "--out", str(tmp_path / "out")])
