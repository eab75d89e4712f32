"""What only a GPU can show of a layer: no wait for the device, CUDA graphs, streams and devices."""

import pytest
import torch

from fastmoe_cpp import monitor
from modules.cases import CASES, HIDDEN, make

pytestmark = pytest.mark.cuda
# float64 routing, or Sinkhorn to a tolerance, are no different here
STEPS = ["mixtral", "qwen2", "deepseek", "gpt_oss", "switch", "capacity", "sinkhorn", "global"]


def training_step(layer, x, mask=None):
    out = layer.forward_with_routing(x, mask)
    (out.hidden_states.square().sum() + out.aux_loss).backward()
    layer(x).sum().backward()
    layer.update_expert_bias()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", STEPS)
def test_no_host_sync(case, dtype):
    layer = make(case, "cuda", dtype)
    x = torch.randn(2, 40, HIDDEN, device="cuda", dtype=dtype, requires_grad=True)
    mask = torch.rand(2, 40, device="cuda") < 0.3
    with monitor.LoadMonitor(layer) as load:
        training_step(layer, x, mask)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            training_step(layer, x, mask)
            training_step(layer, x)
            load.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert load.counts()[""].sum() > 0


@pytest.mark.parametrize("case", STEPS)
def test_graph_of_a_training_step(case):
    """Captured once and replayed on other tokens: the bits of an eager step."""
    layer = make(case, "cuda", torch.float32)
    x = torch.randn(96, HIDDEN, device="cuda", requires_grad=True)
    named = [x, *layer.parameters()]

    def step():
        y = layer(x)
        return [y, *torch.autograd.grad(y.square().sum(), named)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    layer.update_expert_bias()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        with torch.no_grad():
            x.normal_()
        if layer.router.tokens_per_expert is not None:
            layer.router.tokens_per_expert.zero_()
        graph.replay()
        replayed = [t.clone() for t in captured]
        if layer.router.tokens_per_expert is not None:
            layer.router.tokens_per_expert.zero_()
        for a, b in zip(replayed, step(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("case", CASES)
def test_the_cpu_and_the_gpu_agree(case):
    on_cpu = make(case, "cpu")
    on_gpu = make(case, "cuda")
    on_gpu.load_state_dict(on_cpu.state_dict())
    x = torch.randn(50, HIDDEN, dtype=torch.float64)
    ours, theirs = on_gpu.forward_with_routing(x.cuda()), on_cpu.forward_with_routing(x)
    for name, tensor in ours._asdict().items():
        expected = getattr(theirs, name)
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.cpu(), expected, rtol=1e-9, atol=1e-11, msg=name)
        else:
            assert torch.equal(tensor.cpu(), expected), name


def test_tensors_on_two_devices_are_one_sentence():
    layer = make("mixtral", "cuda", torch.float32)
    with pytest.raises(ValueError, match="must be on cpu as hidden_states is, got cuda:0") as error:
        layer(torch.zeros(3, HIDDEN))
    assert len(str(error.value).splitlines()) == 1
