"""torch.compile(fullgraph=True): one graph, forward and backward, whatever the number of tokens."""

import pytest
import torch
import torch._inductor.config
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from fastmoe_cpp import fused_experts, monitor, recompute
from modules.cases import HIDDEN, TOP_K, assert_same, config, gradients, make


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def same(layer, compiled, x, **kwargs):
    """Output and gradients, training and its auxiliary losses included."""
    x = x.detach().requires_grad_()
    y, y_compiled = layer(x, **kwargs), compiled(x, **kwargs)
    assert_same({"y": y_compiled}, {"y": y}, rtol=1e-13)
    grad = torch.randn_like(y)
    assert_same(*(gradients(layer, x, (out * grad).sum()) for out in (y_compiled, y)), rtol=1e-12)


@pytest.mark.parametrize("case", ["qwen2", "switch", "llama4", "sinkhorn", "float64_router", "bfloat16_router"])
def test_static(case, device):
    layer = make(case, device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    same(layer, compiled, torch.randn(2, 6, HIDDEN, device=device, dtype=torch.float64))


@pytest.mark.parametrize("case", ["deepseek", "capacity", "gpt_oss"])
def test_dynamic_sizes_share_a_graph(case, device):
    layer = make(case, device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    graphs = None
    for batch, length in ((2, 6), (3, 11), (64, 7)):
        same(layer, compiled, torch.randn(batch, length, HIDDEN, device=device, dtype=torch.float64))
        graphs = graphs or counter.frame_count
    assert counter.frame_count == graphs


def test_dynamic_with_padding_and_no_tokens(device):
    layer = make("deepseek", device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (5, 9, 0, 1):
        x = torch.randn(2, tokens, HIDDEN, device=device, dtype=torch.float64)
        same(layer, compiled, x, padding_mask=torch.rand(2, tokens, device=device) < 0.5)


def test_routing_output(device):
    layer = make("deepseek", device)
    compiled = torch.compile(layer.forward_with_routing, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 6, HIDDEN, device=device, dtype=torch.float64)
    out, expected = compiled(x), layer.forward_with_routing(x)
    for name, tensor in out._asdict().items():
        torch.testing.assert_close(tensor, getattr(expected, name), msg=name)
    replayed = compiled(x, topk_ids=out.topk_ids)
    torch.testing.assert_close(replayed.hidden_states, out.hidden_states)


def test_inductor(device, monkeypatch):
    # a CXX of two words, such as one with ccache, is not a compiler to inductor
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "g++"))
    layer = make("deepseek", device, torch.float32)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for tokens in (6, 17):
        x = torch.randn(2, tokens, HIDDEN, device=device, requires_grad=True)
        y, y_compiled = layer(x), compiled(x)
        assert_same({"y": y_compiled}, {"y": y}, rtol=1e-5)
        grad = torch.randn_like(y)
        assert_same(*(gradients(layer, x, (out * grad).sum()) for out in (y_compiled, y)), rtol=1e-5)


def test_the_scale_of_the_auxiliary_gradient(device):
    layer = make("deepseek", device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 6, HIDDEN, device=device, dtype=torch.float64, requires_grad=True)
    for scale in (1.0, 0.25, torch.tensor(8.0, device=device)):
        layer.aux_loss_scale = scale
        assert_same(gradients(layer, x, compiled(x).sum()), gradients(layer, x, layer(x).sum()), rtol=1e-12)


@pytest.mark.parametrize("inside", [False, True], ids=["checkpoint_of_compiled", "compiled_checkpoint"])
@pytest.mark.parametrize("saved", [False, True], ids=["all", "routing_saved"])
def test_compiled_checkpointing_counts_once(inside, saved, device):
    layer = make("deepseek", device)
    x = torch.randn(2, 6, HIDDEN, device=device, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(x)
    expected = gradients(layer, x, (layer(x) * grad).sum())
    layer.router.tokens_per_expert.zero_()
    kwargs = {"use_reentrant": False} | ({"context_fn": recompute.routing_saved} if saved else {})
    if inside:
        run = torch.compile(lambda v: checkpoint(layer, v, **kwargs), fullgraph=True, backend="aot_eager")
    else:
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        run = lambda v: checkpoint(compiled, v, **kwargs)  # noqa: E731
    assert_same(gradients(layer, x, (run(x) * grad).sum()), expected, rtol=1e-12)
    assert layer.router.tokens_per_expert.sum() == 12 * TOP_K


def test_compiled_counts_and_monitors(device):
    layer = make("deepseek", device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(9, HIDDEN, device=device, dtype=torch.float64)
    with monitor.LoadMonitor(layer) as load:
        for _ in range(3):
            compiled(x)
        load.step()
    counts = layer.forward_with_routing(x).tokens_per_expert
    assert torch.equal(load.counts()[""][0], 3 * counts.cpu())
    assert torch.equal(layer.router.tokens_per_expert, 4 * counts)


def test_compiled_autocast(device):
    layer = make("qwen2", device, torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 6, HIDDEN, device=device, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        y, y_compiled = layer(x), compiled(x)
    assert y_compiled.dtype == torch.float32
    assert_same({"y": y_compiled}, {"y": y}, rtol=2e-2)
    assert_same(gradients(layer, x, y_compiled.sum()), gradients(layer, x, y.sum()), rtol=2e-2)


def test_fused_experts(device):
    layer = make(config(), device)
    compiled = torch.compile(fused_experts, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (4, 7):
        x = torch.randn(tokens, HIDDEN, device=device, dtype=torch.float64)
        ids = torch.randint(-1, 8, (tokens, 2), device=device, dtype=torch.int32)
        args = (x, layer.experts.gate_up_proj, layer.experts.down_proj, ids, torch.rand(tokens, 2, device=device))
        assert torch.equal(compiled(*args), fused_experts(*args))


def test_backward_under_compiled_autograd(device):
    """Of an eager layer, beside compiled ones: its Functions must be ones that compiled autograd takes."""
    layer = make("deepseek", device)
    x = torch.randn(2, 6, HIDDEN, device=device, dtype=torch.float64, requires_grad=True)
    expected = gradients(layer, x, layer(x).square().sum())
    loss = layer(x).square().sum()
    parameters = list(layer.parameters())
    for tensor in (x, *parameters):
        tensor.grad = None
    with compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward()
    actual = {name: p.grad for name, p in layer.named_parameters()} | {"x": x.grad}
    assert len(expected) == len(actual)
    assert_same({name: actual[name] for name in expected}, expected, rtol=1e-12)


@pytest.mark.parametrize("form", ["batch", "sequence"])
@pytest.mark.parametrize("strict", [False, True])
def test_exported_sizes_stay_free(strict, form, device):
    layer = make(config({"balance_loss": form, "balance_loss_coefficient": 0.1}), device)
    x = torch.randn(2, 5, HIDDEN, device=device, dtype=torch.float64)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    exported = torch.export.export(layer, (x,), dynamic_shapes=(sizes,), strict=strict).module()
    other = torch.randn(3, 7, HIDDEN, device=device, dtype=torch.float64)
    assert_same({"y": exported(other)}, {"y": layer(other)}, rtol=1e-13)
