"""The router: Megatron-Core's TopKRouter, with our operators between its weights and its losses."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from megatron.core.transformer.moe.moe_utils import apply_random_logits
from megatron.core.transformer.moe.router import TopKRouter as HostTopKRouter
from torch import Tensor

from fastmoe_cpp import ops

from . import losses
from .configuration import aux_losses, check, group_score_terms, layer_config


class Routing(NamedTuple):
    """What the router decided for T tokens."""

    logits: Tensor  #: [T, E] float32, or float64
    topk_weights: Tensor  #: [T, K] of the logits' dtype, the auxiliary losses attached
    topk_ids: Tensor  #: [T, K] int64


class TopKRouter(HostTopKRouter):
    """Megatron-Core's router with its parameters, buffers, losses, replay and metrics; scores and choices are ours.

    ``weight [E, H]``, where configured ``bias [E]`` and ``expert_bias [E]``. As ``submodules.router`` of the host's
    MoELayer it returns the host's ``(probs [T, E], routing_map [T, E])``; our layer calls ``route``.
    """

    def __init__(self, config: Any, pg_collection: Any = None, is_mtp_layer: bool = False) -> None:
        self._values = check(config)
        self.moe_config = layer_config(config, self._values)
        self.aux_losses = aux_losses(self._values)
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)

    def _apply(self, fn: Any, recurse: bool = True) -> TopKRouter:
        # model.bfloat16() is about weights: counts and steps of 1e-3 are lost in 16 bits
        before = {name: b for name, b in self._buffers.items() if b is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if self._buffers[name].dtype in (torch.bfloat16, torch.float16):
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self

    def gating(self, input: Tensor) -> Tensor:
        """[..., H] to logits [..., E], in float32 or wider, rounded to the router's dtype."""
        for parameter in (self.weight, self.bias):
            if parameter is not None and parameter.device != input.device:
                parameter.data = parameter.data.to(input.device)
        dtype = self.config.moe_router_dtype
        rows = input.reshape(-1, input.shape[-1])
        logits = ops.router_logits(rows.double() if dtype == "fp64" else rows, self.weight, self.bias)
        if dtype is None and input.dtype in (torch.bfloat16, torch.float16):
            logits = logits.to(input.dtype).float()
        return logits.reshape(*input.shape[:-1], self.num_experts)

    def route(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> Routing:
        """Routes hidden_states [s, b, H]; padding_mask [s, b] bool, True for padding, counts in no loss and no load."""
        self._maintain_float32_expert_bias()
        if self.moe_config.router.jitter_eps > 0:
            hidden_states = self.apply_input_jitter(hidden_states)
        logits = self.gating(hidden_states)
        sequences = logits.shape[1] if logits.dim() > 2 else 1
        if self.config.moe_router_force_load_balancing:
            logits = apply_random_logits(logits)
        if getattr(self.config, "moe_router_force_biased", None) is not None:
            from megatron.core.transformer.moe.moe_utils import apply_biased_logits

            logits = apply_biased_logits(logits, self.config.moe_router_force_biased, self.layer_number)
        logits = logits.reshape(-1, logits.shape[-1])
        mask = None if padding_mask is None else padding_mask.reshape(-1)
        if logits.shape[0] > 0:  # the host's mean of no tokens is NaN
            logits = self.apply_z_loss(logits, **({} if mask is None else {"padding_mask": mask}))
        weights, ids, scores = self._select(logits)
        if self.training and torch.is_grad_enabled() and self.aux_losses:
            weights = losses.attach(
                self, self.moe_config.router, self.aux_losses, weights, ids, scores, mask, sequences
            )
        if self.expert_bias is not None and self.training:
            counts = ops.expert_counts(ids[None], self.num_experts, None if mask is None else mask[None])
            ops.accumulate_load(self.local_tokens_per_expert, counts[0])
        return Routing(logits, weights, ids)

    def _select(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c, top_k = self.moe_config.router, self.moe_config.top_k
        options = {
            "score_function": c.score_function,
            "scores_after_topk": c.scores_after_topk,
            "renormalize": c.renormalize,
            "renormalize_epsilon": c.renormalize_epsilon,
            "scaling_factor": c.scaling_factor,
        }
        terms = group_score_terms(self._values)
        replay = getattr(self, "router_replay", None)
        if c.sinkhorn and self.training:
            selection = ops.sinkhorn(logits.detach(), c.sinkhorn_iterations, c.sinkhorn_tolerance)
            if replay is None:
                return ops.route(logits, top_k, selection_scores=selection, **options)
        elif replay is None and terms <= 2:
            groups = {"num_groups": c.num_groups, "topk_groups": c.topk_groups, "group_score": c.group_score}
            return ops.route(logits, top_k, expert_bias=self.expert_bias, **groups, **options)
        else:
            selection = logits.detach()
            if not c.scores_after_topk:
                selection = ops.route(selection, top_k, score_function=c.score_function)[2]
            if self.expert_bias is not None:
                selection = selection + self.expert_bias
        if terms:
            selection = _groups(selection, c.num_groups, c.topk_groups, terms)

        def choose(scores: Tensor, k: int, num_groups: int | None = None, group_topk: int | None = None):
            ids = ops.route(scores, k, scores_after_topk=True)[1]
            return scores.gather(1, ids), ids

        if replay is None:
            ids = choose(selection, top_k)[1]
        else:
            ids = replay.get_replay_topk(selection, top_k, None, None, choose)[1]
        return ops.route(logits, top_k, topk_ids=ids, **options)

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The host's contract: probs [T, E], zero where a token has not chosen the expert, and routing_map [T, E]."""
        from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping

        routing = self.route(input, padding_mask)
        dtype = routing.logits.dtype if self.config.moe_router_dtype else input.dtype
        probs = torch.zeros_like(routing.logits).scatter(1, routing.topk_ids, routing.topk_weights).to(dtype)
        chosen = torch.zeros_like(routing.logits, dtype=torch.bool).scatter(1, routing.topk_ids, True)
        if self.config.moe_expert_capacity_factor is not None:
            probs, chosen = apply_router_token_dropping(
                probs,
                chosen,
                router_topk=self.topk,
                capacity_factor=self.config.moe_expert_capacity_factor,
                drop_policy=self.config.moe_token_drop_policy,
                pad_to_capacity=self.config.moe_pad_expert_input_to_capacity,
            )
        return probs, chosen


def _groups(selection: Tensor, num_groups: int, topk_groups: int, terms: int) -> Tensor:
    """selection [T, E] with -inf outside the topk_groups groups whose `terms` best scores have the largest sums."""
    grouped = selection.reshape(selection.shape[0], num_groups, -1)
    worth = grouped.topk(terms, dim=-1).values.sum(dim=-1)
    best = ops.route(worth, topk_groups, scores_after_topk=True)[1]
    keep = torch.zeros_like(worth, dtype=torch.bool).scatter(1, best, True)
    return grouped.masked_fill(~keep[..., None], -torch.inf).reshape(selection.shape)
