"""The demo, at a size that runs in seconds: what it promises its reader holds, and bad input gets one sentence."""

import json
import os
import signal
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import text_data  # noqa: E402
import text_model  # noqa: E402
import text_picture  # noqa: E402
import text_program  # noqa: E402
import text_training  # noqa: E402
import train_text  # noqa: E402

TINY = (
    "--layers 2 --hidden-size 32 --heads 2 --experts 4 --top-k 2 --expert-size 32 --context 32 --batch-size 4 "
    "--warmup 4 --eval-every 10 --sample-bytes 40 --learning-rate 1e-2"
).split()


def run(folder: Path, out: Path, *more: str) -> int:
    return train_text.main(["--data", str(folder), "--out", str(out), *TINY, *more])


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory) -> Path:
    """The folder a run of 30 steps wrote."""
    out = tmp_path_factory.mktemp("finished")
    assert run(folder, out, "--steps", "30") == 0
    return out


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_curves_agree_and_the_model_learns(finished):
    log = records(finished)
    assert [r["kind"] for r in (log[0], log[-1])] == ["settings", "result"]
    steps = [r for r in log if r["kind"] == "step"]
    assert [r["step"] for r in steps] == list(range(1, 31))
    for r in steps:
        ours, loop = (r[name]["bits_per_byte"] for name in ("fastmoe_cpp", "torch loop"))
        assert abs(ours - loop) <= 1e-4 * loop
    result = log[-1]
    assert result["agree"] and 0 <= result["largest_gap"] <= 1e-4
    held_out = [r["fastmoe_cpp"] for r in log if r["kind"] == "held_out"]
    assert held_out[0] == pytest.approx(8, abs=0.1)
    assert held_out[-1] == result["held_out"] < 6.5
    # 4 x 32 bytes, two experts each, in both layers
    assert all(sum(layer) == 4 * 32 * 2 for r in steps for layer in r["fastmoe_cpp"]["tokens_per_expert"])


def test_picture_and_sample(finished):
    pixels = matplotlib.image.imread(finished / "training.png")
    height, width = (round(inches * text_picture.DPI) for inches in (text_picture.HEIGHT, text_picture.WIDTH))
    assert pixels.shape[:2] == (height, width)
    assert pixels[..., :3].std() > 0.05
    sample = (finished / "sample.txt").read_text()
    assert sample.startswith("def ") and len(sample) > len("def ")
    assert "\0" not in sample


def same(a, b, where="checkpoint") -> int:
    """Asserts that two checkpoints hold the same bits and returns how many tensors they hold."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
        return 1
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        return sum(same(a[k], b[k], f"{where}.{k}") for k in a)
    if isinstance(a, list):
        assert len(a) == len(b), where
        return sum(same(x, y, f"{where}[{i}]") for i, (x, y) in enumerate(zip(a, b, strict=True)))
    assert a == b, where
    return 0


def test_resume_gives_the_same_bits(folder, finished, tmp_path):
    assert run(folder, tmp_path, "--steps", "30", "--stop-at", "13") == 0
    # the settings are the checkpoint's
    assert train_text.main(["--resume", str(tmp_path / "checkpoint.pt"), "--sample-bytes", "40"]) == 0
    whole, resumed = (torch.load(out / "checkpoint.pt") for out in (finished, tmp_path))
    assert whole["step"] == resumed["step"] == 30
    histories = [json.loads(state.pop("history")) for state in (whole, resumed)]
    assert same(whole, resumed) > 100
    for history in histories:
        for record in history:
            if record["kind"] == "step":
                for name in ("fastmoe_cpp", "torch loop"):
                    del record[name]["seconds"]
    assert histories[0] == histories[1]
    assert (finished / "sample.txt").read_text() == (tmp_path / "sample.txt").read_text()
    # a different place in the data would show
    state = whole["batches"].clone()
    state[-1] += 1
    with pytest.raises(AssertionError):
        same(whole, {**whole, "batches": state})


def test_a_stop_before_the_step_resumed_at_trains_no_further(folder, tmp_path):
    assert run(folder, tmp_path, "--steps", "6", "--stop-at", "4") == 0
    resume = ["--resume", str(tmp_path / "checkpoint.pt"), "--sample-bytes", "40", "--stop-at", "2"]
    assert train_text.main(resume) == 0
    assert torch.load(tmp_path / "checkpoint.pt")["step"] == 4


def test_curves_that_differ_fail(folder, tmp_path, monkeypatch, capsys):
    def half(self, hidden_states):
        out = right(self, hidden_states)
        return out._replace(hidden_states=out.hidden_states * 0.5)

    right = text_model.LoopMoE.forward_with_routing
    monkeypatch.setattr(text_model.LoopMoE, "forward_with_routing", half)
    assert run(folder, tmp_path, "--steps", "12") == 1
    assert "DO NOT AGREE" in capsys.readouterr().out
    assert records(tmp_path)[-1]["agree"] is False


def test_routers_that_differ_fail(folder, tmp_path, monkeypatch, capsys):
    """Scores off by 0.4%, far less than the losses show at once, but more than rounding."""

    def coarse(self, hidden_states):
        with torch.no_grad():
            weight = self.router.weight.clone()
            self.router.weight.copy_(weight.bfloat16())
        out = right(self, hidden_states)
        self.router.weight.data.copy_(weight)
        return out

    right = text_model.LoopMoE.forward_with_routing
    monkeypatch.setattr(text_model.LoopMoE, "forward_with_routing", coarse)
    assert run(folder, tmp_path, "--steps", "12") == 1
    said = capsys.readouterr().out
    assert "DO NOT AGREE" in said and "more than rounding explains" in said
    assert records(tmp_path)[-1]["agree"] is False


def history_of(losses: list[float], loads: list[list[int]], near_ties: int) -> list[dict]:
    """Steps of one layer and three experts, beside a loop whose loss is 2 and whose experts get 4 tokens each."""
    return [
        {
            "kind": "step", "step": step,
            "fastmoe_cpp": {"bits_per_byte": loss, "tokens_per_expert": [load]},
            "torch loop": {"bits_per_byte": 2.0, "tokens_per_expert": [[4, 4, 4]], "near_ties": [near_ties]},
        }
        for step, (loss, load) in enumerate(zip(losses, loads, strict=True), start=1)
    ]  # fmt: skip


def test_a_nan_is_no_agreement():
    found = text_training.agreement(history_of([2.0, float("nan"), 2.0], [[4, 4, 4]] * 3, 0), "fp32")
    assert not found.ok and found.at_step == 2


def test_curves_are_compared_up_to_a_near_tie():
    losses, loads = [2.0, 2.00002, 2.5], [[4, 4, 4], [3, 4, 5], [0, 0, 12]]
    found = text_training.agreement(history_of(losses, loads, near_ties=1), "fp32")
    assert found.ok and found.steps == 2 and found.largest == pytest.approx(1e-5)
    assert "at step 2: 1 token of layer 0" in str(found.parting) and "rounding decided" in str(found.parting)
    # no near tie explains it
    assert not text_training.agreement(history_of(losses, loads, near_ties=0), "fp32").ok
    # the step itself counts
    assert not text_training.agreement(history_of([2.0, 2.1, 2.0], loads, near_ties=1), "fp32").ok
    # the choices differ after the steps compared; bf16's always do
    late = history_of([2.0] * 101, [[4, 4, 4]] * 100 + [[3, 4, 5]], near_ties=0)
    assert text_training.agreement(late, "fp32") == text_training.Agreement(100, 0.0, 1)
    assert text_training.agreement(history_of(losses, loads, near_ties=1), "bf16").steps == 3


def test_near_ties_are_counted():
    tie = text_model.NEAR_TIE
    scores = torch.tensor([[0.5, 0.2, 0.3], [0.4, 0.3, 0.3], [0.4, 0.3 * (1 - 2 * tie), 0.3], [0.35, 0.35, 0.3]])
    assert text_model.count_near_ties(scores, 2) == 1
    assert text_model.count_near_ties(scores, 1) == 1
    assert text_model.count_near_ties(scores, 3) == 0


@pytest.mark.parametrize("option", ["--checkpoint-activations", "--dtype=bf16", "--no-compare"])
def test_options_run(folder, tmp_path, option):
    assert run(folder, tmp_path, "--steps", "4", option) == 0
    first = next(r for r in records(tmp_path) if r["kind"] == "step")
    assert ("torch loop" in first) == (option != "--no-compare")


def refused(capsys, *arguments: str) -> str:
    assert train_text.main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("train_text: ") and captured.err.count("\n") == 1
    return captured.err


def test_bad_text_is_refused_in_one_sentence(tmp_path, capsys):
    assert "there is no folder or file" in refused(capsys, "--data", str(tmp_path / "missing"))
    (tmp_path / "binary").write_bytes(b"\0\xff")
    (tmp_path / "empty").touch()
    assert "no text in" in refused(capsys, "--data", str(tmp_path))
    assert "2 files looked at" in refused(capsys, "--data", str(tmp_path))
    (tmp_path / "short.txt").write_text("too short")
    assert "too little for one window of 256 bytes" in refused(capsys, "--data", str(tmp_path))


def test_bad_settings_are_refused_in_one_sentence(folder, tmp_path, capsys):
    data = ("--data", str(folder), "--out", str(tmp_path))
    assert "MoEConfig.top_k must be at most num_experts = 8, got 9" in refused(capsys, *data, "--top-k", "9")
    assert "--steps must be at least 1, got 0" in refused(capsys, *data, "--steps", "0")
    assert "--hidden-size must be a multiple of 2 * --heads = 8, got 100" in refused(
        capsys, *data, "--hidden-size", "100"
    )
    if not torch.cuda.is_available():
        assert "torch sees no GPU" in refused(capsys, *data, "--device", "cuda")


def test_paths_that_can_t_be_written_are_refused(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = ("--data", str(folder), "--out", "out", *TINY)
    assert "--save must name a file, and . is a folder" in refused(capsys, *data, "--save", ".")
    assert "--save must name a file, and out is a folder" in refused(capsys, *data, "--save", "out")
    (tmp_path / "file").touch()
    assert "--save: can't write into the folder file/below" in refused(capsys, *data, "--save", "file/below/a.pt")
    assert "--out: file must be a folder, and is a file" in refused(capsys, *data, "--out", "file")
    assert "--prompt must be text in UTF-8, got '\\udcff'" in refused(capsys, *data, "--prompt", "\udcff")
    assert "--weight-decay one of at least 0" in refused(capsys, *data, "--weight-decay", "nan")
    assert "--seed must be at least 0 and below 2**63, got 9223372036854775808" in refused(
        capsys, *data, "--seed", str(2**63)
    )
    assert "--out: can't write into the folder /proc: " in refused(capsys, *data, "--out", "/proc")


def interrupt_at(monkeypatch, step: int, times: int) -> None:
    """Ctrl-C, so many times, within that step."""

    def interrupted(self):
        for _ in range(times if self.done + 1 == step else 0):
            os.kill(os.getpid(), signal.SIGINT)
        return whole(self)

    whole = text_training.Training.step
    monkeypatch.setattr(text_training.Training, "step", interrupted)


def test_ctrl_c_saves_after_the_step(folder, tmp_path, capsys, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    interrupt_at(monkeypatch, step=3, times=1)
    assert run(folder, tmp_path, "--steps", "8") == 0
    assert "stopped at step 3 of 8; go on with --resume" in capsys.readouterr().out
    assert torch.load(tmp_path / "checkpoint.pt")["step"] == 3
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_is_answered_in_the_middle_of_a_line(capfd, monkeypatch):
    class Busy:
        def write(self, words):
            raise RuntimeError("reentrant call inside a writer")

    with monkeypatch.context() as patch, text_program.Stop() as stop:
        patch.setattr(sys, "stdout", Busy())
        patch.setattr(sys, "stderr", Busy())
        os.kill(os.getpid(), signal.SIGINT)
    with text_program.Stop(quiet=True) as quiet:
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.asked and quiet.asked
    assert capfd.readouterr() == ("", "stopping after this step (Ctrl-C again: at once, without saving)\n")


def test_ctrl_c_twice_says_what_is_kept(folder, tmp_path, capsys, monkeypatch):
    interrupt_at(monkeypatch, step=3, times=2)
    assert run(folder, tmp_path, "--steps", "8") == 130
    assert capsys.readouterr().err == "train_text: stopped; nothing was saved\n"
    assert run(folder, tmp_path, "--steps", "8", "--save-every", "2") == 130
    assert capsys.readouterr().err == f"train_text: stopped; {tmp_path / 'checkpoint.pt'} is kept\n"


def test_a_checkpoint_of_something_else_is_refused(folder, finished, tmp_path, capsys):
    checkpoint = str(finished / "checkpoint.pt")
    assert "was trained with --experts 4, not 8" in refused(capsys, "--resume", checkpoint, "--experts", "8")
    (tmp_path / "other.txt").write_text("some other text\n" * 1000)
    assert "holds other text" in refused(capsys, "--resume", checkpoint, "--data", str(tmp_path))
    assert "there is no file" in refused(capsys, "--resume", str(tmp_path / "none.pt"))
    assert "is not a checkpoint" in refused(capsys, "--resume", str(tmp_path / "other.txt"))
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    assert "is not a checkpoint of this program" in refused(capsys, "--resume", str(tmp_path / "other.pt"))


def test_held_out_files_are_not_trained_on(folder):
    text = text_data.load_text(str(folder), context=32)
    assert (text.files, text.skipped) == (30, 1)
    # files 10 of every 20
    held_out = bytes(text.held_out.tolist())
    assert held_out == b"\0" + (folder / "file10.py").read_bytes()
    train = bytes(text.train.tolist())
    others = sorted(p for p in folder.glob("*.py") if p.name != "file10.py")
    assert train == b"".join(b"\0" + p.read_bytes() for p in others)


def test_batches_are_windows_of_the_text_in_a_repeatable_order():
    text = torch.arange(200, dtype=torch.uint8)
    batches = text_data.Batches(text, batch_size=64, context=5, seed=3)
    first = batches.next()
    assert first.shape == (64, 6) and first.dtype == torch.int64
    assert torch.equal(first, first[:, :1] + torch.arange(6))
    state = batches.state()
    second = batches.next()
    batches.restore(state)
    assert torch.equal(batches.next(), second)
    assert not torch.equal(first, second)
    # the last byte is in reach, and nothing past it
    starts = torch.cat([batches.next()[:, 0] for _ in range(60)])
    assert (starts.min(), starts.max()) == (0, 194)


def test_loop_and_layer_share_names_and_values():
    torch.manual_seed(1)
    settings = train_text.DEFAULTS
    layer = text_training.MoE(settings.moe())
    loop = text_model.LoopMoE(settings.moe())
    loop.load_state_dict(layer.state_dict())
    x = torch.randn(2, 9, settings.hidden_size)
    a, b = layer.forward_with_routing(x), loop.forward_with_routing(x)
    torch.testing.assert_close(a.hidden_states, b.hidden_states)
    torch.testing.assert_close(a.aux_loss, b.aux_loss)
    assert torch.equal(a.tokens_per_expert, b.tokens_per_expert)
