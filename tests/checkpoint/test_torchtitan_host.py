"""TorchTitan 0.2's own MoE module, built from the arguments and loaded with the weights that convert() writes."""

from __future__ import annotations

import os

import pytest
import torch

from fastmoe_cpp import MoE
from fastmoe_cpp.checkpoint import Checkpoint, convert, load_moe

from . import make

if os.environ.get("FASTMOE_CPP_HOST") != "torchtitan-0.2":
    pytest.skip("needs torchtitan 0.2 in an environment of its own: make test-hosts", allow_module_level=True)
from torchtitan.models import moe as host

KINDS = [kind for kind, layouts in make.HOLDERS.items() if "torchtitan" in layouts]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_its_module_takes_what_we_write(kind, tmp_path, monkeypatch):
    # TorchTitan counts integers with torch.histc, which torch has for GPUs alone
    monkeypatch.setattr(torch, "histc", lambda ids, bins, min, max: torch.bincount(ids.flatten(), minlength=bins))
    tensors = {}
    for n in range(2):
        tensors |= make.layer_tensors(kind, kind, make.parts(kind, n, torch.float32), n)
    source = make.write(tmp_path / "source", tensors, make.CONFIGS[kind])
    convert(source, tmp_path / "titan", "torchtitan")
    arguments = Checkpoint(tmp_path / "titan").own["host"]
    theirs = host.MoE(host.MoEArgs(**arguments, use_grouped_mm=False), make.H, make.F)
    prefix = "layers.1.moe."
    found = make.read(tmp_path / "titan")
    theirs.load_state_dict({n.removeprefix(prefix): t for n, t in found.items() if n.startswith(prefix)})

    ours = MoE(Checkpoint(source).moe)
    load_moe(ours, source, 1)
    x = torch.randn(3, 7, make.H)
    expected = theirs(x)
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5 * float(expected.square().mean().sqrt()))
