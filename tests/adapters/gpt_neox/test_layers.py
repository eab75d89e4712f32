"""Transformer layers with our experts, on both residual paths: every value defined, the attention kept, gradients.

Run against small layers of our own, and by test_real.py against GPT-NeoX itself.
"""

import itertools
import sys
from types import SimpleNamespace

import pytest
import torch

from megatron_adapters import gpt_neox

SEQUENCE, BATCH, HIDDEN, EXPERTS = 6, 3, 16, 4


def arguments(host, **changes):
    # the names of both eras: each reads its own
    return host.arguments(moe_num_experts=EXPERTS, num_experts=EXPERTS, **changes)


def mask():
    return torch.triu(torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool), 1)[None, None]


def expected_output(layer, x):
    """The layer's formula over its own parts, with what its experts return."""
    attention, bias = layer.attention(layer.input_layernorm(x), mask(), layer_past=None)
    attention = attention if bias is None else attention + bias
    if layer.gpt_j_residual:
        normed = layer.input_layernorm(x) if layer.gpt_j_tied else layer.post_attention_layernorm(x)
        return x + attention + layer.mlp(normed)[0]
    attention = x + attention
    return attention + layer.mlp(layer.post_attention_layernorm(attention))[0]


def test_a_model_without_experts_may_have_settings_that_experts_lack(era, host):
    args = host.arguments(moe_num_experts=1, num_experts=1, activation="mish", sequence_parallel=True)
    try:
        layer = host.layer(args)
    except ValueError as error:  # the real host's own opinion of the activation
        assert "GPT-NeoX: --" not in str(error)
    else:
        assert not isinstance(layer.mlp, (gpt_neox.ParallelDroplessMoE, gpt_neox.MoEWithLoss))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("parallel, tied", [(False, False), (True, False), (True, True)])
def test_every_path(era, host, parallel, tied, training):
    for top_k, pipe in itertools.product((1, 2), (False, True)):
        torch.manual_seed(top_k)
        args = arguments(host, gpt_j_residual=parallel, gpt_j_tied=tied, moe_top_k=top_k)
        layer = host.layer(args, pipe=pipe).train(training)
        assert isinstance(layer.mlp, gpt_neox.ParallelDroplessMoE if era == "now" else gpt_neox.MoEWithLoss)
        layer.mlp.loss_coefficient = 0.0  # the balance loss has a test of its own
        x = torch.randn(SEQUENCE, BATCH, HIDDEN, requires_grad=True)
        torch.manual_seed(5)
        if pipe:
            output, passed = layer((x, mask()))
            assert torch.equal(passed, mask())
            values = (output, layer.last_moe_loss) if era == "moe_loss" else output
        else:
            values = layer(x, mask())
        if era == "now":
            assert isinstance(values, torch.Tensor)
            output = values
        else:
            output, moe_loss = values
            assert isinstance(moe_loss, torch.Tensor) and moe_loss.shape == ()
            assert (moe_loss.dtype, moe_loss.device) == (x.dtype, x.device)
            assert moe_loss >= 0.5 and not moe_loss.requires_grad
        torch.manual_seed(5)
        expected = expected_output(layer, x)
        assert output.shape == x.shape and output.dtype == x.dtype
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
        (gradient,) = torch.autograd.grad(expected.sin().sum(), x, retain_graph=True)
        output.sin().sum().backward()
        torch.testing.assert_close(x.grad, gradient, rtol=1e-4, atol=2e-5)
        unused = {"post_attention_layernorm"} if parallel and tied else set()
        for name, parameter in layer.named_parameters():
            if name.partition(".")[0] not in unused:
                assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert layer.attention.dense.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("parallel", [False, True])
def test_the_attention_is_kept(era, host, parallel):
    layer = host.layer(arguments(host, gpt_j_residual=parallel))
    with torch.no_grad():
        for name, parameter in layer.mlp.named_parameters():
            if name.endswith("w2") or "dense_4h_to_h" in name:
                parameter.zero_()
    x = torch.randn(SEQUENCE, BATCH, HIDDEN)
    values = layer(x, mask())
    attention, bias = layer.attention(layer.input_layernorm(x), mask(), layer_past=None)
    attention = attention if bias is None else attention + bias
    torch.testing.assert_close(values if era == "now" else values[0], x + attention)
    assert attention.abs().max() > 0.01


@pytest.mark.parametrize("parallel", [False, True])
def test_dense_layers_return_as_many_values(era, host, parallel):
    args = arguments(host, gpt_j_residual=parallel, moe_expert_interval=2, expert_interval=2)
    layer = host.layer(args, layer_number=1)
    assert type(layer.mlp).__name__ == "ParallelMLP"
    x = torch.randn(SEQUENCE, BATCH, HIDDEN)
    values = layer(x, mask())
    if era == "now":
        assert isinstance(values, torch.Tensor) and values.shape == x.shape
    else:
        output, moe_loss = values
        assert output.shape == x.shape and moe_loss.shape == () and moe_loss.dtype == x.dtype and moe_loss == 0


@pytest.mark.parametrize("parallel", [False, True])
def test_bfloat16(era, host, parallel):
    layer = host.layer(arguments(host, gpt_j_residual=parallel, params_dtype=torch.bfloat16)).bfloat16()
    x = torch.randn(SEQUENCE, BATCH, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    values = layer(x, mask())
    output = values if era == "now" else values[0]
    assert output.dtype == torch.bfloat16
    if era == "moe_loss":
        assert values[1].dtype == torch.bfloat16
    output.float().sum().backward()
    assert all(p.grad is not None for p in layer.mlp.parameters())


def test_refused_when_the_model_is_built(era, host):
    changes = {"moe_lbl_in_fp32": True} if era == "now" else {"use_tutel": True}
    name = next(iter(changes)).replace("_", "-")
    with pytest.raises(ValueError, match=f"--{name} is not honoured"):
        host.layer(arguments(host, **changes))


@pytest.mark.parametrize("scale", [1.0, 64.0])
@pytest.mark.parametrize("parallel", [False, True])
def test_the_balance_loss_reaches_the_router_once(era, host, parallel, scale, monkeypatch):
    if era != "moe_loss":
        pytest.skip("this era has no balance loss")
    training = sys.modules["megatron.training"]
    args = arguments(
        host, gpt_j_residual=parallel, moe_use_residual=False, moe_loss_coeff=0.25, moe_token_dropping=False
    )
    layer = host.layer(args, pipe=True)
    x = torch.randn(SEQUENCE, BATCH, HIDDEN)

    def model(inputs, neox_args=None):
        output, _ = layer((x, mask()))
        return output, [layer.last_moe_loss]

    # the layer's output has no part in the loss: what reaches the router is the balance loss alone
    batch = (None, None, None, mask(), None)
    monkeypatch.setattr(training, "get_batch", lambda neox_args, data_iterator: batch, raising=False)
    monkeypatch.setattr(training, "cross_entropy", lambda output, *_, **__: (output * 0).sum() + 2.0, raising=False)
    args.fp16_lm_cross_entropy = args.memory_profiling = args.curriculum_learning = False
    loss = training.forward_step(iter([None]), model, args, None)
    logits = []
    hook = layer.mlp.register_forward_pre_hook(lambda _, given: logits.append(given[0].detach()))
    layer((x, mask()))
    hook.remove()
    weight = layer.mlp.deepspeed_moe.gate.wg.weight.detach().clone().requires_grad_()
    probs = (logits[0].reshape(-1, HIDDEN) @ weight.t()).softmax(-1)
    share = torch.nn.functional.one_hot(probs.argmax(-1), EXPERTS).float().mean(0)
    moe_loss = EXPERTS * (share * probs.mean(0)).sum()
    (0.25 * scale * moe_loss).backward()
    torch.testing.assert_close(loss.detach(), 2.0 + 0.25 * moe_loss.detach())
    (loss * scale).backward()
    torch.testing.assert_close(layer.mlp.deepspeed_moe.gate.wg.weight.grad, weight.grad, rtol=1e-4, atol=1e-6)
    gpt_neox.with_loss.loss_scale(x.device).fill_(1.0)


def test_install_names_its_eras():
    with pytest.raises(ValueError, match="era must be one of 'now', 'moe_loss', got 'then'"):
        gpt_neox.install("then")
    assert SimpleNamespace(**vars(gpt_neox)).ERAS == ("now", "moe_loss")
