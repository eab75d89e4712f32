"""The layers of both eras on a GPU: output, loss, gradients and training steps of the same weights on the CPU."""

import copy
import sys

import pytest
import torch
from support.same_draws import same_draws

from megatron_adapters import gpt_neox

from . import test_dropless as dropless
from . import test_with_loss as with_loss
from .test_layers import BATCH, HIDDEN, SEQUENCE, arguments, mask

pytestmark = pytest.mark.cuda
DEVICE = "cuda"


def same(found, expected, relative, name):
    assert found.device.type == DEVICE and found.dtype == expected.dtype, name
    if expected.numel():
        error = (found.cpu() - expected).double().abs().max()
        largest = expected.double().abs().max()
        # what is left of terms that cancel may be no larger than their rounding
        allowed = relative * largest + (1e-12 if found.dtype == torch.float64 else 0.0)
        assert error <= allowed, f"{name} is off by {error:.3g} where the largest is {largest:.3g}"


def same_on_both(layer, x, outputs, relative):
    """outputs(layer, x), tensors by name, and the gradients of x and the parameters, of layer here and on the GPU."""
    results = []
    for device in ("cpu", DEVICE):
        where, given = copy.deepcopy(layer).to(device), x.detach().to(device, copy=True).requires_grad_()
        with same_draws(7):
            named = outputs(where, given)
        output = named["output"]
        target = torch.linspace(-1, 2, output.numel(), dtype=output.dtype, device=device).reshape(output.shape)
        (output * target).sum().backward()
        named["x"] = given.grad
        named |= {name: p.grad for name, p in where.named_parameters()}
        results.append({name: t if t is None else t.detach() for name, t in named.items()})
    expected, found = results
    for name, tensor in expected.items():
        if tensor is None:
            assert found[name] is None, name
        else:
            same(found[name], tensor, relative, name)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pipe", [False, True])
@pytest.mark.parametrize("parallel, tied", [(False, False), (True, False), (True, True)])
def test_transformer_layers(era, host, parallel, tied, pipe, training):
    for top_k in (1, 2):
        torch.manual_seed(top_k)
        args = arguments(host, gpt_j_residual=parallel, gpt_j_tied=tied, moe_top_k=top_k)
        # with one expert a token the router's gradient is what a cancellation leaves: float32 would have no digit of it
        layer = host.layer(args, pipe=pipe).cpu().double().train(training)
        x = torch.randn(SEQUENCE, BATCH, HIDDEN, dtype=torch.float64)

        def outputs(layer, x, pipe=pipe):
            given = mask().to(x.device)
            values = layer((x, given)) if pipe else layer(x, given)
            if pipe:
                assert values[1] is given
                values = (values[0], layer.last_moe_loss) if era == "moe_loss" else values[0]
            if era == "now":
                return {"output": values}
            output, moe_loss = values
            assert moe_loss.shape == () and moe_loss.dtype == x.dtype
            return {"output": output, "moe_loss": moe_loss}

        same_on_both(layer, x, outputs, 1e-6)


@pytest.mark.parametrize("parallel", [False, True])
def test_bfloat16(era, host, parallel):
    layer = host.layer(arguments(host, gpt_j_residual=parallel, params_dtype=torch.bfloat16)).bfloat16().to(DEVICE)
    x = torch.randn(SEQUENCE, BATCH, HIDDEN, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    values = layer(x, mask().to(DEVICE))
    output = values if era == "now" else values[0]
    assert output.dtype == torch.bfloat16 and output.device == x.device
    if era == "moe_loss":
        assert (values[1].dtype, values[1].device) == (torch.bfloat16, x.device)
    exact = copy.deepcopy(layer).cpu().float()
    with torch.no_grad():
        layer.eval(), exact.eval()
        found, expected = (
            values if era == "now" else values[0]
            for values in (layer(x, mask().to(DEVICE)), exact(x.detach().cpu().float(), mask()))
        )
    # a token that rounding sends to another expert may differ, and one for which there is no room then
    off = (found.cpu().float() - expected).norm(dim=-1) > 0.05 * expected.norm(dim=-1)
    assert off.sum() <= 2
    output.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.mlp.parameters())


@pytest.mark.parametrize("parallel", [False, True])
def test_training_steps(era, host, parallel, monkeypatch):
    """Three steps, in the moe_loss era by the host's forward_step, whose loss scale the layers are given."""
    training = sys.modules["megatron.training"]
    args = arguments(host, gpt_j_residual=parallel, moe_loss_coeff=0.25)
    args.fp16_lm_cross_entropy = args.memory_profiling = args.curriculum_learning = False
    torch.manual_seed(2)
    start = torch.nn.ModuleList([host.layer(args, pipe=True) for _ in range(2)]).cpu()
    x, target = torch.randn(2, SEQUENCE, BATCH, HIDDEN)
    results = []
    for device in ("cpu", DEVICE):
        layers, inputs, seen = copy.deepcopy(start).to(device), x.to(device), mask().to(device)

        def model(given, neox_args=None, layers=layers, inputs=inputs, seen=seen):
            values = (inputs, seen)
            for layer in layers:
                values = layer(values)
            return values[0], [layer.last_moe_loss for layer in layers] if era == "moe_loss" else []

        def cross_entropy(output, *_, device=device, **__):
            return (output - target.to(device)).square().mean()

        batch = (None, None, None, seen, None)
        monkeypatch.setattr(training, "get_batch", lambda *_, batch=batch, **__: batch, raising=False)
        monkeypatch.setattr(training, "cross_entropy", cross_entropy, raising=False)
        optimizer = torch.optim.SGD(layers.parameters(), lr=0.05)
        losses = []
        for step in range(3):
            optimizer.zero_grad()
            with same_draws(step):
                if era == "moe_loss":
                    loss = training.forward_step(iter([None]), model, args, None)
                else:
                    loss = cross_entropy(model(None)[0])
                # as with a loss scale
                (loss * 8).backward()
            for parameter in layers.parameters():
                if parameter.grad is not None:
                    parameter.grad /= 8
            optimizer.step()
            losses.append(loss.detach())
        assert losses[-1] < losses[0]
        results.append({"losses": torch.stack(losses)} | {n: p.detach() for n, p in layers.named_parameters()})
    for name, expected in results[0].items():
        same(results[1][name], expected, 1e-3, name)


# --- the experts alone ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("router", ["sinkhorn", "topk"])
def test_dropless(router, top_k, activation, training):
    layer = dropless.layer_of(
        moe_router_type=router, moe_top_k=top_k, activation=activation, params_dtype=torch.float64,
        moe_jitter_eps=0.1 if router == "topk" else None,
    )  # fmt: skip
    assert all(p.device.type == DEVICE for p in layer.parameters())  # as the host makes it
    x = torch.randn(7, 3, dropless.HIDDEN, dtype=torch.float64)
    # Sinkhorn's scores are float32, and choose alone
    same_on_both(layer.cpu().train(training), x, lambda layer, x: {"output": layer(x)[0]}, 1e-10)


def test_sinkhorn():
    for scale in (0.1, 1.0, 5.0):
        logits = scale * torch.randn(50, 4)
        found = gpt_neox.dropless.sinkhorn(logits.to(DEVICE))
        assert found.device.type == DEVICE
        torch.testing.assert_close(found.cpu(), dropless.sinkhorn(logits), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("k", [1, 2])
def test_with_a_loss(k, training, drop, residual):
    layer = with_loss.layer_of(k=k, drop_tokens=drop, use_residual=residual).train(training)
    layer.loss_coefficient = 0.1

    def outputs(layer, x):
        output, moe_loss, counts = layer(x)
        return {"output": output, "moe_loss": moe_loss, "counts": counts}

    same_on_both(layer, torch.randn(4, 6, with_loss.HIDDEN), outputs, 2e-4)


@pytest.mark.parametrize("kind", ["dropless sinkhorn", "dropless topk", "one expert", "two experts"])
def test_a_step_does_not_wait_for_the_gpu(kind):
    if kind.startswith("dropless"):
        layer = dropless.layer_of(moe_router_type=kind.split()[1])
        x = torch.randn(7, 3, dropless.HIDDEN, device=DEVICE, requires_grad=True)
    else:
        layer = with_loss.layer_of(k=1 if kind == "one expert" else 2).to(DEVICE)
        layer.loss_coefficient = 0.1
        x = torch.randn(24, with_loss.HIDDEN, device=DEVICE, requires_grad=True)
    layer(x)[0].square().sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x)[0].square().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
