"""The MLP of a transformer, as several experts in one module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..outputs import DispatchPlan
from .linear import FMoELinear

_FUNCTIONS: dict[Any, str] = {
    F.gelu: "gelu", F.relu: "relu", torch.relu: "relu", F.silu: "silu",
}  # fmt: skip


def activation_name(activation: Callable[[Tensor], Tensor]) -> str | None:
    """'gelu', 'gelu_tanh', 'relu' or 'silu' where activation is torch's module or function of it, else None."""
    if type(activation) is nn.Sequential:
        # such as a ReLU and a Dropout, which in evaluation is the ReLU alone
        acting = [m for m in activation if not _does_nothing(m)]
        return activation_name(acting[0]) if len(acting) == 1 else None
    if isinstance(activation, partial):
        if activation.args or set(activation.keywords) - {"approximate"} or activation.func is not F.gelu:
            return None
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(activation.keywords.get("approximate", "none"))
    if type(activation) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(activation.approximate)
    by_module = {nn.ReLU: "relu", nn.SiLU: "silu"}
    if type(activation) in by_module:
        return by_module[type(activation)]
    try:
        return _FUNCTIONS.get(activation)
    except TypeError:  # not hashable
        return None


def _does_nothing(module: nn.Module) -> bool:
    return type(module) is nn.Identity or (type(module) is nn.Dropout and (module.p == 0 or not module.training))


def _hooked(module: Any) -> bool:
    """Whether any module in it has a forward or backward hook."""
    return isinstance(module, nn.Module) and any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in module.modules()
    )


class _Expert(nn.Module):
    """num_expert MLPs: ``htoh4``, an activation, ``h4toh``, both of them FMoELinear with bias.

    Called as ``expert(rows, fwd_expert_count)``, rows [N, d_model] in order of expert.
    """

    def __init__(
        self, num_expert: int, d_model: int, d_hidden: int, activation: Callable[[Tensor], Tensor], rank: int = 0
    ) -> None:
        super().__init__()
        if not callable(activation):
            raise TypeError(f"activation must be a module or a function of one tensor, got {activation!r}")
        self.htoh4 = FMoELinear(num_expert, d_model, d_hidden, bias=True, rank=rank)
        self.h4toh = FMoELinear(num_expert, d_hidden, d_model, bias=True, rank=rank)
        self.activation = activation

    def forward(self, inp: Tensor, fwd_expert_count: Tensor) -> Tensor:
        """inp [N, d_model], in order of expert, to [N, d_model]; fwd_expert_count [num_expert] are their numbers."""
        return self.h4toh(self.activation(self.htoh4(inp, fwd_expert_count)), fwd_expert_count)

    def fused_activation(self) -> str | None:
        """The activation's name where fused() computes what forward() would, None where nothing says that it does."""
        linears = (self.htoh4, self.h4toh)
        plain = type(self).forward is _Expert.forward and all(type(linear) is FMoELinear for linear in linears)
        if not plain or _hooked(self) or self.htoh4.weight.dtype != self.h4toh.weight.dtype:
            return None
        return activation_name(self.activation)

    def fused(self, tokens: Tensor, weights: Tensor, plan: DispatchPlan, activation: str) -> Tensor:
        """tokens [T, d_model] over a plan, summed by weights [T, K], as one operator: [T, d_model]."""
        tokens = tokens.to(self.htoh4.weight.dtype)
        return ops.experts(
            tokens,
            self.htoh4.weight,
            self.h4toh.weight,
            weights.to(torch.float64 if tokens.dtype == torch.float64 else torch.float32),
            plan,
            gate_up_bias=self.htoh4.bias,
            down_bias=self.h4toh.bias,
            activation=activation,
        )


class _Part:
    """Attributes that are parts of a layer: to set one to something else would not reach the layer, and is refused."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(
            f"{name} is a part of the layer's stacked experts: write into the tensor ({name}.copy_(...)), or set the "
            "parameter of the layer (layer.experts.htoh4.weight)"
        )


class _OneLinear(_Part):
    """One expert's share of a FMoELinear: weight [1, out, in] and bias [1, out] or None, in its memory."""

    def __init__(self, linear: FMoELinear, index: int) -> None:
        bias = None if linear.bias is None else _share(linear.bias, index)
        super().__init__(weight=_share(linear.weight, index), bias=bias)


class _OneExpert(_Part):
    """One expert of a FMoETransformerMLP, to look at and to write to: its tensors are parts of the layer's."""

    htoh4: _OneLinear
    h4toh: _OneLinear

    def __init__(self, experts: _Expert, index: int) -> None:
        super().__init__(
            htoh4=_OneLinear(experts.htoh4, index),
            h4toh=_OneLinear(experts.h4toh, index),
            activation=experts.activation,
        )

    def parameters(self) -> Iterator[Tensor]:
        """The four tensors, those that are there; each one's grad is its part of the layer's gradient."""
        for linear in (self.htoh4, self.h4toh):
            yield from (t for t in (linear.weight, linear.bias) if t is not None)


def _share(parameter: Tensor, index: int) -> Tensor:
    part = parameter.detach()[index : index + 1]
    if parameter.grad is not None:
        part.grad = parameter.grad[index : index + 1]
    if hasattr(parameter, "dp_comm"):
        part.dp_comm = parameter.dp_comm
    return part
