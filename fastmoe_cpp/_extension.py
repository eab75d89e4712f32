"""Loads the compiled library, and says what it was built for where it can't."""

from __future__ import annotations

import importlib
import importlib.machinery
import platform
from pathlib import Path
from typing import Any, NoReturn

import torch

LIBRARY = Path(__file__).with_name("libfastmoe_cpp.so")
REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."
REBUILD_WITH_CUDA = f"FORCE_CUDA=1 {REBUILD}"

#: Why the library is not there, one or two sentences; None once it is loaded.
load_error: str | None = "fastmoe_cpp's compiled library was not loaded yet"


def build_record() -> dict[str, Any] | None:
    """What setup.py wrote of the build: torch, cuda (or None), python, architectures; None where nothing was built."""
    try:
        return dict(importlib.import_module("._build", __package__).BUILD)
    except ImportError:
        return None


def running() -> dict[str, Any]:
    """What this process runs on, under the build record's names."""
    return {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}


def _in_words(versions: dict[str, Any]) -> str:
    cuda = versions.get("cuda")
    return f"torch {versions.get('torch')} / {f'CUDA {cuda}' if cuda else 'no CUDA'} / Python {versions.get('python')}"


def mismatch(built: dict[str, Any], here: dict[str, Any]) -> bool:
    """Whether a library built for one torch can't be trusted in another: C++ has no stable interface across them."""

    def release(version: Any) -> list[str]:
        return str(version).split("+")[0].split(".")[:2]

    if release(built.get("torch")) != release(here.get("torch")):
        return True
    built_cuda, cuda = built.get("cuda"), here.get("cuda")
    return bool(built_cuda) and (not cuda or str(built_cuda).split(".")[0] != str(cuda).split(".")[0])


def explain(built: dict[str, Any] | None, here: dict[str, Any], cause: str) -> str:
    """'Built for X, you have Y' and the line that mends it."""
    if built is None:
        return f"fastmoe_cpp's compiled library can't be loaded: {cause}. Build it with: {REBUILD}"
    return (
        f"fastmoe_cpp's compiled library can't be loaded: it was built for {_in_words(built)}, you have "
        f"{_in_words(here)} ({cause}). Build it again with: {REBUILD_WITH_CUDA if built.get('cuda') else REBUILD}"
    )


def load() -> None:
    """Loads libfastmoe_cpp.so, which registers torch.ops.fastmoe_cpp; on failure load_error says why."""
    global load_error
    if load_error is None:
        return
    built, here = build_record(), running()
    if not LIBRARY.is_file():
        load_error = explain(built, here, f"{LIBRARY.name} is not in {LIBRARY.parent}")
        return
    if built is not None and mismatch(built, here):
        load_error = explain(built, here, "C++ extensions fit one release of torch and one major version of CUDA")
        return
    try:
        torch.ops.load_library(LIBRARY)
    except (OSError, RuntimeError) as error:
        # torch names the file; what the linker said is the cause
        load_error = explain(built, here, str(error.__cause__ or error).splitlines()[0])
        return
    load_error = None
    if built is not None and not built.get("cuda"):
        _refuse_cuda(built)


def require() -> None:
    """Raises ImportError, with the sentence that mends it, where the library could not be loaded."""
    if load_error is not None:
        raise ImportError(load_error)


def without_cuda(built: dict[str, Any]) -> str:
    """The sentence for a CUDA tensor given to a library that has only its CPU half."""
    return (
        f"fastmoe_cpp was built without CUDA (for {_in_words(built)}) and was given a CUDA tensor; with a CUDA toolkit "
        f"of torch's major version ({torch.version.cuda or 'this torch has none: install one that has'}), build it "
        f"again with: {REBUILD_WITH_CUDA}"
    )


_cuda_refusals: torch.library.Library | None = None


def _refuse_cuda(built: dict[str, Any]) -> None:
    """Gives every operator a CUDA kernel that says the library was built without CUDA."""
    global _cuda_refusals

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(without_cuda(built))

    _cuda_refusals = torch.library.Library("fastmoe_cpp", "IMPL", "CUDA")
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("fastmoe_cpp::") and not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"):
            _cuda_refusals.impl(name.removeprefix("fastmoe_cpp::"), refuse)


load()
