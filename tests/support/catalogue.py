"""One valid call of every operator: what opcheck, the bad-input table, poisoning and repeatability all start from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from support import distributions
from support.samples import dispatch, experts_inputs, normal, ops


@dataclass
class Call:
    args: tuple
    kwargs: dict[str, Any] = field(default_factory=dict)


def namespace_ops() -> list[str]:
    """Every operator the library registers."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted(n.removeprefix("fastmoe_cpp::") for n in names if n.startswith("fastmoe_cpp::"))


CATALOGUE: dict[str, Callable[..., list[Call]]] = {}


def of(name: str):
    def register(function):
        CATALOGUE[name] = function
        return function

    return register


class Setting:
    """Tensors of one device, dtype and size; grad=True makes leaves that ask for a gradient."""

    def __init__(self, device="cpu", dtype=torch.float32, grad=False, tokens=7, hidden=6, inner=4, experts=5, top_k=2):
        self.device, self.dtype, self.grad = device, dtype, grad
        self.tokens, self.hidden, self.inner, self.experts, self.top_k = tokens, hidden, inner, experts, top_k
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        ids, weights = distributions.ids("dropped", tokens, experts, top_k, seed=1)
        self.ids = ids.to(device)
        self.weights = self.leaf(weights.to(device=device, dtype=self.wide))
        self.plan = dispatch(self.ids, experts, capacity=3)
        # as many slots as the plan serves, and one that is nobody's
        self.cut = (self.plan[0][: min(int(self.plan[2][-1]) + 1, tokens * top_k)], *self.plan[1:3])
        self.seeds = iter(range(100, 10000))

    def leaf(self, t):
        return t.detach().requires_grad_(self.grad)

    def new(self, *shape, dtype=None, leaf=True):
        t = normal(*shape, seed=next(self.seeds), dtype=dtype or self.dtype, device=self.device)
        return self.leaf(t) if leaf else t


@of("router_logits")
def _(s: Setting):
    x, w, b = s.new(s.tokens, s.hidden), s.new(s.experts, s.hidden), s.new(s.experts)
    return [Call((x, w)), Call((x, w, b))]


@of("router_logits_backward")
def _(s):
    return [
        Call(
            (
                s.new(s.tokens, s.experts, dtype=s.wide),
                s.new(s.tokens, s.hidden),
                s.new(s.experts, s.hidden),
                [True] * 3,
            )
        )
    ]


@of("route")
def _(s):
    logits = s.new(s.tokens, s.experts)
    ids, bias, other = s.ids.clone(), s.new(s.experts, leaf=False), s.new(s.tokens, s.experts, leaf=False)
    return [
        Call((logits, s.top_k)),
        Call((logits, s.top_k), {"score_function": "sigmoid", "expert_bias": bias, "scaling_factor": 2.5}),
        Call((logits, s.top_k), {"topk_ids": ids, "renormalize_epsilon": 1e-3}),
        Call((logits, s.top_k), {"score_function": "sqrtsoftplus", "selection_scores": other}),
        Call((logits, s.top_k), {"scores_after_topk": True, "renormalize": False}),
    ]  # fmt: skip


@of("route_backward")
def _(s):
    g = s.new(s.tokens, s.top_k, dtype=s.wide)
    scores, logits = s.new(s.tokens, s.experts, dtype=s.wide), s.new(s.tokens, s.experts)
    tail = ("softmax", False, True, 0.0, 1.0)
    return [Call((g, scores, logits, s.ids, *tail)), Call((g, None, logits, s.ids, *tail))]


@of("sinkhorn")
def _(s):
    return [Call((s.new(s.tokens, s.experts), 3)), Call((s.new(s.tokens, s.experts),))]


@of("dispatch")
def _(s):
    padding = torch.arange(s.tokens, device=s.device) == 1
    return [
        Call((s.ids, s.experts)),
        Call((s.ids, s.experts), {"capacity": 2, "padding_mask": padding}),
        Call((s.ids, s.experts), {"capacity": 2, "topk_weights": s.weights, "drop_policy": "probs"}),
    ]


@of("route_and_dispatch")
def _(s):
    x, w, b = s.new(s.tokens, s.hidden), s.new(s.experts, s.hidden), s.new(s.experts)
    bias = s.new(s.experts, leaf=False)
    return [
        Call((x, w, b, s.top_k)),
        Call((x, w, None, s.top_k), {"score_function": "sigmoid", "expert_bias": bias, "scaling_factor": 2.5}),
    ]


@of("gather")
def _(s):
    x = s.new(s.tokens, s.hidden)
    return [Call((x, *s.plan[:3])), Call((x, *s.cut))]


@of("gather_backward")
def _(s):
    rows = s.new(s.tokens * s.top_k, s.hidden, leaf=False)
    return [Call((s.leaf(rows[:n]), s.plan.token_slot)) for n in (len(rows), len(s.cut[0]))]


def _experts(s, bias):
    made = experts_inputs(
        s.tokens,
        s.hidden,
        s.inner,
        s.experts,
        s.top_k,
        dtype=s.dtype,
        device=s.device,
        bias=bias,
        distribution="dropped",
    )
    x, up, down = (s.leaf(made[n]) for n in ("hidden_states", "gate_up_proj", "down_proj"))
    biases = tuple(s.leaf(made[n]) if bias else None for n in ("gate_up_bias", "down_bias"))
    return (x, up, down, s.weights, *(s.cut if bias else s.plan[:3])), biases


@of("experts")
def _(s):
    plain, _ = _experts(s, False)
    full, biases = _experts(s, True)
    named = dict(zip(("gate_up_bias", "down_bias"), biases, strict=True))
    return [
        Call(plain),
        Call(
            full,
            named | {"activation": "clamped_swiglu", "interleaved": True, "weight_on_input": True, "recompute": True},
        ),
    ]


@of("experts_forward")
def _(s):
    full, biases = _experts(s, True)
    return [Call((*full, *biases, "swiglu", 1.702, 7.0, False, False, keep)) for keep in (True, False)]


@of("experts_backward")
def _(s):
    full, biases = _experts(s, True)
    grad = s.new(s.tokens, s.hidden)
    return [Call((grad, *full, *biases, None, "swiglu", 1.702, 7.0, False, False, [True] * 6))]


@of("experts_backward_accumulate")
def _(s):
    full, biases = _experts(s, True)
    grad = s.new(s.tokens, s.hidden)
    rest = (None, "swiglu", 1.702, 7.0, False, False, [True] * 6)
    buffers = [s.new(*w.shape, dtype=s.wide, leaf=False) for w in full[1:3]]
    rows = s.new(len(s.cut[0]), full[1].shape[1], leaf=False)
    return [Call((grad, *full, *biases, *rest, *more)) for more in (buffers, (None, buffers[1]), (None, None, rows))]


@of("grouped_linear")
def _(s):
    rows, w = s.new(s.tokens * s.top_k, s.hidden), s.new(s.experts, s.inner, s.hidden)
    return [Call((rows, w, s.plan.expert_offsets)), Call((rows, w, s.plan.expert_offsets, s.new(s.experts, s.inner)))]


@of("grouped_linear_backward")
def _(s):
    slots = s.tokens * s.top_k
    grad, rows, w = s.new(slots, s.inner), s.new(slots, s.hidden), s.new(s.experts, s.inner, s.hidden)
    return [Call((grad, rows, w, s.plan.expert_offsets, [True] * 3))]


@of("combine")
def _(s):
    rows, few = s.new(s.tokens * s.top_k, s.hidden), s.new(len(s.cut[0]), s.hidden)
    return [Call((rows, s.weights, *s.plan[:3])), Call((rows, None, *s.plan[:3])), Call((few, s.weights, *s.cut))]


@of("combine_backward")
def _(s):
    grad, rows = s.new(s.tokens, s.hidden), s.new(s.tokens * s.top_k, s.hidden)
    return [
        Call((grad, rows, s.weights, *s.plan[:3], [True, True])),
        Call((grad, s.new(len(s.cut[0]), s.hidden), s.weights, *s.cut, [True, True])),
        Call((grad, rows, None, *s.plan[:3], [True, False])),
    ]


def one_rank(device: str) -> str:
    """The name of a group of this process alone, registered when it is first asked for."""
    name = f"one rank on {device}"
    if name not in _GROUPS:
        store = dist.HashStore()
        group = dist.ProcessGroup(store, 0, 1)
        kind = dist.ProcessGroup.BackendType
        if device == "cpu":
            backend, chosen = dist.ProcessGroupGloo(store, 0, 1), kind.GLOO
        else:
            backend, chosen = dist.ProcessGroupNCCL(store, 0, 1), kind.NCCL
        group._set_default_backend(chosen)
        group._register_backend(torch.device(device), chosen, backend)
        group._set_group_name(name)
        torch._C._distributed_c10d._register_process_group(name, group)
        _GROUPS[name] = group
    return name


_GROUPS: dict[str, Any] = {}


@of("exchange")
def _(s):
    group = one_rank(s.device)
    return [Call((s.new(s.tokens, s.hidden), [s.tokens], [s.tokens], group))]


@of("expert_counts")
def _(s):
    padding = torch.arange(s.tokens, device=s.device)[None] == 1
    return [Call((s.ids[None], s.experts)), Call((s.ids[None], s.experts, padding))]


@of("balance_loss")
def _(s):
    padding = torch.arange(s.tokens, device=s.device)[None] == 1
    scores, counts = s.new(1, s.tokens, s.experts), torch.arange(s.experts, device=s.device)[None]
    return [Call((scores, counts, 0.5)), Call((scores, counts.float(), 0.5, padding))]


@of("balance_loss_backward")
def _(s):
    counts = torch.arange(s.experts, device=s.device)[None]
    return [Call((s.new(dtype=s.wide), s.new(1, s.tokens, s.experts), counts, 0.5, None))]


@of("z_loss")
def _(s):
    padding = torch.arange(s.tokens, device=s.device) == 1
    return [Call((s.new(s.tokens, s.experts),)), Call((s.new(s.tokens, s.experts), 0.5, padding))]


@of("z_loss_backward")
def _(s):
    return [Call((s.new(dtype=s.wide), s.new(s.tokens, s.experts), 0.5, None))]


@of("update_expert_bias")
def _(s):
    counts = torch.arange(s.experts, device=s.device)
    return [Call((s.new(s.experts, dtype=s.wide, leaf=False), counts, 0.1, zero_mean)) for zero_mean in (False, True)]


@of("outside_backward")
def _(s):
    return [Call((s.plan.tokens_per_expert,))]


def calls(name: str, **setting: Any) -> list[Call]:
    return CATALOGUE[name](Setting(**setting))


def run(name: str, call: Call) -> Any:
    return getattr(ops, name)(*call.args, **call.kwargs)


def tensors(result: Any) -> list[torch.Tensor]:
    if result is None:
        return []
    return [result] if torch.is_tensor(result) else list(result)


DIFFERENTIABLE = (
    "router_logits", "route", "gather", "experts", "grouped_linear", "combine", "exchange", "balance_loss", "z_loss",
)  # fmt: skip
