"""Checks of precisions, gradients, checkpoints and whole runs; see megatron_checks.py."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import re
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from megatron_compare import all_close, check, close
from megatron_host import LAYERS, VOCABULARY, BalancedGate, Host
from torch import nn


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
        gradients = torch.cat([torch.full((7,), 0.25, device=host.device), *(p.grad.reshape(-1) for p in parameters)])
        extra = nn.Parameter(torch.zeros(7, device=host.device))
        extra.grad = torch.full_like(extra, 0.25)
        shared = nn.Parameter(torch.zeros(7, device=host.device))
        shared.grad, shared.shared = torch.full_like(shared, 9.0), True
        expected = torch.linalg.vector_norm(gradients, norm_type)
        found = host.adapter.grad_norm(
            [*parameters, extra, shared, nn.Parameter(torch.zeros(1, device=host.device))], norm_type
        )
        close(found, expected, 1e-5)
    before = [p.grad.clone() for p in parameters]
    norm = host.module("optimizer.clip_grads").clip_grad_norm_fp32(parameters, 0.5)
    close(torch.tensor(norm), torch.cat([g.reshape(-1) for g in before]).norm().cpu(), 1e-6)
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
