"""The fine-tuning example, at a size that runs in seconds: from a configuration, and from a checkpoint's folder."""

import importlib.util
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="4.57")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import finetune_transformers as example  # noqa: E402

SHORT = "--steps 4 --batch-size 2 --context 24 --eval-every 2 --sample 8".split()


def run(capsys, *arguments):
    assert example.main([*SHORT, *map(str, arguments)]) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments) -> str:
    """The one sentence on stderr, before a line of training."""
    assert example.main([*SHORT, *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("finetune_transformers: ") and captured.err.count("\n") == 1
    return captured.err


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
        assert f"--lora needs {missing}" in refused(capsys, "--data", folder, "--lora", "--out", tmp_path)
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
        (["--context", "1"], "--context must be at least 2, got 1"),
        (["--learning-rate", "0"], "--learning-rate must be above 0, got 0.0"),
        (["--sample", "-1"], "--sample must be at least 0, got -1"),
    ],
)
def test_bad_input_gets_one_sentence(arguments, message, tmp_path, capsys):
    assert message in refused(capsys, *arguments, "--out", tmp_path)


def test_an_out_that_can_t_be_written_is_refused_before_training(folder, tmp_path, capsys):
    (tmp_path / "file").touch()
    for out, words in (
        (tmp_path / "file", "must be a folder, and is a file"),
        (tmp_path / "file/below", "can't write into the folder"),
        ("/proc/nowhere", "can't write into the folder /proc/nowhere: "),
        ("/proc", "can't write into the folder /proc: "),
    ):
        said = refused(capsys, "--data", folder, "--out", out)
        assert said.startswith("finetune_transformers: --out: ") and words in said


def interrupt_at(monkeypatch, step: int, times: int) -> None:
    """Ctrl-C, so many times, within that step."""

    def interrupted(self, *arguments):
        for _ in range(times if self.name == example.OURS and len(self.losses) + 1 == step else 0):
            os.kill(os.getpid(), signal.SIGINT)
        whole(self, *arguments)

    whole = example.Trainer.step
    monkeypatch.setattr(example.Trainer, "step", interrupted)


def test_ctrl_c_saves_after_the_step(folder, tmp_path, capsys, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    interrupt_at(monkeypatch, step=2, times=1)
    out = run(capsys, "--data", folder, "--out", tmp_path, "--compare")
    assert out.endswith(f"stopped after step 2 of 4; saved {tmp_path}\n")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_twice_says_that_nothing_was_saved(folder, tmp_path, capsys, monkeypatch):
    interrupt_at(monkeypatch, step=2, times=2)
    assert example.main([*SHORT, "--data", str(folder), "--out", str(tmp_path)]) == 130
    said = capsys.readouterr().err
    assert said.endswith(f"finetune_transformers: stopped before the model was saved in {tmp_path}\n")
    assert not list(tmp_path.iterdir())


def test_the_model_is_saved_before_the_sample(folder, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(example, "say_sample", interrupted)
    out = run(capsys, "--data", folder, "--out", tmp_path)
    assert f"saved     {tmp_path}\nstopped within the sample" in out
    assert (tmp_path / "config.json").is_file()


@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_a_folder_without_a_tokenizer_is_refused(family, folder, tmp_path, capsys):
    """transformers makes an empty one for the first, and of the second's error the first line says nothing."""
    sizes = example.SIZES | example.FAMILIES[family]
    transformers.AutoConfig.for_model(family, **sizes).save_pretrained(tmp_path)
    said = refused(capsys, "--model", tmp_path, "--data", folder, "--out", tmp_path / "out")
    assert f"--model: {tmp_path} has no tokenizer that transformers can read" in said


def test_a_dense_checkpoint_is_refused(folder, tmp_path, capsys):
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, vocab_size=300)).save_pretrained(tmp_path)
    checkpoint(tmp_path / "moe", folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tmp_path / "moe" / name).read_bytes())
    said = refused(capsys, "--model", tmp_path, "--data", folder, "--out", tmp_path / "out")
    assert said.startswith("finetune_transformers: LlamaForCausalLM can't be served")
