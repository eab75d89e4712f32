"""Configurations that between them switch on everything the layer has, and what the module tests share."""

import torch

from fastmoe_cpp import MoE, MoEConfig, RouterConfig, reference

HIDDEN, INNER, EXPERTS, TOP_K = 16, 12, 8, 3


def config(router=None, **fields) -> MoEConfig:
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_experts": EXPERTS, "top_k": TOP_K}
    return MoEConfig(**(sizes | fields), router=RouterConfig(**(router or {})))


CASES = {
    "mixtral": config(),
    "qwen2": config({"renormalize": False}, shared_intermediate_size=10, shared_expert_gate=True),
    "deepseek": config(
        {"score_function": "sigmoid", "renormalize_epsilon": 1e-20, "scaling_factor": 2.5, "num_groups": 4,
         "topk_groups": 2, "group_score": "top2_sum", "expert_bias": True, "balance_loss": "sequence",
         "balance_loss_coefficient": 0.1},
        shared_intermediate_size=10,
    ),
    "gpt_oss": config(
        {"scores_after_topk": True, "renormalize": False, "bias": True, "z_loss_coefficient": 0.1},
        activation="clamped_swiglu", bias=True, interleaved=True, activation_limit=0.5,
    ),
    "switch": config(
        {"renormalize": False, "balance_loss": "switch", "balance_loss_coefficient": 0.1},
        top_k=1, activation="relu", capacity_factor=1.25,
    ),
    "llama4": config({"score_function": "sigmoid", "renormalize": False, "scores_after_topk": True}, top_k=1,
                     weight_on_input=True, shared_intermediate_size=6),
    "capacity": config(
        {"balance_loss": "huggingface", "balance_loss_coefficient": 0.1}, capacity_factor=0.5, eval_capacity_factor=1,
        drop_policy="probs", activation="geglu",
    ),
    "sinkhorn": config({"sinkhorn": True, "sinkhorn_iterations": 3, "score_function": "sqrtsoftplus"},
                       activation="relu2", bias=True),
    "global": config({"balance_loss": "global", "balance_loss_coefficient": 0.1, "group_score": "max",
                      "num_groups": 2, "topk_groups": 1}, recompute=True, activation="geglu_tanh"),
    "float64_router": config({"dtype": torch.float64, "balance_loss": "batch", "z_loss_coefficient": 0.1}),
    "bfloat16_router": config({"dtype": torch.bfloat16}, activation="silu"),
    "one_expert": config(num_experts=1, top_k=1, activation="gelu"),
    "every_expert": config(top_k=EXPERTS, activation="reglu"),
}  # fmt: skip


def make(case: str | MoEConfig, device="cpu", dtype=torch.float64) -> MoE:
    """A layer with weights large enough that every term shows."""
    c = CASES[case] if isinstance(case, str) else case
    layer = MoE(c, device=device, dtype=dtype)
    with torch.no_grad():
        for name, tensor in [*layer.named_parameters(), ("expert_bias", layer.router.expert_bias)]:
            if tensor is not None:
                tensor.copy_(torch.randn(tensor.shape) * (0.2 if "bias" in name else 0.4))
    return layer


def tensors(layer: MoE) -> dict[str, torch.Tensor]:
    return dict(layer.named_parameters()) | dict(layer.named_buffers())


def run_reference(layer: MoE, x, **kwargs):
    return reference.moe(x, tensors(layer), layer.config, training=layer.training, **kwargs)


def gradients(layer: MoE, x, loss) -> dict[str, torch.Tensor]:
    """Of x and of every parameter, zero where the loss does not depend on it."""
    named = {"x": x} | dict(layer.named_parameters())
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(named.items(), grads, strict=True)}


def assert_same(actual: dict, expected: dict, rtol=1e-11, atol=1e-13) -> None:
    """Relative to the largest entry of each tensor."""
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        size = expected[name].abs().max().item() if expected[name].numel() else 0.0
        torch.testing.assert_close(
            tensor, expected[name], rtol=0, atol=rtol * size + atol, msg=lambda m, name=name: f"{name}: {m}"
        )
