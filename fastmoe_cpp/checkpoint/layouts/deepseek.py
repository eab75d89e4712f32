"""DeepSeek: version 1 (softmax router) and version 3 (sigmoid router with a selection bias and groups)."""

from __future__ import annotations

from ...config import MoEConfig
from .base import Entry
from .qwen import PerExpertOrPacked, experts, shared


class DeepSeek(PerExpertOrPacked):
    family, model = "deepseek", "DeepSeek version 1"

    def entries(self, config: MoEConfig) -> tuple[Entry, ...]:
        """Shared experts where configured, without a gate."""
        with_shared = shared("shared_experts") if config.shared_intermediate_size is not None else ()
        return (*experts(self.packed), *with_shared)


class DeepSeekV3(DeepSeek):
    family, model = "deepseek_v3", "DeepSeek-V3"

    def entries(self, config: MoEConfig) -> tuple[Entry, ...]:
        """With the selection bias."""
        return (*super().entries(config), Entry("mlp.gate.e_score_correction_bias", ("expert_bias",)))
