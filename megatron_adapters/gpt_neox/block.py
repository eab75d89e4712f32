"""GPT-NeoX's transformer layer with parallel residuals and experts: what the host's own code gets wrong.

With gpt_j_residual the layer is x + attention(norm(x)) + experts(norm(x)). The host loses the attention where experts
return no bias (now), or takes three values for two (before), and sums what the experts return on every tensor-parallel
rank, where it is whole already.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def parallel_residual(
    layer: Any, x: Tensor, attention_mask: Tensor | None, layer_past: Any = None
) -> tuple[Tensor, Tensor]:
    """(output, moe_loss) of a ParallelTransformerLayer whose mlp holds experts; both always defined.

    moe_loss is a scalar of x's dtype on x's device, 0 where the experts have none.
    """
    layer_past = layer_past if layer_past is not None else layer.layer_past
    residual = x
    if layer.gpt_j_tied:
        for_attention = for_experts = layer.input_layernorm(x)
    else:
        for_attention, for_experts = layer.input_layernorm(x), layer.post_attention_layernorm(x)
    attention, bias = layer.attention(for_attention, attention_mask, layer_past=layer_past)
    if layer.use_cache:
        attention, layer.layer_past = attention
    if bias is not None:
        attention = attention + bias.expand_as(attention)
    attention = F.dropout(attention, p=layer.hidden_dropout, training=layer.training)
    experts, moe_loss = experts_of(layer.mlp(for_experts), x)
    return residual + layer.reduce(attention) + experts, moe_loss


def experts_of(values: tuple, x: Tensor) -> tuple[Tensor, Tensor]:
    """What either era's experts return, as (output, moe_loss)."""
    output, second = values[0], values[1]
    if len(values) == 2:
        if second is not None:
            raise ValueError(f"experts must return no bias, got {type(second).__name__}")
        second = torch.zeros((), dtype=x.dtype, device=x.device)
    return output, second
