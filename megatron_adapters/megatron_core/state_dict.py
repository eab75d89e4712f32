"""The experts' tensors under Megatron-Core's names, read and written, and as shards for its distributed checkpoints.

============  =============================================================  ======================
layout        names under ``mlp.experts.`` (i is this rank's i-th expert)    of
============  =============================================================  ======================
grouped       ``linear_fc1.weight{i}``, ``linear_fc1.bias{i}``               TEGroupedMLP
sequential    ``local_experts.{i}.linear_fc1.weight``, ``....bias``          SequentialMLP
stacked       ``linear_fc1.weight [E_local, ...]``, ``linear_fc1.bias``      the parameters here
============  =============================================================  ======================
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_LINEARS = ("linear_fc1", "linear_fc2")


def name_of(linear: str, kind: str, expert: int, grouped: bool) -> str:
    """The host's name of one expert's tensor: kind is 'weight' or 'bias'."""
    return f"{linear}.{kind}{expert}" if grouped else f"local_experts.{expert}.{linear}.{kind}"


def split(state: dict, prefix: str, grouped: bool) -> dict:
    """state with the stacked tensors under prefix replaced, in place, by one an expert."""
    for linear in _LINEARS:
        for kind in ("weight", "bias"):
            stacked = state.pop(f"{prefix}{linear}.{kind}", None)
            if stacked is not None:
                for i, tensor in enumerate(stacked.unbind(0)):
                    state[prefix + name_of(linear, kind, i, grouped)] = tensor
                    if not grouped:  # the host's linear layers ask for it
                        state[f"{prefix}local_experts.{i}.{linear}._extra_state"] = None
    return state


def stack(state: dict, prefix: str, experts: nn.Module) -> None:
    """state with the names of either layout under prefix replaced, in place, by those of a GroupedExperts.

    Raises ValueError where a tensor's experts are not all there, or one has another shape; state is then unchanged.
    """
    found: dict[str, torch.Tensor] = {}
    taken: list[str] = []
    for linear in _LINEARS:
        for kind in ("weight", "bias"):
            parameter = getattr(getattr(experts, linear), kind)
            if parameter is None or f"{prefix}{linear}.{kind}" in state:
                continue
            for grouped in (True, False):
                names = [prefix + name_of(linear, kind, i, grouped) for i in range(experts.num_local_experts)]
                here = [name for name in names if name in state]
                if not here:
                    continue
                if missing := sorted(set(names) - set(here)):
                    raise ValueError(
                        f"the state_dict must hold every expert of this rank, {', '.join(missing)} is missing"
                    )
                for name in names:
                    if state[name].shape != parameter.shape[1:]:
                        raise ValueError(
                            f"{name} must have shape {list(parameter.shape[1:])}, got {list(state[name].shape)}"
                        )
                found[f"{prefix}{linear}.{kind}"] = torch.stack([state[name] for name in names])
                taken += names
                break
    for name in taken:
        del state[name]
    # what Transformer Engine and the host's linear layers leave beside their weights
    for name in [n for n in state if n.startswith(prefix) and n.endswith("_extra_state")]:
        del state[name]
    state.update(found)


def sharded(experts: nn.Module, prefix: str, sharded_offsets: tuple, metadata: dict | None) -> dict[str, Any]:
    """A ShardedTensor a parameter of a GroupedExperts, under the key and of the global shape of the host's experts."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.transformer.utils import make_sharded_object_for_checkpoint

    if (metadata or {}).get("singleton_local_shards", False):
        raise ValueError(
            "sharded_state_dict: singleton_local_shards is not honoured, experts are written as one tensor"
        )
    prepended = len(sharded_offsets)
    ep = (prepended, experts.ep_group.rank(), experts.ep_group.size())
    replica = (0, experts.tp_group.rank(), experts.dp_group.rank())
    # the host's experts add the axis of the experts in front of each weight; ours have it
    result: dict[str, Any] = {}
    for linear in _LINEARS:
        for kind in ("weight", "bias"):
            parameter = getattr(getattr(experts, linear), kind)
            if parameter is None:
                continue
            result[f"{prefix}{linear}.{kind}"] = ShardedTensor.from_rank_offsets(
                f"{prefix}experts.{linear}.{kind}",
                parameter,
                *sharded_offsets,
                ep,
                replica_id=replica,
                prepend_axis_num=prepended,
            )
        # empty, but the host asks for it
        for i in range(experts.num_local_experts):
            axis = (prepended, ep[1] * experts.num_local_experts + i, ep[2] * experts.num_local_experts)
            result[f"{prefix}local_experts.{i}.{linear}._extra_state"] = make_sharded_object_for_checkpoint(
                None, f"{prefix}experts.{linear}._extra_state", (*sharded_offsets, axis), replica_id=replica
            )
    return result
