"""The layer and the gates of FastMoE by their formulas, in plain torch, one token and one expert at a time."""

import math

import torch
import torch.nn.functional as F


def moe(x, ids, scores, experts):
    """x [T, d], ids [T, K] with -1 for dropped, scores [T, K], a list of functions of [n, d]: [T, d]."""
    tokens = []
    for t in range(x.shape[0]):
        total = torch.zeros_like(x[t])
        for k in range(ids.shape[1]):
            if ids[t, k] >= 0:
                total = total + scores[t, k] * experts[int(ids[t, k])](x[t : t + 1])[0]
        tokens.append(total)
    return torch.stack(tokens) if tokens else torch.zeros_like(x)


def mlps(htoh4, h4toh, activation):
    """One function an expert of FMoELinear's stacked parameters."""

    def make(i):
        return lambda x: F.linear(
            activation(F.linear(x, htoh4.weight[i], htoh4.bias[i])), h4toh.weight[i], h4toh.bias[i]
        )

    return [make(i) for i in range(htoh4.weight.shape[0])]


def naive(logits, k):
    """ids and scores [T, k] of logits [T, E]."""
    values, ids = torch.topk(logits, k, dim=-1)
    return ids, torch.softmax(values, dim=-1)


def keep_first(ids, limits):
    """ids [T, K] with -1 where an expert's limit is reached, counted token by token."""
    left, kept = list(limits), ids.clone()
    for t in range(ids.shape[0]):
        for k in range(ids.shape[1]):
            e = int(ids[t, k])
            if e < 0:
                continue
            if left[e] > 0:
                left[e] -= 1
            else:
                kept[t, k] = -1
    return kept


def gshard_loss(logits, num_expert):
    """mean(c_e * m_e) * num_expert^2, c_e the share of first choices, m_e the mean probability."""
    experts = logits.shape[1]
    c_e = torch.bincount(logits.argmax(-1), minlength=experts).to(logits.dtype) / logits.shape[0]
    return (c_e * torch.softmax(logits, -1).mean(0)).mean() * num_expert**2


def gshard(logits, num_expert, limits, drawn):
    """ids [T, 2], scores [T, 2] and the loss; drawn [T] are the random numbers, None without random routing."""
    ids, scores = naive(logits, 2)
    kept = keep_first(ids, limits)
    if drawn is not None:
        kept[2 * scores[:, 1] < drawn, 1] = -1
    return kept, scores, gshard_loss(logits, num_expert)


def switch(logits, limits):
    """ids [T, 1], scores [T, 1] and the loss."""
    probs = torch.softmax(logits, -1)
    scores, ids = probs.max(-1, keepdim=True)
    kept = keep_first(ids, limits)
    valid = kept[kept >= 0]
    n = valid.numel()
    share = torch.bincount(valid, minlength=logits.shape[1]).to(logits.dtype) / n
    return kept, scores, (share * probs.sum(0) / n).sum() * logits.shape[1]


def cv_squared(x):
    return x.var() / (x.mean() ** 2 + 1e-10)


def normal_cdf(x):
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def noisy(clean, deviation, noise, k):
    """ids, scores [T, k] and the loss; the load by the definition: an expert against the k-th best of the others."""
    logits = clean + noise * deviation
    ids, scores = naive(logits, k)
    importance = torch.zeros(clean.shape[1], dtype=clean.dtype)
    load = []
    for e in range(clean.shape[1]):
        importance = importance + F.one_hot(torch.tensor(e), clean.shape[1]) * (scores * (ids == e)).sum()
        others = torch.cat([logits[:, :e], logits[:, e + 1 :]], dim=1)
        threshold = others.topk(k, dim=1).values[:, -1]
        load.append(normal_cdf((clean[:, e] - threshold) / deviation[:, e]).sum())
    return ids, scores, cv_squared(importance) + cv_squared(torch.stack(load))


def faster(logits, outside, allowed):
    """ids [T, 2] and scores [T, 2]; outside [E] is True for other nodes' experts, allowed the tokens that may leave."""
    free, _ = naive(logits, 2)
    leaving = [t for t in range(logits.shape[0]) if outside[free[t, 0]]]
    ids = free
    if len(leaving) >= allowed:
        leaving.sort(key=lambda t: -float(logits[t].max().detach()))
        ids = torch.topk(logits.masked_fill(outside, -math.inf), 2, dim=-1).indices
        for t in leaving[:allowed]:
            ids[t, 1] = free[t, 0]
    return ids, torch.softmax(torch.stack([logits[t, ids[t]] for t in range(logits.shape[0])]), -1)


def swipe(columns, tokens, num_expert):
    """columns[r] are the ids [T_r, K] that each of the processes wants; the ids that each gets, as a list of tensors.

    Counts every token by hand: a process takes from the others in rank order up to tokens[r] * K, and what is over goes
    to the processes with room, in rank order.
    """
    world, k_max = len(columns), columns[0].shape[1]
    capacity = [n * k_max for n in tokens]
    result = [c.clone() for c in columns]
    for k in range(k_max):
        wanted = [[int((columns[r][:, k] // num_expert == p).sum()) for p in range(world)] for r in range(world)]
        granted = [[0] * world for _ in range(world)]
        for p in range(world):
            for r in range(world):
                granted[r][p] = min(wanted[r][p], capacity[p])
                capacity[p] -= granted[r][p]
        for r in range(world):
            over = sum(wanted[r]) - sum(granted[r])
            for p in range(world):
                extra = min(over, capacity[p])
                granted[r][p] += extra
                capacity[p] -= extra
                over -= extra
        for r in range(world):
            left = list(granted[r])
            homeless = []
            for t in range(tokens[r]):
                p = int(columns[r][t, k]) // num_expert
                if left[p] > 0:
                    left[p] -= 1
                else:
                    homeless.append(t)
            for t in homeless:
                p = next(i for i in range(world) if left[i] > 0)
                left[p] -= 1
                result[r][t, k] = p * num_expert + k % num_expert
    return result
