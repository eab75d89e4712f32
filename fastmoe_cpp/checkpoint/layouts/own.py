"""This library's own: the state_dict of fastmoe_cpp.MoE."""

from __future__ import annotations

from ...config import MoEConfig
from .base import STACK, Entry, Layout


class Own(Layout):
    name = "fastmoe_cpp"
    title = "fastmoe_cpp.MoE: router.weight, experts.gate_up_proj [E, 2F, H], experts.down_proj [E, H, F]"
    prefix = "model.layers.{layer}.mlp."
    block = ""
    anchor = "router.weight"

    def entries(self, config: MoEConfig) -> tuple[Entry, ...]:
        """As MoE.state_dict() has them."""
        both = ("gate", "up") if config.gated else ("up",)
        table = [Entry("router.weight", ("router",))]
        if config.router.bias:
            table.append(Entry("router.bias", ("router_bias",)))
        if config.router.expert_bias:
            table.append(Entry("router.expert_bias", ("expert_bias",)))
        turns = config.interleaved
        table += [
            Entry("experts.gate_up_proj", both, STACK, interleaved=turns),
            Entry("experts.down_proj", ("down",), STACK),
        ]
        if config.bias:
            biases = tuple(f"{part}_bias" for part in both)
            table += [
                Entry("experts.gate_up_bias", biases, STACK, interleaved=turns),
                Entry("experts.down_bias", ("down_bias",), STACK),
            ]
        if config.shared_intermediate_size is not None:
            table += [
                Entry("shared_experts.gate_up_proj", tuple(f"shared_{part}" for part in both)),
                Entry("shared_experts.down_proj", ("shared_down",)),
            ]
        if config.shared_expert_gate:
            table.append(Entry("shared_experts.gate", ("shared_scale",)))
        return tuple(table)

    def matches(self, names: set[str]) -> bool:
        """By router and experts."""
        return {"router.weight", "experts.gate_up_proj"} <= names
