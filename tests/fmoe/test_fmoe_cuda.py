"""FastMoE's names on a GPU: the outputs, losses and gradients of the same weights on the CPU, and the plain formulas.

What the layer and the gates compute is tested on the CPU; here that the GPU computes the same, in every precision.
"""

import copy

import fmoe_reference as reference
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fmoe_cases import D, E, H, T, assert_same, by_formula, gradients, make, tokens
from support.poison import poison
from support.same_draws import same_draws
from support.tolerance import BACKWARD, close
from test_fmoe_experts import FirstGate, FlatGate, OneArgument, Pair, Stacked, TwoArguments
from test_fmoe_layer import ACTIVATIONS, GATES
from test_fmoe_state_dict import Host
from torch import nn

from fastmoe_cpp import parallel
from fastmoe_cpp.fmoe import DistributedGroupedDataParallel, FMoE, FMoELinear, FMoETransformerMLP, balance, functions
from fastmoe_cpp.fmoe import native as fmoe_cuda
from fastmoe_cpp.fmoe.gates import FasterGate, NaiveGate
from fastmoe_cpp.fmoe.gates.utils import limit_by_capacity, prune_by_count
from fastmoe_cpp.fmoe.layers import _fmoe_general_global_forward

pytestmark = pytest.mark.cuda
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def poisoned():
    poison()


def there(tree):
    """A tree of tensors as leaves of their own on the GPU."""
    if isinstance(tree, list):
        return [there(t) for t in tree]
    if isinstance(tree, dict):
        return {k: there(t) for k, t in tree.items()}
    return tree.detach().to(DEVICE).requires_grad_(tree.requires_grad)


def here(named):
    return {name: None if t is None else t.detach().cpu() for name, t in named.items()}


def assert_on_gpu(*tensors):
    assert all(t.device.type == DEVICE for t in tensors)


def assert_same_on_both(layer, inp, leaf=lambda tree: tree, relative=1e-11, seed=11):
    """layer(inp) and a copy of both on the GPU: leaf of the output, the gate's loss and every gradient of both."""
    results = []
    for device in ("cpu", DEVICE):
        where = layer if device == "cpu" else copy.deepcopy(layer).to(DEVICE)
        given = inp if device == "cpu" else there(inp)
        with same_draws(seed):
            output = leaf(where(given))
        assert output.device.type == device
        named = {"y": output} | gradients(where, leaf(given), output)
        loss = where.gate.get_loss() if hasattr(where.gate, "get_loss") else None
        if loss is not None:
            assert loss.device.type == device
            named["loss"] = loss
            if loss.requires_grad and loss.grad_fn is not None:
                found = torch.autograd.grad(loss.sum(), list(where.gate.parameters()), allow_unused=True)
                named |= {f"loss to {i}": g for i, g in enumerate(found)}
        results.append(here(named))
    assert_same(results[1], results[0], relative)


# --- the layer and its gates ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [F.gelu, torch.tanh], ids=["fused", "between products"])
@pytest.mark.parametrize("name", GATES)
def test_every_gate(name, activation, training):
    gate, top_k = GATES[name]
    layer = make(gate, top_k, activation).train(training)
    if name in ("gshard", "dc", "switch"):
        layer.gate.capacity = (0.8, 0.5)
    assert_same_on_both(layer, tokens())


@pytest.mark.parametrize("fraction", ["0", "0.14", "1"])
def test_faster_gate_of_several_nodes(monkeypatch, fraction):
    monkeypatch.setenv("FMOE_TOPO_GPUS_PER_NODE", "2")
    monkeypatch.setenv("FMOE_TOPO_OUTGOING_FRACTION", fraction)
    gate, x = FasterGate(D, 2, 4, 1).double(), tokens()
    other, y = copy.deepcopy(gate).to(DEVICE), there(x)
    (ids, scores), (expected_ids, expected) = other(y), gate(x)
    assert_on_gpu(ids, scores)
    assert torch.equal(ids.cpu(), expected_ids)
    losses = [g.get_loss() for g in (other, gate)]
    assert_same(
        here({"scores": scores, "loss": losses[0]} | gradients(other, y, scores)),
        {"scores": expected, "loss": losses[1]} | gradients(gate, x, expected),
    )


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation(name):
    assert_same_on_both(make(activation=copy.deepcopy(ACTIVATIONS[name][0])), tokens())


@pytest.mark.parametrize("shape", [(3, 7), (0,), (1,), (0, 5)])
@pytest.mark.parametrize("activation", [F.gelu, torch.tanh], ids=["fused", "between products"])
def test_shapes(shape, activation):
    layer, x = make(activation=activation), tokens(*shape)
    if x.numel():
        return assert_same_on_both(layer, x)
    layer, x = layer.to(DEVICE), there(x)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


# the wide one is of sizes that kernels of a Hopper GPU take
SIZES = {"small": (T, D, H), "wide": (300, 64, 128)}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", [F.gelu, torch.tanh], ids=["fused", "between products"])
def test_dtypes(dtype, activation, size):
    count, width, inner = SIZES[size]
    layer = FMoETransformerMLP(E, width, inner, activation)
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.normal_(0, 0.4 * (10 / width) ** 0.5)
        # no near ties, whose order would be rounding's
        layer.gate.gate.weight.mul_(4)
    layer = layer.to(dtype)
    x = torch.randn(count, width).to(dtype).requires_grad_()
    exact, x64 = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    truth, eager = by_formula(exact, x64), by_formula(layer, x)
    ours, given = copy.deepcopy(layer).to(DEVICE), there(x)
    poison()
    output = ours(given)
    assert_on_gpu(output)
    assert output.dtype == dtype
    close(output.cpu(), truth, eager, units=4.0, of=dtype)
    truths, eagers = gradients(exact, x64, truth), gradients(layer, x, eager)
    for name, grad in here(gradients(ours, given, output)).items():
        close(grad, truths[name], eagers[name], factor=BACKWARD, what=name, units=8.0, of=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", [F.gelu, torch.tanh], ids=["fused", "between products"])
def test_autocast(activation, dtype):
    layer = make(activation=activation, dtype=torch.float32)
    x = tokens(dtype=torch.float32)
    exact = by_formula(copy.deepcopy(layer).double(), x.double())
    layer = layer.to(DEVICE)
    with torch.autocast(DEVICE, dtype):
        output = layer(there(x))
    assert output.dtype == dtype
    output.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().max() > 0 for p in layer.parameters())
    assert (output.cpu() - exact).abs().max() < 0.03 * exact.abs().max()


@pytest.mark.parametrize("name", ["naive", "noisy", "gshard", "dc", "switch", "zero"])
def test_the_fused_layer_does_not_wait_for_the_gpu(name):
    gate, top_k = GATES[name]
    layer, x = make(gate, top_k, dtype=torch.float32).to(DEVICE), there(tokens(dtype=torch.float32))

    def step():
        output = layer(x)
        loss = layer.gate.get_loss()
        (output.square().sum() + (0 if loss is None else loss.sum())).backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- state dicts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("each", [True, False], ids=["one name an expert", "stacked"])
def test_state_dicts_of_both_eras(each, tmp_path):
    experts, width, inner = 3, 4, 6
    host = Host(each)
    torch.save(host.state_dict(), tmp_path / "layer.pt")
    layer = FMoETransformerMLP(experts, width, inner, nn.ReLU()).to(DEVICE)
    assert layer.load_state_dict(torch.load(tmp_path / "layer.pt", map_location=DEVICE)) == ([], [])
    x = torch.randn(9, width)
    output = layer(x.to(DEVICE))
    ids, scores = layer.gate(x.to(DEVICE))
    assert_on_gpu(output, ids, scores)
    expected = torch.stack([
        sum(scores[t, k].cpu() * host.mlp(int(ids[t, k]), x[t]) for k in range(2)) for t in range(9)
    ])  # fmt: skip
    torch.testing.assert_close(output.cpu(), expected)
    # what is written goes back to the CPU under FastMoE's names of today, and from memory of one device to the other
    written = layer.state_dict()
    assert_on_gpu(*written.values())
    assert list(written) == list(Host(True).state_dict())
    torch.save(written, tmp_path / "again.pt")
    back = FMoETransformerMLP(experts, width, inner, nn.ReLU())
    back.load_state_dict(torch.load(tmp_path / "again.pt", map_location="cpu"))
    assert_same(dict(back.named_parameters()), here(dict(layer.named_parameters())), 0.0)
    straight = FMoETransformerMLP(experts, width, inner, nn.ReLU())
    straight.load_state_dict(written)
    assert_same(dict(straight.named_parameters()), dict(back.named_parameters()), 0.0)


# --- experts of the user's own, trees, masks, hooks -------------------------------------------------------------------


@pytest.mark.parametrize(
    "expert", [OneArgument, TwoArguments, [OneArgument, TwoArguments, OneArgument]], ids=["one", "two", "list"]
)
def test_any_expert(expert):
    assert_same_on_both(FMoE(4, D, expert=expert, top_k=2).double(), tokens())


@pytest.mark.parametrize("activation", [F.gelu, torch.tanh], ids=["fused", "between products"])
def test_experts_in_one_module(activation):
    assert_same_on_both(Stacked(activation).double(), tokens())


@pytest.mark.parametrize("kind", [list, dict])
@pytest.mark.parametrize("leaf", [0, 1])
def test_trees(kind, leaf):
    layer = FMoE(E, D, expert=Pair, gate=FirstGate).double()
    parts = [tokens(), torch.randn(T, 3, dtype=torch.float64, requires_grad=True)]
    inp = parts if kind is list else dict(zip("xy", parts, strict=True))
    key = {list: (0, 1), dict: ("x", "z")}[kind][leaf]

    def pick(tree):
        if kind is dict and "z" not in tree:  # the input, whose leaves have other names
            return tree["xy"[leaf]]
        return tree[key]

    assert_same_on_both(layer, inp, pick)


def test_rows_of_more_axes_and_integers():
    class Picture(nn.Module):
        def __init__(self, d_model):
            super().__init__()
            self.conv = nn.Conv1d(2, 3, 1)

        def forward(self, inp, count):
            return self.conv(inp["picture"]) * inp["factor"][:, None, None]

    class ByFeature(NaiveGate):
        def forward(self, inp):
            return super().forward(inp["picture"].flatten(1))

    layer = FMoE(3, 12, expert=Picture, gate=ByFeature).double()
    inp = {
        "picture": torch.randn(T, 2, 6, dtype=torch.float64, requires_grad=True),
        "factor": torch.randint(1, 9, (T,)),
    }
    assert_same_on_both(layer, inp, lambda tree: tree["picture"] if isinstance(tree, dict) else tree)


@pytest.mark.parametrize("where", ["cpu", DEVICE])
@pytest.mark.parametrize("activation", [F.gelu, torch.tanh], ids=["fused", "between products"])
def test_mask(activation, where):
    """The mask and what fills it may be on either device."""
    filler, each = torch.randn(D, dtype=torch.float64), torch.randn(2, D, dtype=torch.float64)
    mask = torch.randint(0, 4, (T,))
    mask[:4] = torch.arange(4)
    results = []
    for device in ("cpu", DEVICE):
        at = "cpu" if device == "cpu" else where
        one = filler.to(at).requires_grad_()
        torch.manual_seed(1)
        layer = make(activation=activation, mask=mask.view(1, T).to(at), mask_dict={1: one, 2: each.to(at)}).to(device)
        torch.manual_seed(2)
        x = tokens(device=device)
        output = layer(x)
        (to_filler,) = torch.autograd.grad(output.sin().sum(), one, retain_graph=True)
        results.append(here({"y": output, "filler": to_filler} | gradients(layer, x, output)))
    assert_same(results[1], results[0])


def test_gate_hook():
    calls = []
    layer = make(gate_hook=lambda *given: calls.append(given)).to(DEVICE)
    x = there(tokens())
    layer(x)
    ((ids, scores, nothing),) = calls
    assert_on_gpu(ids, scores)
    assert torch.equal(ids, layer.gate(x)[0]) and torch.equal(scores, layer.gate(x)[1]) and nothing is None
    profile = {}
    balance.reset_balance_profile(profile, 1, "gshard")
    balance.update_balance_profile(profile, ids, scores, None, 0, E, "gshard")
    expected = {}
    balance.reset_balance_profile(expected, 1, "gshard")
    balance.update_balance_profile(expected, ids.cpu(), scores.cpu(), None, 0, E, "gshard")
    for name in balance.metrics:
        torch.testing.assert_close(profile[name][0].cpu(), expected[name][0])


def test_a_gate_of_other_shapes_and_ids_from_the_cpu():
    class Given(FlatGate):
        def forward(self, inp):
            ids, scores = super().forward(inp)
            return ids.to(inp.device), scores.to(inp.device)

    assert_same_on_both(make(Given, 3), tokens())


@pytest.mark.parametrize("where", ["cpu", DEVICE])
def test_linear(where):
    """The numbers of rows may be on either device."""
    linear, x = FMoELinear(3, 4, 5).double(), torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    nn.init.normal_(linear.bias)
    expected = torch.cat(
        [F.linear(x[:2], linear.weight[0], linear.bias[0]), F.linear(x[2:], linear.weight[2], linear.bias[2])]
    )
    ours, given = copy.deepcopy(linear).to(DEVICE), there(x)
    poison()
    output = ours(given, torch.tensor([2, 0, 4], device=where))
    assert_on_gpu(output)
    assert_same(here({"y": output} | gradients(ours, given, output)), {"y": expected} | gradients(linear, x, expected))


def test_training_steps():
    """Losses of five steps of a small network, and its weights afterwards."""
    results = []
    for device in ("cpu", DEVICE):
        torch.manual_seed(4)
        net = nn.Sequential(nn.Linear(D, D), make(), FMoE(3, D, expert=OneArgument), nn.Linear(D, 2)).double()
        net, x = net.to(device), tokens(device=device).detach()
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = (net(x) - x[:, :2]).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        assert losses[-1] < losses[0]
        results.append(here({"losses": torch.stack(losses)} | dict(net.named_parameters())))
    # Adam's division makes more of the rounding
    assert_same(results[1], results[0], 1e-8)


# --- functions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(13,), (13, 2), (0, 2)])
def test_counting_and_moving(shape):
    gate = torch.randint(-1, E, shape)
    on_gpu = gate.to(DEVICE)
    pos, local, global_ = functions.count_by_gate(on_gpu, E, 1)
    assert_on_gpu(pos, local, global_)
    for mine, theirs in zip((pos, local, global_), functions.count_by_gate(gate, E, 1), strict=True):
        assert torch.equal(mine.cpu(), theirs) and mine.dtype == theirs.dtype
    pos, local, global_, counts, size = functions.prepare_forward(on_gpu, E, 1)
    assert local.device.type == global_.device.type == counts.device.type == "cpu"
    k = 2 if len(shape) == 2 else 1
    x = torch.randn(shape[0], 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    rows = functions.MOEScatter.apply(x, pos // k, local, global_, size, 1)
    assert torch.equal(rows, x[pos // k])
    output = functions.MOEGather.apply(rows * 2, pos, local, global_, shape[0] * k, 1)
    expected = (2 * x).repeat_interleave(k, 0) * (on_gpu.view(-1, 1) >= 0)
    assert torch.equal(output, expected)
    weights = torch.randn_like(output)
    ours, theirs = (torch.autograd.grad((y * weights).sum(), x, retain_graph=True)[0] for y in (output, expected))
    torch.testing.assert_close(ours, theirs)
    general = _fmoe_general_global_forward(x, on_gpu, lambda rows, counts: rows * 3, E, 1)
    assert torch.equal(general, 1.5 * expected)


def test_pruning_and_the_native_module():
    ids = torch.randint(-1, E, (40, 2))
    allowed = torch.tensor([2, 1, 0, 30, 3])
    assert torch.equal(prune_by_count(ids.to(DEVICE), allowed.to(DEVICE)).cpu(), prune_by_count(ids, allowed))
    for mine, theirs in zip(limit_by_capacity(ids.to(DEVICE), E, 1, 4), limit_by_capacity(ids, E, 1, 4), strict=True):
        assert torch.equal(mine.cpu(), theirs)
    results = []
    for device in ("cpu", DEVICE):
        given, counts = ids.to(device), torch.zeros(E, dtype=torch.int32, device=device)
        fmoe_cuda.expert_count(given, counts)
        pos = torch.empty(int(counts.sum()), dtype=torch.int64, device=device)
        fmoe_cuda.assign_pos(counts.cumsum(0).int(), given, pos)
        pruned = fmoe_cuda.prune_gate_by_capacity(given, allowed.to(device, torch.int32), E, 1)
        asked = torch.tensor([3, 1, 4, 2, 5, 0], device=device)
        granted = fmoe_cuda.limit_by_capacity(asked, torch.tensor([4, 0, 4], device=device, dtype=torch.int32), 3, 2)
        results.append([counts.cpu(), pos.cpu(), pruned.cpu(), granted.cpu()])
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine, theirs)


# --- one process, NCCL ------------------------------------------------------------------------------------------------


@pytest.fixture
def nccl():
    if DEVICE == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_data_parallel_over_nccl(nccl, dtype):
    layer = make(dtype=dtype).to(DEVICE)
    layer.mark_parallel_comm("none")
    model = DistributedGroupedDataParallel(layer)
    x = tokens(dtype=dtype, device=DEVICE)
    assert torch.equal(model(x), layer(x))
    weights = {n: p.detach().clone() for n, p in layer.named_parameters()}
    model(x).float().square().sum().backward()
    before = {n: p.grad.clone() for n, p in layer.named_parameters()}
    for options in ({}, {"no_scale": True}, {"reduce_after": True}, {"fp32_allreduce": True}):
        model.allreduce_gradients(**options)
    # the mean and the sum over one process are its own gradients
    assert_same({n: p.grad for n, p in layer.named_parameters()}, before, 0.0)
    assert_same(dict(layer.named_parameters()), weights, 0.0)
    layer.gate.gate.bias.grad = None
    model.allreduce_params()
    assert layer.gate.gate.bias.grad is None


def test_the_layer_with_groups_over_nccl(nccl):
    torch.manual_seed(6)
    plain = make()
    torch.manual_seed(6)
    grouped = make(moe_group=nccl, slice_group=nccl)
    x = tokens()
    ours, given = grouped.to(DEVICE), there(x)
    output, expected = ours(given), plain(x)
    assert_same(here({"y": output} | gradients(ours, given, output)), {"y": expected} | gradients(plain, x, expected))


def test_collectives_over_nccl(nccl):
    functions.ensure_comm(torch.zeros(1), nccl)
    x = torch.randn(7, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    weights = torch.randn_like(x)
    part = functions.Slice.apply(x, 0, 1, nccl)
    whole = functions.AllGather.apply(part, 0, 1, nccl)
    moved = functions.exchange_rows(x, [7], [7], nccl)
    counts = torch.arange(4, device=DEVICE)
    assert torch.equal(parallel.exchange_counts(counts, nccl), counts)
    for output in (part, whole, moved):
        assert_on_gpu(output)
        assert torch.equal(output, x)
        (found,) = torch.autograd.grad((output * weights).sum(), x, retain_graph=True)
        assert torch.equal(found, weights)


def test_the_formula_itself():
    """Without the CPU's layer between: the sum over experts in plain torch, on the GPU."""
    layer, x = make(top_k=3).to(DEVICE), tokens(device=DEVICE)
    ids, scores = layer.gate(x)
    expected = reference.moe(
        x, ids, scores, reference.mlps(layer.experts.htoh4, layer.experts.h4toh, layer.experts.activation)
    )
    output = layer(x)
    assert_same(gradients(layer, x, output) | {"y": output}, gradients(layer, x, expected) | {"y": expected})
