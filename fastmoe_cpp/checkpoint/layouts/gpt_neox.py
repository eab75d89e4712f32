"""GPT-NeoX: every expert's rows under one another, the down projection transposed, no biases."""

from __future__ import annotations

from typing import Any

from ...config import MoEConfig
from .base import FLAT, Entry, Layout, routing_refusals

_UNGATED = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


class GptNeoX(Layout):
    name = "gpt_neox"
    title = "GPT-NeoX: mlp.experts.mlp.w1, w2 [E * F, H]"
    prefix = "layers.{layer}."
    anchor = "mlp.router.layer.weight"

    def entries(self, config: MoEConfig) -> tuple[Entry, ...]:
        """w1 is the up projection, w2 the transpose of the down projection."""
        return (
            Entry(self.anchor, ("router",)),
            Entry("mlp.experts.mlp.w1", ("up",), FLAT),
            Entry("mlp.experts.mlp.w2", ("down",), FLAT, transposed=True),
        )

    def refusals(self, config: MoEConfig) -> list[str]:
        """A softmax router without renormalisation, or Sinkhorn with its own weights; ungated experts."""
        router = config.router
        sinkhorn_scores = "sigmoid" if config.top_k == 1 else "softmax"
        refused = super().refusals(config) + routing_refusals(
            config, activation=_UNGATED, sinkhorn=(True, False), renormalize=(False,), scores_after_topk=(False,),
            score_function=(sinkhorn_scores if router.sinkhorn else "softmax",),
        )  # fmt: skip
        return refused

    def host_arguments(self, config: MoEConfig) -> dict[str, Any]:
        """Names of NeoXArgs."""
        return {
            "moe_num_experts": config.num_experts,
            "moe_top_k": config.top_k,
            "moe_router_type": "sinkhorn" if config.router.sinkhorn else "topk",
            "intermediate_size": config.intermediate_size,
            "activation": config.activation,
        }
