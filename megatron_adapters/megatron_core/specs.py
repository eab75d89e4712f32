"""Layer specs of Megatron-Core with our layer, or our parts, in them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from .experts import GroupedExperts
from .layer import FastMoELayer, moe_submodules
from .router import TopKRouter


def use_fastmoe_cpp(spec: Any, *, parts_only: bool = False) -> Any:
    """The spec with FastMoELayer wherever it has the host's MoELayer; the given spec is not changed.

    spec is what Megatron-Core's spec functions return: of a layer (ModuleSpec), of a block of layers
    (TransformerBlockSubmodules, for dense and MoE layers in turn), a layer's submodules, or an mlp. parts_only keeps
    the host's MoELayer with its dispatcher and replaces its experts and router alone.
    Raises ValueError where there is no MoELayer in the spec.
    """
    replaced, count = _replace(spec, parts_only)
    if count == 0:
        raise ValueError(
            "spec must hold a MoELayer (num_experts given to Megatron-Core's spec function), found none in "
            f"{spec!r:.200}"
        )
    return replaced


def install() -> Callable[[], None]:
    """From now on every spec that Megatron-Core's spec functions make for a GPT holds FastMoELayer: for scripts whose
    specs are out of reach. Returns a function that undoes it, for specs made afterwards."""
    from megatron.core.models.gpt import moe_module_specs

    moe_module_specs.MoELayer = FastMoELayer

    def undo() -> None:
        moe_module_specs.MoELayer = MoELayer

    return undo


def _replace(spec: Any, parts_only: bool) -> tuple[Any, int]:
    if isinstance(spec, functools.partial) and spec.func is MoELayer:
        target = MoELayer if parts_only else FastMoELayer
        keywords = spec.keywords | {"submodules": _parts(spec.keywords.get("submodules"))}
        return functools.partial(target, *spec.args, **keywords), 1
    if isinstance(spec, ModuleSpec) and spec.module is MoELayer:
        target = MoELayer if parts_only else FastMoELayer
        return dataclasses.replace(spec, module=target, submodules=_parts(spec.submodules)), 1
    if isinstance(spec, ModuleSpec) and spec.submodules is not None:
        submodules, count = _replace(spec.submodules, parts_only)
        return dataclasses.replace(spec, submodules=submodules), count
    if isinstance(spec, list):
        pairs = [_replace(item, parts_only) for item in spec]
        return [item for item, _ in pairs], sum(count for _, count in pairs)
    if dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        changed, count = {}, 0
        for name in ("layer_specs", "mlp"):
            if getattr(spec, name, None) is not None:
                changed[name], found = _replace(getattr(spec, name), parts_only)
                count += found
        return dataclasses.replace(spec, **changed), count
    return spec, 0


def _parts(submodules: MoESubmodules | None) -> MoESubmodules:
    if submodules is None:
        return moe_submodules()
    return dataclasses.replace(submodules, experts=GroupedExperts, router=TopKRouter)
