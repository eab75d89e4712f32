"""A checkpoint opened for reading: its tensors, configuration and layout, its MoE layers, and every check on them."""

from __future__ import annotations

import logging
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..config import MoEConfig
from . import families, mergekit
from .errors import (
    CheckpointError,
    ConfigError,
    DtypeError,
    LayoutError,
    MissingTensorError,
    NonFiniteError,
    ShapeError,
    UnknownTensorError,
    UnsafeFileError,
)
from .files import TORCH_DTYPES, SafetensorsStore, Store, TensorInfo, all_finite, inside, read_json
from .infer import candidates, check_fields, infer
from .layouts import LAYOUTS, Layout, layout_of
from .layouts.base import EXPERT, EXPERT_PARTS, FLAT, STACK, Entry, config_from_json
from .pickles import PickleStore, pickle_files

logger = logging.getLogger("fastmoe_cpp.checkpoint")
#: The key under which config.json of a layout without a transformers model keeps what is needed to read it.
OWN_KEY = "fastmoe_cpp"


@dataclass(frozen=True)
class LayerBlock:
    """A MoE layer of a checkpoint: its number, and what its tensors' names begin with."""

    number: int
    prefix: str
    names: frozenset[str] = field(repr=False)


def must_exist(path: Path) -> None:
    """MissingTensorError where there is nothing of that name."""
    if not path.exists():
        raise MissingTensorError(f"{path}: must be a file or a folder, there is none")


def open_store(path: Path, allow_pickle: bool) -> Store:
    """The tensors of a file or folder; pickles only where they are allowed and nothing safe is there."""
    must_exist(path)
    pickles = pickle_files(path)
    safe = [path] if path.suffix == ".safetensors" else sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if safe or (path.is_dir() and any(path.glob("*.safetensors.index.json"))):
        return SafetensorsStore(path)
    if not pickles:
        raise MissingTensorError(f"{path}: must hold at least one .safetensors file, it holds none")
    if not allow_pickle:
        raise UnsafeFileError(
            f"{pickles[0]}: is a pickle, and pickles are not opened unless asked for: --allow-pickle "
            "(allow_pickle=True) reads it with torch.load(weights_only=True)"
        )
    return PickleStore(pickles)


class Checkpoint:
    """A checkpoint's MoE layers, read through its layout.

    config gives the configuration where the checkpoint has none or another is meant: a file or a dictionary, of
    transformers' config.json, or of MoEConfig's fields (sizes may be left out). layout names the layout where it can't
    be told. Raises CheckpointError; a tensor's shape and dtype are checked by validate().
    """

    def __init__(
        self,
        path: str | Path,
        *,
        config: Mapping[str, Any] | str | Path | None = None,
        layout: str | None = None,
        allow_pickle: bool = False,
        repair_shared_gate: bool = False,
        seed: int = 0,
    ) -> None:
        self.path = Path(path)
        self.store = open_store(self.path, allow_pickle)
        self.infos: dict[str, TensorInfo] = dict(self.store.infos)
        self._sorted = sorted(self.infos)
        self.notes: list[str] = []
        self._config_name = f"{self.path}: config.json"
        self.config = self._read_config(config)
        self.own = self._read_own()
        #: transformers' configuration, of this checkpoint or of the one it was converted from.
        self.hf_config: dict[str, Any] | None = self.config if "model_type" in self.config else self.own.get("config")
        self._refuse_quantised()
        self.layout, self.layers = self._find_layout(layout)
        self.moe = self._moe(named=layout is not None)
        self._entries = {part: entry for entry in self.layout.entries(self.moe) for part in entry.parts}
        self._overlay: dict[str, torch.Tensor] = {}
        self._last: tuple[tuple[str, int], torch.Tensor] | None = None
        self._mend_shared_gates(repair_shared_gate, seed)

    def _read_config(self, given: Mapping[str, Any] | str | Path | None) -> dict[str, Any]:
        if given is not None:
            if isinstance(given, Mapping):
                found, self._config_name = dict(given), "config"
            else:
                file = Path(given)
                file = file / "config.json" if file.is_dir() else file
                found, self._config_name = read_json(file, "configuration"), str(file)
            if "model_type" not in found and OWN_KEY not in found:
                # before the layout is looked for, whose error would hide it
                check_fields(found, self._config_name)
            return found
        folder = self.path if self.path.is_dir() else self.path.parent
        file = folder / "config.json"
        return read_json(inside(folder, file), "configuration") if file.is_file() else {}

    def _read_own(self) -> dict[str, Any]:
        """What convert() wrote into config.json, its types checked."""
        own = self.config.get(OWN_KEY)
        own = {} if own is None else own
        kinds = {"layout": str, "moe": dict, "config": dict, "prefixes": dict}
        if not isinstance(own, dict):
            raise ConfigError(f"{self.path}: {OWN_KEY} in config.json must be an object, got {type(own).__name__}")
        for name, kind in kinds.items():
            value = own.get(name)
            if value is not None and not isinstance(value, kind):
                raise ConfigError(
                    f"{self.path}: {OWN_KEY}.{name} in config.json must be of type {kind.__name__}, got "
                    f"{type(value).__name__}"
                )
        own = {name: value for name, value in own.items() if value is not None}
        if not isinstance(own.get("moe", {}).get("router", {}), dict):
            raise ConfigError(f"{self.path}: {OWN_KEY}.moe.router in config.json must be an object")
        return own

    # --- layout and layers --------------------------------------------------------------------------------------------

    def _find_layout(self, name: str | None) -> tuple[Layout, list[LayerBlock]]:
        family = self.hf_config.get("model_type") if self.hf_config else None
        name = name or self.own.get("layout")
        if name is not None:
            candidates = [layout_of(name)]
        else:
            hosts = [layout for layout in LAYOUTS.values() if layout.family == family and family is not None]
            candidates = hosts + [layout for layout in LAYOUTS.values() if layout.family is None]
        for layout in candidates:
            layers = self._layers_of(layout)
            if layers and layout.matches(set(layers[0].names)):
                return layout, layers
        if family is not None and family not in families.FAMILIES:
            families.fields_of(self.hf_config or {})
        if self.config and name is None:
            self._refuse_family_names()
        if not self.config and name is None:
            fits = [layout for layout in LAYOUTS.values() if layout.family and self._layers_of(layout)]
            if fits:
                raise ConfigError(
                    f"{self.path}: config.json is missing, and without it {fits[0].anchor} may belong to any of "
                    f"{', '.join(layout.name for layout in fits)}: give the configuration with --config, transformers' "
                    "config.json, or MoEConfig's fields and --layout"
                )
        raise LayoutError(
            f"{self.path}: no MoE layer was found: no tensor ends in "
            f"{' or '.join(sorted({layout.anchor for layout in candidates}))} with its experts beside it"
        )

    def _refuse_family_names(self) -> None:
        """ConfigError with the layouts of transformers' families whose names a layer has: where the configuration has
        no model_type, nothing says which it is."""
        if self.hf_config is not None:
            return
        fits = []
        for layout in LAYOUTS.values():
            layer = next(iter(self._layers_of(layout) if layout.family else ()), None)
            if layer and layout.matches(set(layer.names)) and any(candidates(layout, self._shapes(layer), gated=True)):
                fits.append(layout.name)
        if fits:
            give = f"--layout {fits[0]}" if len(fits) == 1 else "--layout with one of these"
            raise ConfigError(
                f"{self.path}: the names of the MoE layers are those of {', '.join(fits)}, and {self._config_name} has "
                f"no model_type that says so: give {give}, or transformers' config.json with --config",
                expected=tuple(fits),
            )

    def _refuse_quantised(self) -> None:
        for name in self._sorted:
            if name.endswith(("_blocks", "_scales", "weight_scale_inv", "qweight")) and "expert" in name:
                kind = "MXFP4" if name.endswith(("_blocks", "_scales")) else "quantised"
                raise DtypeError(
                    f"{name}: the experts must be of 16, 32 or 64 bits, these are {kind}: write them unquantised first",
                    tensor=name, found=kind,
                )  # fmt: skip

    def names_under(self, prefix: str) -> list[str]:
        """The tensors whose names begin so."""
        start = bisect_left(self._sorted, prefix)
        end = bisect_left(self._sorted, prefix + "\U0010ffff")
        return self._sorted[start:end]

    def _layers_of(self, layout: Layout) -> list[LayerBlock]:
        layers = []
        for name in self._sorted:
            if name != layout.anchor and not name.endswith("." + layout.anchor):
                continue
            prefix = name[: len(name) - len(layout.anchor)]
            numbers = re.findall(r"(?:^|\.)([0-9]{1,9})(?=\.)", prefix)
            under = frozenset(n[len(prefix) :] for n in self.names_under(prefix + layout.block))
            layers.append(LayerBlock(int(numbers[-1]) if numbers else 0, prefix, under))
        layers.sort(key=lambda layer: (layer.number, layer.prefix))
        return layers

    @property
    def prefix_template(self) -> str:
        """Every layer's prefix with '{layer}' for its number; LayoutError where they differ (two stacks of layers)."""
        templates = {
            "{layer}".join(layer.prefix.rsplit(str(layer.number), 1))
            if re.search(r"\d", layer.prefix)
            else layer.prefix
            for layer in self.layers
        }
        if len(templates) > 1:
            raise LayoutError(
                f"{self.path}: the MoE layers must form one stack, they are under {' and '.join(sorted(templates))}"
            )
        return templates.pop()

    def layer(self, number: int) -> LayerBlock:
        """The MoE layer of that number."""
        found = [layer for layer in self.layers if layer.number == number]
        if len(found) == 1:
            return found[0]
        if found:
            raise LayoutError(f"{self.path}: layer {number} is in {' and in '.join(layer.prefix for layer in found)}")
        numbers = ", ".join(str(layer.number) for layer in self.layers)
        raise MissingTensorError(f"{self.path}: layer {number} must be a MoE layer, the MoE layers are {numbers}")

    @cached_property
    def trunk(self) -> list[str]:
        """The tensors that belong to no MoE layer, in order."""
        taken = {layer.prefix + name for layer in self.layers for name in layer.names}
        return [name for name in self._sorted if name not in taken]

    def _moe(self, named: bool) -> MoEConfig:
        if "moe" in self.own:
            try:
                return config_from_json(self.own["moe"])
            except (TypeError, ValueError, KeyError) as error:
                raise ConfigError(f"{self.path}: {OWN_KEY}.moe in config.json: {error}") from None
        if self.hf_config is not None:
            return families.moe_of(self.hf_config)
        given = {name: value for name, value in self.config.items() if name != OWN_KEY}
        shapes = self._shapes(self.layers[0])
        if given:
            check_fields(given, self._config_name)
            if not named and not any(list(candidates(self.layout, shapes, gated)) for gated in (True, False)):
                # gpt-oss's names hold those of this library's own layout
                self._refuse_family_names()
        return infer(self.layout, shapes, given, str(self.path), self._config_name)

    def _shapes(self, layer: LayerBlock) -> dict[str, tuple[int, ...]]:
        return {name: self.infos[layer.prefix + name].shape for name in layer.names}

    # --- checks -------------------------------------------------------------------------------------------------------

    def _mend_shared_gates(self, repair: bool, seed: int) -> None:
        entry = self._entries.get("shared_scale")
        for layer in self.layers if entry is not None else ():
            name = layer.prefix + entry.name
            info = self.infos.get(name)
            if info is None or info.dtype not in TORCH_DTYPES:
                continue
            hidden = self.moe.hidden_size
            if info.shape == (hidden,):
                self._overlay[name] = self.store.read(name).reshape(1, hidden)
                self.notes.append(f"{name} has shape [{hidden}] and is taken as [1, {hidden}]")
            elif repair and info.shape == (0, hidden):
                std = self.moe.initializer_range
                dtype = TORCH_DTYPES[info.dtype]
                self._overlay[name] = mergekit.draw_shared_gate(name, hidden, dtype, std, layer.number, seed)
                self.notes.append(f"{name} had no row and was drawn anew")
            else:
                continue
            size = self._overlay[name].numel() * self._overlay[name].element_size()
            self.infos[name] = TensorInfo(info.dtype, (1, hidden), info.file, 0, size)

    def problems(self) -> Iterator[tuple[int | None, CheckpointError]]:
        """Everything wrong with the names, shapes and dtypes of the MoE layers, with the layer's number."""
        if self.hf_config is not None and self.layout.family == self.hf_config.get("model_type"):
            yield from self._missing_layers(self.hf_config)
        for layer in self.layers:
            for problem in self.layer_problems(layer):
                yield layer.number, problem

    def _missing_layers(self, config: Mapping[str, Any]) -> Iterator[tuple[int | None, CheckpointError]]:
        expected = families.sparse_layers(config)
        last = families.fields_of(config)["num_hidden_layers"]
        optional = range(last, last + max(families.extra_layers(config), 0))
        found = [layer.number for layer in self.layers]
        for number in expected:
            if number not in found:
                name = self.layout.prefix.format(layer=number) + self.layout.anchor
                yield (
                    number,
                    MissingTensorError(f"{name} is missing: config.json makes layer {number} a MoE layer", tensor=name),
                )
        for layer in self.layers:
            if layer.number not in expected and layer.number not in optional:
                name = layer.prefix + self.layout.anchor
                yield (
                    layer.number,
                    UnknownTensorError(
                        f"{name} is there, and config.json makes layer {layer.number} no MoE layer", tensor=name
                    ),
                )

    def layer_problems(self, layer: LayerBlock) -> Iterator[CheckpointError]:
        """Everything wrong with the names, shapes and dtypes of one layer."""
        entries = self.layout.entries(self.moe)
        known: set[str] = set()
        for entry in entries:
            if entry.over == EXPERT:
                problem = self._expert_gap(layer, entry)
                if problem is not None:
                    yield problem
                    known |= {name for name in layer.names if _expert_pattern(entry).fullmatch(name)}
                    continue
            for name in entry.names(self.moe):
                known.add(name)
                problem = self._tensor_problem(layer.prefix + name, entry)
                if problem is not None:
                    yield problem
        for name in sorted(layer.names - known):
            if not name.endswith(self.layout.ignored or ("\0",)):
                full = layer.prefix + name
                yield UnknownTensorError(f"{full} has no place in the layout {self.layout.name}", tensor=full)

    def _expert_gap(self, layer: LayerBlock, entry: Entry) -> CheckpointError | None:
        pattern = _expert_pattern(entry)
        found = sorted(int(m[1]) for m in map(pattern.fullmatch, layer.names) if m)
        experts = self.moe.num_experts
        if found == list(range(experts)):
            return None
        name = layer.prefix + entry.name.format(e="{N}")
        missing = sorted(set(range(experts)) - set(found))
        extra = sorted(set(found) - set(range(experts)))
        words = [f"missing {_some(missing)}"] * bool(missing) + [f"too many {_some(extra)}"] * bool(extra)
        return MissingTensorError(
            f"{name} must be there for N = 0 .. {experts - 1}: {', '.join(words)}",
            tensor=layer.prefix + entry.name.format(e=(missing or extra)[0]), expected=experts, found=len(found),
        )  # fmt: skip

    def _tensor_problem(self, name: str, entry: Entry) -> CheckpointError | None:
        info = self.infos.get(name)
        expected = entry.shape(self.moe)
        if info is None:
            return MissingTensorError(f"{name} of shape {list(expected)} is missing", tensor=name, expected=expected)
        if info.dtype not in TORCH_DTYPES:
            known = ", ".join(TORCH_DTYPES)
            return DtypeError(
                f"{name} must have one of the dtypes {known}, it has {info.dtype}",
                tensor=name, expected=tuple(TORCH_DTYPES), found=info.dtype,
            )  # fmt: skip
        if info.shape != expected:
            if entry.parts == ("shared_scale",) and info.shape == (0, self.moe.hidden_size):
                return mergekit.empty_shared_gate(name, info.shape, self.moe.hidden_size)
            return ShapeError(
                f"{name} must have shape {list(expected)}, it has {list(info.shape)}",
                tensor=name, expected=expected, found=info.shape,
            )  # fmt: skip
        return None

    def validate(self) -> None:
        """Raises the first problem, and says how many more there are."""
        problems = [problem for _, problem in self.problems()]
        if not problems:
            return
        first = problems[0]
        if len(problems) > 1:
            first.args = (f"{first} (and {len(problems) - 1} more: python -m fastmoe_cpp inspect lists them)",)
        raise first

    # --- reading ------------------------------------------------------------------------------------------------------

    def part(self, layer: LayerBlock, part: str, expert: int = 0) -> torch.Tensor:
        """A part of a layer (see layouts.base) as [rows, columns] or [rows], of one expert where it is an expert's.

        NonFiniteError where it holds NaN or infinity. At most one expert's tensor is in memory beside it.
        """
        entry = self._entries[part]
        name = layer.prefix + (entry.name.format(e=expert) if entry.over == EXPERT else entry.name)
        key = (name, expert if part in EXPERT_PARTS else 0)
        if self._last is None or self._last[0] != key:
            self._last = None
            self._last = (key, self._slice(name, entry, key[1]))
        stored = self._last[1]
        if entry.transposed:
            stored = stored.T
        if len(entry.parts) == 1:
            return stored
        which = entry.parts.index(part)
        rows = stored.shape[0] // 2
        return stored[which::2] if entry.interleaved else stored[which * rows : (which + 1) * rows]

    def _slice(self, name: str, entry: Entry, expert: int) -> torch.Tensor:
        if name in self._overlay:
            stored = self._overlay[name]
        elif entry.over == STACK:
            stored = self.store.read(name, expert)
        elif entry.over == FLAT:
            rows = entry.slice_shape(self.moe)[0]
            stored = self.store.read(name, slice(expert * rows, (expert + 1) * rows))
        else:
            stored = self.store.read(name)
        if not all_finite(stored):
            count = int((~torch.isfinite(stored)).sum())
            where = f" in expert {expert}" if entry.over in (STACK, FLAT) else ""
            raise NonFiniteError(
                f"{name} must be finite, it holds {count} NaN or infinite values{where}", tensor=name, found=count
            )
        return stored.reshape(entry.slice_shape(self.moe))

    def close(self) -> None:
        """Closes its files."""
        self._last = None
        self.store.close()


def _expert_pattern(entry: Entry) -> re.Pattern[str]:
    before, after = entry.name.split("{e}")
    return re.compile(re.escape(before) + r"([0-9]{1,9})" + re.escape(after))


def _some(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
