"""FMoETransformerMLP: the MLP of a transformer as a Mixture of Experts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .expert import _Expert, _OneExpert
from .layers import FMoE

_GELU = nn.GELU()
_LINEARS = ("htoh4", "h4toh")


class _StackedExperts(_Expert):
    """All experts of a FMoETransformerMLP in one parameter a matrix, saved under one name an expert.

    ``experts[i]`` is expert i, its tensors parts of these. The state dict has FastMoE's names since its version 1.0.1,
    ``{i}.htoh4.weight [1, d_hidden, d_model]`` and so on; read are these, and those of the versions before,
    ``htoh4.weight [num_expert, d_hidden, d_model]``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_state_dict_post_hook(_write_each_expert)
        self.register_load_state_dict_pre_hook(_read_each_expert)

    def __len__(self) -> int:
        return self.htoh4.num_expert

    def __getitem__(self, index: int) -> _OneExpert:
        if not -len(self) <= index < len(self):
            raise IndexError(f"the layer has experts 0 to {len(self) - 1} here, got {index}")
        return _OneExpert(self, index % len(self))

    def __iter__(self) -> Iterator[_OneExpert]:
        return (self[i] for i in range(len(self)))


def _write_each_expert(module: _StackedExperts, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    mine = {key: state_dict.pop(key) for key in [k for k in state_dict if k.startswith(prefix)]}
    for i in range(len(module)):
        for key, value in mine.items():
            rest = key[len(prefix) :]
            if rest.split(".")[0] in _LINEARS:
                part = value[i : i + 1]
                if hasattr(value, "dp_comm"):
                    part.dp_comm = value.dp_comm
                value = part
            # the activation is one module in all experts
            state_dict[f"{prefix}{i}.{rest}"] = value


def _read_each_expert(
    module: _StackedExperts, state_dict: dict, prefix: str, local_metadata: dict, strict: bool, missing_keys: list,
    unexpected_keys: list, error_msgs: list,
) -> None:  # fmt: skip
    each = re.compile(re.escape(prefix) + r"\d+\.")
    if not any(each.match(key) for key in state_dict):
        return
    for name, parameter in module.named_parameters():
        if name.split(".")[0] in _LINEARS:
            _stack(module, name, parameter, state_dict, prefix, missing_keys, error_msgs)
    for name, own in [*module.named_parameters(), *module.named_buffers()]:
        if name.split(".")[0] in _LINEARS:
            continue
        copies = {i: state_dict.pop(f"{prefix}{i}.{name}", None) for i in range(len(module))}
        there = [copy for copy in copies.values() if copy is not None]
        missing_keys.extend(f"{prefix}{i}.{name}" for i, copy in copies.items() if copy is None)
        if any(copy.shape != there[0].shape or not torch.equal(copy, there[0]) for copy in there):
            error_msgs.append(f"{prefix}*.{name} must be the same for every expert, which share one activation")
        state_dict[prefix + name] = there[0] if there else own.detach()


def _stack(
    module: _StackedExperts, name: str, parameter: Tensor, state_dict: dict, prefix: str, missing_keys: list,
    error_msgs: list,
) -> None:  # fmt: skip
    parts = []
    for i in range(len(module)):
        key = f"{prefix}{i}.{name}"
        own = parameter.detach()[i : i + 1]
        part = state_dict.pop(key, None)
        if part is None:
            missing_keys.append(key)
        elif part.shape != own.shape:
            error_msgs.append(
                f"size mismatch for {key}: the checkpoint has {list(part.shape)}, the layer {list(own.shape)}."
            )
            part = None
        # what is missing stays as it is
        parts.append(own if part is None else part)
    if prefix + name in state_dict:
        error_msgs.append(f"{prefix}{name} and {prefix}0.{name} are the same weights by two names; one must go.")
    device, dtype = parts[0].device, parts[0].dtype
    state_dict[prefix + name] = torch.cat([part.to(device=device, dtype=dtype) for part in parts])


class FMoETransformerMLP(FMoE):
    """num_expert MLPs d_model -> d_hidden -> d_model on each process; the layer's output has the input's shape.

    activation is a module or a function of one tensor. torch's GELU (exact and tanh), ReLU and SiLU run inside one
    operator with the gathering and the weighted sum; others run between two grouped products. Any other argument is
    FMoE's. expert_dp_comm tags the experts for DistributedGroupedDataParallel ('none': not reduced, 'dp': replicated);
    expert_rank is kept as the ``rank`` of the experts' FMoELinear.
    """

    experts: _StackedExperts

    def __init__(
        self,
        num_expert: int = 32,
        d_model: int = 1024,
        d_hidden: int = 4096,
        activation: Callable[[Tensor], Tensor] = _GELU,
        expert_dp_comm: str = "none",
        expert_rank: int = 0,
        **kwargs: Any,
    ) -> None:
        if "expert" in kwargs:
            raise TypeError("FMoETransformerMLP makes its own experts, so expert must not be given: use FMoE")
        super().__init__(num_expert=num_expert, d_model=d_model, **kwargs)
        self.experts = _StackedExperts(num_expert, d_model, d_hidden, activation, rank=expert_rank)
        self.mark_parallel_comm(expert_dp_comm)

    def forward(self, inp: Tensor) -> Tensor:
        """inp [..., d_model] to one tensor of its shape."""
        if inp.shape[-1] != self.d_model:
            raise ValueError(f"the input must have shape [..., {self.d_model}], got {list(inp.shape)}")
        return super().forward(inp.reshape(-1, self.d_model)).reshape(inp.shape)


__all__ = ["FMoETransformerMLP", "_Expert"]
