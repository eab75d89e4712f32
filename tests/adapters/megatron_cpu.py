"""Makes a checkout of Megatron-LM run on the CPU: stubs for what needs CUDA, apex and old torch, nothing of its own.

For a process that does nothing else: ``prepare(checkout)`` changes torch and sys.path and doesn't change them back.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn


def _stub(name: str, **contents: Any) -> None:
    module = types.ModuleType(name)
    module.__dict__.update(contents)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


def _apply(function: Any, overflow: Any, tensors: list, *rest: Any) -> Any:
    return function(overflow, tensors, *rest)


def _l2norm(overflow: Any, tensors: list, per_parameter: bool) -> tuple[torch.Tensor, None]:
    return torch.stack([t.float().norm() for t in tensors[0]]).norm().reshape(1), None


@torch.no_grad()
def _scale(overflow: Any, tensors: list, factor: float) -> None:
    for source, target in zip(*tensors, strict=True):
        target.copy_(source * factor)


class _FusedAdam(torch.optim.AdamW):
    pass


class _LayerNorm(nn.LayerNorm):
    def __init__(
        self, size: Any, eps: float = 1e-5, no_persist_layer_norm: bool = True, sequence_parallel: bool = False
    ):
        super().__init__(size, eps=eps)


class _Tracker:
    """mpu's tracker of CUDA random states, which has none."""

    def add(self, name: str, seed: int) -> None: ...

    def get_states(self) -> dict:
        return {"model-parallel-rng": torch.zeros(1)}  # an empty one is an error to the hosts

    def set_states(self, states: dict) -> None: ...

    def reset(self) -> None: ...

    @contextmanager
    def fork(self, name: str = ""):
        yield


def _any_class(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})


def _stub_packages() -> None:
    _stub("apex")
    _stub("apex.multi_tensor_apply", multi_tensor_applier=_apply)
    _stub("apex.optimizers", FusedAdam=_FusedAdam, FusedSGD=torch.optim.SGD)
    _stub("apex.normalization")
    _stub("apex.normalization.fused_layer_norm", FusedLayerNorm=_LayerNorm)
    _stub("amp_C", multi_tensor_l2norm=_l2norm, multi_tensor_scale=_scale)
    _stub("torch._six", inf=float("inf"))
    for name in ("six", "einops"):  # imported and not needed here
        if importlib.util.find_spec(name) is None:
            _stub(name, PY2=False, PY3=True, rearrange=None)
    if importlib.util.find_spec("torchvision") is None:
        for name in ("torchvision", "torchvision.transforms", "torchvision.datasets"):
            _stub(name, __getattr__=_any_class)


def _no_cuda() -> None:
    cuda = torch.cuda
    for kind in ("Float", "Double", "Half", "BFloat16", "Int", "Long", "Byte"):
        setattr(cuda, kind + "Tensor", getattr(torch, kind + "Tensor"))
    cuda.current_device = lambda: "cpu"
    cuda.synchronize = lambda *_: None
    cuda.manual_seed = lambda *_: None
    cuda.empty_cache = lambda: None
    cuda.get_rng_state = lambda *_: torch.zeros(1, dtype=torch.uint8)
    cuda.set_rng_state = lambda *_: None
    nn.Module.cuda = lambda self, *_: self
    torch.Tensor.cuda = lambda self, *_, **__: self
    named = torch.Tensor.type

    def of_type(self: torch.Tensor, *inputs: Any, **named_inputs: Any) -> Any:
        """A name as of CUDA, which the hosts compare with; a conversion to such a name stays on the CPU."""
        if not inputs and not named_inputs:
            return named(self).replace("torch.", "torch.cuda.")
        return named(self, *inputs, **named_inputs)

    torch.Tensor.type = of_type
    load = torch.load
    torch.load = lambda *inputs, **given: load(*inputs, **{"weights_only": False, **given})


def prepare(checkout: Path) -> None:
    """Puts a checkout on sys.path, with all it needs to run on the CPU."""
    _stub_packages()
    _no_cuda()
    if not hasattr(numpy, "float"):
        numpy.float = float  # the hosts' datasets name it
    sys.path.insert(0, str(checkout))
    import megatron.training  # noqa: F401  and with it everything that is renamed below
    from megatron import model, mpu

    # LayerNorm by every name it was imported by
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.") and isinstance(getattr(module, "LayerNorm", None), type):
            module.LayerNorm = _LayerNorm
    if hasattr(model, "import_layernorm"):
        for name, module in list(sys.modules.items()):
            if name.startswith("megatron.") and hasattr(module, "import_layernorm"):
                module.import_layernorm = lambda fp32_residual_connection: _LayerNorm
    tracker = _Tracker()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron") and hasattr(module, "get_cuda_rng_tracker"):
            module.get_cuda_rng_tracker = lambda: tracker
    mpu.random._set_cuda_rng_state = lambda *_, **__: None
