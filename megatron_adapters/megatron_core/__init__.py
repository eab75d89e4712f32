"""Megatron-Core (the package megatron-core): our layer in the ``mlp`` slot of its transformer layers.

    from megatron_adapters import megatron_core
    spec = megatron_core.use_fastmoe_cpp(get_gpt_layer_local_spec(num_experts=8))    # the one line
    model = GPTModel(config=config, transformer_layer_spec=spec, ...)

Everything else stays Megatron's: its TransformerConfig, its process groups, its optimizer, its checkpoints. A setting
that is not honoured is refused by name when the layer is made (``configuration``).
"""

from __future__ import annotations

try:
    import megatron.core  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"megatron_adapters.megatron_core needs the package megatron-core (pip install megatron-core): {error}"
    ) from error

from .configuration import FIELDS, check, moe_config
from .experts import GroupedExperts
from .layer import FastMoELayer, moe_submodules
from .router import TopKRouter
from .specs import install, use_fastmoe_cpp

__all__ = [
    "FIELDS",
    "FastMoELayer",
    "GroupedExperts",
    "TopKRouter",
    "check",
    "install",
    "moe_config",
    "moe_submodules",
    "use_fastmoe_cpp",
]
