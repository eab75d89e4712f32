"""GShard's gate (arXiv 2006.16668)."""

from __future__ import annotations

import torch
from torch import Tensor

from .naive_gate import NaiveGate
from .utils import capacity_of, check_capacity, drop_second_at_random, gshard_loss, prune_by_count


class GShardGate(NaiveGate):
    """Two choices a token, a capacity on each process, and the second choice kept by chance.

    An expert takes ceil(rate * T) * 2 // (world_size * num_expert) choices of the T tokens here, the first ones; rate
    is capacity[0] in training and capacity[1] in evaluation. With random_routing the second choice is dropped where
    twice its score is below a uniform random number. The loss is utils.gshard_loss().
    """

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int,
        topk: int = 2,
        capacity: tuple[float, float] = (1.2, 2.4),
        random_routing: bool = True,
        gate_bias: bool = True,
    ) -> None:
        if topk != 2:
            raise ValueError(f"{type(self).__name__}: topk must be 2, got {topk!r}")
        super().__init__(d_model, num_expert, world_size, top_k=2, gate_bias=gate_bias)
        self.capacity = check_capacity(type(self).__name__, capacity)
        self.random_routing = random_routing

    def limit(self, ids: Tensor, tokens: int) -> Tensor:
        """ids [T, 2] with -1 for what is over capacity."""
        capacity = capacity_of(self.capacity, self.training, tokens) * self.top_k // self.tot_expert
        return prune_by_count(ids, torch.full((self.tot_expert,), capacity, device=ids.device))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, d_model] to ids [T, 2], -1 for a dropped choice, and scores [T, 2], as they were before dropping."""
        ids, scores, probs, _ = self.choose(x)
        self.set_loss(gshard_loss(probs, ids, self.num_expert))
        ids = self.limit(ids, x.shape[0])
        if self.random_routing:
            ids = drop_second_at_random(ids, scores)
        return ids, scores.to(x.dtype)
