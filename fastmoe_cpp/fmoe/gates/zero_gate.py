"""Every token to expert 0."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base_gate import BaseGate


class ZeroGate(BaseGate):
    """All top_k choices of every token are expert 0, each with score 1 / top_k. No loss, no parameters."""

    def __init__(self, d_model: Any, num_expert: int, world_size: int, top_k: int = 2) -> None:
        super().__init__(num_expert, world_size)
        self.top_k = top_k

    def forward(self, inp: Tensor) -> tuple[Tensor, Tensor]:
        """inp [T, ...] to ids [T, K] int64 and scores [T, K]."""
        shape = (inp.shape[0], self.top_k)
        dtype = inp.dtype if inp.is_floating_point() else torch.float32
        return (
            torch.zeros(shape, dtype=torch.int64, device=inp.device),
            torch.full(shape, 1 / self.top_k, dtype=dtype, device=inp.device),
        )
