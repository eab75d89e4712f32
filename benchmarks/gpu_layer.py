"""Whole MoE layers side by side on one GPU: ours, its peers and the GEMM bound, on the same weights, in one run.

    python benchmarks/gpu_layer.py --shapes 7B-n512,qwen3-30b --peers torch-grouped,transformers,ours --out runs/gpu

A shape is a name of SHAPES or T,H,I,E,K: tokens, hidden size, expert intermediate size, experts, experts a token.
FLOPs count the experts alone: 6*T*I*H*K forward, 12*T*I*H*K backward (SwiGLU); the router is inside every peer.
'bound' is the same GEMMs as cuBLAS batched products on perfectly balanced tokens: nothing but matrix products.
Times are medians between CUDA events with L2 flushed before each call, so they hold the launch cost; 'kernels' is the
kernels' own time from the profiler. Writes OUT.json and OUT.png and prints a table.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F

SHAPES = {
    "1.4B-n256": (40960, 768, 256, 128, 8), "1.4B-n512": (40960, 768, 512, 64, 4),
    "1.4B-n1024": (40960, 768, 1024, 32, 2), "7B-n256": (24576, 1536, 256, 128, 8),
    "7B-n512": (24576, 1536, 512, 64, 4), "7B-n1024": (24576, 1536, 1024, 32, 2),
    "30B-n256": (32768, 4096, 256, 256, 16), "30B-n512": (32768, 4096, 512, 128, 8),
    "30B-n1024": (32768, 4096, 1024, 64, 4), "120B-n512": (32768, 4096, 512, 256, 16),
    "120B-n1024": (32768, 4096, 1024, 128, 8), "120B-n2048": (32768, 4096, 2048, 64, 4),
    "mixtral-8x7b": (8192, 4096, 14336, 8, 2), "qwen3-30b": (16384, 2048, 768, 128, 8),
    "olmoe": (16384, 2048, 1024, 64, 8),
}  # fmt: skip
FINE_GRAINED = "1.4B-n256,7B-n256,7B-n512,30B-n256,qwen3-30b"
DECODE_SHAPES = {"qwen3-30b": (2048, 768, 128, 8), "mixtral-8x7b": (4096, 14336, 8, 2)}
DECODE = {f"{name}@{t}": (t, *shape) for name, shape in DECODE_SHAPES.items() for t in (1, 16, 64, 256)}
Peer = tuple[list[torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]


class Layer:
    """One shape's weights in checkpoint layout and its input, shared by every peer."""

    def __init__(self, shape: tuple[int, ...], skew: float, dtype: torch.dtype):
        self.T, self.H, self.I, self.E, self.K = shape
        g = torch.Generator(device="cuda").manual_seed(0)

        def normal(*size: int, std: float) -> torch.Tensor:
            return (torch.randn(size, generator=g, device="cuda", dtype=torch.float32) * std).to(dtype)

        self.router = normal(self.E, self.H, std=0.02)
        self.gate_up = torch.stack([normal(2 * self.I, self.H, std=0.02) for _ in range(self.E)])
        self.down = torch.stack([normal(self.H, self.I, std=0.02) for _ in range(self.E)])
        self.x = normal(self.T, self.H, std=0.5)
        if skew:  # popularity falls as rank^-skew, through a constant first feature
            self.x[:, 0] = 4
            self.router[:, 0] = -skew * torch.arange(1, self.E + 1, device="cuda").log() / 4

    def route(self, x: torch.Tensor, weight: torch.Tensor, wide: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """wide: logits in float32, as our router makes them; otherwise in the layer's type, as the peers do. Where two
        experts are near a tie the two choose differently, so a peer's error is taken against its own kind."""
        logits = F.linear(x.float(), weight.float()) if wide else F.linear(x, weight).float()
        top, ids = logits.topk(self.K, dim=-1)
        return torch.softmax(top, -1), ids

    def reference(self, rows: int, wide: bool) -> torch.Tensor:
        """The first rows of the output in float32, one expert at a time."""
        x = self.x[:rows]
        weights, ids = self.route(x, self.router, wide)
        out = torch.zeros(x.shape, device="cuda")
        for e in range(self.E):
            t, k = (ids == e).nonzero(as_tuple=True)
            gate, up = (x[t].float() @ self.gate_up[e].float().T).chunk(2, -1)
            out.index_add_(0, t, (F.silu(gate) * up) @ self.down[e].float().T * weights[t, k, None])
        return out

    def leaves(self) -> list[torch.Tensor]:
        return [t.clone().requires_grad_() for t in (self.router, self.gate_up, self.down)]


def ours(layer: Layer) -> Peer:
    from fastmoe_cpp import MoE, MoEConfig

    config = MoEConfig(hidden_size=layer.H, intermediate_size=layer.I, num_experts=layer.E, top_k=layer.K)
    moe = MoE(config).to("cuda", layer.x.dtype)
    with torch.no_grad():
        moe.router.weight.copy_(layer.router)
        moe.experts.gate_up_proj.copy_(layer.gate_up)
        moe.experts.down_proj.copy_(layer.down)
    return list(moe.parameters()), moe


def torch_grouped(layer: Layer) -> Peer:
    """torch's grouped_mm with a sorted copy of the rows: what a careful user writes without kernels."""
    grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm
    router, gate_up, down = layer.leaves()

    def forward(x: torch.Tensor) -> torch.Tensor:
        weights, ids = layer.route(x, router)
        order = ids.flatten().argsort(stable=True)
        ends = torch.bincount(ids.flatten(), minlength=layer.E).cumsum(0).to(torch.int32)
        token = order // layer.K
        gate, up = grouped_mm(x[token], gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
        rows = grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
        return torch.zeros_like(x).index_add(0, token, rows * weights.flatten()[order].to(rows.dtype)[:, None])

    return [router, gate_up, down], forward


def transformers_block(layer: Layer) -> Peer:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=layer.H, intermediate_size=layer.I, num_local_experts=layer.E,
                           num_experts_per_tok=layer.K)  # fmt: skip
    config._experts_implementation = "grouped_mm"
    with torch.device("cuda"):
        block = MixtralSparseMoeBlock(config).to(layer.x.dtype)
    with torch.no_grad():
        block.gate.weight.copy_(layer.router)
        block.experts.gate_up_proj.copy_(layer.gate_up)
        block.experts.down_proj.copy_(layer.down)

    def forward(x: torch.Tensor) -> torch.Tensor:
        out = block(x[None])
        return (out[0] if isinstance(out, tuple) else out)[0]

    return list(block.parameters()), forward


def sonicmoe(layer: Layer) -> Peer:
    """SonicMoE, where it is installed, in its own layout: gate and up rows interleaved."""
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_TC_softmax_topk_layer

    router, gate_up, down = layer.leaves()
    w1 = gate_up.detach().unflatten(1, (2, layer.I)).transpose(1, 2).flatten(1, 2).requires_grad_()

    def forward(x: torch.Tensor) -> torch.Tensor:
        return moe_TC_softmax_topk_layer(
            x, router, w1.permute(1, 2, 0), None, down.permute(1, 2, 0), None, layer.K,
            torch.cuda.current_stream().cuda_stream, ActivationType.SWIGLU, not torch.is_grad_enabled(),
            concat_layout=False,
        )[0]  # fmt: skip

    return [router, w1, down], forward


PEERS = {"ours": ours, "torch-grouped": torch_grouped, "transformers": transformers_block, "sonicmoe": sonicmoe}


def median_ms(call: Callable[[], object], reps: int) -> float:
    for _ in range(3):
        call()
    flush = torch.empty(64 << 20, dtype=torch.int8, device="cuda")
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(reps)]
    for start, end in pairs:
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs)


def kernels_ms(call: Callable[[], object], calls: int = 3) -> tuple[float, dict[str, float]]:
    """The kernels' own time a call, in all and by kernel name."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    named = {e.key: e.self_device_time_total / calls / 1e3 for e in prof.key_averages() if e.self_device_time_total}
    return sum(named.values()), named


def graph_ms(call: Callable[[], object], reps: int) -> float:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return median_ms(graph.replay, reps)


def bound(layer: Layer, reps: int) -> dict[str, float]:
    n = max(1, layer.T * layer.K // layer.E)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(layer.E, *size, device="cuda").to(layer.x.dtype)

    rows, act, grad_up, grad_rows = normal(n, layer.H), normal(n, layer.I), normal(n, 2 * layer.I), normal(n, layer.H)

    def forward() -> None:
        torch.bmm(rows, layer.gate_up.transpose(1, 2))
        torch.bmm(act, layer.down.transpose(1, 2))

    def backward() -> None:
        torch.bmm(grad_rows, layer.down)
        torch.bmm(grad_rows.transpose(1, 2), act)
        torch.bmm(grad_up, layer.gate_up)
        torch.bmm(grad_up.transpose(1, 2), rows)

    f, b = median_ms(forward, reps), median_ms(backward, reps)
    return {"forward_ms": f, "step_ms": f + b, "kernels_step_ms": f + b}


def measure(layer: Layer, peer: str, reps: int, train: bool, details: bool) -> dict[str, object]:
    parameters, forward = PEERS[peer](layer)
    expected = layer.reference(min(layer.T, 512), wide=peer == "ours")
    with torch.no_grad():
        error = ((forward(layer.x)[: len(expected)].float() - expected).norm() / expected.norm()).item()
        row: dict[str, object] = {"error": error, "forward_ms": median_ms(lambda: forward(layer.x), reps)}
        row["kernels_forward_ms"], named = kernels_ms(lambda: forward(layer.x))
        if not train:
            row["graph_ms"] = graph_ms(lambda: forward(layer.x), reps)
    if train:
        x, grad = layer.x.clone().requires_grad_(), torch.randn_like(layer.x) * 0.1

        def step() -> None:
            forward(x).backward(grad)
            x.grad = None
            for p in parameters:
                p.grad = None

        row["step_ms"] = median_ms(step, reps)
        row["kernels_step_ms"], named = kernels_ms(step)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = forward(x)
        row["kept_mib"] = (torch.cuda.memory_allocated() - before - out.nbytes) / 2**20
        out.backward(grad)
        row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    if details:
        row["kernels"] = dict(sorted(named.items(), key=lambda item: -item[1]))
    return row


def step_flops(row: dict) -> float:
    T, H, I, _, K = row["sizes"]
    return 18.0 * T * H * I * K


def table(rows: list[dict]) -> str:
    heads = ["shape", "peer", "fwd ms", "step ms", "kernels ms", "graph ms"]
    heads += ["step TFLOP/s", "of bound", "kept MiB", "error"]
    bounds = {r["shape"]: r["step_ms"] for r in rows if r["peer"] == "bound"}
    lines = []
    for r in rows:
        if "failed" in r:
            lines.append([r["shape"], r["peer"], r["failed"][:80]] + [""] * 7)
            continue
        best = r.get("kernels_step_ms")

        def show(key: str, digits: int = 3, r: dict = r) -> str:
            return f"{r[key]:.{digits}f}" if key in r else ""

        lines.append([
            r["shape"], r["peer"], show("forward_ms"), show("step_ms"),
            show("kernels_step_ms") or show("kernels_forward_ms"), show("graph_ms"),
            f"{step_flops(r) / best / 1e9:.0f}" if best else "",
            f"{bounds[r['shape']] / best:.2f}" if best and r["shape"] in bounds else "",
            show("kept_mib", 0), show("error", 4),
        ])  # fmt: skip
    widths = [max(len(line[i]) for line in [heads, *lines]) for i in range(len(heads))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in [heads, *lines])


def plot(rows: list[dict], device: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in rows if "kernels_step_ms" in r]
    shapes = list(dict.fromkeys(r["shape"] for r in rows))
    peers = list(dict.fromkeys(r["peer"] for r in rows))
    if not shapes:
        return
    fig, ax = plt.subplots(figsize=(max(7, 1.1 * len(shapes) + 2), 4.5), constrained_layout=True)
    for i, peer in enumerate(peers):
        rate = {r["shape"]: step_flops(r) / r["kernels_step_ms"] / 1e9 for r in rows if r["peer"] == peer}
        at = [s + (i - (len(peers) - 1) / 2) * 0.8 / len(peers) for s in range(len(shapes))]
        color = "0.75" if peer == "bound" else f"C{i}"
        ax.bar(at, [rate.get(s, 0) for s in shapes], 0.8 / len(peers), label=peer, color=color)
    ax.set_xticks(range(len(shapes)), shapes, rotation=30, ha="right")
    ax.set_ylabel("training step, TFLOP/s (kernel time)")
    fig.suptitle(f"MoE layer, forward and backward, {rows[0]['dtype']}, {device}, {date.today()}", fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, ncols=len(peers), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    fig.savefig(path, dpi=150)


def parse_shapes(text: str) -> list[tuple[str, tuple[int, ...]]]:
    words, shapes = text.split(","), []
    known = SHAPES | DECODE
    while words:
        if words[0] in known:
            shapes.append((words[0], known[words.pop(0)]))
        elif len(words) >= 5 and all(w.isdigit() for w in words[:5]):
            shapes.append((",".join(words[:5]), tuple(int(w) for w in words[:5])))
            words = words[5:]
        else:
            sys.exit(f"--shapes must name one of {', '.join(known)} or give T,H,I,E,K, got {words[0]!r}")
    return shapes


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=FINE_GRAINED)
    parser.add_argument("--peers", default="torch-grouped,ours", help=f"of {', '.join(PEERS)}; bound always runs")
    parser.add_argument("--reps", type=int, default=15)
    parser.add_argument("--skew", type=float, default=0.0, help="expert popularity ~ rank^-SKEW")
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    parser.add_argument("--details", action="store_true", help="record every kernel's time in the JSON")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_layer"), help="OUT.json and OUT.png are written")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit("gpu_layer times layers on a CUDA GPU, and none is visible here")
    unknown = [p for p in args.peers.split(",") if p not in PEERS]
    if unknown:
        sys.exit(f"--peers must be of {', '.join(PEERS)}, got {', '.join(unknown)}")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[args.dtype]
    rows: list[dict] = []
    for name, shape in parse_shapes(args.shapes):
        layer, train = Layer(shape, args.skew, dtype), shape[0] >= 1024
        for peer in (["bound"] if train else []) + args.peers.split(","):
            gc.collect()
            torch.cuda.empty_cache()
            row = {"shape": name, "sizes": shape, "peer": peer, "dtype": args.dtype, "skew": args.skew}
            try:
                row |= (
                    bound(layer, args.reps) if peer == "bound" else measure(layer, peer, args.reps, train, args.details)
                )
            except Exception as error:  # a peer may refuse a shape; the others still count
                row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0]
            rows.append(row)
            short = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items() if k != "kernels"}
            print(json.dumps(short), flush=True)
    device = torch.cuda.get_device_name()
    print(f"\n{device}, torch {torch.__version__}, {date.today()}\n{table(rows)}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"device": device, "torch": torch.__version__, "date": str(date.today()), "rows": rows}
    args.out.with_suffix(".json").write_text(json.dumps(record, indent=1))
    plot(rows, device, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
