"""The balance loss on its way through the host's schedules: trained on once, at the scale of the training loss.

The layers add the gradient of their balance loss themselves (MegatronMLP), so that it reaches every router on every
pipeline stage, with and without recomputed activations, whatever the schedule does with the values it is given. What
is missing there is the scale: the gradient with which the backward pass arrives at the training loss, loss scale over
number of micro-batches. ``patch_forward_step`` reads it off the backward pass where one stage is all there is, and
computes it on pipelines, where the loss is on another rank.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import host
from .layer import MegatronMLP
from .model import moe_layers


class _ReadScale(torch.autograd.Function):
    """A loss itself; its gradient, when the backward pass begins, is the scale of the layers' balance losses."""

    @staticmethod
    def forward(ctx, loss: Tensor, layers: Sequence[MegatronMLP]) -> Tensor:
        ctx.layers = layers
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx, grad: Tensor):
        scale = grad.detach().float().sum()
        for layer in ctx.layers:
            layer.balance_scale = scale
        return grad, None


def total_balance_loss(layers: Sequence[MegatronMLP], like: Tensor) -> Tensor:
    """The layers' weighted balance losses of the last pass, summed: a float32 scalar on like's device, detached."""
    total = torch.zeros((), device=like.device)
    for layer in layers:
        if layer.balance_loss is not None:
            total = total + layer.balance_loss.to(total.device)
    return total


def _average(loss: Tensor) -> Tensor:
    """The mean over the data-parallel ranks, as the host logs its losses."""
    if host.size(None) == 1:
        return loss
    group = host.data_parallel_group()
    if host.size(group) > 1:
        loss = loss.clone()
        dist.all_reduce(loss, group=group)
        loss = loss / host.size(group)
    return loss


def _pipelined(layers: Sequence[MegatronMLP]) -> bool:
    return any(layer.stages > 1 for layer in layers)


def _loss_scale(args: Any) -> Any:
    optimizer = _optimizer[-1] if _optimizer else None
    if optimizer is not None:
        return optimizer.get_loss_scale()
    if getattr(args, "fp16", False) or getattr(args, "loss_scale", None):
        raise RuntimeError(
            "the balance loss on a pipeline needs the optimizer's loss scale: call the adapter's "
            "prepare_optimizer(optimizer), or install() before the host builds it"
        )
    return 1.0


#: The optimizer whose loss scale pipelines take, the last one prepared.
_optimizer: list[Any] = []


def remember_optimizer(optimizer: Any) -> None:
    """Takes the loss scale of pipelined training from optimizer."""
    _optimizer[:] = [optimizer]


def _set_scale(layers: Sequence[MegatronMLP]) -> None:
    """On a pipeline: the scale of the coming backward pass, by the host's settings."""
    if _pipelined(layers) and torch.is_grad_enabled() and any(layer.balance_name is not None for layer in layers):
        scale = _loss_scale(host.get_args()) / host.num_microbatches()
        for layer in layers:
            layer.balance_scale = scale


def _with_balance_loss(output: Any, layers: Sequence[MegatronMLP]) -> tuple[Tensor, dict[str, Any]]:
    """The host's (loss, what it logs) with the balance loss in both; the loss's gradient is unchanged."""
    loss, logged = output
    names = {layer.balance_name for layer in layers if layer.balance_loss is not None}
    if not names:
        return loss, logged
    balance = total_balance_loss(layers, loss)
    if loss.requires_grad and not _pipelined(layers):
        loss = _ReadScale.apply(loss, list(layers))
    name = names.pop() if len(names) == 1 else "balance_loss"
    return loss + balance.to(loss.dtype), {**logged, name: _average(balance)}


def patch_v2_2(forward_step_func: Callable[..., Any], version: str) -> Callable[..., Any]:
    """forward_step(data_iterator, model, input_tensor): the loss and its log on the last stage, a tensor on others."""

    if hasattr(forward_step_func, "has_balance_loss"):  # by the script itself, or by install()
        return forward_step_func

    @wraps(forward_step_func)
    def forward_step(data_iterator: Any, model: Any, input_tensor: Any = None) -> Any:
        layers = moe_layers(model, version)
        output = forward_step_func(data_iterator, model, input_tensor)
        _set_scale(layers)
        # the last stage alone returns a loss and its log
        return _with_balance_loss(output, layers) if isinstance(output, tuple | list) else output

    forward_step.has_balance_loss = True  # type: ignore[attr-defined]
    return forward_step


def patch_v2_5(forward_step_func: Callable[..., Any], version: str) -> Callable[..., Any]:
    """forward_step(data_iterator, model): always (output, loss_func, balance loss)."""

    if hasattr(forward_step_func, "has_balance_loss"):  # by the script itself, or by install()
        return forward_step_func

    @wraps(forward_step_func)
    def forward_step(data_iterator: Any, model: Any) -> tuple[Any, Callable[..., Any], Tensor]:
        layers = moe_layers(model, version)
        output, loss_func = forward_step_func(data_iterator, model)
        _set_scale(layers)

        @wraps(loss_func)
        def loss_with_balance(output_tensor: Any, *inputs: Any, **named: Any) -> Any:
            result = loss_func(output_tensor, *inputs, **named)
            if named.get("non_loss_data"):
                return result
            return _with_balance_loss(result, layers)

        like = output[0] if isinstance(output, list | tuple) else output
        # A leaf: a schedule that runs backward from it finds a gradient's end, and the layers have trained on it.
        balance = total_balance_loss(layers, like).requires_grad_()
        return output, loss_with_balance, balance

    forward_step.has_balance_loss = True  # type: ignore[attr-defined]
    return forward_step


def add_balance_log(model: Any, writer: Any, iteration: int, version: str) -> None:
    """See the adapters' ``add_balance_log``."""
    for layer in moe_layers(model, version):
        if layer.balance_loss is not None:
            loss = _average(layer.balance_loss)  # every rank takes part
            if writer is not None:
                writer.add_scalar(f"{layer.balance_name}/layer-{layer.layer_idx}", loss.item(), iteration)


def takes_three(schedules: Any) -> bool:
    """Whether a host's schedules module was patched by FastMoE to unpack three values of forward_step."""
    return "bal_loss" in inspect.getsource(schedules.forward_step)


def of_two(schedule_step: Callable[..., Any]) -> Callable[..., Any]:
    """The host's own schedules.forward_step for functions that return three values: it is given the first two."""

    @wraps(schedule_step)
    def forward_step(forward_step_func: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
        def first_two(*given: Any, **kept: Any) -> Any:
            return tuple(forward_step_func(*given, **kept))[:2]

        return schedule_step(first_two, *inputs, **named)

    return forward_step
