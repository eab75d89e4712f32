"""One picture of a run: the loss curves, how far apart they are, and every layer's expert load over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from text_training import AGREEMENT, LOOP, OURS, Settings, agreement, parting, relative_gaps

from fastmoe_cpp.monitor import statistics

WIDTH, HEIGHT, DPI = 13, 9, 110
COLUMNS = 120
MAX_LAYERS = 8
COLOURS = {OURS: "#1f3b73", LOOP: "#f2a541"}


def draw(history: list[dict[str, Any]], settings: Settings, path: Path, title: str) -> None:
    """Writes a PNG of WIDTH * DPI by HEIGHT * DPI pixels."""
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    figure.suptitle(title, fontsize=12)
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.15, 1])
    both = settings.compare
    panels = top.subplots(1, 2 if both else 1, squeeze=False, width_ratios=[1.6, 1] if both else None)[0]
    _losses(panels[0], history)
    if both:
        _gaps(panels[1], history, settings)
    _load(bottom, history, settings)
    for axes in figure.axes:
        if axes.get_xlabel() == "step":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=DPI)


def _losses(axes: Any, history: list[dict[str, Any]]) -> None:
    # The curves coincide: the loop's is wide and light, ours thin and dark on top of it.
    styles = {LOOP: {"linewidth": 5, "alpha": 0.9}, OURS: {"linewidth": 1.1}}
    marks = {LOOP: {"marker": "s", "markersize": 10}, OURS: {"marker": "o", "markersize": 4.5}}
    steps = [r for r in history if r["kind"] == "step"]
    points = [r for r in history if r["kind"] == "held_out"]
    names = [n for n in (LOOP, OURS) if n in steps[0]]
    for name in names:
        axes.plot(
            [r["step"] for r in steps], [r[name]["bits_per_byte"] for r in steps],
            color=COLOURS[name], label=f"training batch, {name}", **styles[name],
        )  # fmt: skip
    for name in names:
        axes.plot(
            [r["step"] for r in points], [r[name] for r in points], linestyle="none", zorder=3,
            color="white" if name == OURS else COLOURS[name], markeredgecolor="#b3202a", markeredgewidth=1.4,
            label=f"held-out text, {name}", **marks[name],
        )  # fmt: skip
    axes.set(xlabel="step", ylabel="bits per byte", title="Loss (8 bits per byte is knowing nothing)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _gaps(axes: Any, history: list[dict[str, Any]], settings: Settings) -> None:
    steps, gaps = zip(*relative_gaps(history), strict=True)
    # equal losses have no place on a logarithmic axis: they go to its lower edge
    floor = 1e-9
    axes.semilogy(steps, [max(g, floor) for g in gaps], color=COLOURS[OURS], linewidth=1)
    if settings.dtype == "fp32":
        end = agreement(history, settings.dtype).steps
        label = f"allowed over the first {end} steps: {AGREEMENT:g}"
        axes.hlines(AGREEMENT, 0, end, color="#b3202a", linewidth=2, label=label)
        axes.axvspan(0, end, color="#b3202a", alpha=0.06, linewidth=0)
        parts = parting(history)
        if parts is not None:
            label = f"step {parts.step}: the routers first choose differently"
            axes.axvline(parts.step, color="black", linewidth=1, linestyle=":", label=label)
        axes.legend(loc="upper right", fontsize=9)
        # the legend stands above every curve
        axes.set_ylim(floor / 2, max(1e-2, 20 * max(gaps)))
    title = "How far apart the curves are"
    axes.set(xlabel="step", ylabel="|fastmoe_cpp - torch loop| / torch loop", title=title)
    axes.grid(alpha=0.3)


def _load(figure: Any, history: list[dict[str, Any]], settings: Settings) -> None:
    """A heatmap a layer: experts up, steps across, colour the share of tokens over the even share."""
    counts = torch.tensor([r[OURS]["tokens_per_expert"] for r in history if r["kind"] == "step"])
    steps, layers, experts = counts.shape
    shown = sorted(
        {round(i * (layers - 1) / max(min(layers, MAX_LAYERS) - 1, 1)) for i in range(min(layers, MAX_LAYERS))}
    )
    columns = 1 if len(shown) == 1 else 2
    rows = -(-len(shown) // columns)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    bins = min(COLUMNS, steps)
    edges = torch.linspace(0, steps, bins + 1).round().long().tolist()
    highest = float(min(experts, 3))
    norm = TwoSlopeNorm(vmin=0, vcenter=1, vmax=max(highest, 1.5))
    image = None
    for panel, layer in zip(grid.flat, shown, strict=False):
        binned = torch.stack([counts[a:b, layer].sum(dim=0) for a, b in zip(edges, edges[1:], strict=False)])
        load = statistics(binned)
        image = panel.imshow(
            (load.fraction * experts).T.numpy(), aspect="auto", origin="lower", interpolation="nearest",
            cmap="RdBu_r", norm=norm, extent=(0.5, steps + 0.5, -0.5, experts - 0.5),
        )  # fmt: skip
        panel.set_title(
            f"layer {layer}: busiest expert at the end {load.max_over_mean[-1]:.2f} times the even share", fontsize=10
        )
    for panel in grid.flat[len(shown) :]:
        panel.set_axis_off()
    for panel in grid[:, 0]:
        panel.set_ylabel("expert")
        if experts <= 8:
            panel.set_yticks(range(experts))
    for panel in grid[-1]:
        panel.set_xlabel("step")
    even = 100 / experts
    bar = figure.colorbar(image, ax=grid, label="share of tokens / even share", extend="max", aspect=30)
    ticks = [0, 0.5, 1, *([2, 3] if highest >= 3 else [highest])]
    bar.set_ticks(ticks, labels=[f"1 = even ({even:.3g}%)" if t == 1 else f"{t:g}" for t in ticks])
    bar.ax.axhline(1, color="black", linewidth=1.5)
    figure.suptitle(f"Expert load of {OURS} over time", fontsize=12)
