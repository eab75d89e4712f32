"""Everything of an adapter put into the running host, so that its sources stay as they are."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

from . import checkpoint, gradients, host, schedule


def _host_modules() -> list[ModuleType]:
    return [module for name, module in list(sys.modules.items()) if name.split(".")[0] == "megatron"]


class _Patches:
    def __init__(self) -> None:
        self.undo: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        self.undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def everywhere(self, old: Any, new: Any) -> None:
        """Every name of every loaded module of the host that stands for old."""
        for module in _host_modules():
            for name, value in list(vars(module).items()):
                if value is old:
                    self.set(module, name, new)

    def remove(self) -> None:
        while self.undo:
            owner, name, value = self.undo.pop()
            setattr(owner, name, value)


def wrap_pretrain(pretrain: Callable[..., Any], adapter: Any) -> Callable[..., Any]:
    """The host's pretrain with the adapter's arguments, and the model provider and forward_step it is given patched."""
    signature = inspect.signature(pretrain)

    @wraps(pretrain)
    def with_experts(*inputs: Any, **named: Any) -> Any:
        bound = signature.bind(*inputs, **named)
        bound.apply_defaults()
        given = bound.arguments
        others = given["extra_args_provider"]

        def extra_args_provider(parser: Any) -> Any:
            return adapter.add_arguments(parser if others is None else others(parser))

        given["extra_args_provider"] = extra_args_provider
        given["model_provider"] = adapter.patch_model_provider(given["model_provider"])
        given["forward_step_func"] = adapter.patch_forward_step(given["forward_step_func"])
        return pretrain(*bound.args, **bound.kwargs)

    return with_experts


def install(adapter: Any) -> Callable[[], None]:
    """See the adapters' ``install``."""
    training = host.module("training")  # imports what is patched below
    clip_grads = host.module("optimizer.clip_grads")
    checkpointing = host.module("checkpointing")
    if getattr(checkpointing.save_checkpoint, "host_function", None) is not None:
        raise RuntimeError("install() must be called once, the adapter is installed already")
    patches = _Patches()
    patches.everywhere(host.module("model").DistributedDataParallel, adapter.DistributedDataParallel)
    patches.everywhere(clip_grads.clip_grad_norm_fp32, gradients.clip_grad_norm)
    for name in ("save_checkpoint", "load_checkpoint"):
        theirs, ours = getattr(checkpointing, name), getattr(checkpoint, name)

        def replacement(*inputs: Any, _ours: Callable[..., Any] = ours, **named: Any) -> Any:
            return _ours(*inputs, **named)

        replacement.host_function = theirs  # type: ignore[attr-defined]
        patches.everywhere(theirs, replacement)
    patches.everywhere(training.pretrain, wrap_pretrain(training.pretrain, adapter))
    build = training.get_megatron_optimizer

    @wraps(build)
    def get_megatron_optimizer(*inputs: Any, **named: Any) -> Any:
        return gradients.prepare_optimizer(build(*inputs, **named))

    patches.everywhere(build, get_megatron_optimizer)
    if adapter.version != "2.2":
        schedules = host.module("schedules")
        if not schedule.takes_three(schedules):
            patches.everywhere(schedules.forward_step, schedule.of_two(schedules.forward_step))
    return patches.remove
