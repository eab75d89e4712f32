"""The layer over several ranks, on torch.distributed."""

from ..groups import ExchangeError
from .checkpoint import export_safetensors, load_checkpoint, save_checkpoint
from .exchange import all_to_all_rows, exchange_counts
from .gradients import average_gradients, clip_grad_norm_, grad_norm, parameter_groups
from .style import ExpertParallel, ExpertTensorParallel

__all__ = [
    "ExchangeError",
    "ExpertParallel",
    "ExpertTensorParallel",
    "all_to_all_rows",
    "average_gradients",
    "clip_grad_norm_",
    "exchange_counts",
    "export_safetensors",
    "grad_norm",
    "load_checkpoint",
    "parameter_groups",
    "save_checkpoint",
]
