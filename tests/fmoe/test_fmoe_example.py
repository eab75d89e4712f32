"""The example trains on two processes and reads what it wrote on one."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--steps", "3", "--experts", "4", "--layers", "1", "--width", "16", "--context", "16", "--batch-size", "2"]


def environment():
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment())


@pytest.fixture
def example(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a line of text to learn by heart\n" * 200)
    return [str(ROOT / "examples/fmoe/train.py"), *TINY, "--data", str(text), "--device", "cpu"]


def test_two_processes_and_one_file(example, tmp_path):
    saved = tmp_path / "model.pt"
    done = run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *example, "--save", str(saved))
    assert done.returncode == 0, done.stderr
    final, again = re.search(r"held out: ([\d.]+); of .*: ([\d.]+)\n", done.stdout).groups()
    assert saved.exists() and abs(float(final) - float(again)) < 1e-3
    assert "step 3: loss" in done.stdout


def test_bad_input_gets_one_sentence(tmp_path):
    done = run(str(ROOT / "examples/fmoe/train.py"), "--data", str(tmp_path / "nothing"))
    assert done.returncode == 2 and done.stderr.startswith("train: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--experts", "1"], "--experts must be at least the 2 a token of --gate gshard, got 1"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--width", "6"], "--width must be a multiple of 4, the number of heads, got 6"),
        (["--save", "/proc/x/y"], "--save: can't write into the folder /proc/x: No such file or directory"),
        (["--save", "."], "--save must name a file, and . is a folder"),
        (["--device", "cuda"], "--device cuda: torch sees no GPU here"),
    ],
)
def test_bad_options_are_refused_before_training(example, arguments, message, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = run(*example, *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"train: {message}\n")


@pytest.mark.parametrize("launcher", [[], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]])
def test_ctrl_c_saves_after_the_step(example, launcher, tmp_path):
    saved = tmp_path / "model.pt"
    command = [sys.executable, *launcher, *example, "--steps", "1000000", "--save", str(saved)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()) as one:
        first = one.stdout.readline()
        one.send_signal(signal.SIGINT)
        out, err = one.communicate(timeout=60)
    assert first.startswith("step 20: loss"), err
    assert re.search(rf"stopped after step \d+ of 1000000; saved {saved}\nheld out: ", out), out + err
    assert saved.exists()
    # torchrun has more to say, and a status of its own
    assert launcher or (one.returncode == 0 and "Traceback" not in err)
