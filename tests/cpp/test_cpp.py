"""Builds the C++ tests and the C++ example with CMake on the LibTorch inside the installed torch, and runs them.

Every TEST of tests/cpp/*_test.cpp is a test here. No CUDA toolkit is needed, and none is found: CUDA_HOME and the nvcc
on PATH are hidden from CMake, because a CPU-only machine must be able to build against a CUDA build of torch.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastmoe_cpp import MoE, MoEConfig, RouterConfig, cpp

ROOT = Path(__file__).resolve().parents[2]
TESTS = {
    "moe_test": ["dispatch_test.cpp", "moe_test.cpp", "state_dict_test.cpp"],
    "configuration_test": [
        "gemv_configuration_test.cpp",
        "portable_configuration_test.cpp",
        "sm90_configuration_test.cpp",
    ],
}
NAMES = [
    pytest.param(program, name, id=name)
    for program, files in TESTS.items()
    for file in files
    for name in re.findall(r"^TEST\((\w+)\)", (Path(__file__).parent / file).read_text(), re.MULTILINE)
]


def cmake() -> str:
    beside = Path(sys.executable).with_name("cmake")
    found = str(beside) if beside.exists() else shutil.which("cmake")
    assert found, "cmake was not found: pip install -r requirements/test.txt"
    return found


def environment() -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("CUDA")}
    env["PATH"] = os.pathsep.join(p for p in env["PATH"].split(os.pathsep) if not Path(p, "nvcc").exists())
    return env


def build(source: Path, *options: str) -> Path:
    """Configures and builds a CMake project in a folder that is kept, so that only what changed is compiled again."""
    folder = ROOT / "build" / f"cpp-torch{torch.__version__.split('+')[0]}" / source.relative_to(ROOT)
    configure = [cmake(), "-S", source, "-B", folder, f"-DCMAKE_PREFIX_PATH={cpp.cmake_prefix_path}", *options]
    for command in (configure, [cmake(), "--build", folder, "--parallel", str(os.cpu_count())]):
        done = subprocess.run(command, capture_output=True, text=True, env=environment())
        assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return folder


@pytest.fixture(scope="session")
def tests() -> Path:
    return build(ROOT / "tests" / "cpp")


@pytest.fixture(scope="session")
def results(tests: Path) -> dict[str, str]:
    """The line each test printed, by its name."""
    lines = {}
    for program in TESTS:
        done = subprocess.run([tests / program], capture_output=True, text=True, timeout=300)
        for line in done.stdout.splitlines():
            found = re.match(r"(ok|FAILED) (\w+)", line)
            if found:
                lines[found[2]] = line
        failed = any(line.startswith("FAILED") for line in lines.values())
        assert done.returncode == 0 or failed, f"{program} ended with {done.returncode}: {done.stdout}\n{done.stderr}"
    return lines


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("program", "name"), NAMES)
def test_cpp(program: str, name: str, results: dict[str, str]) -> None:
    assert results.get(name) == f"ok {name}"


@pytest.mark.timeout(900)
def test_state_dict_travels_to_cpp_and_back(tests: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MoEConfig(
        hidden_size=8, intermediate_size=6, num_experts=4, bias=True, shared_intermediate_size=5,
        router=RouterConfig(bias=True, expert_bias=True), initializer_range=0.5,
    )  # fmt: skip
    layer = MoE(config)
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            tensor.normal_()
    torch.save(dict(layer.state_dict()), tmp_path / "python.pt")
    torch.save(x, tmp_path / "x.pt")
    done = subprocess.run(
        [tests / "moe_test", "answers_python"],
        env={**os.environ, "FASTMOE_CPP_EXCHANGE": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "ok answers_python\n", done.stdout + done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "y.pt", weights_only=True), layer(x), rtol=1e-5, atol=1e-6)
    returned = torch.load(tmp_path / "cpp.pt", weights_only=True)
    expected = layer.state_dict()
    assert returned.keys() == expected.keys()
    for name, tensor in returned.items():
        moved = expected[name] if name == "router.expert_bias" else expected[name] + 0.125
        assert torch.equal(tensor, moved), name
    layer.load_state_dict(returned)


@pytest.mark.timeout(900)
def test_example_trains_saves_and_loads(tmp_path: Path) -> None:
    folder = build(ROOT / "examples" / "cpp")
    done = subprocess.run([folder / "train", tmp_path / "moe.pt"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", done.stdout)]
    assert len(losses) == 7 and losses[-1] < 0.5 * losses[0]
    assert "outputs are equal" in done.stdout


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("library", "has no libfastmoe_cpp.so: build it"),
        ("torch", "LibTorch was not found"),
        ("record", "was built for torch 1.13"),
    ],
)
def test_cmake_package_says_what_is_missing(change: str, sentence: str, tmp_path: Path) -> None:
    package = tmp_path / "fastmoe_cpp"
    share = package / "share" / "cmake" / "fastmoe_cpp"
    share.mkdir(parents=True)
    for script in (ROOT / "cmake").glob("*.cmake"):
        shutil.copy(script, share)
    if change != "library":
        (package / "libfastmoe_cpp.so").touch()
    (package / "_build.py").write_text("BUILD = {'torch': '1.13.0', 'cuda': None}\n")
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.18)\nproject(p LANGUAGES NONE)\nfind_package(fastmoe_cpp REQUIRED)\n"
    )
    prefix = str(package) if change != "record" else f"{package};{Path(torch.__file__).parent}"
    done = subprocess.run(
        [cmake(), "-S", tmp_path, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={prefix}"],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode != 0
    assert sentence in " ".join(done.stderr.split())
