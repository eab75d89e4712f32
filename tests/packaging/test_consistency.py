"""What is written in two places says the same in both, and what the documents tell people to type exists."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging_support import ROOT, run

import fastmoe_cpp
from fastmoe_cpp import __main__ as commands
from fastmoe_cpp.checkpoint.layouts import LAYOUTS
from megatron_adapters import HOSTS

README = (ROOT / "README.md").read_text()


def pins(name: str) -> dict[str, set[str]]:
    lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    found: dict[str, set[str]] = {}
    for line in lines:
        match = re.match(r"([\w.-]+)==([\w.]+)", line)
        assert match or not line or line.startswith(("#", "-r")), f"not pinned: {line}"
        if match:
            found.setdefault(match[1], set()).add(match[2])
    return found


def test_one_version() -> None:
    project = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    cmake = (ROOT / "cmake" / "fastmoe_cppConfigVersion.cmake").read_text()
    assert fastmoe_cpp.__version__ == project
    assert re.search(r'PACKAGE_VERSION "(.+)"', cmake)[1] == project
    major, minor, _ = project.split(".")
    assert f'MAJOR STREQUAL "{major}"' in cmake and f'MINOR STREQUAL "{minor}"' in cmake
    try:
        assert importlib.metadata.version("fastmoe_cpp") == project
    except importlib.metadata.PackageNotFoundError:
        pass  # run from a tree that was built in place and not installed


def test_every_requirement_is_pinned_and_hooks_use_the_same() -> None:
    for name in ("torch", "build", "demo", "test", "lint", "tidy"):
        assert pins(name)
    hooks = dict(re.findall(r"\[(\w[\w-]*)==([\w.]+)\]", (ROOT / ".pre-commit-config.yaml").read_text()))
    assert {name: {version} for name, version in hooks.items()} == pins("lint")


def test_make_targets_that_documents_name_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", README + (ROOT / ".ci" / "run").read_text()))
    assert {"demo", "test", "lint", "format", "tidy", "bench", "bench-gpu", "cuda", "clean"} <= targets
    assert {"demo", "test"} <= named <= targets


def test_commands_that_documents_name_exist() -> None:
    named = set(re.findall(r"python -m fastmoe_cpp (\w+)", README))
    help_text = subprocess.run(
        [sys.executable, "-m", "fastmoe_cpp", "--help"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    offered = set(re.findall(r"^    (\w+) ", help_text, re.MULTILINE))
    assert "doctor" in named and named <= offered == {"doctor", "bench", "convert", "inspect", "upcycle"}
    assert commands.__doc__ is not None and offered == set(re.findall(r"python -m fastmoe_cpp (\w+)", commands.__doc__))


def test_bench_hands_its_arguments_to_the_benchmark() -> None:
    done = run("-m", "fastmoe_cpp", "bench", "--help")
    assert done.returncode == 0 and "usage" in done.stdout and "--rounds" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shapes", "4,16,8,4,9"], "K of at most E, got 4,16,8,4,9"),
        (["--shapes", "4,0,8,4,2"], "sizes of at least 1 and K of at most E, got 4,0,8,4,2"),
        (["--shapes", "nemo"], "--shapes must name one of mixtral, e32, olmoe, qwen3"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--json", "/nowhere/cpu.json"], "/nowhere/cpu.json can't be written"),
        (["--png", "."], ". can't be written: it must be a file"),
    ],
)
def test_bench_refuses_before_it_measures(arguments: list[str], said: str) -> None:
    done = run("-m", "fastmoe_cpp", "bench", *arguments)
    assert done.returncode == 2 and not done.stdout
    last = done.stderr.splitlines()[-1]
    assert last.startswith("python -m fastmoe_cpp bench: error: ") and said in last


def test_paths_that_documents_name_exist() -> None:
    paths = re.findall(
        r"`((?:csrc|fastmoe_cpp|examples|tests|benchmarks|cmake|requirements|megatron_adapters)/[\w./-]*)`", README
    )
    assert len(paths) > 5
    assert [p for p in paths if not (ROOT / p).exists()] == []


def test_prefix_path_that_documents_name_holds_the_cmake_package() -> None:
    commands = set(re.findall(r"python -c '([^']+)'", README + (ROOT / "examples/cpp/CMakeLists.txt").read_text()))
    assert len(commands) == 1
    printed = run("-c", commands.pop()).stdout.strip()
    package, torch = (Path(folder) for folder in printed.split(";"))
    assert (package / "share/cmake/fastmoe_cpp/fastmoe_cppConfig.cmake").is_file()
    assert (torch / "share/cmake/Torch/TorchConfig.cmake").is_file()


def test_ci_runs_everything() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    assert subprocess.run(["bash", "-n", ROOT / ".ci" / "run"]).returncode == 0
    for target in ("make lint", "make test 2", "make test-hosts", "make cuda"):
        assert target in script


def test_hosts_that_documents_promise_are_served() -> None:
    """Every adapter has its words and its page in the README, and every layout its row in the page of checkpoints."""
    hosts = README[README.index("## In the programs people train with") : README.index("## Checkpoints")]
    for name in HOSTS.values():
        assert all(word in hosts for word in name.split()), name
    pages = set(re.findall(r"\]\((docs/[\w./-]+)\)", README))
    assert {str(page.relative_to(ROOT)) for page in (ROOT / "docs" / "hosts").iterdir()} <= pages
    assert [page for page in pages if not (ROOT / page).is_file()] == []
    versions = {path.stem for path in (ROOT / "requirements" / "hosts").iterdir()}
    assert {"transformers-4", "torchtitan-0.2", "torchtitan-0.3", "megatron-core", "mergekit", "peft"} <= versions
    layouts = (ROOT / "docs" / "checkpoints.md").read_text().split("## Layouts")[1].split("\n\n")[1]
    rows = re.findall(r"^\| (`.*) \|", layouts, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[0])}
    for row in rows:
        if "_packed`" in row.split("|")[0] and "each also" in row.split("|")[0]:
            plain = re.findall(r"`(\w+)`", row.split("|")[0].split("each also")[0])
            named |= {f"{name}_packed" for name in plain}
    assert named - {"_packed"} == set(LAYOUTS)
