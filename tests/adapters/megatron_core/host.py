"""Megatron-Core for the tests: its package or a skip, on one process without a GPU, and small layers of both kinds."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
import torch.nn.functional as F

if os.environ.get("FASTMOE_CPP_HOST") != "megatron-core":
    pytest.importorskip("megatron.core", reason="megatron-core is not installed: make test-hosts HOSTS=megatron-core")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.optimizer import get_param_id_to_sharded_param_map
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed.finalize_model_grads import _update_router_expert_bias, reset_model_temporary_tensors
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_layer_local_spec,
        get_gpt_layer_local_submodules,
    )
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, RandomSTEShared, get_default_pg_collection
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
    from megatron.core.transformer.spec_utils import ModuleSpec, build_module
    from megatron.core.transformer.transformer_block import TransformerBlock
    from megatron.core.transformer.transformer_config import TransformerConfig

    try:
        from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    except ImportError:
        get_moe_metrics_tracker = None

    from megatron_adapters import megatron_core

__all__ = [
    "CudaRNGStatesTracker",
    "DistributedDataParallel",
    "DistributedDataParallelConfig",
    "GPTModel",
    "LocalSpecProvider",
    "MoEAuxLossAutoScaler",
    "MoELayer",
    "ModuleSpec",
    "ProcessGroupCollection",
    "RandomSTEShared",
    "RouterReplay",
    "RouterReplayAction",
    "TransformerBlock",
    "TransformerConfig",
    "_update_router_expert_bias",
    "build_module",
    "dist_checkpointing",
    "get_default_pg_collection",
    "get_gpt_decoder_block_spec",
    "get_gpt_layer_local_spec",
    "get_gpt_layer_local_submodules",
    "get_moe_metrics_tracker",
    "get_moe_module_spec_for_backend",
    "get_param_id_to_sharded_param_map",
    "megatron_core",
    "parallel_state",
    "reset_model_temporary_tensors",
]  # the tests import the package from here alone

#: What a release before 0.18 lacks, or has wrong.
before_0_18 = pytest.mark.skipif(get_moe_metrics_tracker is None, reason="this megatron-core is older than 0.18")

SEQUENCE, BATCH, HIDDEN, WIDTH, EXPERTS = 6, 3, 16, 24, 8


@contextlib.contextmanager
def without_gpu() -> Iterator[None]:
    """Megatron-Core asks CUDA for its device, waits for it and forks its generators; here may be none."""
    # the host compiles its activations, for minutes
    with torch._dynamo.config.patch(disable=True), pytest.MonkeyPatch.context() as patch:
        if torch.cuda.is_available():
            yield
            return
        patch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
        patch.setattr(torch.cuda, "synchronize", lambda *_: None)
        patch.setattr(CudaRNGStatesTracker, "fork", lambda self, name=None: contextlib.nullcontext())
        yield


@contextlib.contextmanager
def ranks(rank: int = 0, size: int = 1, store: dist.Store | None = None, **sizes: int) -> Iterator[None]:
    """Megatron-Core's process groups over gloo, and NCCL for the GPU of one rank; sizes go to
    initialize_model_parallel."""
    backend = "cpu:gloo,cuda:nccl" if size == 1 and torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store or dist.HashStore(), rank=rank, world_size=size)
    try:
        parallel_state.initialize_model_parallel(**sizes)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def config(**changes) -> TransformerConfig:
    """A small SwiGLU model's, without biases, dropout or losses."""
    fields = {
        "num_layers": 2, "hidden_size": HIDDEN, "num_attention_heads": 2, "num_moe_experts": EXPERTS,
        "moe_router_topk": 2, "moe_ffn_hidden_size": WIDTH, "use_cpu_initialization": True, "gated_linear_unit": True,
        "activation_func": F.silu, "add_bias_linear": False, "hidden_dropout": 0.0, "attention_dropout": 0.0,
        "bias_activation_fusion": False, "init_method_std": 0.3, "moe_router_load_balancing_type": "none",
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TransformerConfig(**(fields | changes))


def host_spec(c: TransformerConfig):
    """The host's own MoE layer on SequentialMLP."""
    return get_moe_module_spec_for_backend(LocalSpecProvider(), num_experts=c.num_moe_experts)


def host_layer(c: TransformerConfig) -> MoELayer:
    """The host's MoELayer with random weights, biases and selection bias."""
    layer = host_spec(c)(config=c, pg_collection=get_default_pg_collection(), layer_number=1)
    layer.set_layer_number(1)
    for expert in layer.experts.local_experts:
        # where there is a bias, the host changes in place what its reduction over one rank returns: torch refuses that
        expert.linear_fc2.explicit_expert_comm = True
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.3)
        if layer.router.expert_bias is not None:
            layer.router.expert_bias.normal_(0, 0.1)
    return layer


def our_layer(c: TransformerConfig, like: MoELayer | None = None, parts_only: bool = False) -> MoELayer:
    """FastMoELayer (or the host's MoELayer with our parts), with another layer's weights."""
    spec = megatron_core.use_fastmoe_cpp(host_spec(c), parts_only=parts_only)
    layer = spec(config=c, pg_collection=get_default_pg_collection(), layer_number=1)
    layer.set_layer_number(1)
    if like is not None:
        layer.load_state_dict(like.state_dict())
        layer.train(like.training)
    return layer


def gradients(layer: MoELayer) -> dict[str, torch.Tensor]:
    """Every parameter's gradient by name, a SequentialMLP's stacked under the names of our experts."""
    found = {name: p.grad for name, p in layer.named_parameters()}
    for linear in ("linear_fc1", "linear_fc2"):
        for kind in ("weight", "bias"):
            names = [f"experts.local_experts.{i}.{linear}.{kind}" for i in range(layer.num_local_experts)]
            if names[0] in found:
                found[f"experts.{linear}.{kind}"] = torch.stack([found.pop(name) for name in names])
    return found


def step(layer: MoELayer, x: torch.Tensor, padding_mask: torch.Tensor | None = None, **how):
    """Output, and the gradients of x and the parameters, of one forward and backward pass."""
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    output, bias = layer(x, padding_mask=padding_mask, **how)
    assert bias is None
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device).reshape(output.shape)
    (output * weight).sum().backward()
    return output.detach(), {"hidden_states": x.grad, **gradients(layer)}


def assert_close(found: torch.Tensor, expected: torch.Tensor, name: str, tolerance: float = 2e-5) -> None:
    """Errors beside the RMS of what is expected, which may be zero."""
    assert found.shape == expected.shape and found.dtype == expected.dtype, (name, found, expected)
    error = (found - expected).double().abs().max().item()
    scale = expected.double().square().mean().sqrt().item()
    assert error <= tolerance * scale, f"{name}: error {error:.3g} for an RMS of {scale:.3g}"


def assert_same_step(layer: MoELayer, host: MoELayer, x: torch.Tensor, tolerance: float = 2e-5, **how) -> None:
    """Output and every gradient of both layers."""
    found, expected = step(layer, x, **how), step(host, x, **how)
    assert_close(found[0], expected[0], "output", tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert_close(found[1][name], gradient, name, tolerance)


def hidden_states(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(SEQUENCE, BATCH, HIDDEN, dtype=dtype)
