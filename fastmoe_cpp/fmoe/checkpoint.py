"""One state dict of an expert-parallel model, and back: the experts under their global numbers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .layers import FMoE
from .linear import FMoELinear
from .utils import group_of


def merged_state_dict(
    module: nn.Module, group: dist.ProcessGroup | None = None, *, every_rank: bool = False
) -> dict[str, Tensor]:
    """The state dict of the same model on one process, with W * num_expert experts and world_size 1, on the CPU.

    Expert i of process r becomes expert r * num_expert + i; what isn't an expert is the first process's. The processes
    of an expert-parallel group call it together: group, or where it is None each layer's moe_group. The first process
    gets it, and with every_rank all do; the others get an empty dict. torch.save or safetensors writes it to one file.

    Raises ValueError for a module of all experts that holds anything but FMoELinear, whose parts are not known.
    """
    local = module.state_dict()
    layers = _expert_layers(module)
    owner = {key: next((n for n in layers if key.startswith(f"{n}experts.")), None) for key in local}
    # before the first collective: a refusal must come on every process
    stacked = {key for key, name in owner.items() if name is not None and _stacked(layers[name], key[len(name) :])}
    keep = every_rank or _is_first(layers, group)
    merged: dict[str, Tensor] = {}
    for key, value in local.items():
        name = owner[key]
        if name is None or not isinstance(value, Tensor):  # what is no tensor is a module's extra state
            if keep:
                merged[key] = value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
            continue
        layer = layers[name]
        processes = group_of(group or layer.moe_group, layer.world_size, "the group")
        parts = _gather(value.detach(), processes, every_rank)
        if not keep:
            continue
        if key in stacked:
            merged[key] = torch.cat(parts)
            continue
        index, rest = key[len(name) + len("experts.") :].split(".", 1)
        for rank, part in enumerate(parts):
            merged[f"{name}experts.{rank * layer.num_expert + int(index)}.{rest}"] = part
    return merged


def split_state_dict(
    module: nn.Module, state_dict: Mapping[str, Tensor], group: dist.ProcessGroup | None = None
) -> dict[str, Tensor]:
    """This process's part of a merged_state_dict(), for module.load_state_dict(): the reverse, for any number of them.

    group, or where it is None each layer's moe_group, says which process this is. Raises ValueError where a layer's
    experts are not as many as the state dict's.
    """
    layers = _expert_layers(module)
    found: dict[str, set[int]] = {name: set() for name in layers}
    mine: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        name = next((n for n in layers if key.startswith(f"{n}experts.")), None)
        if name is None:
            mine[key] = value
            continue
        layer = layers[name]
        first = group_of(group or layer.moe_group, layer.world_size, "the group").rank() * layer.num_expert
        index, _, rest = key[len(name) + len("experts.") :].partition(".")
        if not index.isdigit():
            # all experts in one tensor, as FastMoE wrote them before its version 1.0.1
            if _stacked(layer, key[len(name) :]):
                found[name] = set(range(value.shape[0]))
                value = value[first : first + layer.num_expert]
            mine[key] = value
            continue
        found[name].add(int(index))
        if first <= int(index) < first + layer.num_expert:
            mine[f"{name}experts.{int(index) - first}.{rest}"] = value
    for name, indices in found.items():
        total = layers[name].num_expert * layers[name].world_size
        if indices and indices != set(range(total)):
            raise ValueError(
                f"{name or 'the layer'}: the layer has {total} experts over its {layers[name].world_size} processes, "
                f"and the state dict {len(indices)}, the last of them {max(indices)}"
            )
    return mine


def _expert_layers(module: nn.Module) -> dict[str, FMoE]:
    """The layers whose experts lie on several processes, by the prefix of their names."""
    layers = {
        f"{name}." if name else "": layer
        for name, layer in module.named_modules(remove_duplicate=False)
        if isinstance(layer, FMoE) and layer.world_size > 1
    }
    # of nested layers the inner one first
    return dict(sorted(layers.items(), key=lambda item: -len(item[0])))


def _is_first(layers: dict[str, FMoE], group: dist.ProcessGroup | None) -> bool:
    """Whether this process is the first of the group, or of the layers' groups."""
    groups = [group_of(group or layer.moe_group, layer.world_size, "the group") for layer in layers.values()]
    return all(g.rank() == 0 for g in groups)


def _gather(value: Tensor, group: dist.ProcessGroup, every_rank: bool) -> list[Tensor]:
    """Every process's value on the CPU, on all of them or on the first; an empty list elsewhere."""
    value = value.contiguous()
    receives = every_rank or group.rank() == 0
    parts = [torch.empty_like(value) for _ in range(group.size())] if receives else []
    if every_rank:
        dist.all_gather(parts, value, group=group)
    else:
        dist.gather(value, parts if receives else None, group=group, group_dst=0)
    return [part.cpu() for part in parts]


def _stacked(layer: FMoE, key: str) -> bool:
    """Whether a key, from 'experts.' on, holds all experts of the process along its first axis."""
    if key.split(".")[1].isdigit():
        return False
    owner = layer.get_submodule(key.rsplit(".", 1)[0])
    if isinstance(owner, FMoELinear):
        return True
    raise ValueError(
        f"{key} must belong to a FMoELinear, whose first axis is the experts, for the experts to be merged, and "
        f"belongs to a {type(owner).__name__}"
    )
