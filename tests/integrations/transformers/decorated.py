"""Every class of the installed transformers that takes its experts from the registry, found in its sources."""

from __future__ import annotations

import ast
import importlib
import inspect
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers

DECORATOR = "use_experts_implementation"
# what any of the classes asks of its configuration
SIZES = {
    "hidden_size": 24,
    "intermediate_size": 20,
    "moe_intermediate_size": 20,
    "moe_latent_size": None,
    "swiglu_limit": 0.9,
    "swiglu_alpha": 1.5,
    "mlp_gate_softcap": 1.2,
    "mlp_up_softcap": 1.4,
    "moe_hidden_size": 24,
    "post_norm_eps": 1e-5,
}
EXPERTS = 6


def _decorated(path: Path) -> list[str]:
    source = path.read_text()
    if f"@{DECORATOR}" not in source:
        return []
    return [
        node.name
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and any(DECORATOR in ast.unparse(d) for d in node.decorator_list)
    ]


@lru_cache
def classes() -> dict[str, str]:
    """The name of each decorated class, and the module that has it."""
    models = Path(transformers.__file__).parent / "models"
    found = {}
    for path in sorted(models.glob("*/modeling_*.py")):
        for name in _decorated(path):
            found[name] = f"transformers.models.{path.parent.name}.{path.stem}"
    return found


def kind(name: str) -> type[torch.nn.Module]:
    """The class itself."""
    return getattr(importlib.import_module(classes()[name]), name)


def in_float32(name: str) -> bool:
    """Whether a class computes some of its own eager code in float32, whatever it is given."""
    own = kind(name)
    parts = [own.forward.__wrapped__, own._apply_gate, *(type(child) for child in make(name, "silu").children())]
    source = "".join(inspect.getsource(part) for part in parts)
    return ".float()" in source or "torch.float32" in source


class _Config(SimpleNamespace):
    """Counts of experts and activations under whatever name a class looks for them."""

    def __getattr__(self, name: str):
        if name.endswith(("_experts", "_experts_per_rank")):
            return EXPERTS
        if "hidden_act" in name:
            return self.hidden_act
        raise AttributeError(name)


def make(name: str, act: str, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """One of them, small, with weights at which clamps bite; its implementation is in .config."""
    config = _Config(**SIZES, hidden_act=act, _experts_implementation="eager")
    module = kind(name)(config)
    for attribute in ("limit",):
        if getattr(module, attribute, None) == 7.0:  # fixed in the class: lower, so that it matters here
            setattr(module, attribute, SIZES["swiglu_limit"])
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.35)
    return module.to(dtype)
