"""Failures of gradients and losses."""

import pytest
import torch
from support import oracle, tolerance
from support.samples import experts_inputs, leaves, normal, run_experts
from torch.utils.checkpoint import checkpoint

from fastmoe_cpp import MoE, MoEConfig, RouterConfig


def make(device, dtype=torch.float64, router=None, **changes):
    torch.manual_seed(1)
    sizes = {"hidden_size": 8, "intermediate_size": 4, "num_experts": 6, "top_k": 2, "initializer_range": 0.5}
    return MoE(MoEConfig(**sizes | changes, router=router or RouterConfig()), device=device).to(dtype)


@pytest.mark.parametrize("form", ["switch", "huggingface", "batch", "sequence", "global"])
def test_the_aux_loss_alone_moves_the_router(form, device):
    """The auxiliary loss was computed, logged and never connected: the router's gradient from it was zero [NeMo
    Automodel]."""
    layer = make(device, router=RouterConfig(balance_loss=form, balance_loss_coefficient=1.0))
    x = normal(20, 8, device=device)
    layer.forward_with_routing(x).aux_loss.backward()
    assert layer.router.weight.grad.norm() > 1e-4
    # and through forward, whose output is not even looked at
    layer.zero_grad()
    (layer(x) * 0).sum().backward()
    assert layer.router.weight.grad.norm() > 1e-4
    assert layer.experts.gate_up_proj.grad.norm() == 0


def test_the_z_loss_alone_moves_the_router(device):
    """The same of the z-loss."""
    layer = make(device, router=RouterConfig(z_loss_coefficient=1.0))
    (layer(normal(20, 8, device=device)) * 0).sum().backward()
    assert layer.router.weight.grad.norm() > 1e-4


@pytest.mark.parametrize("parts", [2, 4])
def test_aux_losses_do_not_scale_with_micro_batches(parts, device):
    """The auxiliary losses' share of the gradient grew with the number of micro-batches or accumulation steps
    [Megatron-LM]."""
    router = RouterConfig(balance_loss="sequence", balance_loss_coefficient=0.3, z_loss_coefficient=0.2)
    layer = make(device, router=router)
    x = normal(4, 6, 8, device=device)
    layer(x).square().mean().backward()
    whole = {n: p.grad.clone() for n, p in layer.named_parameters()}
    layer.zero_grad()
    layer.aux_loss_scale = 1 / parts
    for piece in x.chunk(parts):
        (layer(piece).square().mean() / parts).backward()
    for name, p in layer.named_parameters():
        tolerance.close(p.grad, whole[name], units=64, what=name)


@pytest.mark.parametrize("form", ["switch", "huggingface", "batch", "sequence", "global"])
def test_aux_losses_do_not_scale_with_the_number_of_tokens(form, device):
    """The same tokens twice are the same balance: neither loss nor gradient may double [Megatron-LM]."""
    layer = make(device, router=RouterConfig(balance_loss=form, balance_loss_coefficient=1.0, z_loss_coefficient=1.0))
    x = normal(2, 6, 8, device=device)
    results = []
    for batch in (x, torch.cat([x, x])):
        layer.zero_grad()
        layer.update_expert_bias()
        out = layer.forward_with_routing(batch)
        out.aux_loss.backward()
        results.append((out.aux_loss.detach(), layer.router.weight.grad.clone()))
    torch.testing.assert_close(*[r[0] for r in results], rtol=1e-9, atol=0)
    tolerance.close(results[1][1], results[0][1].double(), units=1024)


@pytest.mark.parametrize("parts", [2, 5])
def test_gradients_of_parts_add_up_to_the_whole(parts, device):
    """Expert gradients came out doubled, or lacked a division: checked where no group is involved yet [PyTorch,
    MegaBlocks, DeepSpeed]."""
    inputs = experts_inputs(50, 8, 6, 5, 2, device=device, bias=True)
    cotangent = normal(50, 8, seed=3, device=device)
    names = ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias")

    def grads(rows):
        given = leaves(
            {k: v[rows] if k in ("hidden_states", "topk_weights", "topk_ids") else v for k, v in inputs.items()}
        )
        return torch.autograd.grad(run_experts(given), [given[n] for n in names], cotangent[rows])

    whole = grads(slice(None))
    summed = [sum(g) for g in zip(*[grads(r) for r in torch.arange(50, device=device).chunk(parts)], strict=True)]
    for name, a, b in zip(names, summed, whole, strict=True):
        tolerance.close(a, b, what=name)


def test_the_routers_gradient_is_right_and_not_only_the_loss(device):
    """The loss agreed to many digits while the router's gradient was wrong [transformers]."""
    layer = make(device)
    x = normal(30, 8, device=device)
    given = [
        p.detach().clone().requires_grad_()
        for p in (layer.router.weight, layer.experts.gate_up_proj, layer.experts.down_proj)
    ]
    logits = oracle.router_logits(x, given[0])
    ids = oracle.select(oracle.selection_keys(logits.detach()), 2)
    weights, _ = oracle.routing_weights(logits, ids)
    truth = oracle.experts(x, given[1], given[2], weights, ids).square().sum()
    loss = layer(x).square().sum()
    torch.testing.assert_close(loss, truth, rtol=1e-12, atol=0)
    loss.backward()
    ours = (layer.router.weight.grad, layer.experts.gate_up_proj.grad, layer.experts.down_proj.grad)
    for name, a, b in zip(("router", "gate_up", "down"), ours, torch.autograd.grad(truth, given), strict=True):
        assert b.norm() > 1e-3
        tolerance.close(a, b, what=name)


@pytest.mark.parametrize("reentrant", [False, True])
def test_counts_are_committed_once_a_step(reentrant, device):
    """Recomputation and micro-batches counted tokens twice, and the selection bias moved twice a step [TorchTitan]."""
    layer = make(device, torch.float32, router=RouterConfig(expert_bias=True, expert_bias_update_rate=0.125))
    pieces = normal(3, 10, 8, dtype=torch.float32, device=device)
    for piece in pieces:
        checkpoint(layer, piece.requires_grad_(), use_reentrant=reentrant).sum().backward()
    assert int(layer.router.tokens_per_expert.sum()) == 3 * 10 * 2
    counts = layer.router.tokens_per_expert.clone()
    layer.update_expert_bias()
    expected = 0.125 * torch.sign(counts.double().mean() - counts)
    assert torch.equal(layer.router.expert_bias.double(), expected) and expected.abs().sum() > 0
    before = layer.router.expert_bias.clone()
    layer.update_expert_bias()
    assert torch.equal(layer.router.expert_bias, before) and int(layer.router.tokens_per_expert.sum()) == 0
    layer.eval()
    layer(pieces[0])
    assert int(layer.router.tokens_per_expert.sum()) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_small_output_is_compared_at_its_own_scale(dtype, device):
    """A wrong SwiGLU passed with an absolute tolerance of 1.4e-2 on outputs of 1e-5 [sonic-moe]."""
    inputs = experts_inputs(40, 16, 8, 4, 2, dtype=dtype, device=device)
    inputs["gate_up_proj"] = (inputs["gate_up_proj"] * 1e-2).to(dtype)
    inputs["down_proj"] = (inputs["down_proj"] * 1e-1).to(dtype)
    names = ("hidden_states", "gate_up_proj", "down_proj", "topk_weights")
    out = run_experts(inputs)
    truth = oracle.experts(*[inputs[n].double() for n in names], inputs["topk_ids"])
    eager = oracle.experts(*[inputs[n] for n in names], inputs["topk_ids"])
    assert tolerance.rms(truth) < 1e-4
    tolerance.close(out, truth, eager)
    half = inputs["gate_up_proj"].shape[1] // 2
    swapped = torch.cat([inputs["gate_up_proj"][:, half:], inputs["gate_up_proj"][:, :half]], dim=1)
    with pytest.raises(AssertionError):
        tolerance.close(run_experts(inputs | {"gate_up_proj": swapped}), truth, eager)
