"""TorchTitan's MoE: stacked w1 (gate), w3 (up), w2 (down), in the names of 0.2 and of 0.3."""

from __future__ import annotations

from typing import Any

from ...config import MoEConfig
from .base import STACK, Entry, Layout, chooses_alike, effective_renormalize, routing_refusals


class TorchTitan(Layout):
    name = "torchtitan"
    title = "TorchTitan 0.2: moe.experts.w1, w3 [E, F, H], w2 [E, H, F]"
    prefix = "layers.{layer}."
    block = "moe."
    anchor = "moe.router.gate.weight"
    weights = {"gate": "moe.experts.w1", "up": "moe.experts.w3", "down": "moe.experts.w2"}
    expert_bias = "moe.expert_bias"

    def entries(self, config: MoEConfig) -> tuple[Entry, ...]:
        """The buffer expert_bias is there where the configuration has one."""
        table = [Entry(self.anchor, ("router",))]
        if config.router.bias:
            table.append(Entry("moe.router.gate.bias", ("router_bias",)))
        if config.router.expert_bias:
            table.append(Entry(self.expert_bias, ("expert_bias",)))
        table += [Entry(name, (part,), STACK) for part, name in self.weights.items()]
        if config.shared_intermediate_size is not None:
            names = {"shared_gate": "w1", "shared_up": "w3", "shared_down": "w2"}
            table += [Entry(f"moe.shared_experts.{name}.weight", (part,)) for part, name in names.items()]
        return tuple(table)

    def matches(self, names: set[str]) -> bool:
        """By the experts' names."""
        return self.weights["up"] in names

    def refusals(self, config: MoEConfig) -> list[str]:
        """Softmax and sigmoid routers, groups by the sum of their two best, SwiGLU."""
        refused = super().refusals(config) + routing_refusals(
            config, score_function=("softmax", "sigmoid"), scaling_factor=None, num_groups=None,
            weight_on_input=(True, False),
        )  # fmt: skip
        if config.router.num_groups > 1 and config.router.group_score != "top2_sum":
            refused.append(f"group_score = {config.router.group_score!r}")
        shared = config.shared_intermediate_size
        if shared is not None and shared % config.intermediate_size:
            refused.append(f"shared experts of width {shared}, no multiple of {config.intermediate_size}")
        if config.router.scores_after_topk and not (
            config.router.score_function == "softmax" and chooses_alike(config)
        ):
            refused.append("scores_after_topk = True")
        return refused

    def host_arguments(self, config: MoEConfig) -> dict[str, Any]:
        """Fields of TorchTitan's MoEArgs."""
        router, shared = config.router, config.shared_intermediate_size
        return {
            "num_experts": config.num_experts,
            "num_shared_experts": (shared or 0) // config.intermediate_size,
            "score_func": router.score_function,
            "route_norm": effective_renormalize(config),
            "route_scale": router.scaling_factor,
            "gate_bias": router.bias,
            "score_before_experts": config.weight_on_input,
            "top_k": config.top_k,
            "num_expert_groups": router.num_groups if router.num_groups > 1 else None,
            "num_limited_groups": router.topk_groups if router.num_groups > 1 else None,
            "load_balance_coeff": router.expert_bias_update_rate if router.expert_bias else None,
        }


class TorchTitan03(TorchTitan):
    name = "torchtitan_0_3"
    title = "TorchTitan 0.3: moe.routed_experts.inner_experts.w1_EFD, w3_EFD, w2_EDF"
    weights = {
        "gate": "moe.routed_experts.inner_experts.w1_EFD",
        "up": "moe.routed_experts.inner_experts.w3_EFD",
        "down": "moe.routed_experts.inner_experts.w2_EDF",
    }
    expert_bias = "moe.expert_bias_E"

    def refusals(self, config: MoEConfig) -> list[str]:
        """0.3 multiplies outputs alone."""
        return super().refusals(config) + (["weight_on_input = True"] if config.weight_on_input else [])

    def host_arguments(self, config: MoEConfig) -> dict[str, Any]:
        """Fields of 0.2's MoEArgs, as far as 0.3 has what they say."""
        return {k: v for k, v in super().host_arguments(config).items() if k != "score_before_experts"}
