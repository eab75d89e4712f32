"""A layer's weights from a checkpoint of any layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import families
from .convert import assemble
from .errors import ConfigError, ShapeError
from .layouts import layout_of
from .layouts.base import STACK
from .source import Checkpoint

if TYPE_CHECKING:
    from ..moe import MoE


@torch.no_grad()
def load_moe(
    layer: MoE,
    path: str | Path | Checkpoint,
    layer_index: int = 0,
    *,
    config: Mapping[str, Any] | str | Path | None = None,
    layout: str | None = None,
    allow_pickle: bool = False,
    repair_shared_gate: bool = False,
    seed: int = 0,
) -> None:
    """Copies the weights of MoE layer ``layer_index`` of a checkpoint into layer, cast to the layer's dtype.

    The layer's configuration must compute what the checkpoint's does (``Checkpoint(path).moe`` gives one). Everything
    is read and checked before anything is copied: after a CheckpointError the layer is as it was. The other arguments
    are Checkpoint's; for many layers, a Checkpoint may be given instead of a path and of them.
    """
    options: dict[str, Any] = {
        "config": config,
        "layout": layout,
        "allow_pickle": allow_pickle,
        "repair_shared_gate": repair_shared_gate,
        "seed": seed,
    }
    given = [name for name, value in options.items() if value]
    if isinstance(path, Checkpoint) and given:
        raise ConfigError(f"{given[0]} belongs to a path and can't be given beside a Checkpoint that is open already")
    opened = path if isinstance(path, Checkpoint) else Checkpoint(path, **options)
    try:
        if differ := families.differences(layer.config, opened.moe):
            raise ConfigError(
                f"{opened.path}: the layer and the checkpoint must have one configuration: {'; '.join(differ)}"
            )
        block = opened.layer(layer_index)
        for problem in opened.layer_problems(block):
            raise problem
        state = layer.state_dict(keep_vars=True)
        read: dict[str, torch.Tensor] = {}
        for entry in layout_of("fastmoe_cpp").entries(layer.config):
            experts = range(layer.config.num_experts if entry.over == STACK else 1)
            slices = [assemble(entry, [opened.part(block, part, e) for part in entry.parts]) for e in experts]
            read[entry.name] = torch.stack(slices) if entry.over == STACK else slices[0]
            if read[entry.name].shape != state[entry.name].shape:
                raise ShapeError(
                    f"the layer's {entry.name} must have shape {list(read[entry.name].shape)}, it has "
                    f"{list(state[entry.name].shape)}", tensor=entry.name,
                )  # fmt: skip
        for name, tensor in read.items():
            state[name].copy_(tensor)
    finally:
        if opened is not path:
            opened.close()
