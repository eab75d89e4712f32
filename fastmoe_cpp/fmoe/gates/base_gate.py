"""What every gate has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..utils import positive


class BaseGate(nn.Module):
    """A gate of ``tot_expert = world_size * num_expert`` experts, with the loss of its last pass.

    forward(inp) returns ids [T, K] (-1 for a dropped choice) and scores [T, K].
    """

    loss: Tensor | None

    def __init__(self, num_expert: int, world_size: int) -> None:
        super().__init__()
        positive(type(self).__name__, num_expert=num_expert, world_size=world_size)
        self.world_size = world_size
        self.num_expert = num_expert
        self.tot_expert = world_size * num_expert
        self.loss = None

    def forward(self, x: Any) -> tuple[Tensor, Tensor]:
        """A gate's own."""
        raise NotImplementedError("BaseGate has no forward of its own: a gate must define it")

    def set_loss(self, loss: Tensor | None) -> None:
        """Keeps the loss of this pass for get_loss()."""
        self.loss = loss

    def get_loss(self, clear: bool = True) -> Tensor | None:
        """The loss of the last pass, None where there was none; clear forgets it."""
        loss = self.loss
        if clear:
            self.loss = None
        return loss

    @property
    def has_loss(self) -> bool:
        """Whether get_loss() has one."""
        return self.loss is not None

    def __getstate__(self) -> dict[str, Any]:
        # a loss is part of a graph, which can be neither copied nor saved
        return self.__dict__ | {"loss": None}


def check_top_k(gate: BaseGate, top_k: int) -> None:
    """ValueError unless top_k is between 1 and the number of experts."""
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= gate.tot_expert:
        raise ValueError(
            f"{type(gate).__name__}: top_k must be an integer between 1 and world_size * num_expert = "
            f"{gate.tot_expert}, got {top_k!r}"
        )


def check_tokens(gate: BaseGate, inp: Any, d_model: int) -> Tensor:
    """inp as [T, d_model]; TypeError for a dict or list, ValueError for another size."""
    if not isinstance(inp, torch.Tensor):
        raise TypeError(
            f"{type(gate).__name__} takes one tensor [T, {d_model}], got {type(inp).__name__}: "
            "for other inputs, define a gate whose forward picks the tensor and calls this one's"
        )
    if inp.shape[-1] != d_model:
        raise ValueError(f"{type(gate).__name__}: the input must have shape [T, {d_model}], got {list(inp.shape)}")
    return inp.reshape(-1, d_model)
