"""A MoE model from a dense one (sparse upcycling, arXiv 2212.05055), or from several (expert merging).

copy   every expert is the dense MLP, so that the new model computes what the dense one does, whatever the router.
split  the MLP's inner features are cut into ``granularity`` equal slices, which the experts take in turn (fine-grained
       upcycling, arXiv 2410.07524). Down projections are multiplied by granularity, so that the mean of all experts'
       outputs is the dense MLP: the new model computes what the dense one does where all experts have equal weights.
merge  expert i is the MLP of the i-th of several dense models of one shape; the rest is of the first model given.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from . import dense as dense_models
from . import families
from .convert import DEFAULT_SHARD, Conversion, assemble, tensor_bytes, write_folder
from .dense import Dense
from .errors import ArgumentError, ConfigError, LayoutError, ShapeError
from .files import TORCH_DTYPES
from .layouts import layout_of
from .layouts.base import EXPERT, STACK, Entry
from .mergekit import generator_of
from .writer import Target, shards_of

MODES = ("copy", "split", "merge")
ROUTER_INITS = ("normal", "zeros")


def upcycle(
    source: str | Path,
    target: str | Path,
    *,
    num_experts: int | None = None,
    top_k: int = 2,
    mode: str = "copy",
    granularity: int | None = None,
    experts: Sequence[str | Path] = (),
    to: str | None = None,
    router_init: str = "normal",
    router_std: float = 0.02,
    shared_size: int | None = None,
    seed: int = 0,
    allow_pickle: bool = False,
    max_shard_size: int = DEFAULT_SHARD,
    restart: bool = False,
    progress: bool = False,
) -> Conversion:
    """Writes a Mixtral or Qwen2-MoE checkpoint into the new folder target, made from the dense one at source.

    to: 'mixtral', 'qwen2_moe', or either with '_packed'; by default Qwen2-MoE for Qwen2 and Mixtral for Llama and
    Mistral. mode 'split' cuts each MLP into granularity slices (num_experts of them by default; num_experts must be a
    multiple). experts are the dense checkpoints of mode 'merge'. The routers are drawn from a normal distribution of
    standard deviation router_std by the seed, or 0. Qwen2-MoE's shared expert has shared_size features (an expert's
    size by default), begins as the first rows of the MLP with a down projection and a gate of 0, and so adds nothing
    before it is trained. Writing is as in convert(). Raises CheckpointError.
    """
    opened = [Dense(path, allow_pickle) for path in (source, *experts)]
    try:
        job = _Upcycling(
            opened, num_experts, top_k, mode, granularity, to, router_init, router_std, shared_size, seed
        )  # fmt: skip
        task = {
            "source": sorted({(str(i.file.resolve()), i.file.stat().st_size, i.file.stat().st_mtime_ns)
                              for d in opened for i in d.store.infos.values()}),
            "experts": [str(path) for path in experts], "mode": mode, "router": [router_init, router_std, seed],
            "config": job.config, "granularity": job.granularity,
        }  # fmt: skip
        return write_folder(
            Path(target), shards_of(job.targets(), max_shard_size), job.config, task, copy_from=opened[0].path,
            restart=restart, progress=progress, source_layout=str(opened[0].family), layout=job.layout.name,
            layers=opened[0].layers, notes=tuple(job.notes),
        )  # fmt: skip
    finally:
        for model in opened:
            model.close()


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentError(f"{{{name}}} must be an integer of at least 1, got {value!r}", found=value)
    return value


class _Upcycling:
    def __init__(
        self, opened: list[Dense], num_experts: int | None, top_k: int, mode: str, granularity: int | None,
        to: str | None, router_init: str, router_std: float, shared_size: int | None, seed: int,
    ) -> None:  # fmt: skip
        base, others = opened[0], opened[1:]
        for name, value, allowed in (("mode", mode, MODES), ("router_init", router_init, ROUTER_INITS)):
            if value not in allowed:
                raise ArgumentError(
                    f"{{{name}}} must be one of {', '.join(allowed)}, got {value!r}", expected=allowed, found=value
                )
        if bool(others) != (mode == "merge"):
            raise ArgumentError(
                f"{{experts}} must be given for {{mode}} 'merge' and for no other, got {len(others)} for {{mode}} "
                f"{mode!r}", found=len(others),
            )  # fmt: skip
        if granularity is not None and mode != "split":
            raise ArgumentError(
                f"{{granularity}} belongs to {{mode}} 'split', got {granularity} for {{mode}} {mode!r}",
                found=granularity,
            )
        if not 0 <= router_std <= 1000:
            raise ArgumentError(
                f"{{router_std}} must be a number between 0 and 1000, got {router_std!r}", found=router_std
            )
        if mode == "merge" and num_experts not in (None, len(others)):
            raise ArgumentError(
                f"{{num_experts}} must be {len(others)}, the number of models given as {{experts}}, got {num_experts}",
                expected=len(others), found=num_experts,
            )  # fmt: skip
        if mode != "merge" and num_experts is None:
            raise ArgumentError(f"{{num_experts}} must be given for {{mode}} {mode!r}: an integer of at least 1")
        self.experts = _positive("num_experts", len(others) if mode == "merge" else num_experts)
        slices = self.experts if granularity is None else granularity
        self.granularity = 1 if mode != "split" else _positive("granularity", slices)
        if self.experts % self.granularity:
            raise ArgumentError(
                f"{{num_experts}} must be a multiple of {{granularity}} = {self.granularity}, got {self.experts}",
                expected=self.granularity, found=self.experts,
            )  # fmt: skip
        if base.inner % self.granularity:
            raise ArgumentError(
                f"{{granularity}} must divide the dense model's intermediate_size = {base.inner}, got "
                f"{self.granularity}", expected=base.inner, found=self.granularity,
            )  # fmt: skip
        self.base, self.models, self.seed = base, others or [base] * self.experts, seed
        self.std = router_std if router_init == "normal" else 0.0
        self.inner = base.inner // self.granularity
        self._same_models()
        self.layout = layout_of(to or dense_models.default_layout(base))
        if self.layout.family not in ("mixtral", "qwen2_moe"):
            raise LayoutError(
                f"a dense model becomes a mixtral or qwen2_moe one, packed or not, got {self.layout.name!r} "
                "(convert goes on from there)"
            )  # fmt: skip
        if shared_size is not None and self.layout.family != "qwen2_moe":
            raise ArgumentError(
                f"{{shared_size}} belongs to qwen2_moe, got {shared_size} for {self.layout.name}", found=shared_size
            )
        self.shared = _positive("shared_size", shared_size if shared_size is not None else self.inner)
        if self.shared > base.inner:
            raise ArgumentError(
                f"{{shared_size}} must be at most the dense intermediate_size = {base.inner}, got {self.shared}",
                expected=base.inner, found=self.shared,
            )  # fmt: skip
        if _positive("top_k", top_k) > self.experts:
            raise ArgumentError(
                f"{{top_k}} must be at most {{num_experts}} = {self.experts}, got {top_k}",
                expected=self.experts, found=top_k,
            )  # fmt: skip
        sizes = {"num_experts": self.experts, "top_k": top_k, "intermediate_size": self.inner,
                 "shared_size": self.shared}  # fmt: skip
        self.config = dense_models.moe_config(base, self.layout.family, sizes)
        self.moe = families.moe_of(self.config)
        self.notes: list[str] = []
        if self.granularity > 1 and top_k != self.experts:
            self.notes.append(
                f"top_k = {top_k} of {self.experts} slices: the new model begins away from the dense one and has to be "
                "trained"
            )

    def _same_models(self) -> None:
        for model in self.models:
            pairs = {
                "hidden_size": (self.base.hidden, model.hidden),
                "intermediate_size": (self.base.inner, model.inner),
                "num_hidden_layers": (self.base.layers, model.layers),
                "model_type": (self.base.family, model.family),
                "hidden_act": (self.base.config["hidden_act"], model.config["hidden_act"]),
            }
            for name, (mine, its) in pairs.items():
                if mine != its:
                    raise ShapeError(f"{model.path}: {name} must be {mine!r}, as in {self.base.path}, got {its!r}")

    def targets(self) -> list[Target]:
        """Every tensor of the new model."""
        store = self.base.store
        targets = [
            Target(name, store.infos[name].dtype, store.infos[name].shape, functools.partial(store.raw, name))
            for name in self.base.trunk
        ]
        for layer in range(self.base.layers):
            prefix = self.layout.prefix.format(layer=layer)
            for entry in self.layout.entries(self.moe):
                several = range(self.experts) if entry.over == EXPERT else (None,)
                targets += [self._target(layer, prefix, entry, e) for e in several]
        return targets

    def _target(self, layer: int, prefix: str, entry: Entry, expert: int | None) -> Target:
        models = self.models if expert is None and entry.over == STACK else self.models[expert or 0 :][:1]
        dtypes = {model.info(layer, part).dtype for model in models for part in _dense_parts(entry)}
        if len(dtypes) > 1:
            raise ConfigError(f"the dense models must have one dtype, layer {layer} has {' and '.join(sorted(dtypes))}")
        name = prefix + (entry.name if expert is None else entry.name.format(e=expert))
        dtype = dtypes.pop()
        return Target(name, dtype, entry.shape(self.moe), lambda: self._pieces(layer, entry, expert, dtype))

    def _pieces(self, layer: int, entry: Entry, expert: int | None, dtype: str) -> Iterator[memoryview]:
        if entry.parts in (("router",), ("shared_scale",)):
            weight = torch.zeros(entry.shape(self.moe))
            if entry.parts == ("router",):
                weight.normal_(0.0, self.std, generator=generator_of(self.seed, layer))
            yield tensor_bytes(weight.to(TORCH_DTYPES[dtype]).contiguous())
            return
        for e in range(self.experts) if entry.over == STACK else (expert or 0,):
            yield tensor_bytes(assemble(entry, [self._part(layer, part, e) for part in entry.parts]))

    def _part(self, layer: int, part: str, expert: int) -> torch.Tensor:
        if part.startswith("shared_"):
            weight = self.base.read(layer, part.removeprefix("shared_"))
            return torch.zeros_like(weight[:, : self.shared]) if part == "shared_down" else weight[: self.shared]
        weight = self.models[expert].read(layer, part)
        start = expert % self.granularity * self.inner
        if part == "down":
            return weight[:, start : start + self.inner] * self.granularity
        return weight[start : start + self.inner]


def _dense_parts(entry: Entry) -> list[str]:
    parts = [part.removeprefix("shared_") for part in entry.parts]
    return [part if part in dense_models.PARTS else "gate" for part in parts]
