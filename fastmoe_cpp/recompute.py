"""Activation checkpointing that computes the experts again and keeps the routing.

A token whose two best scores are nearly equal may go to another expert when its router is computed again under other
kernels; the recomputed tensors then have other contents, or other shapes where the layer is distributed. Keeping the
routing costs 20 bytes a pair of token and expert and 8 a token and expert, and rules that out (of a layer under no_grad
inside the checkpointed block the logits are kept too)::

    from functools import partial
    from torch.utils.checkpoint import checkpoint
    from fastmoe_cpp.recompute import routing_saved

    y = checkpoint(block, x, use_reentrant=False, context_fn=routing_saved)
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from . import _extension

_extension.require()

#: The operators whose results decide which expert sees which token.
ROUTING_OPS = frozenset(
    {
        torch.ops.fastmoe_cpp.sinkhorn.default,
        torch.ops.fastmoe_cpp.route.default,
        torch.ops.fastmoe_cpp.dispatch.default,
        torch.ops.fastmoe_cpp.route_and_dispatch.default,
    }
)


def routing_policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """A policy for create_selective_checkpoint_contexts: keep what routing decided, compute the rest again."""
    return CheckpointPolicy.MUST_SAVE if op in ROUTING_OPS else CheckpointPolicy.PREFER_RECOMPUTE


def routing_saved() -> tuple[Any, Any]:
    """The context_fn of torch.utils.checkpoint.checkpoint (use_reentrant=False) with routing_policy."""
    return create_selective_checkpoint_contexts(routing_policy)
