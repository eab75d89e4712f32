"""Mixtral: the spelling of its first checkpoints, and the packed one that transformers 5 has in memory."""

from __future__ import annotations

from ...config import MoEConfig
from .base import EXPERT, STACK, Entry, Layout


class Mixtral(Layout):
    name = "mixtral"
    title = "Mixtral, a tensor an expert: block_sparse_moe.experts.N.w1, w2, w3"
    family = "mixtral"
    block = "block_sparse_moe."
    anchor = "block_sparse_moe.gate.weight"

    def entries(self, config: MoEConfig) -> tuple[Entry, ...]:
        """gate is w1, up w3, down w2."""
        experts = "block_sparse_moe.experts.{e}."
        return (
            Entry(self.anchor, ("router",)),
            Entry(experts + "w1.weight", ("gate",), EXPERT),
            Entry(experts + "w2.weight", ("down",), EXPERT),
            Entry(experts + "w3.weight", ("up",), EXPERT),
        )


class MixtralPacked(Layout):
    name = "mixtral_packed"
    title = "Mixtral, packed: mlp.experts.gate_up_proj [E, 2F, H], down_proj [E, H, F]"
    family = "mixtral"
    anchor = "mlp.gate.weight"

    def entries(self, config: MoEConfig) -> tuple[Entry, ...]:
        """Gate rows, then up rows."""
        return (
            Entry(self.anchor, ("router",)),
            Entry("mlp.experts.gate_up_proj", ("gate", "up"), STACK),
            Entry("mlp.experts.down_proj", ("down",), STACK),
        )
