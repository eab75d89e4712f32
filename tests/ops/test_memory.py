"""No growth of memory over a thousand small steps whose routing, sizes and options vary."""

import gc
import weakref

import pytest
import torch
from support import threads
from support.samples import dispatch, experts_inputs, leaves, ops, run_experts


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096


def step(i, device):
    g = torch.Generator().manual_seed(i)
    tokens = int(torch.randint(0, 64, (1,), generator=g))
    inputs = experts_inputs(tokens, 64, 16, 6, 2, dtype=torch.float32, device=device, seed=i % 7, bias=bool(i % 2))
    given = leaves(inputs)
    logits = torch.randn(tokens, 6, generator=g).to(device).requires_grad_()
    weights, ids, scores = ops.route(logits, 2, score_function=("softmax", "sigmoid")[i % 2])
    plan = dispatch(ids, 6, capacity=(None, 0, 3)[i % 3])
    given["topk_weights"] = weights
    out = run_experts(given, plan, recompute=bool(i % 5), activation="swiglu")
    loss = out.square().sum() + ops.balance_loss(scores[None], plan.tokens_per_expert[None], 0.1) + ops.z_loss(logits)
    rows = ops.gather(given["hidden_states"], *plan[:3])
    loss = loss + ops.combine(ops.grouped_linear(rows, given["gate_up_proj"], plan[2]), weights, *plan[:3]).sum()
    loss.backward()
    with torch.no_grad():
        run_experts(given, plan)


def failing_step(i, device):
    """Errors unwind without leaving anything behind."""
    inputs = leaves(experts_inputs(5, 16, 8, 6, 2, dtype=torch.float32, device=device))
    with pytest.raises(ValueError):
        run_experts(inputs | {"down_proj": inputs["down_proj"][:, :-1]})
    with pytest.raises(ValueError):
        ops.route(inputs["hidden_states"], 17 + i % 5)


@pytest.mark.parametrize("kind,count", [(step, 600), (failing_step, 1200)])
@threads.one_thread()
def test_no_growth(kind, count, device):
    def used():
        gc.collect()
        return torch.cuda.memory_allocated() if device == "cuda" else resident()

    for i in range(count // 4):
        kind(i, device)
    tensors = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
    # one leaked [T, H] tensor a step would be 5 MB; the C library's arenas may move by less, and the system's huge
    # pages come and go, so what counts is growth in every round
    allowed = 0 if device == "cuda" else 2 * 2**20
    growth = []
    while len(growth) < 3 and all(g > allowed for g in growth):
        before = used()
        for i in range(count):
            kind(i, device)
        growth.append(used() - before)
    assert growth[-1] <= allowed, f"{growth} bytes more in rounds of {count} steps"
    assert sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()) <= tensors


def test_backward_frees_what_forward_kept(device):
    """The pre-activation and the plan live exactly as long as the graph."""
    inputs = leaves(experts_inputs(9, 16, 8, 6, 2, dtype=torch.float32, device=device))
    plan = dispatch(inputs["topk_ids"], 6)
    alive = weakref.ref(plan.slot_index)
    out = run_experts(inputs, plan)
    out.sum().backward()
    del plan, out
    gc.collect()
    assert alive() is None
