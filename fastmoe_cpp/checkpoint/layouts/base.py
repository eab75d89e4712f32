"""What a layout is: a table of tensors, each made of a layer's parts.

Every layout names the same parts of a MoE layer, of E experts, hidden size H, expert size F and shared size S:

    router [E, H]   router_bias [E]   expert_bias [E]
    gate, up [F, H]   down [H, F]   gate_bias, up_bias [F]   down_bias [H]        of one expert
    shared_gate, shared_up [S, H]   shared_down [H, S]   shared_scale [1, H]      shared_scale: the shared experts' gate

An ungated expert has up and no gate. A table says which tensor holds which parts and how; shapes, reading and writing
follow from it, so that a new layout is a table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...config import MoEConfig

#: How a tensor holds its part of the experts: once a layer, one tensor an expert, stacked [E, ...], or rows one under
#: the other [E * rows, ...].
LAYER, EXPERT, STACK, FLAT = "layer", "expert", "stack", "flat"
EXPERT_PARTS = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")


@dataclass(frozen=True)
class Entry:
    """A tensor of a layout: its name below the layer's prefix ('{e}' for the expert) and the parts in it.

    Two parts lie one under the other, or row by row in turn where interleaved. transposed: stored as [in, out].
    leading: with a first dimension of 1.
    """

    name: str
    parts: tuple[str, ...]
    over: str = LAYER
    transposed: bool = False
    interleaved: bool = False
    leading: bool = False

    def rows(self, config: MoEConfig) -> int:
        """Rows of its parts together, before transposing."""
        return sum(part_shape(part, config)[0] for part in self.parts)

    def slice_shape(self, config: MoEConfig) -> tuple[int, ...]:
        """Of one expert, as stored."""
        shape = (self.rows(config), *part_shape(self.parts[0], config)[1:])
        return shape[::-1] if self.transposed else shape

    def shape(self, config: MoEConfig) -> tuple[int, ...]:
        """Of the stored tensor."""
        one = self.slice_shape(config)
        if self.over == STACK:
            return (config.num_experts, *one)
        if self.over == FLAT:
            return (config.num_experts * one[0], *one[1:])
        return (1, *one) if self.leading else one

    def names(self, config: MoEConfig) -> list[str]:
        """Its tensors' names below the layer's prefix: one, or one an expert."""
        if self.over != EXPERT:
            return [self.name]
        return [self.name.format(e=e) for e in range(config.num_experts)]


def part_shape(part: str, config: MoEConfig) -> tuple[int, ...]:
    """[rows, columns], or [rows] of a bias."""
    experts, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size
    shared = config.shared_intermediate_size or 0
    return {
        "router": (experts, hidden), "router_bias": (experts,), "expert_bias": (experts,),
        "gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner),
        "gate_bias": (inner,), "up_bias": (inner,), "down_bias": (hidden,),
        "shared_gate": (shared, hidden), "shared_up": (shared, hidden), "shared_down": (hidden, shared),
        "shared_scale": (1, hidden),
    }[part]  # fmt: skip


def parts_of(config: MoEConfig) -> set[str]:
    """The parts a layer of this configuration has."""
    parts = {"router", "up", "down"}
    if config.gated:
        parts |= {"gate"}
    if config.bias:
        parts |= {"up_bias", "down_bias"} | ({"gate_bias"} if config.gated else set())
    if config.router.bias:
        parts |= {"router_bias"}
    if config.router.expert_bias:
        parts |= {"expert_bias"}
    if config.shared_intermediate_size is not None:
        parts |= {"shared_up", "shared_down"} | ({"shared_gate"} if config.gated else set())
    if config.shared_expert_gate:
        parts |= {"shared_scale"}
    return parts


class Layout:
    """A way to store MoE layers. Subclasses give the table and say what they can't hold."""

    #: As typed after --to.
    name: str
    #: One line for people.
    title: str
    #: Where layer N's tensors begin, with '{layer}'.
    prefix: str = "model.layers.{layer}."
    #: The module under the prefix that is the MoE layer; every tensor in it must be in the table.
    block: str = "mlp."
    #: The router's weight below the prefix: what a MoE layer is found by.
    anchor: str
    #: model_type of the transformers configuration, None for layouts that no transformers model has.
    family: str | None = None
    #: Ends of names in the block that hold no weights and are left behind.
    ignored: tuple[str, ...] = ()

    def entries(self, config: MoEConfig) -> tuple[Entry, ...]:
        """The table for a layer of this configuration."""
        raise NotImplementedError

    def refusals(self, config: MoEConfig) -> list[str]:
        """What of this configuration the layout can't hold, a few words each."""
        held = {part for entry in self.entries(config) for part in entry.parts}
        words = {
            "router_bias": "a bias of the router's logits", "expert_bias": "a selection bias (expert_bias)",
            "gate": "gated experts", "gate_bias": "biases of the experts", "up_bias": "biases of the experts",
            "down_bias": "biases of the experts", "shared_up": "shared experts", "shared_gate": "gated shared experts",
            "shared_down": "shared experts", "shared_scale": "a gate of the shared experts",
        }  # fmt: skip
        missing = parts_of(config) - held
        return sorted({words.get(part, part) for part in missing})

    def host_arguments(self, config: MoEConfig) -> dict[str, Any]:
        """The host's own names for what the weights don't say; empty where config.json is the host's own."""
        return {}

    def matches(self, names: set[str]) -> bool:
        """Whether these names, below a layer's prefix, are this layout's spelling rather than its sibling's."""
        return self.anchor in names


def routing_refusals(config: MoEConfig, **allowed: Any) -> list[str]:
    """What differs from a plain top-k router: the fields of RouterConfig and MoEConfig that the host has no place for.

    allowed gives the values a field may have; every other field must be as its default says.
    """
    plain = {
        "score_function": ("softmax",), "renormalize": (True, False), "scaling_factor": (1.0,), "num_groups": (1,),
        "sinkhorn": (False,), "weight_on_input": (False,), "activation": ("swiglu",),
    }  # fmt: skip
    refused = []
    for field, values in (plain | allowed).items():
        owner = config.router if hasattr(config.router, field) else config
        value = getattr(owner, field)
        if values is not None and value not in values:
            refused.append(f"{field} = {value!r}")
    return refused


def effective_renormalize(config: MoEConfig) -> bool:
    """Whether the K weights sum to 1: renormalised, or a softmax over the chosen alone, which is the same numbers."""
    after = config.router.scores_after_topk and config.router.score_function == "softmax"
    return config.router.renormalize or after


def chooses_alike(config: MoEConfig) -> bool:
    """Whether logits and their softmax choose the same experts: not with a bias added to either, nor by sums of two."""
    router = config.router
    return not router.expert_bias and (router.num_groups == 1 or router.group_score == "max")


def config_to_json(config: MoEConfig) -> dict[str, Any]:
    """MoEConfig as JSON: nested, dtypes by name."""
    import dataclasses

    fields = dataclasses.asdict(config)
    fields["router"]["dtype"] = str(config.router.dtype).removeprefix("torch.")
    return fields


def config_from_json(fields: Mapping[str, Any]) -> MoEConfig:
    """The MoEConfig of config_to_json, or ValueError or TypeError of its constructor."""
    import torch

    from ...config import RouterConfig

    router = dict(fields.get("router", {}))
    if "dtype" in router:
        router["dtype"] = getattr(torch, str(router["dtype"]), router["dtype"])
    return MoEConfig(**{**fields, "router": RouterConfig(**router)})
