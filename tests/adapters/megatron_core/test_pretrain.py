"""The pretraining script: trains on real text, goes on from its checkpoint as if never stopped, says what is wrong."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .host import megatron_core  # noqa: F401  the package, or a skip

SCRIPT = Path(__file__).parents[3] / "examples" / "megatron" / "pretrain_core.py"
SMALL = (
    "--layers 1 --hidden-size 16 --heads 2 --experts 4 --expert-size 16 --context 16 --micro-batch-size 2 "
    "--device cpu --learning-rate 1e-2 --eval-every 100"
).split()


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *SMALL, *arguments], capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "some.txt").write_text("".join(f"{i} and {i + 1} make {2 * i + 1}.\n" for i in range(400)))
    return folder


def held_out(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return re.findall(r"held out ([\d.]+)", done.stdout)[-1]


def test_trains_and_goes_on(text, tmp_path):
    whole = run("--data", str(text), "--steps", "30", "--save", str(tmp_path / "whole"))
    assert float(held_out(whole)) < 4.5
    run("--data", str(text), "--steps", "20", "--save", str(tmp_path / "parts"))
    again = run("--data", str(text), "--steps", "30", "--save", str(tmp_path / "parts"), "--resume")
    assert "going on after step 20" in again.stdout
    assert held_out(again) == held_out(whole)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "nowhere"], "--data: there is no folder or file nowhere"),
        (["--resume"], "there is no checkpoint in"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--experts", "0"], "--experts must be at least 1, got 0"),
        (["--hidden-size", "18"], "--hidden-size must be a multiple of 2 * --heads = 4, got 18"),
        (["--top-k", "99"], "--top-k must be at most --experts = 4, got 99"),
        (["--learning-rate", "nan"], "--learning-rate must be above 0 and --aux-loss at least 0, got nan and 0.01"),
        (["--expert-parallel", "3"], "--expert-parallel must divide --experts 4, got 3"),
        (
            ["--expert-parallel", "2"],
            "--expert-parallel 2 needs a number of processes N that it divides, and this is one of 1",
        ),
        (["--device", "cuda"], "--device cuda: torch sees no GPU here"),
        (["--save", "/proc/x"], "--save: can't write into the folder /proc/x: No such file or directory"),
    ],
)
def test_bad_input(arguments, message, text, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    ended = run("--data", str(text), "--save", str(tmp_path / "none"), *arguments)
    assert ended.returncode == 2 and ended.stderr.startswith("pretrain_core: ")
    assert message in ended.stderr and ended.stderr.count("\n") == 1


def test_a_checkpoint_of_another_model_is_refused(text, tmp_path):
    options = ["--data", str(text), "--save", str(tmp_path)]
    assert run(*options, "--steps", "1", "--top-k", "1").returncode == 0
    folder = tmp_path / "step_000001"

    def refused() -> str:
        ended = run(*options, "--steps", "2", "--resume", "--layers", "2")
        assert ended.returncode == 2 and "Traceback" not in ended.stderr
        return ended.stderr

    assert refused() == f"pretrain_core: --resume: {folder} was trained with --layers 1, not 2\n"
    # as older versions left it
    (folder / "shape.json").unlink()
    assert f"pretrain_core: --resume: {folder} can't be read into this model: Global shape mismatch" in refused()
    # as an end within the save left it
    (folder / "ranks").unlink()
    assert refused() == f"pretrain_core: --resume: the checkpoint {folder} is not complete\n"


def test_ctrl_c_saves_after_the_step(text, tmp_path):
    options = [*SMALL, "--data", str(text), "--save", str(tmp_path)]
    command = [sys.executable, str(SCRIPT), *options, "--steps", "1000000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as one:
        lines = iter(one.stdout.readline, "")
        assert any(line.startswith("step    10 ") for line in lines)
        one.send_signal(signal.SIGINT)
        out, err = one.communicate(timeout=60)
    assert one.returncode == 0 and "Traceback" not in err, err
    done = re.search(r"stopped after step (\d+) of 1000000; go on with --resume", out)[1]
    again = run("--data", str(text), "--save", str(tmp_path), "--resume", "--steps", str(int(done) + 1))
    assert f"going on after step {done}\n" in again.stdout, again.stderr
