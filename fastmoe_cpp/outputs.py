"""What the stages of the layer hand to each other: named tuples, every field always defined.

Symbols: T tokens, H hidden size, E experts, K experts a token, P = T * K slots.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RouterOutput(NamedTuple):
    """What the router decided. Weights, logits and scores are float32 (float64 for float64 routing)."""

    logits: Tensor  #: [T, E] before any score function
    topk_weights: Tensor  #: [T, K]; 0 where the id is -1
    topk_ids: Tensor  #: [T, K] int64, distinct in a row; -1 only where a replayed id was -1
    scores: Tensor  #: [T, E] the score function over all experts


class DispatchPlan(NamedTuple):
    """Which slot serves which pair of token and expert.

    Expert e owns slots ``expert_offsets[e] .. expert_offsets[e + 1]``; slot s serves pair ``slot_index[s]``, which is
    t * K + k. Slots past ``expert_offsets[E]`` belong to nobody: who knows that a plan serves at most P pairs may pass
    on ``slot_index[:P]``, and every tensor of slots has P rows. (A P below ``expert_offsets[E]`` is an error that only
    the CPU finds: a GPU would write past the rows.)
    """

    slot_index: Tensor  #: [P] int32
    token_slot: Tensor  #: [T, K] int32; -1 where the pair is dropped
    expert_offsets: Tensor  #: [E + 1] int32
    tokens_per_expert: Tensor  #: [E] int64, before capacity dropped any


class MoEOutput(NamedTuple):
    """Everything there is to know about one pass through the layer. T is the product of the input's leading sizes."""

    hidden_states: Tensor  #: the input's shape and dtype
    router_logits: Tensor  #: [T, E] float32 (float64 for float64 routing)
    router_scores: Tensor  #: [T, E] the score function over all experts
    topk_weights: Tensor  #: [T, K]
    topk_ids: Tensor  #: [T, K] int64
    tokens_per_expert: Tensor  #: [E] int64: pairs that asked for the expert; padding and -1 not counted
    dropped: Tensor  #: [T, K] bool: pairs no expert computed (padding, an id of -1, or over capacity)
    balance_loss: Tensor  #: scalar, in the configured form, coefficient not applied
    z_loss: Tensor  #: scalar, coefficient not applied
    aux_loss: Tensor  #: scalar: balance and z loss by their coefficients; add it to the training loss
