"""Rows and counts between ranks, forward and backward, against slices of what every rank holds."""

import os
import re
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from support.ranks import RankFailed, device, run_ranks

from fastmoe_cpp.parallel import ExchangeError, all_to_all_rows, exchange_counts

#: send[r][s] rows go from rank r to rank s: uneven, ranks that send nothing, that get nothing, nobody anything.
PATTERNS = {
    2: [[[3, 1], [2, 4]], [[0, 5], [0, 2]], [[0, 0], [3, 4]], [[0, 0], [0, 0]]],
    3: [[[1, 2, 3], [0, 0, 0], [4, 0, 1]], [[0, 7, 0], [0, 1, 0], [0, 2, 0]]],
}


def everyones_rows(send, dtype, tail):
    """What each rank holds, the same on every rank."""
    generator = torch.Generator().manual_seed(5)
    drawn = [torch.randn(sum(counts), *tail, generator=generator, dtype=torch.float64) for counts in send]
    return [x.to(device(), dtype) for x in drawn]


def expected(send, rows, to):
    return torch.cat([part.split(counts)[to] for part, counts in zip(rows, send, strict=True)])


def check_rows(rank, world):
    for send in PATTERNS[world]:
        recv = exchange_counts(torch.tensor(send[rank], device=device())).cpu()
        assert recv.tolist() == [counts[rank] for counts in send]
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            for tail in ((5,), (), (2, 3)):
                rows = everyones_rows(send, dtype, tail)
                mine = rows[rank].clone().requires_grad_()
                got = all_to_all_rows(mine, send[rank], recv)
                assert torch.equal(got, expected(send, rows, rank)) and got.grad_fn is not None
                cotangents = everyones_rows([[c[r] for c in send] for r in range(world)], dtype, tail)
                got.backward(cotangents[rank])
                back = [
                    cotangents[to].split([c[to] for c in send])[rank] for to in range(world)
                ]  # what each rank sends home
                assert torch.equal(mine.grad, torch.cat(back))
        ids = torch.arange(sum(send[rank]), device=device()) + 100 * rank
        assert all_to_all_rows(ids, torch.tensor(send[rank]), recv.tolist()).numel() == int(recv.sum())
    strided = torch.randn(4, world, device=device()).t()
    assert torch.equal(all_to_all_rows(strided, [1] * world, [1] * world)[rank], strided[rank])
    # twice differentiable: the gradient's gradient goes forth again
    x = torch.randn(world, 2, dtype=torch.float64, device=device(), requires_grad=True)
    (g,) = torch.autograd.grad(all_to_all_rows(x, [1] * world, [1] * world).pow(3).sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), x)
    torch.testing.assert_close(h, 6 * x.detach())
    blocks = torch.arange(world * 2, device=device()) + 10 * rank
    assert exchange_counts(blocks).tolist() == [2 * rank + i + 10 * r for r in range(world) for i in range(2)]
    check_bad_input(world)


def check_bad_input(world):
    good = [1] * world
    rows = torch.zeros(world, 2, device=device())
    for args, error, message in (
        ((rows, [1], good), ValueError, f"send_counts must hold {world} counts, one for each rank of the group, got 1"),
        ((rows, good, [-1] * world), ValueError, "recv_counts must hold integers of at least 0"),
        ((rows, [2] * world, good), ValueError, f"send_counts must sum to the {world} rows"),
        ((rows, torch.ones(world), good), TypeError, "send_counts must be a list of int or an int32 or int64 tensor"),
        ((rows, good, good, "ep"), ValueError, "group must be a ProcessGroup that this rank is in, got 'ep'"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            all_to_all_rows(*args)
    with pytest.raises(TypeError, match="counts must be int32 or int64"):
        exchange_counts(torch.zeros(world))
    with pytest.raises(ValueError, match=f"counts must have a first size that {world} ranks divide"):
        exchange_counts(torch.zeros(world + 1, dtype=torch.int64))


@pytest.mark.parametrize("world", [2, 3])
def test_rows_and_gradients(world, backend, enough):
    enough(world)
    run_ranks(check_rows, world, world, backend=backend)


def one_dies(rank):
    rows = torch.ones(8, 4, requires_grad=True)
    group = dist.new_group([0, 1, 2], group_desc="experts")
    out = all_to_all_rows(rows, [4, 2, 2], [4, 4, 4] if rank == 0 else [2, 2, 2], group)
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    try:
        out.sum().backward()
    except ExchangeError as error:
        took = time.monotonic() - start
        raise AssertionError(f"{error} after {took:.0f} s") from None


def test_a_killed_rank_ends_the_others():
    start = time.monotonic()
    with pytest.raises(RankFailed) as caught:
        run_ranks(one_dies, 3, timeout=60)
    assert time.monotonic() - start < 50
    text = str(caught.value)
    assert "rank 2 died with exit code -9" in text
    for rank in (0, 1):
        what = (
            f"all_to_all_rows backward of {12 if rank == 0 else 6} rows failed on rank {rank} of 3 in group 'experts'"
        )
        assert what in text


def one_is_late(rank):
    group = dist.new_group([0, 1], timeout=timedelta(seconds=2), group_desc="experts")
    dist.barrier()
    if rank == 1:
        time.sleep(4)
        return None
    where = "exchange_counts of 2 rows failed on rank 0 of 2 in group 'experts'"
    with pytest.raises(ExchangeError, match=rf"{where} \(global rank 0\): .*[Tt]imed out"):
        exchange_counts(torch.ones(2, dtype=torch.int64), group)
    return None


def test_a_timeout_names_operation_group_and_rank():
    run_ranks(one_is_late, 2)


def test_without_a_process_group():
    with pytest.raises(RuntimeError, match="torch.distributed must be initialized"):
        all_to_all_rows(torch.zeros(1, 1), [1], [1])
