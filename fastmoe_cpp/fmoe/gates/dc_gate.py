"""GShard's gate with a capacity over all processes: distributed capacity."""

from __future__ import annotations

from torch import Tensor

from .gshard_gate import GShardGate
from .utils import capacity_of, limit_by_capacity


class DCGate(GShardGate):
    """As GShardGate, but an expert takes ceil(rate * T) choices of all processes together, T the tokens of one.

    Processes are served in order of rank.
    """

    def limit(self, ids: Tensor, tokens: int) -> Tensor:
        """ids [T, 2] with -1 for what is over capacity."""
        capacity = capacity_of(self.capacity, self.training, tokens)
        return limit_by_capacity(ids, self.num_expert, self.world_size, capacity)[2]
