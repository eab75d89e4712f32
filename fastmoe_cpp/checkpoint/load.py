"""A layer's weights from a checkpoint of any layout."""

from __future__ import annotations

import operator
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
    is read and checked before anything is copied: after a CheckpointError the layer is as it was. layer may be what
    torch.compile made of one, and must be on a real device. The other arguments are Checkpoint's; for many layers, a
    Checkpoint may be given instead of a path and of them.
    """
    layer, state = _target(layer)
    number = _layer_number(layer_index)
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
            fields = families.differing_fields(layer.config, opened.moe)
            raise ConfigError(
                f"{opened.path}: the layer and the checkpoint must have one configuration: {'; '.join(differ)}",
                expected={name: mine for name, (mine, _) in fields.items()},
                found={name: its for name, (_, its) in fields.items()},
            )
        block = opened.layer(number)
        for problem in opened.layer_problems(block):
            raise problem
        read: dict[str, torch.Tensor] = {}
        for entry in layout_of("fastmoe_cpp").entries(layer.config):
            experts = range(layer.config.num_experts if entry.over == STACK else 1)
            slices = [assemble(entry, [opened.part(block, part, e) for part in entry.parts]) for e in experts]
            read[entry.name] = torch.stack(slices) if entry.over == STACK else slices[0]
            expected, found = tuple(read[entry.name].shape), tuple(state[entry.name].shape)
            if expected != found:
                raise ShapeError(
                    f"the layer's {entry.name} must have shape {list(expected)}, it has {list(found)}",
                    tensor=entry.name, expected=expected, found=found,
                )  # fmt: skip
        for name, tensor in read.items():
            state[name].copy_(tensor)
    finally:
        if opened is not path:
            opened.close()


def _target(layer: Any) -> tuple[MoE, dict[str, torch.Tensor]]:
    """The MoE, out of torch.compile's wrapper, and its parameters and buffers by name; ConfigError where it can't be
    written."""
    from ..moe import MoE

    inner = getattr(layer, "_orig_mod", layer)
    if not isinstance(inner, MoE):
        kind = type(inner).__name__
        raise ConfigError(f"layer must be a fastmoe_cpp.MoE, got {kind}", expected="MoE", found=kind)
    state = inner.state_dict(keep_vars=True)
    for entry in layout_of("fastmoe_cpp").entries(inner.config):
        if entry.name not in state:
            # a parametrization keeps its weight under another name
            raise ConfigError(f"the layer's state_dict must hold {entry.name}, it has none", tensor=entry.name)
    for name, tensor in state.items():
        # copy_ to a meta tensor does nothing and raises nothing
        if tensor.is_meta:
            raise ConfigError(
                f"the layer's {name} must be on a real device, it is on meta: call to_empty(device=...) and "
                "reset_parameters() first",
                tensor=name, expected="a real device", found="meta",
            )  # fmt: skip
    return inner, state


def _layer_number(value: Any) -> int:
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise ConfigError(f"layer_index must be an integer, got {value!r:.60}", expected="an integer", found=value)
