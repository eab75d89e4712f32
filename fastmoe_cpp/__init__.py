"""Mixture-of-Experts layers on C++ and CUDA autograd functions.

    layer = MoE(MoEConfig(hidden_size=2048, intermediate_size=768, num_experts=128, top_k=8))
    y = layer(x)

Where the compiled library can't be loaded, importing the package warns with the reason and the line that mends it, and
the names that need it raise that as an ImportError; the configuration and the plain-torch ``reference`` work anyway.
"""

import warnings as _warnings
from typing import TYPE_CHECKING

from . import _extension, reference
from .config import MoEConfig, RouterConfig
from .outputs import DispatchPlan, MoEOutput, RouterOutput

if TYPE_CHECKING or _extension.load_error is None:
    from . import losses, monitor, ops, recompute
    from .experts import Experts, SharedExperts, fused_experts
    from .moe import MoE
    from .router import Router
else:
    _warnings.warn(_extension.load_error, RuntimeWarning, stacklevel=2)

__version__ = "0.1.0"
__all__ = [
    "DispatchPlan",
    "Experts",
    "MoE",
    "MoEConfig",
    "MoEOutput",
    "Router",
    "RouterConfig",
    "RouterOutput",
    "SharedExperts",
    "fused_experts",
    "losses",
    "monitor",
    "ops",
    "recompute",
    "reference",
]


def __getattr__(name: str):
    if name in __all__:
        _extension.require()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
