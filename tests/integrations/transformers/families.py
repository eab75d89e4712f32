"""A small model of each family from its own configuration class, its experts eager."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 48
EXPERTS = 6
# every size under every name a family has for it; a configuration gets those that it has
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 24, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16, "num_experts": EXPERTS,
    "num_local_experts": EXPERTS, "n_routed_experts": EXPERTS, "moe_num_experts": EXPERTS, "num_experts_per_tok": 2,
    "top_k": 2, "moe_topk": 2, "moe_k": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
    "num_shared_experts": 1, "first_k_dense_replace": 1, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.15,
}  # fmt: skip
_LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}  # fmt: skip
# what those sizes alone do not make small, or legal
OWN: dict[str, dict[str, Any]] = {
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT | {"n_routed_experts": 8, "n_group": 4, "topk_group": 2},
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe"], "q_lora_rank": 16, "o_groups": 4, "swiglu_limit": 0.5},
    "glm4_moe_lite": _LATENT,
    "hy_v4": _LATENT | {"first_k_dense_replace": 0, "index_n_heads": 2, "index_head_dim": 8, "swiglu_limit": 0.3},
    "axk1": _LATENT,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 0, "expert_layer_period": 1, "expert_layer_offset": 0,
              "use_mamba_kernels": False, "mamba_d_state": 4},
    "nemotron_h": {"layers_block_type": ["attention", "moe", "attention", "moe"], "num_hidden_layers": 4},
    "qwen3_next": {"layer_types": ["full_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["full_attention", "full_attention"], "num_dense_layers": 1},
    "minimax_m3_vl_text": {"swiglu_limit": 0.7},
}  # fmt: skip

#: Each is trained, generated from, saved and loaded.
MAIN = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "nemotron_h", "hy_v4")
#: Further ones: a whole model forward and backward.
MORE = (
    "afmoe", "axk1", "cohere2_moe", "deepseek_v2", "deepseek_v4", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo",
    "glm4_moe", "glm4_moe_lite", "granitemoe", "granitemoe_swa", "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "jamba",
    "laguna", "lfm2_moe", "mellum", "mimo_v2_flash", "minimax", "minimax_m2", "minimax_m3_vl_text", "phimoe",
    "qwen3_next", "solar_open",
)  # fmt: skip


def config(family: str, **changes: Any) -> Any:
    kind = CONFIG_MAPPING[family]
    known = set(inspect.signature(kind.__init__).parameters) | set(dir(kind)) | set(kind.__annotations__)
    return kind(**({k: v for k, v in SIZES.items() if k in known} | OWN.get(family, {}) | changes))


def make(family: str, **changes: Any) -> PreTrainedModel:
    """In evaluation mode. Biases and norms are drawn too, so that none of them is the neutral element."""
    model = AutoModelForCausalLM.from_config(
        config(family, **changes), experts_implementation="eager", attn_implementation="eager"
    )
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("bias") or "sinks" in name:
                tensor.add_(torch.randn(tensor.shape) * 0.1)
            if name.endswith("tid2eid"):  # DeepSeek-V4 routes by token: its table is drawn too
                tensor.copy_(torch.rand(VOCABULARY, EXPERTS).topk(tensor.shape[1]).indices)
    assert sum(p.numel() for p in model.parameters()) < 1_500_000, "a test's model is small"
    return model.eval()


def tokens(batch: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length))
