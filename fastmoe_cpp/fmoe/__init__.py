"""FastMoE's names on fastmoe_cpp's operators: for a project that has ``import fmoe``.

    from fastmoe_cpp.fmoe import FMoETransformerMLP  # instead of: from fmoe import FMoETransformerMLP

or, so that every ``import fmoe`` in the program means this package, once before the first of them:

    import fastmoe_cpp.fmoe

    fastmoe_cpp.fmoe.install()
"""

from . import balance, functions, gates
from .checkpoint import merged_state_dict, split_state_dict
from .distributed import DistributedGroupedDataParallel
from .install import install, uninstall
from .layers import FMoE
from .linear import FMoELinear
from .transformer import FMoETransformerMLP

__all__ = [
    "DistributedGroupedDataParallel",
    "FMoE",
    "FMoELinear",
    "FMoETransformerMLP",
    "balance",
    "functions",
    "gates",
    "install",
    "merged_state_dict",
    "split_state_dict",
    "uninstall",
]
