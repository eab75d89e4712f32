"""The pretraining script: trains on real text, goes on from its checkpoint as if never stopped, says what is wrong."""

import re
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
    ],
)
def test_bad_input(arguments, message, text, tmp_path):
    given = arguments if "--data" in arguments else [*arguments, "--data", str(text)]
    ended = run(*given, "--save", str(tmp_path / "none"))
    assert ended.returncode == 1 and message in ended.stderr and "Traceback" not in ended.stderr
