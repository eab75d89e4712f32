"""What must hold of an adapter in its host on a GPU: what holds on the CPU, and the same numbers.

As a program: ``megatron_cuda_checks.py VERSION OUTPUT`` runs them in the stand-in, in one process, and writes
{check: None or its traceback} as JSON.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from megatron_compare import STRATEGIES, all_close, close, copy_weights, strategy_arguments
from megatron_host import BATCH, HIDDEN, LENGTH, RECOMPUTE, BalancedGate, Host, open_world, prepare
from support.same_draws import same_draws
from torch import Tensor

DEVICE = "cuda"
#: Adam divides by the gradient's size: a larger epsilon keeps rounding from being the whole of a small one.
STEADY = ("--adam-eps", "1e-3")


def _here(named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in named.items()}


def layers(host: Host) -> None:
    """Output, bias, balance loss and every gradient of every gate, in training and evaluation."""
    for strategy in STRATEGIES:
        args = host.start(*strategy_arguments(strategy))
        layer = host.adapter.MegatronMLP(args, 0).double()
        x = torch.randn(LENGTH, BATCH, HIDDEN, dtype=torch.float64)
        target = torch.randn_like(x)
        for training in (True, False):
            found = []
            for device in ("cpu", DEVICE):
                where = copy.deepcopy(layer).to(device).train(training)
                given = x.to(device, copy=True).requires_grad_()
                with same_draws(3):
                    output, bias = where(given)
                assert output.device.type == bias.device.type == device
                assert bias.shape == (HIDDEN,) and bias.dtype == x.dtype and not bias.any()
                ((output + bias) * target.to(device)).sum().backward()
                named = {"output": output, "input": given.grad}
                if where.balance_loss is not None:
                    named["balance loss"] = where.balance_loss
                named |= {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in where.named_parameters()}
                found.append(_here(named))
            all_close(found[1], found[0], 1e-10)


def _train(host: Host, device: str, weights: dict[str, Tensor] | None, *argv: str, **build: Any):
    """The weights of the start; gradients of the first step, losses of three steps and the weights after them."""
    host.device = device
    host.start(*argv, *STEADY, micro_batches=2)
    model = host.build(**build)
    parameters = dict(host.inner().named_parameters())
    assert {p.device.type for p in parameters.values()} == {torch.device(device).type}
    if weights is not None:
        copy_weights(weights, host.inner())
        if hasattr(host.optimizer, "reload_model_params"):
            host.optimizer.reload_model_params()
    first = _here({n: p.clone() for n, p in parameters.items()})
    with same_draws(5):
        gradients, logged = host.gradients_of([host.data()[:2], host.data()[2:]])
        losses = []
        for step in range(3):
            data = host.data(step)
            losses.append(host.train_step([data[:2], data[2:]])[0])
    assert all(value.device.type == torch.device(device).type for value in losses[0].values())
    named = {f"{name} of step {i}": v.float() for i, found in enumerate(losses) for name, v in found.items()}
    named |= {f"first {name}": v.float() for name, v in logged.items()}
    del model
    return first, _here(gradients), _here(named), _here(dict(parameters))


def training_steps(host: Host) -> None:
    """fmoefy, the patched forward step, the schedule, clipping and three optimizer steps: those of the CPU."""
    for argv in ([], RECOMPUTE[host.version]):
        for strategy in STRATEGIES:
            given = [*strategy_arguments(strategy), *argv]
            weights, *expected = _train(host, "cpu", None, *given)
            _, *found = _train(host, DEVICE, weights, *given)
            wanted = {"noisy", "gshard", "switch"} & {strategy}
            assert any("_loss" in name for name in found[1]) == bool(wanted), found[1].keys()
            for mine, theirs in zip(found, expected, strict=True):
                all_close(mine, theirs, 1e-3)


def gates_of_the_users_own(host: Host) -> None:
    weights, *expected = _train(host, "cpu", None, gate=BalancedGate)
    _, *found = _train(host, DEVICE, weights, gate=BalancedGate)
    for mine, theirs in zip(found, expected, strict=True):
        all_close(mine, theirs, 1e-3)


def half_precision_beside_the_cpu(host: Host) -> None:
    """The losses of three steps in 16 bits, and their gradients, near those of the CPU."""
    for kind in ("--fp16",) if host.version == "2.2" else ("--fp16", "--bf16"):
        given = (kind, "--initial-loss-scale", "256", "--balance-strategy", "gshard")
        weights, _, expected, _ = _train(host, "cpu", None, *given)
        _, _, found, _ = _train(host, DEVICE, weights, *given)
        for name, value in expected.items():
            if "lm loss" in name:
                close(found[name], value, 0.02)


def main(version: str, output: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    prepare(version, "stand-in")
    if DEVICE == "cuda":
        torch.cuda.set_device(0)
    open_world("cpu:gloo,cuda:nccl" if DEVICE == "cuda" else "gloo")
    import megatron_training_checks as training

    checks: list[Callable[[Host], None]] = [
        layers,
        training_steps,
        gates_of_the_users_own,
        half_precision_beside_the_cpu,
        # what holds on the CPU holds there
        training.half_precision_trains,
        training.gradient_buffers_hold_the_same_gradients,
        training.clipping_is_the_norm_of_everything,
        training.a_checkpoint_continues_the_training,
    ]
    host = Host(version)
    uninstall = host.adapter.install()
    results = {}
    for check in checks:
        host.device = DEVICE
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                check(host)
            results[check.__name__] = None
        except (Exception, SystemExit):
            results[check.__name__] = traceback.format_exc()
    uninstall()
    Path(output).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
