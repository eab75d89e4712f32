"""Tensors as rows of other tensors: what a tensor of the target is made of, without reading any."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from .errors import DtypeError, ShapeError
from .files import TensorInfo


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a dtype and shape, as rows (name, begin, end) of source tensors one under the other."""

    dtype: str
    shape: tuple[int, ...]
    rows: tuple[tuple[str, int, int], ...]

    def cut(self, begin: int, end: int) -> Tensor:
        """Its rows from begin to end."""
        found, at = [], 0
        for name, first, last in self.rows:
            low, high = max(begin - at, 0), min(end - at, last - first)
            if low < high:
                found.append((name, first + low, first + high))
            at += last - first
        return Tensor(self.dtype, (end - begin, *self.shape[1:]), tuple(found))


View = dict[str, Tensor]


def whole(infos: Mapping[str, TensorInfo]) -> View:
    """Every tensor as itself."""
    return {
        name: Tensor(info.dtype, info.shape, ((name, 0, info.shape[0] if info.shape else 1),))
        for name, info in infos.items()
    }


def stack(name: str, tensors: Iterable[Tensor]) -> Tensor:
    """The tensors one under the other; they must share dtype and columns."""
    tensors = list(tensors)
    first = tensors[0]
    rows: list[tuple[str, int, int]] = []
    for tensor in tensors:
        if tensor.dtype != first.dtype:
            raise DtypeError(
                f"what becomes {name} must have one dtype, got {first.dtype} and {tensor.dtype}", tensor=name
            )
        if tensor.shape[1:] != first.shape[1:]:
            raise ShapeError(
                f"what becomes {name} must have equal columns, got {list(first.shape)} and {list(tensor.shape)}",
                tensor=name,
            )
        for source, begin, end in tensor.rows:
            if rows and rows[-1][0] == source and rows[-1][2] == begin:
                rows[-1] = (source, rows[-1][1], end)
            else:
                rows.append((source, begin, end))
    return Tensor(first.dtype, (sum(t.shape[0] for t in tensors), *first.shape[1:]), tuple(rows))
