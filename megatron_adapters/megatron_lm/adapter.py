"""The functions of a version's module, as methods of one object; the module adds the version and its layer."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from torch import nn

from fastmoe_cpp import MoEConfig

from .. import arguments
from . import data_parallel, host, schedule
from . import install as installing
from . import model as models
from .layer import MegatronMLP


class Adapter:
    """The functions for Megatron-LM v2.5 and later, with layers of the class mlp, whose version is theirs."""

    DistributedDataParallel: type[nn.Module] = data_parallel.DistributedDataParallel
    add_arguments = staticmethod(models.add_arguments)

    def __init__(self, mlp: type[MegatronMLP]) -> None:
        self.mlp = mlp
        self.version = mlp.version

    def moe_config(self, args: argparse.Namespace | Any) -> MoEConfig:
        """The MoEConfig of the host's args.

        num_experts counts all workers' experts, intermediate_size is of one tensor-parallel rank. The router is that of
        ``--balance-strategy`` None and naive; of the other gates it has the selection and the balance loss where
        MoEConfig has them, and not their noise and random drops. Raises ArgumentError, one sentence with the argument,
        for what is missing, contradictory or not honoured.
        """
        return arguments.megatron_lm_config(args, self.version)

    def moe_layers(self, model: Any) -> list[MegatronMLP]:
        """The MoE layers of a model, in order."""
        return models.moe_layers(model, self.version)

    def fmoefy(
        self,
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

        The layers are language_model.encoder.layers, and .decoder.layers where there is a decoder; v2.2's are
        language_model.transformer.layers. What is given is written to the host's args (args, by default the running
        host's) and what is None is taken from there: experts a worker, whether data-parallel ranks hold experts of
        their own, the experts' inner width on one tensor-parallel rank, experts a token. gate is a gate class instead
        of a ``--balance-strategy``.
        """
        models.check_version(self.version, megatron_version)
        return models.fmoefy(
            self.mlp,
            model,
            host.get_args() if args is None else args,
            fmoe_num_experts=fmoe_num_experts,
            distributed_experts=distributed_experts,
            hidden_hidden_size=hidden_hidden_size,
            top_k=top_k,
            gate=gate,
        )

    def patch_model_provider(
        self,
        model_provider: Callable[..., Any],
        gate: type[nn.Module] | None = None,
        Megatron_Version: str | None = None,
    ) -> Callable[..., Any]:
        """model_provider(pre_process, post_process), its model with MoE layers, by the host's args when it is called.

        v2.2's is called without arguments. With ``--fmoefy`` among the host's arguments and not given, the model stays
        as it is.
        """
        models.check_version(self.version, Megatron_Version)
        return models.patch_model_provider(self.mlp, model_provider, gate)

    def patch_forward_step(
        self, forward_step_func: Callable[..., Any], Megatron_Version: str | None = None
    ) -> Callable[..., Any]:
        """forward_step(data_iterator, model), which always returns (output, loss_func, balance loss).

        loss_func's loss and what it logs have the balance loss in them. Its gradient reaches every router once, on
        every pipeline stage, at the scale of the training loss; the third value, for schedules patched by FastMoE, is
        a scalar whose gradient goes nowhere. The host's own schedules unpack two values: ``install()`` gives them the
        first two.
        """
        models.check_version(self.version, Megatron_Version)
        return schedule.patch_v2_5(forward_step_func, self.version)

    def add_balance_log(self, model: Any, writer: Any, iteration: int) -> None:
        """Each layer's weighted balance loss of the last pass, the mean over data-parallel ranks, to a SummaryWriter.

        Every rank calls it; writer is None on those that write nothing.
        """
        schedule.add_balance_log(model, writer, iteration, self.version)

    def install(self) -> Callable[[], None]:
        """Puts the adapter into the running host, whose sources stay as they are; a function that takes it out again.

        ``pretrain`` adds the adapter's arguments and patches the model provider and forward_step it is given. The local
        DistributedDataParallel, gradient clipping, save_checkpoint and load_checkpoint are the adapter's, and
        optimizers are prepared for experts when they are built. From v2.5 on, ``schedules.forward_step`` takes
        functions that return three values. Call it once, before the script imports ``pretrain``.
        """
        return installing.install(self)


class AdapterV22(Adapter):
    """The functions for Megatron-LM v2.2."""

    DistributedDataParallel = data_parallel.DistributedDataParallelV22

    def patch_forward_step(
        self, forward_step_func: Callable[..., Any], Megatron_Version: str | None = None
    ) -> Callable[..., Any]:
        """forward_step(data_iterator, model, input_tensor), which returns what the host's returns.

        That is (loss, what it logs) on the last pipeline stage, both with the balance loss in them, and the output
        tensor on others. The balance loss's gradient reaches every router once, on every stage, at the scale of the
        training loss.
        """
        models.check_version(self.version, Megatron_Version)
        return schedule.patch_v2_2(forward_step_func, self.version)
