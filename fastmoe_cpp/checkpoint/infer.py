"""The configuration of weights that come without one: sizes from their shapes, the rest from what the caller gives."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from ..config import ACTIVATIONS, GATED_ACTIVATIONS, MoEConfig, RouterConfig
from .errors import ConfigError
from .layouts.base import EXPERT, FLAT, STACK, Entry, Layout, config_from_json, parts_of

Shapes = Mapping[str, tuple[int, ...]]


def check_fields(given: Mapping[str, Any], where: str) -> None:
    """ConfigError for a key that is no field of MoEConfig, or of RouterConfig under router; where names the JSON."""
    router = given.get("router", {})
    if not isinstance(router, Mapping):
        raise ConfigError(f"{where}: router must be an object of RouterConfig's fields, got {router!r:.60}")
    for prefix, kind, fields in (("", MoEConfig, given), ("router.", RouterConfig, router)):
        known = tuple(field.name for field in dataclasses.fields(kind))
        for name in fields:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, 1)
                hint = f"did you mean {close[0]}?" if close else f"the fields are {', '.join(known)}"
                raise ConfigError(
                    f"{where}: without model_type every key must be a field of {kind.__name__}, got "
                    f"{prefix}{name!s:.60} ({hint})", expected=known, found=name,
                )  # fmt: skip


def infer(layout: Layout, shapes: Shapes, given: Mapping[str, Any], where: str, source: str) -> MoEConfig:
    """The MoEConfig whose table in this layout has exactly these tensors, with the given fields of MoEConfig.

    top_k and activation can't be seen in weights and must be given. where names the weights, source what is given.
    """
    for field in ("top_k", "activation"):
        if field not in given and given:
            raise ConfigError(f"{source}: {field} must be among the fields, it can't be read from weights")
        if field not in given:
            raise ConfigError(
                f"{where}: {field} can't be read from weights: give the configuration (--config), as config.json of a "
                "transformers model or as JSON of MoEConfig's fields, such as {\"top_k\": 2, \"activation\": \"gelu\"}"
            )  # fmt: skip
    if given["activation"] not in ACTIVATIONS:
        raise ConfigError(
            f"{source}: activation must be one of {', '.join(ACTIVATIONS)}, got {given['activation']!r:.60}",
            expected=tuple(ACTIVATIONS), found=given["activation"],
        )  # fmt: skip
    found = [sizes for sizes in candidates(layout, shapes, given["activation"] in GATED_ACTIVATIONS)]
    if not found:
        raise ConfigError(f"{where}: the tensors of a layer fit no configuration of the layout {layout.name}")
    router = {**found[0].pop("router"), **given.get("router", {})}
    try:
        return config_from_json({**found[0], **given, "router": router})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source}: {error}") from None


def candidates(layout: Layout, shapes: Shapes, gated: bool) -> Iterator[dict[str, Any]]:
    """The sizes and flags of MoEConfig with which a layer in this layout has exactly tensors of these names."""
    experts, hidden = shapes[layout.anchor][:2] if len(shapes[layout.anchor]) == 2 else (0, 0)
    names = {name for name in shapes if not layout.ignored or not name.endswith(layout.ignored)}
    activation = "swiglu" if gated else "gelu"
    for bias, shared, scale, router_bias, expert_bias in itertools.product((False, True), repeat=5):
        if scale and not shared:
            continue
        fields: dict[str, Any] = {
            "hidden_size": hidden, "intermediate_size": 1, "num_experts": experts, "bias": bias,
            "shared_intermediate_size": 1 if shared else None, "shared_expert_gate": scale,
        }  # fmt: skip
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                trial = MoEConfig(
                    **fields, top_k=1, activation=activation,
                    router=RouterConfig(bias=router_bias, expert_bias=expert_bias),
                )  # fmt: skip
        except ValueError:
            return
        table = layout.entries(trial)
        if {name for entry in table for name in entry.names(trial)} != names:
            continue
        by_part = {part: entry for entry in table for part in entry.parts}
        if set(by_part) != parts_of(trial):
            continue
        try:
            fields["intermediate_size"] = _inner(by_part["down"], shapes, experts)
            if shared:
                fields["shared_intermediate_size"] = shapes[by_part["shared_down"].name][-1]
        except IndexError:  # a tensor of fewer dimensions than any weight has
            continue
        yield {**fields, "router": {"bias": router_bias, "expert_bias": expert_bias}}


def _inner(down: Entry, shapes: Shapes, experts: int) -> int:
    """The experts' size, from the down projection's shape."""
    shape = shapes[down.name.format(e=0) if down.over == EXPERT else down.name]
    if down.over == FLAT:
        return shape[0] // experts if down.transposed else shape[-1]
    if down.over == STACK or down.leading:
        shape = shape[1:]
    return shape[0] if down.transposed else shape[-1]
