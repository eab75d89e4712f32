"""Hidden states to K weights and K expert ids a token."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module

from . import ops
from .config import MoEConfig
from .groups import sum_over_ranks
from .outputs import DispatchPlan, RouterOutput


class Router(nn.Module):
    """The router of a MoEConfig: ``weight [E, H]``, where configured ``bias [E]`` and the buffer ``expert_bias [E]``.

    ``tokens_per_expert [E]`` int64 counts the choices of training since the last ``update_expert_bias()``. It is not
    saved. A pass that activation checkpointing runs again during backward does not count a second time.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    expert_bias: Tensor | None
    tokens_per_expert: Tensor | None

    def __init__(
        self, config: MoEConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        experts, router = config.num_experts, config.router
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size, device=device, dtype=dtype))
        bias = nn.Parameter(torch.empty(experts, device=device, dtype=dtype)) if router.bias else None
        self.register_parameter("bias", bias)
        expert_bias = torch.zeros(experts, device=device, dtype=torch.float32) if router.expert_bias else None
        self.register_buffer("expert_bias", expert_bias)
        counted = router.expert_bias or router.balance_loss == "global"
        counts = torch.zeros(experts, device=device, dtype=torch.int64) if counted else None
        # no buffer: DistributedDataParallel would put rank 0's in the place of every other rank's
        self.tokens_per_expert = counts
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Weights from a normal distribution of standard deviation initializer_range; biases and counts are 0."""
        self.weight.normal_(0.0, self.config.initializer_range)
        for zero in (self.bias, self.expert_bias, self.tokens_per_expert):
            if zero is not None:
                zero.zero_()

    def _apply(self, fn, recurse: bool = True):
        # layer.to(bfloat16) is about weights: steps of 1e-3 are lost in a 16-bit bias
        before = self.expert_bias
        super()._apply(fn, recurse)
        if before is not None and self.expert_bias.dtype not in (torch.float32, torch.float64):
            self.expert_bias = before.to(self.expert_bias.device)
        if self.tokens_per_expert is not None:
            self.tokens_per_expert = counts_on(self.weight.device, self.tokens_per_expert)
        return self

    def count(self, tokens_per_expert: Tensor) -> None:
        """Adds a training pass's counts [E] int64."""
        if self.tokens_per_expert is None:
            return
        if self.tokens_per_expert.device != tokens_per_expert.device:
            # weights that load_state_dict assigned, or FSDP moved, left the counts where they were
            self.tokens_per_expert = counts_on(tokens_per_expert.device, self.tokens_per_expert)
        if torch.jit.is_tracing():
            warnings.warn(
                "torch.jit.trace may leave counting out: update_expert_bias() of a traced layer that trains then finds "
                "no tokens (torch.export and torch.compile count)",
                torch.jit.TracerWarning,
                stacklevel=4,
            )
        ops.accumulate_load(self.tokens_per_expert, tokens_per_expert)

    def jitter(self, hidden_states: Tensor) -> Tensor:
        """hidden_states * U[1 - jitter_eps, 1 + jitter_eps] in training, itself otherwise."""
        eps = self.config.router.jitter_eps
        if not self.training or eps == 0:
            return hidden_states
        return hidden_states * torch.empty_like(hidden_states).uniform_(1.0 - eps, 1.0 + eps)

    def forward(self, hidden_states: Tensor, topk_ids: Tensor | None = None, *, jitter: bool = True) -> RouterOutput:
        """Routes hidden_states [T, H]; given topk_ids [T, K] are replayed, with weights from the logits of now.

        jitter=False is for hidden_states that jitter() made.
        """
        c = self.config.router
        if jitter:
            hidden_states = self.jitter(hidden_states)
        if c.dtype == torch.float64:
            hidden_states = hidden_states.double()
        logits = ops.router_logits(hidden_states, self.weight, self.bias)
        if c.dtype in (torch.bfloat16, torch.float16) and logits.dtype != torch.float64:
            logits = logits.to(c.dtype).float()
        selection = None
        if c.sinkhorn and self.training and topk_ids is None:
            selection = ops.sinkhorn(logits, c.sinkhorn_iterations, c.sinkhorn_tolerance)
        weights, ids, scores = ops.route(
            logits, self.config.top_k, selection_scores=selection, topk_ids=topk_ids, **self._choice()
        )
        return RouterOutput(logits, weights, ids, scores)

    def _choice(self) -> dict[str, Any]:
        c = self.config.router
        return {
            "expert_bias": self.expert_bias,
            "score_function": c.score_function,
            "scores_after_topk": c.scores_after_topk,
            "renormalize": c.renormalize,
            "renormalize_epsilon": c.renormalize_epsilon,
            "scaling_factor": c.scaling_factor,
            "num_groups": c.num_groups,
            "topk_groups": c.topk_groups,
            "group_score": c.group_score,
        }

    def is_plain(self) -> bool:
        """Whether a call is no more than route_and_dispatch: no gradients, nothing random, rounded or watched."""
        c, own = self.config.router, self.__dict__
        return (
            not torch.is_grad_enabled()
            # a trace is checked by another one without gradients, which must see the same operators
            and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
            and c.dtype == torch.float32
            and not (self.training and (c.sinkhorn or c.jitter_eps))
            and type(self.weight) is nn.Parameter
            and not (self._forward_hooks or self._forward_pre_hooks or self._compiled_call_impl)
            and not ("forward" in own or "jitter" in own)
            and (Router.__call__, Router.forward, Router.jitter) == _AS_WRITTEN
            and not module._has_any_global_hook()
        )

    def route_and_dispatch(self, hidden_states: Tensor) -> tuple[RouterOutput, DispatchPlan]:
        """forward of hidden_states [T, H] where it is_plain(), and the plan of its choice, by one operator."""
        return ops.route_and_dispatch(hidden_states, self.weight, self.bias, self.config.top_k, **self._choice())

    @torch.no_grad()
    def update_expert_bias(self, group: torch.distributed.ProcessGroup | None = None) -> None:
        """See MoE.update_expert_bias."""
        if self.tokens_per_expert is None:
            return
        c = self.config.router
        if self.expert_bias is not None:
            counts = sum_over_ranks(self.tokens_per_expert, group)
            ops.update_expert_bias(self.expert_bias, counts, c.expert_bias_update_rate, c.expert_bias_zero_mean)
        self.tokens_per_expert.zero_()

    def extra_repr(self) -> str:
        """Sizes for repr()."""
        c = self.config
        return f"hidden_size={c.hidden_size}, num_experts={c.num_experts}, top_k={c.top_k}"


def counts_on(device: torch.device, counts: Tensor) -> Tensor:
    """Counts on a device; from meta, where nothing was counted, zeros."""
    if counts.device == device:
        return counts
    return torch.zeros_like(counts, device=device) if counts.is_meta else counts.to(device)


#: What is_plain() finds replaced where somebody patches the class.
_AS_WRITTEN = (Router.__call__, Router.forward, Router.jitter)
