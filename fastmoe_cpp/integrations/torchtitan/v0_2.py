"""TorchTitan 0.2: the model converter "fastmoe_cpp"."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchtitan.models.moe import MoE
from torchtitan.models.moe.moe import GroupedExperts
from torchtitan.protocols.model_converter import register_model_converter

from ... import ops
from .layer import Assignment, RoutingRule, experts, route

NAME = "fastmoe_cpp"
# ParallelDims' fields, and the job configuration's
PARALLELISM = {
    "tp": "tensor_parallel_degree",
    "ep": "expert_parallel_degree",
    "etp": "expert_tensor_parallel_degree",
}


class FastMoEGroupedExperts(GroupedExperts):
    """TorchTitan's GroupedExperts (w1, w2, w3), computing from tokens and their assignment to experts."""

    def forward(self, x: Tensor, assignment: Assignment) -> Tensor:
        """x [T, H] to [T, H]: every token's experts, summed by weight."""
        if isinstance(self.w1, DTensor):
            raise RuntimeError(
                "fastmoe_cpp's experts are whole on every rank (data, context and pipeline parallelism): these are "
                f"distributed over {self.w1.device_mesh}"
            )
        return experts(x, self.w1, self.w2, self.w3, assignment)


class FastMoE(MoE):
    """TorchTitan's MoE with its parameters, buffers, names and initialisation, computing with fastmoe_cpp.

    Its load-balancing hook finds load_balance_coeff, expert_bias and tokens_per_expert where it looks for them.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [B, L, H] to one tensor of its shape and dtype."""
        rows = x.reshape(-1, x.shape[-1])
        routing = route(self.router.gate(rows), RoutingRule.of(self.router), self.expert_bias)
        plan = ops.dispatch(routing.topk_ids, self.experts.num_experts)
        with torch.no_grad():
            # every pass counts, also one that activation checkpointing repeats: the hook halves the counts then
            self.tokens_per_expert.add_(plan.tokens_per_expert)
        output = self.experts(rows, Assignment(routing.topk_weights, plan, self.score_before_experts))
        if self.shared_experts is not None:
            output = self.shared_experts(rows) + output
        return output.reshape(x.shape)


def convert(model: nn.Module) -> nn.Module:
    """The model itself, each torchtitan.models.moe.MoE of it computing with fastmoe_cpp.

    Parameters are neither copied nor touched: the model may be on the meta device. Raises ValueError, and changes
    nothing, where there is none, or one of another class, or one whose weights something else has replaced.
    """
    layers: list[MoE] = []
    for name, module in model.named_modules():
        if not isinstance(module, MoE):
            continue
        if isinstance(module, FastMoE):
            raise ValueError(f"{type(model).__name__}'s MoE layers were converted before: {name} is a FastMoE")
        if type(module) is not MoE or type(module.experts) is not GroupedExperts:
            raise ValueError(
                f"{type(model).__name__} can't be served: {name} is a {type(module).__name__} of "
                f"{type(module.experts).__name__}, and only torchtitan.models.moe.MoE of GroupedExperts is"
            )
        for weight in ("w1", "w2", "w3"):
            kind = type(getattr(module.experts, weight).data)
            if kind is not torch.Tensor:
                raise ValueError(
                    f"{type(model).__name__} can't be served: {name}.experts.{weight} is a {kind.__name__}: no other "
                    "converter may have replaced the experts' weights"
                )
        RoutingRule.of(module.router)
        layers.append(module)
    if not layers:
        raise ValueError(f"{type(model).__name__} can't be served: it has no torchtitan.models.moe.MoE")
    for layer in layers:
        layer.experts.__class__ = FastMoEGroupedExperts
        layer.__class__ = FastMoE
    return model


class FastMoEConverter:
    """TorchTitan's ModelConverter protocol: ``converters = ["fastmoe_cpp"]``."""

    def __init__(self, job_config: Any, parallel_dims: Any) -> None:
        for degree, setting in PARALLELISM.items():
            if (found := getattr(parallel_dims, degree)) > 1:
                raise ValueError(f"the converter {NAME!r} needs {setting} = 1 in [parallelism], got {found}")

    def convert(self, model: nn.Module) -> None:
        """See convert() of this module."""
        convert(model)

    def post_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        """Nothing: the expert bias is moved by TorchTitan's own hook."""


register_model_converter(FastMoEConverter, NAME)
