"""Qwen2-MoE, Qwen3-MoE, OLMoE: one spelling of router and experts, a tensor an expert or packed."""

from __future__ import annotations

from ...config import MoEConfig
from .base import EXPERT, LAYER, STACK, Entry, Layout


def experts(packed: bool) -> tuple[Entry, ...]:
    """Router and experts under 'mlp.', as transformers names them."""
    router = Entry("mlp.gate.weight", ("router",))
    if packed:
        return (
            router,
            Entry("mlp.experts.gate_up_proj", ("gate", "up"), STACK),
            Entry("mlp.experts.down_proj", ("down",), STACK),
        )
    return (router, *(Entry(f"mlp.experts.{{e}}.{p}_proj.weight", (p,), EXPERT) for p in ("gate", "up", "down")))


def shared(module: str) -> tuple[Entry, ...]:
    """The shared experts as one MLP under 'mlp.<module>.'."""
    return tuple(Entry(f"mlp.{module}.{p}_proj.weight", (f"shared_{p}",), LAYER) for p in ("gate", "up", "down"))


class PerExpertOrPacked(Layout):
    """A transformers family whose layers are stored in either of two ways."""

    anchor = "mlp.gate.weight"

    def __init__(self, packed: bool) -> None:
        self.packed = packed
        self.name = self.family + ("_packed" if packed else "")
        how = "packed: mlp.experts.gate_up_proj [E, 2F, H]" if packed else "a tensor an expert: mlp.experts.N.gate_proj"
        self.title = f"{self.model}, {how}"

    #: The model's own name.
    model: str

    def entries(self, config: MoEConfig) -> tuple[Entry, ...]:
        """Router and experts."""
        return experts(self.packed)

    def matches(self, names: set[str]) -> bool:
        """By how the experts are spelled."""
        return self.anchor in names and ("mlp.experts.gate_up_proj" in names) == self.packed


class Qwen2MoE(PerExpertOrPacked):
    family, model = "qwen2_moe", "Qwen2-MoE"

    def entries(self, config: MoEConfig) -> tuple[Entry, ...]:
        """With a shared expert and its gate."""
        gate = Entry("mlp.shared_expert_gate.weight", ("shared_scale",))
        return (*experts(self.packed), *shared("shared_expert"), gate)


class Qwen3MoE(PerExpertOrPacked):
    family, model = "qwen3_moe", "Qwen3-MoE"


class OLMoE(PerExpertOrPacked):
    family, model = "olmoe", "OLMoE"
