"""What must hold of an adapter in its host, on one rank: every function is a check, run by ``test_megatron_lm.py``.

As a program: ``megatron_checks.py VERSION (CHECKOUT | stand-in) OUTPUT`` runs them all in one process and writes
{check: None or its traceback} as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import json
import os
import re
import shlex
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from megatron_host import (
    BATCH,
    EXPERTS,
    HIDDEN,
    LAYERS,
    LENGTH,
    RECOMPUTE,
    VOCABULARY,
    BalancedGate,
    Host,
    open_world,
    prepare,
)

from megatron_adapters.arguments import ArgumentError

STRATEGIES = (None, "naive", "noisy", "gshard", "switch", "swipe")
CHECKS: dict[str, Callable[[Host], None]] = {}


def check(function: Callable[[Host], None]) -> Callable[[Host], None]:
    CHECKS[function.__name__] = function
    return function


def strategy_arguments(strategy: str | None) -> list[str]:
    given = [] if strategy is None else ["--balance-strategy", strategy]
    return [*given, "--top-k", "1"] if strategy == "switch" else given


def close(found: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    """Within relative of the expected tensor's RMS."""
    assert found.shape == expected.shape
    rms = expected.double().square().mean().sqrt()
    error = (found.double() - expected.double()).abs().max()
    assert error <= relative * rms, f"off by {error:.3g} where the RMS is {rms:.3g}"


def all_close(found: dict[str, Tensor], expected: dict[str, Tensor], relative: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    largest = max(t.double().square().mean().sqrt() for t in expected.values())
    for name, tensor in expected.items():
        rms = tensor.double().square().mean().sqrt()
        error = (found[name].double() - tensor.double()).abs().max()
        # a gradient that is zero but for rounding is measured by the model's largest
        assert error <= relative * max(rms, 1e-2 * largest), f"{name} is off by {error:.3g} where its RMS is {rms:.3g}"


@torch.no_grad()
def copy_weights(weights: dict[str, Tensor], model: nn.Module) -> None:
    named = dict(model.named_parameters())
    assert named.keys() == weights.keys()
    for name, parameter in named.items():
        parameter.copy_(weights[name])


def plain_experts(layer: nn.Module, x: Tensor) -> Tensor:
    """The naive gate's layer in plain torch, expert by expert: x [T, H] to [T, H]."""
    logits = F.linear(x, layer.gate.gate.weight, layer.gate.gate.bias)
    top, ids = logits.topk(layer.top_k, dim=-1)
    weights = top.softmax(dim=-1)
    output = torch.zeros_like(x)
    first, second = layer.experts.htoh4, layer.experts.h4toh
    for k in range(layer.top_k):
        for e in range(EXPERTS):
            rows = (ids[:, k] == e).nonzero()[:, 0]
            inner = F.gelu(F.linear(x[rows], first.weight[e], first.bias[e]))
            y = F.linear(inner, second.weight[e], second.bias[e]) * weights[rows, k, None]
            output = output.index_add(0, rows, y)
    return output


# --- arguments --------------------------------------------------------------------------------------------------------


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


# --- the layer --------------------------------------------------------------------------------------------------------


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


# --- the schedule -----------------------------------------------------------------------------------------------------


@check
def forward_step_returns_the_same_tuple_for_every_strategy(host: Host) -> None:
    shapes = set()
    for strategy in STRATEGIES:
        for grad in (True, False):
            host.start(*strategy_arguments(strategy))
            host.build()
            step = host.adapter.patch_forward_step(host.forward_step())
            with torch.set_grad_enabled(grad):
                extra = [None] if host.version == "2.2" else []
                given = step(iter([host.data()]), host.wrapper(), *extra)
                if host.version == "2.2":
                    loss, logged = given
                else:
                    output, loss_func, balance = given
                    assert balance.dim() == 0 and balance.dtype == torch.float32 and balance.requires_grad
                    assert (balance > 0) == (strategy in ("noisy", "gshard", "switch"))
                    loss, logged = loss_func(output)
                    if grad:
                        (balance / 4).backward()  # as FastMoE's schedules do; it reaches no parameter
                    assert all(p.grad is None for p in host.inner().parameters())
            assert loss.dim() == 0 and loss.requires_grad == grad
            names = {"lm loss", f"{strategy}_loss"} if strategy in ("noisy", "gshard", "switch") else {"lm loss"}
            assert set(logged) == names
            close(loss.detach(), sum(logged.values()))
            shapes.add(len(given))
    assert shapes == {2 if host.version == "2.2" else 3}


@check
def data_that_is_no_loss_is_passed_on(host: Host) -> None:
    """v3.0.2's schedules ask loss_func for other data."""
    if host.version != "3.0.2":
        return
    host.start("--balance-strategy", "gshard")
    host.build()

    def forward_step(data_iterator, model):
        return torch.zeros(3, requires_grad=True), lambda output, non_loss_data=False: {
            "data": output,
            "flag": non_loss_data,
        }

    output, patched, _ = host.adapter.patch_forward_step(forward_step)(iter([]), host.wrapper())
    assert patched(output, non_loss_data=True) == {"data": output, "flag": True}


@check
def it_trains(host: Host) -> None:
    for strategy in STRATEGIES:
        host.start(*strategy_arguments(strategy))
        host.build()
        losses = [host.train_step([host.data()])[0]["lm loss"].item() for _ in range(4)]
        assert losses[-1] < losses[0] - 0.5, (strategy, losses)


def _reference_gradients(host: Host, weight: float) -> dict[str, Tensor]:
    """Of lm loss + weight * mean over layers of the balance loss, by autograd over the formula."""
    losses = []

    def hook(layer, inputs):
        x = inputs[0].reshape(-1, HIDDEN)
        probs = F.linear(x, layer.gate.gate.weight, layer.gate.gate.bias).softmax(dim=-1)
        share = torch.bincount(probs.argmax(dim=-1), minlength=EXPERTS) / x.shape[0]
        losses.append(EXPERTS * (share * probs.mean(dim=0)).sum())

    hooks = [layer.register_forward_pre_hook(hook) for layer in host.layers()]
    scales = [layer.balance_weight for layer in host.layers()]
    for layer in host.layers():
        layer.balance_weight = 0.0
    given = host.forward_step()(iter([host.data()]), host.wrapper(), *([None] if host.version == "2.2" else []))
    loss = given[0] if host.version == "2.2" else given[1](given[0])[0]
    for handle, layer, scale in zip(hooks, host.layers(), scales, strict=True):
        handle.remove()
        layer.balance_weight = scale
    named = dict(host.inner().named_parameters())
    gradients = torch.autograd.grad(loss + weight * torch.stack(losses).mean(), list(named.values()))
    return dict(zip(named, gradients, strict=True))


@check
def the_balance_loss_reaches_every_router_once(host: Host) -> None:
    for weight in (0.0, 1.0, 3.0):
        host.start("--balance-loss-weight", str(weight))
        host.build(gate=BalancedGate)
        expected = _reference_gradients(host, weight)
        found, logged = host.gradients_of([host.data()])
        all_close(found, expected)
        if weight == 0.0:
            without = expected
        assert logged["BalancedGate_loss"].item() > 0 or weight == 0.0
    gates = [name for name in found if ".gate." in name]
    assert len(gates) == 2 * LAYERS
    assert all((found[name] - without[name]).norm() > 0.1 * without[name].norm() for name in gates)


@check
def a_schedule_of_fastmoe_trains_on_it_once_too(host: Host) -> None:
    """FastMoE's schedules run backward from the third value as well, divided by the number of micro-batches."""
    if host.version == "2.2":
        return
    host.start("--balance-loss-weight", "2")
    host.build(gate=BalancedGate)
    expected = _reference_gradients(host, 2.0)
    output, loss_func, balance = host.adapter.patch_forward_step(host.forward_step())(
        iter([host.data()]), host.inner()
    )  # fmt: skip
    loss = loss_func(output)[0]
    host.optimizer.zero_grad()
    torch.autograd.backward([loss, balance / 4], [None, None])
    named = dict(host.inner().named_parameters())
    buffered = getattr(host.wrapper(), "use_contiguous_buffers", False)
    all_close({n: (p.main_grad if buffered else p.grad).detach() for n, p in named.items()}, expected)


@check
def every_layers_balance_loss_is_logged(host: Host) -> None:
    host.start("--balance-strategy", "gshard")
    host.build()
    seen = {}
    writer = SimpleNamespace(add_scalar=lambda name, value, step: seen.update({name: (value, step)}))
    host.adapter.add_balance_log(host.model, writer, 7)
    assert seen == {}
    logged = host.gradients_of([host.data()])[1]
    host.adapter.add_balance_log(host.model, None, 7)
    host.adapter.add_balance_log(host.model, writer, 7)
    assert set(seen) == {f"gshard_loss/layer-{i}" for i in range(LAYERS)}
    assert sum(value for value, _ in seen.values()) == pytest.approx(logged["gshard_loss"].item(), rel=1e-6)


@check
def gradients_do_not_change_with_the_number_of_micro_batches(host: Host) -> None:
    host.start("--balance-loss-weight", "2")
    host.build(gate=BalancedGate)
    weights = {name: parameter.detach().clone() for name, parameter in host.inner().named_parameters()}
    expected, _ = host.gradients_of([host.data()])
    host.start("--balance-loss-weight", "2", micro_batches=4, batch=4 * BATCH)
    host.build(gate=BalancedGate)
    copy_weights(weights, host.inner())
    found, _ = host.gradients_of([host.data()] * 4)
    all_close(found, expected)


@check
def recomputed_activations_have_the_same_gradients(host: Host) -> None:
    found = []
    for extra in ([], RECOMPUTE[host.version]):
        host.start("--balance-loss-weight", "2", *extra)
        host.build(gate=BalancedGate)
        found.append(host.gradients_of([host.data()])[0])
    all_close(found[1], found[0])


@check
def the_loss_scale_scales_the_balance_loss_too(host: Host) -> None:
    """A scale that is a power of two changes no digit, in fp16 and bf16."""
    for kind in ("--fp16",) if host.version == "2.2" else ("--fp16", "--bf16"):
        found = {}
        for scale in (1, 64):
            host.start(kind, "--loss-scale", str(scale), "--balance-loss-weight", "4")
            host.build(gate=BalancedGate)
            found[scale] = {n: t / scale for n, t in host.gradients_of([host.data()])[0].items() if ".gate." in n}
            assert all(t.abs().sum() > 0 for t in found[scale].values())
        all_close(found[64], found[1], 2e-2 if kind == "--fp16" else 1e-6)


@check
def half_precision_trains(host: Host) -> None:
    for kind in ("--fp16",) if host.version == "2.2" else ("--fp16", "--bf16"):
        dtype = torch.float16 if kind == "--fp16" else torch.bfloat16
        host.start(kind, "--initial-loss-scale", "256", "--balance-strategy", "gshard")
        host.build()
        assert {p.dtype for p in host.inner().parameters()} == {dtype}
        losses = [host.train_step([host.data()])[0]["lm loss"].item() for _ in range(5)]
        assert losses[-1] < losses[0] - 0.5, (kind, losses)
        mains = [p for group in host.optimizer.param_groups for p in group["params"]]
        assert sum(getattr(p, "dp_comm", "") == "none" for p in mains) == 4 * LAYERS


@check
def gradient_buffers_hold_the_same_gradients(host: Host) -> None:
    if host.version == "2.2":
        return
    ways = {
        "2.5": ([], ["--use-contiguous-buffers-in-ddp"],
                ["--use-contiguous-buffers-in-ddp", "--accumulate-allreduce-grads-in-fp32"]),
        "3.0.2": (["--no-contiguous-buffers-in-local-ddp"], [], ["--accumulate-allreduce-grads-in-fp32"]),
    }  # fmt: skip
    found = []
    for extra in ways[host.version]:
        host.start(*extra, micro_batches=2)
        host.build(gate=BalancedGate)
        for _ in range(2):  # the second must not find what the first left
            gradients, _ = host.gradients_of([host.data()[:2], host.data()[2:]])
        found.append(gradients)
    all_close(found[1], found[0], 1e-6)
    all_close(found[2], found[0], 1e-6)


@check
def clipping_is_the_norm_of_everything(host: Host) -> None:
    host.start()
    host.build(gate=BalancedGate)
    host.gradients_of([host.data()])
    parameters = [p for p in host.inner().parameters()]
    for parameter in parameters:
        parameter.grad = parameter.main_grad if parameter.grad is None else parameter.grad
    for norm_type in (2.0, 1.0, float("inf")):
        gradients = torch.cat([torch.full((7,), 0.25), *(p.grad.reshape(-1) for p in parameters)])
        extra = nn.Parameter(torch.zeros(7))
        extra.grad = torch.full((7,), 0.25)
        shared = nn.Parameter(torch.zeros(7))
        shared.grad, shared.shared = torch.full((7,), 9.0), True
        expected = torch.linalg.vector_norm(gradients, norm_type)
        found = host.adapter.grad_norm([*parameters, extra, shared, nn.Parameter(torch.zeros(1))], norm_type)
        close(found, expected, 1e-5)
    before = [p.grad.clone() for p in parameters]
    norm = host.module("optimizer.clip_grads").clip_grad_norm_fp32(parameters, 0.5)
    close(torch.tensor(norm), torch.cat([g.reshape(-1) for g in before]).norm(), 1e-6)
    for parameter, gradient in zip(parameters, before, strict=True):
        close(parameter.grad, gradient * (0.5 / (norm + 1e-6)), 1e-6)
    with pytest.raises(ValueError, match="norm_type must be a number above 0, got 0"):
        host.adapter.grad_norm(parameters, 0)


@check
def a_checkpoint_continues_the_training(host: Host) -> None:
    """Saved and loaded by the host's own functions, which are the adapter's once installed."""
    with tempfile.TemporaryDirectory() as folder:
        for kind in ([], ["--fp16", "--loss-scale", "16"]):
            host.start("--balance-strategy", "gshard", *kind)
            args = host.module("global_vars").get_args()
            args.save = str(Path(folder) / str(len(kind)))
            host.build()
            host.train_step([host.data()])
            host.module("training").save_checkpoint(1, host.model, host.optimizer, host.scheduler)
            assert (Path(args.save) / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt").is_file()
            assert len(list(Path(args.save).rglob("*.pt"))) == 1
            torch.manual_seed(9)
            expected = [host.train_step([host.data(i)])[0]["lm loss"].item() for i in range(2)]
            weights = {n: p.detach().clone() for n, p in host.inner().named_parameters()}
            host.start("--balance-strategy", "gshard", *kind)
            args = host.module("global_vars").get_args()
            args.load = str(Path(folder) / str(len(kind)))
            torch.manual_seed(77)  # other weights
            host.build()
            assert args.iteration == 1
            torch.manual_seed(9)
            found = [host.train_step([host.data(i)])[0]["lm loss"].item() for i in range(2)]
            assert found == expected
            assert all(torch.equal(p, weights[n]) for n, p in host.inner().named_parameters())


@check
def pretrain_is_given_patched_functions(host: Host) -> None:
    """By position and by name, as the scripts of each version call it; patching twice changes nothing."""
    from megatron_adapters.megatron_lm.install import wrap_pretrain

    seen = {}

    def pretrain(*inputs, **named):
        seen.update(inspect.signature(theirs).bind(*inputs, **named).arguments)

    theirs = inspect.unwrap(host.module("training").pretrain)
    pretrain.__signature__ = inspect.signature(theirs)
    provider, step = host.provider(), host.forward_step()
    kind = ["model type"] if host.version == "3.0.2" else []

    def own_arguments(parser):
        parser.add_argument("--own")
        return parser

    run = wrap_pretrain(pretrain, host.adapter)
    run("datasets", provider, *kind, step, args_defaults={"a": 1})
    assert inspect.unwrap(seen["model_provider"]) is provider and seen["model_provider"] is not provider
    assert inspect.unwrap(seen["forward_step_func"]) is step and seen["forward_step_func"] is not step
    assert seen["args_defaults"] == {"a": 1} and [seen["model_type"]] == kind if kind else True
    patched = seen["model_provider"], seen["forward_step_func"]
    run("datasets", patched[0], *kind, patched[1], extra_args_provider=own_arguments)
    assert (seen["model_provider"], seen["forward_step_func"]) == patched
    parser = seen["extra_args_provider"](host.adapter.add_arguments(argparse.ArgumentParser()))
    assert vars(parser.parse_args(["--own", "x", "--fmoefy", "--fmoe-num-experts", "3"])).items() >= {
        ("own", "x"), ("fmoefy", True), ("fmoe_num_experts", 3),
    }  # fmt: skip


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
def the_hosts_own_pretrain_runs_from_start_to_end(host: Host) -> None:
    """Data, training, log, checkpoint, evaluation. The stand-in's is run by test_megatron_command.py."""
    if not host.real:
        return
    training, state = host.module("training"), host.module("global_vars")
    with tempfile.TemporaryDirectory() as folder:
        tokens = [{"text": row} for row in host.data(samples=64)]

        def initialize(extra_args_provider=None, args_defaults=None):
            host.start(micro_batches=2)
            save = [*sys.argv, "--balance-strategy", "gshard", "--save", folder, "--save-interval", "4"]
            sys.argv = [*save, "--log-interval", "1", "--eval-interval", "3", "--eval-iters", "1", "--num-workers", "0"]
            args = host.module("arguments").parse_args(extra_args_provider)
            args.padded_vocab_size, args.train_iters = VOCABULARY, 4
            state._GLOBAL_ARGS = args

        step = host.forward_step()

        def forward_step(data_iterator, *inputs):
            return step((batch["text"] for batch in data_iterator), *inputs)

        theirs = training.initialize_megatron
        training.initialize_megatron = initialize
        training.set_jit_fusion_options = lambda: None  # v3.0.2 tries its fused functions on the GPU there
        printed = io.StringIO()
        try:
            kind = [host.module("model").ModelType.encoder_or_decoder] if host.version == "3.0.2" else []
            with contextlib.redirect_stdout(printed):
                training.pretrain(lambda sizes: (tokens, tokens, tokens), host.provider(), *kind, forward_step)
        finally:
            training.initialize_megatron = theirs
        logged = re.findall(r"lm loss: (\S+) \|.*gshard_loss: (\S+)", printed.getvalue())
        assert len(logged) >= 4, printed.getvalue()
        assert (Path(folder) / "iter_0000004" / "mp_rank_00" / "model_optim_rng.pt").is_file()
        assert "validation loss" in printed.getvalue()


@check
def installing_twice_is_refused(host: Host) -> None:
    with pytest.raises(RuntimeError, match="must be called once"):
        host.adapter.install()


def main(version: str, source: str, output: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    prepare(version, source)
    open_world()
    host = Host(version)
    uninstall = host.adapter.install()
    only = os.environ.get("CHECK")
    results = {}
    for name, function in CHECKS.items():
        if only and name != only:
            continue
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                function(host)
            results[name] = None
        except (Exception, SystemExit):
            results[name] = traceback.format_exc()
    uninstall()
    Path(output).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
