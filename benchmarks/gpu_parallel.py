"""A MoE layer over the GPUs of one host beside the same layer on each alone, and what its exchanges cost, in one run.

    torchrun --nproc_per_node=2 benchmarks/gpu_parallel.py --out runs/gpu_parallel

Throughput: every rank has --tokens tokens, alone with all experts and then with its part of them; 'times one' is the
tokens a second of all ranks together over those of one alone, forward and backward (18*T*I*H*K FLOPs). Exchanges: each
rank sends rows of 4 KiB (bf16, H 2048) to the others and none to itself; GB/s are the bytes that leave a rank over the
time of the whole operation, dispatch with the gather of its rows before, combine with the sum of the rows after; of
symmetric memory the counts are in it too, those of all_to_all_single the ranks know before. 'bounded' is symmetric
memory with max_rows, where nothing visits the host; 'graph' columns are a CUDA graph's replays of the same. Times
are between events on the device (wall clock on a CPU), the ranks aligned by a collective before each; of every call
the slowest rank counts, and of --reps calls the median. Writes OUT.json and prints tables.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from fastmoe_cpp import MoE, MoEConfig, ops
from fastmoe_cpp.parallel import ExpertParallel
from fastmoe_cpp.parallel.paths import PATHS, AllToAllSingle, choose_path
from fastmoe_cpp.parallel.symmetric import Needs, SymmetricMemory

#: H, I, E, K
SHAPES = {"qwen3-30b": (2048, 768, 128, 8), "deepseek-v3": (7168, 2048, 256, 8)}
MIB = 2**20
ROW = 2048
BOUNDED = "symmetric_memory, bounded"
CHUNKED = "all_to_all_single, 2 chunks"


def style_of(path: str, tokens: int, ranks: int) -> ExpertParallel:
    if path in (AllToAllSingle.name, CHUNKED):
        return ExpertParallel(path=AllToAllSingle.name, chunks=2 if path == CHUNKED else 1)
    return ExpertParallel(
        path=SymmetricMemory.name, max_tokens=tokens, max_rows=tokens * ranks if path == BOUNDED else None
    )


class Ranks:
    """The processes of the run, and how they time what they do together."""

    def __init__(self, device: str) -> None:
        rank = int(os.environ["RANK"])
        self.device = torch.device(device, int(os.environ["LOCAL_RANK"])) if device == "cuda" else torch.device(device)
        if device == "cuda":
            torch.cuda.set_device(self.device)
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(seconds=120))
        self.size, self.main = dist.get_world_size(), rank == 0
        self.rank = rank
        self.mesh: DeviceMesh = init_device_mesh(device, (self.size,), mesh_dim_names=("ep",))
        self._token = torch.zeros(1, device=self.device)

    def say(self, *words: object) -> None:
        if self.main:
            print(*words, flush=True)

    def times(self, call: Callable[[], object], reps: int) -> list[float]:
        """Milliseconds of each of `reps` calls, the slowest rank's, in a collective."""
        for _ in range(3):
            call()
        gpu = self.device.type == "cuda"
        events, times = [], []
        for _ in range(reps):
            dist.all_reduce(self._token)
            if gpu:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                events.append((start, end))
            else:
                began = time.perf_counter()
                call()
                times.append((time.perf_counter() - began) * 1e3)
        if gpu:
            torch.cuda.synchronize()
            times = [start.elapsed_time(end) for start, end in events]
        slowest = torch.tensor(times, dtype=torch.float64, device=self.device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return slowest.tolist()

    def graph(self, call: Callable[[], object]) -> Callable[[], object]:
        """Replays of what call does, captured."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def median(self, call: Callable[[], object], reps: int) -> float:
        return statistics.median(self.times(call, reps))


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def kernels(call: Callable[[], object], calls: int = 3) -> dict[str, float]:
    """Milliseconds a call of every kernel by name, on this rank; a collective's includes its wait for the others."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    named = {e.key: e.self_device_time_total / calls / 1e3 for e in record.key_averages() if e.self_device_time_total}
    return dict(sorted(named.items(), key=lambda item: -item[1])[:20])


def stepper(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> Callable[[], object]:
    def step() -> None:
        layer(x).backward(grad)
        x.grad = None
        for p in layer.parameters():
            p.grad = None

    return step


def throughput(ranks: Ranks, name: str, shape: tuple[int, ...], tokens: int, args: argparse.Namespace) -> list[dict]:
    """The layer on every rank alone, then spread by each path."""
    hidden, inner, experts, top_k = shape
    config = MoEConfig(hidden_size=hidden, intermediate_size=inner, num_experts=experts, top_k=top_k)
    g = torch.Generator(device=ranks.device).manual_seed(1 + ranks.rank)

    def normal() -> torch.Tensor:
        drawn = torch.randn(tokens, hidden, generator=g, device=ranks.device, dtype=torch.float32)
        return (drawn * 0.5).to(args.dtype)

    x, grad, rows = normal().requires_grad_(), normal(), []
    chunked = [CHUNKED] if AllToAllSingle.name in args.paths else []
    for path in ["one rank", *args.paths, *chunked]:
        free()
        torch.manual_seed(0)
        layer = nn.ModuleDict({"moe": MoE(config, device=ranks.device, dtype=args.dtype)})
        if path != "one rank":
            parallelize_module(layer, ranks.mesh, {"moe": style_of(path, tokens, ranks.size)})
            free()
        moe = layer["moe"]
        step = stepper(moe, x, grad)

        def forward(moe: nn.Module = moe) -> None:
            with torch.no_grad():
                moe(x)

        row: dict = {"shape": name, "sizes": [tokens, *shape], "path": path}
        row["forward_ms"] = ranks.median(forward, args.reps)
        row["step_ms"] = ranks.median(step, args.reps)
        if ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            step()
            row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            row["kernels"] = kernels(step)
        size = 1 if path == "one rank" else ranks.size
        row["tflops_a_rank"] = 18.0 * tokens * hidden * inner * top_k / row["step_ms"] / 1e9
        row["tokens_per_second"] = size * tokens / row["step_ms"] * 1e3
        if rows:
            row["times_one"] = row["tokens_per_second"] / rows[0]["tokens_per_second"]
            row["times_one_forward"] = size * rows[0]["forward_ms"] / row["forward_ms"]
        rows.append(row)
        ranks.say(json.dumps({k: v for k, v in row.items() if k != "kernels"}))
        del layer, moe, step, forward
    return rows


def exchanges(ranks: Ranks, path_name: str, mib: float, args: argparse.Namespace) -> dict:
    """The rows alone, dispatch and combine; the same number of rows from every rank to every other."""
    others = ranks.size - 1
    n = max(1, round(mib * MIB / (2 * ROW) / others)) * others
    to = torch.arange(n, device=ranks.device) % others
    to = torch.where(to >= ranks.rank, to + 1, to)[:, None]
    plan = ops.dispatch(to, ranks.size)
    counts = [0 if r == ranks.rank else n // others for r in range(ranks.size)]
    x = torch.randn(n, ROW, device=ranks.device).to(torch.bfloat16)

    needs = None if path_name == AllToAllSingle.name else Needs(ROW, 1, 2, n, n)
    path = choose_path(path_name.split(",")[0], ranks.mesh.get_group(), ranks.device, needs)
    calls: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
    if isinstance(path, SymmetricMemory):
        raw, space, peers = torch.ops.fastmoe_cpp_symmetric, path._space(1), path.workspace.peers
        pairs = plan.tokens_per_expert.int()
        bound = n if path_name == BOUNDED else -1

        def pull(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return raw.pull(rows, None, None, *plan[:1], plan.expert_offsets, pairs, peers, space, "dispatch", bound)

        layout = pull(x)[3]
        calls["dispatch"] = lambda rows: pull(rows)[0]
        calls["combine"] = lambda rows: raw.push(rows, None, layout, plan.token_slot, peers, space, "combine")[0]
    else:
        calls["rows"] = lambda rows: path.rows(rows, counts, counts, "rows")
        calls["dispatch"] = lambda rows: path.rows(ops.gather(rows, plan), counts, counts, "dispatch")
        calls["combine"] = lambda rows: ops.combine(path.rows(rows, counts, counts, "combine"), None, plan)
    row: dict = {"path": path_name, "mib": n * 2 * ROW / MIB}
    with torch.no_grad():
        assert torch.equal(calls["combine"](calls["dispatch"](x)), x), path_name
        for what, call in calls.items():
            timed = {what: lambda call=call: call(x)}
            if path_name == BOUNDED and ranks.device.type == "cuda":
                timed[f"{what}_graph"] = ranks.graph(timed[what])
            for name, each in timed.items():
                ms = ranks.median(each, args.reps)
                row[f"{name}_us"], row[f"{name}_gbs"] = ms * 1e3, n * 2 * ROW / ms / 1e6
    ranks.say(json.dumps(row))
    return row


def decode(ranks: Ranks, path_name: str, tokens: int, shape: tuple[int, ...], args: argparse.Namespace) -> dict:
    """The whole layer, forward, of a few tokens a rank."""
    hidden, inner, experts, top_k = shape
    config = MoEConfig(hidden_size=hidden, intermediate_size=inner, num_experts=experts, top_k=top_k)
    layer = nn.ModuleDict({"moe": MoE(config, device=ranks.device, dtype=args.dtype)})
    if path_name != "one rank":
        parallelize_module(layer, ranks.mesh, {"moe": style_of(path_name, tokens, ranks.size)})
    x = torch.randn(tokens, hidden, device=ranks.device).to(args.dtype)
    row: dict = {"path": path_name, "tokens": tokens}
    with torch.no_grad():
        row["layer_us"] = ranks.median(lambda: layer["moe"](x), args.reps) * 1e3
        if path_name in ("one rank", BOUNDED) and ranks.device.type == "cuda":
            row["graph_us"] = ranks.median(ranks.graph(lambda: layer["moe"](x)), args.reps) * 1e3
    ranks.say(json.dumps(row))
    return row


def table(rows: list[dict], columns: dict[str, str]) -> str:
    """columns: a row's key to its format."""
    lines = [list(columns)]
    lines += [[format(r[k], form) if k in r else "" for k, form in columns.items()] for r in rows if "failed" not in r]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    text = "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)
    return "\n".join([text, *(f"failed: {r}" for r in rows if "failed" in r)])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES), help=f"of {', '.join(SHAPES)}, or one H,I,E,K")
    parser.add_argument("--tokens", type=int, default=16384, help="a rank")
    parser.add_argument("--mib", default="1,16,128,512", help="MiB that leave a rank in an exchange")
    parser.add_argument("--decode-tokens", default="1,8,64,256", help="a rank, of the first shape")
    parser.add_argument("--paths", default="all", help=f"of {'; '.join([*PATHS, BOUNDED])}, separated by ';'; or 'all'")
    parser.add_argument("--reps", type=int, default=15)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_parallel"), help="OUT.json is written")
    args = parser.parse_args(argv)
    if "RANK" not in os.environ:
        sys.exit("start it by torchrun: torchrun --nproc_per_node=2 benchmarks/gpu_parallel.py")
    ranks = Ranks(args.device)
    if ranks.size < 2:
        sys.exit("gpu_parallel compares several ranks with one: torchrun --nproc_per_node=2 benchmarks/gpu_parallel.py")
    args.paths = [*PATHS, BOUNDED] if args.paths == "all" else args.paths.split(";")
    args.dtype = torch.bfloat16
    if args.shapes[0].isdigit():
        shapes = {args.shapes: tuple(int(n) for n in args.shapes.split(","))}
    else:
        shapes = {name: SHAPES[name] for name in args.shapes.split(",")}
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    record: dict = {
        "device": name, "ranks": ranks.size, "torch": torch.__version__, "date": str(date.today()), "exchanges": [],
        "decode": [], "throughput": [],
    }  # fmt: skip

    def attempt(kind: str, call: Callable[[], dict | list[dict]], **what: object) -> None:
        """What one part can't do is written down; the others still count, where every rank fails alike."""
        free()
        try:
            rows = call()
            record[kind] += rows if isinstance(rows, list) else [rows]
        except Exception as error:
            record[kind].append(what | {"failed": f"{type(error).__name__}: {error}".splitlines()[0]})
            ranks.say(json.dumps(record[kind][-1]))
        if ranks.main:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.with_suffix(".json").write_text(json.dumps(record, indent=1))

    for path in args.paths:
        for mib in map(float, args.mib.split(",")):
            attempt("exchanges", lambda p=path, m=mib: exchanges(ranks, p, m, args), path=path, mib=mib)
    for path in ["one rank", *args.paths]:
        for tokens in map(int, args.decode_tokens.split(",")):
            first = next(iter(shapes.values()))
            attempt("decode", lambda p=path, t=tokens, s=first: decode(ranks, p, t, s, args), path=path, tokens=tokens)
    for shape, sizes in shapes.items():
        attempt("throughput", lambda n=shape, s=sizes: throughput(ranks, n, s, args.tokens, args), shape=shape)
    ranks.say(f"\n{ranks.size} x {name}, torch {torch.__version__}, {date.today()}")
    size = {"path": "", "mib": ".1f"}
    whats = ("rows", "dispatch", "dispatch_graph", "combine", "combine_graph")
    columns = {f"{w}_{unit}": ".1f" for w in whats for unit in ("us", "gbs")}
    ranks.say(f"\nexchanges\n{table(record['exchanges'], size | columns)}")
    columns = {"path": "", "tokens": "", "layer_us": ".1f", "graph_us": ".1f"}
    ranks.say(f"\nlayer, forward, few tokens\n{table(record['decode'], columns)}")
    columns = {
        "shape": "", "path": "", "forward_ms": ".3f", "step_ms": ".3f", "tflops_a_rank": ".0f", "peak_gib": ".1f",
        "times_one_forward": ".3f", "times_one": ".3f",
    }  # fmt: skip
    ranks.say(f"\nthroughput, {args.tokens} tokens a rank\n{table(record['throughput'], columns)}")
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
