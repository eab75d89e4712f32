"""How the experts of a model are used: counts kept on the device, read when somebody looks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from .moe import MoE

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class LoadStatistics(NamedTuple):
    """The load of one layer over N recorded steps, on the CPU. A step in which nothing was routed counts as even."""

    counts: Tensor  #: [N, E] int64: pairs of token and expert, before capacity
    fraction: Tensor  #: [N, E] float64: counts as shares of the step's
    entropy: Tensor  #: [N] float64: of the shares, divided by log E: 1 is even, 0 is all to one expert
    max_over_mean: Tensor  #: [N] float64: the busiest expert's share times E: 1 is even, E is all to one


def statistics(counts: Tensor) -> LoadStatistics:
    """Statistics of counts [N, E]."""
    counts = counts.cpu()
    experts = counts.shape[-1]
    totals = counts.sum(dim=-1, keepdim=True)
    fraction = torch.where(totals > 0, counts.double() / totals.clamp(min=1), 1.0 / experts)
    entropy = -torch.special.xlogy(fraction, fraction).sum(dim=-1)
    entropy = entropy / torch.log(torch.tensor(float(experts))) if experts > 1 else torch.ones_like(entropy)
    return LoadStatistics(counts, fraction, entropy, fraction.amax(dim=-1) * experts)


class LoadMonitor:
    """Records tokens_per_expert of every MoE layer of a model, one row a step, without waiting for the device::

        monitor = LoadMonitor(model)
        for batch in batches:
            ...  # any number of forward passes, in training or evaluation
            monitor.step()
        heatmap(monitor.statistics()["layers.0.mlp"], "load.png")

    A pass that activation checkpointing runs again is not counted twice. Memory: 8 * E bytes a layer and step, on the
    layer's device. A layer is watched by one monitor at a time; ``close()`` (or leaving a with block) ends it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers: dict[str, MoE] = {name: m for name, m in model.named_modules() if isinstance(m, MoE)}
        if not self.layers:
            raise ValueError(f"model must contain at least one MoE layer, {type(model).__name__} has none")
        for name, layer in self.layers.items():
            if layer.load is not None:
                raise ValueError(f"layer {name!r} must not be watched by another LoadMonitor: close that one first")
        self._rows: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        self._open = True
        with torch.inference_mode(False):  # whose tensors training could not count in
            for layer in self.layers.values():
                layer.load = torch.zeros(layer.config.num_experts, dtype=torch.int64, device=layer.router.weight.device)

    @torch.no_grad()
    def step(self) -> None:
        """Ends a row: the counts since the last call are recorded and start again at 0."""
        if not self._open:
            raise RuntimeError("step() must come before close(): this LoadMonitor was closed")
        for name, layer in self.layers.items():
            self._rows[name].append(layer.load.clone())
            layer.load.zero_()

    def counts(self) -> dict[str, Tensor]:
        """Recorded counts by layer name, [steps, E] int64 on the CPU. Waits for the device."""
        return {
            name: torch.stack(rows).cpu()
            if rows
            else torch.zeros(0, self.layers[name].config.num_experts, dtype=torch.int64)
            for name, rows in self._rows.items()
        }

    def statistics(self) -> dict[str, LoadStatistics]:
        """Statistics by layer name. Waits for the device."""
        return {name: statistics(counts) for name, counts in self.counts().items()}

    def clear(self) -> None:
        """Forgets every recorded row."""
        for rows in self._rows.values():
            rows.clear()

    def close(self) -> None:
        """Stops watching; what was recorded stays readable. Closing again does nothing."""
        if self._open:
            self._open = False
            for layer in self.layers.values():
                layer.load = None

    def __enter__(self) -> LoadMonitor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def heatmap(
    load: LoadStatistics | Mapping[str, LoadStatistics], path: str | Path | None = None, *, title: str = "Expert load"
) -> Figure:
    """A picture of load over time, a panel a layer: experts up, steps across, colour the share of an even load (1).

    Saved as path's suffix says where a path is given. Needs matplotlib.
    """
    from matplotlib.figure import Figure

    layers = {"": load} if isinstance(load, LoadStatistics) else dict(load)
    if not layers:
        raise ValueError("load must hold at least one layer, got none")
    figure = Figure(figsize=(8, 1 + 2.2 * len(layers)), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(len(layers), 1, squeeze=False)[:, 0]
    for panel, (name, one) in zip(panels, layers.items(), strict=True):
        experts = one.fraction.shape[-1]
        image = panel.imshow(
            (one.fraction * experts).T.numpy(),
            aspect="auto", origin="lower", interpolation="nearest", cmap="viridis", vmin=0, vmax=2,
        )  # fmt: skip
        panel.set(ylabel="expert", title=name)
    panels[-1].set_xlabel("step")
    figure.colorbar(image, ax=list(panels), label="load, 1 is even", extend="max")
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
