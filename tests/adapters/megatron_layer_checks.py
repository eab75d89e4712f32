"""Checks of arguments, layer and walks; see megatron_checks.py."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron_compare import STRATEGIES, check, close, copy_weights, plain_experts, strategy_arguments
from megatron_host import BATCH, HIDDEN, LAYERS, LENGTH, Host
from torch import Tensor, nn

from megatron_adapters.arguments import ArgumentError


@check
def the_parser_fills_every_argument(host: Host) -> None:
    config = host.adapter.moe_config(host.parse("--fmoe-num-experts", "4"))
    assert (config.num_experts, config.top_k, config.hidden_size) == (4, 2, HIDDEN)
    assert config.intermediate_size == 4 * HIDDEN // 2
    args = host.parse(
        "--num-experts", "8", "--top-k", "4", "--hidden-hidden-size", "24", "--balance-strategy", "naive",
        "--balance-loss-weight", "0.5",
    )  # fmt: skip
    config = host.adapter.moe_config(args)
    assert (config.num_experts, config.top_k, config.intermediate_size) == (8, 4, 24)


@check
def num_experts_is_enough(host: Host) -> None:
    """v2.2 had no fmoe_num_experts, v2.5 one that nothing set, v3.0.2 one that is None."""
    host.start()
    args = host.parse("--fmoefy", "--num-experts", "4")
    host.module("global_vars")._GLOBAL_ARGS = args
    assert getattr(args, "fmoe_num_experts", None) is None
    host.build()
    assert [layer.num_expert for layer in host.layers()] == [4] * LAYERS
    assert args.fmoe_num_experts == 4


@check
def wrong_arguments_are_refused_before_the_model_is_built(host: Host) -> None:
    host.start()
    built = []
    provider = host.adapter.patch_model_provider(lambda *_, **__: built.append(1))
    for argv, named in (
        ((), "--fmoe-num-experts or --num-experts must be given"),
        (("--fmoe-num-experts", "4", "--num-experts", "8"), "contradicts --num-experts 8"),
        (("--fmoe-num-experts", "4", "--balance-strategy", "switch"), "contradicts --balance-strategy 'switch'"),
        (("--fmoe-num-experts", "4", "--DDP-impl", "torch"), "--DDP-impl is not honoured"),
    ):
        host.module("global_vars")._GLOBAL_ARGS = host.parse("--fmoefy", *argv)
        with pytest.raises(ArgumentError) as refused:
            provider()
        assert named in str(refused.value) and f"Megatron-LM v{host.version}" in str(refused.value)
    assert not built


@check
def without_fmoefy_the_model_stays(host: Host) -> None:
    args = host.start()
    args.fmoefy = False
    host.build()
    assert host.layers() == []
    loss = host.train_step([host.data()])[0]
    assert set(loss) == {"lm loss"}


@check
def the_example_fits_the_parser(host: Host) -> None:
    """The command line in examples/megatron, without the options that the stand-in leaves out."""
    script = Path(__file__).parents[2] / "examples" / "megatron" / f"pretrain_gpt_v{host.version}.sh"
    text = script.read_text().replace("\\\n", " ")
    line = next(line for line in text.splitlines() if line.startswith("torchrun"))
    values = {"$DATA": "data", "$VOCAB": "vocabulary", "$MERGES": "merges", "${SAVE:-checkpoints}": "folder"}
    line = re.sub(r'"\$\(\(.*?\)\)"', "32", line)
    words = [values.get(word, word) for word in shlex.split(line)]
    assert words[words.index("--host") + 1] == host.version
    sys.argv = words[words.index("pretrain_gpt.py") :]
    if host.version == "2.2":  # the parser would compile the host's CUDA kernels
        sys.argv.append("--no-scaled-masked-softmax-fusion")
    parse = host.module("arguments").parse_args
    args = parse(host.adapter.add_arguments, **({} if host.real else {"ignore_unknown_args": True}))
    config = host.adapter.moe_config(args)
    assert (config.num_experts, config.top_k, config.hidden_size, config.intermediate_size) == (4, 2, 768, 1536)
    assert args.fmoefy and args.params_dtype == (torch.float16 if host.version == "2.2" else torch.bfloat16)


@check
def a_layer_returns_output_and_bias(host: Host) -> None:
    """Arity, shapes, dtypes and gradients, of every gate, in training and evaluation, in float32 and bfloat16."""
    for strategy in STRATEGIES:
        args = host.start(*strategy_arguments(strategy))
        layer = host.adapter.MegatronMLP(args, 0)
        for dtype in (torch.float32, torch.bfloat16):
            layer.to(dtype)
            for training in (True, False):
                layer.train(training)
                x = torch.randn(LENGTH, BATCH, HIDDEN, dtype=dtype, requires_grad=True)
                given = layer(x)
                assert type(given) is tuple and len(given) == 2
                output, bias = given
                assert output.shape == x.shape and output.dtype == dtype
                assert type(bias) is Tensor and bias.shape == (HIDDEN,) and bias.dtype == dtype
                assert bias.device == x.device and not bias.any()
                layer.zero_grad()
                (output + bias.expand_as(output)).float().square().sum().backward()
                assert x.grad.abs().sum() > 0
                assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.experts.parameters())


@check
def a_layer_is_its_formula(host: Host) -> None:
    args = host.start()
    layer = host.adapter.MegatronMLP(args, 0).double()
    x = torch.randn(LENGTH, BATCH, HIDDEN, dtype=torch.float64, requires_grad=True)
    target = torch.randn(LENGTH, BATCH, HIDDEN, dtype=torch.float64)
    inputs = [x, *layer.parameters()]
    output = layer(x)[0]
    found = torch.autograd.grad((output * target).sum(), inputs)
    expected = plain_experts(layer, x.reshape(-1, HIDDEN)).reshape(x.shape)
    close(output, expected, 1e-12)
    for mine, theirs in zip(found, torch.autograd.grad((expected * target).sum(), inputs), strict=True):
        close(mine, theirs, 1e-11)


@check
def in_the_hosts_layer_equal_experts_are_its_own_mlp(host: Host) -> None:
    """The host's transformer layers with experts that all hold its MLP's weights: the same model."""
    host.start("--hidden-hidden-size", str(4 * HIDDEN))
    torch.manual_seed(5)
    dense = host.provider()()
    moe = host.provider()()
    copy_weights(dict(dense.named_parameters()), moe)
    host.adapter.fmoefy(moe, distributed_experts=None)
    layers = list(_transformer_layers(host, dense))
    with torch.no_grad():
        for theirs, ours in zip(layers, host.adapter.moe_layers(moe), strict=True):
            for mine, part in (
                (ours.experts.htoh4, theirs.mlp.dense_h_to_4h),
                (ours.experts.h4toh, theirs.mlp.dense_4h_to_h),
            ):
                part.bias.normal_()
                mine.weight.copy_(part.weight.expand_as(mine.weight))
                mine.bias.copy_(part.bias.expand_as(mine.bias))
    step = host.forward_step()
    losses = []
    for model in (dense, moe):
        host.model = model
        given = step(iter([host.data()]), model, *([None] if host.version == "2.2" else []))
        loss = given[0] if host.version == "2.2" else given[1](given[0])[0]
        loss.backward()
        losses.append(loss)
    close(losses[1], losses[0], 1e-5)
    close(moe.language_model.embedding.word_embeddings.weight.grad,
          dense.language_model.embedding.word_embeddings.weight.grad, 1e-4)  # fmt: skip


def _transformer_layers(host: Host, model: nn.Module):
    from megatron_adapters.megatron_lm.model import transformer_layers

    return transformer_layers(model, host.version)


@check
def a_model_of_another_version_is_refused(host: Host) -> None:
    args = host.start()
    wrong = SimpleNamespace(language_model=SimpleNamespace(layers=[]))
    with pytest.raises(ValueError, match=f"model must be one of Megatron-LM v{host.version} with model.language_model"):
        host.adapter.fmoefy(wrong, args=args)
    other = "v2.5" if host.version == "2.2" else "v2.2"
    for patch in (host.adapter.patch_model_provider, host.adapter.patch_forward_step):
        with pytest.raises(ValueError, match=f"this is the adapter of Megatron-LM v{host.version}, got '{other}'"):
            patch(lambda: None, Megatron_Version=other)
        patch(lambda: None, Megatron_Version="v" + host.version)


@check
def a_decoder_is_replaced_too(host: Host) -> None:
    args = host.start()
    layers = [nn.ModuleList([nn.ModuleDict({"mlp": nn.Linear(2, 2)}), nn.Identity()]) for _ in range(2)]

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Linear(2, 2, dtype=torch.bfloat16)

    names = ("transformer",) if host.version == "2.2" else ("encoder", "decoder")
    layers = {name: nn.ModuleList([Layer(), nn.Identity(), Layer()]) for name in names}
    model = SimpleNamespace(language_model=SimpleNamespace(**{n: SimpleNamespace(layers=m) for n, m in layers.items()}))
    host.adapter.fmoefy(SimpleNamespace(module=model), args=args)
    found = host.adapter.moe_layers(model)
    assert [layer.layer_idx for layer in found] == list(range(2 * len(names)))
    assert {p.dtype for layer in found for p in layer.parameters()} == {torch.bfloat16}
    assert all(layer.balance_weight == 1 / len(found) for layer in found)
    if host.version != "2.2":  # a pipeline stage without the one or the other
        model.language_model.encoder = None
        assert len(host.adapter.moe_layers(model)) == 2
        model.language_model.encoder, model.language_model.decoder = model.language_model.decoder, None
        assert len(host.adapter.moe_layers(model)) == 2
