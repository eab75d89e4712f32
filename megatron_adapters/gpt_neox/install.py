"""Puts our layers into a GPT-NeoX that is about to be imported or run."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch

from .arguments import ERA_MOE_LOSS, ERA_NOW, ERAS, HOST, check
from .block import parallel_residual
from .dropless import ParallelDroplessMoE
from .with_loss import MoEWithLoss, loss_scale


def detect_era() -> str:
    """The era of the GPT-NeoX that ``import megatron`` finds. Raises ValueError where it is of neither.

    Imports the host's ``megatron.neox_arguments``.
    """
    try:
        fields = importlib.import_module("megatron.neox_arguments").NeoXArgs.__dataclass_fields__
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{HOST}: era must be given, no GPT-NeoX can be imported ({error})") from error
    if "moe_loss_coeff" in fields and "num_experts" in fields:
        return ERA_MOE_LOSS
    if "moe_router_type" in fields and "moe_loss_coeff" not in fields:
        return ERA_NOW
    raise ValueError(
        f"{HOST}: era must be one whose MoE arguments are known ({', '.join(map(repr, ERAS))}), and those of this "
        "checkout are of neither"
    )


def install(era: str | None = None) -> Callable[[], None]:
    """From now on the host builds our layers, and its transformer layers are right on both residual paths.

    era is 'now' or 'moe_loss', by default that of the checkout. Without megablocks or DeepSpeed's MoE being imported by
    us: in the era 'now' the host needs neither. Returns a function that undoes it, for models built afterwards.
    """
    era = detect_era() if era is None else era
    if era not in ERAS:
        raise ValueError(f"era must be one of {', '.join(map(repr, ERAS))}, got {era!r}")
    undo: list[Callable[[], None]] = []

    def put(owner: Any, name: str, value: Any) -> None:
        old = getattr(owner, name)
        setattr(owner, name, value)
        undo.append(lambda: setattr(owner, name, old))

    if era == ERA_NOW:
        module = types.ModuleType("megatron.model.moe")
        module.ParallelDroplessMoE = ParallelDroplessMoE
        before = sys.modules.get(module.__name__)
        sys.modules[module.__name__] = module
        undo.append(lambda: _restore(module.__name__, before))
    host = importlib.import_module("megatron.model.transformer")
    if era == ERA_MOE_LOSS:
        put(host, "MoE", MoEWithLoss)
    layer = host.ParallelTransformerLayer
    put(layer, "__init__", _checked(layer.__init__, era))
    put(layer, "forward", _both_paths(layer.forward, era))
    if era == ERA_MOE_LOSS:
        training = sys.modules.get("megatron.training") or _training()
        if training is not None:
            put(training, "forward_step", watched(training.forward_step))
    return lambda: [step() for step in reversed(undo)] and None


def _restore(name: str, module: types.ModuleType | None) -> None:
    if module is None:
        sys.modules.pop(name, None)
    else:
        sys.modules[name] = module


def _training() -> types.ModuleType | None:
    try:
        return importlib.import_module("megatron.training")
    except ImportError as error:
        warnings.warn(
            f"{HOST}: megatron.training can't be imported ({error}), so moe_losses are trained on with a scale of 1 "
            "whatever the loss is multiplied by: wrap your forward step in megatron_adapters.gpt_neox.watched",
            stacklevel=3,
        )
        return None


def _checked(build: Callable, era: str) -> Callable:
    signature = inspect.signature(build)

    @functools.wraps(build)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        neox_args = signature.bind(self, *args, **kwargs).arguments["neox_args"]
        experts = getattr(neox_args, "moe_num_experts" if era == ERA_NOW else "num_experts", 1)
        if experts in (1, None):  # nothing of a dense model is ours
            return build(self, *args, **kwargs)
        values = check(neox_args, era)
        build(self, *args, **kwargs)
        if isinstance(self.mlp, MoEWithLoss):
            self.mlp.loss_coefficient = float(values["moe_loss_coeff"])

    return __init__


def _both_paths(original: Callable, era: str) -> Callable:
    @functools.wraps(original)
    def forward(self: Any, x: Any, attention_mask: Any, layer_past: Any = None) -> Any:
        if not (self.gpt_j_residual and isinstance(self.mlp, (ParallelDroplessMoE, MoEWithLoss))):
            return original(self, x, attention_mask, layer_past=layer_past)
        output, moe_loss = parallel_residual(self, x, attention_mask, layer_past)
        return output if era == ERA_NOW else (output, moe_loss)

    return forward


def watched(forward_step: Callable) -> Callable:
    """The host's forward_step; where backward begins, the gradient of its loss becomes the scale of the moe_losses."""

    @functools.wraps(forward_step)
    def watched_step(*args: Any, **kwargs: Any) -> Any:
        result = forward_step(*args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        if isinstance(loss, torch.Tensor) and loss.requires_grad:
            scale = loss_scale(loss.device)
            loss.register_hook(lambda grad: scale.copy_(grad.detach().reshape(())) and None)
        return result

    return watched_step
