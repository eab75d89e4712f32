"""FasterMoE's topology-aware gate (He et al., PPoPP 2022): few tokens leave the node."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from .naive_gate import NaiveGate
from .utils import gshard_loss


def _setting(name: str, kind: type, default: float, low: float) -> float:
    text = os.environ.get(name, "")
    if not text:
        return default
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not low <= value:
        raise ValueError(f"{name} must be a number of at least {low}, got {text!r}")
    return value


def workers_per_node() -> int:
    """FMOE_TOPO_GPUS_PER_NODE, 8 by default: the processes with fast connections to each other."""
    return int(_setting("FMOE_TOPO_GPUS_PER_NODE", int, 8, 1))


class FasterGate(NaiveGate):
    """Top-2, where at most FMOE_TOPO_OUTGOING_FRACTION (0.14) of the tokens here choose an expert of another node.

    Where more would, by their first choice, the tokens with the largest first logit keep it, as their second choice,
    and everything else is chosen among the experts of node_rank's node. The loss is GShard's, of the choices before.
    """

    def __init__(self, d_model: int, n_expert: int, world_size: int, node_rank: int, gate_bias: bool = True) -> None:
        super().__init__(d_model, n_expert, world_size, top_k=2, gate_bias=gate_bias)
        self.ne_per_node = workers_per_node() * n_expert
        self.ogn_ratio = _setting("FMOE_TOPO_OUTGOING_FRACTION", float, 0.14, 0)
        self.node_rank = node_rank
        outside = torch.arange(self.tot_expert) // self.ne_per_node != node_rank
        if int((~outside).sum()) < 2:
            raise ValueError(
                f"FasterGate: node {node_rank} must hold at least 2 of the {self.tot_expert} experts, "
                f"{self.ne_per_node} to a node, for top-2, and holds {int((~outside).sum())}"
            )
        # True for experts of other nodes
        self.register_buffer("mask", outside, persistent=False)

    def forward(self, inp: Tensor) -> tuple[Tensor, Tensor]:
        """inp [T, d_model] to ids [T, 2] int64 and scores [T, 2]."""
        free, _, probs, logits = self.choose(inp)
        self.set_loss(gshard_loss(probs, free, self.num_expert))
        with torch.no_grad():
            tokens = logits.shape[0]
            allowed = min(int(tokens * self.ogn_ratio), tokens)
            first = free[:, 0]
            leaves = self.mask[first]
            # the allowed tokens of largest first logit among those that would leave
            order = torch.where(leaves, logits.gather(1, free[:, :1])[:, 0], -torch.inf).argsort(
                descending=True, stable=True
            )
            may_leave = torch.zeros_like(leaves)
            may_leave[order[:allowed]] = True
            inside = logits.masked_fill(self.mask, -torch.inf).topk(2, dim=-1).indices
            limited = torch.stack([inside[:, 0], torch.where(may_leave, first, inside[:, 1])], dim=1)
            ids = torch.where(leaves.sum() < allowed, free, limited)
        return ids, torch.softmax(logits.gather(1, ids), dim=-1).to(inp.dtype)


def gen_faster_gate(rank: int) -> Callable[..., FasterGate]:
    """A gate for FMoE(gate=...): FasterGate on the node of process rank of the expert-parallel group."""

    def make(d_model: int, n_expert: int, world_size: int, top_k: int = 2, gate_bias: bool = True) -> FasterGate:
        if top_k != 2:
            raise ValueError(f"FasterGate: top_k must be 2, got {top_k!r}")
        return FasterGate(d_model, n_expert, world_size, rank // workers_per_node(), gate_bias=gate_bias)

    return make
