"""A small host with Megatron-LM's contracts: the modules, names, signatures and tuples that the adapters rely on.

MEGATRON_STAND_IN names the version it stands in for: 2.2, 2.5 or 3.0.2. One transformer layer is a causal mean and an
MLP; data and pipeline parallelism are the host's, tensor parallelism is for the MLP's replacement alone.
"""

import os

VERSION = os.environ["MEGATRON_STAND_IN"]

from .global_vars import get_args, get_num_microbatches, get_timers  # noqa: E402, F401
