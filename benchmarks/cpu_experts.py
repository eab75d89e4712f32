"""A MoE layer on the CPU beside plain torch.mm and transformers' Mixtral block, on the same weights, in one run.

    python benchmarks/cpu_experts.py                                  # every default shape, a few minutes
    python benchmarks/cpu_experts.py --shapes 512,1024,3584,8,2 --rounds 15 --json cpu.json --png cpu.png

A shape is T,H,I,E,K: tokens, hidden size, expert intermediate size, experts, experts a token (or a name, see SHAPES).
The peers take turns within every round, so that whatever else the machine does falls on all of them; times are medians
over the rounds. 'mm' is the expert GEMMs alone, as one torch.mm an expert and product on rows gathered beforehand: no
routing, gather, activation or combine. 'experts' is the routing given and only the experts run, 'layer' the whole layer
with its router, as the two blocks of transformers are. GFLOP/s count the expert GEMMs: 6*T*I*H*K forward, 18*T*I*H*K
forward and backward. Every peer's output (and the gradients it gives) is compared with the first's before it is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from fastmoe_cpp import MoE, MoEConfig, fused_experts

# H, I, E, K: Mixtral and Qwen3-30B at a quarter of the width, OLMoE at half
LAYERS = {
    "mixtral": (1024, 3584, 8, 2),
    "e32": (768, 768, 32, 4),
    "olmoe": (1024, 512, 64, 8),
    "qwen3": (512, 192, 128, 8),
}
TOKENS = (1, 16, 128, 512, 2048, 4096)
SHAPES = {f"{name}@{tokens}": (tokens, *sizes) for name, sizes in LAYERS.items() for tokens in TOKENS}
PEERS = ("layer", "experts", "mm", "transformers eager", "transformers grouped_mm")
Step = Callable[[], object]


class Case:
    """One shape's weights, input and routing, shared by every peer."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, skew: float) -> None:
        self.T, self.H, self.I, self.E, self.K = shape
        config = MoEConfig(hidden_size=self.H, intermediate_size=self.I, num_experts=self.E, top_k=self.K)
        torch.manual_seed(0)
        self.moe = MoE(config, dtype=dtype)
        self.x = torch.randn(self.T, self.H, dtype=dtype)
        if skew:  # popularity falls about as rank^-skew, through a constant first feature
            with torch.no_grad():
                self.x[:, 0] = 4
                self.moe.router.weight[:, 0] = -skew * torch.arange(1, self.E + 1).log() / 4
        self.grad = torch.randn(self.T, self.H, dtype=dtype)
        with torch.no_grad():
            routing = self.moe.router(self.x)
        self.ids, self.weights = routing.topk_ids, routing.topk_weights.float()
        self.counts = torch.bincount(self.ids.flatten(), minlength=self.E).tolist()

    def flops(self, backward: bool) -> float:
        return (18.0 if backward else 6.0) * self.T * self.H * self.I * self.K

    def trained(self, forward: Callable[[Tensor], Tensor], parameters: Sequence[Tensor]) -> tuple[Step, Step]:
        """forward alone, and forward and backward with fresh gradients; the latter returns them."""
        x = self.x.clone().requires_grad_()

        def infer() -> list[Tensor]:
            with torch.no_grad():
                return [forward(x)]

        def step() -> list[Tensor]:
            for t in (x, *parameters):
                t.grad = None
            out = forward(x)
            out.backward(self.grad)
            return [out.detach(), x.grad, *(p.grad for p in parameters)]

        return infer, step

    def peer(self, name: str) -> tuple[Step, Step]:
        up, down = self.moe.experts.gate_up_proj, self.moe.experts.down_proj
        if name == "layer":
            return self.trained(self.moe, [up, down, self.moe.router.weight])
        if name == "experts":
            return self.trained(lambda x: fused_experts(x, up, down, self.ids, self.weights), [up, down])
        if name == "mm":
            return self.products()
        return self.transformers_block(name.split()[1])

    def products(self) -> tuple[Step, Step]:
        up, down = self.moe.experts.gate_up_proj.detach(), self.moe.experts.down_proj.detach()

        def rows(width: int) -> list[Tensor]:
            return [torch.randn(n, width, dtype=self.x.dtype) for n in self.counts]

        x, act, grad, grad_up = rows(self.H), rows(self.I), rows(self.H), rows(2 * self.I)

        def infer() -> None:
            for e, n in enumerate(self.counts):
                if n:
                    torch.mm(x[e], up[e].T)
                    torch.mm(act[e], down[e].T)

        def step() -> None:
            infer()
            # as a layer's gradients are: fresh, and one tensor for all experts
            grad_down, grad_gate_up = torch.empty_like(down), torch.empty_like(up)
            for e, n in enumerate(self.counts):
                if n:
                    torch.mm(grad[e], down[e])
                    torch.mm(grad[e].T, act[e], out=grad_down[e])
                    torch.mm(grad_up[e], up[e])
                    torch.mm(grad_up[e].T, x[e], out=grad_gate_up[e])

        return infer, step

    def transformers_block(self, implementation: str) -> tuple[Step, Step]:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        config = MixtralConfig(hidden_size=self.H, intermediate_size=self.I, num_local_experts=self.E,
                               num_experts_per_tok=self.K)  # fmt: skip
        config._experts_implementation = implementation
        with torch.device("meta"):
            block = MixtralSparseMoeBlock(config)
        block.gate.weight = torch.nn.Parameter(self.moe.router.weight.detach())
        block.experts.gate_up_proj = torch.nn.Parameter(self.moe.experts.gate_up_proj.detach())
        block.experts.down_proj = torch.nn.Parameter(self.moe.experts.down_proj.detach())

        def forward(x: Tensor) -> Tensor:
            out = block(x[None])
            return (out[0] if isinstance(out, tuple) else out)[0]

        return self.trained(forward, [block.experts.gate_up_proj, block.experts.down_proj, block.gate.weight])


def check(name: str, results: list[Tensor], expected: list[Tensor]) -> None:
    # fp32 differs in the order of sums, the 16-bit types in where they round as well
    bar = 1e-4 if expected[0].dtype == torch.float32 else 3e-2
    for i, (a, b) in enumerate(zip(results, expected, strict=False)):
        error = float((a - b).norm() / b.norm().clamp(min=1e-30))
        # given its routing, the gradient of x lacks what comes through the router
        if not error <= bar and not (name == "experts" and i == 1):
            sys.exit(f"{name} differs from {PEERS[0]} by {error:.1e} of the norm in result {i}; nothing was timed")


def measure(case: Case, peers: Sequence[str], backward: bool, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of every peer in every round."""
    steps: dict[str, Step] = {}
    expected: list[Tensor] = []
    for name in peers:
        steps[name] = case.peer(name)[backward]
        results = steps[name]()
        if name != "mm":
            expected = expected or [t.clone() for t in results]
            check(name, results, expected)
    times: dict[str, list[float]] = {name: [] for name in peers}
    spent = 0.0
    while len(times[peers[0]]) < rounds and (spent < seconds or len(times[peers[0]]) < 3):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
            spent += times[name][-1]
    return times


def machine() -> str:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next((s.split(":")[1].strip() for s in info.read_text().splitlines() if "model name" in s), model)
    threads, capability = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    return f"{model}, {threads} threads, {capability}, torch {torch.__version__}"


def ratio(row: dict, peer: str, other: str) -> float:
    """How many times as fast `peer` is as `other`: the median over rounds of the two times beside each other."""
    return statistics.median(b / a for a, b in zip(row["seconds"][peer], row["seconds"][other], strict=True))


def show(rows: list[dict], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    columns = ("T,H,I,E,K", "pass", "experts ms", "layer ms", "GFLOP/s", "experts / mm", "layer / mm")
    columns += ("/ eager", "/ grouped_mm")
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:2] else "right")
    for row in rows:
        ms = {name: statistics.median(times) * 1e3 for name, times in row["seconds"].items()}

        def versus(peer: str, other: str, r: dict = row) -> str:
            return f"{ratio(r, peer, other):.2f}" if other in r["seconds"] else ""

        table.add_row(
            ",".join(map(str, row["shape"])), row["pass"], f"{ms['experts']:.2f}", f"{ms['layer']:.2f}",
            f"{row['flops'] / ms['experts'] / 1e6:.0f}", versus("experts", "mm"), versus("layer", "mm"),
            versus("layer", "transformers eager"), versus("layer", "transformers grouped_mm"),
        )  # fmt: skip
    Console(width=120).print(table)


def plot(rows: list[dict], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    passes = list(dict.fromkeys(r["pass"] for r in rows))
    fig, axes = plt.subplots(len(passes), 1, figsize=(max(7, 0.6 * len(rows) / len(passes) + 3), 3.6 * len(passes)),
                             squeeze=False, constrained_layout=True)  # fmt: skip
    for ax, kind in zip(axes[:, 0], passes, strict=True):
        mine = [r for r in rows if r["pass"] == kind]
        names = [n for n in PEERS if n in mine[0]["seconds"] and n not in ("experts", "mm")]
        for i, name in enumerate(names):
            rate = [ratio(r, name, "mm") for r in mine]
            at = [s + (i - (len(names) - 1) / 2) * 0.8 / len(names) for s in range(len(mine))]
            ax.bar(at, rate, 0.8 / len(names), label="fastmoe_cpp" if name == "layer" else name)
        ax.axhline(1, color="0.4", linewidth=1, label="torch.mm alone")
        ax.set_xticks(range(len(mine)), [",".join(map(str, r["shape"])) for r in mine], rotation=35, ha="right")
        ax.set_ylabel(f"speed, {kind}\n(torch.mm of the experts = 1)")
        ax.spines[["top", "right"]].set_visible(False)
    fig.suptitle(title, fontsize=9)
    axes[0, 0].legend(frameon=False, ncols=4, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axes[-1, 0].set_xlabel("tokens, hidden size, intermediate size, experts, experts a token")
    fig.savefig(path, dpi=150)


def parse_shapes(text: str) -> list[tuple[int, ...]]:
    words, shapes = text.split(","), []
    while words:
        if words[0] in SHAPES:
            shapes.append(SHAPES[words.pop(0)])
        elif words[0] in LAYERS:
            sizes = LAYERS[words.pop(0)]
            shapes += [(tokens, *sizes) for tokens in TOKENS]
        elif len(words) >= 5 and all(w.isdigit() for w in words[:5]):
            *sizes, experts, top_k = (int(w) for w in words[:5])
            if not all(sizes) or not 1 <= top_k <= experts:
                raise ValueError(
                    "a shape T,H,I,E,K must have sizes of at least 1 and K of at most E, got " + ",".join(words[:5])
                )
            shapes.append((*sizes, experts, top_k))
            words = words[5:]
        else:
            raise ValueError(
                f"--shapes must name one of {', '.join(LAYERS)} (or e.g. mixtral@512) or give T,H,I,E,K, "
                f"got {words[0]!r}"
            )
    return shapes


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default=",".join(LAYERS), help=f"names ({', '.join(LAYERS)}) and T,H,I,E,K")
    parser.add_argument("--passes", default="forward,step", help="forward and step (forward and backward)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads; torch's own choice without")
    parser.add_argument("--rounds", type=int, default=15, help="the most rounds a shape and pass gets (default 15)")
    parser.add_argument("--seconds", type=float, default=6.0, help="no new round after this long (3 at least)")
    parser.add_argument("--skew", type=float, default=0.0, help="expert popularity about rank^-SKEW")
    parser.add_argument("--json", type=Path, help="save every time measured")
    parser.add_argument("--png", type=Path, help="save a plot")
    args = parser.parse_args(argv)
    passes = args.passes.split(",")
    unknown = [p for p in passes if p not in ("forward", "step")]
    if unknown:
        parser.error(f"--passes must be of forward, step, got {unknown[0]!r}")
    for name in ("threads", "rounds"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    for path in (args.json, args.png):  # minutes later it would be too late
        if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
            parser.error(f"{path} can't be written: it must be a file in a folder that exists and is writable")
    try:
        shapes = parse_shapes(args.shapes)
    except ValueError as error:
        parser.error(str(error))
    if args.threads:
        torch.set_num_threads(args.threads)
    peers = list(PEERS)
    try:
        import transformers  # noqa: F401
    except ImportError:
        print("transformers is not installed: its blocks are left out (pip install transformers)")
        peers = peers[:3]
    rows: list[dict] = []
    for shape in shapes:
        case = Case(shape, getattr(torch, args.dtype), args.skew)
        for kind in passes:
            backward = kind == "step"
            times = measure(case, peers, backward, args.rounds, args.seconds)
            rows.append({"shape": shape, "pass": kind, "flops": case.flops(backward), "seconds": times})
            print(f"{','.join(map(str, shape))} {kind}: {len(times[peers[0]])} rounds", file=sys.stderr)
    title = f"{args.dtype}, {machine()}, {date.today()}"
    show(rows, title)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "date": str(date.today()), "dtype": args.dtype,
                                         "skew": args.skew, "rows": rows}, indent=1))  # fmt: skip
    if args.png:
        plot(rows, title, args.png)


if __name__ == "__main__":
    main()
