"""Top-k of a linear layer."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from ... import ops
from .base_gate import BaseGate, check_tokens, check_top_k


class NaiveGate(BaseGate):
    """The top_k largest logits of ``gate``, a torch.nn.Linear, and their softmax; the loss is zero.

    Choices are in falling order of their logits, ties go to the lower id. Logits and softmax are float32 (float64 for
    float64 input), whatever the model's dtype; the scores are returned in the input's dtype.
    """

    def __init__(self, d_model: int, num_expert: int, world_size: int, top_k: int = 2, gate_bias: bool = True) -> None:
        super().__init__(num_expert, world_size)
        check_top_k(self, top_k)
        self.gate = nn.Linear(d_model, self.tot_expert, bias=gate_bias)
        self.top_k = top_k
        if type(self) is NaiveGate and top_k == 1 and self.tot_expert > 1:
            warnings.warn(
                "NaiveGate: top_k is 1, so every score is 1 and the gate gets no gradient from the layer's output: use "
                "SwitchGate, whose score is the probability, or a larger top_k",
                stacklevel=2,
            )

    def logits(self, inp: Tensor) -> Tensor:
        """[T, E] float32 or float64 of inp [T, d_model]."""
        linear = self.gate
        hooked = type(linear) is nn.Linear and (
            linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks
        )
        if type(linear) is not nn.Linear or hooked:
            logits = linear(inp)
            return logits if logits.dtype == torch.float64 else logits.float()
        return ops.router_logits(check_tokens(self, inp, linear.in_features), linear.weight, linear.bias)

    def choose(self, inp: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """ids [T, K], the softmax over the chosen [T, K], the softmax over all [T, E], and the logits [T, E]."""
        logits = self.logits(inp)
        weights, ids, probs = ops.route(logits, self.top_k, scores_after_topk=True, renormalize=False)
        return ids, weights, probs, logits

    def forward(self, inp: Tensor, return_all_scores: bool = False) -> tuple[Tensor, ...]:
        """inp [T, d_model] to ids [T, K] int64 and scores [T, K]; with return_all_scores also the logits [T, E]."""
        ids, scores, _, logits = self.choose(inp)
        self.set_loss(torch.zeros(1, device=inp.device, requires_grad=True))
        ids, scores = ids.reshape(*inp.shape[:-1], self.top_k), scores.to(inp.dtype)
        if return_all_scores:
            return ids, scores, logits.to(inp.dtype)
        return ids, scores
