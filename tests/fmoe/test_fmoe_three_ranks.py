"""What two processes can't show: overflow that has a choice of where to go, and sums of three terms."""

import fmoe_reference as reference
import torch
from support.ranks import run_ranks
from torch import nn

from fastmoe_cpp.fmoe import DistributedGroupedDataParallel
from fastmoe_cpp.fmoe.gates import SwipeGate

LOCAL, D = 3, 8
SWIPES = [((4, 9, 6), 3, 0), ((7, 7, 7), 3, 1), ((0, 8, 5), 4, 2), ((10, 1, 10), 2, 3)]


def wanted(tokens, top_k, seed):
    """Each process's choices: of each k the tokens crowd one process, which is full by the time."""
    generator = torch.Generator().manual_seed(seed)
    columns = []
    for k in range(top_k):
        crowded = torch.randint(3, (1,), generator=generator) if k else torch.zeros(1, dtype=torch.int64)
        there = torch.rand(sum(tokens), generator=generator) < 0.8
        process = torch.where(there, crowded, torch.randint(3, (sum(tokens),), generator=generator))
        columns.append(process * LOCAL + torch.randint(LOCAL, (sum(tokens),), generator=generator))
    return torch.stack(columns, dim=1).split(list(tokens))


def of_three(rank):
    results = []
    for tokens, top_k, seed in SWIPES:
        ids = wanted(tokens, top_k, seed)[rank]
        gate, capacity, columns = SwipeGate(D, LOCAL, 3, top_k), tokens[rank] * top_k, []
        for k in range(top_k):
            column, capacity = gate.swipe_once(ids[:, k], capacity, k % LOCAL)
            columns.append(column)
        results.append((torch.stack(columns, 1), int(capacity)))
    model = DistributedGroupedDataParallel(nn.Linear(3, 1, bias=False, dtype=torch.bfloat16))
    sums = []
    for narrow in (True, False):
        # one large number among the three processes'
        model.module.weight.grad = torch.where(torch.arange(3) == rank, 256, 0.75)[None].bfloat16()
        model.allreduce_gradients(no_scale=True, fp32_allreduce=not narrow)
        sums.append(model.module.weight.grad.tolist()[0])
    return results, sums


def test_three_processes():
    results = run_ranks(of_three, 3)
    moved = 0
    for case, (tokens, top_k, seed) in enumerate(SWIPES):
        columns = wanted(tokens, top_k, seed)
        expected = reference.swipe(list(columns), tokens, LOCAL)
        for rank in range(3):
            assert torch.equal(results[rank][0][case][0], expected[rank]), (case, rank)
            # every place is taken in the end
            assert results[rank][0][case][1] == 0
            moved += int((expected[rank] != columns[rank]).sum())
    assert moved > 20
    # 257.5 is 258 in bfloat16, where 256 + 0.75 is 256
    assert all(wide == [258.0] * 3 and 256.0 in narrow for _, (narrow, wide) in results)
