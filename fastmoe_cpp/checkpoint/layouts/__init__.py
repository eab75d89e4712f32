"""Every layout by its name. To add one: a table in a file of its own, and a line here."""

from __future__ import annotations

from ..errors import LayoutError
from .base import Entry, Layout
from .deepseek import DeepSeek, DeepSeekV3
from .fastmoe import FastMoE, FastMoEStacked
from .gpt_neox import GptNeoX
from .gpt_oss import GptOss
from .megatron_core import MegatronGrouped, MegatronSequential
from .mixtral import Mixtral, MixtralPacked
from .own import Own
from .qwen import OLMoE, Qwen2MoE, Qwen3MoE
from .torchtitan import TorchTitan, TorchTitan03

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Mixtral(),
        MixtralPacked(),
        *(kind(packed) for kind in (Qwen2MoE, Qwen3MoE, OLMoE, DeepSeek, DeepSeekV3) for packed in (False, True)),
        GptOss(),
        TorchTitan(),
        TorchTitan03(),
        MegatronGrouped(),
        MegatronSequential(),
        GptNeoX(),
        FastMoE(),
        FastMoEStacked(),
        Own(),
    )
}


def layout_of(name: str) -> Layout:
    """The layout of that name, or LayoutError with all names."""
    if name not in LAYOUTS:
        raise LayoutError(f"the layout must be one of {', '.join(LAYOUTS)}, got {name!r}", found=name)
    return LAYOUTS[name]


__all__ = ["LAYOUTS", "Entry", "Layout", "layout_of"]
