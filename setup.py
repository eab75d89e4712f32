"""Builds two libraries: libfastmoe_cpp.so, the operators (no Python in it, so that C++ programs can link it), and
fastmoe_cpp/_C, the pybind11 module over it.

The CUDA half is built where a GPU is visible or FORCE_CUDA=1 is set, and never where FORCE_CUDA=0 is.
TORCH_CUDA_ARCH_LIST names the architectures (default "8.0;9.0a"), MAX_JOBS the parallel compilations.
Objects stay in build/<torch and Python version>, so that every way of building compiles only what changed.
"""

import fcntl
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
    sys.exit(
        "fastmoe_cpp is compiled against torch, which is not installed here: run `pip install torch` first, "
        "then `pip install --no-build-isolation .`"
    )

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
os.chdir(ROOT)
LIBRARY = "fastmoe_cpp.libfastmoe_cpp"
#: torch switches off CUDA's own operators and conversions of the 16-bit types; the kernels know no torch and use them.
KEPT_OPERATORS = [
    f"-U__CUDA_NO_{what}__"
    for what in ("HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS", "BFLOAT16_CONVERSIONS")
]
#: What C++ users include. Every other header is ours to change.
STAGES = ("router", "dispatch", "experts", "combine", "exchange", "losses")
PUBLIC_HEADERS = ["fastmoe_cpp.h", *(f"ops/{stage}.h" for stage in STAGES)]
PUBLIC_HEADERS += sorted(str(p.relative_to(ROOT / "csrc")) for p in ROOT.glob("csrc/nn/*.h"))


def nvcc() -> str | None:
    home = cpp_extension.CUDA_HOME
    path = Path(home, "bin", "nvcc") if home else None
    return str(path) if path and path.exists() else None


def lacks_for_cuda() -> str | None:
    """What keeps the CUDA half from being compiled here, or None."""
    if torch.version.cuda is None:
        return "this torch is a CPU build: install a CUDA build of torch"
    if nvcc() is None:
        return "nvcc was not found: install the CUDA toolkit or set CUDA_HOME"
    text = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    toolkit = re.search(r"release (\d+)\.(\d+)", text)
    if toolkit and toolkit[1] != torch.version.cuda.split(".")[0]:
        return (
            f"nvcc is of CUDA {toolkit[1]}.{toolkit[2]} and torch was built for CUDA {torch.version.cuda}: "
            "the major versions must be equal"
        )
    return None


def wants_cuda() -> bool:
    """Whether to build the CUDA half; prints why not."""
    asked = os.environ.get("FORCE_CUDA", "")
    if asked == "0":
        return False
    if asked != "1" and not torch.cuda.is_available():
        print("fastmoe_cpp: no GPU is visible: building the CPU half only (FORCE_CUDA=1 builds the CUDA half too)")
        return False
    lacks = lacks_for_cuda()
    if lacks and asked == "1":
        sys.exit(f"fastmoe_cpp: FORCE_CUDA=1 asks for the CUDA half, but {lacks}")
    if lacks:
        print(f"fastmoe_cpp: {lacks}; building the CPU half only")
    return lacks is None


def limit_jobs() -> None:
    """A compilation against torch's headers takes up to 2 GB, so memory limits the jobs as well as cores."""
    if "MAX_JOBS" in os.environ:
        return
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        available = int(re.search(r"MemAvailable:\s+(\d+)", meminfo.read_text())[1]) * 1024
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if limit.exists() and limit.read_text().strip().isdigit():
            available = min(available, int(limit.read_text()))
    os.environ["MAX_JOBS"] = str(max(1, min(len(os.sched_getaffinity(0)), available // (2 * 2**30))))


def extensions(cuda: bool) -> list:
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0a")
    architectures = os.environ["TORCH_CUDA_ARCH_LIST"].replace(" ", ";").split(";")
    sources = [p for d in ("ops", "autograd", "meta", "autocast", "cpu", "nn") for p in ROOT.glob(f"csrc/{d}/**/*.cpp")]
    sources.append(ROOT / "csrc/library.cpp")
    macros, libraries = [], ["c10", "torch", "torch_cpu"]
    if cuda:
        hopper = any(a.startswith("9.0a") for a in architectures)
        kernels = [p for p in ROOT.glob("csrc/cuda/**/*") if p.suffix in (".cpp", ".cu")]
        sources += [p for p in kernels if hopper or "sm90" not in p.parts]
        macros += [("FASTMOE_CUDA", f'"{torch.version.cuda}"')] + ([("FASTMOE_SM90", None)] if hopper else [])
        libraries += ["c10_cuda", "torch_cuda", "cudart"]
    kind = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    # Python is often configured with -g, with which torch's headers take two and a half times as long to compile
    optimise = ["-O3", "-g0", "-fopenmp", "-fno-math-errno", "-Wall", "-Wno-unknown-pragmas"]
    flags = {"cxx": optimise, "nvcc": ["-O3", "--expt-relaxed-constexpr", "-lineinfo", *KEPT_OPERATORS]}
    headers = [str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*") if p.suffix in (".h", ".cuh")]
    library = kind(
        LIBRARY,
        sorted(str(p.relative_to(ROOT)) for p in sources),
        define_macros=macros,
        extra_compile_args=flags,
        depends=headers,
        extra_link_args=["-fopenmp", "-Wl,-soname,libfastmoe_cpp.so"],
    )
    library.libraries = libraries
    module = cpp_extension.CppExtension(
        "fastmoe_cpp._C",
        ["csrc/module.cpp"],
        define_macros=macros,
        extra_compile_args={"cxx": ["-O2", "-g0", "-Wall"]},
        depends=headers,
    )
    module.libraries += ["fastmoe_cpp"]
    module.runtime_library_dirs = ["$ORIGIN"]
    return [library, module]


def build_base(cuda: bool) -> str:
    return f"build/torch{torch.__version__.split('+')[0]}-{sys.implementation.cache_tag}{'-cuda' if cuda else ''}"


class Build(cpp_extension.BuildExtension):
    def finalize_options(self):
        super().finalize_options()
        if self.editable_mode:
            # setuptools gives an editable install temporary folders, which would compile everything every time
            build = self.get_finalized_command("build")
            kind = f"{build.plat_name}-{sys.implementation.cache_tag}"
            self.build_lib, self.build_temp = f"{build.build_base}/lib.{kind}", f"{build.build_base}/temp.{kind}"

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
        base = Path(self.build_temp).parent
        base.mkdir(parents=True, exist_ok=True)
        with open(base / "lock", "w") as lock:  # two builds at once in one folder would write each other's objects
            fcntl.flock(lock, fcntl.LOCK_EX)
            super().run()
        package = Path(self.get_ext_fullpath(LIBRARY)).resolve().parent
        write_record(package / "_build.py", any(name == "FASTMOE_CUDA" for name, _ in self.extensions[0].define_macros))
        if self.inplace:
            link(package / "include" / "fastmoe_cpp", ROOT / "csrc")
            link(package / "share" / "cmake" / "fastmoe_cpp", ROOT / "cmake")


class BuildPy(build_py):
    """Also installs the headers and the CMake package for C++ users."""

    def run(self):
        package = Path(self.build_lib) / "fastmoe_cpp"
        if not self.editable_mode and package.exists():
            # the folder is kept between builds for its libraries; a file that has gone from the sources must go here
            for old in [p for p in package.rglob("*") if p.is_file() and p.suffix != ".so"]:
                old.unlink()
        super().run()
        if not self.editable_mode:
            for header in PUBLIC_HEADERS:
                copy(ROOT / "csrc" / header, package / "include" / "fastmoe_cpp" / header)
            for script in ROOT.glob("cmake/*.cmake"):
                copy(script, package / "share" / "cmake" / "fastmoe_cpp" / script.name)


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def link(path: Path, target: Path) -> None:
    """Gives an editable install the folders of an installed one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
    path.symlink_to(os.path.relpath(target, path.parent))


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
cuda = wants_cuda()
setup(
    ext_modules=extensions(cuda),
    cmdclass={"build_ext": Build, "build_py": BuildPy},
    options={"build": {"build_base": build_base(cuda)}},
)
