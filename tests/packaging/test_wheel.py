"""The wheel holds what users need and nothing else, and works where the source tree is not."""

from __future__ import annotations

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from packaging_support import ROOT, Wheel, run
from torch.utils import cpp_extension

pytestmark = pytest.mark.timeout(900)

HEADERS = ["fastmoe_cpp.h", "nn/moe.h", "nn/options.h", "nn/state_dict.h"]
HEADERS += [f"ops/{op}.h" for op in ("combine", "dispatch", "exchange", "experts", "losses", "router")]


def test_wheel_holds_what_it_should_and_nothing_else(wheel: Wheel) -> None:
    tag = cpp_extension.sysconfig.get_config_var("EXT_SUFFIX")
    expected = {f"fastmoe_cpp/include/fastmoe_cpp/{header}" for header in HEADERS}
    expected |= {f"fastmoe_cpp/share/cmake/fastmoe_cpp/{p.name}" for p in ROOT.glob("cmake/*.cmake")}
    expected |= {f"fastmoe_cpp/_C{tag}", "fastmoe_cpp/libfastmoe_cpp.so", "fastmoe_cpp/_C.pyi", "fastmoe_cpp/py.typed"}
    expected |= {"fastmoe_cpp/_build.py"}
    for package in ("fastmoe_cpp", "megatron_adapters"):
        expected |= {str(p.relative_to(ROOT)) for p in ROOT.glob(f"{package}/**/*.py")}
    with zipfile.ZipFile(wheel.file) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        infos = {Path(name).name for name in archive.namelist() if ".dist-info/" in name}
    assert names == expected
    assert infos == {"METADATA", "WHEEL", "RECORD", "LICENSE", "top_level.txt"}


def test_installed_wheel_trains(wheel: Wheel) -> None:
    program = (
        "import torch, fastmoe_cpp; from fastmoe_cpp import MoE, MoEConfig; print(fastmoe_cpp.__file__);"
        "layer = MoE(MoEConfig(hidden_size=16, intermediate_size=8, num_experts=4));"
        "x = torch.randn(5, 16, requires_grad=True); layer(x).square().sum().backward();"
        "print(x.grad.abs().sum().item() > 0, layer.router.weight.grad.shape)"
    )
    done = wheel.run("-W", "error", "-c", program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(wheel.site / "fastmoe_cpp" / "__init__.py"), "True torch.Size([4, 16])"]


def test_installed_wheel_records_its_build(wheel: Wheel) -> None:
    program = "import torch, platform; from fastmoe_cpp._build import BUILD as b; from fastmoe_cpp import _C;"
    program += "i = _C.build_info(); print(b['torch'] == torch.__version__, b['python'] == platform.python_version(),"
    program += "b['cuda'] == i['cuda'], torch.__version__.startswith(i['torch']))"
    assert wheel.run("-c", program).stdout == "True True True True\n"


def test_installed_wheel_has_a_doctor_and_no_benchmarks(wheel: Wheel) -> None:
    done = wheel.run("-m", "fastmoe_cpp", "doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"in {wheel.site / 'fastmoe_cpp'}" in done.stdout
    done = wheel.run("-m", "fastmoe_cpp", "bench")
    assert done.returncode == 1 and "the benchmarks are in the source tree" in done.stderr


@pytest.mark.parametrize(
    ("change", "sentences"),
    [
        ("record", ["it was built for torch 1.13.0", "you have torch", "pip install --no-build-isolation"]),
        ("library", ["libfastmoe_cpp.so is not in", "pip install --no-build-isolation"]),
    ],
)
def test_import_that_fails_says_why_and_what_mends_it(
    wheel: Wheel, change: str, sentences: list[str], tmp_path: Path
) -> None:
    site = tmp_path / "site"
    shutil.copytree(wheel.site, site)
    if change == "library":
        (site / "fastmoe_cpp" / "libfastmoe_cpp.so").unlink()
    else:
        (site / "fastmoe_cpp" / "_build.py").write_text(
            "BUILD = {'torch': '1.13.0', 'cuda': None, 'architectures': None, 'python': '3.10.0'}\n"
        )
    broken = Wheel(wheel.file, site)
    done = broken.run("-W", "ignore", "-c", "from fastmoe_cpp import MoE")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("ImportError: ")
    for sentence in sentences:
        assert sentence in last
    # the doctor works where the library does not, and says so
    done = broken.run("-m", "fastmoe_cpp", "doctor")
    assert done.returncode == 1 and sentences[0] in done.stdout and "Traceback" not in done.stderr


def test_public_header_compiles_from_the_installed_wheel(wheel: Wheel, tmp_path: Path) -> None:
    source = tmp_path / "user.cpp"
    source.write_text(
        "#include <fastmoe_cpp/fastmoe_cpp.h>\n"
        "at::Tensor f(fastmoe_cpp::MoE layer, at::Tensor x) { return layer(x) + fastmoe_cpp::sinkhorn(x); }\n"
    )
    include = [f"-I{wheel.site / 'fastmoe_cpp' / 'include'}", *(f"-isystem{p}" for p in cpp_extension.include_paths())]
    standard = "-std=c++20" if "c++20'" in Path(cpp_extension.__file__).read_text().split("def CppExtension")[0] else ""
    command = ["c++", *filter(None, [standard]), "-fsyntax-only", "-Wall", "-Werror", *include, str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_source_archive_holds_what_the_build_reads(tmp_path: Path) -> None:
    done = run("-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path, filter="data")
    (unpacked,) = [p for p in tmp_path.iterdir() if p.is_dir()]
    needed = [p for folder in ("csrc", "cmake", "requirements") for p in ROOT.glob(f"{folder}/**/*") if p.is_file()]
    needed += [ROOT / name for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md", "Makefile")]
    needed += [p for p in ROOT.glob("fastmoe_cpp/*.py*") if p.name != "_build.py"]
    missing = [p.relative_to(ROOT) for p in needed if not (unpacked / p.relative_to(ROOT)).is_file()]
    assert not missing
    assert not [p for p in unpacked.rglob("*") if p.suffix in (".so", ".o", ".pyc")]
