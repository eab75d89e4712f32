"""TorchTitan 0.3: the override ``fastmoe_cpp.integrations.torchtitan.v0_3.fast_moe``."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.config.override import derive, override
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

from ... import ops
from .layer import Assignment, RoutingRule, experts, route


class FastMoERouter(TokenChoiceTopKRouter):
    """TorchTitan's router on one operator; where tensor parallelism hands it DTensors, TorchTitan's own code."""

    @dataclass(kw_only=True, slots=True)
    class Config(TokenChoiceTopKRouter.Config):
        """TorchTitan's fields."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.rule = RoutingRule.of(self)

    def forward(self, x_BLD: Tensor, expert_bias_E: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:  # noqa: N803
        """x [B, L, D] to weights [B, L, K], expert ids [B, L, K] and float32 scores over all experts [B, L, E]."""
        gate = self.gate
        if isinstance(x_BLD, DTensor) or isinstance(gate.weight, DTensor):
            return super().forward(x_BLD, expert_bias_E)
        leading = x_BLD.shape[:-1]
        logits = ops.router_logits(x_BLD.reshape(-1, x_BLD.shape[-1]), gate.weight, gate.bias)
        routing = route(logits, self.rule, expert_bias_E)
        return (
            routing.topk_weights.reshape(*leading, -1),
            routing.topk_ids.reshape(*leading, -1),
            routing.scores.reshape(*leading, -1),
        )


class FastMoEGroupedExperts(GroupedExperts):
    """TorchTitan's GroupedExperts (w1_EFD, w2_EDF, w3_EFD), computing from tokens and their assignment to experts."""

    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        """TorchTitan's fields."""

    def forward(self, x_TD: Tensor, assignment: Assignment) -> Tensor:  # noqa: N803
        """x [T, D] to [T, D]: every token's experts, summed by weight."""
        weights = (self.w1_EFD, self.w2_EDF, self.w3_EFD)
        w1, w2, w3 = (w.to_local() if isinstance(w, DTensor) else w for w in weights)
        return experts(x_TD, w1, w2, w3, assignment)


class FastMoERoutedExperts(RoutedExperts):
    """TorchTitan's RoutedExperts without its sorted copies of the tokens: dispatch, experts and combine in one."""

    @dataclass(kw_only=True, slots=True)
    class Config(RoutedExperts.Config):
        """TorchTitan's fields."""

    def forward(
        self,
        x_BLD: Tensor,  # noqa: N803
        topk_scores_BLK: Tensor,  # noqa: N803
        topk_expert_ids_BLK: Tensor,  # noqa: N803
        num_local_tokens_per_expert_E: Tensor,  # noqa: N803
    ) -> Tensor:
        """x [B, L, D], weights and ids [B, L, K] to [B, L, D]. The counts are the plan's own."""
        top_k = topk_expert_ids_BLK.shape[-1]
        plan = ops.dispatch(topk_expert_ids_BLK.reshape(-1, top_k), num_local_tokens_per_expert_E.shape[0])
        assignment = Assignment(topk_scores_BLK.reshape(-1, top_k), plan, weight_on_input=False)
        return self.inner_experts(x_BLD.reshape(-1, x_BLD.shape[-1]), assignment).reshape(x_BLD.shape)


@override(target=MoE.Config, description="routing, dispatch, experts and combine by fastmoe_cpp")
def fast_moe(config: MoE.Config) -> MoE.Config:
    """The configuration of a MoE layer with our router and experts; ValueError for a part that we can't serve."""
    routed = config.routed_experts
    expected = (
        ("", config, MoE.Config),
        ("router", config.router, TokenChoiceTopKRouter.Config),
        ("router.gate", config.router.gate, Linear.Config),
        ("routed_experts", routed, RoutedExperts.Config),
        ("routed_experts.inner_experts", routed.inner_experts, GroupedExperts.Config),
        ("routed_experts.token_dispatcher", routed.token_dispatcher, LocalTokenDispatcher.Config),
    )
    for name, found, kind in expected:
        if type(found) is not kind:
            raise ValueError(
                f"fastmoe_cpp serves a MoE layer whose {name or 'configuration'} is a {kind.__qualname__}, "
                f"got {type(found).__qualname__}"
                + (": set the expert parallel degree to 1" if kind is LocalTokenDispatcher.Config else "")
            )
    return derive(
        config,
        MoE.Config,
        router=derive(config.router, FastMoERouter.Config),
        routed_experts=derive(
            routed,
            FastMoERoutedExperts.Config,
            inner_experts=derive(routed.inner_experts, FastMoEGroupedExperts.Config),
        ),
    )
