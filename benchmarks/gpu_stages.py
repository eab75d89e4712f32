"""Kernel times of router, dispatch, combine and losses on one GPU, each beside a copy of the same bytes.

    python benchmarks/gpu_stages.py --tokens 32768 --hidden 4096 --experts 128 --top-k 8

Times are between CUDA events around replays of a CUDA graph, so they hold the kernels and the gaps between dependent
kernels but no launch cost: medians of --repeats replays of --calls calls each. The calls of a graph rotate over sets of
inputs that together exceed the L2 cache; 'in L2' is the same over one set. 'bytes' counts what must be read and written
once; '% of copy' is the time of a copy of as many bytes over the operator's.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from datetime import date
from functools import partial

import torch

import fastmoe_cpp  # noqa: F401  registers the operators

ops = torch.ops.fastmoe_cpp
Sets = list[dict[str, torch.Tensor]]


def graph_time(calls: list[Callable[[], object]], repeats: int) -> float:
    """Median microseconds of one call, of a graph of all of them."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    times = []
    for i in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i >= 2:
            times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def make_set(T: int, H: int, E: int, K: int, seed: int, rows: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    made = {"logits": torch.randn(T, E, device="cuda") - torch.arange(1, E + 1, device="cuda").log() * 0.5}
    made["weights"], made["ids"], made["scores"] = ops.route(made["logits"], K)
    made["slot_index"], made["token_slot"], made["offsets"], made["counts"] = ops.dispatch(made["ids"], E)
    if rows:
        made["x"] = torch.randn(T, H, device="cuda").bfloat16()
        made["rows"] = ops.gather(made["x"], made["slot_index"], made["token_slot"], made["offsets"])
        made["router"] = (torch.randn(E, H, device="cuda") * 0.02).bfloat16()
    return made


def small_ops(T: int, E: int, K: int) -> dict[str, tuple[float, Callable]]:
    """Name -> (bytes, call of a set): what never touches the hidden states."""
    logits, picks, plan = 4 * T * E, 12 * T * K, T * K * (8 + 4 + 4)
    one = torch.ones((), device="cuda")

    def chain(s):
        weights, ids, scores = ops.route(s["logits"], K)
        return weights, scores, ops.dispatch(ids, E)

    return {
        "route": (2 * logits + picks, lambda s: ops.route(s["logits"], K)),
        "route, 8 groups, bias": (
            2 * logits + picks,
            lambda s: ops.route(
                s["logits"], K, expert_bias=s["logits"][0], score_function="sigmoid", num_groups=8, topk_groups=4,
                group_score="top2_sum",
            ),
        ),
        "dispatch": (plan, lambda s: ops.dispatch(s["ids"], E)),
        "dispatch, capacity by probs": (
            plan + 4 * T * K,
            lambda s: ops.dispatch(s["ids"], E, topk_weights=s["weights"], capacity=T * K // E, drop_policy="probs"),
        ),
        "route + dispatch": (2 * logits + picks + plan, chain),
        "route_backward": (
            2 * logits + picks,
            lambda s: ops.route_backward(s["weights"], None, s["logits"], s["ids"], "softmax", False, True, 0.0, 1.0),
        ),
        "sinkhorn, 10 iterations": (12 * logits, lambda s: ops.sinkhorn(s["logits"], 10)),
        "expert_counts": (8 * T * K, lambda s: ops.expert_counts(s["ids"][None], E)),
        "balance_loss": (logits, lambda s: ops.balance_loss(s["scores"][None], s["counts"][None], 1.0)),
        "balance_loss_backward": (
            logits, lambda s: ops.balance_loss_backward(one, s["scores"][None], s["counts"][None], 1.0, None)
        ),
        "z_loss": (logits, lambda s: ops.z_loss(s["logits"])),
        "z_loss_backward": (2 * logits, lambda s: ops.z_loss_backward(one, s["logits"], 1.0, None)),
    }  # fmt: skip


def row_ops(T: int, H: int, E: int, K: int) -> dict[str, tuple[float, Callable]]:
    one, many = 2 * T * H, 2 * T * H * K

    def plan(s):
        return s["slot_index"], s["token_slot"], s["offsets"]

    return {
        "gather": (one + many, lambda s: ops.gather(s["x"], *plan(s))),
        "gather_backward": (one + many, lambda s: ops.gather_backward(s["rows"], s["token_slot"])),
        "combine": (one + many, lambda s: ops.combine(s["rows"], s["weights"], *plan(s))),
        "combine_backward": (
            one + 2 * many, lambda s: ops.combine_backward(s["x"], s["rows"], s["weights"], *plan(s), [True, True])
        ),
        "combine_backward, weights only": (
            one + many, lambda s: ops.combine_backward(s["x"], s["rows"], s["weights"], *plan(s), [False, True])
        ),
        "router_logits": (one + 4 * T * E, lambda s: ops.router_logits(s["x"], s["router"])),
        "router_logits_backward": (
            2 * one + 4 * T * E,
            lambda s: ops.router_logits_backward(s["logits"], s["x"], s["router"], [True, True, False]),
        ),
    }  # fmt: skip


def copy_time(size: float, repeats: int) -> float:
    """Microseconds of a copy that reads and writes `size` bytes together, over sources that exceed L2."""
    n = max(int(size) // 2, 256)
    sets = max(1, min(16, int(3e8 // n)))
    sources = [torch.randint(0, 99, (n,), device="cuda", dtype=torch.uint8) for _ in range(sets)]
    return graph_time([partial(torch.empty_like(s).copy_, s) for s in sources], repeats)


def table(named: dict[str, tuple[float, Callable]], sets: Sets, repeats: int, warm: bool) -> None:
    for name, (size, call) in named.items():
        rounds = 4 if warm else 1
        spread = graph_time([partial(call, s) for s in sets] * rounds, repeats)
        copy = copy_time(size, repeats)
        in_l2 = f"{graph_time([partial(call, sets[0])] * len(sets) * rounds, repeats):8.1f}" if warm else " " * 8
        print(f"{name:32s} {size / 1e6:9.1f} {spread:9.1f} {in_l2} {copy:9.1f} {100 * copy / spread:6.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 32768), ("hidden", 4096), ("experts", 128), ("top-k", 8), ("repeats", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--sets", type=int, default=8, help="sets of inputs that the small operators rotate over")
    parser.add_argument("--only", choices=("small", "rows"))
    args = parser.parse_args()
    T, H, E, K = args.tokens, args.hidden, args.experts, args.top_k
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {date.today()}; T={T} H={H} E={E} K={K}")
    print(f"{'':32s} {'MB':>9s} {'us':>9s} {'in L2':>8s} {'copy us':>9s} {'% copy':>6s}")
    if args.only != "rows":
        sets = [make_set(T, H, E, K, seed, rows=False) for seed in range(args.sets)]
        table(small_ops(T, E, K), sets, args.repeats, warm=True)
        del sets
    if args.only != "small":
        sets = [make_set(T, H, E, K, seed, rows=True) for seed in range(2)]
        table(row_ops(T, H, E, K), sets, args.repeats, warm=False)


if __name__ == "__main__":
    main()
