"""What only a GPU shows of the stages around the experts: repeated bits, syncs, graphs, streams, bad ids, launches."""

from __future__ import annotations

import subprocess
import sys
import threading
from functools import partial

import pytest
import torch
from support import distributions
from support.poison import poison
from support.samples import normal, ops
from torch import Tensor

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def poisoned() -> None:
    poison()


def bits(t: Tensor) -> Tensor:
    size = {8: torch.int64, 4: torch.int32, 2: torch.int16}[t.element_size()]
    return t.view(size) if t.is_floating_point() else t


def every_op(T=4096, E=128, k=8, H=512, seed=0):
    """Static inputs, and a function that runs every operator on them and returns all results."""
    inputs = {
        "logits": distributions.logits("zipf", T, E, seed).to("cuda", torch.float32),
        "x": normal(T, H, seed=seed + 1, dtype=torch.bfloat16, device="cuda"),
        "weight": normal(E, H, seed=seed + 2, std=H**-0.5, dtype=torch.bfloat16, device="cuda"),
        "mask": torch.arange(T, device="cuda") % 7 == 3,
        "bias": torch.zeros(E, device="cuda"),
        "one": torch.ones((), device="cuda"),
    }

    def run() -> list[Tensor]:
        logits, x, weight, mask, bias, one = inputs.values()
        made = ops.router_logits(x, weight, None)
        out = [made, *ops.router_logits_backward(made, x, weight, [True, True, True])]
        weights, ids, scores = ops.route(
            logits, k, expert_bias=bias, num_groups=8, topk_groups=4, group_score="top2_sum"
        )
        out += [weights, ids, scores, *ops.route(made, k, score_function="sigmoid", selection_scores=logits)]
        out += ops.route(made, k, topk_ids=ids, scores_after_topk=True)
        out.append(ops.route_backward(weights, scores, logits, ids, "softmax", False, True, 0.0, 1.0))
        out.append(ops.sinkhorn(logits, 0, 1e-3))
        plan = ops.dispatch(ids, E, padding_mask=mask)
        for policy in ("position", "probs"):
            out += ops.dispatch(ids, E, topk_weights=weights, capacity=100, drop_policy=policy)
        rows = ops.gather(x, *plan[:3])
        out += [*plan, rows, ops.gather_backward(rows, plan[1]), ops.combine(rows, weights, *plan[:3])]
        out += ops.combine_backward(x, rows, weights, *plan[:3], [True, True])
        counts = ops.expert_counts(ids[None], E, mask[None])
        out += [counts, ops.balance_loss(scores[None], counts, 0.1, mask[None]), ops.z_loss(logits, 0.1, mask)]
        out.append(ops.balance_loss_backward(one, scores[None], counts, 0.1, mask[None]))
        out.append(ops.z_loss_backward(one, logits, 0.1, mask))
        moved = bias.clone()
        ops.update_expert_bias(moved, plan[3], 1e-3, True)
        return [*out, moved]

    return inputs, run


def test_the_same_bits_200_times():
    _, run = every_op(T=1500)
    first = [bits(t).clone() for t in run()]
    different = torch.zeros(len(first), dtype=torch.bool, device="cuda")
    for _ in range(200):
        different |= torch.stack([(bits(t) != f).any() for t, f in zip(run(), first, strict=True)])
    assert not different.any(), different.nonzero().flatten().tolist()


def test_no_host_sync():
    _, run = every_op()
    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_graph_replays_changed_inputs():
    inputs, run = every_op()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in (5, 6, 7):
        others, _ = every_op(seed=seed)
        for name, t in inputs.items():
            t.copy_(others[name])
        graph.replay()
        for i, (replayed, eager) in enumerate(zip(captured, run(), strict=True)):
            assert torch.equal(bits(replayed), bits(eager)), i


def test_current_stream():
    """Work queued on a stream before the operators is seen by them: none runs on another stream."""
    inputs, run = every_op()
    others, _ = every_op(seed=3)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for name, t in inputs.items():
            t.copy_(others[name])
        late = run()
    stream.synchronize()
    for a, b in zip(late, run(), strict=True):
        assert torch.equal(bits(a), bits(b))


BAD_IDS = {
    "dispatch": "ops.dispatch(ids, 8)",
    "dispatch many": "ops.dispatch(ids.repeat(20000, 1), 8)",
    "route": "ops.route(torch.zeros(2, 8, device='cuda'), 2, topk_ids=ids)",
    "expert_counts": "ops.expert_counts(ids[None], 8)",
}


def test_bad_ids_end_the_kernel_with_one_sentence():
    """A trap ends the process's context, so every operator gets a process."""
    prelude = "import torch, fastmoe_cpp; ops = torch.ops.fastmoe_cpp; "
    prelude += "ids = torch.tensor([[0, 7], [{bad}, 3]], device='cuda'); "
    started = {
        (name, bad): subprocess.Popen(
            [sys.executable, "-c", prelude.format(bad=bad) + call + "; torch.cuda.synchronize()"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for (name, call), bad in zip(BAD_IDS.items(), (8, -2, 2**40, -3), strict=True)
    }  # fmt: skip
    for (name, bad), process in started.items():
        said, _ = process.communicate(timeout=80)
        assert process.returncode != 0, name
        assert f"must be -1 (dropped) or between 0 and 7, got {bad}" in said, (name, said)


def test_two_launches_from_logits_to_plan():
    for T in (64, 4096):
        logits = distributions.logits("zipf", T, 128).to("cuda", torch.float32)
        run = partial(ops.route, logits, 8)
        ops.dispatch(run()[1], 128)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            ops.dispatch(run()[1], 128)
            torch.cuda.synchronize()
        kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        assert len(kernels) == 2 and all("fastmoe_cpp" in k for k in kernels), kernels


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_thread_that_has_no_context_yet(dtype):
    """Where all memory comes from the allocator's cache, the experts' launches are the first calls of the thread: so it
    is with the thread of a first backward pass."""
    T, H, I, E, K = 300, 64, 64, 4, 2
    x, weights = normal(T, H, seed=1, dtype=dtype, device="cuda"), torch.full((T, K), 0.5, device="cuda")
    gate_up = normal(E, 2 * I, H, seed=2, std=H**-0.5, dtype=dtype, device="cuda")
    down = normal(E, H, I, seed=3, std=I**-0.5, dtype=dtype, device="cuda")
    ids = torch.arange(T * K, device="cuda").view(T, K) % E

    def run() -> Tensor:
        plan = ops.dispatch(ids, E)[:3]
        return ops.experts(x, gate_up, down, weights, *plan)

    expected = run()
    run()  # memory for a second result
    plan = ops.dispatch(ids, E)[:3]
    torch.cuda.synchronize()
    found: list[Tensor | Exception] = []

    def work() -> None:
        try:
            found.append(ops.experts(x, gate_up, down, weights, *plan))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert isinstance(found[0], Tensor), found[0]
    assert torch.equal(bits(found[0]), bits(expected))
