"""Few tokens, whose forward pass takes the matrix-vector kernels: against the float64 oracle on memory filled with NaN,
experts with more slots than one pass takes, the same bits again and again, inside a CUDA graph, and plans and weights
that change right before down reads them ahead of its turn."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from support import matrix, oracle, pairwise, tolerance
from support.distributions import NAMES
from support.poison import poison
from support.samples import dispatch, experts_inputs, leaves, normal, ops, run_experts

from fastmoe_cpp import explain

from .test_cuda_experts import check, run
from .test_cuda_hopper import Load

pytestmark = pytest.mark.cuda

BUDGET = {"work": 3 * 2**26, "weights": 3e7, "rows": 1e7}


def is_taken(case) -> bool:
    pairs = case["T"] * matrix.top_k(case)
    # where a thousand rows cancel that are mostly zero, eager torch in 16 bits can't tell right from wrong
    told = matrix.top_k(case) < 1000 or "relu" not in case["activation"]
    return matrix.affordable(BUDGET)(case) and told and (case["T"] <= 2 or 2 * pairs <= 3 * case["E"])


# Sizes are multiples of 8: below what a warp takes in a step (256), just past it, and many steps.
CASES = pairwise.cover(
    {
        "T": (1, 2, 3, 4), "distribution": [n for n in NAMES if n != "nan_rows"], "H": (64, 8, 24, 256, 264, 776, 2048),
        "I": (64, 8, 24, 256, 264, 768, 2048), "E": (8, 1, 2, 60, 128, 257, 1024), "K": (2, 1, 3, 4, 8, "E"),
        "dtype": (torch.bfloat16, torch.float16), "activation": oracle.ACTIVATIONS,
        "bias": ("none", "up", "down", "both"), "interleaved": (False, True), "weight_on_input": (False, True),
        "recompute": (False, True),
    },
    is_taken, seed=6, tries=2,
)  # fmt: skip
# T, H, I, E, K. One token's rows are combined by down where K is 1, 2, 4 or 8.
SIZES = [
    (1, 2048, 768, 128, 8), (4, 264, 136, 8, 3), (3, 24, 520, 60, 8), (2, 776, 8, 257, 2), (4, 4104, 72, 16, 4),
    (2, 8, 264, 1, 1),
]  # fmt: skip


@pytest.fixture(autouse=True)
def chosen(monkeypatch) -> None:
    monkeypatch.delenv("FASTMOE_CPP_PATH", raising=False)
    poison()


def is_matrix_vector(sizes, dtype=torch.bfloat16, activation="swiglu") -> bool:
    _, up, down, *_ = explain.explain(sizes, str(dtype).removeprefix("torch."), activation, explain.here())
    assert ("matrix-vector" in up) == ("matrix-vector" in down)
    return "matrix-vector" in up


@pytest.mark.parametrize("case", CASES, ids=pairwise.name)
def test_against_oracle(case):
    interleaved = case["interleaved"] and case["activation"] in oracle.GATED
    sizes = case["T"], case["H"], case["I"], case["E"], matrix.top_k(case)
    assert is_matrix_vector(sizes, case["dtype"], case["activation"])
    inputs = experts_inputs(
        *sizes, dtype=case["dtype"], device="cuda", distribution=case["distribution"], activation=case["activation"],
        bias=case["bias"], interleaved=interleaved,
    )  # fmt: skip
    check(
        inputs, case["dtype"], activation=case["activation"], interleaved=interleaved,
        weight_on_input=case["weight_on_input"], recompute=case["recompute"],
    )  # fmt: skip


@pytest.mark.parametrize("weight_on_input", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "clamped_swiglu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_slots_an_expert(dtype, activation, weight_on_input):
    """Replayed ids, the same one for several pairs of a token: experts with none and with up to 8 slots."""
    order = torch.randperm(18, generator=torch.Generator().manual_seed(0))
    ids = torch.repeat_interleave(torch.arange(5), torch.tensor([2, 8, 0, 3, 5]))[order].reshape(2, 9)
    alone = torch.tensor([[3, 1, 3, 3, 0, 3, 3, 1]])  # combined by down, with warps that have no expert
    for tokens, top_k, chosen in ((2, 9, ids), (1, 8, alone)):
        for hidden, inner in ((264, 136), (512, 776)):
            sizes = tokens, hidden, inner, 9, top_k
            assert is_matrix_vector(sizes, dtype, activation)
            inputs = experts_inputs(*sizes, dtype=dtype, device="cuda", activation=activation, bias=True, seed=3)
            check(inputs | {"topk_ids": chosen.cuda()}, dtype, activation=activation, weight_on_input=weight_on_input)


def forward(inputs, plan, keep=True, activation="swiglu"):
    """The output and, where kept, the pre-activation."""
    return ops.experts_forward(
        inputs["hidden_states"], inputs["gate_up_proj"], inputs["down_proj"], inputs["topk_weights"], *plan[:3],
        None, None, activation, 1.702, 7.0, False, False, keep,
    )  # fmt: skip


def test_rows_of_nobody():
    """Capacity and padding leave slots at the end without an expert: zeros in what is returned, whatever the plan has
    there."""
    inputs = experts_inputs(4, 264, 72, 8, 3, dtype=torch.bfloat16, device="cuda", distribution="duplicates")
    plan = list(dispatch(inputs["topk_ids"], 8, capacity=2))
    served = int(plan[2][-1])
    assert 0 < served < 12
    expected = forward(inputs, plan)
    plan[0] = plan[0].clone()
    plan[0][served:] = 2**31 - 1
    poison()
    out, pre = forward(inputs, plan)
    assert out.isfinite().all() and pre.isfinite().all()
    assert pre[:served].any() and not pre[served:].any()
    assert torch.equal(out, expected[0]) and torch.equal(pre, expected[1])


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_token_s_output_is_the_same_alone_and_among_others(size):
    assert is_matrix_vector(size)
    inputs = experts_inputs(*size, dtype=torch.bfloat16, device="cuda", distribution="zipf", bias=True)
    together = run_experts(inputs)
    for t in range(size[0]):
        one = inputs | {name: inputs[name][t : t + 1] for name in ("hidden_states", "topk_weights", "topk_ids")}
        assert torch.equal(run_experts(one)[0], together[t])


def test_nan_stays_in_its_token():
    inputs = experts_inputs(4, 264, 136, 6, 2, dtype=torch.bfloat16, device="cuda", distribution="all_to_one")
    clean = run_experts(inputs)
    inputs["hidden_states"][1] = torch.nan
    inputs["hidden_states"][2] = torch.inf
    out = run_experts(inputs)
    assert out[1].isnan().all() and not out[2].isfinite().any()
    assert torch.equal(out[0], clean[0]) and torch.equal(out[3], clean[3])


@pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_recomputed_is_kept(activation, dtype):
    inputs = experts_inputs(
        4, 264, 136, 8, 3, dtype=dtype, device="cuda", distribution="zipf", activation=activation, bias=True
    )
    cotangent = normal(4, 264, seed=9, dtype=dtype, device="cuda")
    plan = dispatch(inputs["topk_ids"], 8)
    kept, recomputed = (
        run(inputs, cotangent, plan, activation=activation, recompute=recompute) for recompute in (False, True)
    )
    assert torch.equal(kept[0], recomputed[0])
    for name, grad in kept[1].items():
        assert torch.equal(grad, recomputed[1][name]), name
    assert torch.equal(kept[0], run_experts(inputs, plan, activation=activation)), "nothing is kept without gradients"


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_same_bits_100_times_under_load(size):
    inputs = experts_inputs(*size, dtype=torch.bfloat16, device="cuda", distribution="zipf", bias=True)
    plan = dispatch(inputs["topk_ids"], size[3])
    first, load = run_experts(inputs, plan).clone(), Load()
    assert first.isfinite().all()
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for number in range(100):
        load.start(number)
        different += (run_experts(inputs, plan) != first).any()
    torch.cuda.synchronize()
    assert not different, f"of 100 runs {int(different)} differ"


def made_tokens(count: int, experts: int, top_k: int, hidden: int):
    """`count` times four tokens, as they come to one layer after another: states, weights and ids."""
    distributions = ("uniform", "all_to_one", "dropped", "zipf", "one_token")
    made = [
        experts_inputs(4, hidden, 8, experts, top_k, dtype=torch.bfloat16, device="cuda", seed=i, distribution=d)
        for i, d in zip(range(count), distributions * count, strict=False)
    ]
    return [{name: m[name] for name in ("hidden_states", "topk_weights", "topk_ids")} for m in made]


def test_plans_and_weights_that_change_right_before():
    """One step after another without a pause: the kernels before write the plan and the weights, in memory that a step
    ago was read."""
    weights = [
        experts_inputs(1, 512, 256, 64, 4, dtype=torch.bfloat16, device="cuda", seed=seed, bias=True)
        for seed in (10, 20, 30)
    ]
    tokens = made_tokens(16, 64, 4, 512)
    static = {name: tensor.clone() for name, tensor in (weights[0] | tokens[0]).items()}

    def step(number: int) -> torch.Tensor:
        for name, tensor in (weights[number % 3] | tokens[number % 16]).items():
            static[name].copy_(tensor)
        return run_experts(static)

    expected = []
    for number in range(48):
        expected.append(step(number).clone())
        torch.cuda.synchronize()
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for number in range(480):
        different += (step(number) != expected[number % 48]).any()
    assert not different, f"of 480 steps {int(different)} differ"


def test_graph_replay_with_other_routing():
    """Layers one after another in one capture; then the tokens, the ids and so the load of every expert change."""
    layers = [
        experts_inputs(4, 512, 264, 32, 4, dtype=torch.bfloat16, device="cuda", seed=10 * layer, bias=True)
        for layer in range(4)
    ]
    tokens = made_tokens(8, 32, 4, 512)
    static = {name: tensor.clone() for name, tensor in tokens[0].items()}

    def model(given, pause: bool = False) -> torch.Tensor:
        x = given["hidden_states"]
        for layer, weights in enumerate(layers):
            inputs = weights | given | {"hidden_states": x, "topk_ids": (given["topk_ids"] + layer).clamp(max=31)}
            x = x + run_experts(inputs)
            if pause:
                torch.cuda.synchronize()
        return x

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        model(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = model(static)
    expected = [model(given, pause=True) for given in tokens]
    for _ in range(10):
        for given, truth in zip(tokens, expected, strict=True):
            for name, tensor in given.items():
                static[name].copy_(tensor)
            graph.replay()
            assert truth.isfinite().all() and torch.equal(out, truth)


def test_no_host_sync():
    inputs = experts_inputs(2, 64, 72, 5, 2, dtype=torch.bfloat16, device="cuda", bias=True)
    given = leaves(inputs)
    run_experts(given).sum().backward()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        plan = dispatch(inputs["topk_ids"], 5)
        for recompute in (False, True):
            run_experts(given, plan, recompute=recompute).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_weights_past_int32():
    """E * 2 * I * H is above 2**31: the last expert's rows lie past it."""
    hidden, inner, experts = 4096, 2312, 128
    assert experts * 2 * inner * hidden > 2**31
    g = torch.Generator(device="cuda").manual_seed(1)
    up, down = (
        torch.empty(experts, *shape, device="cuda", dtype=torch.bfloat16).normal_(std=shape[1] ** -0.5, generator=g)
        for shape in ((2 * inner, hidden), (hidden, inner))
    )
    chosen = torch.tensor([0, experts - 1], device="cuda")
    x = normal(1, hidden, seed=1, dtype=torch.bfloat16, device="cuda")
    weights = torch.tensor([[0.4, 0.6]], device="cuda")
    inputs = {"hidden_states": x, "gate_up_proj": up, "down_proj": down, "topk_weights": weights}
    out = run_experts(inputs | {"topk_ids": chosen[None]})
    few = [x, up[chosen], down[chosen]]
    ids = torch.tensor([[0, 1]], device="cuda")
    truth = oracle.experts(*(t.double() for t in few), weights.double(), ids)
    tolerance.close(out, truth, oracle.experts(*few, weights, ids), what="output")


def test_more_tokens_take_tiles():
    assert is_matrix_vector(SIZES[0])
    assert not is_matrix_vector((64, *SIZES[0][1:]))


def test_blocks_a_multiprocessor():
    """Three, which hide memory's latency, if registers and shared memory leave room for them."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("three blocks fit where a multiprocessor has 227 KB of shared memory for them")
    inputs = experts_inputs(1, 2048, 1536, 64, 8, dtype=torch.bfloat16, device="cuda")
    plan = dispatch(inputs["topk_ids"], 64)
    run_experts(inputs, plan)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run_experts(inputs, plan)
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    kernels = {e["name"]: e["args"]["grid"] for e in events if "multiply_rows" in e["name"]}
    blocks = 3 * torch.cuda.get_device_properties(0).multi_processor_count
    assert list(kernels.values()) == [[blocks, 1, 1]] * 2, kernels
