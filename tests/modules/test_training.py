"""What training does to a layer: expert-bias updates, activation checkpointing, autocast, many steps."""

import gc
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastmoe_cpp import MoE, recompute, reference
from modules.cases import CASES, EXPERTS, HIDDEN, TOP_K, assert_same, config, make

BIASED = config({"score_function": "sigmoid", "expert_bias": True, "expert_bias_update_rate": 0.01})
CHECKPOINTS = {
    "reentrant": partial(checkpoint, use_reentrant=True),
    "non_reentrant": partial(checkpoint, use_reentrant=False),
    "routing_saved": partial(checkpoint, use_reentrant=False, context_fn=recompute.routing_saved),
}


# --- loss-free balancing ----------------------------------------------------------------------------------------------


def test_the_bias_moves_once_a_step_against_the_load(device):
    layer = make(BIASED, device)
    before = layer.router.expert_bias.clone()
    counts = torch.zeros(EXPERTS, dtype=torch.int64, device=device)
    for _ in range(4):  # micro-batches
        counts += layer.forward_with_routing(torch.randn(3, 5, HIDDEN, device=device).double()).tokens_per_expert
    assert torch.equal(layer.router.tokens_per_expert, counts) and counts.sum() == 4 * 15 * TOP_K
    assert torch.equal(layer.router.expert_bias, before)
    layer.update_expert_bias()
    reference.update_expert_bias(before, counts, 0.01)
    assert torch.equal(layer.router.expert_bias, before)
    assert (layer.router.tokens_per_expert == 0).all()


def test_micro_batches_do_not_change_the_update(device):
    x = torch.randn(24, HIDDEN, device=device, dtype=torch.float64)
    biases = []
    for pieces in (1, 2, 4, 24):
        torch.manual_seed(2)
        layer = make(BIASED, device)
        for piece in x.chunk(pieces):
            layer(piece)
        layer.update_expert_bias()
        biases.append(layer.router.expert_bias)
    assert all(torch.equal(b, biases[0]) for b in biases)


def test_evaluation_and_padding_are_not_counted(device):
    layer = make(BIASED, device)
    x = torch.randn(2, 6, HIDDEN, device=device, dtype=torch.float64)
    layer.eval()(x)
    assert (layer.router.tokens_per_expert == 0).all()
    mask = torch.zeros(2, 6, dtype=torch.bool, device=device)
    mask[1, 2:] = True
    layer.train()(x, mask)
    assert layer.router.tokens_per_expert.sum() == 8 * TOP_K


def test_the_bias_has_no_gradient_and_no_part_in_the_weights(device):
    layer = make(BIASED, device)
    x = torch.randn(9, HIDDEN, device=device, dtype=torch.float64)
    out = layer.forward_with_routing(x)
    chosen = out.router_scores.gather(1, out.topk_ids)
    torch.testing.assert_close(out.topk_weights, chosen / chosen.sum(1, keepdim=True))
    assert not layer.router.expert_bias.requires_grad
    assert "router.expert_bias" in layer.state_dict() and "router.tokens_per_expert" not in layer.state_dict()


def test_balancing_evens_the_load(device):
    layer = make(config({"score_function": "sigmoid", "expert_bias": True, "expert_bias_update_rate": 0.02}), device)
    layer.router.expert_bias.zero_()
    x = torch.randn(512, HIDDEN, device=device, dtype=torch.float64) + 0.5
    first = layer.forward_with_routing(x).tokens_per_expert
    for _ in range(100):
        layer.update_expert_bias()
        last = layer.forward_with_routing(x).tokens_per_expert
    assert first.max() > 1.3 * first.double().mean() and last.max() < 1.15 * last.double().mean()


def test_update_without_a_bias_does_nothing(device):
    layer = make("mixtral", device)
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    layer(torch.randn(4, HIDDEN, device=device, dtype=torch.float64))
    layer.update_expert_bias()
    assert all(torch.equal(state[k], v) for k, v in layer.state_dict().items())


def test_the_operator_that_counts_once():
    counts = torch.arange(4)
    torch.library.opcheck(torch.ops.fastmoe_cpp.outside_backward.default, (counts,))
    assert torch.equal(torch.ops.fastmoe_cpp.outside_backward(counts), counts)
    seen = []
    x = torch.zeros(1, requires_grad=True)
    x.register_hook(lambda g: seen.append(torch.ops.fastmoe_cpp.outside_backward(counts)))
    x.sum().backward()
    assert seen[0].tolist() == [0] * 4


# --- activation checkpointing -----------------------------------------------------------------------------------------


def step(layer, x, grad, run):
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    y = run(layer, x) if run else layer(x)
    y.backward(grad)
    return y.detach(), {"x": x.grad} | {n: p.grad.clone() for n, p in layer.named_parameters()}


@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("case", CASES)
def test_checkpointing_changes_nothing_and_counts_once(case, kind, device):
    layer = make(case, device)
    x = torch.randn(2, 8, HIDDEN, device=device, dtype=torch.float64)
    grad = torch.randn_like(x)
    y, grads = step(layer, x, grad, None)
    counted = layer.router.tokens_per_expert
    counts = None if counted is None else counted.clone()
    layer.update_expert_bias()
    if layer.router.expert_bias is not None:
        layer.router.expert_bias -= layer.config.router.expert_bias_update_rate * torch.sign(
            counts.double().mean() - counts
        )
    y_again, grads_again = step(layer, x, grad, CHECKPOINTS[kind])
    torch.testing.assert_close(y_again, y, rtol=0, atol=0)
    assert_same(grads_again, grads, rtol=1e-13)
    if counts is not None:
        assert torch.equal(layer.router.tokens_per_expert, counts) and counts.sum() == 16 * layer.config.top_k


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_jitter_is_drawn_again_the_same(kind, device):
    layer = make(config({"jitter_eps": 0.2, "jitter_experts": True}), device)
    x = torch.randn(16, HIDDEN, device=device, dtype=torch.float64)
    grad = torch.randn_like(x)
    torch.manual_seed(11)
    y, grads = step(layer, x, grad, None)
    torch.manual_seed(11)
    y_again, grads_again = step(layer, x, grad, CHECKPOINTS[kind])
    assert torch.equal(y, y_again)
    assert_same(grads_again, grads, rtol=1e-13)


def test_saved_routing_is_not_computed_again(device):
    """What routing decided is kept; the experts are computed again."""
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    layer = make("mixtral", device)
    x = torch.randn(16, HIDDEN, device=device, dtype=torch.float64, requires_grad=True)
    for kind, again in (("non_reentrant", 1), ("routing_saved", 0)):
        y = CHECKPOINTS[kind](layer, x)
        seen.clear()
        with Watch():
            y.sum().backward()
        assert seen.count(torch.ops.fastmoe_cpp.route.default) == again, kind
        assert seen.count(torch.ops.fastmoe_cpp.dispatch.default) == again, kind
        assert seen.count(torch.ops.fastmoe_cpp.experts_forward.default) == 1, kind


# --- autocast ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["mixtral", "qwen2", "deepseek", "gpt_oss", "capacity"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(case, dtype, device):
    layer = make(case, device, torch.float32)
    x = torch.randn(2, 8, HIDDEN, device=device, requires_grad=True)
    seen = {}
    hooks = [
        layer.experts.register_forward_hook(lambda m, a, out: seen.update(experts=out.dtype)),
        layer.router.register_forward_hook(lambda m, a, out: seen.update(router=out.logits.dtype)),
    ]
    with torch.autocast(device, dtype):
        out = layer.forward_with_routing(x)
        y = layer(x)
    assert seen["experts"] == dtype and y.dtype == x.dtype == torch.float32
    assert out.router_logits.dtype == out.topk_weights.dtype == out.balance_loss.dtype == torch.float32
    # backward is outside autocast, as documented for autocast
    (y.sum() + out.aux_loss).backward()
    for name, p in [("x", x), *layer.named_parameters()]:
        assert p.grad.dtype == torch.float32 and p.grad.isfinite().all(), name
    exact = layer.double().forward_with_routing(x.detach().double())
    assert torch.equal(exact.topk_ids, out.topk_ids)  # routing does not feel the narrower dtype
    error = (y - exact.hidden_states).abs().max() / exact.hidden_states.abs().max()
    assert 1e-7 < error < 8 * torch.finfo(dtype).eps
    for hook in hooks:
        hook.remove()


def test_narrow_input_of_wide_weights_needs_autocast(device):
    layer = make("mixtral", device, torch.float32)
    x = torch.randn(4, HIDDEN, device=device, dtype=torch.bfloat16, requires_grad=True)
    with pytest.raises(TypeError, match="gate_up_proj must have the dtype of hidden_states"):
        layer(x)
    with torch.autocast(device, torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16 and layer.experts.down_proj.grad.dtype == torch.float32


def test_autocast_switched_off_inside(device):
    layer = make("mixtral", device, torch.float32)
    x = torch.randn(4, HIDDEN, device=device)
    expected = layer(x)
    with torch.autocast(device, torch.bfloat16), torch.autocast(device, enabled=False):
        assert torch.equal(layer(x), expected)


# --- many steps -------------------------------------------------------------------------------------------------------


def test_a_layer_learns(device):
    """To imitate another one, from the same routing: the loss falls by a factor of ten."""
    teacher, layer = make("deepseek", device, torch.float32), make("deepseek", device, torch.float32)
    layer.router.load_state_dict(teacher.router.state_dict())
    optimizer = torch.optim.Adam(layer.parameters(), lr=5e-3)
    x = torch.randn(256, HIDDEN, device=device)
    with torch.no_grad():
        target = teacher(x)
    first = None
    for _ in range(150):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        first = first or loss.item()
        loss.backward()
        optimizer.step()
        layer.update_expert_bias()
    assert loss.item() < first / 10


@pytest.mark.parametrize("case", ["deepseek", "gpt_oss", "capacity"])
def test_nothing_grows(case, device):
    """Tensors alive, and resident memory, over steps of varying routing and size."""
    layer = make(case, device, torch.float32)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-4)

    def steps(count):
        for i in range(count):
            x = torch.randn(1 + i % 40, HIDDEN, device=device, requires_grad=True)
            out = layer.forward_with_routing(x)
            (out.hidden_states.square().mean() + out.aux_loss).backward()
            checkpoint(layer, x, use_reentrant=False).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            layer.update_expert_bias()

    def alive():
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    steps(50)
    before, memory = alive(), resident_bytes()
    steps(150)
    assert alive() <= before
    assert resident_bytes() - memory < 8 * 2**20


def resident_bytes() -> int:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096


def test_one_update_is_the_same_bits_every_time(device):
    results = []
    for _ in range(3):
        torch.manual_seed(0)
        layer = MoE(CASES["deepseek"], device=device)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for _ in range(3):
            layer(torch.randn(64, HIDDEN, device=device)).square().sum().backward()
            optimizer.step()
            layer.update_expert_bias()
        results.append(layer.state_dict())
    for other in results[1:]:
        assert all(torch.equal(other[k], v) for k, v in results[0].items())
