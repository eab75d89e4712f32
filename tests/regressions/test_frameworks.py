"""Failures between a layer and the frameworks around it."""

import pytest
import torch
from support import oracle, tolerance
from support.samples import dispatch, experts_inputs, leaves, normal, ops, run_experts
from torch.utils.checkpoint import checkpoint

from fastmoe_cpp import MoE, MoEConfig, RouterConfig
from fastmoe_cpp.recompute import routing_saved


def make(device, dtype=torch.float32, **changes):
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 6, "top_k": 2, "initializer_range": 0.3}
    return MoE(MoEConfig(**sizes | changes), device=device, dtype=dtype)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("x_dtype", ["autocast", torch.float32], ids=str)
def test_autocast_forward_and_backward(autocast, x_dtype, device):
    """Backward met a bfloat16 gradient with float32 operands and raised [ScatterMoE, Axolotl]."""
    layer = make(device)
    x = normal(12, 16, dtype=autocast if x_dtype == "autocast" else x_dtype, device=device).requires_grad_()
    with torch.autocast(device, autocast):
        y = layer(x)
    assert y.dtype == x.dtype and y.shape == x.shape
    y.float().square().sum().backward()
    assert x.grad.dtype == x.dtype
    for name, p in layer.named_parameters():
        assert p.grad.dtype == torch.float32 and p.grad.isfinite().all() and p.grad.norm() > 0, name


class Drift(torch.nn.Module):
    """A block whose router sees other numbers when it is computed again, as other kernels would give it."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.calls = layer, 0

    def forward(self, x):
        self.calls += 1
        return self.layer(x + 0.5 * self.calls)


def test_recompute_does_not_route_a_token_elsewhere(device):
    """A token recomputed to other experts: other shapes, CheckpointError, or silently wrong gradients [TorchTitan, NeMo
    Automodel]."""
    layer = make(device)
    x = normal(40, 16, dtype=torch.float32, device=device)
    first = layer.forward_with_routing(x + 0.5)
    assert not torch.equal(first.topk_ids, layer.forward_with_routing(x + 1.0).topk_ids), "the drift must matter"
    block = Drift(layer)
    y = checkpoint(block, x.clone().requires_grad_(), use_reentrant=False, context_fn=routing_saved)
    layer.zero_grad()
    y.sum().backward()
    assert block.calls == 2
    # experts nobody chose in the first pass have no gradient, whatever the second pass would have chosen
    idle = first.tokens_per_expert == 0
    assert (layer.experts.down_proj.grad[idle] == 0).all()
    # the gradient is that of the routing kept, at the inputs of the second pass
    weights = [p.detach().clone().requires_grad_() for p in (layer.experts.gate_up_proj, layer.experts.down_proj)]
    plan = dispatch(first.topk_ids, 6)
    out = ops.experts(x + 1.0, *weights, first.topk_weights.detach(), *plan[:3])
    for p, g in zip(
        (layer.experts.gate_up_proj, layer.experts.down_proj), torch.autograd.grad(out.sum(), weights), strict=True
    ):
        tolerance.close(p.grad, g.double(), units=16)


def test_recorded_routing_is_replayed(device):
    """The way out where no policy can be used: ids recorded once are routed again, with today's weights and
    gradients."""
    layer = make(device, torch.float64)
    x = normal(20, 16, device=device)
    first = layer.forward_with_routing(x)
    again = layer.forward_with_routing(x, topk_ids=first.topk_ids)
    assert torch.equal(first.hidden_states, again.hidden_states) and torch.equal(first.topk_weights, again.topk_weights)
    with torch.no_grad():
        layer.router.weight.add_(normal(6, 16, seed=4, device=device))
    moved = layer.forward_with_routing(x, topk_ids=first.topk_ids)
    assert torch.equal(moved.topk_ids, first.topk_ids) and not torch.equal(
        layer.forward_with_routing(x).topk_ids, first.topk_ids
    )
    logits = oracle.router_logits(x, layer.router.weight.detach())
    tolerance.close(moved.topk_weights, oracle.routing_weights(logits, first.topk_ids)[0])
    moved.hidden_states.sum().backward()
    assert layer.router.weight.grad.norm() > 0


def test_every_gradient_is_defined_though_experts_were_not_used(device):
    """Unused experts had no gradient on some ranks, and sharded training hung waiting for it [PyTorch FSDP, DeepSpeed
    ZeRO-3]."""
    layer = make(device, num_experts=64, top_k=1, router=RouterConfig(renormalize=False))
    out = layer.forward_with_routing(normal(2, 16, dtype=torch.float32, device=device))
    out.hidden_states.sum().backward()
    assert int((out.tokens_per_expert == 0).sum()) >= 62
    for name, p in layer.named_parameters():
        assert p.grad is not None and p.grad.shape == p.shape and p.grad.isfinite().all(), name
    assert (layer.experts.down_proj.grad[out.tokens_per_expert == 0] == 0).all()


@pytest.mark.cuda
def test_no_host_sync_and_a_cuda_graph():
    """Counts read on the host broke graphs and forbade CUDA graphs [Megatron-LM]. Training step, captured and
    replayed."""
    layer = make("cuda", torch.bfloat16, hidden_size=128, intermediate_size=64)
    x = normal(256, 128, dtype=torch.bfloat16, device="cuda").requires_grad_()

    def step():
        out = layer.forward_with_routing(x)
        (out.hidden_states.square().sum() + out.aux_loss).backward()
        return out.hidden_states

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer.zero_grad(set_to_none=False)
        expected = step().detach().clone()  # a live graph would keep accumulators of this stream
    finally:
        torch.cuda.set_sync_debug_mode("default")
    grads = [p.grad.clone() for p in layer.parameters()]
    graph = torch.cuda.CUDAGraph()
    layer.zero_grad(set_to_none=False)
    with torch.cuda.graph(graph):
        out = step()
    for seed in (0, 5):
        with torch.no_grad():
            x.copy_(normal(256, 128, seed=seed, dtype=torch.bfloat16, device="cuda"))
            for p in layer.parameters():
                p.grad.zero_()
        graph.replay()
        if seed == 0:
            assert torch.equal(out, expected)
            for a, p in zip(grads, layer.parameters(), strict=True):
                assert torch.equal(a, p.grad)
        else:
            assert not torch.equal(out, expected)


@pytest.mark.cuda
def test_another_stream_than_the_default():
    """Work on a side stream read memory that was given away, or ran on the default stream [vLLM]."""
    inputs = experts_inputs(500, 64, 32, 8, 2, dtype=torch.bfloat16, device="cuda")
    expected = run_experts(inputs)
    stream = torch.cuda.Stream()
    for _ in range(20):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            given = leaves(inputs)
            out = run_experts(given)
            (grad,) = torch.autograd.grad(out.sum(), given["down_proj"])
            noise = [torch.full_like(expected, float("nan")) for _ in range(4)]
        torch.cuda.current_stream().wait_stream(stream)
        del noise
        assert torch.equal(out, expected) and grad.isfinite().all()


@pytest.mark.cuda
def test_another_device_than_the_current_one():
    """A kernel was launched on the current device instead of its tensors' [FastMoE]."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs = experts_inputs(50, 64, 32, 8, 2, dtype=torch.bfloat16, device="cuda:1")
    assert torch.cuda.current_device() == 0
    assert torch.equal(run_experts(inputs).cpu(), run_experts({k: v.to("cuda:0") for k, v in inputs.items()}).cpu())
    with pytest.raises(ValueError, match="^gate_up_proj must be on cuda:1"):
        run_experts(inputs | {"gate_up_proj": inputs["gate_up_proj"].to("cuda:0")})


def test_inputs_and_weights_on_two_devices_are_refused_by_name():
    """Weights left on another device were read through pointers of the wrong one [FastMoE]."""
    inputs = experts_inputs(5, 8, 4, 3, 2, dtype=torch.float32)
    plan = dispatch(inputs["topk_ids"], 3)
    for name in ("gate_up_proj", "down_proj", "topk_weights"):
        with pytest.raises(ValueError, match=f"^{name} must be on cpu as hidden_states is, got meta"):
            run_experts(inputs | {name: inputs[name].to("meta")}, plan)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_combine_sums_in_a_fixed_order_and_more_exactly_than_scatter_add(dtype, device):
    """scatter_add on K rows rounded K times and, with atomics, differed from run to run [TorchTitan]."""
    tokens, top_k, hidden = 200, 8, 64
    ids = torch.rand(tokens, 16, generator=torch.Generator().manual_seed(0)).topk(top_k, dim=1).indices.to(device)
    plan = dispatch(ids, 16)
    rows = normal(tokens * top_k, hidden, dtype=dtype, device=device)
    weights = normal(tokens, top_k, seed=1, dtype=torch.float32, device=device).abs()
    out = ops.combine(rows, weights, *plan[:3])
    truth = oracle.combine(rows.double(), weights.double(), plan.token_slot)
    scaled = rows * weights.flatten()[plan.slot_index.long(), None].to(dtype)
    index = (plan.slot_index.long() // top_k)[:, None].expand(-1, hidden)
    scattered = torch.zeros(tokens, hidden, dtype=dtype, device=device).scatter_add_(0, index, scaled)
    assert tolerance.rms(out.double() - truth) < 0.7 * tolerance.rms(scattered.double() - truth)
    for _ in range(5):
        assert torch.equal(ops.combine(rows, weights, *plan[:3]), out)


def test_the_number_of_threads_changes_nothing():
    """Results changed with the number of threads, so a run could not be repeated elsewhere [several]."""
    inputs = experts_inputs(300, 64, 48, 5, 2, dtype=torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            given = leaves(inputs)
            out = run_experts(given)
            results.append([out, *torch.autograd.grad(out.sum(), [given["hidden_states"], given["gate_up_proj"]])])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)
