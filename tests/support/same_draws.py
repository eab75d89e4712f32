"""The same random numbers on every device, so that what draws them can be compared between devices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

_RAND, _RANDN = torch.rand, torch.randn
_IN_PLACE = ("uniform_", "exponential_", "normal_")


@contextmanager
def same_draws(seed: int) -> Iterator[None]:
    """torch.rand, rand_like and randn_like, and uniform_, exponential_ and normal_, draw on the CPU from seed."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*size: Any, device: Any = None, **named: Any) -> Tensor:
        return _RAND(*size, generator=generator, **named).to(device or "cpu")

    def like(drawn: Any) -> Any:
        return lambda t: drawn(t.shape, dtype=t.dtype, generator=generator).to(t.device)

    def in_place(function: Any) -> Any:
        def draw(self: Tensor, *given: Any, **named: Any) -> Tensor:
            # the generator of the caller, if any, is another's
            named.setdefault("generator", generator)
            return self.copy_(function(torch.empty(self.shape, dtype=self.dtype), *given, **named))

        return draw

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", rand)
        patch.setattr(torch, "rand_like", like(_RAND))
        patch.setattr(torch, "randn_like", like(_RANDN))
        for name in _IN_PLACE:
            patch.setattr(Tensor, name, in_place(getattr(Tensor, name)))
        yield
