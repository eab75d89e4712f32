"""What hostile tests share: a checkpoint that must be refused everywhere, and values that JSON may hold."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import strategies as st

from fastmoe_cpp import MoE
from fastmoe_cpp.checkpoint import Checkpoint, CheckpointError, convert, load_moe

from . import make

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 40) | st.sampled_from(["F32", "BF16", "U8", "", "x"]) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def refused(source: Path, error: type[CheckpointError], words: str, **options) -> CheckpointError:
    """convert and load_moe raise this; no folder appears and no weight changes."""
    target = source.parent / "out" / "target"
    with pytest.raises(error, match=words) as caught:
        convert(source, target, "fastmoe_cpp", **options)
    assert not target.exists() and not list(target.parent.glob(".*"))
    opened = Checkpoint(make.checkpoint(source.parent / "whole", "qwen3_moe"))
    layer = MoE(opened.moe)
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    with pytest.raises(error):
        load_moe(layer, source, 1, **options)
    make.same_bits(layer.state_dict(), before)
    return caught.value
