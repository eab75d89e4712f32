"""FastMoE's transformer MLP with its naive gate: a module an expert (1.0.1 and later), or stacked (0.2 to 1.0.0)."""

from __future__ import annotations

from typing import Any

from ...config import MoEConfig
from .base import EXPERT, STACK, Entry, Layout, effective_renormalize, routing_refusals

_UNGATED = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


class FastMoE(Layout):
    name = "fastmoe"
    title = "FastMoE 1.0.1 and later: experts.N.htoh4.weight [1, F, H], h4toh.weight [1, H, F], biases"
    prefix = "model.layers.{layer}.mlp."
    block = ""
    anchor = "gate.gate.weight"
    stacked = False

    def entries(self, config: MoEConfig) -> tuple[Entry, ...]:
        """Biases always; the gate's where the configuration has one."""
        table = [Entry(self.anchor, ("router",))]
        if config.router.bias:
            table.append(Entry("gate.gate.bias", ("router_bias",)))
        for module, weight, bias in (("htoh4", "up", "up_bias"), ("h4toh", "down", "down_bias")):
            for kind, part in (("weight", weight), ("bias", bias)):
                if self.stacked:
                    table.append(Entry(f"experts.{module}.{kind}", (part,), STACK))
                else:
                    table.append(Entry(f"experts.{{e}}.{module}.{kind}", (part,), EXPERT, leading=True))
        return tuple(table)

    def matches(self, names: set[str]) -> bool:
        """By how the experts are spelled."""
        return self.anchor in names and ("experts.htoh4.weight" in names) == self.stacked

    def refusals(self, config: MoEConfig) -> list[str]:
        """Top-k, then softmax over the chosen; ungated experts with biases."""
        refused = super().refusals(config) + routing_refusals(config, activation=_UNGATED)
        if not effective_renormalize(config):
            refused.append("renormalize = False")
        return refused

    def host_arguments(self, config: MoEConfig) -> dict[str, Any]:
        """Arguments of FMoETransformerMLP."""
        return {
            "num_expert": config.num_experts,
            "d_model": config.hidden_size,
            "d_hidden": config.intermediate_size,
            "top_k": config.top_k,
            "gate_bias": config.router.bias,
            "activation": config.activation,
        }


class FastMoEStacked(FastMoE):
    name = "fastmoe_stacked"
    title = "FastMoE 0.2 to 1.0.0: experts.htoh4.weight [E, F, H], h4toh.weight [E, H, F], biases"
    stacked = True
