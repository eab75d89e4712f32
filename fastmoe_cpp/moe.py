"""The layer: router, dispatch, experts, combine."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from . import hosts, losses, ops
from .config import MoEConfig
from .experts import Experts, SharedExperts, check_padding_mask
from .groups import sum_over_ranks
from .outputs import DispatchPlan, MoEOutput, RouterOutput
from .router import Router, counts_on


class MoE(nn.Module):
    """A Mixture-of-Experts layer.

    Parameters: ``router.weight [E, H]``, ``experts.gate_up_proj [E, 2 * I, H]``, ``experts.down_proj [E, H, I]``, and
    where the configuration asks for them the biases of all three and ``shared_experts``.

    ``layer(x)`` is one tensor of x's shape and dtype. While training it also adds the gradient of the balance and z
    loss, by their coefficients, to whatever flows back through its output; ``aux_loss_scale`` (1.0) scales that
    gradient where the loss is scaled: the loss scale under a gradient scaler, 1 / n where n micro-batches are averaged.
    ``layer.forward_with_routing(x)`` returns those losses with everything else and adds nothing.
    """

    def __init__(
        self, config: MoEConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        if not isinstance(config, MoEConfig):
            raise TypeError(f"config must be a MoEConfig, got {type(config).__name__}")
        self.config = config
        self.router = Router(config, device=device, dtype=dtype)
        self.experts = Experts(config, device=device, dtype=dtype)
        self.shared_experts: SharedExperts | None = None
        if config.shared_intermediate_size is not None:
            self.shared_experts = SharedExperts(config, device=device, dtype=dtype)
        self.aux_loss_scale: float | Tensor = 1.0
        #: Ranks whose tokens are one batch to the balance and z losses and to update_expert_bias(): the mean over them
        #: of the losses, or of their gradients, is the whole batch's. None is this rank alone.
        self.balance_group: torch.distributed.ProcessGroup | None = None
        #: [E] int64 while a monitor.LoadMonitor watches the layer; no buffer, see Router.
        self.load: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        # nobody watches a copy
        return super().__getstate__() | {"load": None}

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        if self.load is not None:
            self.load = counts_on(self.router.weight.device, self.load)
        return self

    def reset_parameters(self) -> None:
        """Draws every weight anew, as the constructor does."""
        self.router.reset_parameters()
        self.experts.reset_parameters()
        if self.shared_experts is not None:
            self.shared_experts.reset_parameters()

    def forward(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """hidden_states [..., H] to one tensor of its shape and dtype.

        padding_mask [...] bool is True for padding: such tokens get no expert (the shared ones still see them), take no
        capacity and count in no loss. Raises ValueError for a wrong shape and TypeError for a dtype that is not the
        weights', outside autocast.
        """
        x, mask = self._flatten(hidden_states, padding_mask)
        router = self.config.router
        wanted = router.balance_loss_coefficient > 0 or router.z_loss_coefficient > 0
        trained = wanted and self.training and torch.is_grad_enabled()
        output, _, _ = self._run(x, mask, None, hidden_states.shape if trained else None)
        return output if hidden_states.dim() == 2 else output.reshape(hidden_states.shape)

    def forward_with_routing(
        self, hidden_states: Tensor, padding_mask: Tensor | None = None, *, topk_ids: Tensor | None = None
    ) -> MoEOutput:
        """forward, and everything there is to know about it; the losses are returned and not trained on by themselves.

        topk_ids [..., K] (int32 or int64, -1 for none) are experts chosen before: they are used as they are, with
        weights from the router's logits of now. Of hidden_states [B, L, H] the 'sequence' balance loss takes B
        sequences of L tokens.
        """
        x, mask = self._flatten(hidden_states, padding_mask)
        if topk_ids is not None:
            expected = (*hidden_states.shape[:-1], self.config.top_k)
            if topk_ids.shape != expected and topk_ids.shape != (x.shape[0], self.config.top_k):
                raise ValueError(f"topk_ids must have shape {list(expected)}, got {list(topk_ids.shape)}")
            topk_ids = topk_ids.reshape(x.shape[0], self.config.top_k)
        output, routing, plan = self._run(x, mask, topk_ids)
        balance_loss, z_loss, aux_loss = self._losses(hidden_states.shape, routing, mask)
        return MoEOutput(
            hidden_states=output.reshape(hidden_states.shape),
            router_logits=routing.logits,
            router_scores=routing.scores,
            topk_weights=routing.topk_weights,
            topk_ids=routing.topk_ids,
            tokens_per_expert=plan.tokens_per_expert,
            dropped=plan.token_slot < 0,
            balance_loss=balance_loss,
            z_loss=z_loss,
            aux_loss=aux_loss,
        )

    def _flatten(self, hidden_states: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        hidden_size = self.config.hidden_size
        if hidden_states.layout is not torch.strided:
            raise ValueError(f"hidden_states must be a dense tensor (torch.strided), got one of {hidden_states.layout}")
        if hidden_states.dim() < 1 or hidden_states.shape[-1] != hidden_size:
            raise ValueError(f"hidden_states must have shape [..., {hidden_size}], got {list(hidden_states.shape)}")
        if padding_mask is not None:
            check_padding_mask(padding_mask, hidden_states)
            padding_mask = padding_mask.reshape(-1)
        x = hidden_states if hidden_states.dim() == 2 else hidden_states.reshape(-1, hidden_size)
        return x, padding_mask

    def _run(
        self, x: Tensor, padding_mask: Tensor | None, topk_ids: Tensor | None, trained: torch.Size | None = None
    ) -> tuple[Tensor, RouterOutput, DispatchPlan]:
        """trained: the shape of the hidden states whose losses' gradient is added, if it is."""
        dtype = x.dtype
        if self.config.router.jitter_experts:
            x = self.router.jitter(x)
        routing, plan = self._route(x, padding_mask, topk_ids)
        weights = _weights_for(routing, dtype)
        if self.training:
            self.router.count(plan.tokens_per_expert)
        if self.load is not None:
            ops.accumulate_load(self.load, plan.tokens_per_expert)
        if trained is not None:
            # at the weights and not at the output, which a model may change in place
            weights = losses.add_gradient(weights, self._losses(trained, routing, padding_mask)[2], self.aux_loss_scale)
        if self.shared_experts is None or torch.compiler.is_compiling():
            output = self.experts(x, weights, plan)
            if self.shared_experts is not None:
                output = output + self.shared_experts(x)
        else:
            output = self.experts(x, weights, plan, self.shared_experts)
        return output if output.dtype == dtype else output.to(dtype), routing, plan

    def _route(
        self, x: Tensor, padding_mask: Tensor | None, topk_ids: Tensor | None
    ) -> tuple[RouterOutput, DispatchPlan]:
        c = self.config
        capacity = c.capacity(x.shape[0], self.training)
        router = self.router
        plain = padding_mask is None and topk_ids is None and capacity is None
        # in this order: a size that is read while torch.jit traces stays in its graph
        if plain and type(router) is Router and router.is_plain() and router.weight.shape[:1] == (c.num_experts,):
            return router.route_and_dispatch(x)
        routing = router(x, topk_ids, jitter=not c.router.jitter_experts)
        # ids are on the device, where one too high can only end the process
        if not torch.jit.is_tracing() and routing.logits.shape[-1] > c.num_experts:
            raise ValueError(
                f"router must choose among num_experts = {c.num_experts} experts, "
                f"got logits of shape {list(routing.logits.shape)}"
            )
        if capacity is not None and torch.jit.is_tracing():
            warnings.warn(
                f"torch.jit.trace makes the capacity of {x.shape[0]} tokens a constant: with another number of tokens "
                "the traced layer drops others than the layer does (torch.export does not)",
                torch.jit.TracerWarning,
                stacklevel=2,
            )
        by_weight = c.drop_policy == "probs"
        plan = ops.dispatch(
            routing.topk_ids,
            c.num_experts,
            topk_weights=_weights_for(routing, x.dtype).detach() if by_weight else None,
            capacity=capacity,
            drop_policy=c.drop_policy,
            padding_mask=padding_mask,
        )
        return routing, plan

    def _losses(
        self, shape: torch.Size, routing: RouterOutput, padding_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        c, router = self.config, self.config.router
        form, ids = router.balance_loss, routing.topk_ids
        if form == "huggingface" and router.score_function != "softmax":
            probs = torch.softmax(routing.logits, dim=-1)
        else:
            probs = losses.probabilities(routing.scores, router.score_function)
        if form != "global" and (router.expert_bias or router.num_groups > 1 or router.sinkhorn):
            # the choices the probabilities alone would make
            ids = ops.route(probs.detach(), c.top_k, scores_after_topk=True)[1]
        global_counts = None
        if form == "global" and self.training:
            global_counts = sum_over_ranks(self.router.tokens_per_expert, self.balance_group)
        if form == "sequence" and len(shape) > 2:
            # not torch.Size.numel, which makes torch.export's sizes constants
            probs = probs.reshape(math.prod(shape[:-2]), shape[-2], c.num_experts)
        group = self.balance_group
        balance_loss = losses.balance_loss(
            probs, ids, form, padding_mask=padding_mask, global_counts=global_counts, group=group
        )
        z_loss = losses.z_loss(routing.logits, padding_mask, group=group)
        aux_loss = router.balance_loss_coefficient * balance_loss + router.z_loss_coefficient * z_loss
        return balance_loss, z_loss, aux_loss

    def update_expert_bias(self, group: torch.distributed.ProcessGroup | None = None) -> None:
        """Once an optimizer step: expert_bias += rate * sign(mean(counts) - counts), and the counts start again at 0.

        The counts are of every training pass since the last call, however many micro-batches; a pass run again by
        activation checkpointing is not counted twice. group (balance_group where it is None) sums the counts over its
        ranks, which then hold the same bias. Also starts the counts of the 'global' balance loss again. Does nothing
        where neither is configured.
        """
        self.router.update_expert_bias(self.balance_group if group is None else group)

    @classmethod
    def from_hf_block(cls, block: nn.Module, config: Any, **changes: Any) -> MoE:
        """The layer of a transformers (version 5) MoE block and its model's configuration, with the block's weights.

        For the families of MoEConfig.from_hf; changes replace fields of the configuration.
        """
        some = next(block.parameters())
        layer = cls(MoEConfig.from_hf(config, **changes), device=some.device, dtype=some.dtype)
        layer.load_hf_block(block)
        return layer.train(block.training)

    def load_hf_block(self, block: nn.Module) -> None:
        """Copies the weights of a transformers (version 5) MoE block; ValueError where names or shapes differ."""
        hosts.load_block(self, block)


def _weights_for(routing: RouterOutput, dtype: torch.dtype) -> Tensor:
    """The routing weights as experts of dtype take them: float64 routing may choose among narrower experts."""
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    return routing.topk_weights if routing.topk_weights.dtype == wanted else routing.topk_weights.to(wanted)
