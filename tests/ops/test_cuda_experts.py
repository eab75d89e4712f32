"""The experts and the grouped linear layer on the GPU, each on the portable path and on the one the shape would choose:
against the float64 oracle on memory filled with NaN, the same bits again, no host sync, inside a CUDA graph, and past
2**31 elements."""

from __future__ import annotations

import pytest
import torch
from support import matrix, oracle, pairwise, tolerance
from support.distributions import NAMES
from support.poison import poison
from support.samples import DTYPES, Plan, dispatch, experts_inputs, leaves, normal, ops, run_experts

pytestmark = pytest.mark.cuda

LEAVES = ("hidden_states", "gate_up_proj", "down_proj", "topk_weights", "gate_up_bias", "down_bias")
PATHS = ("portable", "")  # values of FASTMOE_CPP_PATH; empty: by shape and device
BUDGET = {"work": 2e9, "weights": 1e7, "rows": 1e7}
CASES = matrix.experts_cases(
    BUDGET, seed=2, path=PATHS, distribution=[n for n in NAMES if n != "nan_rows"], activation=oracle.ACTIVATIONS,
    bias=("none", "up", "down", "both"), interleaved=(False, True), weight_on_input=(False, True),
    recompute=(False, True),
)  # fmt: skip
# T, H, I, E, K for every size of tile: few rows an expert, some, many; whole tiles and ragged ones; element-wise sizes.
TILES = [
    (16, 256, 128, 32, 2), (40, 72, 40, 33, 4), (129, 136, 72, 8, 2), (700, 264, 136, 16, 1), (2048, 512, 256, 4, 2),
    (1500, 648, 328, 3, 1), (1024, 128, 64, 1, 1), (300, 133, 67, 5, 2), (257, 1, 1, 2, 1),
]  # fmt: skip


@pytest.fixture(autouse=True)
def poisoned() -> None:
    poison()


def run(inputs, cotangent, plan: Plan | None = None, **options):
    """Output and the gradients of every leaf."""
    given = leaves(inputs)
    out = run_experts(given, plan, **options)
    names = [n for n in LEAVES if n in given]
    return out.detach(), dict(zip(names, torch.autograd.grad(out, [given[n] for n in names], cotangent), strict=True))


def oracle_run(inputs, dtype, cotangent, **options):
    cast = {
        k: v.detach().to(oracle.wide(dtype) if k == "topk_weights" else dtype).requires_grad_() if k in LEAVES else v
        for k, v in inputs.items()
    }
    out = oracle.experts(
        cast["hidden_states"], cast["gate_up_proj"], cast["down_proj"], cast["topk_weights"], cast["topk_ids"],
        gate_up_bias=cast.get("gate_up_bias"), down_bias=cast.get("down_bias"), **options,
    )  # fmt: skip
    names = [n for n in LEAVES if n in cast]
    grads = oracle.grads(out, [cast[n] for n in names], cotangent.to(dtype))
    return out.detach(), dict(zip(names, grads, strict=True))


def check(inputs, dtype, *, recompute=False, **options):
    cotangent = normal(*inputs["hidden_states"].shape, seed=9, dtype=dtype, device="cuda")
    truth, true_grads = oracle_run(inputs, torch.float64, cotangent, **options)
    eager, eager_grads = oracle_run(inputs, dtype, cotangent, **options)
    poison()
    out, grads = run(inputs, cotangent, recompute=recompute, **options)
    magnitude = 0.0
    if 0 < truth.numel() < tolerance.FEW:  # eager torch's error is luck: the size of the terms is the measure
        unsigned = inputs | {"down_proj": inputs["down_proj"].abs()}
        magnitude = float(oracle_run(unsigned, torch.float64, cotangent, **options)[0].abs().max())
    tolerance.close(out, truth, eager, what="output", magnitude=magnitude)
    # a routing weight's gradient is a product of two rows: where its terms cancel, what is left is their rounding
    rows = (cotangent.double() * truth).norm(dim=1)
    product = 2 * float(rows.max()) if rows.numel() else 0.0
    for name, grad in grads.items():
        tolerance.close(
            grad, true_grads[name], eager_grads[name], factor=tolerance.BACKWARD, of=dtype, what=f"gradient of {name}",
            units=4, magnitude=product if name == "topk_weights" else 0.0,
        )  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=pairwise.name)
def test_against_oracle(case, monkeypatch):
    monkeypatch.setenv("FASTMOE_CPP_PATH", case["path"])
    inputs = experts_inputs(
        case["T"], case["H"], case["I"], case["E"], matrix.top_k(case), dtype=case["dtype"], device="cuda",
        distribution=case["distribution"], activation=case["activation"], bias=case["bias"],
        interleaved=case["interleaved"],
    )  # fmt: skip
    options = {k: case[k] for k in ("activation", "interleaved", "weight_on_input", "recompute")}
    check(inputs, case["dtype"], **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", TILES, ids=str)
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_every_tile(size, dtype, activation, monkeypatch):
    monkeypatch.setenv("FASTMOE_CPP_PATH", "portable")
    inputs = experts_inputs(*size, dtype=dtype, device="cuda", distribution="zipf", activation=activation, bias=True)
    check(inputs, dtype, activation=activation, weight_on_input=activation == "relu2")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows,n_in,n_out,experts", [(1000, 72, 136, 7), (37, 5, 9, 3), (600, 512, 256, 2), (64, 64, 64, 300)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_grouped_linear(rows, n_in, n_out, experts, dtype, bias, path, monkeypatch):
    """The last third of the rows belongs to nobody: zeros in every result, whatever they hold."""
    monkeypatch.setenv("FASTMOE_CPP_PATH", path)
    served = rows * 2 // 3
    g = torch.Generator().manual_seed(experts)
    ends = torch.randint(0, served + 1, (experts - 1,), generator=g).sort().values
    offsets = torch.cat([torch.zeros(1), ends, torch.tensor([served])]).int()
    values = {
        "rows": normal(rows, n_in, seed=1, dtype=dtype, device="cuda"),
        "weight": normal(experts, n_out, n_in, seed=2, std=n_in**-0.5, dtype=dtype, device="cuda"),
    }
    if bias:
        values["bias"] = normal(experts, n_out, seed=3, dtype=dtype, device="cuda")
    cotangent = normal(rows, n_out, seed=4, dtype=dtype, device="cuda")
    broken = values | {"rows": values["rows"].clone()}
    broken["rows"][served:] = torch.nan
    nan_cotangent = cotangent.clone()
    nan_cotangent[served:] = torch.nan

    def results(function, kind, given, gradient):
        given = {k: v.detach().to(kind).requires_grad_() for k, v in given.items()}
        out = function(given["rows"], given["weight"], given.get("bias"))
        return [out.detach(), *torch.autograd.grad(out, list(given.values()), gradient.to(kind))]

    def plain(x, w, b):
        return oracle.grouped_linear(x, w, offsets.tolist(), b)

    poison()
    actual = results(lambda x, w, b: ops.grouped_linear(x, w, offsets.cuda(), b), dtype, broken, nan_cotangent)
    truth = results(plain, torch.float64, values, cotangent)
    eager = results(plain, dtype, values, cotangent)
    for i, name in enumerate(["output", *values]):
        factor = tolerance.BACKWARD if i else tolerance.FORWARD
        tolerance.close(actual[i], truth[i], eager[i], factor=factor, what=name)
    assert (actual[0][served:] == 0).all() and (actual[1][served:] == 0).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_same_bits_again(path, dtype, monkeypatch):
    monkeypatch.setenv("FASTMOE_CPP_PATH", path)
    inputs = experts_inputs(1500, 264, 136, 16, 4, dtype=dtype, device="cuda", distribution="zipf", bias=True)
    cotangent = normal(1500, 264, seed=9, dtype=dtype, device="cuda")
    first = run(inputs, cotangent)
    for _ in range(20):
        again = run(inputs, cotangent)
        assert torch.equal(first[0], again[0])
        for name, grad in first[1].items():
            assert torch.equal(grad, again[1][name]), name


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("weight_on_input", [False, True])
def test_no_host_sync(path, weight_on_input, monkeypatch):
    monkeypatch.setenv("FASTMOE_CPP_PATH", path)
    inputs = experts_inputs(130, 64, 72, 5, 2, dtype=torch.bfloat16, device="cuda", bias=True)
    cotangent = normal(130, 64, seed=9, dtype=torch.bfloat16, device="cuda")
    run(inputs, cotangent, weight_on_input=weight_on_input)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        plan = dispatch(inputs["topk_ids"], 5)
        for recompute in (False, True):
            run(inputs, cotangent, plan, weight_on_input=weight_on_input, recompute=recompute)
        rows = ops.gather(inputs["hidden_states"], *plan[:3]).requires_grad_()
        weight = inputs["gate_up_proj"].detach().requires_grad_()
        ops.grouped_linear(rows, weight, plan[2]).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("path", PATHS)
def test_graph_replay_with_other_routing(path, monkeypatch):
    """One capture; then the tokens, the ids and so the load of every expert change under it."""
    monkeypatch.setenv("FASTMOE_CPP_PATH", path)
    made = [
        experts_inputs(257, 128, 64, 9, 3, dtype=torch.bfloat16, device="cuda", distribution=d, seed=i)
        for i, d in enumerate(("uniform", "all_to_one", "zipf", "last_empty", "dropped"))
    ]
    changing = ("hidden_states", "topk_weights", "topk_ids")
    static = {k: v.clone() for k, v in made[0].items()}
    cotangent = normal(257, 128, seed=9, dtype=torch.bfloat16, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(static, cotangent)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, grads = run(static, cotangent)
    for inputs in made[::-1]:
        for name in changing:
            static[name].copy_(inputs[name])
        graph.replay()
        expected, expected_grads = run({**static, **{k: inputs[k] for k in changing}}, cotangent)
        assert torch.equal(out, expected)
        for name, grad in expected_grads.items():
            assert torch.equal(grads[name], grad), name


@pytest.mark.parametrize("path", PATHS)
def test_past_int32(path, monkeypatch):
    """T * K * H is above 2**31: the last tokens' rows lie past it, forward and backward."""
    monkeypatch.setenv("FASTMOE_CPP_PATH", path)
    tokens, hidden, inner, experts, k = 81920, 3336, 8, 8, 8
    assert tokens * k * hidden > 2**31
    weights = experts_inputs(1, hidden, inner, experts, k, dtype=torch.bfloat16, device="cuda")
    g = torch.Generator(device="cuda").manual_seed(1)
    x, cotangent = (torch.randn(tokens, hidden, generator=g, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    inputs = weights | {
        "hidden_states": x,
        "topk_ids": torch.rand(tokens, experts, generator=g, device="cuda").argsort(dim=1)[:, :k],
        "topk_weights": torch.rand(tokens, k, generator=g, device="cuda"),
    }
    out, grads = run(inputs, cotangent)
    some = torch.cat([torch.arange(40), torch.arange(tokens - 40, tokens)]).cuda()
    part = inputs | {n: inputs[n][some] for n in ("hidden_states", "topk_ids", "topk_weights")}
    truth, true_grads = oracle_run(part, torch.float64, cotangent[some])
    eager, eager_grads = oracle_run(part, torch.bfloat16, cotangent[some])
    tolerance.close(out[some], truth, eager, what="output")
    for name in ("hidden_states", "topk_weights"):
        tolerance.close(
            grads[name][some],
            true_grads[name],
            eager_grads[name],
            factor=tolerance.BACKWARD,
            of=torch.bfloat16,
            what=name,
        )
    # the weight gradients of the first and the last expert, whose tokens are all of them: sums over parts of the tokens
    for expert in (0, experts - 1):
        check_weight_gradients(inputs, cotangent, grads, expert)


def check_weight_gradients(inputs, cotangent, grads, expert):
    """One expert's weight gradients against the oracle on its tokens alone, the truth a part of them at a time."""
    names = ("gate_up_proj", "down_proj")
    ids = torch.where(inputs["topk_ids"] == expert, 0, -1)
    own = inputs | {name: inputs[name][expert : expert + 1] for name in names} | {"topk_ids": ids}
    by_token = ("hidden_states", "topk_ids", "topk_weights")
    truths = {name: 0.0 for name in names}
    for part in torch.arange(len(ids), device="cuda").split(10240):
        some = own | {name: own[name][part] for name in by_token}
        found = oracle_run(some, torch.float64, cotangent[part])[1]
        truths = {name: truths[name] + found[name] for name in names}
    eager = oracle_run(own, torch.bfloat16, cotangent)[1]
    for name in names:
        tolerance.close(
            grads[name][expert : expert + 1], truths[name], eager[name], factor=tolerance.BACKWARD, of=torch.bfloat16,
            what=f"gradient of {name} of expert {expert}",
        )  # fmt: skip


def test_an_unknown_path_is_refused(monkeypatch):
    monkeypatch.setenv("FASTMOE_CPP_PATH", "fastest")
    inputs = experts_inputs(4, 8, 8, 2, 1, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(ValueError, match="FASTMOE_CPP_PATH must be unset or 'portable', got 'fastest'"):
        run_experts(inputs)
