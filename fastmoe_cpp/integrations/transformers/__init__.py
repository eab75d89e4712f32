"""Hugging Face transformers' MoE models on fastmoe_cpp's kernels.

transformers 5 lets a model take its experts from a registry. ``register()`` adds ours to it under the name
"fastmoe_cpp", after which every model that uses the registry can be asked for it::

    from fastmoe_cpp.integrations.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-30B-A3B", experts_implementation="fastmoe_cpp")

``replace_moe_blocks(model)`` does the same for a model that is already there, and refuses one that has no such experts.
transformers 4 has no registry: there ``replace_moe_blocks(model)`` puts our block in the place of each of the model's,
for Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE and DeepSeek-V3. Weights keep their names, shapes and values either way.
"""

from __future__ import annotations

from typing import TypeVar

import transformers
from torch import nn

MAJOR, _MINOR = (int(number) for number in transformers.__version__.split(".")[:2])
if (MAJOR, _MINOR) < (4, 57) or (5, 0) <= (MAJOR, _MINOR) < (5, 7) or MAJOR > 5:
    raise ImportError(f"fastmoe_cpp serves transformers 4.57 and, from 5.7, 5; found {transformers.__version__}")

Model = TypeVar("Model", bound=nn.Module)

__all__ = ["register", "replace_moe_blocks"]


def register() -> None:
    """Adds the experts implementation "fastmoe_cpp" to transformers 5's registry; more than once does no harm.

    Raises ImportError for a transformers without the registry, which is any before 5.
    """
    if MAJOR < 5:
        raise ImportError(
            "register() needs transformers 5, whose models take their experts from a registry, found "
            f"{transformers.__version__}: use replace_moe_blocks(model)"
        )
    from . import experts

    experts.register()


def replace_moe_blocks(model: Model) -> Model:
    """The model itself, its MoE blocks computing with fastmoe_cpp. Weights keep their names, shapes and values.

    Under transformers 5 this is register() and model.set_experts_implementation("fastmoe_cpp"); under transformers 4
    each block is replaced by one of ours that shares its parameters. Raises ValueError, and changes nothing, for a
    model that has no block we can serve, naming what it has.
    """
    if MAJOR < 5:
        from . import blocks

        return blocks.replace(model)
    from . import experts

    return experts.use(model)
