"""Models with MoE layers in place of their MLPs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

from torch import nn

from ..arguments import BALANCE_STRATEGIES, read_megatron_lm
from . import host
from .layer import MegatronMLP

#: Where the transformer layers are: attributes of model.language_model, the first of which must exist.
WALKS: dict[str, tuple[str, ...]] = {
    "2.2": ("transformer",),
    "2.5": ("encoder", "decoder"),
    "3.0.2": ("encoder", "decoder"),
}


def transformer_layers(model: Any, version: str) -> Iterator[nn.Module]:
    """The transformer layers of a model that have an MLP, in order; ValueError for a model of another version."""
    model = host.unwrap(model)
    language_model = getattr(model, "language_model", None)
    first, *others = WALKS[version]
    if not hasattr(language_model, first):
        found = type(model).__name__
        raise ValueError(
            f"model must be one of Megatron-LM v{version} with model.language_model.{first}.layers, {found} has none"
        )
    for name in (first, *others):
        transformer = getattr(language_model, name, None)  # None on a pipeline stage without it
        for layer in transformer.layers if transformer is not None else ():
            if hasattr(layer, "mlp"):
                yield layer


def moe_layers(model: Any, version: str) -> list[MegatronMLP]:
    """The MoE layers of a model, none where ``--fmoefy`` left it as it is."""
    model = host.unwrap(model)
    if isinstance(model, nn.Module):
        return [module for module in model.modules() if isinstance(module, MegatronMLP)]
    return [layer.mlp for layer in transformer_layers(model, version) if isinstance(layer.mlp, MegatronMLP)]


def check_version(version: str, given: str | None) -> None:
    """Raises ValueError where a caller names another version than the adapter's."""
    if given is not None and given.removeprefix("v") != version:
        raise ValueError(f"this is the adapter of Megatron-LM v{version}, got {given!r}: use get_adapter({given!r})")


def fmoefy(
    mlp: type[MegatronMLP],
    model: Any,
    args: Any,
    *,
    fmoe_num_experts: int | None,
    distributed_experts: bool | None,
    hidden_hidden_size: int | None,
    top_k: int | None,
    gate: type[nn.Module] | None,
) -> Any:
    """See the adapters' ``fmoefy``; what is given is written to args, as FastMoE does, and args are complete then."""
    version = mlp.version
    given = {
        "fmoe_num_experts": fmoe_num_experts, "distributed_experts": distributed_experts,
        "hidden_hidden_size": hidden_hidden_size, "top_k": top_k,
    }  # fmt: skip
    for name, value in given.items():
        if value is not None:
            setattr(args, name, value)
    values = read_megatron_lm(args, version)
    for name in ("fmoe_num_experts", "distributed_experts", "hidden_hidden_size", "top_k", "balance_strategy",
                 "balance_loss_weight"):  # fmt: skip
        setattr(args, name, values[name])
    layers = list(transformer_layers(model, version))
    stages = values.get("transformer_pipeline_model_parallel_size") or values["pipeline_model_parallel_size"]
    for index, layer in enumerate(layers):
        replaced = next(iter(layer.mlp.parameters()), None)
        layer.mlp = mlp(args, index, gate=gate)
        layer.mlp.balance_weight = float(values["balance_loss_weight"]) / (len(layers) * stages)
        layer.mlp.train(layer.training)
        if replaced is not None:
            layer.mlp.to(device=replaced.device, dtype=replaced.dtype)
    return model


def patch_model_provider(
    mlp: type[MegatronMLP], model_provider: Callable[..., Any], gate: type[nn.Module] | None
) -> Callable[..., Any]:
    """See the adapters' ``patch_model_provider``; arguments are passed on as they come."""

    if hasattr(model_provider, "fmoefied"):  # by the script itself, or by install()
        return model_provider

    @wraps(model_provider)
    def fmoefied_model_provider(*inputs: Any, **named: Any) -> Any:
        args = host.get_args()
        if getattr(args, "fmoefy", None) is False:
            return model_provider(*inputs, **named)
        # before the model is built: a wrong argument costs no time
        read_megatron_lm(args, mlp.version)
        return fmoefy(
            mlp,
            model_provider(*inputs, **named),
            args,
            fmoe_num_experts=None,
            distributed_experts=None,
            hidden_hidden_size=None,
            top_k=None,
            gate=gate,
        )

    fmoefied_model_provider.fmoefied = True  # type: ignore[attr-defined]
    return fmoefied_model_provider


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """FastMoE's arguments, added to the host's parser: ``--num-experts`` too where the host has none of its own."""
    if any("--fmoefy" in action.option_strings for action in parser._actions):  # they are there
        return parser
    group = parser.add_argument_group(title="fastmoe_cpp")
    group.add_argument("--fmoefy", action="store_true", help="replace the MLPs by MoE layers")
    group.add_argument("--fmoe-num-experts", type=int, default=None, help="experts of one worker")
    if not any("--num-experts" in action.option_strings for action in parser._actions):
        group.add_argument("--num-experts", type=int, default=None, help="the same as --fmoe-num-experts")
    group.add_argument("--top-k", type=int, default=2, help="experts a token goes to")
    group.add_argument("--balance-loss-weight", type=float, default=1.0, help="weight of the gate's balance loss")
    group.add_argument(
        "--balance-strategy", type=str, default=None, choices=BALANCE_STRATEGIES, help="the gate; by default naive"
    )
    group.add_argument(
        "--hidden-hidden-size", type=int, default=None,
        help="an expert's inner width on one tensor-parallel rank; by default the MLP's / top-k / tensor-parallel size",
    )  # fmt: skip
    return parser
