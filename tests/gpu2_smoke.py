"""Symmetric memory step by step on the GPUs of one host, in half a minute: where it stops is what is wrong.

    torchrun --nproc_per_node=2 tests/gpu2_smoke.py

Every rank says what it is about to do, and after it what came out; a wrong result says how wrong and the steps go on.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from fastmoe_cpp import ops
from fastmoe_cpp.parallel import symmetric

raw = torch.ops.fastmoe_cpp_symmetric
TOKENS, HIDDEN, TOP_K, EACH = 300, 512, 3, 4
wrong = 0


def say(*words: object) -> None:
    print(f"[rank {dist.get_rank()}, {time.monotonic() - START:5.1f} s]", *words, flush=True)


def expect(what: str, got: torch.Tensor, wanted: torch.Tensor) -> None:
    global wrong
    torch.cuda.synchronize()
    if got.shape == wanted.shape and torch.equal(got, wanted):
        say("right:", what)
        return
    wrong += 1
    if got.shape != wanted.shape:
        say("WRONG:", what, "has shape", list(got.shape), "expected", list(wanted.shape))
        return
    bad = (got != wanted).flatten().nonzero().flatten()
    at = int(bad[0])
    say(
        "WRONG:", what, f"in {bad.numel()} of {got.numel()} values, first at {at}:",
        got.flatten()[at].item(), "expected", wanted.flatten()[at].item(),
    )  # fmt: skip


def data_of(rank: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, weights and ids of a rank, which every rank can make."""
    g = torch.Generator().manual_seed(rank)
    tokens = TOKENS + 11 * rank
    x = torch.randn(tokens, HIDDEN, generator=g).to(torch.bfloat16)
    ids = torch.rand(tokens, EACH * dist.get_world_size(), generator=g).topk(TOP_K).indices
    ids[torch.rand(tokens, TOP_K, generator=g) < 0.2] = -1
    return x.to(device), torch.rand(tokens, TOP_K, generator=g).to(device), ids.to(device)


def main() -> int:
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", timeout=timedelta(seconds=20))
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    say("torch", torch.__version__, torch.cuda.get_device_name(), "of", torch.cuda.device_count())
    say("symmetric memory lacks:", symmetric.lacks(group, device))
    needs = symmetric.Needs(HIDDEN, TOP_K, 2, TOKENS + 11 * size, None)
    say("workspace of", needs)
    path = symmetric.SymmetricMemory(group, device, needs)
    space, peers = path._space(EACH), path.workspace.peers
    say("addresses", [hex(a) for a in peers.tolist()], "space", space)

    everyone = [data_of(r, device) for r in range(size)]
    x, weights, topk_ids = everyone[rank]
    plan = ops.dispatch(topk_ids, EACH * size)
    ids, ranks, pairs = raw.token_ranks(plan.token_slot, plan.expert_offsets, EACH, size)
    expect("ids of pairs", ids, topk_ids.int())
    of_pairs = [torch.where(i < 0, -1, i // EACH) for _, _, i in everyone]
    expect("pairs of ranks", pairs, torch.stack([(of_pairs[rank] == r).sum() for r in range(size)]).int())
    # row t of source s is here where any of its pairs is
    sent = [(p == rank).any(1).nonzero().flatten() for p in of_pairs]
    send = ops.dispatch(ranks, size)
    arguments = (send.slot_index, send.expert_offsets, pairs, peers, space)

    for again in range(4):
        say("pull, pass", again)
        rows, w, local, layout, on_host = raw.pull(x, weights, ids, *arguments, "pull", -1)
        say("layout", layout.tolist(), "on host", on_host.tolist())
        expect("rows", rows, torch.cat([each[0][t] for each, t in zip(everyone, sent, strict=True)]))
        expect("weights", w, torch.cat([each[1][t] for each, t in zip(everyone, sent, strict=True)]))
        wanted = torch.cat([each[2][t] for each, t in zip(everyone, sent, strict=True)])
        mine = torch.where(wanted // EACH == rank, wanted % EACH, -1).masked_fill(wanted < 0, -1)
        expect("ids", local, mine.int())
        expect("number of pairs", on_host[1], (mine >= 0).sum().cpu())
        say("push, pass", again)
        sums, back = raw.push(rows, w, layout, send.token_slot, peers, space, "push")
        # every rank that has a token sends its row back as it is
        copies = (ranks >= 0).sum(1, keepdim=True)
        expect("sums", sums, (x.float() * copies).to(torch.bfloat16))
        expect("sums of weights", back, weights * copies)
        bounded = raw.pull(x, weights, ids, *arguments, "bounded pull", rows.shape[0] + 5)
        expect("rows within a bound", bounded[0], torch.cat([rows, rows.new_zeros(5, HIDDEN)]))
        expect("ids within a bound", bounded[2], torch.cat([local, local.new_full((5, TOP_K), -1)]))

    say("a graph of pull and push")
    bound = rows.shape[0]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())

    def both() -> torch.Tensor:
        pulled = raw.pull(x, weights, ids, *arguments, "pull", bound)
        return raw.push(pulled[0], pulled[1], pulled[3], send.token_slot, peers, space, "push")[0]

    with torch.cuda.stream(stream):
        both()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = both()
    for _ in range(3):
        out.zero_()
        graph.replay()
        expect("sums of a replay", out, sums)
        expect("sums between replays", both(), sums)

    for name, call in (("eager", both), ("graph", graph.replay)):
        times = []
        for _ in range(20):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
        say(f"pull and push of {bound} rows, {name}: {statistics.median(times):.1f} us")
    say("all right" if not wrong else f"{wrong} WRONG")
    dist.barrier()
    dist.destroy_process_group()
    return 1 if wrong else 0


START = time.monotonic()
if __name__ == "__main__":
    sys.exit(main())
