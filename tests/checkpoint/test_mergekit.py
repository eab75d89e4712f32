"""The shared gates that MergeKit leaves out, made by hand: [0, H], [H], and what is neither."""

from __future__ import annotations

import logging

import pytest
import torch

from fastmoe_cpp import MoE
from fastmoe_cpp.checkpoint import Checkpoint, ShapeError, convert, inspect, load_moe

from . import make

NAME = "model.layers.1.mlp.shared_expert_gate.weight"


def with_gate(folder, gate: torch.Tensor):
    source = make.checkpoint(folder, "qwen2_moe")
    return make.write(source, {**make.read(source), NAME: gate}, make.CONFIGS["qwen2_moe"])


def test_no_row(tmp_path, caplog):
    source = with_gate(tmp_path / "source", torch.zeros(0, make.H, dtype=torch.bfloat16))
    layer = MoE(Checkpoint(source).moe, dtype=torch.bfloat16)
    before = {n: t.clone() for n, t in layer.state_dict().items()}
    with pytest.raises(
        ShapeError, match=rf"{NAME} must have shape \[1, 6\], it has \[0, 6\]: mergekit-moe up to 0.0.6"
    ):
        load_moe(layer, source, 1)
    make.same_bits(layer.state_dict(), before)
    load_moe(layer, source, 0)  # the layer before is whole
    with pytest.raises(ShapeError, match="draw the row anew with --repair-shared-gate"):
        convert(source, tmp_path / "out", "qwen2_moe")
    assert [p.found for p in inspect(source).all_problems] == [(0, 6)]

    with caplog.at_level(logging.WARNING, logger="fastmoe_cpp.checkpoint"):
        load_moe(layer, source, 1, repair_shared_gate=True, seed=5)
    assert [NAME in record.getMessage() for record in caplog.records] == [True]
    gate = layer.shared_experts.gate
    assert gate.shape == (1, 6) and 0 < float(gate.abs().max()) < 0.2
    for name in ("a", "b"):
        convert(source, tmp_path / name, "qwen2_moe", repair_shared_gate=True, seed=5)
    mended = make.read(tmp_path / "a")
    make.same_bits(mended, make.read(tmp_path / "b"))
    assert torch.equal(mended[NAME], gate) and mended[NAME].dtype == torch.bfloat16


def test_one_dimension(tmp_path):
    """[H] holds every value: it is taken as [1, H], and said."""
    gate = torch.randn(make.H).bfloat16()
    source = with_gate(tmp_path / "source", gate)
    opened = Checkpoint(source)
    assert opened.notes == [f"{NAME} has shape [6] and is taken as [1, 6]"]
    layer = MoE(opened.moe, dtype=torch.bfloat16)
    load_moe(layer, opened, 1)
    assert torch.equal(layer.shared_experts.gate, gate[None])
    done = convert(source, tmp_path / "out", "qwen2_moe")
    assert done.notes == (f"{NAME} has shape [6] and is taken as [1, 6]",)
    assert torch.equal(make.read(tmp_path / "out")[NAME], gate[None])


@pytest.mark.parametrize("shape", [(2, 6), (1, 5), (0, 5), (6, 1), (1, 1, 6), (0,), (5,)])
def test_every_other_shape_is_an_error(tmp_path, shape):
    source = with_gate(tmp_path / "source", torch.zeros(shape, dtype=torch.bfloat16))
    for repair in (False, True):
        with pytest.raises(ShapeError, match=rf"{NAME} must have shape \[1, 6\], it has"):
            convert(source, tmp_path / "out", "qwen2_moe", repair_shared_gate=repair)
