"""gradient_accumulation_fusion under the host's own DistributedDataParallel, whose buffers are the main_grads."""

import contextlib

import pytest
import torch

from . import host
from .host import DistributedDataParallel, DistributedDataParallelConfig


@pytest.fixture(autouse=True)
def streams(monkeypatch):
    """The wrapper asks for the GPU's current stream, and on one rank does nothing with it."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: None)


def train(layer, fusion, overlap, batches):
    """Every main_grad after two steps of several micro-batches, the last of them synchronised."""
    layer.config.gradient_accumulation_fusion = fusion
    options = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=overlap)
    wrapped = DistributedDataParallel(layer.config, options, layer)
    for _ in range(2):
        wrapped.zero_grad_buffer()
        for i, x in enumerate(batches):
            last = i == len(batches) - 1
            with contextlib.nullcontext() if last else wrapped.no_sync():
                wrapped(x)[0].float().sin().sum().backward()
        wrapped.finish_grad_sync()
    # the wrapper threw every grad away, and those of no meaning with them
    assert all(parameter.grad is None for parameter in layer.parameters())
    told = {name for name, parameter in layer.named_parameters() if parameter.grad_added_to_main_grad}
    assert told == ({name for name, _ in layer.named_parameters() if "linear_fc" in name} if fusion else set())
    return {name: parameter.main_grad.clone() for name, parameter in layer.named_parameters()}


@pytest.mark.parametrize("overlap", [False, True], ids=["at the end", "overlap_grad_reduce"])
@pytest.mark.parametrize("parts_only", [False, True], ids=["layer", "parts"])
def test_the_hosts_wrapper(parts_only, overlap):
    changes = {"params_dtype": torch.bfloat16, "bf16": True}
    weights = host.host_layer(host.config(**changes))
    batches = [host.hidden_states(torch.bfloat16) for _ in range(3)]
    without, fused = (
        train(host.our_layer(host.config(**changes), weights, parts_only), fusion, overlap, batches)
        for fusion in (False, True)
    )
    for name, expected in without.items():
        assert expected.dtype == fused[name].dtype == torch.float32 and expected.any()
        if "linear_fc" in name:
            # without it each micro-batch's gradient is rounded to bfloat16
            assert (fused[name] - expected).abs().max() <= 2**-7 * expected.abs().max(), name
            assert not torch.equal(fused[name], expected) or fused[name].is_cuda
        else:
            assert torch.equal(fused[name], expected), name
