"""The same bits every run, for any number of threads, and through either of the two doors."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from support.catalogue import CATALOGUE, calls, run, tensors
from support.samples import dispatch, experts_inputs, leaves, normal, ops, run_experts

from fastmoe_cpp import _C

SIZES = {"tokens": 300, "hidden": 129, "inner": 65, "experts": 17, "top_k": 3}


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def everything(name, device, dtype):
    """Copies of all an operator returns, and of what it changed in place."""
    out = []
    for call in calls(name, device=device, dtype=dtype, **SIZES):
        result = run(name, call)
        out += [t.clone() for t in tensors(result)] or [call.args[0].clone()]
    return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_repeats(name, dtype, device):
    first = everything(name, device, dtype)
    for _ in range(3):
        for a, b in zip(first, everything(name, device, dtype), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_thread_count(name, dtype, threads):
    threads(1)
    one = everything(name, "cpu", dtype)
    for count in (2, 3, 8):
        threads(count)
        for a, b in zip(one, everything(name, "cpu", dtype), strict=True):
            assert torch.equal(a, b), count


@pytest.mark.parametrize("distribution", ["uniform", "zipf", "all_to_one"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_forward_and_backward_of_the_whole_at_any_thread_count(dtype, distribution, threads):
    """Large enough that rows, columns and experts are all shared out."""
    inputs = experts_inputs(520, 200, 96, 6, 2, dtype=dtype, distribution=distribution, bias=True)
    cotangent = normal(520, 200, seed=9, dtype=dtype)
    results = []
    for count in (1, 2, 5):
        threads(count)
        given = leaves(inputs)
        out = run_experts(given)
        results.append(
            [out, *torch.autograd.grad(out, [v for v in given.values() if v.is_floating_point()], cotangent)]
        )
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_long_plans_at_any_thread_count(threads):
    ids = torch.randint(-1, 64, (40000, 2), generator=torch.Generator().manual_seed(0))
    weights = torch.rand(40000, 2, generator=torch.Generator().manual_seed(1))
    plans = []
    for count in (1, 2, 5):
        threads(count)
        plans.append([*dispatch(ids, 64), *dispatch(ids, 64, topk_weights=weights, capacity=500, drop_policy="probs")])
    for other in plans[1:]:
        for a, b in zip(plans[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.skipif(sys.platform != "linux", reason="the threads of a process are set by the environment")
def test_a_process_of_one_thread_gives_the_same_bits():
    """OMP_NUM_THREADS, and not only torch.set_num_threads."""
    script = (
        "import hashlib, torch, sys; sys.path.insert(0, sys.argv[1]); import fastmoe_cpp\n"
        "from support.samples import experts_inputs, leaves, run_experts\n"
        "given = leaves(experts_inputs(300, 129, 65, 7, 2, dtype=torch.float32)); out = run_experts(given)\n"
        "grads = torch.autograd.grad(out.sum(), [v for v in given.values() if v.is_floating_point()])\n"
        "print(hashlib.sha256(b''.join(t.detach().numpy().tobytes() for t in (out, *grads))).hexdigest())"
    )
    tests = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    digests = set()
    for count in ("1", "4"):
        threads = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}
        done = subprocess.run(
            [sys.executable, "-c", script, tests], env=os.environ | threads, capture_output=True, text=True, check=True,
            cwd=os.path.dirname(tests),
        )  # fmt: skip
        digests.add(done.stdout.strip())
    assert len(digests) == 1


def test_pybind_module_and_torch_ops_give_the_same_bits(device):
    """fastmoe_cpp._C binds the same autograd functions: same results, same gradients, same defaults."""
    bound = [n for n in dir(_C) if n in CATALOGUE]
    below_autograd = ("_backward", "_backward_accumulate", "_forward")
    assert sorted(bound) == sorted(n for n in CATALOGUE if not n.endswith(below_autograd))
    for name in bound:
        for one, two in zip(calls(name, device=device, grad=True), calls(name, device=device, grad=True), strict=True):
            a, b = tensors(run(name, one)), tensors(getattr(_C, name)(*two.args, **two.kwargs))
            if name == "update_expert_bias":
                a, b = [one.args[0]], [two.args[0]]
            for x, y in zip(a, b, strict=True):
                assert torch.equal(x, y) and x.requires_grad == y.requires_grad
            for x, y in zip(a, b, strict=True):
                if not x.requires_grad:
                    continue
                left = [t for t in one.args if torch.is_tensor(t) and t.requires_grad]
                right = [t for t in two.args if torch.is_tensor(t) and t.requires_grad]
                for p, q in zip(
                    torch.autograd.grad(x.sum(), left, retain_graph=True, allow_unused=True),
                    torch.autograd.grad(y.sum(), right, retain_graph=True, allow_unused=True),
                    strict=True,
                ):
                    assert (p is None) == (q is None) and (p is None or torch.equal(p, q))


def test_pybind_module_lets_other_threads_run():
    """What an operator waits for may need the interpreter on another thread: an exchange its group's."""
    given = experts_inputs(4096, 512, 1024, 8, 2, dtype=torch.float32)
    plan = ops.dispatch(given["topk_ids"], 8)[:3]
    begun, ended = threading.Event(), threading.Event()

    def multiply() -> None:
        begun.set()
        _C.experts(given["hidden_states"], given["gate_up_proj"], given["down_proj"], given["topk_weights"], *plan)
        ended.set()

    worker = threading.Thread(target=multiply)
    worker.start()
    begun.wait()
    turns = 0
    while not ended.wait(1e-3):
        turns += 1
    worker.join()
    assert turns > 5


def test_pybind_module_refuses_in_the_same_sentence():
    logits = torch.zeros(3, 4)
    sentences = []
    for door in (ops, _C):
        with pytest.raises(ValueError) as caught:
            door.route(logits, 5)
        sentences.append(str(caught.value))
    assert sentences[0] == sentences[1]
