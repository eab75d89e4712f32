"""What setup.py says where it can't build what it was asked for: one sentence, and no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from packaging_support import run

#: Runs setup.py for its version alone, with torch as an argument says it is.
SETUP = (
    "import runpy, sys, torch; torch.version.cuda = eval(sys.argv[1]); torch.cuda.is_available = lambda: False;"
    "sys.argv = ['setup.py', '--version']; runpy.run_path('setup.py', run_name='__main__')"
)


def toolkit(folder: Path, release: str) -> Path:
    """A folder with an nvcc that only knows its release."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    nvcc.chmod(0o755)
    return folder


def test_missing_torch_gives_the_commands(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch')\n")
    done = run("setup.py", "--version", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == (
        "fastmoe_cpp is compiled against torch, which is not installed here: run `pip install torch` first, "
        "then `pip install --no-build-isolation .`\n"
    )


def test_force_cuda_without_nvcc(tmp_path: Path) -> None:
    done = run("-c", SETUP, "'13.0'", FORCE_CUDA="1", CUDA_HOME=str(tmp_path / "none"))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "fastmoe_cpp: FORCE_CUDA=1 asks for the CUDA half, but nvcc was not found: install the CUDA toolkit or set "
        "CUDA_HOME"
    )


def test_force_cuda_with_a_cpu_build_of_torch(tmp_path: Path) -> None:
    done = run("-c", SETUP, "None", FORCE_CUDA="1", CUDA_HOME=str(toolkit(tmp_path, "13.0")))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("this torch is a CPU build: install a CUDA build of torch")


def test_force_cuda_with_another_major_version(tmp_path: Path) -> None:
    done = run("-c", SETUP, "'13.0'", FORCE_CUDA="1", CUDA_HOME=str(toolkit(tmp_path, "11.8")))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(
        "nvcc is of CUDA 11.8 and torch was built for CUDA 13.0: the major versions must be equal"
    )


def test_a_newer_minor_version_is_taken(tmp_path: Path) -> None:
    done = run("-c", SETUP, "'13.0'", FORCE_CUDA="1", CUDA_HOME=str(toolkit(tmp_path, "13.2")))
    assert done.returncode == 0, done.stderr


def test_without_a_gpu_the_cpu_half_is_built_and_said(tmp_path: Path) -> None:
    done = run("-c", SETUP, "'13.0'", FORCE_CUDA="")
    assert done.returncode == 0, done.stderr
    assert "no GPU is visible: building the CPU half only (FORCE_CUDA=1 builds the CUDA half too)" in done.stdout


@pytest.mark.skipif(torch.version.cuda is None, reason="a CPU build of torch has no CUDA sources to compile")
def test_hopper_sources_are_left_out_where_the_architecture_is(tmp_path: Path) -> None:
    program = SETUP.replace("['setup.py', '--version']; runpy", "['setup.py', '--version']; setup = runpy")
    program += "; print([s for s in setup['extensions'](True)[0].sources if 'sm90' in s] == [])"
    home = str(toolkit(tmp_path, "13.0"))
    for architectures, without in (("8.0", "True"), ("8.0;9.0a", "False")):
        done = run("-c", program, "'13.0'", FORCE_CUDA="1", CUDA_HOME=home, TORCH_CUDA_ARCH_LIST=architectures)
        assert done.stdout.splitlines()[-1:] == [without], done.stderr
