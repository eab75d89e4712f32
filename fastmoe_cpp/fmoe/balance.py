"""How evenly a layer's experts are used, one number a layer and measure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops

#: Of c_e [E], how often each expert was chosen.
metrics: dict[str, Callable[[Tensor], Tensor]] = {
    "coefficient-variation": lambda c_e: torch.std(c_e) / torch.mean(c_e),
    "Lmax-over-Lmin": lambda c_e: (torch.max(c_e) + 1) / (torch.min(c_e) + 1),
    "Lmax-over-Lmean": lambda c_e: torch.max(c_e) / torch.mean(c_e),
}


def reset_balance_profile(balance_dict: dict[str, list], num_layers: int, balance_strategy: str | None) -> None:
    """Empties balance_dict: for every measure, and for ``{balance_strategy}_loss``, a list of num_layers times None."""
    names = [*metrics, f"{balance_strategy}_loss"] if balance_strategy else [*metrics]
    for name in names:
        balance_dict[name] = [None] * num_layers


@torch.no_grad()
def update_balance_profile(
    balance_dict: dict[str, list],
    gate_top_k_idx: Tensor,
    gate_score_top_k: Tensor,
    gate_context: Any,
    layer_idx: int,
    num_expert: int,
    balance_strategy: str | None,
) -> None:
    """Writes every measure of gate_top_k_idx [T, K] at balance_dict[measure][layer_idx], from a gate hook.

    num_expert is the number of experts in all. The strategy's loss is the gate's to compute: see its get_loss().
    """
    c_e = ops.expert_counts(gate_top_k_idx.reshape(1, -1, 1), num_expert)[0].float()
    for name, measure in metrics.items():
        balance_dict[name][layer_idx] = measure(c_e)
