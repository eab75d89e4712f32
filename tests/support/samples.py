"""Inputs of the operators, of sizes and layouts on demand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from support import distributions
from support.oracle import GATED, wide

ops = torch.ops.fastmoe_cpp
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def normal(*shape: int, seed: int = 0, std: float = 1.0, dtype=torch.float64, device="cpu") -> Tensor:
    """The same numbers on every device, rounded to dtype."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g, dtype=torch.float32) * std).to(device=device, dtype=dtype)


LAYOUTS = ("contiguous", "transposed", "strided", "offset")


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The same values in another layout: last two axes swapped in memory, every second column, or begun at an odd
    element."""
    if layout == "contiguous":
        return t
    if layout == "transposed":
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "strided":
        return torch.stack([t, torch.full_like(t, 99)], dim=-1)[..., 0]
    flat = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
    flat[1:] = t.flatten()
    return flat[1:].view(t.shape)


class Plan(tuple):
    """What dispatch returns, by name."""

    slot_index, token_slot, expert_offsets, tokens_per_expert = (property(lambda self, i=i: self[i]) for i in range(4))


def dispatch(ids: Tensor, experts: int, **options: Any) -> Plan:
    return Plan(ops.dispatch(ids, experts, **options))


def experts_inputs(
    tokens=7, hidden=5, inner=4, experts=3, top_k=2, *, dtype=torch.float64, device="cpu", distribution="uniform",
    activation="swiglu", bias=False, interleaved=False, seed=0,
) -> dict[str, Any]:  # fmt: skip
    """Float64 masters rounded to dtype, and the ids and routing weights of a distribution."""
    up_rows = inner * (2 if activation in GATED else 1)
    ids, weights = distributions.ids(distribution, tokens, experts, top_k, seed)
    made = {
        "hidden_states": normal(tokens, hidden, seed=seed + 1, dtype=dtype, device=device),
        "gate_up_proj": normal(experts, up_rows, hidden, seed=seed + 2, std=hidden**-0.5, dtype=dtype, device=device),
        "down_proj": normal(experts, hidden, inner, seed=seed + 3, std=inner**-0.5, dtype=dtype, device=device),
        "topk_weights": weights.to(device=device, dtype=wide(dtype)),
        "topk_ids": ids.to(device),
    }
    if bias in (True, "both", "up"):
        made["gate_up_bias"] = normal(experts, up_rows, seed=seed + 4, std=0.5, dtype=dtype, device=device)
    if bias in (True, "both", "down"):
        made["down_bias"] = normal(experts, hidden, seed=seed + 5, std=0.5, dtype=dtype, device=device)
    return made


def run_experts(inputs: dict[str, Any], plan: Plan | None = None, **options: Any) -> Tensor:
    """torch.ops.fastmoe_cpp.experts of experts_inputs, with a plan made of their ids unless one is given."""
    if plan is None:
        plan = dispatch(inputs["topk_ids"], inputs["gate_up_proj"].shape[0])
    given = {k: v for k, v in inputs.items() if k.endswith("_bias")}
    return ops.experts(
        inputs["hidden_states"], inputs["gate_up_proj"], inputs["down_proj"], inputs["topk_weights"], *plan[:3],
        **given, **options,
    )  # fmt: skip


def leaves(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The floating inputs as leaves that ask for a gradient; the rest unchanged."""
    return {
        k: v.detach().requires_grad_() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()
    }
