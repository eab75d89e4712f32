"""Checks of forward_step and the balance loss; see megatron_checks.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from megatron_compare import STRATEGIES, all_close, check, close, copy_weights, strategy_arguments
from megatron_host import BATCH, EXPERTS, HIDDEN, LAYERS, RECOMPUTE, BalancedGate, Host
from torch import Tensor


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
