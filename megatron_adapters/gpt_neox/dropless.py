"""The MoE layer of GPT-NeoX as it is now: dropless, Sinkhorn's or top-k routing, experts over tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastmoe_cpp import ops

from .arguments import ERA_NOW, HOST, check, moe_config

Initializer = Callable[[Tensor], Any]


def sinkhorn(logits: Tensor, iterations: int = 3, tolerance: float = 1e-4) -> Tensor:
    """GPT-NeoX's Sinkhorn scaling of exp(logits) [T, E], in float32, for selection: no gradient.

    At most so many iterations; it stops where the experts' factors move by less than the tolerance in the mean, without
    the device being waited for.
    """
    with torch.no_grad():
        cost = logits.float().exp()
        tokens, experts = cost.shape
        columns = 1 / (experts * cost.sum(0))
        rows = torch.ones_like(cost[:, 0])
        running = torch.ones((), dtype=torch.bool, device=cost.device)
        for _ in range(iterations):
            new_rows = 1 / (tokens * ((columns * cost).sum(1) + 1e-8))
            new_columns = 1 / (experts * ((new_rows[:, None] * cost).sum(0) + 1e-8))
            moved = (columns - new_columns).abs().mean()
            rows, columns = torch.where(running, new_rows, rows), torch.where(running, new_columns, columns)
            running = running & (moved >= tolerance)
        return columns * cost * rows[:, None]


class _ToRanks(torch.autograd.Function):
    """The same tensor on every rank of a group, each using a part of it: gradients are summed."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _FromRanks(torch.autograd.Function):
    """The sum over a group, the same on every rank: its gradient is too."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


class _Router(nn.Module):
    def __init__(self, hidden: int, experts: int, initialize: Initializer, **factory: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(hidden, experts, bias=False, **factory)
        initialize(self.layer.weight)


class _GroupedMLP(nn.Module):
    """``w1``, where gated ``w3``, and ``w2``, each [E_local * F, H]."""

    def __init__(
        self, rows: int, hidden: int, first: Initializer, last: Initializer, gated: bool, seed: Any, **factory: Any
    ) -> None:
        super().__init__()
        for name in ("w1", "w3", "w2") if gated else ("w1", "w2"):
            weight = nn.Parameter(torch.empty(rows, hidden, **factory))
            with seed():
                (last if name == "w2" else first)(weight)
            # tensor parallel: optimizers and checkpoints of the host keep every rank's own part
            weight.model_parallel, weight.partition_dim, weight.partition_stride = True, 0, 1
            self.register_parameter(name, weight)


class _Experts(nn.Module):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.mlp = _GroupedMLP(*args, **kwargs)


class ParallelDroplessMoE(nn.Module):
    """In the place of the host's layer of that name: ``(neox_args, init_method, output_layer_init_method)``.

    Parameters are the host's: ``router.layer.weight [E, H]``, ``experts.mlp.w1`` and ``.w2 [E_local * F, H]``; gated
    activations, which the host leaves ungated, have ``w3`` as well and compute act(w1 x) * (w3 x). Of a tensor-parallel
    group, by default the host's, every rank holds E / ranks experts and sees every token.
    Raises ArgumentError for arguments that are not honoured.
    """

    def __init__(
        self,
        neox_args: Any,
        init_method: Initializer,
        output_layer_init_method: Initializer,
        *,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check(neox_args, ERA_NOW)
        self.config = c = moe_config(neox_args)
        if group is None and neox_args.model_parallel_size not in (None, 1):
            from megatron import mpu

            group = mpu.get_model_parallel_group()
        self.group = group if group is not None and group.size() > 1 else None
        self.ranks, self.rank = (1, 0) if self.group is None else (self.group.size(), self.group.rank())
        if self.ranks != (neox_args.model_parallel_size or 1):
            raise ValueError(
                f"{HOST}: the tensor-parallel group must have model_parallel_size = {neox_args.model_parallel_size} "
                f"ranks, has {self.ranks}"
            )
        factory = {"dtype": neox_args.params_dtype, "device": _device()}
        self.experts_per_rank = c.num_experts // self.ranks
        self.router = _Router(c.hidden_size, c.num_experts, init_method, **factory)
        rows = self.experts_per_rank * c.intermediate_size
        self.experts = _Experts(
            rows, c.hidden_size, init_method, output_layer_init_method, c.gated, self._own_seed, **factory
        )

    def _own_seed(self) -> Any:
        # the ranks' experts differ, whatever state the ranks' generators share
        if self.group is None:
            return torch.random.fork_rng(enabled=False)
        return _DifferentSeeds(self.rank)

    def route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """rows [T, H] to topk_weights [T, K] in float32 or wider, and topk_ids [T, K]."""
        r, top_k = self.config.router, self.config.top_k
        if self.training and r.jitter_eps > 0:
            rows = rows * torch.empty_like(rows).uniform_(1 - r.jitter_eps, 1 + r.jitter_eps)
        logits = ops.router_logits(rows, self.router.layer.weight)
        selection = sinkhorn(logits.detach(), r.sinkhorn_iterations) if r.sinkhorn and self.training else None
        weights, ids, _ = ops.route(
            logits, top_k, selection_scores=selection, score_function=r.score_function, renormalize=False
        )
        return weights, ids

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """x [s, b, H] to one tensor of its shape and (autocast's) dtype, and None for the bias."""
        c = self.config
        if x.dim() != 3 or x.shape[-1] != c.hidden_size:
            raise ValueError(f"x must have shape [s, b, {c.hidden_size}], got {list(x.shape)}")
        rows = x.reshape(-1, c.hidden_size)
        weights, ids = self.route(rows)
        if self.group is not None:
            rows, weights = _ToRanks.apply(rows, self.group), _ToRanks.apply(weights, self.group)
            ids = ids - self.rank * self.experts_per_rank
            ids = torch.where((ids >= 0) & (ids < self.experts_per_rank), ids, -1)
        mlp = self.experts.mlp
        stacked = (self.experts_per_rank, c.intermediate_size, c.hidden_size)
        up = mlp.w1.view(stacked)
        if c.gated:
            up = torch.cat([up, mlp.w3.view(stacked)], dim=1)
        down = mlp.w2.view(stacked).transpose(1, 2).contiguous()
        plan = ops.dispatch(ids, self.experts_per_rank)
        output = ops.experts(rows, up, down, weights, plan, activation=c.activation)
        if self.group is not None:
            output = _FromRanks.apply(output, self.group)
        return output.reshape(x.shape), None


class _DifferentSeeds:
    """Draws of this rank's own from the generators' common state, which goes on the same on every rank."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __enter__(self) -> None:
        seed = int(torch.randint(2**31, (1,)))
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        self.forked = torch.random.fork_rng(devices)
        self.forked.__enter__()
        torch.manual_seed(seed + self.rank)

    def __exit__(self, *error: Any) -> None:
        self.forked.__exit__(*error)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
