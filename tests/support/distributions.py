"""Who goes where: the ways tokens have been spread over experts when layers broke."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NAMES = (
    "uniform",
    "zipf",
    "all_to_one",
    "first_empty",
    "middle_empty",
    "last_empty",
    "one_token",
    "duplicates",
    "dropped",
    "ties",
    "nan_rows",
)


def logits(name: str, tokens: int, experts: int, seed: int = 0) -> Tensor:
    """Float64 logits [T, E], on a grid of 1/8 so that float32 ranks them as float64 does and ties do occur."""
    g = torch.Generator().manual_seed(seed)
    out = (torch.randn(tokens, experts, generator=g, dtype=torch.float64) * 8).round() / 8
    if name == "zipf":
        out -= 1.5 * torch.log(torch.arange(1, experts + 1, dtype=torch.float64)).mul(8).round() / 8
    elif name == "all_to_one":
        out[:, experts // 2] = 12.0
    elif name in ("first_empty", "middle_empty", "last_empty"):
        out[:, empty_expert(name, experts)] = -12.0
    elif name == "ties":
        out = out.round().clamp(-1, 1)
    elif name == "nan_rows":
        out[::3] = math.nan
        out[1::3, ::2] = math.nan
    return out


def empty_expert(name: str, experts: int) -> int:
    return {"first_empty": 0, "middle_empty": experts // 2, "last_empty": experts - 1}[name]


def ids(name: str, tokens: int, experts: int, top_k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """topk_ids [T, K] int64 and topk_weights [T, K] float64. Distinct in a row but for all_to_one and duplicates."""
    g = torch.Generator().manual_seed(seed)
    weights = torch.rand(tokens, top_k, generator=g, dtype=torch.float64) + 0.05
    weights /= weights.sum(dim=1, keepdim=True)
    if name == "all_to_one":
        return torch.full((tokens, top_k), experts // 2), weights
    if name == "duplicates":
        return torch.randint(0, experts, (tokens, 1), generator=g).repeat(1, top_k), weights
    if name == "ties":
        return torch.arange(top_k).repeat(tokens, 1), weights.fill_(1 / top_k)
    if name.endswith("_empty"):
        weight_of = torch.ones(experts, dtype=torch.float64)
        if experts > top_k:
            weight_of[empty_expert(name, experts)] = 0
    elif name == "zipf":
        weight_of = 1 / torch.arange(1, experts + 1, dtype=torch.float64)
    else:
        weight_of = torch.ones(experts, dtype=torch.float64)
    # Gumbel's trick: the K largest of log weight + noise are a draw without replacement
    noise = -torch.log(
        -torch.log(torch.rand(tokens, experts, generator=g, dtype=torch.float64).clamp(1e-12, 1 - 1e-12))
    )
    chosen = (
        (weight_of.log() + noise).topk(top_k, dim=1).indices if tokens else torch.empty(0, top_k, dtype=torch.int64)
    )
    if name == "one_token":
        chosen[torch.arange(tokens) != tokens // 2] = -1
    elif name == "dropped":
        chosen[torch.rand(tokens, top_k, generator=g) < 0.3] = -1
    elif name == "nan_rows":
        weights[::3] = math.nan
    return chosen, weights
