"""Megatron-LM v3.0.2: FastMoE's functions for it, on fastmoe_cpp's layers.

As v2.5; the host has a ``--num-experts`` and a SwitchMLP of its own, which the layers replace.
"""

from __future__ import annotations

from .megatron_lm.adapter import Adapter
from .megatron_lm.checkpoint import checkpoint_name, load_checkpoint, save_checkpoint
from .megatron_lm.data_parallel import DistributedDataParallel
from .megatron_lm.gradients import clip_grad_norm, grad_norm, prepare_optimizer
from .megatron_lm.layer import MegatronMLP as _MegatronMLP
from .megatron_lm.model import add_arguments

VERSION = "3.0.2"

__all__ = [
    "VERSION", "DistributedDataParallel", "MegatronMLP", "add_arguments", "add_balance_log", "add_fmoe_args",
    "checkpoint_name", "clip_grad_norm", "fmoefy", "grad_norm", "install", "load_checkpoint", "moe_config",
    "moe_layers", "patch_forward_step", "patch_model_provider", "prepare_optimizer", "save_checkpoint",
]  # fmt: skip


class MegatronMLP(_MegatronMLP):
    __doc__ = _MegatronMLP.__doc__
    version = VERSION


_adapter = Adapter(MegatronMLP)
add_balance_log = _adapter.add_balance_log
fmoefy = _adapter.fmoefy
install = _adapter.install
moe_config = _adapter.moe_config
moe_layers = _adapter.moe_layers
patch_forward_step = _adapter.patch_forward_step
patch_model_provider = _adapter.patch_model_provider
#: FastMoE's name of it.
add_fmoe_args = add_arguments
