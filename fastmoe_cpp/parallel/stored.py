"""Tensors as one rank has them, of ranks that keep gate and up rows apart: [E, 2 * I, H], and here [E, 2, I, H]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ..experts import Experts
from .tensor import in_halves

#: Of torch.compile and of torch's checkpoint_wrapper.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers put into it, as torch.distributed.checkpoint has it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def names_in_halves(model: nn.Module) -> set[str]:
    """The plain names of the parameters whose gate and up rows are kept apart."""
    names = set()
    for path, module in model.named_modules():
        if isinstance(module, Experts):
            own = module.named_parameters(prefix=path, recurse=False)
            names |= {plain_name(name) for name, p in own if in_halves(name.rpartition(".")[2], p)}
    return names


def take_whole(experts: Experts, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before load_state_dict: what one rank has becomes this rank's part of it, as the parameter is spread."""
    for name, parameter in experts.named_parameters(recurse=False):
        given = state_dict.get(prefix + name)
        if not isinstance(given, Tensor) or isinstance(given, DTensor) or not isinstance(parameter, DTensor):
            continue
        shape = parameter.shape
        one_rank = torch.Size([shape[0], 2 * shape[2], *shape[3:]]) if in_halves(name, parameter) else shape
        # fully_shard's parts of parts are not taken here
        if given.shape == one_rank and all(type(p) in (Shard, Replicate) for p in parameter.placements):
            values = given.detach().to(parameter.device).reshape(shape)
            state_dict[prefix + name] = distribute_tensor(
                values, parameter.device_mesh, parameter.placements, src_data_rank=None
            )


class Stored(Tensor):
    """Stands for a DTensor [E, 2, I, ...] as [E, 2 * I, ...] towards torch.distributed.checkpoint, and nothing else.

    A rank writes and reads its gate rows and its up rows, two slices of that tensor, in the DTensor's own memory.
    """

    part: DTensor

    @staticmethod
    def __new__(cls, part: DTensor) -> Stored:
        size = (part.shape[0], part.shape[1] * part.shape[2], *part.shape[3:])
        stored = Tensor._make_wrapper_subclass(cls, size, dtype=part.dtype, device=part.device)
        stored.part = part
        return stored

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{func} of a tensor that only torch.distributed.checkpoint reads and writes")

    def __repr__(self) -> str:
        return f"Stored({self.part})"

    def pieces(self) -> list[tuple[ChunkStorageMetadata, Tensor]]:
        """This rank's slices of [E, 2 * I, ...], each with its own memory."""
        local, inner = self.part.to_local(), self.part.shape[2]
        if local.numel() == 0:
            return []
        (chunk,) = self.part.__create_chunk_list__()
        expert, half, first, *rest = chunk.offsets
        found = []
        for i, rows in enumerate(local.unbind(1)):
            offsets = torch.Size([expert, (half + i) * inner + first, *rest])
            found.append((ChunkStorageMetadata(offsets=offsets, sizes=rows.shape), rows))
        return found

    def __create_write_items__(self, fqn: str, tensor: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties.create_from_tensor(rows), self.shape),
            )
            for chunk, rows in self.pieces()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [chunk for chunk, _ in self.pieces()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        for chunk, rows in self.pieces():
            if chunk.offsets == index.offset:
                return rows
        raise ValueError(f"{index.fqn} has no slice at {index.offset} on this rank")


def as_stored(state: dict[str, Any], halves: set[str]) -> dict[str, Any]:
    """A state {"model": ..., "optimizer": ...} of get_state_dict for torch.distributed.checkpoint: one rank's tensors.

    halves are names_in_halves. Tensors share memory; an optimizer's of the parameter's own shape are taken alike.
    """
    model = state["model"]
    shapes = {name: model[name].shape for name in halves}
    out = {"model": {n: Stored(t) if n in halves else t for n, t in model.items()}}
    if "optimizer" in state:
        optimizer = state["optimizer"]
        out["optimizer"] = optimizer | {
            "state": {
                name: {
                    key: Stored(t) if isinstance(t, DTensor) and shapes.get(name) == t.shape else t
                    for key, t in kept.items()
                }
                for name, kept in optimizer["state"].items()
            }
        }
    return out


def from_stored(state: Any) -> Any:
    """The state that as_stored was given, with whatever was read into it."""
    if isinstance(state, dict):
        return {key: from_stored(value) for key, value in state.items()}
    return state.part if isinstance(state, Stored) else state
