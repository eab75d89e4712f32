"""gpt-oss in 16 or 32 bits: transposed weights, gate and up columns in turn, biases everywhere."""

from __future__ import annotations

from ...config import MoEConfig
from .base import STACK, Entry, Layout


class GptOss(Layout):
    name = "gpt_oss"
    title = "gpt-oss, unquantised: mlp.experts.gate_up_proj [E, H, 2F] with gate and up in turn, biases"
    family = "gpt_oss"
    anchor = "mlp.router.weight"

    def entries(self, config: MoEConfig) -> tuple[Entry, ...]:
        """gate_up_proj [E, H, 2F], down_proj [E, F, H] and their biases."""
        both = ("gate", "up")
        return (
            Entry("mlp.router.weight", ("router",)),
            Entry("mlp.router.bias", ("router_bias",)),
            Entry("mlp.experts.gate_up_proj", both, STACK, transposed=True, interleaved=True),
            Entry("mlp.experts.gate_up_proj_bias", ("gate_bias", "up_bias"), STACK, interleaved=True),
            Entry("mlp.experts.down_proj", ("down",), STACK, transposed=True),
            Entry("mlp.experts.down_proj_bias", ("down_bias",), STACK),
        )
