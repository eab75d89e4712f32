"""Megatron-LM v3.0.2: FastMoE's functions for it, on fastmoe_cpp's layers.

As v2.5; the host has a ``--num-experts`` and a SwitchMLP of its own, which the layers replace.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from fastmoe_cpp import MoEConfig

from . import arguments
from .megatron_lm import install as _install
from .megatron_lm import layer as _layer
from .megatron_lm import model as _model
from .megatron_lm import schedule as _schedule
from .megatron_lm.checkpoint import checkpoint_name, load_checkpoint, save_checkpoint
from .megatron_lm.data_parallel import DistributedDataParallel
from .megatron_lm.gradients import clip_grad_norm, grad_norm, prepare_optimizer
from .megatron_lm.model import add_arguments

#: FastMoE's name of it.
add_fmoe_args = add_arguments

VERSION = "3.0.2"

__all__ = [
    "VERSION",
    "DistributedDataParallel",
    "MegatronMLP",
    "add_arguments",
    "add_balance_log",
    "add_fmoe_args",
    "checkpoint_name",
    "clip_grad_norm",
    "fmoefy",
    "grad_norm",
    "install",
    "load_checkpoint",
    "moe_config",
    "moe_layers",
    "patch_forward_step",
    "patch_model_provider",
    "prepare_optimizer",
    "save_checkpoint",
]


def moe_config(args: argparse.Namespace | Any) -> MoEConfig:
    """The MoEConfig of the host's args.

    num_experts counts all workers' experts, intermediate_size is of one tensor-parallel rank. The router is that of
    ``--balance-strategy`` None and naive; of the other gates it has the selection and the balance loss where MoEConfig
    has them, and not their noise and random drops. Raises ArgumentError, one sentence with the argument, for what is
    missing, contradictory or not honoured.
    """
    return arguments.megatron_lm_config(args, VERSION)


class MegatronMLP(_layer.MegatronMLP):
    __doc__ = _layer.MegatronMLP.__doc__
    version = VERSION


def moe_layers(model: Any) -> list[MegatronMLP]:
    """The MoE layers of a model, in order."""
    return _model.moe_layers(model, VERSION)


def fmoefy(
    model: Any,
    fmoe_num_experts: int | None = None,
    distributed_experts: bool | None = True,
    hidden_hidden_size: int | None = None,
    top_k: int | None = None,
    gate: type[nn.Module] | None = None,
    megatron_version: str | None = None,
    *,
    args: argparse.Namespace | Any = None,
) -> Any:
    """Puts a MegatronMLP into every transformer layer of a model; the model.

    The layers are language_model.encoder.layers, and .decoder.layers where there is a decoder.
    What is given is written to the host's args (args, by default the running host's) and what is None is taken from
    there: experts a worker, whether data-parallel ranks hold experts of their own, the experts' inner width on one
    tensor-parallel rank, experts a token. gate is a gate class instead of a ``--balance-strategy``.
    """
    _model.check_version(VERSION, megatron_version)
    return _model.fmoefy(
        MegatronMLP,
        model,
        _model.host.get_args() if args is None else args,
        fmoe_num_experts=fmoe_num_experts,
        distributed_experts=distributed_experts,
        hidden_hidden_size=hidden_hidden_size,
        top_k=top_k,
        gate=gate,
    )


def patch_model_provider(
    model_provider: Callable[..., Any], gate: type[nn.Module] | None = None, Megatron_Version: str | None = None
) -> Callable[..., Any]:
    """model_provider(pre_process, post_process), its model with MoE layers, by the host's args when it is called.

    With ``--fmoefy`` among the host's arguments and not given, the model stays as it is.
    """
    _model.check_version(VERSION, Megatron_Version)
    return _model.patch_model_provider(MegatronMLP, model_provider, gate)


def patch_forward_step(
    forward_step_func: Callable[..., Any], Megatron_Version: str | None = None
) -> Callable[..., Any]:
    """forward_step(data_iterator, model), which always returns (output, loss_func, balance loss).

    loss_func's loss and what it logs have the balance loss in them. Its gradient reaches every router once, on every
    pipeline stage, at the scale of the training loss; the third value, for schedules patched by FastMoE, is a scalar
    whose gradient goes nowhere. The host's own schedules unpack two values: ``install()`` gives them the first two.
    """
    _model.check_version(VERSION, Megatron_Version)
    return _schedule.patch_v2_5(forward_step_func, VERSION)


def add_balance_log(model: Any, writer: Any, iteration: int) -> None:
    """Every layer's weighted balance loss of the last pass, averaged over data-parallel ranks, to a tensorboard writer.

    Every rank calls it; writer is None on those that write nothing.
    """
    _schedule.add_balance_log(model, writer, iteration, VERSION)


def install() -> Callable[[], None]:
    """Puts the adapter into the running host, whose sources stay as they are; a function that takes it out again.

    ``pretrain`` adds the adapter's arguments and patches the model provider and forward_step it is given. The local
    DistributedDataParallel, gradient clipping, save_checkpoint and load_checkpoint are the adapter's, and optimizers
    are prepared for experts when they are built. ``schedules.forward_step`` takes functions
    that return three values. Call it once, before the script imports ``pretrain``.
    """
    return _install.install(sys.modules[__name__])
