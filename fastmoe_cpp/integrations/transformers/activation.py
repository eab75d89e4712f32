"""transformers' activations by the names that ours have."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn
from transformers import activations

#: The gated activation of an elementwise one.
GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh", "relu": "reglu"}

_NAMES_OF_CLASSES = {
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "ReLUSquaredActivation": "relu2",
}
_OF_CLASS: dict[type, str] = {nn.SiLU: "silu", nn.ReLU: "relu"} | {
    getattr(activations, name): ours for name, ours in _NAMES_OF_CLASSES.items() if hasattr(activations, name)
}


def elementwise(act_fn: object) -> str | None:
    """What act_fn is: 'silu', 'gelu', 'gelu_tanh', 'relu' or 'relu2'; None for anything else."""
    if act_fn is F.silu:
        return "silu"
    if act_fn is F.gelu:
        return "gelu"
    if act_fn is F.relu:
        return "relu"
    if type(act_fn) is nn.GELU:
        return "gelu" if act_fn.approximate == "none" else "gelu_tanh"
    return _OF_CLASS.get(type(act_fn))
