"""The example trains on two processes and reads what it wrote on one."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--steps", "3", "--experts", "4", "--layers", "1", "--width", "16", "--context", "16", "--batch-size", "2"]


def run(*arguments):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )


def test_two_processes_and_one_file(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a line of text to learn by heart\n" * 200)
    example = [str(ROOT / "examples/fmoe/train.py"), *TINY, "--data", str(text), "--device", "cpu"]
    saved = tmp_path / "model.pt"
    done = run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *example, "--save", str(saved))
    assert done.returncode == 0, done.stderr
    final, again = re.search(r"held out: ([\d.]+); of .*: ([\d.]+)\n", done.stdout).groups()
    assert saved.exists() and abs(float(final) - float(again)) < 1e-3
    assert "step 3: loss" in done.stdout


def test_bad_input_gets_one_sentence(tmp_path):
    done = run(str(ROOT / "examples/fmoe/train.py"), "--data", str(tmp_path / "nothing"))
    assert done.returncode == 1 and done.stderr.startswith("train: ") and done.stderr.count("\n") == 1
