"""Megatron-Core's balance losses on our operators, attached through its MoEAuxLossAutoScaler.

With n_e the choices of expert e in a batch of T tokens and p_te the probabilities, each is
coefficient * E / (K * T^2) * sum over e of n_e * (sum over t of p_te): over the ranks that share the batch
(aux_loss), as the mean over its sequences (seq_aux_loss), or with n_e the mean over the micro-batches and the
data-parallel ranks of the step (global_aux_loss).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter as HostTopKRouter
from torch import Tensor

from fastmoe_cpp import RouterConfig, ops
from fastmoe_cpp.losses import probabilities


def attach(
    router: HostTopKRouter, c: RouterConfig, coefficients: dict[str, float], weights: Tensor, ids: Tensor,
    scores: Tensor, mask: Tensor | None, sequences: int,
) -> Tensor:  # fmt: skip
    """weights [T, K] of a router that routes by c, with a balance loss attached for each name in coefficients.

    ids [T, K] and scores [T, E] are of tokens in the order [s, b] with `sequences` = b; mask [T] is True for padding.
    """
    probs = probabilities(scores, c.score_function)
    if c.sinkhorn or c.expert_bias or c.num_groups > 1 or router.router_replay is not None:
        # the choices the probabilities alone would make
        ids = ops.route(probs.detach(), router.topk, scores_after_topk=True)[1]
    for name, coefficient in coefficients.items():
        weights = _ATTACH[name](router, coefficient, weights, ids, probs, mask, sequences)
    return weights


def _reduced(counts: Tensor, group: Any) -> Tensor:
    if group is not None and group.size() > 1:
        counts = counts.clone()
        torch.distributed.all_reduce(counts, group=group)
    return counts


def _loss(router: HostTopKRouter, coefficient: float, probs: Tensor, counts: Tensor, tokens: Any, mask: Tensor | None):
    """coefficient * E / (K * tokens^2) * sum of counts [S, E] * (sum over l of probs [S, L, E])."""
    share = counts.to(probs.dtype) / tokens / tokens
    return ops.balance_loss(probs, share, coefficient * router.num_experts / router.topk, mask)


def _batch(router, coefficient, weights, ids, probs, mask, sequences):
    group = router.tp_cp_group
    lengths = _lengths(ids.shape[0], mask, group)
    mask = None if mask is None else mask[None]
    counts = _reduced(ops.expert_counts(ids[None], router.num_experts, mask), group)
    loss = _loss(router, coefficient, probs[None], counts, lengths[1], mask)
    return _record(router, weights, coefficient, loss, "load_balancing_loss", group, lengths[0])


def _sequence(router, coefficient, weights, ids, probs, mask, sequences):
    group, length = router.tp_cp_group, ids.shape[0] // sequences

    def by_sequence(x: Tensor) -> Tensor:
        return x.reshape(length, sequences, *x.shape[1:]).transpose(0, 1).contiguous()

    lengths = _lengths(ids.shape[0], mask, group)
    mask = None if mask is None else by_sequence(mask)
    counts = _reduced(ops.expert_counts(by_sequence(ids), router.num_experts, mask), group)
    loss = _loss(router, coefficient / sequences, by_sequence(probs), counts, lengths[1] / sequences, mask)
    return _record(router, weights, coefficient, loss, "seq_load_balancing_loss", group, lengths[0])


def _global(router, coefficient, weights, ids, probs, mask, sequences):
    group = router.tp_dp_cp_group
    lengths = _lengths(ids.shape[0], mask, group)
    mask = None if mask is None else mask[None]
    counts = _reduced(ops.expert_counts(ids[None], router.num_experts, mask), group)
    router.global_tokens_per_expert += counts[0]
    router.ga_steps += 1
    mean = router.global_tokens_per_expert / router.ga_steps
    loss = _loss(router, coefficient, probs[None], mean[None], lengths[1], mask)
    name = "global_load_balancing_loss"
    return _record(router, weights, coefficient, loss, name, group, lengths[0], needs_dp_avg=False)


def _lengths(tokens: int, mask: Tensor | None, group: Any) -> tuple[Any, Any]:
    """Tokens that are not padding: here, and in the group."""
    if mask is None:
        return tokens, max(tokens, 1) * (1 if group is None else group.size())
    here = (~mask).sum()
    return here, _reduced(here, group).clamp(min=1)


def _record(router, weights, coefficient, loss, name, group, tokens, **options: Any) -> Tensor:
    options["valid_token_count"] = tokens
    known = inspect.signature(router.attach_and_log_load_balancing_loss).parameters
    options = {key: value for key, value in options.items() if key in known}
    return router.attach_and_log_load_balancing_loss(weights, coefficient, loss, name, group, **options)


_ATTACH = {"aux_loss": _batch, "seq_aux_loss": _sequence, "global_aux_loss": _global}
