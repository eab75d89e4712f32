"""Megatron-Core's own MoE layer, built from the arguments and loaded with the weights that convert() writes."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastmoe_cpp import MoE
from fastmoe_cpp.checkpoint import Checkpoint, convert, load_moe

from . import make

if os.environ.get("FASTMOE_CPP_HOST") != "megatron-core":
    pytest.skip("needs megatron-core in an environment of its own: make test-hosts", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "adapters"))
from megatron_core import host  # noqa: E402  the tests of the adapter: one process, no GPU
from megatron_core.conftest import one_rank  # noqa: E402, F401

KINDS = [kind for kind, layouts in make.HOLDERS.items() if "megatron_sequential" in layouts]


FUNCTIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh")}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_its_layer_takes_what_we_write(kind, tmp_path):
    tensors = {}
    for n in range(2):
        tensors |= make.layer_tensors(kind, kind, make.parts(kind, n, torch.float32), n)
    source = make.write(tmp_path / "source", tensors, make.CONFIGS[kind])
    convert(source, tmp_path / "megatron", "megatron_sequential")
    arguments = dict(Checkpoint(tmp_path / "megatron").own["host"])
    if arguments["activation_func"] == "quick_gelu":
        from megatron.core.fusions.fused_bias_geglu import quick_gelu

        arguments["activation_func"] = quick_gelu
    else:
        arguments["activation_func"] = FUNCTIONS[arguments["activation_func"]]
    config = host.config(hidden_size=make.H, **arguments)
    theirs = host.host_layer(config).eval()
    prefix = "decoder.layers.1.mlp."
    found = make.read(tmp_path / "megatron")
    report = theirs.load_state_dict(
        {n.removeprefix(prefix): t for n, t in found.items() if n.startswith(prefix)}, strict=False
    )
    assert not report.unexpected_keys and not [n for n in report.missing_keys if not n.endswith("_extra_state")]

    ours = MoE(Checkpoint(source).moe)
    load_moe(ours, source, 1)
    x = torch.randn(5, 3, make.H)
    expected = theirs(x)[0]
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5 * float(expected.square().mean().sqrt()))
