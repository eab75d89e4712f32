"""The experts of transformers 5's registry: one function for every class that @use_experts_implementation decorates.

Such a class holds ``gate_up_proj`` (``up_proj`` where it has no gate), ``down_proj``, perhaps their biases, and an
``_apply_gate`` or an ``act_fn`` between the two. Where that is an activation the fused operator has, the whole MLP is
that operator; otherwise the two projections are, and the module's own function runs between them.
"""

from __future__ import annotations

import inspect
import re
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations import moe as registry

from ... import ops
from .activation import GATED, elementwise

NAME = "fastmoe_cpp"

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

#: What @use_experts_implementation leaves on every module.
LAYOUT = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
# The decorator's arguments that we know. A release that adds one gives experts a part that we would leave out.
_KNOWN = {*LAYOUT, "experts_class", "experts_interface", "has_post_expert_norm"}
_UNKNOWN = tuple(sorted(set(inspect.signature(registry.use_experts_implementation).parameters) - _KNOWN))


class FusedActivation(NamedTuple):
    """An activation as ops.experts takes it."""

    name: str
    alpha: float = 1.702
    limit: float = 7.0
    interleaved: bool = False


# Gates that clamp and then compute (up + 1) * gate * sigmoid(alpha * gate), by where they are defined: the attributes
# that hold alpha and limit, and whether gate and up alternate.
_CLAMPED_GATES = {
    ("transformers.models.gpt_oss.modeling_gpt_oss", "GptOssExperts._apply_gate"): ("alpha", "limit", True),
    ("transformers.models.openai_privacy_filter.modeling_openai_privacy_filter",
     "OpenAIPrivacyFilterExperts._apply_gate"): ("alpha", "limit", False),
    ("transformers.models.minimax_m3_vl.modeling_minimax_m3_vl", "MiniMaxM3VLExperts._apply_gate"):
        ("swiglu_alpha", "swiglu_limit", False),
}  # fmt: skip


@torch.compiler.assume_constant_result
def _clamped_gate(kind: type) -> tuple[str, str, bool] | None:
    gate = kind._apply_gate
    return _CLAMPED_GATES.get((gate.__module__, gate.__qualname__))


def _has_norm(experts: nn.Module) -> bool:
    return getattr(experts, "has_post_expert_norm", False)  # since 5.23


def fused_activation(experts: nn.Module) -> FusedActivation | None:
    """The activation of ops.experts that a decorated module's is, or None where the module's own code must run."""
    if _has_norm(experts):
        return None
    if not experts.has_gate:
        name = elementwise(experts.act_fn)
        return None if name is None else FusedActivation(name)
    if "_apply_gate" in vars(experts):
        return None
    if type(experts)._apply_gate is registry._default_apply_gate:
        name = GATED.get(elementwise(experts.act_fn))
        return None if name is None else FusedActivation(name)
    clamped = _clamped_gate(type(experts))
    if clamped is None:
        return None
    alpha, limit, interleaved = clamped
    return FusedActivation("clamped_swiglu", getattr(experts, alpha), getattr(experts, limit), interleaved)


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of a decorated experts module: hidden_states [T, H], top_k_index and top_k_weights [T, K] to [T, H].

    An index of num_experts or above, which expert parallelism writes for experts of other ranks, adds nothing and gets
    no gradient. Without waiting for the device.
    """
    for flag in _UNKNOWN:
        if getattr(self, flag, False):
            raise NotImplementedError(
                f"fastmoe_cpp does not know what {type(self).__name__}.{flag} asks of its experts"
            )
    dtype = hidden_states.dtype
    # Read once: a parametrized weight (LoRA) is computed by reading it.
    up, down = (self.gate_up_proj if self.has_gate else self.up_proj), self.down_proj
    up_bias = down_bias = None
    if self.has_bias:
        up_bias = self.gate_up_proj_bias if self.has_gate else self.up_proj_bias
        down_bias = self.down_proj_bias
    if self.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    if up.dtype not in DTYPES:
        raise TypeError(
            f"{type(self).__name__}'s weights must be of a floating dtype of 16 bits or more, got {up.dtype}"
        )
    if not torch.is_autocast_enabled(hidden_states.device.type):
        hidden_states = hidden_states.to(up.dtype)
    weights = top_k_weights.to(torch.float64 if hidden_states.dtype == torch.float64 else torch.float32)
    top_k_index = torch.where(top_k_index < self.num_experts, top_k_index, -1)
    plan = ops.dispatch(top_k_index, self.num_experts)
    activation = fused_activation(self)
    if activation is not None:
        output = ops.experts(
            hidden_states,
            up,
            down,
            weights,
            plan,
            gate_up_bias=up_bias,
            down_bias=down_bias,
            activation=activation.name,
            activation_alpha=activation.alpha,
            activation_limit=activation.limit,
            interleaved=activation.interleaved,
        )
        return output.to(dtype)
    rows = ops.grouped_linear(ops.gather(hidden_states, plan), up, plan.expert_offsets, up_bias)
    inner = self._apply_gate(rows) if self.has_gate else self.act_fn(rows)
    rows = ops.grouped_linear(inner.to(rows.dtype), down, plan.expert_offsets, down_bias)
    if _has_norm(self):
        rows = self.post_expert_norm(rows).to(rows.dtype)
    return ops.combine(rows, weights, plan).to(dtype)


def register() -> None:
    """See fastmoe_cpp.integrations.transformers.register."""
    registry.ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def takes_experts(module: nn.Module) -> bool:
    """Whether a module's class is decorated with @use_experts_implementation."""
    return all(hasattr(module, name) for name in LAYOUT) and hasattr(type(module), "_apply_gate")


def use(model: nn.Module) -> nn.Module:
    """See fastmoe_cpp.integrations.transformers.replace_moe_blocks."""
    served = {name: module for name, module in model.named_modules() if takes_experts(module)}
    if not served:
        kinds = sorted({k for k in (type(m).__name__ for m in model.modules()) if re.search("expert|moe$", k, re.I)})
        found = f"its experts are {', '.join(kinds)}" if kinds else "none of its modules are experts"
        raise ValueError(
            f"{type(model).__name__} can't be served: no module of it takes its experts from transformers' registry "
            f"(@use_experts_implementation), {found}"
        )
    for name, module in served.items():
        if module.down_proj.dtype not in DTYPES:
            raise ValueError(
                f"{type(model).__name__} can't be served: {name}.down_proj is {module.down_proj.dtype}, and only "
                "floating dtypes of 16 bits or more are"
            )
    if not hasattr(model, "set_experts_implementation"):
        raise ValueError(f"the model must be a transformers PreTrainedModel, got {type(model).__name__}")
    register()
    model.set_experts_implementation(NAME)
    for module in served.values():
        # it may hold a copy of the model's configuration, as Dots3-Note's vision tower does
        module.config._experts_implementation = NAME
    return model
