"""The CPU kernels of every instruction set this CPU has, and not only of the best: the same tests in a process that is
told to use another one."""

import os
import subprocess
import sys

import pytest
import torch

LEVELS = ["DEFAULT", "AVX2", "AVX512"]
HERE = torch.backends.cpu.get_cpu_capability()
OTHERS = LEVELS[: LEVELS.index(HERE)] if HERE in LEVELS else []


@pytest.mark.parametrize(
    "level", OTHERS or [pytest.param("none", marks=pytest.mark.skip(reason="one instruction set"))]
)
def test_slower_instruction_sets(level):
    """Activations at their corners, odd sizes in every dtype, sums, exponentials and the router's scores."""
    folder = os.path.dirname(os.path.abspath(__file__))
    files = [os.path.join(folder, f"test_{name}.py") for name in ("experts", "combine", "losses", "router")]
    chosen = (
        "corners or in_order or many_rows or nan_logits or extreme or (T7 and against_oracle) or (T129 and combine)"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen, *files],
        env=os.environ | {"ATEN_CPU_CAPABILITY": level.lower(), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        cwd=os.path.dirname(os.path.dirname(folder)),
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
