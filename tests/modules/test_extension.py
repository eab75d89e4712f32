"""Loading the compiled library: what it says where it can't, and of a CUDA tensor in a library without CUDA."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastmoe_cpp
from fastmoe_cpp import _extension

PACKAGE = Path(fastmoe_cpp.__file__).parent
HERE = {"torch": "2.11.0+cu130", "cuda": "13.0", "python": "3.12.1"}


@pytest.mark.parametrize("built,different", [
    ({"torch": "2.11.0+cu130", "cuda": "13.0"}, False),
    ({"torch": "2.11.1", "cuda": None}, False),
    ({"torch": "2.11.0", "cuda": "13.2"}, False),
    ({"torch": "2.12.0", "cuda": "13.0"}, True),
    ({"torch": "2.1.0", "cuda": None}, True),
    ({"torch": "2.11.0", "cuda": "12.8"}, True),
])  # fmt: skip
def test_mismatch(built, different):
    assert _extension.mismatch(built, HERE) is different


def test_a_cuda_library_does_not_fit_a_torch_without_cuda():
    assert _extension.mismatch({"torch": "2.11.0", "cuda": "13.0"}, HERE | {"cuda": None})
    assert not _extension.mismatch({"torch": "2.11.0", "cuda": None}, HERE | {"cuda": None})


def package_without_library(where: Path, record: str | None, library: bytes | None) -> Path:
    copy = where / "fastmoe_cpp"
    shutil.copytree(
        PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "_build.py", "__pycache__", "include", "share")
    )
    if record is not None:
        (copy / "_build.py").write_text(record)
    if library is not None:
        (copy / "libfastmoe_cpp.so").write_bytes(library)
    return where


def python(where: Path, code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=where, capture_output=True, text=True, timeout=120)


def test_an_import_without_the_library_names_what_mends_it(tmp_path):
    where = package_without_library(tmp_path, None, None)
    done = python(where, "from fastmoe_cpp import MoE")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("ImportError: fastmoe_cpp's compiled library can't be loaded: ")
    assert "libfastmoe_cpp.so is not in" in last and "pip install --no-build-isolation" in last
    code = "import fastmoe_cpp as f; print(f.MoEConfig(8, 4, 2).top_k, f.reference.route.__name__)"
    done = python(where, code)
    assert done.stdout.strip() == "2 route" and "RuntimeWarning: fastmoe_cpp's compiled library" in done.stderr
    done = python(where, "import fastmoe_cpp.ops")
    assert done.returncode == 1 and "pip install" in done.stderr.strip().splitlines()[-1]


def test_another_torch_is_named(tmp_path):
    record = "BUILD = {'torch': '2.3.1', 'cuda': '12.1', 'python': '3.12.1', 'architectures': '9.0a'}"
    done = python(package_without_library(tmp_path, record, b"never opened"), "from fastmoe_cpp import MoE")
    last = done.stderr.strip().splitlines()[-1]
    here = f"torch {torch.__version__} / {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'no CUDA'}"
    assert f"it was built for torch 2.3.1 / CUDA 12.1 / Python 3.12.1, you have {here} / Python" in last
    assert "C++ extensions fit one release of torch" in last  # it was not tried
    assert "Build it again with: FORCE_CUDA=1 pip install" in last


def test_a_broken_library_says_why(tmp_path):
    record = f"BUILD = {{'torch': '{torch.__version__}', 'cuda': None, 'python': '3.12.1'}}"
    done = python(package_without_library(tmp_path, record, b"not a library"), "from fastmoe_cpp import fused_experts")
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError") and "libfastmoe_cpp.so: file too short" in last
    assert "pip install" in last


@pytest.mark.skipif(bool((_extension.build_record() or {}).get("cuda")), reason="this library has its CUDA half")
def test_a_cuda_call_without_cuda_says_how_to_rebuild():
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    for op, args in ((torch.ops.fastmoe_cpp.z_loss, (torch.zeros(2, 2), 1.0)),
                     (torch.ops.fastmoe_cpp.route, (torch.zeros(2, 2), 1))):  # fmt: skip
        with pytest.raises(NotImplementedError, match="fastmoe_cpp was built without CUDA .* FORCE_CUDA=1 pip install"):
            op.default.redispatch(cuda, *args)


def test_every_operator_has_a_kernel_for_every_device_it_may_meet():
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("fastmoe_cpp::")]
    assert len(names) >= 22
    composite = {"fastmoe_cpp::outside_backward"}
    for name in set(names) - composite:
        for key in ("CPU", "CUDA", "Meta"):
            # `experts` lives above the kernels: its autograd function calls experts_forward
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key) or name == "fastmoe_cpp::experts", (
                name,
                key,
            )


def test_public_names():
    assert set(fastmoe_cpp.__all__) <= set(dir(fastmoe_cpp))
    with pytest.raises(AttributeError, match="module 'fastmoe_cpp' has no attribute 'MoD'"):
        fastmoe_cpp.MoD  # noqa: B018
