"""Checkpoints of models whose data-parallel ranks hold different experts.

Data-parallel rank 0 writes the host's own file, with its experts in it. Every other rank writes its experts, and what
the optimizer keeps for them, beside it: ``mp_rank_{tensor:02d}[_{pipeline:03d}]_dp_rank_{data:04d}``, FastMoE's names
and layout. Loading, every rank loads the host's file with the host's function and then its own experts over it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import host


def native(name: str) -> Any:
    """The host's own save_checkpoint or load_checkpoint, also where install() has put ours in its place."""
    function = getattr(host.module("checkpointing"), name)
    return getattr(function, "host_function", function)


def checkpoint_name(
    checkpoints_path: str | os.PathLike[str], iteration: int, release: bool = False, data_parallel_rank: int = -1
) -> str:
    """The file of a data-parallel rank (by default this one's) for this tensor and pipeline rank."""
    mpu = host.module("mpu")
    rank = mpu.get_data_parallel_rank() if data_parallel_rank == -1 else data_parallel_rank
    folder = "release" if release else f"iter_{iteration:07d}"
    name = f"mp_rank_{mpu.get_tensor_model_parallel_rank():02d}"
    if mpu.get_pipeline_model_parallel_world_size() > 1:
        name += f"_{mpu.get_pipeline_model_parallel_rank():03d}"
    if rank > 0:
        name += f"_dp_rank_{rank:04d}"
    return os.path.join(checkpoints_path, folder, name, "model_optim_rng.pt")


def save_checkpoint(iteration: int, model: Any, optimizer: Any, lr_scheduler: Any) -> None:
    """The host's save_checkpoint, and the experts of this rank in its own file.

    Every rank calls it. Raises ValueError for interleaved pipeline stages.
    """
    args, mpu = host.get_args(), host.module("mpu")
    unwrapped = host.unwrap(model)
    rank = mpu.get_data_parallel_rank()
    if rank > 0 and any(host.is_expert(parameter) for parameter in unwrapped.parameters()):
        state = {"iteration": iteration, "checkpoint_version": 3.0, "model": _experts_of_model(unwrapped)}
        if not getattr(args, "no_save_optim", None) and optimizer is not None:
            state["optimizer"] = _experts_of_optimizer(optimizer)
        path = Path(checkpoint_name(args.save, iteration))
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path)
    native("save_checkpoint")(iteration, model, optimizer, lr_scheduler)  # waits for every rank


def load_checkpoint(model: Any, optimizer: Any, lr_scheduler: Any, load_arg: str = "load", **named: Any) -> int:
    """The host's load_checkpoint, then the experts of this rank from its own file; the iteration.

    Raises FileNotFoundError where the checkpoint has no file for this rank, ValueError naming the tensor where one is
    missing or has another shape; the experts are unchanged then.
    """
    args, rank = host.get_args(), host.module("mpu").get_data_parallel_rank()
    folder = getattr(args, load_arg)
    newest = _newest(folder)
    state, path = None, ""
    if rank > 0 and newest is not None and any(host.is_expert(p) for p in host.unwrap(model).parameters()):
        path = checkpoint_name(folder, *newest)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"the checkpoint has no experts for data-parallel rank {rank}: expected {path}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    iteration = native("load_checkpoint")(model, optimizer, lr_scheduler, load_arg, **named)
    if state is not None:
        _load_experts(host.unwrap(model), state["model"], path)
    if newest is None or optimizer is None:
        return iteration
    if newest[1] or getattr(args, "finetune", False) or getattr(args, "no_load_optim", None):
        # The host loads no optimizer then, and leaves its float32 copies of the weights as they were drawn.
        optimizer.reload_model_params()
    elif state is not None:
        _load_optimizer(optimizer, state.get("optimizer"), path)
    return iteration


def _newest(folder: str) -> tuple[int, bool] | None:
    """Iteration of a folder's newest checkpoint, and whether it is a release, which has none; None without one."""
    tracker = Path(folder) / "latest_checkpointed_iteration.txt"
    if not tracker.is_file():
        return None
    text = tracker.read_text().strip()
    if text != "release" and not text.isdigit():
        raise ValueError(f"{tracker} must hold an iteration or 'release', found {text!r}")
    return (0, True) if text == "release" else (int(text), False)


def _experts_of_model(model: nn.Module) -> dict[str, Any]:
    """The nested state_dict of the host without what is not an expert."""
    whole = model.state_dict_for_save_checkpoint(keep_vars=True)

    def experts(tree: Mapping[str, Any]) -> dict[str, Any]:
        found = {}
        for name, value in tree.items():
            if isinstance(value, Mapping):
                value = experts(value)
                if value:
                    found[name] = value
            elif isinstance(value, Tensor) and host.is_expert(value):
                found[name] = value.detach()
        return found

    return experts(whole)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


@torch.no_grad()
def _load_experts(model: nn.Module, saved: Mapping[str, Any], path: str) -> None:
    expected = dict(_leaves(_experts_of_model(model)))
    found = dict(_leaves(saved))
    _check(expected, found, path)
    for name, tensor in expected.items():
        tensor.copy_(found[name])


def _check(expected: Mapping[str, Tensor], found: Mapping[str, Any], path: str) -> None:
    if different := sorted(set(expected) ^ set(found)):
        raise ValueError(f"{path} must hold the model's experts, one side lacks {', '.join(different)}")
    for name, tensor in expected.items():
        if tensor.shape != found[name].shape:
            raise ValueError(f"{path}: {name} must have shape {list(tensor.shape)}, got {list(found[name].shape)}")


def _inner(optimizer: Any) -> Any:
    return getattr(optimizer, "optimizer", optimizer)


def _main_groups(optimizer: Any) -> list[list[Tensor]] | None:
    """The float32 copies of 16-bit parameters, by group; None in float32."""
    for name in ("fp32_from_float16_groups", "fp32_from_fp16_groups"):
        if hasattr(optimizer, name):
            return getattr(optimizer, name)
    return None


def _parameters(optimizer: Any) -> list[Tensor]:
    return [parameter for group in _inner(optimizer).param_groups for parameter in group["params"]]


def _experts_of_optimizer(optimizer: Any) -> dict[str, Any]:
    """The optimizer's state of experts, by the parameter's number, and its float32 copies of experts, None for others.

    Below 'optimizer' where there are such copies, in fp16 and bf16, as the host nests it.
    """
    parameters, inner = _parameters(optimizer), _inner(optimizer)
    state = {
        number: {name: value for name, value in inner.state[parameter].items()}
        for number, parameter in enumerate(parameters)
        if host.is_expert(parameter) and parameter in inner.state
    }
    mains = _main_groups(optimizer)
    if mains is None:
        return {"state": state}
    copies = [[main.detach() if host.is_expert(main) else None for main in group] for group in mains]
    return {"optimizer": {"state": state}, "fp32_from_fp16_params": copies}


@torch.no_grad()
def _load_optimizer(optimizer: Any, saved: Any, path: str) -> None:
    mains = _main_groups(optimizer)
    if saved is None or (mains is not None) != ("fp32_from_fp16_params" in saved):
        expected = "an optimizer of 16-bit parameters" if mains is not None else "an optimizer of float32 parameters"
        raise ValueError(f"{path} must hold {expected}, found another: give --no-load-optim or --finetune")
    state = saved["optimizer"]["state"] if mains is not None else saved["state"]
    parameters, inner = _parameters(optimizer), _inner(optimizer)
    for number, values in state.items():
        if not 0 <= number < len(parameters) or not host.is_expert(parameters[number]):
            raise ValueError(f"{path}: parameter {number} of the optimizer must be an expert's")
        parameter = parameters[number]
        for name, value in values.items():
            if isinstance(value, Tensor) and value.dim() > 0 and value.shape != parameter.shape:
                raise ValueError(
                    f"{path}: {name} of parameter {number} must have shape {list(parameter.shape)}, got "
                    f"{list(value.shape)}"
                )
        inner.state[parameter] = {
            name: value.to(parameter.device) if isinstance(value, Tensor) and value.dim() > 0 else value
            for name, value in values.items()
        }
    for group, copies in zip(mains or [], saved.get("fp32_from_fp16_params", []), strict=True):
        for main, copy in zip(group, copies, strict=True):
            if copy is not None:
                main.copy_(copy)
