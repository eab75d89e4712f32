"""GPT-NeoX from a checkout, on the CPU: stubs of packages it imports, none of its code. For a process of its own."""

from __future__ import annotations

import dataclasses
import importlib.abc
import importlib.machinery
import sys
import types
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class _Names(type):
    """A class of which any attribute is another one like it, and which can be called."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Names(name, (), {"__init__": lambda self, *args, **kwargs: None})


class _Anything(types.ModuleType):
    """A package of which any name can be imported."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(_Names, name) if name.startswith("__") else _Names.__getattr__(_Names, name)


class _Tracker:
    """deepspeed's tracker of CUDA random states, which has none."""

    @contextmanager
    def fork(self, name: str = ""):
        yield


_ANY = _Anything("any")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the packages that the host imports and that its layers and arguments do without."""

    packages = (
        "pkg_resources", "deepspeed", "apex", "requests", "wandb", "tokenizers", "tiktoken", "einops", "ftfy",
        "lm_dataformat", "sentencepiece", "best_download", "yaml", "hjson", "mpi4py", "tensorboard", "lm_eval", "regex",
        "nltk",
    )  # fmt: skip

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        package = name.partition(".")[0]
        if package in self.packages and isinstance(sys.modules.get(package, _ANY), _Anything):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Anything(spec.name)

    def exec_module(self, module: types.ModuleType) -> None: ...


def prepare(checkout: Path) -> None:
    """Puts a checkout on sys.path, with all it needs to run on the CPU, and makes the process groups of one rank."""
    sys.meta_path.append(_Finder())
    import deepspeed.runtime.activation_checkpointing.checkpointing as checkpointing

    checkpointing.get_cuda_rng_tracker = _Tracker
    sys.modules["deepspeed"].checkpointing = checkpointing
    if not torch.cuda.is_available():
        torch.cuda.current_device = lambda: torch.device("cpu")
    sys.path.insert(0, str(checkout))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    from megatron import mpu

    mpu.initialize_model_parallel(1)


def arguments(**changes: Any) -> types.SimpleNamespace:
    """Every field of the host's NeoXArgs at its default, but for those of a small model."""
    from megatron.neox_arguments import NeoXArgs

    fields: dict[str, Any] = {}
    for field in dataclasses.fields(NeoXArgs):
        if field.default is not dataclasses.MISSING:
            fields[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            fields[field.name] = field.default_factory()
    fields |= {
        "hidden_size": 16, "num_attention_heads": 2, "num_layers": 2, "seq_length": 6, "max_position_embeddings": 6,
        "attention_config": ["global", "global"], "model_parallel_size": 1, "params_dtype": torch.float32,
        "precision": "fp32", "hidden_dropout": 0.0, "attention_dropout": 0.0, "use_cpu_initialization": True,
        "bias_gelu_fusion": False, "norm": "layernorm", "pos_emb": "none", "rank": 0,
        "scaled_upper_triang_masked_softmax_fusion": False,
        "init_method_std": 0.3, "use_mup": False, "mup_width_scale": 1,
    }  # fmt: skip
    return types.SimpleNamespace(**fields | changes)


def layer(neox_args: types.SimpleNamespace, layer_number: int = 0, pipe: bool = False) -> nn.Module:
    """A ParallelTransformerLayer of the host, or the one for its pipeline."""
    from megatron.model import transformer

    kind = transformer.ParallelTransformerLayerPipe if pipe else transformer.ParallelTransformerLayer

    def start(tensor: torch.Tensor) -> torch.Tensor:
        return nn.init.normal_(tensor, 0.0, 0.3)

    def masked(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return scores.masked_fill_(mask, -10000.0)

    return kind(neox_args, masked, start, start, layer_number)
