"""The operators under torch.compile, activation checkpointing, autocast, inference mode, functorch and dispatch
modes."""

import pytest
import torch
from support import oracle, tolerance
from support.samples import dispatch, experts_inputs, leaves, normal, ops, run_experts
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastmoe_cpp.recompute import routing_saved

E, K, H, I = 6, 2, 8, 5
FLOATS = ("x", "router", "gate_up", "down")


def parameters(device, dtype=torch.float32, seed=0):
    made = experts_inputs(1, H, I, E, K, dtype=dtype, device=device, seed=seed)
    router = normal(E, H, seed=seed + 7, dtype=torch.float32, device=device)
    return [t.requires_grad_() for t in (router, made["gate_up_proj"], made["down_proj"])]


def layer(x, router, gate_up, down):
    """Router, dispatch, experts and the losses beside the router, all by torch.ops."""
    logits = ops.router_logits(x, router)
    weights, ids, scores = ops.route(logits, K)
    slot_index, token_slot, offsets, counts = ops.dispatch(ids, E)
    out = ops.experts(x, gate_up, down, weights, slot_index, token_slot, offsets)
    balance = ops.balance_loss(scores[None], ops.expert_counts(ids[None], E), 1e-3)
    return out, balance + ops.z_loss(logits, 1e-3), counts


def layer_by_rows(x, router, gate_up, down):
    """The same from gather, grouped_linear and combine."""
    weights, ids, _ = ops.route(ops.router_logits(x, router), K)
    slot_index, token_slot, offsets, counts = ops.dispatch(ids, E, capacity=x.shape[0] // 2)
    rows = ops.gather(x, slot_index, token_slot, offsets)
    gate, up = ops.grouped_linear(rows, gate_up, offsets).chunk(2, dim=-1)
    rows = ops.grouped_linear(torch.nn.functional.silu(gate) * up, down, offsets)
    return ops.combine(rows, weights, slot_index, token_slot, offsets), weights.square().sum(), counts


def run(function, x, params):
    """Outputs and the gradients of all of them."""
    x = x.detach().requires_grad_()
    out, loss, counts = function(x, *params)
    grads = torch.autograd.grad(out.square().sum() + loss, [x, *params])
    return [out, loss, counts, *grads]


def same(a, b):
    for one, two in zip(a, b, strict=True):
        assert torch.equal(one, two)


# torch.compile


@pytest.mark.parametrize("function", [layer, layer_by_rows])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compile_static(function, dtype, device):
    torch._dynamo.reset()
    params = parameters(device, dtype)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)
    for tokens in (7, 1, 0):
        x = normal(tokens, H, seed=3, dtype=dtype, device=device)
        same(run(compiled, x, params), run(function, x, params))


@pytest.mark.parametrize("function", [layer, layer_by_rows])
def test_compile_dynamic(function, device):
    """One graph for every number of tokens from two on: nothing guards on data, or on T."""
    torch._dynamo.reset()
    params = parameters(device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    for tokens in (7, 13, 2, 64, 129):
        x = normal(tokens, H, seed=3, device=device, dtype=torch.float32)
        same(run(compiled, x, params), run(function, x, params))
    assert counter.frame_count == 1
    for tokens in (0, 1):
        x = normal(tokens, H, seed=3, device=device, dtype=torch.float32)
        same(run(compiled, x, params), run(function, x, params))


def test_compile_updates_the_expert_bias_in_place(device):
    torch._dynamo.reset()

    def step(bias, counts):
        ops.update_expert_bias(bias, counts, 0.1, True)
        return bias * 1

    one, two = torch.zeros(4, device=device), torch.zeros(4, device=device)
    counts = torch.tensor([5, 0, 1, 2], device=device)
    same([step(one, counts), one], [torch.compile(step, fullgraph=True, backend="aot_eager")(two, counts), two])
    assert two.abs().sum() > 0


def test_compile_refuses_bad_shapes_with_the_operators_sentence(device):
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: ops.route(t, 9)[0], fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="top_k must be between 1 and the number of experts 6, got 9"):
        compiled(torch.zeros(3, E, device=device))


# activation checkpointing


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("function", [layer, layer_by_rows])
def test_checkpoint_gives_the_same_bits(function, reentrant, device):
    params = parameters(device)
    x = normal(23, H, seed=3, dtype=torch.float32, device=device)

    def again(*args):
        return checkpoint(function, *args, use_reentrant=reentrant)

    x.requires_grad_()
    plain = run(function, x, params)
    leaf = x.detach().requires_grad_()
    out, loss, counts = again(leaf, *params)
    for p in params:
        p.grad = None
    (out.square().sum() + loss).backward()
    same(plain, [out, loss, counts, leaf.grad, *(p.grad for p in params)])


class Count(TorchDispatchMode):
    """How often each operator of ours runs."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastmoe_cpp":
            self.calls[func._opname] = self.calls.get(func._opname, 0) + 1
        return func(*args, **(kwargs or {}))


def test_selective_checkpoint_computes_the_experts_again_and_not_the_routing(device):
    params = parameters(device)
    x = normal(23, H, seed=3, dtype=torch.float32, device=device)
    plain = run(layer, x, params)
    with Count() as count:
        again = run(lambda *a: checkpoint(layer, *a, use_reentrant=False, context_fn=routing_saved), x, params)
    same(plain, again)
    assert count.calls["route"] == count.calls["dispatch"] == 1
    assert count.calls["router_logits"] == 2 and count.calls["experts_forward"] == 2


# autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast(dtype, backward_inside, device):
    """Experts in the autocast dtype, routing in float32, gradients in each leaf's own dtype."""
    params = parameters(device)
    x = normal(9, H, seed=3, dtype=torch.float32, device=device).requires_grad_()
    with torch.autocast(device, dtype):
        logits = ops.router_logits(x, params[0])
        weights, ids, scores = ops.route(logits, K)
        plan = dispatch(ids, E)
        out = ops.experts(x, *params[1:], weights, *plan[:3])
        assert (logits.dtype, weights.dtype, scores.dtype, out.dtype) == (torch.float32,) * 3 + (dtype,)
        if backward_inside:
            grads = torch.autograd.grad(out.float().square().sum(), [x, *params])
    if not backward_inside:
        grads = torch.autograd.grad(out.float().square().sum(), [x, *params])
    assert all(g.dtype == torch.float32 and g.isfinite().all() and g.abs().sum() > 0 for g in grads)
    # what autocast means: the same as casting by hand
    y = x.detach().to(dtype).requires_grad_()
    hand = [p.detach().to(dtype).requires_grad_() for p in params[1:]]
    by_hand = ops.experts(y, *hand, weights.detach(), *plan[:3])
    assert torch.equal(out, by_hand)
    by_hand.backward(2 * by_hand.detach())
    for g, p in zip(grads[2:], hand, strict=True):
        assert torch.equal(g.to(dtype), p.grad)


def test_autocast_of_bfloat16_activations_and_float32_weights(device):
    """As a block sees them in mixed precision; the gradient of each in its own dtype."""
    params = parameters(device)
    x = normal(9, H, seed=3, dtype=torch.bfloat16, device=device).requires_grad_()
    biases = [normal(E, 2 * I, seed=4, dtype=torch.float32, device=device).requires_grad_(), None]
    with torch.autocast(device, torch.bfloat16):
        weights, ids, _ = ops.route(ops.router_logits(x, params[0]), K)
        plan = dispatch(ids, E)
        out = ops.experts(x, *params[1:], weights, *plan[:3], gate_up_bias=biases[0])
    grads = torch.autograd.grad(out.sum(), [x, *params, biases[0]])
    assert [g.dtype for g in grads] == [torch.bfloat16] + [torch.float32] * 4
    with pytest.raises(TypeError, match="^gate_up_proj must have the dtype of hidden_states"):
        ops.experts(x, *params[1:], weights, *plan[:3])


def test_autocast_leaves_float64_alone_and_casts_grouped_linear(device):
    inputs = experts_inputs(9, H, I, E, K, device=device)
    rows, weight = (
        normal(18, H, dtype=torch.float32, device=device),
        normal(E, I, H, dtype=torch.float32, device=device),
    )
    plan = dispatch(inputs["topk_ids"], E)
    with torch.autocast(device, torch.bfloat16):
        assert run_experts(inputs, plan).dtype == torch.float64
        assert ops.grouped_linear(rows, weight, plan.expert_offsets).dtype == torch.bfloat16
        assert ops.combine(rows, None, *plan[:3]).dtype == ops.gather(rows[:9], *plan[:3]).dtype == torch.float32
        with torch.autocast(device, enabled=False):
            assert ops.grouped_linear(rows, weight, plan.expert_offsets).dtype == torch.float32


# inference mode, and what autograd keeps


def test_inference_mode(device):
    params = parameters(device)
    x = normal(9, H, seed=3, dtype=torch.float32, device=device)
    expected = layer(x, *params)
    with torch.inference_mode():
        out = layer(x, *params)
        again = layer(x.clone(), *(p.clone() for p in params))
        rows = layer_by_rows(x, *params)
    assert all(t.is_inference() for t in (*out, *rows))
    same(expected, out)
    same(expected, again)


def saved_by(function):
    sizes = []

    def pack(t):
        sizes.append(list(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return sizes


def test_nothing_is_kept_without_gradients(device):
    params = parameters(device)
    x = normal(9, H, seed=3, dtype=torch.float32, device=device)
    with torch.no_grad():
        assert saved_by(lambda: layer(x, *params)) == []
    frozen = [p.detach() for p in params]
    assert saved_by(lambda: layer(x, *frozen)) == []


def test_backward_keeps_the_input_the_pre_activation_and_the_routing(device):
    """Neither the activation [P, I] nor a row of an expert's output [P, H]; recompute keeps the input alone."""
    inputs = leaves(experts_inputs(9, H, I, E, K, device=device))
    plan = dispatch(inputs["topk_ids"], E)
    always = [[9, H], [E, 2 * I, H], [E, H, I], [9, K], [18], [9, K], [E + 1]]
    assert saved_by(lambda: run_experts(inputs, plan)) == [*always, [18, 2 * I]]
    assert saved_by(lambda: run_experts(inputs, plan, recompute=True)) == always


def test_frozen_weights_get_no_gradient_and_the_rest_do(device):
    """A masked-out gradient is None, whichever it is."""
    base = experts_inputs(9, H, I, E, K, device=device, bias=True)
    floats = [n for n in base if base[n].is_floating_point()]
    full = leaves(base)
    run_experts(full).sum().backward()
    for only in floats:
        given = {k: v.clone() for k, v in base.items()}
        given[only].requires_grad_()
        run_experts(given).sum().backward()
        assert torch.equal(given[only].grad, full[only].grad)


# functorch


def test_functorch_differentiation_is_refused_by_torch(device):
    """C++ autograd functions know no functional transforms: torch says so, whichever transform differentiates."""
    params = parameters(device)
    logits, x = normal(4, E, dtype=torch.float32, device=device), normal(3, H, dtype=torch.float32, device=device)
    for attempt in (
        lambda: torch.func.grad(lambda t: ops.z_loss(t))(logits),
        lambda: torch.func.vjp(lambda t: ops.route(t, K)[0], logits)[1](torch.ones(4, K, device=device)),
        lambda: torch.func.jacrev(lambda t: layer(t, *params)[0])(x),
    ):
        with pytest.raises(
            RuntimeError, match=r"^cannot use C\+\+ torch::autograd::Function with functorch transforms"
        ):
            attempt()


def test_forward_mode_is_refused_and_not_silently_zero(device):
    """A tangent that is lost on the way is a wrong derivative."""
    logits = normal(4, E, dtype=torch.float32, device=device)
    for function in (ops.z_loss, lambda t: ops.route(t, K)[0].sum(), lambda t: ops.router_logits(t, t).sum()):
        with pytest.raises((RuntimeError, NotImplementedError)):
            torch.func.jvp(function, (logits,), (torch.ones_like(logits),))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(logits, torch.ones_like(logits))
            with pytest.raises((RuntimeError, NotImplementedError)):
                function(dual)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_runs_sample_by_sample(device):
    """No batching rule, so torch's fallback loops; what comes out is right."""
    params = [p.detach() for p in parameters(device)]
    x = normal(3, 5, H, dtype=torch.float32, device=device)
    batched = torch.func.vmap(lambda t: layer(t, *params)[:2])(x)
    for i in range(3):
        same([b[i] for b in batched], layer(x[i], *params)[:2])


# the whole composition against the oracle: what each stage's own test can't see is the wiring


@pytest.mark.parametrize("function", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_router_gradient_of_the_whole_layer(function, device):
    """Through the routing weights into logits, router weight and hidden states, with the losses added."""
    x, router = normal(11, H, seed=3, device=device), normal(E, H, seed=7, device=device)
    made = experts_inputs(1, H, I, E, K, device=device)
    values = [x, router, made["gate_up_proj"], made["down_proj"]]

    def ours(x, router, gate_up, down):
        logits = ops.router_logits(x, router)
        weights, ids, scores = ops.route(logits, K, score_function=function, scaling_factor=2.5)
        out = ops.experts(x, gate_up, down, weights, *dispatch(ids, E)[:3])
        balance = ops.balance_loss(scores[None], ops.expert_counts(ids[None], E), 0.01)
        return out.square().sum() + balance + ops.z_loss(logits, 0.1)

    def theirs(x, router, gate_up, down):
        logits = oracle.router_logits(x, router)
        ids = oracle.select(oracle.selection_keys(logits.detach(), function), K)
        weights, scores = oracle.routing_weights(logits, ids, function, scaling=2.5)
        out = oracle.experts(x, gate_up, down, weights, ids)
        balance = oracle.balance_loss(scores[None], oracle.expert_counts(ids[None], E), 0.01)
        return out.square().sum() + balance + oracle.z_loss(logits, 0.1)

    results = []
    for f in (ours, theirs):
        given = [v.clone().requires_grad_() for v in values]
        results.append(torch.autograd.grad(f(*given), given))
    for name, a, b in zip(FLOATS, *results, strict=True):
        tolerance.close(a, b, what=f"gradient of {name}")
