"""Weight gradients added to a buffer in float32: over micro-batches, under checkpointing and autocast, for Megatron."""

import copy
import dataclasses

import pytest
import torch
import torch.distributed as dist
from support.tolerance import close
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint

from fastmoe_cpp import MoE, MoEConfig, ops
from fastmoe_cpp.parallel import ExpertParallel
from modules.cases import CASES, HIDDEN, make

FUSED = ("experts.gate_up_proj", "experts.down_proj")


def pair(case="mixtral", device="cpu", dtype=torch.float32, **buffers):
    """A layer with the option and buffers of zeros (or of a value), and the same layer without."""
    plain = make(case, device, dtype)
    fused = MoE(fusing(plain.config), device=device, dtype=dtype)
    fused.load_state_dict(plain.state_dict())
    give(fused, **buffers)
    return fused, plain


def fusing(config: MoEConfig) -> MoEConfig:
    return dataclasses.replace(config, gradient_accumulation_fusion=True)


def weights(layer):
    return {name: dict(layer.named_parameters())[name] for name in FUSED}


def give(layer, value=0.0, flag=False):
    for weight in weights(layer).values():
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        weight.main_grad = torch.full(weight.shape, value, dtype=wide, device=weight.device)
        if flag:
            weight.grad_added_to_main_grad = False


def batches(device, dtype, count=3):
    return [torch.randn(37 + 5 * i, HIDDEN).to(device, dtype) for i in range(count)]


def train(layer, micro_batches, call=lambda layer, x: layer(x)):
    """Outputs and input gradients of every micro-batch."""
    found = []
    for x in micro_batches:
        x = x.clone().requires_grad_()
        y = call(layer, x)
        y.float().sin().sum().backward()
        found += [y.detach(), x.grad]
    return found


def gradients_of_each(layer, micro_batches, call=lambda layer, x: layer(x)):
    """The weights' gradients of every micro-batch alone, in float64."""
    found = {name: [] for name in FUSED}
    layer = copy.deepcopy(layer)
    for x in micro_batches:
        layer.zero_grad()
        train(layer, [x], call)
        for name, weight in weights(layer).items():
            found[name].append(weight.grad.double())
    return found


def near(layer, each, dtype, start=0.0):
    """The buffers are start and the sum, but for the rounding of each gradient to dtype, and of float32 sums."""
    for name, weight in weights(layer).items():
        total, magnitude = start + sum(each[name]), start + sum(g.abs() for g in each[name])
        unit = torch.finfo(dtype).eps / 2 + 8 * torch.finfo(weight.main_grad.dtype).eps
        error = (weight.main_grad.double() - total).abs()
        # a few terms of which most cancel are summed in another order
        floor = 8 * torch.finfo(weight.main_grad.dtype).eps * magnitude.max() + torch.finfo(dtype).smallest_normal
        assert (error <= unit * magnitude + floor).all(), f"{name} is off by {float(error.max()):.3g}"
        assert magnitude.max() > start


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_over_micro_batches(case, dtype, device):
    """Buffers against the sum in float64 of the gradients without; everything else has the bits of without."""
    fused, plain = pair(case, device, dtype, value=0.25)
    micro_batches = batches(device, dtype)
    torch.manual_seed(1)
    found = train(fused, micro_batches)
    torch.manual_seed(1)
    expected = train(plain, micro_batches)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    for (name, mine), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        if name not in FUSED:
            assert (mine.grad is None) == (theirs.grad is None) and not hasattr(mine, "main_grad")
            assert mine.grad is None or torch.equal(mine.grad, theirs.grad), name
            continue
        assert mine.grad is None and not hasattr(mine, "grad_added_to_main_grad")
    torch.manual_seed(1)
    near(fused, gradients_of_each(plain, micro_batches), dtype, start=0.25)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_sum_is_float32s(dtype, device):
    """256 steps of a gradient that 16 bits would lose beside the sum."""
    fused, plain = pair("mixtral", device, dtype)
    (x,) = batches(device, dtype, 1)
    train(plain, [x])
    train(fused, [x] * 256)
    for mine, theirs in zip(weights(fused).values(), weights(plain).values(), strict=True):
        truth = 256 * theirs.grad.double()
        close(mine.main_grad, truth, units=2.0, of=dtype, magnitude=float(truth.abs().max()) * 1e-2)
        sum_in_16_bits = torch.zeros_like(theirs)
        for _ in range(256):
            sum_in_16_bits += theirs.grad
        off = [(t.double() - truth).square().mean().sqrt() for t in (mine.main_grad, sum_in_16_bits)]
        assert off[0] < 0.5 * off[1]


def test_products_are_added_before_they_are_rounded():
    """On the CPU a buffer of zeros holds the sums that the gradient is rounded from."""
    holds_what_is_rounded("mixtral", "cpu", torch.bfloat16, tokens=37)


def holds_what_is_rounded(case, device, dtype, tokens):
    fused, plain = pair(case, device, dtype)
    x = torch.randn(tokens, fused.config.hidden_size, device=device, dtype=dtype)
    train(fused, [x]), train(plain, [x])
    for mine, theirs in zip(weights(fused).values(), weights(plain).values(), strict=True):
        assert torch.equal(mine.main_grad.to(dtype), theirs.grad)
        assert not torch.equal(mine.main_grad, theirs.grad.float())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("case", ["mixtral", "deepseek", "gpt_oss", "global"])
def test_under_activation_checkpointing(case, reentrant, device):
    fused, _ = pair(case, device)
    again = copy.deepcopy(fused)
    give(again)
    micro_batches = batches(device, torch.float32)
    found = train(again, micro_batches, lambda layer, x: checkpoint(layer, x, use_reentrant=reentrant))
    for a, b in zip(found, train(fused, micro_batches), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(weights(again).values(), weights(fused).values(), strict=True):
        assert torch.equal(a.main_grad, b.main_grad) and a.main_grad.abs().sum() > 0


@pytest.mark.parametrize("zeros", [False, True])
def test_as_megatrons_wrapper_wants_it(zeros, device):
    """Its hook runs once a backward pass, finds a grad and the flag, and throws the grad away."""
    fused, plain = pair("mixtral", device)
    give(fused, flag=True)
    runs = {name: 0 for name, _ in fused.named_parameters()}

    def hook(name):
        def run(parameter):
            runs[name] += 1
            assert parameter.grad.shape == parameter.shape and parameter.grad.dtype == parameter.dtype
            if name in FUSED:
                assert parameter.grad_added_to_main_grad
                assert not zeros or not parameter.grad.any()
            if not hasattr(parameter, "main_grad"):
                parameter.main_grad = torch.zeros_like(parameter)
            if not getattr(parameter, "grad_added_to_main_grad", False):
                parameter.main_grad.add_(parameter.grad)
            parameter.grad = None

        return run

    for name, parameter in fused.named_parameters():
        parameter.zero_out_wgrad = zeros
        parameter.register_post_accumulate_grad_hook(hook(name))
    micro_batches = batches(device, torch.float32)
    train(fused, micro_batches), train(plain, micro_batches)
    assert set(runs.values()) == {len(micro_batches)}
    for (name, mine), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        scale = theirs.grad.abs().max()
        assert (mine.main_grad - theirs.grad).abs().max() <= 4e-6 * scale, name


def test_a_weight_without_a_buffer_or_gradient(device):
    fused, plain = pair("gpt_oss", device)
    del fused.experts.gate_up_proj.main_grad
    fused.experts.down_proj.requires_grad_(False)
    micro_batches = batches(device, torch.float32)
    train(fused, micro_batches), train(plain, micro_batches)
    assert torch.equal(fused.experts.gate_up_proj.grad, plain.experts.gate_up_proj.grad)
    assert fused.experts.down_proj.grad is None and not fused.experts.down_proj.main_grad.any()
    fused.experts.down_proj.requires_grad_(True)
    fused.experts.gate_up_proj.grad = None
    train(fused, micro_batches)
    assert torch.equal(fused.experts.gate_up_proj.grad, plain.experts.gate_up_proj.grad)
    expected = plain.experts.down_proj.grad
    assert (fused.experts.down_proj.main_grad - expected).abs().max() <= 4e-6 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, device):
    """Float32 weights, 16-bit products: the buffer holds float32 sums, the biases their float32 gradients."""
    fused, plain = pair("gpt_oss", device)
    micro_batches = batches(device, torch.float32)

    def narrow(layer, x):
        with torch.autocast(device, dtype):
            return layer(x)

    for a, b in zip(train(fused, micro_batches, narrow), train(plain, micro_batches, narrow), strict=True):
        assert torch.equal(a, b)
    near(fused, gradients_of_each(plain, micro_batches, narrow), dtype)
    for name, mine in fused.named_parameters():
        theirs = dict(plain.named_parameters())[name].grad
        if name not in FUSED:
            assert mine.grad.dtype == torch.float32 and torch.equal(mine.grad, theirs), name


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens, device):
    fused, plain = pair("mixtral", device)
    x = torch.randn(tokens, HIDDEN, device=device)
    train(fused, [x]), train(plain, [x])
    for mine, theirs in zip(weights(fused).values(), weights(plain).values(), strict=True):
        assert torch.equal(mine.main_grad, theirs.grad)


def test_without_gradients_nothing_is_kept_or_added(device):
    fused, plain = pair("mixtral", device)
    (x,) = batches(device, torch.float32, 1)
    with torch.no_grad():
        assert torch.equal(fused(x), plain(x))
    assert not any(w.main_grad.any() for w in weights(fused).values())


def test_the_second_derivative_is_refused(device):
    fused, _ = pair("mixtral", device)
    (x,) = batches(device, torch.float32, 1)
    x.requires_grad_()
    plan = ops.dispatch(torch.zeros(len(x), 1, dtype=torch.int64, device=device), fused.config.num_experts)
    output = fused.experts(x, torch.ones(len(x), 1, device=device), plan)
    (grad,) = torch.autograd.grad(output.sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_compiled_it_ends_the_graph():
    fused, plain = pair("mixtral")
    (x,) = batches("cpu", torch.float32, 1)
    compiled = torch.compile(fused, backend="aot_eager")
    train(compiled, [x]), train(plain, [x])
    for mine, theirs in zip(weights(fused).values(), weights(plain).values(), strict=True):
        assert (mine.main_grad - theirs.grad).abs().max() <= 1e-6 * theirs.grad.abs().max()
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("buffer", "says"),
    [
        (lambda w: torch.zeros(w.shape[1:]), r"down_proj.main_grad must be a torch.float32 tensor \[8, 16, 12\], got "
         r"torch.float32 \[16, 12\]"),
        (lambda w: torch.zeros(w.shape, dtype=torch.bfloat16), "must be a torch.float32 tensor .* got torch.bfloat16"),
        (lambda w: [0.0], r"must be a torch.float32 tensor .* got list"),
        (lambda w: torch.zeros(w.shape[::-1]).permute(2, 1, 0), "down_main_grad must be contiguous, got strides"),
    ],
)  # fmt: skip
def test_a_buffer_that_does_not_fit(buffer, says):
    fused, _ = pair("mixtral")
    (x,) = batches("cpu", torch.float32, 1)
    fused.experts.down_proj.main_grad = buffer(fused.experts.down_proj)
    with pytest.raises(ValueError, match=says):
        fused(x).sum().backward()


def test_expert_parallelism_is_refused():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        with pytest.raises(ValueError, match="gradient_accumulation_fusion must be False, got True"):
            parallelize_module(pair("mixtral")[0], mesh, ExpertParallel())
    finally:
        dist.destroy_process_group()


@pytest.mark.cuda
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [5, 386])
def test_hopper_kernels_add_before_they_round(tokens, dtype):
    """Sizes that no tile divides, experts without tokens, rows of gate and up that alternate, weights on the input."""
    holds_what_is_rounded(MoEConfig(136, 72, 16, top_k=2), "cuda", dtype, tokens)
    holds_what_is_rounded(MoEConfig(520, 264, 4, top_k=1, activation="relu"), "cuda", dtype, tokens)
    holds_what_is_rounded(MoEConfig(264, 200, 8, interleaved=True, weight_on_input=True), "cuda", dtype, tokens)


@pytest.mark.cuda
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_at_sizes_of_the_hopper_kernels(dtype, recompute):
    """And without a wait for the device."""
    config = MoEConfig(128, 64, 16, top_k=4, bias=True, recompute=recompute)
    fused, plain = pair(config, "cuda", dtype)
    micro_batches = [torch.randn(386 + i, 128, device="cuda", dtype=dtype) for i in range(3)]
    train(fused, micro_batches[:1])
    give(fused, flag=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = train(fused, micro_batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(found, train(plain, micro_batches), strict=True):
        assert torch.equal(a, b)
    near(fused, gradients_of_each(plain, micro_batches), dtype)
    assert all(weight.grad_added_to_main_grad for weight in weights(fused).values())
