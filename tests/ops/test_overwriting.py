"""Backward puts the pre-activation's gradient where the pre-activation was, where nobody can still want that."""

import gc

import pytest
import torch
from support.oracle import GATED
from support.samples import dispatch, experts_inputs, leaves, normal, ops, run_experts
from torch.utils.flop_counter import FlopCounterMode

from fastmoe_cpp import _C, main_grad
from fastmoe_cpp.outputs import DispatchPlan

ACTIVATIONS = ("swiglu", "clamped_swiglu", "relu2")
GRADIENTS = ("hidden_states", "gate_up_proj", "down_proj", "topk_weights", "gate_up_bias", "down_bias")


INNER = 1000  # more columns than any tile has


def sample(device, activation="swiglu", tokens=150, dtype=torch.float32, **options):
    """Leaves and a plan that drops some pairs, so that some rows of the pre-activation are nobody's."""
    inputs = leaves(
        experts_inputs(tokens, 40, INNER, 6, 2, dtype=dtype, device=device, activation=activation, bias=True, **options)
    )
    return inputs, dispatch(inputs["topk_ids"], 6, capacity=tokens // 3)


def gradients(inputs):
    found = [inputs[name].grad for name in GRADIENTS]
    for name in GRADIENTS:
        inputs[name].grad = None
    return found


def same(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def fused(inputs, plan, **options):
    """The same through main_grad's Function, with a buffer of zeros for each weight."""
    for name in ("gate_up_proj", "down_proj"):
        inputs[name].main_grad = torch.zeros_like(inputs[name], dtype=torch.float32)
    return main_grad.experts(
        *(inputs[n] for n in GRADIENTS[:4]), DispatchPlan(*plan), gate_up_bias=inputs["gate_up_bias"],
        down_bias=inputs["down_bias"], **options,
    )  # fmt: skip


@pytest.mark.parametrize("interleaved,weight_on_input", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_bits_of_a_graph_that_is_kept(device, activation, dtype, interleaved, weight_on_input):
    inputs, plan = sample(device, activation, dtype=dtype, interleaved=interleaved)
    options = {
        "activation": activation,
        "interleaved": interleaved and activation in GATED,
        "weight_on_input": weight_on_input,
    }
    out = run_experts(inputs, plan, **options)
    grad = normal(*out.shape, seed=9, dtype=dtype, device=device)
    out.backward(grad, retain_graph=True)
    first = gradients(inputs)
    out.backward(grad, retain_graph=True)  # a second time: nothing was overwritten
    same(first, gradients(inputs))
    out.backward(grad)
    same(first, gradients(inputs))
    run_experts(inputs, plan, recompute=True, **options).backward(grad)
    same(first, gradients(inputs))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("itself", [False, True])
def test_the_operators_workspace(device, interleaved, itself):
    """pre_activation itself, or other memory: the results are the same, and only that memory changes."""
    inputs, plan = sample(device, interleaved=interleaved)
    given = [inputs[n].detach() for n in GRADIENTS[:4]] + [*plan[:3]]
    given += [inputs[n].detach() for n in GRADIENTS[4:]]
    _, pre = ops.experts_forward(*given, "swiglu", 1.702, 7.0, interleaved, False, True)
    grad = normal(*inputs["hidden_states"].shape, seed=9, dtype=torch.float32, device=device)
    rest = ("swiglu", 1.702, 7.0, interleaved, False, [True] * 6)
    expected = ops.experts_backward(grad, *given, pre, *rest)
    kept, before = pre.clone(), [t.clone() for t in given]
    workspace = pre if itself else torch.full_like(pre, float("nan"))
    same(expected, ops.experts_backward_accumulate(grad, *given, pre, *rest, None, None, workspace))
    same(before, given)
    assert itself or torch.equal(kept, pre)
    if device == "cuda" or not interleaved:
        served = int(plan.expert_offsets[-1])
        assert not torch.equal(workspace[:served], kept[:served])


@pytest.mark.parametrize("run", [run_experts, fused])
def test_a_saved_tensor_hook_keeps_what_it_saw(device, run):
    inputs, plan = sample(device)
    seen = []

    def pack(t):
        seen.append((t, t.detach().clone()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run(inputs, plan)
    out.backward(torch.ones_like(out))
    assert any(t.shape == (300, 2 * INNER) for t, _ in seen)
    same(*zip(*seen, strict=True))


def test_main_grads_function_overwrites(device):
    """Here what was saved can be looked at. The same gradients with and without."""
    inputs, plan = sample(device)
    grad = normal(*inputs["hidden_states"].shape, seed=9, dtype=torch.float32, device=device)
    found = []
    for keeps in (True, False):
        out = fused(inputs, plan)
        pre = out.grad_fn.saved_tensors[-1]
        before = pre.clone()
        out.backward(grad, retain_graph=keeps)
        assert torch.equal(pre, before) == keeps
        found.append([g for g in gradients(inputs) if g is not None] + [inputs[n].main_grad for n in GRADIENTS[1:3]])
    same(*found)


@pytest.mark.parametrize("run,path", [(run_experts, "C++"), (fused, "Python")])
def test_a_failed_backward_is_not_repeated_on_what_it_overwrote(device, monkeypatch, run, path):
    """An error after the overwriting (memory ran out, say), caught, and backward again on the same graph."""
    inputs, plan = sample(device)

    def fails(*_):
        raise RuntimeError("no memory left")

    grad = torch.ones_like(inputs["hidden_states"])
    out = run(inputs, plan)
    if path == "Python":
        monkeypatch.setattr(main_grad, "_ops", type("Ops", (), {"experts_backward_accumulate": staticmethod(fails)}))
        with pytest.raises(RuntimeError, match="no memory left"):
            out.backward(grad)
        monkeypatch.undo()
    else:
        library = torch.library.Library("fastmoe_cpp", "IMPL")
        library.impl("experts_backward_accumulate", fails, device.upper(), allow_override=True)
        with pytest.raises(RuntimeError, match="no memory left"):
            out.backward(grad)
        library._destroy()
        del library
        gc.collect()
    with pytest.raises(RuntimeError, match="experts: a backward that failed has overwritten what forward kept"):
        out.backward(grad)
    gradients(inputs)
    run(inputs, plan).backward(grad)  # and the next pass works
    assert inputs["hidden_states"].grad.isfinite().all()


def test_a_batch_of_gradients(device):
    """It runs the operators under vmap, which has no rule for one that writes into its arguments."""
    inputs, plan = sample(device)
    wanted = [inputs[n] for n in GRADIENTS]
    grads = normal(3, 150, 40, seed=9, device=device)
    batched = torch.autograd.grad(run_experts(inputs, plan), wanted, grads, is_grads_batched=True)
    out = run_experts(inputs, plan)
    single = [torch.autograd.grad(out, wanted, grad, retain_graph=True) for grad in grads]
    for found, expected in zip(batched, zip(*single, strict=True), strict=True):
        assert torch.equal(found, torch.stack(expected))


def test_when_a_backward_is_the_last(device):
    """_C.last_use, asked inside a backward: by kept graph, mode and a batch of gradients."""
    asked = []

    class Asks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            asked.append(_C.last_use(ctx.saved_tensors[0], grad))
            return grad * 2

    x = torch.ones(3, device=device, requires_grad=True)
    y = Asks.apply(x)
    y.sum().backward(retain_graph=True)
    torch.autograd.grad(Asks.apply(x).sum(), x, create_graph=True)
    y.sum().backward()
    with FlopCounterMode(display=False):
        Asks.apply(x).sum().backward()
    torch.autograd.grad(Asks.apply(x), x, torch.ones(2, 3, device=device), is_grads_batched=True)
    assert asked == [False, False, True, False, False]
    assert not _C.last_use(x, x), "outside backward nothing is known"
    assert _C.saves_for_itself()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert not _C.saves_for_itself()


@pytest.mark.parametrize(
    "change,found",
    [
        (
            lambda w: w[:-1],
            r"workspace must have shape \[P, ...\] as slot_index with size 300 in dimension 0, got \[299, 2000\]",
        ),
        (lambda w: w[:, 1:], "with size 2000 in dimension 1, got"),
        (lambda w: w.double(), "workspace must be Float"),
        (lambda w: w.t().contiguous().t(), "workspace must be contiguous, got strides"),
    ],
)
def test_a_workspace_that_does_not_fit(device, change, found):
    inputs, plan = sample(device)
    given = [inputs[n].detach() for n in GRADIENTS[:4]] + [*plan[:3]]
    rest = (None, None, None, "swiglu", 1.702, 7.0, False, False, [True] * 6, None, None)
    workspace = torch.empty(300, 2 * INNER, device=device)
    with pytest.raises((ValueError, TypeError), match=found):
        ops.experts_backward_accumulate(given[0], *given, *rest, change(workspace))


@pytest.mark.parametrize("tokens", [2, 150])  # on a GPU, matrix-vector kernels and tiles
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_workspace_at_any_address(device, dtype, tokens):
    """One element past a boundary: it may be left unused, and the results are the same."""
    inputs, plan = sample(device, "relu2", tokens, dtype)
    given = [inputs[n].detach() for n in GRADIENTS[:4]] + [*plan[:3]]
    rest = (None, None, None, "relu2", 1.702, 7.0, False, False, [True] * 4 + [False] * 2, None, None)
    memory = torch.empty(plan[0].shape[0] * INNER + 1, dtype=dtype, device=device)
    found = [
        ops.experts_backward_accumulate(given[0], *given, *rest, workspace)
        for workspace in (None, memory[:-1].view(-1, INNER), memory[1:].view(-1, INNER))
    ]
    assert all(t.isfinite().all() for t in found[0])
    same(found[0], found[1])
    same(found[0], found[2])


def test_a_pre_activation_of_another_device_is_refused(device):
    inputs, plan = sample(device)
    given = [inputs[n].detach() for n in GRADIENTS[:4]] + [*plan[:3]]
    pre = torch.empty(plan[0].shape[0], 2 * INNER, device="meta")
    with pytest.raises(ValueError, match=f"pre_activation must be on {device}.* as hidden_states is, got meta"):
        ops.experts_backward(given[0], *given, None, None, pre, "swiglu", 1.702, 7.0, False, False, [True] * 6)


@pytest.mark.cuda
def test_peak_memory_holds_the_pre_activation_once():
    """T = 4096, K = 4, I = 512: it is 64 MiB of bfloat16, and half of it more or less would be seen."""
    inputs = leaves(experts_inputs(4096, 256, 1024, 8, 4, dtype=torch.bfloat16, device="cuda"))
    plan = dispatch(inputs["topk_ids"], 8)
    size = 4096 * 4 * 2 * 1024 * 2
    peaks = []
    for keeps in (True, False):
        out = run_experts(inputs, plan)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out.backward(torch.ones_like(out), retain_graph=keeps)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del out
        for name in GRADIENTS[:4]:
            inputs[name].grad = None
    assert abs(peaks[0] - peaks[1] - size) < 2**20, f"{peaks[0]} and {peaks[1]} bytes, {size} of pre-activation"


@pytest.mark.cuda
def test_a_captured_backward_can_be_replayed_more_often_than_its_forward():
    inputs = leaves(experts_inputs(64, 64, 64, 6, 2, dtype=torch.bfloat16, device="cuda"))
    plan = dispatch(inputs["topk_ids"], 6)
    grad = normal(64, 64, seed=9, dtype=torch.bfloat16, device="cuda")
    wanted = [inputs[n] for n in GRADIENTS[:4]]
    expected = torch.autograd.grad(run_experts(inputs, plan), wanted, grad)
    stream, forward, reverse = torch.cuda.Stream(), torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.autograd.grad(run_experts(inputs, plan), wanted, grad)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(forward):
        out = run_experts(inputs, plan)
    with torch.cuda.graph(reverse, pool=forward.pool()):
        found = torch.autograd.grad(out, wanted, grad)
    forward.replay()
    for _ in range(2):
        reverse.replay()
        torch.cuda.synchronize()
        same(expected, found)
