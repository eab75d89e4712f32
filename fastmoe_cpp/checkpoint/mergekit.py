"""What MergeKit's MoE files are known to get wrong, said and mended.

Up to its release 0.0.6, mergekit-moe gave the shared expert a gate vector only where it had prompts, so that a
Qwen2-MoE merge with random gates holds shared_expert_gate.weight of shape [0, H] where [1, H] is due. The values were
never made: they can only be drawn anew.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from .errors import ShapeError

logger = logging.getLogger("fastmoe_cpp.checkpoint")


def empty_shared_gate(name: str, found: Sequence[int], hidden_size: int) -> ShapeError:
    """The error for a shared gate without rows: tensor, both shapes, cause and remedy."""
    expected = [1, hidden_size]
    return ShapeError(
        f"{name} must have shape {expected}, it has {list(found)}: mergekit-moe up to 0.0.6 writes it so for random "
        "gates, without a row for the shared expert; merge again with a newer mergekit, or draw the row anew with "
        "--repair-shared-gate (repair_shared_gate=True) and train it",
        tensor=name, expected=tuple(expected), found=tuple(found),
    )  # fmt: skip


def generator_of(seed: int, layer: int) -> torch.Generator:
    """What draws a layer's own weights, whatever the size of the seed."""
    return torch.Generator().manual_seed(((seed << 20) + layer) % 2**63)


def draw_shared_gate(
    name: str, hidden_size: int, dtype: torch.dtype, std: float, layer: int, seed: int
) -> torch.Tensor:
    """[1, H] from a normal distribution of that standard deviation, by layer and seed, with a warning in the log."""
    generator = generator_of(seed, layer)
    logger.warning(
        "%s had no row and was drawn anew from a normal distribution of standard deviation %g (seed %d): the shared "
        "expert's gate is untrained", name, std, seed,
    )  # fmt: skip
    return (torch.randn(1, hidden_size, generator=generator) * std).to(dtype)
