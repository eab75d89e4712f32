"""Switch Transformer's gate (arXiv 2101.03961)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import ops
from .naive_gate import NaiveGate
from .utils import check_capacity, limit_by_capacity


class SwitchGate(NaiveGate):
    """One choice a token, its score the softmax over all experts, with a capacity over all processes.

    In training a number from U[1 - switch_eps, 1 + switch_eps] is added to every logit. An expert takes
    ceil(rate * T / num_expert) choices, T the tokens of one process; rate is capacity[0] in training and capacity[1] in
    evaluation. The loss is E * sum over e of (n_e / n) * (sum of p_e / n), with n the choices that were kept, n_e those
    of expert e, and p_e the probability of e, summed over every token.
    """

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int,
        topk: int = 1,
        switch_eps: float = 0.1,
        capacity: tuple[float, float] = (1.2, 2.4),
        gate_bias: bool = True,
    ) -> None:
        if topk != 1:
            raise ValueError(f"{type(self).__name__}: topk must be 1, got {topk!r} (of FMoE: set top_k=1)")
        super().__init__(d_model, num_expert, world_size, top_k=1, gate_bias=gate_bias)
        self.switch_eps = switch_eps
        self.capacity = check_capacity(type(self).__name__, capacity)

    def forward(self, inp: Tensor) -> tuple[Tensor, Tensor]:
        """inp [T, d_model] to ids [T, 1], -1 for a dropped choice, and scores [T, 1]."""
        logits = self.logits(inp)
        if self.training:
            logits = logits + (torch.rand_like(logits) * 2 * self.switch_eps + 1.0 - self.switch_eps)
        scores, ids, probs = ops.route(logits, 1, renormalize=False)
        rate = self.capacity[0 if self.training else 1]
        capacity = math.ceil(rate * logits.shape[0] / self.num_expert)
        ids = limit_by_capacity(ids, self.num_expert, self.world_size, capacity)[2]
        counts = ops.expert_counts(ids[None], self.tot_expert).to(probs.dtype)
        kept = counts.sum().clamp(min=1)
        self.set_loss(ops.balance_loss(probs[None], counts / kept / kept, float(self.tot_expert)))
        return ids, scores.to(inp.dtype)
