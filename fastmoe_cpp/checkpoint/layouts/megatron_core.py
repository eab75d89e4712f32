"""Megatron-Core: the grouped experts of Transformer Engine and the sequential ones, under global expert ids."""

from __future__ import annotations

from typing import Any

from ...config import MoEConfig
from .base import EXPERT, Entry, Layout, chooses_alike, effective_renormalize, routing_refusals

# activation_func, gated_linear_unit
_ACTIVATIONS = {
    "swiglu": ("silu", True), "geglu": ("gelu", True), "geglu_tanh": ("gelu_tanh", True), "reglu": ("relu", True),
    "clamped_swiglu": ("quick_gelu", True), "silu": ("silu", False), "gelu": ("gelu", False),
    "gelu_tanh": ("gelu_tanh", False), "relu": ("relu", False), "relu2": ("squared_relu", False),
}  # fmt: skip


class MegatronGrouped(Layout):
    name = "megatron_grouped"
    title = "Megatron-Core, TEGroupedMLP: mlp.experts.linear_fc1.weightN [2F, H], linear_fc2.weightN"
    prefix = "decoder.layers.{layer}."
    anchor = "mlp.router.weight"
    ignored = ("_extra_state",)
    fc1, fc2 = "mlp.experts.linear_fc1.{kind}{e}", "mlp.experts.linear_fc2.{kind}{e}"

    def entries(self, config: MoEConfig) -> tuple[Entry, ...]:
        """Gate rows, then up rows, in linear_fc1."""
        both = ("gate", "up") if config.gated else ("up",)
        table = [Entry(self.anchor, ("router",))]
        if config.router.bias:
            table.append(Entry("mlp.router.bias", ("router_bias",)))
        if config.router.expert_bias:
            table.append(Entry("mlp.router.expert_bias", ("expert_bias",)))

        def named(template: str, kind: str) -> str:
            return template.replace("{kind}", kind)

        table += [
            Entry(named(self.fc1, "weight"), both, EXPERT),
            Entry(named(self.fc2, "weight"), ("down",), EXPERT),
        ]
        if config.bias:
            biases = ("gate_bias", "up_bias") if config.gated else ("up_bias",)
            table += [
                Entry(named(self.fc1, "bias"), biases, EXPERT),
                Entry(named(self.fc2, "bias"), ("down_bias",), EXPERT),
            ]
        if config.shared_intermediate_size is not None:
            shared = ("shared_gate", "shared_up") if config.gated else ("shared_up",)
            table += [
                Entry("mlp.shared_experts.linear_fc1.weight", shared),
                Entry("mlp.shared_experts.linear_fc2.weight", ("shared_down",)),
            ]
        if config.shared_expert_gate:
            table.append(Entry("mlp.shared_experts.gate_weight", ("shared_scale",)))
        return tuple(table)

    def matches(self, names: set[str]) -> bool:
        """By the first expert's name."""
        return self.anchor in names and self.fc1.format(kind="weight", e=0) in names

    def refusals(self, config: MoEConfig) -> list[str]:
        """A sigmoid router normalises always, a softmax over the chosen chooses by logits and takes no selection bias;
        add_bias_linear is of experts and router; groups count their best top_k / topk_groups; quick_gelu has one alpha.
        """
        router = config.router
        refused = super().refusals(config) + routing_refusals(
            config, score_function=None, scaling_factor=None, num_groups=None, activation=None,
            weight_on_input=(True, False) if config.top_k == 1 else (False,),
        )  # fmt: skip
        if router.score_function != "softmax":
            if not router.renormalize and config.top_k > 1:
                refused.append(f"renormalize = False with {router.score_function} scores")
            if router.scores_after_topk:
                refused.append(f"scores_after_topk = True with {router.score_function} scores")
        else:
            if router.expert_bias:
                refused.append("expert_bias = True with softmax scores")
            if router.renormalize and not router.scores_after_topk and not chooses_alike(config):
                refused.append(f"renormalize = True with group_score = {router.group_score!r} of softmax scores")
        if router.bias != config.bias:
            refused.append(f"router.bias = {router.bias} where bias is {config.bias}")
        if config.bias and config.shared_intermediate_size is not None:
            refused.append("bias = True with shared experts")
        if config.activation == "clamped_swiglu" and config.activation_alpha != 1.702:
            refused.append(f"activation_alpha = {config.activation_alpha} (quick_gelu's is 1.702)")
        if router.num_groups > 1:
            counted = config.top_k // router.topk_groups
            if (router.group_score, counted) not in (("top2_sum", 2), ("max", 1)):
                refused.append(f"group_score = {router.group_score!r} where top_k / topk_groups is {counted}")
        return refused

    def host_arguments(self, config: MoEConfig) -> dict[str, Any]:
        """Fields of TransformerConfig."""
        router = config.router
        function, gated = _ACTIVATIONS[config.activation]
        clamped = config.activation == "clamped_swiglu"
        return {
            "num_moe_experts": config.num_experts,
            "moe_router_topk": config.top_k,
            "moe_ffn_hidden_size": config.intermediate_size,
            "moe_router_score_function": router.score_function,
            "moe_router_pre_softmax": router.score_function == "softmax" and not effective_renormalize(config),
            "moe_router_topk_scaling_factor": router.scaling_factor if router.scaling_factor != 1 else None,
            "moe_router_num_groups": router.num_groups if router.num_groups > 1 else None,
            "moe_router_group_topk": router.topk_groups if router.num_groups > 1 else None,
            "moe_router_enable_expert_bias": router.expert_bias,
            "moe_shared_expert_intermediate_size": config.shared_intermediate_size,
            "moe_shared_expert_gate": config.shared_expert_gate,
            "moe_apply_probs_on_input": config.weight_on_input,
            "add_bias_linear": config.bias,
            "activation_func": function,
            "gated_linear_unit": gated,
            "activation_func_clamp_value": config.activation_limit if clamped else None,
            "glu_linear_offset": 1.0 if clamped else 0.0,
        }


class MegatronSequential(MegatronGrouped):
    name = "megatron_sequential"
    title = "Megatron-Core, SequentialMLP: mlp.experts.local_experts.N.linear_fc1.weight [2F, H], linear_fc2.weight"
    fc1 = "mlp.experts.local_experts.{e}.linear_fc1.{kind}"
    fc2 = "mlp.experts.local_experts.{e}.linear_fc2.{kind}"
