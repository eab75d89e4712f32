"""What only GPUs tell: sizes that the fast kernels take, in their dtypes, and how NCCL ends when a rank dies."""

import os
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from modules.cases import config
from support.distributions import ids as ids_of
from support.ranks import RankFailed, device, run_ranks
from support.tolerance import BACKWARD, close
from torch.distributed.device_mesh import DeviceMesh

from distributed.conftest import gpus
from distributed.layers import batch, ep_mesh, full, pair
from fastmoe_cpp import reference
from fastmoe_cpp.parallel import average_gradients

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(gpus() < 2, reason="needs two GPUs")]
SEQUENCES = ([256, 256], [500, 12], [0, 300])
#: Seconds until a collective of the group that loses a rank runs out of time, and how long the others may take to end.
TIMEOUT, END = 10, 90


def same_as_one_rank(rank, dtype, kind, routing, sequences, path):
    """Outputs and gradients are as near to the float64 truth as eager torch's, in kernels of the size of models."""
    c = config({"renormalize": False}, hidden_size=512, intermediate_size=256, num_experts=16, top_k=4)
    _, spread = pair(c, ep_mesh(2), dtype=torch.float32 if kind == "autocast" else dtype, path=path)
    own = slice(sum(sequences[:rank]), sum(sequences[: rank + 1]))
    inputs, cotangents = (batch(sequences, c.hidden_size, seed, dtype) for seed in (0, 1))
    with torch.no_grad():
        for name, p in spread.named_parameters():
            # of the size that training starts from, so that outputs of bfloat16 are no noise
            p.mul_(0.1 if "router" not in name else 0.02)
    ids = ids_of(routing, sum(sequences) * 2, c.num_experts, c.top_k)[0].to(device())
    x = inputs[rank].clone().requires_grad_()
    with torch.autocast(device().type, dtype, enabled=kind == "autocast"):
        out = spread.forward_with_routing(x, topk_ids=ids[own.start * 2 : own.stop * 2]).hidden_states
    out.backward(cotangents[rank].to(out.dtype) * 2)
    average_gradients(spread, ep_mesh(2))
    parameters = {n: full(p).detach() for n, p in spread.named_parameters()}
    results = []
    for wide in (torch.float64, dtype):
        leaves = {n: p.to(dtype).to(wide).requires_grad_() for n, p in parameters.items()}
        y = torch.cat(inputs).to(wide).requires_grad_()
        z = reference.moe(y, leaves, c, topk_ids=ids).hidden_states
        z.backward(torch.cat(cotangents).to(wide))
        results.append({"output": z[own], "x": y.grad[own]} | {n: p.grad for n, p in leaves.items()})
    ours = {"output": out, "x": x.grad / 2} | {n: full(p.grad) for n, p in spread.named_parameters()}
    for name, tensor in ours.items():
        if "router" in name and kind == "autocast":
            continue  # the router's weight stays float32 there
        close(
            tensor, results[0][name], results[1][name], what=f"{name}, {dtype} {kind}, {routing}, {sequences}",
            factor=2.0 if name == "output" else BACKWARD, of=dtype,
        )  # fmt: skip


def check_kernels(rank, path):
    for dtype, kind in (
        (torch.bfloat16, "plain"), (torch.float16, "plain"), (torch.float32, "plain"), (torch.bfloat16, "autocast"),
    ):  # fmt: skip
        for routing in ("uniform", "zipf", "all_to_one"):
            for sequences in SEQUENCES:
                same_as_one_rank(rank, dtype, kind, routing, sequences, path)


def test_the_kernels_sizes_and_dtypes():
    run_ranks(check_kernels, 2, "all_to_all_single", backend="nccl")


def dies(rank, operation):
    group = dist.new_group([0, 1], timeout=timedelta(seconds=TIMEOUT), group_desc="experts")
    _, spread = pair(config(), DeviceMesh.from_group(group, "cuda", mesh_dim_names=("ep",)), path="all_to_all_single")
    x = batch([3, 3], 16)[rank]
    spread(x).sum().backward()
    torch.cuda.synchronize()
    if rank == 1:
        path = spread.experts.parallel.path
        rows = path.rows

        def killed(*args):
            if args[-1] == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            return rows(*args)

        path.rows = killed
    for _ in range(3):
        spread(x).sum().backward()
    torch.cuda.synchronize()


@pytest.mark.parametrize("operation", ["expert-parallel dispatch", "expert-parallel combine"])
def test_a_killed_rank_ends_the_other(operation):
    start = time.monotonic()
    with pytest.raises(RankFailed) as caught:
        run_ranks(dies, 2, operation, backend="nccl", timeout=END + 60, grace=END)
    print(f"\nended {time.monotonic() - start:.0f} s after the start: {caught.value}")
    text = str(caught.value)
    assert "rank 1 died with exit code -9" in text
    # by NCCL's watchdog, or by an error that reached Python
    assert "rank 0" in text and "rank 0 did not end in time" not in text, text[-3000:]
