"""The layer in plain torch, without a kernel: the oracle every operator is compared with, and the text to read.

Each function has the name, the arguments and the results of the operator in ``torch.ops.fastmoe_cpp`` it describes, and
is differentiable by torch's own autograd. Results have the dtype the same expressions have in eager torch; give float64
tensors for a reference. Nothing here is written for speed, and ids are read back to the host.

Symbols: T tokens, H hidden size, I expert intermediate size, E experts, K experts a token, P = T * K slots,
S sequences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import MoEConfig
from .outputs import DispatchPlan, MoEOutput, RouterOutput

GATED_ACTIVATIONS = ("swiglu", "geglu", "geglu_tanh", "reglu", "clamped_swiglu")


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower: what sums, scores and routing weights are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- router -----------------------------------------------------------------------------------------------------------


def router_logits(hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Logits [T, E] in float32 or float64, whatever the dtypes of hidden_states [T, H], weight [E, H] and bias [E]."""
    dtype = accumulate_dtype(torch.promote_types(hidden_states.dtype, weight.dtype))
    return F.linear(hidden_states.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def score(logits: Tensor, score_function: str) -> Tensor:
    """'softmax' over the last dimension, or elementwise 'sigmoid' or 'sqrtsoftplus'."""
    if score_function == "softmax":
        return torch.softmax(logits, dim=-1)
    if score_function == "sigmoid":
        return torch.sigmoid(logits)
    if score_function == "sqrtsoftplus":
        # logaddexp has no threshold above which softplus is taken for the identity
        return torch.logaddexp(logits, torch.zeros_like(logits)).sqrt()
    raise ValueError(f"score_function must be one of 'softmax', 'sigmoid', 'sqrtsoftplus', got {score_function!r}")


def select_experts(keys: Tensor, top_k: int, *, num_groups: int = 1, topk_groups: int = 1, group_score: str = "max"):
    """The K experts with the largest keys [T, E], as int64 ids [T, K].

    Ties go to the lower id; NaN ranks last. Group-limited (DeepSeek-V3, arXiv 2412.19437, section 2.1.2): only the
    best topk_groups of num_groups keep their keys, a group being worth its best key ('max') or the sum of its two
    best ('top2_sum'); the keys of the others become -inf.
    """
    keys = keys.detach()
    if num_groups > 1:
        tokens, experts = keys.shape
        grouped = keys.view(tokens, num_groups, experts // num_groups)
        # a NaN cannot win its group
        best = grouped.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
        best = best.sort(dim=-1, descending=True).values
        best = best[..., 0] if group_score == "max" or best.shape[-1] == 1 else best[..., 0] + best[..., 1]
        chosen = best.sort(dim=-1, descending=True, stable=True).indices[:, :topk_groups]
        keep = torch.zeros(tokens, num_groups, dtype=torch.bool, device=keys.device).scatter(1, chosen, True)
        keep = keep.repeat_interleave(experts // num_groups, dim=1)
        keys = torch.where(keep | keys.isnan(), keys, -math.inf)
    nan = keys.isnan()
    order = torch.where(nan, -math.inf, keys).sort(dim=-1, descending=True, stable=True).indices
    last = nan.gather(1, order).to(torch.int8).sort(dim=-1, stable=True).indices
    return order.gather(1, last)[:, :top_k]


def route(
    logits: Tensor,
    top_k: int,
    *,
    expert_bias: Tensor | None = None,
    selection_scores: Tensor | None = None,
    topk_ids: Tensor | None = None,
    score_function: str = "softmax",
    scores_after_topk: bool = False,
    renormalize: bool = True,
    renormalize_epsilon: float = 0.0,
    scaling_factor: float = 1.0,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "max",
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [T, K], ids [T, K] and scores [T, E] of logits [T, E]. Given topk_ids are taken as they are (replay)."""
    logits = logits.to(accumulate_dtype(logits.dtype))
    scores = score(logits, score_function)
    if topk_ids is None:
        if selection_scores is not None:
            keys = selection_scores.to(logits.dtype)
        elif scores_after_topk:
            keys = logits
        elif score_function == "softmax":
            # one NaN logit must not take its row's other experts with it
            nan = logits.isnan()
            keys = torch.where(nan, math.nan, torch.softmax(torch.where(nan, -math.inf, logits), dim=-1))
        else:
            keys = scores
        if expert_bias is not None:
            keys = keys + expert_bias.to(keys.dtype)
        topk_ids = select_experts(keys, top_k, num_groups=num_groups, topk_groups=topk_groups, group_score=group_score)
    topk_ids = topk_ids.long()
    valid = topk_ids >= 0
    index = topk_ids.clamp(min=0)
    if scores_after_topk:
        selected = logits.gather(1, index)
        if score_function == "softmax":
            # a row without a valid entry would be softmax of nothing
            selected = torch.where(valid | ~valid.any(dim=1, keepdim=True), selected, -math.inf)
        weights = score(selected, score_function)
    else:
        weights = scores.gather(1, index)
    weights = torch.where(valid, weights, 0.0)
    if renormalize:
        total = weights.sum(dim=-1, keepdim=True) + renormalize_epsilon
        total = torch.where(valid.any(dim=1, keepdim=True), total, 1.0)
        weights = weights / total
    return weights * scaling_factor, topk_ids, scores


@torch.no_grad()
def sinkhorn(logits: Tensor, iterations: int = 0, tolerance: float = 1e-4) -> Tensor:
    """Logits [T, E] scaled towards equal row and column sums (Sinkhorn-Knopp), as Megatron-LM computes it."""
    cost = logits.to(accumulate_dtype(logits.dtype)).exp()
    tokens, experts = cost.shape
    if tokens == 0:
        return cost
    columns = torch.ones(experts, dtype=cost.dtype, device=cost.device)
    done = 0
    while True:
        rows = 1 / (tokens * ((columns * cost).sum(1) + 1e-8))
        before, columns = columns, 1 / (experts * ((rows[:, None] * cost).sum(0) + 1e-8))
        done += 1
        if done == iterations or (iterations == 0 and not (before - columns).abs().mean() > tolerance):
            return columns * cost * rows[:, None]


# --- dispatch ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def dispatch(
    topk_ids: Tensor,
    num_experts: int,
    *,
    topk_weights: Tensor | None = None,
    capacity: int | None = None,
    drop_policy: str = "position",
    padding_mask: Tensor | None = None,
) -> DispatchPlan:
    """The plan for topk_ids [T, K]: slots sorted by expert, and within an expert by pair t * K + k."""
    tokens, top_k = topk_ids.shape
    ids = topk_ids.long().flatten()
    bad = (ids < -1) | (ids >= num_experts)
    if bad.any():
        raise ValueError(f"topk_ids must be -1 or between 0 and {num_experts - 1}, got {ids[bad][0].item()}")
    kept = ids >= 0
    if padding_mask is not None:
        kept &= ~padding_mask.repeat_interleave(top_k)
    pairs = torch.arange(ids.numel(), device=ids.device)
    tokens_per_expert = torch.bincount(ids[kept], minlength=num_experts)
    if capacity is not None:
        for expert in range(num_experts):
            mine = pairs[kept & (ids == expert)]
            if drop_policy == "probs":
                # NaN last, which sort takes for the largest
                weights = topk_weights.flatten()[mine]
                by_weight = weights.masked_fill(weights.isnan(), -torch.inf).sort(descending=True, stable=True).indices
                kept[mine[by_weight[capacity:]]] = False
            else:
                kept[mine[capacity:]] = False
    served = pairs[kept]
    served = served[ids[served].sort(stable=True).indices]
    slot_index = torch.full_like(ids, -1)
    slot_index[: served.numel()] = served
    token_slot = torch.full_like(ids, -1)
    token_slot[served] = torch.arange(served.numel(), device=ids.device)
    offsets = torch.zeros(num_experts + 1, dtype=torch.long, device=ids.device)
    offsets[1:] = torch.bincount(ids[kept], minlength=num_experts).cumsum(0)
    return DispatchPlan(slot_index.int(), token_slot.view(tokens, top_k).int(), offsets.int(), tokens_per_expert)


def gather(hidden_states: Tensor, slot_index: Tensor, token_slot: Tensor, expert_offsets: Tensor) -> Tensor:
    """Rows [P, H]: slot s gets its token's row of hidden_states [T, H]; slots of nobody are zero."""
    top_k = token_slot.shape[1]
    served = slot_index[: int(expert_offsets[-1])].long()
    rows = hidden_states[served // top_k]
    return torch.cat([rows, rows.new_zeros(slot_index.numel() - served.numel(), rows.shape[1])])


# --- experts ----------------------------------------------------------------------------------------------------------


def activate(pre_activation: Tensor, activation: str, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    """The activation between the projections: [..., 2 * I] (gate half, then up half) to [..., I], or [..., I] ungated.

    'clamped_swiglu' is gpt-oss's: gate at most limit, up within +-limit, gate * sigmoid(alpha * gate) * (up + 1). What
    is beyond a limit gets no gradient; what is exactly at one does, whatever torch.clamp gives there (1 in torch 2.11,
    0 in 2.15).
    """
    ungated = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "relu": F.relu,
        "relu2": lambda x: F.relu(x).square(),
    }
    if activation in ungated:
        return ungated[activation](pre_activation)
    if activation not in GATED_ACTIVATIONS:
        known = ", ".join(repr(name) for name in (*GATED_ACTIVATIONS, *ungated))
        raise ValueError(f"activation must be one of {known}, got {activation!r}")
    gate, up = pre_activation.chunk(2, dim=-1)
    if activation == "clamped_swiglu":
        gate = torch.where(gate > limit, limit, gate)
        up = torch.where(up > limit, limit, torch.where(up < -limit, -limit, up))
        return gate * torch.sigmoid(alpha * gate) * (up + 1)
    curve = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}[activation]
    return ungated[curve](gate) * up


def grouped_linear(rows: Tensor, weight: Tensor, expert_offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows[s] @ weight[e].T + bias[e] for every slot s of expert e: [P, in] by [E, out, in] is [P, out]; the rest 0."""
    offsets = expert_offsets.tolist()
    outputs = []
    for expert, (first, last) in enumerate(zip(offsets, offsets[1:], strict=False)):
        outputs.append(F.linear(rows[first:last], weight[expert], None if bias is None else bias[expert]))
    outputs.append(rows.new_zeros(rows.shape[0] - offsets[-1], weight.shape[1]))
    return torch.cat(outputs)


def experts(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_weights: Tensor,
    slot_index: Tensor,
    token_slot: Tensor,
    expert_offsets: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "swiglu",
    activation_alpha: float = 1.702,
    activation_limit: float = 7.0,
    interleaved: bool = False,
    weight_on_input: bool = False,
    recompute: bool = False,
) -> Tensor:
    """The grouped MLP [T, H] over a plan. gate_up_proj [E, 2 * I, H] (or [E, I, H] ungated), down_proj [E, H, I].

    interleaved: rows 2i of gate_up_proj are gate rows and rows 2i + 1 up rows. weight_on_input: the routing weight
    scales the up projection's result, before its bias, instead of the expert's output. recompute changes no value.
    """
    offsets = expert_offsets.tolist()
    top_k = token_slot.shape[1]
    pair_of_slot = slot_index[: offsets[-1]].long()
    weight_of_slot = topk_weights.flatten()[pair_of_slot].to(hidden_states.dtype)
    rows = []
    for expert, (first, last) in enumerate(zip(offsets, offsets[1:], strict=False)):
        x = hidden_states[pair_of_slot[first:last] // top_k]
        pre_activation = x @ gate_up_proj[expert].T
        if weight_on_input:
            pre_activation = pre_activation * weight_of_slot[first:last, None]
        if gate_up_bias is not None:
            pre_activation = pre_activation + gate_up_bias[expert]
        if interleaved and activation in GATED_ACTIVATIONS:
            pre_activation = torch.cat([pre_activation[:, 0::2], pre_activation[:, 1::2]], dim=-1)
        inner = activate(pre_activation, activation, activation_alpha, activation_limit)
        rows.append(F.linear(inner, down_proj[expert], None if down_bias is None else down_bias[expert]))
    rows.append(hidden_states.new_zeros(slot_index.numel() - offsets[-1], hidden_states.shape[1]))
    weights = None if weight_on_input else topk_weights
    return combine(torch.cat(rows), weights, slot_index, token_slot, expert_offsets)


# --- combine ----------------------------------------------------------------------------------------------------------


def combine(
    rows: Tensor, topk_weights: Tensor | None, slot_index: Tensor, token_slot: Tensor, expert_offsets: Tensor
) -> Tensor:
    """[T, H]: the sum over k of topk_weights[t, k] * rows[token_slot[t, k]]; -1 adds nothing, no weights are ones."""
    dtype = accumulate_dtype(rows.dtype)
    tokens, top_k = token_slot.shape
    output = rows.new_zeros(tokens, rows.shape[1], dtype=dtype)
    for k in range(top_k):
        there = token_slot[:, k] >= 0
        part = rows[token_slot[there, k].long()].to(dtype)
        if topk_weights is not None:
            part = part * topk_weights[there, k, None].to(dtype)
        output = output.index_add(0, there.nonzero().squeeze(1), part)
    return output.to(rows.dtype)


# --- losses -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def expert_counts(topk_ids: Tensor, num_experts: int, padding_mask: Tensor | None = None) -> Tensor:
    """How often topk_ids [S, L, K] name each expert, a sequence: [S, E] int64. -1 and padding [S, L] do not count."""
    if padding_mask is not None:
        topk_ids = topk_ids.masked_fill(padding_mask[..., None], -1)
    # a bin of its own for -1
    hits = F.one_hot(topk_ids.long() + 1, num_experts + 1)
    return hits.sum(dim=(1, 2))[:, 1:]


def balance_loss(scores: Tensor, tokens_per_expert: Tensor, scale: float, padding_mask: Tensor | None = None) -> Tensor:
    """scale * sum over s, e of tokens_per_expert[s, e] * (sum over l of scores[s, l, e]), padding left out."""
    scores = scores.to(accumulate_dtype(scores.dtype))
    if padding_mask is not None:
        scores = torch.where(padding_mask[..., None], 0.0, scores)
    return scale * (tokens_per_expert.to(scores.dtype) * scores.sum(dim=1)).sum()


def z_loss(logits: Tensor, scale: float = 1.0, padding_mask: Tensor | None = None) -> Tensor:
    """scale * mean over tokens that are not padding of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906); 0 of none."""
    logits = logits.to(accumulate_dtype(logits.dtype))
    if padding_mask is not None:
        logits = logits[~padding_mask]
    return scale * logits.logsumexp(dim=-1).square().sum() / max(logits.shape[0], 1)


@torch.no_grad()
def update_expert_bias(expert_bias: Tensor, tokens_per_expert: Tensor, rate: float, zero_mean: bool = False) -> None:
    """Loss-free balancing (arXiv 2408.15664), in place: expert_bias += rate * sign(mean(count) - count)."""
    counts = tokens_per_expert.to(torch.float64)
    step = rate * torch.sign(counts.mean() - counts)
    if zero_mean:
        step = step - step.mean()
    expert_bias += step.to(expert_bias.dtype)


# --- the layer --------------------------------------------------------------------------------------------------------


def moe(
    hidden_states: Tensor,
    parameters: Mapping[str, Tensor],
    config: MoEConfig,
    *,
    padding_mask: Tensor | None = None,
    topk_ids: Tensor | None = None,
    training: bool = False,
) -> MoEOutput:
    """MoE.forward_with_routing in plain torch: hidden_states [..., H], tensors named as in the layer's state_dict.

    ``moe(x, dict(layer.named_parameters()) | dict(layer.named_buffers()), layer.config)`` differentiates into the
    layer's own parameters. Without jitter; the 'global' balance loss counts this call's tokens alone.
    """
    c, r = config, config.router
    x = hidden_states.reshape(-1, c.hidden_size)
    padding = None if padding_mask is None else padding_mask.reshape(-1)
    logits = router_logits(
        x.double() if r.dtype == torch.float64 else x, parameters["router.weight"], parameters.get("router.bias")
    )
    if r.dtype in (torch.bfloat16, torch.float16) and logits.dtype == torch.float32:
        logits = logits.to(r.dtype).float()
    routing = RouterOutput(
        logits,
        *route(
            logits,
            c.top_k,
            expert_bias=parameters.get("router.expert_bias"),
            selection_scores=(
                sinkhorn(logits, r.sinkhorn_iterations, r.sinkhorn_tolerance) if r.sinkhorn and training else None
            ),
            topk_ids=None if topk_ids is None else topk_ids.reshape(-1, c.top_k),
            score_function=r.score_function,
            scores_after_topk=r.scores_after_topk,
            renormalize=r.renormalize,
            renormalize_epsilon=r.renormalize_epsilon,
            scaling_factor=r.scaling_factor,
            num_groups=r.num_groups,
            topk_groups=r.topk_groups,
            group_score=r.group_score,
        ),
    )
    weights = routing.topk_weights.to(accumulate_dtype(x.dtype))
    plan = dispatch(
        routing.topk_ids,
        c.num_experts,
        topk_weights=weights,
        capacity=c.capacity(x.shape[0], training),
        drop_policy=c.drop_policy,
        padding_mask=padding,
    )
    output = experts(
        x,
        parameters["experts.gate_up_proj"],
        parameters["experts.down_proj"],
        weights,
        plan.slot_index,
        plan.token_slot,
        plan.expert_offsets,
        gate_up_bias=parameters.get("experts.gate_up_bias"),
        down_bias=parameters.get("experts.down_bias"),
        activation=c.activation,
        activation_alpha=c.activation_alpha,
        activation_limit=c.activation_limit,
        interleaved=c.interleaved,
        weight_on_input=c.weight_on_input,
    )
    if c.shared_intermediate_size is not None:
        inner = F.linear(x, parameters["shared_experts.gate_up_proj"])
        inner = activate(inner, c.activation, c.activation_alpha, c.activation_limit)
        shared = F.linear(inner, parameters["shared_experts.down_proj"])
        if c.shared_expert_gate:
            shared = shared * torch.sigmoid(F.linear(x, parameters["shared_experts.gate"]))
        output = output + shared
    balance, z = _layer_losses(hidden_states, routing, c, padding, training)
    return MoEOutput(
        hidden_states=output.reshape(hidden_states.shape),
        router_logits=routing.logits,
        router_scores=routing.scores,
        topk_weights=routing.topk_weights,
        topk_ids=routing.topk_ids,
        tokens_per_expert=plan.tokens_per_expert,
        dropped=plan.token_slot < 0,
        balance_loss=balance,
        z_loss=z,
        aux_loss=r.balance_loss_coefficient * balance + r.z_loss_coefficient * z,
    )


def _layer_losses(
    hidden_states: Tensor, routing: RouterOutput, config: MoEConfig, padding: Tensor | None, training: bool
) -> tuple[Tensor, Tensor]:
    r, experts_ = config.router, config.num_experts
    form = r.balance_loss
    probs = routing.scores
    if form == "huggingface":
        probs = torch.softmax(routing.logits, dim=-1)
    elif r.score_function != "softmax":
        probs = probs / (probs.sum(dim=-1, keepdim=True) + 1e-20)
    ids = routing.topk_ids
    if form != "global" and (r.expert_bias or r.num_groups > 1 or r.sinkhorn):
        # the choices the probabilities alone would make
        ids = select_experts(probs, config.top_k)
    if form == "switch":
        ids = ids[:, :1]
    sequences = 1
    if form == "sequence" and hidden_states.dim() > 2:
        sequences = math.prod(hidden_states.shape[:-2])
    length = probs.shape[0] // sequences if sequences else 0
    real = torch.ones(probs.shape[0], dtype=torch.bool, device=probs.device) if padding is None else ~padding
    total = probs.new_zeros(())
    for s in range(sequences):
        mine = slice(s * length, (s + 1) * length)
        p, chosen = probs[mine][real[mine]], ids[mine][real[mine]]
        tokens = max(p.shape[0], 1)
        counts = torch.bincount(chosen[chosen >= 0], minlength=experts_).to(p.dtype)
        share = counts / tokens
        if form in ("batch", "sequence"):
            share = share / config.top_k
        elif form == "global":
            # what was routed over micro-batches and ranks, which only training counts
            share = counts / (counts.sum().clamp(min=1) if training else tokens * config.top_k)
        total = total + experts_ * (share * p.sum(dim=0) / tokens).sum()
    return total / max(sequences, 1), z_loss(routing.logits, 1.0, padding)
