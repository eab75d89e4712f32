"""From one layout to another: planned from headers, checked, then streamed piece by piece."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from . import families, trunk, trunk_megatron
from .errors import ArgumentError, CheckpointError, ConfigError, DtypeError, LayoutError
from .files import WEIGHT_SUFFIXES, inside
from .layouts import Layout, layout_of
from .layouts.base import EXPERT, FLAT, STACK, Entry, config_to_json
from .rows import Tensor
from .source import OWN_KEY, Checkpoint, LayerBlock
from .writer import (
    JOURNAL,
    PartialFolder,
    Shard,
    Target,
    plan_digest,
    progress_bar,
    shards_of,
    write_index,
    write_text,
)

logger = logging.getLogger("fastmoe_cpp.checkpoint")
DEFAULT_SHARD = 5_000_000_000


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What was written: the folder, both layouts, sizes, and notes for people."""

    path: Path
    source_layout: str
    layout: str
    layers: int
    tensors: int
    nbytes: int
    shards: int
    resumed_shards: int
    notes: tuple[str, ...]


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    *,
    config: Mapping[str, Any] | str | Path | None = None,
    layout: str | None = None,
    prefix: str | None = None,
    moe_only: bool = False,
    allow_pickle: bool = False,
    repair_shared_gate: bool = False,
    seed: int = 0,
    max_shard_size: int = DEFAULT_SHARD,
    restart: bool = False,
    progress: bool = False,
) -> Conversion:
    """Writes the checkpoint at source in the layout named ``to`` into the new folder target.

    Every name, shape and dtype of the MoE layers is checked before anything is written, every value on its way. Memory
    is that of one expert. target appears when it is whole; a run that was cut off goes on where it stopped, and
    restart=True begins anew instead. The bits of every weight stay as they are.

    config, layout, allow_pickle, repair_shared_gate and seed say how to read the source (Checkpoint). prefix is what
    names of layer N begin with in the target, with '{layer}'. moe_only leaves out everything beside the MoE layers.
    max_shard_size is in bytes. Raises CheckpointError.
    """
    wanted = layout_of(to)
    if max_shard_size < 1:
        raise ArgumentError(f"{{max_shard_size}} must be at least 1 byte, got {max_shard_size}", found=max_shard_size)
    opened = Checkpoint(
        source,
        config=config,
        layout=layout,
        allow_pickle=allow_pickle,
        repair_shared_gate=repair_shared_gate,
        seed=seed,
    )
    try:
        plan = Plan(opened, wanted, prefix, moe_only)
        task = {
            "source": [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in plan.source_files()],
            "config": plan.config, "seed": seed,
        }  # fmt: skip
        return write_folder(
            Path(target), shards_of(plan.targets, max_shard_size), plan.config, task, copy_from=opened.path,
            restart=restart, progress=progress, source_layout=opened.layout.name, layout=wanted.name,
            layers=len(opened.layers), notes=(*opened.notes, *plan.notes),
        )  # fmt: skip
    finally:
        opened.close()


def write_folder(
    target: Path, shards: list[Shard], config: Mapping[str, Any], task: dict[str, Any], *, copy_from: Path,
    restart: bool, progress: bool, source_layout: str, layout: str, layers: int, notes: tuple[str, ...],
) -> Conversion:  # fmt: skip
    """Writes shards, index, config.json and the source's other files, and then gives the folder its name."""
    beside = other_files(copy_from)
    if any(file.name == JOURNAL for file in beside):
        beside = [file for file in beside if file.name != JOURNAL]
        notes = (*notes, f"{JOURNAL} was not copied: the name is of the record that a conversion keeps of itself")
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    nbytes = sum(tensor.nbytes for tensor in tensors)
    with PartialFolder(target, plan_digest(shards, task), restart) as folder:
        resumed = len(folder.done)
        with progress_bar(nbytes, target.name, progress) as advance:
            for shard in shards:
                try:
                    folder.shard(shard, advance)
                except CheckpointError:
                    folder.discard()
                    raise
        write_index(folder.path, shards)
        write_text(folder.path / "config.json", json.dumps(config, indent=2) + "\n")
        for file in beside:
            folder.copy(file)
        folder.finish()
    return Conversion(target, source_layout, layout, layers, len(tensors), nbytes, len(shards), resumed, notes)


def other_files(source: Path) -> list[Path]:
    """The files beside the weights that go with a model: tokenizer, generation settings, licence, card."""
    if not source.is_dir():
        return []
    files = []
    for file in sorted(source.iterdir()):
        skipped = file.suffix in WEIGHT_SUFFIXES or file.name == "config.json" or file.name.startswith(".")
        if file.is_file() and not skipped and not file.name.endswith(".index.json"):
            files.append(inside(source, file))
    return files


class Plan:
    """Every tensor of the target, its configuration, and how each is made; raises before anything is written."""

    def __init__(self, source: Checkpoint, target: Layout, prefix: str | None, moe_only: bool) -> None:
        self.source, self.target = source, target
        self._parts = {part: entry for entry in source.layout.entries(source.moe) for part in entry.parts}
        self.prefix = self._prefix(prefix)
        source.validate()
        if refused := target.refusals(source.moe):
            raise LayoutError(f"the layout {target.name} can't hold this model: {', '.join(refused)}")
        self._entries = target.entries(source.moe)
        if needed := sorted({part for entry in self._entries for part in entry.parts} - set(self._parts)):
            raise LayoutError(
                f"the layout {target.name} can't hold this model: it needs {', '.join(needed)}, which the model lacks"
            )
        self.config = self._config(moe_only)
        self.notes: list[str] = []
        self.targets = [] if moe_only else self._trunk()
        for layer in source.layers:
            self.targets += self._layer(layer)
        names = [tensor.name for tensor in self.targets]
        if len(set(names)) != len(names):
            twice = next(name for name in sorted(names) if names.count(name) > 1)
            raise LayoutError(f"{twice} would be written twice: give another --prefix", tensor=twice)
        if len(source.layers) > 1 and moe_only:
            self.notes.append("only the MoE layers were written")

    def source_files(self) -> list[Path]:
        """The files that weights are read from."""
        return sorted({info.file for info in self.source.infos.values()})

    def _prefix(self, given: str | None) -> str:
        template = self.source.prefix_template
        if given is None:
            given = self.source.own.get("prefixes", {}).get(self.target.name)
        if given is None and self.source.layout.block == self.target.block == "":
            given = template
        given = self.target.prefix if given is None else given
        several = len(self.source.layers) > 1
        if not isinstance(given, str) or (several and given.count("{layer}") != 1):
            raise LayoutError(f"the prefix must hold '{{layer}}' once, got {given!r}")
        return given

    def _config(self, moe_only: bool) -> dict[str, Any]:
        source, target = self.source, self.target
        if target.family is not None:
            if source.hf_config is None:
                raise ConfigError(
                    f"{source.path}: a {target.family} model needs config.json of transformers and the source has "
                    "none: give it with --config"
                )
            config = families.translate(source.hf_config, source.moe, target.family, source.layout.name)
            if lost := families.differences(source.moe, families.moe_of(config)):
                raise LayoutError(f"the layout {target.name} can't hold this model: {'; '.join(lost)}")
            return config
        own = {
            "version": 1,
            "layout": target.name,
            "moe": config_to_json(source.moe),
            "host": target.host_arguments(source.moe),
            "config": source.hf_config,
            "prefixes": {**source.own.get("prefixes", {}), source.layout.name: source.prefix_template},
        }
        if trunk.is_megatron(target) and not moe_only:
            arguments = trunk_megatron.arguments(source.hf_config, source.moe, source.trunk)
            own["host"] |= arguments.get("config", {})
            own |= {name: value for name, value in arguments.items() if name != "config"}
        return {OWN_KEY: own}

    def _trunk(self) -> list[Target]:
        source = self.source
        infos = {name: source.infos[name] for name in source.trunk}
        planned, notes = trunk.plan(infos, source.layout, self.target, source.hf_config)
        self.notes += notes
        return [
            Target(name, tensor.dtype, tensor.shape, functools.partial(self._rows, tensor))
            for name, tensor in planned.items()
        ]

    def _rows(self, tensor: Tensor) -> Iterator[Any]:
        for name, begin, end in tensor.rows:
            info = self.source.infos[name]
            row = info.nbytes // info.shape[0] if info.shape and info.shape[0] else 0
            whole = not info.shape or (begin, end) == (0, info.shape[0])
            yield from self.source.store.raw(name) if whole else self.source.store.raw(name, begin * row, end * row)

    def _layer(self, layer: LayerBlock) -> list[Target]:
        prefix = self.prefix.replace("{layer}", str(layer.number))
        single = [entry for entry in self._entries if entry.over == EXPERT]
        targets = [
            self._tensor(layer, entry, prefix + entry.name, range(self.source.moe.num_experts))
            for entry in self._entries if entry.over != EXPERT
        ]  # fmt: skip
        for e in range(self.source.moe.num_experts if single else 0):
            targets += [
                self._tensor(layer, entry, prefix + entry.name.format(e=e), range(e, e + 1)) for entry in single
            ]
        return targets

    def _tensor(self, layer: LayerBlock, entry: Entry, name: str, experts: range) -> Target:
        if entry.over not in (EXPERT, STACK, FLAT):
            experts = range(1)
        dtype = self._dtype(layer, entry, name, experts)
        return Target(name, dtype, entry.shape(self.source.moe), lambda: self._pieces(layer, entry, experts))

    def _dtype(self, layer: LayerBlock, entry: Entry, name: str, experts: range) -> str:
        found: dict[str, str] = {}
        for part in entry.parts:
            stored = self._parts[part]
            for e in experts if stored.over == EXPERT else (0,):
                full = layer.prefix + (stored.name.format(e=e) if stored.over == EXPERT else stored.name)
                found.setdefault(self.source.infos[full].dtype, full)
        if len(found) > 1:
            (one, first), (other, second) = list(found.items())[:2]
            raise DtypeError(
                f"{second} must have the dtype of {first}, {one}, to share {name} with it; it has {other}",
                tensor=second, expected=one, found=other,
            )  # fmt: skip
        return next(iter(found))

    def _pieces(self, layer: LayerBlock, entry: Entry, experts: range) -> Iterator[memoryview]:
        for e in experts:
            yield tensor_bytes(assemble(entry, [self.source.part(layer, part, e) for part in entry.parts]))


def assemble(entry: Entry, parts: list[torch.Tensor]) -> torch.Tensor:
    """One expert's slice of a tensor, contiguous, from its parts."""
    whole = parts[0]
    if len(parts) == 2:
        whole = torch.stack(parts, dim=1).flatten(0, 1) if entry.interleaved else torch.cat(parts)
    return (whole.T if entry.transposed else whole).contiguous()


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """A contiguous CPU tensor's own bytes; the view keeps the tensor alive."""
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return memoryview(b"")
    buffer = (ctypes.c_char * size).from_address(tensor.data_ptr())
    buffer.tensor = tensor
    return memoryview(buffer).cast("B")
