"""fastmoe_cpp/_C.pyi against the compiled module: the same functions with the same arguments, defaults and results."""

from __future__ import annotations

import ast
from pathlib import Path

import fastmoe_cpp
from fastmoe_cpp import _C

STUB = Path(fastmoe_cpp.__file__).with_name("_C.pyi")


def signatures_of_module() -> dict[str, str]:
    """'(arguments) -> result' by name, from the first line pybind11 gives a docstring, in the stub's words."""
    found = {}
    for name in dir(_C):
        if name.startswith("__"):
            continue
        line = getattr(_C, name).__doc__.splitlines()[0]
        line = line.replace("typing.SupportsFloat", "float").replace("typing.SupportsInt", "int")
        line = line.replace(" | typing.SupportsIndex", "").replace("Optional[torch.Tensor]", "torch.Tensor | None")
        function = ast.parse(f"def {line}: ...").body[0]
        found[name] = f"{ast.unparse(function.args)} -> {ast.unparse(function.returns)}"
    return found


def signatures_of_stub() -> dict[str, str]:
    functions = [node for node in ast.parse(STUB.read_text()).body if isinstance(node, ast.FunctionDef)]
    return {f.name: f"{ast.unparse(f.args)} -> {ast.unparse(f.returns)}" for f in functions}


def test_stub_matches_the_module() -> None:
    module = signatures_of_module()
    assert len(module) >= 13
    stub = signatures_of_stub()
    if not _C.build_info()["cuda"]:
        del stub["explain_experts"]
    assert stub == module
