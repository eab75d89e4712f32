"""The example's train.py: ours is installed before the host builds its model."""

import runpy
import sys
from pathlib import Path

import pytest

from megatron_adapters import gpt_neox

from . import small

SCRIPT = Path(__file__).parents[3] / "examples" / "gpt_neox" / "train.py"


@pytest.mark.parametrize("name, kind", [("now", "ParallelDroplessMoE"), ("moe_loss", "MoEWithLoss")])
def test_train(name, kind, monkeypatch):
    built = []
    with small.host(name):
        args = small.arguments(moe_num_experts=4, num_experts=4, moe_expert_interval=1, expert_interval=1)
        for step in ("configure_distributed_args", "build_tokenizer", "initialize_tensorboard_writer"):
            setattr(args, step, lambda: None)
        given = []
        neox_args = sys.modules["megatron.neox_arguments"].NeoXArgs
        neox_args.consume_neox_args = staticmethod(lambda **options: given.append(options) or args)
        sys.modules["megatron.training"].pretrain = lambda neox_args: built.append(small.layer(neox_args))
        monkeypatch.setattr(sys, "path", list(sys.path))
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert given == [{"input_args": None, "overwrite_values": None}]
    assert type(built[0].mlp).__name__ == kind and isinstance(built[0].mlp, getattr(gpt_neox, kind))
