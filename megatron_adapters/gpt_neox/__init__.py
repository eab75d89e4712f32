"""GPT-NeoX: our layer in the place of its MoE layers, in both of its eras.

======================  ================================================================================================
``ERA_NOW``             since MoE losses were removed: ``ParallelDroplessMoE`` returns ``(output, None)``
``ERA_MOE_LOSS``        before: DeepSpeed's MoE returns ``(output, moe_loss, expert_counts)``, a layer
                        ``(output, moe_loss)``
======================  ================================================================================================

In the host's train.py, before anything of ``megatron`` builds a model::

    from megatron_adapters import gpt_neox
    gpt_neox.install()    # the era of the checkout, or gpt_neox.install("now"), gpt_neox.install("moe_loss")
"""

from __future__ import annotations

from .arguments import ERA_MOE_LOSS, ERA_NOW, ERAS, TABLES, check, expert_width, moe_config
from .block import parallel_residual
from .dropless import ParallelDroplessMoE
from .install import detect_era, install, watched
from .with_loss import MoEWithLoss

__all__ = [
    "ERAS",
    "ERA_MOE_LOSS",
    "ERA_NOW",
    "TABLES",
    "MoEWithLoss",
    "ParallelDroplessMoE",
    "check",
    "detect_era",
    "expert_width",
    "install",
    "moe_config",
    "parallel_residual",
    "watched",
]
