"""The losses that keep experts evenly used and logits small, in the forms of the systems that have them.

With n the pairs of token and expert an expert was chosen for, p the router's probabilities and T the tokens that are
not padding, every balance loss is E * sum over experts of (share of choices) * (mean probability):

==============  =======================================================  ==========================================
form            share of choices                                         as in
==============  =======================================================  ==========================================
'switch'        n / T, n counting each token's first choice alone        Switch Transformer (arXiv 2101.03961)
'huggingface'   n / T: with K choices a token the shares sum to K        transformers' load_balancing_loss_func
'batch'         n / (K * T)                                              Megatron-LM's aux_loss
'sequence'      the same for each sequence, then the mean over sequences DeepSeek-V3 (arXiv 2412.19437),
                                                                         Megatron-LM's seq_aux_loss
'global'        n / sum(n), counted over micro-batches and ranks         Megatron-LM's global_aux_loss
==============  =======================================================  ==========================================

A perfectly even router has a loss of 1 ('huggingface': K). The choices have no gradient; the probabilities have. A
layer counts the choices its probabilities alone would make, without selection bias, groups or Sinkhorn; 'global' counts
what was routed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from . import ops
from .config import BALANCE_LOSSES
from .groups import sum_over_ranks


def probabilities(scores: Tensor, score_function: str) -> Tensor:
    """Scores [..., E] as shares of one: softmax scores are, the others are divided by (their sum + 1e-20)."""
    if score_function == "softmax":
        return scores
    return scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)


def balance_loss(
    probs: Tensor,
    topk_ids: Tensor,
    form: str = "batch",
    *,
    padding_mask: Tensor | None = None,
    global_counts: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The balance loss of probs [T, E] or [S, L, E] and topk_ids [T, K] or [S, L, K], best choice first: a scalar.

    padding_mask [T] or [S, L] bool is True for padding. global_counts [E] are the counts of 'global', to which the
    caller adds micro-batches and ranks (a mean of the ranks' gradients is then that of the global loss); without them
    'global' is 'batch'. With a group, every form is of its ranks' tokens as one batch: the mean of the ranks' results
    is that batch's loss, the mean of their gradients its gradient, however many tokens each has. Every rank calls it.
    Raises ValueError for an unknown form or for global_counts with another form.
    """
    if form not in BALANCE_LOSSES:
        raise ValueError(f"form must be one of {', '.join(map(repr, BALANCE_LOSSES))}, got {form!r}")
    if global_counts is not None and form != "global":
        raise ValueError(f"global_counts must be None for the form {form!r}, got a tensor")
    num_experts = probs.shape[-1]
    exact = torch.float64 if probs.dtype == torch.float64 else torch.float32  # 16 bits round counts
    # one sequence of all tokens, but for the form that tells sequences apart
    sequences = probs.shape[0] if form == "sequence" and probs.dim() == 3 else 1
    length = probs.numel() // (num_experts * sequences) if sequences else 0
    probs = probs.reshape(sequences, length, num_experts)
    if form == "switch":
        topk_ids = topk_ids[..., :1]
    top_k = topk_ids.shape[-1]
    topk_ids = topk_ids.reshape(sequences, length, top_k)
    if padding_mask is None:
        tokens: Tensor | int = max(length, 1)
    else:
        padding_mask = padding_mask.reshape(sequences, length)
        tokens = (~padding_mask).sum(dim=1, keepdim=True).clamp(min=1)
    counts = None if global_counts is not None else ops.expert_counts(topk_ids, num_experts, padding_mask)
    divisor: Tensor | int = max(sequences, 1)
    averaged: Tensor | float = tokens
    if group is not None and form == "sequence":
        divisor = _mean_over_ranks(torch.full((), sequences, dtype=torch.int64, device=probs.device), group)
    elif group is not None:
        own = torch.full((1,), length, dtype=torch.int64, device=probs.device)
        if padding_mask is not None:
            own = (~padding_mask).sum(dim=1)
        total = sum_over_ranks(own if counts is None else torch.cat([own, counts[0]]), group)
        counts, tokens = total[None, 1:], total[:1].clamp(min=1)
        averaged = tokens.to(exact) / group.size()
    if global_counts is None:
        share = counts.to(exact) / (tokens if form in ("switch", "huggingface") else tokens * top_k)
    else:
        counts = global_counts.to(exact)[None]
        share = counts / counts.sum().clamp(min=1)
    # Sizes divide the tensor: as the operator's scale a symbolic size would fix the graph to one number of sequences.
    return ops.balance_loss(probs, share / averaged / divisor, float(num_experts), padding_mask)


def z_loss(logits: Tensor, padding_mask: Tensor | None = None, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """Mean of logsumexp(logits [T, E])^2 over the tokens that are not padding (ST-MoE, arXiv 2202.08906): a scalar.

    With a group, its ranks' tokens are one batch, as for balance_loss.
    """
    loss = ops.z_loss(logits, 1.0, padding_mask)
    if group is None:
        return loss
    own = torch.full((), logits.shape[0], dtype=torch.int64, device=logits.device)
    if padding_mask is not None:
        own = (~padding_mask).sum()
    return loss * (own.to(loss.dtype) / _mean_over_ranks(own, group).to(loss.dtype))


def _mean_over_ranks(count: Tensor, group: dist.ProcessGroup) -> Tensor:
    """A count's mean in float64; of nothing anywhere 1 / ranks, to divide by."""
    return sum_over_ranks(count, group).clamp(min=1).double() / group.size()


def huggingface(
    router_logits: Sequence[Tensor], num_experts: int, top_k: int, attention_mask: Tensor | None = None
) -> Tensor:
    """transformers' load balancing loss over all layers at once: a scalar.

    router_logits holds each layer's logits [B * L, E]; attention_mask [B, L] is 1 for tokens and 0 for padding.
    """
    if len(router_logits) == 0:
        raise ValueError("router_logits must hold the logits of at least one layer, got none")
    probs, ids = [], []
    for logits in router_logits:
        if logits.shape[-1] != num_experts:
            raise ValueError(f"router_logits must be [B * L, {num_experts}], got {list(logits.shape)}")
        _, chosen, scores = ops.route(logits, top_k)
        probs.append(scores.to(router_logits[0].device))
        ids.append(chosen.to(router_logits[0].device))
    padding = None
    if attention_mask is not None:
        padding = (attention_mask == 0).reshape(-1).repeat(len(probs)).to(probs[0].device)
    return balance_loss(torch.cat(probs), torch.cat(ids), "huggingface", padding_mask=padding)


class _AddGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states: Tensor, loss: Tensor, scale: float | Tensor) -> Tensor:
        ctx.scale = scale
        ctx.like = (loss.dtype, loss.device)
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx, grad: Tensor):
        dtype, device = ctx.like
        return grad, (torch.ones((), dtype=dtype, device=device) * ctx.scale).to(dtype), None


def add_gradient(hidden_states: Tensor, loss: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """hidden_states itself; where a gradient flows back through it, scale * loss is trained on as well."""
    return _AddGradient.apply(hidden_states, loss, scale)
