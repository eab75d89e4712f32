"""What goes over the wire: a token once to a rank, the same collectives on every rank, and an end when one dies."""

import gc
import os
import re
import signal
import time
import types
from pathlib import Path

import pytest
import torch
from modules.cases import config
from support.distributions import ids as ids_of
from support.ranks import RankFailed, device, run_ranks
from torch.utils.checkpoint import checkpoint

from distributed.layers import batch, ep_mesh, full, near, pair
from distributed.test_expert_parallel import check_ranks
from fastmoe_cpp.parallel import average_gradients, exchange
from fastmoe_cpp.recompute import routing_saved

RANKS = 4


class Recorded:
    """A path that writes down every call before it makes it."""

    def __init__(self, path):
        self.path, self.name, self.calls = path, path.name, []

    def counts(self, counts, operation):
        self.calls.append((operation, tuple(counts.shape[1:]), None))
        return self.path.counts(counts, operation)

    def rows(self, rows, send_counts, recv_counts, operation):
        self.calls.append((operation, tuple(rows.shape[1:]), send_counts))
        return self.path.rows(rows, send_counts, recv_counts, operation)


def record(rank, ranks):
    """By routing: the operations and trailing sizes in order, and whether each token went once to each of its ranks."""
    mesh = ep_mesh(ranks)
    c = config({"expert_bias": True, "z_loss_coefficient": 0.1})
    found = {}
    for routing in ("uniform", "all_to_one", "last_empty", "duplicates", "dropped"):
        for sequences in ([3, 3, 3, 3][:ranks], [0, 5, 0, 1][:ranks]):
            _, spread = pair(c, mesh)
            spread.experts.parallel.path = path = Recorded(spread.experts.parallel.path)
            x = batch(sequences, c.hidden_size)[rank].requires_grad_()
            ids = ids_of(routing, x.shape[0] * 2, c.num_experts, c.top_k, seed=rank)[0].to(device())
            spread.forward_with_routing(x, topk_ids=ids).hidden_states.sum().backward()
            pairs = torch.where(ids < 0, -1, ids // (c.num_experts // ranks))
            expected = [int((pairs == r).any(dim=1).sum()) for r in range(ranks)]
            sent = [send for operation, _, send in path.calls if operation.startswith("expert-parallel dispatch")]
            assert sent == [expected, expected], (routing, sequences)
            found[routing, tuple(sequences)] = [(operation, shape) for operation, shape, _ in path.calls]
    return found


@pytest.mark.parametrize("ranks", [2, RANKS])
def test_a_token_goes_once_to_a_rank_and_the_collectives_do_not_depend_on_data(ranks, backend, enough):
    enough(ranks)
    found = run_ranks(record, ranks, ranks, backend=backend)
    sequences = {tuple(calls) for each in found for calls in each.values()}
    h, k = 16, 3
    assert sequences == {
        (
            ("expert-parallel counts", (1, 2)),
            ("expert-parallel dispatch of weights", (2 * k,)),
            ("expert-parallel dispatch", (h,)),
            ("expert-parallel combine", (h,)),
        )
    }


def overlapped(rank):
    """What happens between the start of an exchange and the wait for it, forward and backward, and the same bits."""
    mesh = ep_mesh(2)
    c = config({"renormalize": False}, shared_intermediate_size=6, shared_expert_gate=True)
    _, spread = pair(c, mesh)
    x = batch([5, 2], 16)[rank].requires_grad_()
    path, seen = spread.experts.parallel.path, []

    def said(name):
        def hook(*_):
            seen.append(name)

        return hook

    shared = spread.shared_experts
    shared.register_forward_pre_hook(said("shared"))
    shared.register_full_backward_pre_hook(said("shared backward"))
    calls = torch.ops._c10d_functional
    begin, end = calls.all_to_all_single, calls.wait_tensor

    def step():
        y = spread(x)
        y.square().sum().backward()
        grads = [y.detach(), x.grad.clone(), *(full(p.grad).clone() for p in spread.parameters())]
        x.grad = None
        spread.zero_grad()
        return grads

    exchange._collectives = types.SimpleNamespace(
        all_to_all_single=lambda *a: (seen.append("begin"), begin(*a))[1],
        wait_tensor=lambda *a: (seen.append("end"), end(*a))[1],
    )
    try:
        apart = step()
    finally:
        exchange._collectives = calls
    counts, two = ["begin", "end"], ["begin", "begin", "end", "end"]
    # the sums' exchange is around the shared experts, that of their gradients around the shared experts' backward
    around = [["begin", name, "end"] for name in ("shared", "shared backward")]
    assert seen == [*counts, *two, *around[0], *around[1], *two], seen
    path.begin = lambda *a: (lambda rows: lambda: rows)(path.rows(*a))
    for a, b in zip(step(), apart, strict=True):
        assert torch.equal(a, b)


def in_chunks(rank, ranks, chunks):
    """The same layer with its tokens in parts: every chunk is on its way before the first is waited for."""
    check_ranks(rank, ranks, chunks=chunks)
    _, spread = pair(config(), ep_mesh(ranks), chunks=3)
    assert "by all_to_all_single in 3 chunks" in repr(spread)
    calls, seen = torch.ops._c10d_functional, []
    begin, end = calls.all_to_all_single, calls.wait_tensor
    exchange._collectives = types.SimpleNamespace(
        all_to_all_single=lambda *a: (seen.append("begin"), begin(*a))[1],
        wait_tensor=lambda *a: (seen.append("end"), end(*a))[1],
    )
    try:
        y = spread(batch([4, 1, 0, 2][:ranks], 16)[rank].requires_grad_())
        forward = seen[:]
        y.sum().backward()
    finally:
        exchange._collectives = calls
    # counts; weights and rows of three chunks; then each chunk's wait, and its sums on the way
    one = ["end", "end", "begin"]
    assert forward == ["begin", "end", *["begin"] * 6, *one * 3, *["end"] * 3], forward
    backward = seen[len(forward) :]
    # the sums' gradients of all chunks set out first
    assert backward[:3] == ["begin"] * 3 and backward.count("begin") == backward.count("end") == 9, backward


@pytest.mark.parametrize(("ranks", "chunks"), [(2, 2), (4, 5)])
def test_chunks(ranks, chunks, backend, enough):
    enough(ranks)
    run_ranks(in_chunks, ranks, ranks, chunks, backend=backend)


def test_shared_experts_hide_an_exchange(backend):
    run_ranks(overlapped, 2, backend=backend)


def dies_in_the_exchange(rank):
    """Rank 1 is killed between the dispatch and the combine of its second pass."""
    _, spread = pair(config(), ep_mesh(RANKS))
    x = batch([3] * RANKS, 16)[rank]
    spread(x).sum().backward()
    if rank == 1:
        path = spread.experts.parallel.path

        class Dies(Recorded):
            def rows(self, rows, send_counts, recv_counts, operation):
                if operation == "expert-parallel combine":
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().rows(rows, send_counts, recv_counts, operation)

        spread.experts.parallel.path = Dies(path)
    spread(x).sum().backward()


def test_a_rank_killed_in_mid_exchange_ends_the_others():
    start = time.monotonic()
    with pytest.raises(RankFailed) as caught:
        run_ranks(dies_in_the_exchange, RANKS, timeout=90)
    assert time.monotonic() - start < 80
    text = str(caught.value)
    assert "rank 1 died with exit code -9" in text
    for rank in (0, 2, 3):
        assert "expert-parallel combine of " in text
        assert re.search(rf"failed on rank {rank} of {RANKS} in group '.*' \(global rank {rank}\): ", text), text[
            -3000:
        ]


def recomputed(rank):
    """Activation checkpointing runs the exchange again in backward, on every rank alike."""
    mesh = ep_mesh(2)
    results = []
    for how in ("plain", "recomputed", "routing kept", "autocast"):
        whole, spread = pair(config(shared_intermediate_size=6), mesh, dtype=torch.float32)
        x = batch([3, 0], 16, dtype=torch.float32)[rank].requires_grad_()
        with torch.autocast(device().type, torch.bfloat16, enabled=how == "autocast"):
            if how in ("plain", "autocast"):
                y = spread(x)
            elif how == "recomputed":
                y = checkpoint(spread, x, use_reentrant=False)
            else:
                y = checkpoint(spread, x, use_reentrant=False, context_fn=routing_saved)
        y.square().sum().backward()
        average_gradients(spread, mesh)
        results.append([y, x.grad, *(full(p.grad) for p in spread.parameters())])
        if how == "autocast":
            with torch.autocast(device().type, torch.bfloat16):
                near(y, whole(x), how, rtol=1e-2)
    for kind in results[1:3]:
        for a, b in zip(kind, results[0], strict=True):
            assert torch.equal(a, b)


def test_activation_checkpointing_and_autocast(backend):
    run_ranks(recomputed, 2, backend=backend)


def resident() -> int:
    """Bytes of memory this process holds, on its GPU where it has one."""
    if device().type == "cuda":
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def soaked(rank):
    """Bytes by which memory grew over hundreds of passes, recomputed, every one with another routing and batch."""
    router = {"balance_loss": "global", "balance_loss_coefficient": 0.1}
    _, spread = pair(config(router, hidden_size=64), ep_mesh(2))

    def passes(first, last):
        for seed in range(first, last):
            x = batch([seed % 7, 40 - seed % 5], 64, seed)[rank].requires_grad_()
            checkpoint(spread, x, use_reentrant=False).sum().backward()
            spread.update_expert_bias()
        gc.collect()
        return resident()

    return -passes(0, 80) + passes(80, 280)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_memory_does_not_grow(backend):
    # one exchange of rows kept a pass would be 9 MB; the allocator's own growth ends at about 1 MB
    assert max(run_ranks(soaked, 2, backend=backend)) < 4 * 2**20


def compiled(rank):
    """The experts run eagerly between graphs; other counts make no other graph."""
    _, spread = pair(config(shared_intermediate_size=6), ep_mesh(2), dtype=torch.float32)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    run = torch.compile(spread, backend=backend)
    made = []
    for seed in range(4):
        x = batch([3, 2], 16, seed, dtype=torch.float32)[rank].requires_grad_()
        y = spread(x)
        (expected,) = torch.autograd.grad(y.square().sum(), x)
        z = run(x)
        (grad,) = torch.autograd.grad(z.square().sum(), x)
        near(z, y, "output", rtol=1e-6)
        near(grad, expected, "gradient", rtol=1e-5)
        made.append(len(graphs))
    assert 0 < made[0] == made[-1] < 5, made


def test_compiled(backend):
    run_ranks(compiled, 2, backend=backend)
