"""What is in a checkpoint: architecture, shapes, what is wrong in each layer, and how its routers look."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..config import MoEConfig
from ..reference import route
from .errors import CheckpointError
from .layouts.base import EXPERT, config_to_json
from .source import Checkpoint, LayerBlock

PROBE_TOKENS = 1024


@dataclasses.dataclass(frozen=True)
class RouterStatistics:
    """A router's weight, and how it spreads tokens drawn from a normal distribution of unit variance.

    norm_*: of its E rows. closest: the largest cosine between two experts' rows; 1 where two experts can't be told
    apart. busiest, idlest: an expert's share of the choices times E (1 is even). entropy: of those shares, in parts of
    the largest possible.
    """

    norm_min: float
    norm_mean: float
    norm_max: float
    closest: float
    busiest: float
    idlest: float
    entropy: float


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One MoE layer: number, name, dtypes, parameters, what is wrong, its router where it can be read."""

    number: int
    prefix: str
    dtypes: tuple[str, ...]
    parameters: int
    problems: tuple[CheckpointError, ...]
    router: RouterStatistics | None


@dataclasses.dataclass(frozen=True)
class Inspection:
    """A checkpoint as inspect() found it."""

    path: Path
    model_type: str | None
    layout: str
    moe: MoEConfig
    files: int
    tensors: int
    nbytes: int
    parameters: int
    layers: tuple[LayerReport, ...]
    #: In no layer that is there: missing layers among them.
    problems: tuple[CheckpointError, ...]
    notes: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def all_problems(self) -> list[CheckpointError]:
        """Of the checkpoint and of every layer."""
        return [*self.problems, *(problem for layer in self.layers for problem in layer.problems)]

    def to_json(self) -> dict[str, Any]:
        """For json.dumps."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        found |= {"path": str(self.path), "moe": config_to_json(self.moe), "problems": [str(p) for p in self.problems]}
        found["layers"] = [
            {
                **dataclasses.asdict(dataclasses.replace(layer, problems=())),
                "problems": [str(p) for p in layer.problems],
            }
            for layer in self.layers
        ]
        return found


def inspect(
    path: str | Path,
    *,
    values: bool = False,
    config: Mapping[str, Any] | str | Path | None = None,
    layout: str | None = None,
    allow_pickle: bool = False,
) -> Inspection:
    """Looks at every header and every router of a checkpoint; values=True reads every weight of the MoE layers too.

    What is wrong with a layer is in its report. Raises CheckpointError where the checkpoint can't be read at all.
    """
    opened = Checkpoint(path, config=config, layout=layout, allow_pickle=allow_pickle)
    try:
        problems: dict[int | None, list[CheckpointError]] = {}
        present = {layer.number for layer in opened.layers}
        for number, problem in opened.problems():
            problems.setdefault(number if number in present else None, []).append(problem)
        layers = tuple(_layer(opened, layer, problems.get(layer.number, []), values) for layer in opened.layers)
        entries = opened.layout.entries(opened.moe)
        alike = [layer.number for layer in layers if layer.router and _degenerate(layer.router)]
        if alike:
            opened.notes.append(
                f"in layers {', '.join(map(str, alike))} a router's row is 0 or two rows point the same way: "
                "those experts can't be told apart"
            )
        return Inspection(
            path=opened.path,
            model_type=opened.hf_config.get("model_type") if opened.hf_config else None,
            layout=opened.layout.name,
            moe=opened.moe,
            files=len({info.file for info in opened.infos.values()}),
            tensors=len(opened.infos),
            nbytes=sum(info.nbytes for info in opened.infos.values()),
            parameters=sum(math.prod(info.shape) for info in opened.infos.values()),
            layers=layers,
            problems=tuple(problems.get(None, [])),
            notes=tuple(opened.notes),
            shapes={entry.name.replace("{e}", "N"): entry.shape(opened.moe) for entry in entries},
        )
    finally:
        opened.close()


def _degenerate(router: RouterStatistics) -> bool:
    return router.norm_min == 0 or router.closest > 0.9999


def _layer(opened: Checkpoint, layer: LayerBlock, problems: list[CheckpointError], values: bool) -> LayerReport:
    infos = [opened.infos[layer.prefix + name] for name in layer.names]
    found = list(problems)
    router = None
    broken = {problem.tensor for problem in found}
    if layer.prefix + opened.layout.anchor not in broken:
        try:
            router = statistics(opened.part(layer, "router"), opened.moe, layer.number)
        except CheckpointError as problem:
            found.append(problem)
    if values and not problems:
        found += _values(opened, layer)
    return LayerReport(
        number=layer.number,
        prefix=layer.prefix,
        dtypes=tuple(sorted({info.dtype for info in infos})),
        parameters=sum(math.prod(info.shape) for info in infos),
        problems=tuple(found),
        router=router,
    )


def _values(opened: Checkpoint, layer: LayerBlock) -> list[CheckpointError]:
    found: dict[str | None, CheckpointError] = {}
    for entry in opened.layout.entries(opened.moe):
        if entry.name == opened.layout.anchor:
            continue
        several = entry.over == EXPERT or entry.over in ("stack", "flat")
        for e in range(opened.moe.num_experts if several else 1):
            try:
                opened.part(layer, entry.parts[0], e)
            except CheckpointError as problem:
                found.setdefault(problem.tensor, problem)
    return list(found.values())


def statistics(weight: torch.Tensor, moe: MoEConfig, seed: int = 0) -> RouterStatistics:
    """Of a router's weight [E, H], under the configuration's scores and groups (biases are left out)."""
    weight = weight.float()
    norms = weight.norm(dim=1)
    directions = weight / norms.clamp(min=1e-30)[:, None]
    cosines = directions @ directions.T - 2 * torch.eye(len(weight))
    tokens = torch.randn(PROBE_TOKENS, weight.shape[1], generator=torch.Generator().manual_seed(seed))
    router = moe.router
    ids = route(
        tokens @ weight.T, moe.top_k, score_function=router.score_function, scores_after_topk=router.scores_after_topk,
        num_groups=router.num_groups, topk_groups=router.topk_groups, group_score=router.group_score,
    )[1]  # fmt: skip
    shares = torch.bincount(ids.flatten(), minlength=len(weight)) / ids.numel()
    positive = shares[shares > 0]
    entropy = float(-(positive * positive.log()).sum()) / math.log(len(weight)) if len(weight) > 1 else 1.0
    return RouterStatistics(
        norm_min=float(norms.min()),
        norm_mean=float(norms.mean()),
        norm_max=float(norms.max()),
        closest=float(cosines.max()) if len(weight) > 1 else 0.0,
        busiest=float(shares.max()) * len(weight),
        idlest=float(shares.min()) * len(weight),
        entropy=entropy,
    )


def to_text(found: Inspection) -> str:
    """The report of `python -m fastmoe_cpp inspect`."""
    moe = found.moe
    lines = [
        f"{found.path}",
        f"  model       {found.model_type or 'none of transformers'}, layout {found.layout}",
        f"  weights     {found.parameters:,} parameters in {found.tensors:,} tensors, {found.files} files, "
        f"{found.nbytes / 2**30:.2f} GiB",
        f"  MoE layers  {len(found.layers)}: {moe.num_experts} experts, top {moe.top_k}, hidden size "
        f"{moe.hidden_size}, expert size {moe.intermediate_size}, {moe.activation}"
        + (f", shared experts of size {moe.shared_intermediate_size}" if moe.shared_intermediate_size else ""),
        f"  router      {moe.router.score_function}, weights "
        + ("renormalised" if moe.router.renormalize else "as scored")
        + (f", {moe.router.topk_groups} of {moe.router.num_groups} groups" if moe.router.num_groups > 1 else ""),
        "  tensors of a layer",
        *(f"    {name:44} {list(shape)}" for name, shape in found.shapes.items()),
        "",
        "  layer  parameters   dtypes      row norms min mean max     closest  busiest  idlest  entropy  problems",
    ]
    for layer in found.layers:
        r = layer.router
        numbers = "(not readable)".ljust(57)
        if r is not None:
            numbers = (
                f"{r.norm_min:8.3g} {r.norm_mean:8.3g} {r.norm_max:8.3g}  {r.closest:8.3f} {r.busiest:8.2f} "
                f"{r.idlest:7.2f} {r.entropy:8.3f}"
            )
        dtypes = ",".join(layer.dtypes)
        lines.append(
            f"  {layer.number:5}  {layer.parameters:>10,}   {dtypes:10} {numbers}  {len(layer.problems) or 'none'}"
        )
    problems = found.all_problems
    lines += ["", *(f"  note: {note}" for note in found.notes)]
    lines += [f"  {type(problem).__name__}: {problem}" for problem in problems]
    lines.append(f"  {len(problems)} problems" if problems else "  no problems")
    return "\n".join(lines)


__all__ = ["Inspection", "LayerReport", "RouterStatistics", "inspect", "statistics", "to_text"]
