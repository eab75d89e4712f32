"""The demo under torchrun: the curve of two ranks is the plain loop's and one rank's, and one rank goes on from it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "--layers 2 --hidden-size 32 --heads 2 --experts 4 --top-k 2 --expert-size 32 --context 32 --batch-size 6 "
    "--warmup 4 --eval-every 6 --sample-bytes 10 --learning-rate 1e-2 --steps 12"
).split()
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def curve(folder: Path) -> list[dict]:
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [r for r in log if r["kind"] == "step"]


def test_two_ranks_train_as_one(tmp_path, backend):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(30):
        (text / f"{number}.py").write_text("".join(f"def f{i}(x): return x * {i * number}\n" for i in range(60)))
    gpu = backend == "nccl"
    program, data = "examples/train_text.py", ["--data", str(text), *TINY, *(["--device", "cuda"] if gpu else [])]
    # sums of attention's gradients have no order on a GPU, and Adam makes much of small ones
    near = 1e-3 if gpu else 1e-5
    two, one, resumed = (tmp_path / name for name in ("two", "one", "resumed"))

    done = run(*TORCHRUN, program, "--expert-parallel", "2", *data, "--out", str(two))
    assert done.returncode == 0, done.stderr
    assert "expert_parallel=rank 0 of 2 by all_to_all_single" in done.stdout
    assert done.stdout.count("loss curves agree") == 1
    done = run(program, *data, "--no-compare", "--out", str(one))
    assert done.returncode == 0, done.stderr
    for a, b in zip(curve(two), curve(one), strict=True):
        ours, alone = a["fastmoe_cpp"], b["fastmoe_cpp"]
        assert ours["bits_per_byte"] == pytest.approx(alone["bits_per_byte"], rel=near)
        assert ours["balance_loss"] == pytest.approx(alone["balance_loss"], rel=near)
        assert gpu or ours["tokens_per_expert"] == alone["tokens_per_expert"]

    # halves of every expert in place of half of the experts; one process goes on
    parts = tmp_path / "parts"
    options = ["--expert-tensor-parallel", "2", *data, "--no-compare", "--stop-at", "7", "--out", str(parts)]
    done = run(*TORCHRUN, program, *options)
    assert done.returncode == 0, done.stderr
    assert "each expert over 2: expert_tensor_parallel=rank 0 of 2" in done.stdout
    done = run(program, "--resume", str(parts / "checkpoint.pt"), "--sample-bytes", "10")
    assert done.returncode == 0, done.stderr
    for a, b in zip(curve(parts), curve(one), strict=True):
        assert a["fastmoe_cpp"]["bits_per_byte"] == pytest.approx(b["fastmoe_cpp"]["bits_per_byte"], rel=near)

    done = run(
        *TORCHRUN, program, "--expert-parallel", "2", *data, "--no-compare", "--stop-at", "7", "--out", str(resumed)
    )
    assert done.returncode == 0 and "stopped at step 7 of 12" in done.stdout, done.stderr
    done = run(program, "--resume", str(resumed / "checkpoint.pt"), "--sample-bytes", "10")
    assert done.returncode == 0, done.stderr
    for a, b in zip(curve(resumed), curve(one), strict=True):
        assert a["fastmoe_cpp"]["bits_per_byte"] == pytest.approx(b["fastmoe_cpp"]["bits_per_byte"], rel=near)
    assert gpu or (resumed / "sample.txt").read_text() == (one / "sample.txt").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--expert-parallel", "2"],
            "--expert-parallel 2 needs a number of processes N that it divides, and this is one",
        ),
        (["--expert-parallel", "3"], "--expert-parallel must divide --experts 8, got 3"),
        (["--expert-tensor-parallel", "3"], "--expert-tensor-parallel must divide --expert-size 256, got 3"),
        (["--expert-parallel", "2", "--compile"], "--compile: the exchange between processes can't be compiled"),
    ],
)
def test_refusals(options, message, tmp_path):
    done = run("examples/train_text.py", *options, "--out", str(tmp_path))
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
