# ruff: noqa: E402
"""docs/hosts/transformers.md says what the installed transformers and our tables say."""

import re
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")

from fastmoe_cpp.integrations.transformers import MAJOR, blocks

from . import decorated

PAGE = (Path(__file__).parents[3] / "docs/hosts/transformers.md").read_text()


def test_the_number_of_classes():
    count, release = re.search(r"`@use_experts_implementation`: (\d+) in (\d+\.\d+)", PAGE).groups()
    if not transformers.__version__.startswith(f"{release}."):
        pytest.skip(f"the page counts those of {release}")
    assert int(count) == len(decorated.classes())


def test_the_table_of_blocks():
    """A row for each family that transformers 4 is served for, no other, and whether it returns router logits."""
    rows = re.findall(r"^\| [\w-]+ \| `(\w+)` \| hidden states(, router logits)? \|$", PAGE, re.MULTILINE)
    assert {block for block, _ in rows} == {family.block for family in blocks.FAMILIES}
    assert [block for block, logits in rows if not logits] == ["DeepseekV3MoE"]


@pytest.mark.skipif(MAJOR < 5, reason="transformers 4 has no registry")
def test_the_fused_activations():
    from fastmoe_cpp.integrations.transformers import activation

    assert {"silu", "gelu", "gelu_tanh", "relu"} == set(activation.GATED)
    assert "SwiGLU, GEGLU, ReGLU, gpt-oss's clamped SwiGLU" in PAGE
