"""Memory that shows when it is read before it is written."""

from __future__ import annotations

import math

import torch


def poison() -> None:
    """Fills what the CUDA caching allocator hands out next with NaN; as integers that is far outside any id or slot."""
    held = [torch.full((2**n,), math.nan, device="cuda") for n in range(7, 25) for _ in range(3)]
    del held
