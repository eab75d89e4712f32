"""The layer's mathematics once more, in plain torch and written from the definitions alone: what the operators must
equal.

Nothing here calls fastmoe_cpp or shares code with fastmoe_cpp.reference. In float64 it is the truth; in a narrower
dtype it is the eager torch whose rounding error the operators are measured by (support.tolerance).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GATED = ("swiglu", "geglu", "geglu_tanh", "reglu", "clamped_swiglu")
UNGATED = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
ACTIVATIONS = GATED + UNGATED
SCORE_FUNCTIONS = ("softmax", "sigmoid", "sqrtsoftplus")


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums, scores and routing weights are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# router


def router_logits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    kind = torch.float64 if torch.float64 in (x.dtype, weight.dtype) else torch.float32
    out = x.to(kind) @ weight.to(kind).T
    return out if bias is None else out + bias.to(kind)


def score(logits: Tensor, function: str) -> Tensor:
    if function == "softmax":
        return torch.softmax(logits, dim=-1)
    if function == "sigmoid":
        return torch.sigmoid(logits)
    return torch.logaddexp(logits, torch.zeros_like(logits)).sqrt()


def finite_softmax(logits: Tensor) -> Tensor:
    """Softmax for ranking: a NaN logit stays NaN and has no part in the others' sum."""
    nan = logits.isnan()
    return torch.softmax(logits.masked_fill(nan, -math.inf), dim=-1).masked_fill(nan, math.nan)


def selection_keys(logits, function="softmax", after=False, expert_bias=None, selection_scores=None) -> Tensor:
    if selection_scores is not None:
        keys = selection_scores.double()
    elif after:
        keys = logits.double()
    else:
        keys = finite_softmax(logits.double()) if function == "softmax" else score(logits.double(), function)
    return keys if expert_bias is None else keys + expert_bias.double()


def group_mask(keys: Tensor, groups: int, kept: int, worth: str) -> tuple[Tensor, Tensor]:
    """Which experts are in the kept groups [T, E] bool, and the groups' worth [T, groups]."""
    tokens, experts = keys.shape
    best = keys.reshape(tokens, groups, experts // groups).sort(dim=-1, descending=True).values
    value = best[..., 0] if worth == "max" else best[..., :2].sum(dim=-1)
    order = value.sort(dim=-1, descending=True, stable=True).indices[:, :kept]
    mask = torch.zeros_like(value, dtype=torch.bool).scatter_(1, order, True)
    return mask.repeat_interleave(experts // groups, dim=1), value


def select(keys: Tensor, top_k: int, allowed: Tensor | None = None) -> Tensor:
    """The K best of every row: allowed ones first, then masked ones, then NaN; of equals the lower id."""
    chosen = []
    allowed_rows = None if allowed is None else allowed.tolist()
    for t, row in enumerate(keys.tolist()):
        rank = []
        for e, key in enumerate(row):
            if math.isnan(key):
                rank.append((2, 0.0, e))
            elif allowed_rows is not None and not allowed_rows[t][e]:
                rank.append((1, 0.0, e))
            else:
                rank.append((0, -key, e))
        chosen.append([e for _, _, e in sorted(rank)[:top_k]])
    return torch.tensor(chosen, dtype=torch.int64, device=keys.device).reshape(keys.shape[0], top_k)


def routing_weights(
    logits: Tensor, ids: Tensor, function="softmax", after=False, renormalize=True, epsilon=0.0, scaling=1.0
) -> tuple[Tensor, Tensor]:
    """Weights [T, K] and scores [T, E] of given ids; -1 has weight 0 and no part in the sum."""
    scores = score(logits, function)
    live = ids >= 0
    index = ids.clamp(min=0)
    if after:
        picked = logits.gather(1, index)
        if function == "softmax":
            picked = picked.masked_fill(~live, -math.inf)
            # rows with no live id have no softmax
            picked = torch.where(live.any(dim=1, keepdim=True), picked, torch.zeros_like(picked))
        weights = score(picked, function)
    else:
        weights = scores.gather(1, index)
    weights = torch.where(live, weights, torch.zeros_like(weights))
    if renormalize:
        total = weights.sum(dim=1, keepdim=True) + epsilon
        weights = torch.where(live, weights / torch.where(live.any(dim=1, keepdim=True), total, 1.0), 0.0)
    return weights * scaling, scores


def sinkhorn(logits: Tensor, iterations: int = 0, tolerance: float = 1e-4) -> Tensor:
    """Megatron-LM's sinkhorn: rows and columns scaled in turn until the columns' factors stop moving."""
    cost = logits.exp()
    tokens, experts = cost.shape
    columns = torch.ones(experts, dtype=cost.dtype, device=cost.device)
    rows = torch.ones(tokens, dtype=cost.dtype, device=cost.device)
    step = 0
    while True:
        rows = (1 / tokens) / ((columns * cost).sum(dim=1) + 1e-8)
        before, columns = columns, (1 / experts) / ((rows[:, None] * cost).sum(dim=0) + 1e-8)
        step += 1
        if step == iterations or (iterations == 0 and (before - columns).abs().mean() <= tolerance):
            return rows[:, None] * cost * columns


# dispatch


class Plan(NamedTuple):
    slot_index: list[int]  # live slots only
    token_slot: list[list[int]]
    expert_offsets: list[int]
    tokens_per_expert: list[int]


def dispatch(ids: Tensor, experts: int, weights=None, capacity=None, policy="position", padding=None) -> Plan:
    tokens, top_k = ids.shape
    flat = ids.flatten().tolist()
    skip = [False] * tokens if padding is None else padding.tolist()
    heavy = None if weights is None else weights.flatten().tolist()
    asked: list[list[int]] = [[] for _ in range(experts)]
    for pair, e in enumerate(flat):
        if e >= 0 and not skip[pair // top_k]:
            asked[e].append(pair)
    slots, offsets = [], [0]
    for pairs in asked:
        kept = pairs
        if capacity is not None and len(pairs) > capacity:
            if policy == "probs":
                pairs = sorted(pairs, key=lambda p: -heavy[p])
            kept = sorted(pairs[:capacity])
        slots += kept
        offsets.append(len(slots))
    slot_of = [-1] * (tokens * top_k)
    for slot, pair in enumerate(slots):
        slot_of[pair] = slot
    table = [slot_of[t * top_k : (t + 1) * top_k] for t in range(tokens)]
    return Plan(slots, table, offsets, [len(pairs) for pairs in asked])


# experts


def activate(gate: Tensor, up: Tensor | None, name: str, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    if name == "clamped_swiglu":
        # not clamp, whose gradient exactly at a limit is 1 or 0 by torch's release: here it is 1
        gate = torch.where(gate > limit, limit, gate)
        up = torch.where(up.abs() > limit, limit * up.sign(), up)
        return gate * torch.sigmoid(alpha * gate) * (up + 1)
    curve = {
        "swiglu": F.silu,
        "silu": F.silu,
        "geglu": F.gelu,
        "gelu": F.gelu,
        "geglu_tanh": lambda g: F.gelu(g, approximate="tanh"),
        "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"),
        "reglu": F.relu,
        "relu": F.relu,
        "relu2": lambda g: F.relu(g).square(),
    }[name]
    return curve(gate) if up is None else curve(gate) * up


def split(rows: Tensor, gated: bool, interleaved: bool) -> tuple[Tensor, Tensor | None]:
    if not gated:
        return rows, None
    if interleaved:
        return rows[..., 0::2], rows[..., 1::2]
    half = rows.shape[-1] // 2
    return rows[..., :half], rows[..., half:]


def experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    ids: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "swiglu",
    alpha: float = 1.702,
    limit: float = 7.0,
    interleaved: bool = False,
    weight_on_input: bool = False,
) -> Tensor:
    """sum over k of w[t, k] * MLP of expert ids[t, k]; -1 contributes nothing. Expert by expert, in x's dtype."""
    tokens, top_k = ids.shape
    flat = ids.flatten()
    order = flat.argsort(stable=True)[(flat < 0).sum() :]
    counts = flat[order].bincount(minlength=gate_up.shape[0]).tolist()
    # split and unbind, not indexing: their backward is one copy instead of an addition of the whole an expert
    inputs, scales = x[order // top_k].split(counts), weights.reshape(-1)[order, None].split(counts)
    ups, downs = gate_up.unbind(0), down.unbind(0)
    up_biases = None if gate_up_bias is None else gate_up_bias.unbind(0)
    down_biases = None if down_bias is None else down_bias.unbind(0)
    pieces = []
    for e, count in enumerate(counts):
        if count == 0:
            continue
        h = inputs[e] @ ups[e].T
        if weight_on_input:
            h = (h * scales[e]).to(x.dtype)
        if up_biases is not None:
            h = h + up_biases[e]
        act = activate(*split(h, activation in GATED, interleaved), activation, alpha, limit)
        y = act @ downs[e].T
        pieces.append(y if down_biases is None else y + down_biases[e])
    rows = x.new_zeros(tokens * top_k, x.shape[1])
    if pieces:
        rows = rows.index_copy(0, order, torch.cat(pieces))
    rows = rows.reshape(tokens, top_k, x.shape[1]).to(wide(x.dtype))
    if not weight_on_input:
        rows = rows * torch.where(ids >= 0, weights, 0.0)[..., None]
    return rows.sum(dim=1).to(x.dtype)


def grouped_linear(rows: Tensor, weight: Tensor, offsets: list[int], bias: Tensor | None = None) -> Tensor:
    biases = None if bias is None else bias.unbind(0)
    counts = [b - a for a, b in zip(offsets, offsets[1:], strict=False)]
    *inputs, tail = rows.split([*counts, rows.shape[0] - offsets[-1]])
    pieces = []
    for e, (piece, w) in enumerate(zip(inputs, weight.unbind(0), strict=True)):
        y = piece @ w.T
        pieces.append(y if biases is None else y + biases[e])
    return torch.cat([*pieces, tail.new_zeros(tail.shape[0], weight.shape[1])])


def gather(x: Tensor, plan: Plan, top_k: int) -> Tensor:
    index = torch.tensor(plan.slot_index, dtype=torch.int64, device=x.device) // top_k
    tail = x.new_zeros(x.shape[0] * top_k - len(plan.slot_index), x.shape[1])
    return torch.cat([x[index], tail])


def combine(rows: Tensor, weights: Tensor | None, token_slot: Tensor) -> Tensor:
    live = token_slot >= 0
    picked = rows[token_slot.clamp(min=0).long()] if rows.shape[0] else rows.new_zeros(*token_slot.shape, rows.shape[1])
    picked = picked.to(wide(rows.dtype))
    if weights is not None:
        picked = picked * torch.where(live, weights, 0.0)[..., None]
    return torch.where(live[..., None], picked, 0.0).sum(dim=1).to(rows.dtype)


def grads(output: Tensor, inputs: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    """Gradients of <output, cotangent>; zeros for what the output does not depend on."""
    if not output.requires_grad:
        return [torch.zeros_like(t) for t in inputs]
    return list(torch.autograd.grad(output, inputs, cotangent, allow_unused=True, materialize_grads=True))


# losses


def expert_counts(ids: Tensor, experts: int, padding: Tensor | None = None) -> Tensor:
    out = torch.zeros(ids.shape[0], experts, dtype=torch.int64)
    for s, sequence in enumerate(ids.tolist()):
        for position, choices in enumerate(sequence):
            for e in choices:
                if e >= 0 and (padding is None or not padding[s, position]):
                    out[s, e] += 1
    return out.to(ids.device)


def balance_loss(scores: Tensor, counts: Tensor, scale: float, padding: Tensor | None = None) -> Tensor:
    if padding is not None:
        scores = torch.where(padding[..., None], 0.0, scores)
    return scale * (counts.to(scores.dtype) * scores.sum(dim=1)).sum()


def z_loss(logits: Tensor, scale: float = 1.0, padding: Tensor | None = None) -> Tensor:
    if padding is not None:
        logits = logits[~padding]
    if logits.shape[0] == 0:
        return logits.sum() * 0
    return scale * torch.logsumexp(logits, dim=-1).square().mean()


def update_expert_bias(bias: Tensor, counts: Tensor, rate: float, zero_mean: bool) -> Tensor:
    counts = counts.double()
    step = rate * torch.sign(counts.mean() - counts)
    return bias.double() + (step - step.mean() if zero_mean else step)
