"""What only GPUs tell: the fast kernels' sizes, no wait for the host, how a rank's death ends the other."""

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
from distributed.layers import batch, ep_mesh, full, mesh_of, pair
from fastmoe_cpp import reference
from fastmoe_cpp.parallel import average_gradients

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(gpus() < 2, reason="needs two GPUs")]
SEQUENCES = ([256, 256], [500, 12], [0, 300])
#: Seconds until a collective of the group that loses a rank runs out of time, and how long the others may take to end.
TIMEOUT, END = 10, 90
PATHS = {
    "all_to_all_single": {"path": "all_to_all_single"},
    "symmetric_memory": {"path": "symmetric_memory", "max_tokens": 1024},
    "bounded": {"path": "symmetric_memory", "max_tokens": 1024, "max_rows": 2048},
}


def same_as_one_rank(rank, mesh, dtype, kind, routing, sequences, style):
    """Outputs and gradients are as near to the float64 truth as eager torch's, in kernels of the size of models."""
    c, ranks = (
        config({"renormalize": False}, hidden_size=512, intermediate_size=256, num_experts=16, top_k=4),
        len(sequences),
    )
    whole, spread = pair(c, mesh, dtype=torch.float32 if kind == "autocast" else dtype, **style)
    like = dict(whole.named_parameters())
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
    out.backward(cotangents[rank].to(out.dtype) * ranks)
    average_gradients(spread, mesh)
    parameters = {n: full(p, like[n]).detach() for n, p in spread.named_parameters()}
    results = []
    for wide in (torch.float64, dtype):
        leaves = {n: p.to(dtype).to(wide).requires_grad_() for n, p in parameters.items()}
        y = torch.cat(inputs).to(wide).requires_grad_()
        z = reference.moe(y, leaves, c, topk_ids=ids).hidden_states
        z.backward(torch.cat(cotangents).to(wide))
        results.append({"output": z[own], "x": y.grad[own]} | {n: p.grad for n, p in leaves.items()})
    ours = {"output": out, "x": x.grad / ranks}
    ours |= {n: full(p.grad, like[n]) for n, p in spread.named_parameters()}
    for name, tensor in ours.items():
        if "router" in name and kind == "autocast":
            continue  # the router's weight stays float32 there
        close(
            tensor, results[0][name], results[1][name], what=f"{name}, {dtype} {kind}, {routing}, {sequences}",
            factor=2.0 if name == "output" else BACKWARD, of=dtype,
        )  # fmt: skip


def check_kernels(rank, style, parts=False):
    mesh = mesh_of(tp=2) if parts else ep_mesh(2)
    for dtype, kind in (
        (torch.bfloat16, "plain"), (torch.float16, "plain"), (torch.float32, "plain"), (torch.bfloat16, "autocast"),
    ):  # fmt: skip
        for routing in ("uniform", "zipf", "all_to_one"):
            for sequences in ([512], [0]) if parts else SEQUENCES:
                same_as_one_rank(0 if parts else rank, mesh, dtype, kind, routing, sequences, style)


@pytest.mark.parametrize("path", PATHS)
def test_the_kernels_sizes_and_dtypes(path):
    run_ranks(check_kernels, 2, PATHS[path], backend="nccl")


def test_the_kernels_sizes_and_dtypes_in_parts():
    run_ranks(check_kernels, 2, {}, True, backend="nccl")


def step_of(layer, x, cotangent):
    """Fills the gradients there are; returns the output."""
    y = layer(x)
    torch.autograd.backward([y], [cotangent])
    return y


def captured(rank, parts):
    """Nothing waits for the host, and a graph's replays are the eager step's bits on other data."""
    c = config({"renormalize": False}, hidden_size=512, intermediate_size=256, num_experts=16, top_k=4)
    mesh, style = (mesh_of(tp=2), {}) if parts else (ep_mesh(2), PATHS["bounded"])
    _, spread = pair(c, mesh, dtype=torch.bfloat16, **style)
    inputs = [batch([200, 300], 512, seed, torch.bfloat16)[0 if parts else rank] for seed in range(4)]
    cotangent = torch.ones_like(inputs[0])
    x = inputs[0].clone().requires_grad_()
    kept = [x, *spread.parameters()]

    def clear():
        for p in kept:
            if p.grad is not None:
                (p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad).zero_()

    def local(t):
        return (t.to_local() if hasattr(t, "to_local") else t).clone()

    def eager(data):
        clear()
        x.data.copy_(data)
        y = step_of(spread, x, cotangent)
        return [local(t) for t in (y.detach(), *(p.grad for p in kept))]

    expected = [eager(data) for data in inputs]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    eager(inputs[0])
    torch.cuda.set_sync_debug_mode("default")

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step_of(spread, x, cotangent)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step_of(spread, x, cotangent)
    for again in range(3):
        for data, wanted in zip(inputs, expected, strict=True):
            clear()
            x.data.copy_(data)
            graph.replay()
            for i, (a, b) in enumerate(zip([y.detach(), *(p.grad for p in kept)], wanted, strict=True)):
                assert torch.equal(local(a), b), (again, i)
        # other operations of the group between replays
        assert torch.equal(eager(inputs[1])[0], expected[1][0])


@pytest.mark.parametrize("parts", [False, True], ids=["experts", "parts"])
def test_no_wait_for_the_host_and_a_cuda_graph(parts):
    run_ranks(captured, 2, parts, backend="nccl")


def too_many(rank, printed):
    with open(f"{printed}/{rank}", "w") as file:
        os.dup2(file.fileno(), 1)
    _, spread = pair(config(), ep_mesh(2), path="symmetric_memory", max_tokens=8, max_rows=9)
    x = batch([4, 4], 16)[rank]
    spread.forward_with_routing(x, topk_ids=torch.zeros(8, 3, dtype=torch.int64, device=device()))
    torch.cuda.synchronize()


def test_more_rows_than_the_bound_end_the_program(tmp_path):
    with pytest.raises(RankFailed) as caught:
        run_ranks(too_many, 2, str(tmp_path), backend="nccl", timeout=60)
    assert "rank 0 failed" in str(caught.value) and "CUDA error" in str(caught.value)
    printed = (tmp_path / "0").read_text()
    assert "expert-parallel dispatch: rank 0 of 2 gets 16 rows, which is more than max_rows = 9" in printed


def dies(rank, operation, style):
    group = dist.new_group([0, 1], timeout=timedelta(seconds=TIMEOUT), group_desc="experts")
    _, spread = pair(config(), DeviceMesh.from_group(group, "cuda", mesh_dim_names=("ep",)), **style)
    x = batch([3, 3], 16)[rank]
    spread(x).sum().backward()
    torch.cuda.synchronize()
    if rank == 1:
        path, parallel = spread.experts.parallel.path, spread.experts.parallel

        def killed(*_):
            os.kill(os.getpid(), signal.SIGKILL)

        if operation == "expert-parallel experts":
            parallel._experts = killed
        else:
            rows = path.rows
            path.rows = lambda *args: killed() if args[-1] == operation else rows(*args)
    for _ in range(3):
        spread(x).sum().backward()
    torch.cuda.synchronize()


@pytest.mark.parametrize(
    ("path", "operation"),
    [
        ("all_to_all_single", "expert-parallel dispatch"),
        ("all_to_all_single", "expert-parallel combine"),
        ("symmetric_memory", "expert-parallel experts"),
        ("bounded", "expert-parallel experts"),
    ],
)
def test_a_killed_rank_ends_the_other(path, operation):
    start = time.monotonic()
    with pytest.raises(RankFailed) as caught:
        run_ranks(dies, 2, operation, PATHS[path], backend="nccl", timeout=END + 60, grace=END)
    print(f"\nended {time.monotonic() - start:.0f} s after the start: {caught.value}")
    text = str(caught.value)
    assert "rank 1 died with exit code -9" in text
    # by NCCL's watchdog, a trap, or an error that reached Python
    assert "rank 0" in text and "rank 0 did not end in time" not in text, text[-3000:]
