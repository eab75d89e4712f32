"""Checkpoints of models of which each rank holds a part: any number of ranks writes, any other number reads.

Experts are kept under their numbers in the whole layer: a parameter spread over ranks is one tensor [E, ...] in the
checkpoint, of which every rank writes and reads its own part (torch.distributed.checkpoint). So are the gate and up
rows of experts that ranks hold parts of: [E, 2 * I, ...], as on one rank.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from .stored import as_stored, from_stored, names_in_halves, plain_name

_OPTIONS = StateDictOptions(strict=True)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def save_checkpoint(
    folder: str | os.PathLike, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Writes a model and its optimizer's state to a folder that every rank reaches. A collective.

    Plain tensors, which every rank holds whole, are written once; buffers that a state_dict leaves out are not written.
    """
    model_state, optimizer_state = get_state_dict(model, optimizer or (), options=_OPTIONS)
    state = {"model": model_state} | ({} if optimizer is None else {"optimizer": optimizer_state})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        dcp.save(as_stored(state, names_in_halves(model)), checkpoint_id=folder, no_dist=not dist.is_initialized())


def load_checkpoint(
    folder: str | os.PathLike, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Reads what save_checkpoint wrote into a model, spread over however many ranks, and its optimizer. A collective.

    The optimizer may have other groups than the saved one, as parameter_groups makes them of other meshes: a group
    takes the settings that its parameters had. Raises ValueError, and changes nothing, where these differ, or where a
    tensor is missing or has another shape or dtype than the model's.
    """
    if not Path(folder, ".metadata").is_file():
        raise ValueError(f"folder must hold a checkpoint of save_checkpoint, there is none in {os.fspath(folder)}")
    model_state, optimizer_state = get_state_dict(model, optimizer or (), options=_OPTIONS)
    state = {"model": model_state} | ({} if optimizer is None else {"optimizer": optimizer_state})
    state = as_stored(state, names_in_halves(model))
    stored = dcp.FileSystemReader(folder).read_metadata()
    _check_tensors(folder, stored, state["model"])
    groups = None if optimizer is None else _settings(folder, stored, state["optimizer"].pop("param_groups"))
    _load(folder, state)
    state = from_stored(state)
    if groups is not None:
        state["optimizer"]["param_groups"] = groups
    set_state_dict(
        model, optimizer or (), model_state_dict=state["model"], optim_state_dict=state.get("optimizer", {}),
        options=_OPTIONS,
    )  # fmt: skip


def _load(folder: str | os.PathLike, state: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        # of one process without a group
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())


def _settings(folder: str | os.PathLike, metadata: Metadata, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The optimizer's groups, each with the settings that the parameters in it have in the checkpoint. A collective."""
    prefix = ("optimizer", "param_groups")
    saved: dict[int, dict[str, Any]] = {}
    for name, path in metadata.planner_data.items():
        if path[:2] != prefix:
            continue
        _, _, i, key = path
        kept = metadata.state_dict_metadata[name]
        is_tensor = isinstance(kept, TensorStorageMetadata)
        saved.setdefault(i, {})[key] = torch.empty(kept.size, dtype=kept.properties.dtype) if is_tensor else None
    if not saved:
        raise ValueError(
            f"the checkpoint in {os.fspath(folder)} must hold an optimizer's state, and holds a model alone"
        )
    state = {"optimizer": {"param_groups": [saved[i] for i in sorted(saved)]}}
    _load(folder, state)
    return [_settings_of(i, group, state["optimizer"]["param_groups"]) for i, group in enumerate(groups)]


def _settings_of(number: int, group: dict[str, Any], saved: list[dict[str, Any]]) -> dict[str, Any]:
    found = [each for each in saved if not set(each["params"]).isdisjoint(group["params"])]
    for other in found[1:]:
        for key in sorted((other.keys() | found[0].keys()) - {"params"}):
            if other.get(key) != found[0].get(key):
                raise ValueError(
                    f"the parameters of the optimizer's group {number} must have the same settings in the checkpoint: "
                    f"{found[0]['params'][0]} has {key} {found[0].get(key)} and {other['params'][0]} {other.get(key)}"
                )
    return group | (found[0] if found else {}) | {"params": group["params"]}


def _check_tensors(folder: str | os.PathLike, metadata: Metadata, model_state: dict[str, Tensor]) -> None:
    stored = metadata.state_dict_metadata
    for name, tensor in model_state.items():
        there = stored.get(f"model.{name}")
        if there is None:
            raise ValueError(f"the checkpoint in {os.fspath(folder)} must hold {name}, and does not")
        if there.size != tensor.shape or there.properties.dtype != tensor.dtype:
            raise ValueError(
                f"{name} must be {tensor.dtype} {list(tensor.shape)}, the checkpoint in {os.fspath(folder)} holds "
                f"{there.properties.dtype} {list(there.size)}"
            )
    names = {f"model.{name}" for name in model_state}
    if extra := sorted(name for name in stored if name.startswith("model.") and name not in names):
        raise ValueError(f"the model lacks {extra[0].removeprefix('model.')}, which the checkpoint holds")


@torch.no_grad()
def export_safetensors(path: str | os.PathLike, model: nn.Module, metadata: dict[str, str] | None = None) -> None:
    """Writes the whole model's state_dict as one safetensors file, whatever ranks hold it. A collective.

    Rank 0 of the default group writes; it gathers one tensor at a time and keeps all of them in host memory. Needs the
    safetensors package.
    """
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise ImportError("export_safetensors needs safetensors: pip install safetensors") from None
    whole: dict[str, Tensor] = {}
    halves = names_in_halves(model)
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"state_dict()[{name!r}] must be a tensor, got {type(tensor).__name__}")
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        tensor = tensor.flatten(1, 2) if plain_name(name) in halves else tensor
        if _rank() == 0:
            # a copy of its own: the format has no shared memory
            whole[name] = tensor.detach().to("cpu", copy=True).contiguous()
    if _rank() == 0:
        save_file(whole, os.fspath(path), metadata)
    if dist.is_initialized():
        dist.barrier()
