"""Noisy top-k (Shazeer et al., arXiv 1701.06538)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops
from .base_gate import BaseGate, check_tokens, check_top_k


class NoisyGate(BaseGate):
    """Top-k of ``x @ w_gate``, in training with normal noise of deviation softplus(x @ w_noise) + 0.01.

    Scores are the softmax over the chosen. The loss is CV^2 of the importance (sums of scores) and of the load: in
    training the expected number of tokens under the noise, which has a gradient, in evaluation the number of tokens.
    """

    noise_epsilon = 1e-2

    def __init__(self, d_model: int, num_expert: int, world_size: int, top_k: int = 2) -> None:
        super().__init__(num_expert, world_size)
        check_top_k(self, top_k)
        self.w_gate = nn.Parameter(torch.empty(d_model, self.tot_expert))
        self.w_noise = nn.Parameter(torch.empty(d_model, self.tot_expert))
        self.top_k = top_k
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Both matrices from kaiming_uniform_(a=sqrt(5))."""
        nn.init.kaiming_uniform_(self.w_gate, a=math.sqrt(5))
        nn.init.kaiming_uniform_(self.w_noise, a=math.sqrt(5))

    def cv_squared(self, x: Tensor) -> Tensor:
        """The squared coefficient of variation of x [E], with the unbiased variance: a scalar, 0 of one expert."""
        if x.shape[0] == 1:
            return x.new_zeros(())
        return x.var() / (x.mean() ** 2 + 1e-10)

    def _expected_load(self, clean: Tensor, noisy: Tensor, deviation: Tensor) -> Tensor:
        """Sum over tokens of the probability that an expert is among the top k, its own noise drawn anew: [E].

        An expert is in where it beats the k-th best of the others: that is the (k + 1)-th of all for one that is in.
        """
        best = noisy.topk(self.top_k + 1, dim=1).values
        k_th, next_best = best[:, self.top_k - 1 : self.top_k], best[:, self.top_k :]
        threshold = torch.where(noisy > next_best, next_best, k_th)
        return torch.special.ndtr((clean - threshold) / deviation).sum(0)

    def forward(self, inp: Tensor) -> tuple[Tensor, Tensor]:
        """inp [T, d_model] to ids [T, K] int64 and scores [T, K]."""
        x = check_tokens(self, inp, self.w_gate.shape[0])
        clean = ops.router_logits(x, self.w_gate.t().contiguous())
        noisy, deviation = clean, None
        if self.training:
            deviation = F.softplus(ops.router_logits(x, self.w_noise.t().contiguous())) + self.noise_epsilon
            noisy = clean + torch.randn_like(clean) * deviation
        scores, ids, _ = ops.route(noisy, self.top_k, scores_after_topk=True, renormalize=False)
        importance = torch.zeros_like(noisy).scatter(1, ids, scores).sum(0)
        if deviation is not None and self.top_k < self.tot_expert:
            load = self._expected_load(clean, noisy, deviation)
        else:
            load = ops.expert_counts(ids[None], self.tot_expert)[0].to(noisy.dtype)
        self.set_loss(self.cv_squared(importance) + self.cv_squared(load))
        return ids, scores.to(inp.dtype)
