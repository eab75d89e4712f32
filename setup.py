"""Builds two libraries: libfastmoe_cpp.so, the operators (no Python in it, so that C++ programs can link it), and
fastmoe_cpp/_C, the pybind11 module over it.

The CUDA half is built where a GPU is visible or FORCE_CUDA=1 is set, and never where FORCE_CUDA=0 is.
TORCH_CUDA_ARCH_LIST names the architectures (default "8.0;9.0a"), MAX_JOBS the parallel compilations.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    sys.exit("fastmoe_cpp is compiled against torch, which is not installed here: run `pip install torch` first, "
             "then `pip install --no-build-isolation .`")

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
os.chdir(ROOT)
LIBRARY = "fastmoe_cpp.libfastmoe_cpp"


def nvcc() -> str | None:
    home = cpp_extension.CUDA_HOME
    path = Path(home, "bin", "nvcc") if home else None
    return str(path) if path and path.exists() else None


def wants_cuda() -> bool:
    """Whether to build the CUDA half; prints why not."""
    asked = os.environ.get("FORCE_CUDA", "")
    if asked == "0":
        return False
    if asked != "1" and not torch.cuda.is_available():
        print("fastmoe_cpp: no GPU is visible: building the CPU half only (FORCE_CUDA=1 builds the CUDA half too)")
        return False
    lacks = None
    if torch.version.cuda is None:
        lacks = "this torch is a CPU build: install a CUDA build of torch"
    elif nvcc() is None:
        lacks = "nvcc was not found: install the CUDA toolkit or set CUDA_HOME"
    else:
        text = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
        toolkit = re.search(r"release (\d+)\.(\d+)", text)
        if toolkit and toolkit[1] != torch.version.cuda.split(".")[0]:
            lacks = (f"nvcc is of CUDA {toolkit[1]}.{toolkit[2]} and torch was built for CUDA {torch.version.cuda}: "
                     "the major versions must be equal")
    if lacks and asked == "1":
        sys.exit(f"fastmoe_cpp: FORCE_CUDA=1 asks for the CUDA half, but {lacks}")
    if lacks:
        print(f"fastmoe_cpp: {lacks}; building the CPU half only")
    return lacks is None


def limit_jobs() -> None:
    """A compilation against torch's headers takes up to 3 GB, so memory limits the jobs as well as cores."""
    if "MAX_JOBS" not in os.environ:
        gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        os.environ["MAX_JOBS"] = str(max(1, min(len(os.sched_getaffinity(0)), int(gib / 3))))


def extensions(cuda: bool) -> list:
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0a")
    architectures = os.environ["TORCH_CUDA_ARCH_LIST"].replace(" ", ";").split(";")
    sources = [p for d in ("ops", "autograd", "meta", "autocast", "cpu", "nn") for p in ROOT.glob(f"csrc/{d}/**/*.cpp")]
    sources.append(ROOT / "csrc/library.cpp")
    macros, libraries = [], ["c10", "torch", "torch_cpu"]
    if cuda:
        hopper = any(a.startswith("9.0a") for a in architectures)
        sources += [p for p in ROOT.glob("csrc/cuda/**/*.cpp")]
        sources += [p for p in ROOT.glob("csrc/cuda/**/*.cu") if hopper or "sm90" not in p.parts]
        macros += [("FASTMOE_CUDA", f'"{torch.version.cuda}"')] + ([("FASTMOE_SM90", None)] if hopper else [])
        libraries += ["c10_cuda", "torch_cuda", "cudart"]
    kind = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    optimise = ["-O3", "-fopenmp", "-fno-math-errno", "-Wall", "-Wno-unknown-pragmas"]
    flags = {"cxx": optimise, "nvcc": ["-O3", "--expt-relaxed-constexpr", "-lineinfo"]}
    headers = [str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*") if p.suffix in (".h", ".cuh")]

    def relative(paths):
        return sorted(str(p.relative_to(ROOT)) for p in paths)

    library = kind(LIBRARY, relative(sources), define_macros=macros, extra_compile_args=flags, depends=headers,
                   extra_link_args=["-fopenmp", "-Wl,-soname,libfastmoe_cpp.so"])
    library.libraries = libraries
    module = cpp_extension.CppExtension("fastmoe_cpp._C", ["csrc/module.cpp"], define_macros=macros,
                                        extra_compile_args={"cxx": ["-O2", "-Wall"]}, depends=headers)
    module.libraries += ["fastmoe_cpp"]
    module.runtime_library_dirs = ["$ORIGIN"]
    return [library, module]


class Build(cpp_extension.BuildExtension):
    def get_ext_filename(self, fullname):
        if fullname.split(".")[-1] == LIBRARY.split(".")[-1]:
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def build_extension(self, ext):
        if ext.name.split(".")[-1] == "_C":
            library = Path(self.get_ext_fullpath(LIBRARY)).resolve()
            ext.library_dirs = [str(library.parent), *ext.library_dirs]
            ext.depends = [*ext.depends, str(library)]
        super().build_extension(ext)

    def run(self):
        super().run()
        package = Path(self.get_ext_fullpath(LIBRARY)).resolve().parent
        write_record(package / "_build.py", any(name == "FASTMOE_CUDA" for name, _ in self.extensions[0].define_macros))


class BuildPy(build_py):
    """Also installs the headers and the CMake package for C++ users."""

    def run(self):
        super().run()
        if not self.editable_mode:
            install_headers(Path(self.build_lib) / "fastmoe_cpp")


def install_headers(package: Path) -> None:
    include = package / "include" / "fastmoe_cpp"
    for source in [*ROOT.glob("csrc/ops/*.h"), *ROOT.glob("csrc/nn/*.h"), ROOT / "csrc/activation.h"]:
        target = include / source.relative_to(ROOT / "csrc")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    if (ROOT / "cmake").exists():
        shutil.copytree(ROOT / "cmake", package / "share" / "cmake" / "fastmoe_cpp", dirs_exist_ok=True)


def write_record(path: Path, cuda: bool) -> None:
    record = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "architectures": os.environ["TORCH_CUDA_ARCH_LIST"] if cuda else None,
        "python": platform.python_version(),
        "compiler": os.environ.get("CXX", "c++"),
    }
    path.write_text(f'"""What the compiled half was built for; written by setup.py."""\n\nBUILD = {record!r}\n')


limit_jobs()
setup(ext_modules=extensions(wants_cuda()), cmdclass={"build_ext": Build, "build_py": BuildPy})
