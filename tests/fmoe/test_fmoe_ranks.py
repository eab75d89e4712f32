"""Two processes of three experts each are one process of six: ids, outputs, losses and every gradient."""

import gc
import math
import weakref

import fmoe_reference as reference
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.ranks import run_ranks
from torch import nn

from fastmoe_cpp.fmoe import FMoE, FMoETransformerMLP, functions
from fastmoe_cpp.fmoe.gates import (
    DCGate,
    FasterGate,
    GShardGate,
    NaiveGate,
    NoisyGate,
    SwipeGate,
    SwitchGate,
    ZeroGate,
)

W, LOCAL, D, H = 2, 3, 8, 10
E = W * LOCAL
RATES = (0.7, 0.4)


class Own(nn.Module):
    """An expert of the user's own, of two tensors."""

    def __init__(self, d_model):
        super().__init__()
        self.linear = nn.Linear(d_model, d_model)

    def forward(self, inp):
        return [self.linear(inp[0]).tanh() * inp[1]]


class OfOne(nn.Linear):
    def __init__(self, d_model):
        super().__init__(d_model, d_model)


class OfTheFirst(NaiveGate):
    def forward(self, inp, return_all_scores=False):
        return super().forward(inp[0], return_all_scores)


# gate, top_k, activation (None: experts of the user's own), tokens on each process
CASES = {
    "naive": (NaiveGate, 2, "gelu", (17, 17)),
    "naive, another activation": (NaiveGate, 3, "tanh", (17, 17)),
    "no token on one": (NaiveGate, 2, "gelu", (0, 11)),
    "no token on one, another activation": (NaiveGate, 2, "tanh", (11, 0)),
    "all to the first": (ZeroGate, 2, "gelu", (9, 5)),
    "all to the first, another activation": (ZeroGate, 2, "tanh", (9, 5)),
    "experts of one's own": (OfTheFirst, 2, None, (13, 13)),
    "gshard": (GShardGate, 2, "relu", (17, 17)),
    "dc": (DCGate, 2, "tanh", (17, 17)),
    "switch": (SwitchGate, 1, "gelu", (17, 17)),
    "noisy": (NoisyGate, 2, "silu", (17, 17)),
    "swipe": (SwipeGate, 2, "gelu", (17, 17)),
    "swipe, other loads": (SwipeGate, 3, "gelu", (5, 21)),
    "faster": (FasterGate, 2, "gelu", (17, 17)),
    "mask": (NaiveGate, 2, "gelu", (17, 17)),
}
ACTIVATIONS = {"gelu": F.gelu, "tanh": torch.tanh, "relu": F.relu, "silu": F.silu}


def values(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(name, world_size):
    """The layer of a case, of one process or of this one of two, with the same weights."""
    gate, top_k, activation, counts = CASES[name]
    num_expert = E // world_size
    rank = dist.get_rank() if world_size > 1 else 0
    if world_size > 1:
        options = {}
        if name == "mask":
            options = {"mask": mask(rank, counts[rank]), "mask_dict": {1: values(99, D)}}
        if activation is None:
            layer = FMoE(num_expert, D, world_size, gate=gate, top_k=top_k, expert=Own)
        else:
            layer = FMoETransformerMLP(
                num_expert, D, H, ACTIVATIONS[activation], world_size=world_size, gate=gate, top_k=top_k, **options
            )
    elif activation is None:
        layer = FMoE(E, D, gate=OfTheFirst, top_k=top_k, expert=Own)
    else:
        # the reference has its own gates: this one holds the weights
        layer = FMoETransformerMLP(E, D, H, ACTIVATIONS[activation], gate=gate if gate is not FasterGate else NaiveGate,
                                   top_k=top_k)  # fmt: skip
    layer.double()
    with torch.no_grad():
        for index, parameter in enumerate(layer.gate.parameters()):
            parameter.copy_(values(index, *parameter.shape))
        if activation is None:
            for i, expert in enumerate(layer.experts):
                expert.linear.weight.copy_(values(100 + rank * num_expert + i, D, D) * 0.5)
                expert.linear.bias.copy_(values(200 + rank * num_expert + i, D))
        else:
            for seed, parameter in enumerate(layer.experts.parameters()):
                whole = values(50 + seed, E, *parameter.shape[1:]) * 0.5
                parameter.copy_(whole[rank * num_expert : (rank + 1) * num_expert])
    if hasattr(layer.gate, "capacity"):
        layer.gate.capacity = RATES
    return layer


def mask(rank, tokens):
    return (torch.arange(tokens) + rank) % 3 % 2


def inputs(name, rank):
    tokens = CASES[name][3][rank]
    x = (values(7 + rank, tokens, D) + (0.8 if rank else 0)).requires_grad_()
    return [x, values(17 + rank, tokens, 1)] if CASES[name][2] is None else x


def objective(output, rank):
    output = output[0] if isinstance(output, list) else output
    return (output * values(27 + rank, *output.shape)).sum()


def on_a_rank(rank, names):
    results = {}
    for name in names:
        layer, x = made(name, W), inputs(name, rank)
        choices = []
        layer.gate_hook = lambda ids, scores, nothing, to=choices: to.extend((ids, scores.detach()))
        torch.manual_seed(60 + rank)
        output = layer(x)
        total = objective(output, rank)
        loss = layer.gate.get_loss()
        if loss is not None:
            total = total + 3 * loss.sum()
        total.backward()
        results[name] = {
            "ids": choices[0],
            "scores": choices[1],
            "output": (output[0] if isinstance(output, list) else output).detach(),
            "loss": None if loss is None else loss.detach(),
            "x": (x[0] if isinstance(x, list) else x).grad,
            "gate": {n: p.grad for n, p in layer.gate.named_parameters()},
            "experts": {n: p.grad for n, p in layer.experts.named_parameters()},
        }
    return results


def everything(rank):
    return on_a_rank(rank, CASES) | {"functions": the_functions(rank)}


@pytest.fixture(scope="module")
def of_two():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMOE_TOPO_GPUS_PER_NODE", "1")
        return run_ranks(everything, W)


def expected_choices(name, layer, xs):
    """ids, scores and loss on each process, by the formulas."""
    gate, top_k, _, counts = CASES[name]
    xs = [x[0] if isinstance(x, list) else x for x in xs]
    if gate is ZeroGate:
        return [
            (torch.zeros(n, top_k, dtype=torch.int64), torch.full((n, top_k), 0.5, dtype=torch.float64), None)
            for n in counts
        ]
    if gate is NoisyGate:
        chosen = []
        for rank, x in enumerate(xs):
            torch.manual_seed(60 + rank)
            noise = torch.randn(counts[rank], E, dtype=torch.float64)
            deviation = F.softplus(x @ layer.gate.w_noise) + 1e-2
            chosen.append(reference.noisy(x @ layer.gate.w_gate, deviation, noise, top_k))
        return chosen
    logits = [F.linear(x, layer.gate.gate.weight, layer.gate.gate.bias) for x in xs]
    plain = [reference.naive(z, top_k) for z in logits]
    if gate is SwipeGate:
        ids = reference.swipe([ids for ids, _ in plain], counts, LOCAL)
        return [(i, torch.softmax(z.gather(1, i), -1), None) for i, z in zip(ids, logits, strict=True)]
    if gate is FasterGate:
        made_of = [
            reference.faster(z, torch.arange(E) // LOCAL != r, int(counts[r] * 0.14)) for r, z in enumerate(logits)
        ]
        return [(*c, reference.gshard_loss(z, LOCAL)) for c, z in zip(made_of, logits, strict=True)]
    if gate is SwitchGate:
        noise = []
        for rank in range(W):
            torch.manual_seed(60 + rank)
            noise.append(torch.rand(counts[rank], E, dtype=torch.float64) * 0.2 + 0.9)
        noised = [z + n for z, n in zip(logits, noise, strict=True)]
        capacity = math.ceil(RATES[0] * counts[0] / LOCAL)
        kept = reference.keep_first(torch.cat([z.argmax(-1, keepdim=True) for z in noised]), [capacity] * E)
        out = []
        for ids, z in zip(kept.split(list(counts)), noised, strict=True):
            valid, probs = ids[ids >= 0], torch.softmax(z, -1)
            share = torch.bincount(valid, minlength=E).double() / valid.numel()
            out.append((ids, probs.max(-1, keepdim=True).values, (share * probs.sum(0) / valid.numel()).sum() * E))
        return out
    if gate in (GShardGate, DCGate):
        drawn = []
        for rank in range(W):
            torch.manual_seed(60 + rank)
            drawn.append(torch.rand(counts[rank]))
        capacity = math.ceil(RATES[0] * counts[0])
        if gate is GShardGate:
            kept = [reference.keep_first(ids, [capacity * 2 // E] * E) for ids, _ in plain]
        else:
            kept = reference.keep_first(torch.cat([ids for ids, _ in plain]), [capacity] * E).split(list(counts))
        kept = [ids.clone() for ids in kept]
        for ids, (_, scores), u in zip(kept, plain, drawn, strict=True):
            ids[2 * scores[:, 1] < u, 1] = -1
        return [(i, p[1], reference.gshard_loss(z, LOCAL)) for i, p, z in zip(kept, plain, logits, strict=True)]
    return [(*p, None) for p in plain]


def near(actual, expected, what):
    size = float(expected.detach().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(
        actual, expected.detach(), rtol=0, atol=1e-11 * size + 1e-14, msg=lambda m: f"{what}: {m}"
    )


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(of_two, name):
    layer, xs = made(name, 1), [inputs(name, r) for r in range(W)]
    activation = CASES[name][2]
    if activation is None:
        experts = layer.experts
    else:
        experts = reference.mlps(layer.experts.htoh4, layer.experts.h4toh, ACTIVATIONS[activation])
    total = torch.zeros((), dtype=torch.float64)
    for rank, (ids, scores, loss) in enumerate(expected_choices(name, layer, xs)):
        got, x = of_two[rank][name], xs[rank]
        assert torch.equal(got["ids"], ids)
        near(got["scores"], scores, "scores")
        if activation is None:
            rows = [
                sum(scores[t, k] * experts[int(ids[t, k])]([x[0][t], x[1][t]])[0] for k in range(2))
                for t in range(len(ids))
            ]
            output = torch.stack(rows)
        else:
            served = ids
            if name == "mask":
                here = mask(rank, len(ids))
                served = ids.masked_fill(here[:, None] != 0, -1)
            output = reference.moe(x, served, scores, experts)
            if name == "mask":
                output = torch.where(here[:, None] == 1, scores.sum(1, keepdim=True) * values(99, D), output)
        near(got["output"], output, "output")
        total = total + objective(output, rank)
        if loss is not None:
            near(got["loss"], loss, "loss")
            total = total + 3 * loss
    wanted = [x[0] if isinstance(x, list) else x for x in xs]
    names = [n for n, _ in layer.named_parameters()]
    grads = torch.autograd.grad(total, [*wanted, *layer.parameters()], allow_unused=True)
    for rank in range(W):
        near(of_two[rank][name]["x"], torch.zeros_like(wanted[rank]) if grads[rank] is None else grads[rank], "x")
    for key, grad in zip(names, grads[W:], strict=True):
        part, _, rest = key.partition(".")
        if part == "gate":
            parts = [of_two[r][name]["gate"][rest] for r in range(W)]
            if grad is not None:
                near(sum(parts), grad, key)
        elif activation is None:
            index, _, inner = rest.partition(".")
            owner, local = divmod(int(index), LOCAL)
            near(of_two[owner][name]["experts"][f"{local}.{inner}"], grad, key)
        else:
            near(torch.cat([of_two[r][name]["experts"][rest] for r in range(W)]), grad, key)


def test_the_cases_show_something(of_two):
    ids = {name: [of_two[r][name]["ids"] for r in range(W)] for name in CASES}
    for name in ("gshard", "dc", "switch"):
        assert all((i == -1).any() for i in ids[name]), name
    # DC and Switch serve process 0 first
    assert (ids["switch"][1] == -1).sum() > (ids["switch"][0] == -1).sum()
    for name in ("swipe", "swipe, other loads"):
        plain = reference.naive(
            torch.cat([F.linear(inputs(name, r), *made(name, 1).gate.gate.parameters()) for r in range(W)]),
            CASES[name][1],
        )[0]
        assert not torch.equal(torch.cat(ids[name]), plain), f"{name} moves no token"


# --- slices and functions ---------------------------------------------------------------------------------------------


def sliced(rank, world_size):
    """Both processes hold the same tokens, an odd number, and slice them; with one expert group or none."""
    torch.manual_seed(0)
    layer = FMoETransformerMLP(
        E // world_size, D, H, world_size=world_size, slice_group=dist.group.WORLD,
        mask=mask(0, 9), mask_dict={1: values(99, D)},
    ).double()  # fmt: skip
    with torch.no_grad():
        for seed, parameter in enumerate(layer.experts.parameters()):
            whole = values(50 + seed, E, *parameter.shape[1:])
            first = rank * parameter.shape[0] if world_size > 1 else 0
            parameter.copy_(whole[first : first + parameter.shape[0]])
        for seed, parameter in enumerate(layer.gate.parameters()):
            parameter.copy_(values(seed, *parameter.shape))
    x = values(7, 9, D).requires_grad_()
    output = layer(x)
    objective(output, 0).backward()
    return {
        "output": output.detach(), "x": x.grad, "gate": layer.gate.gate.weight.grad,
        "htoh4": layer.experts.htoh4.weight.grad,
    }  # fmt: skip


def the_functions(rank):
    results = {"sliced": sliced(rank, W), "sliced alone": sliced(rank, 1)}
    # different numbers on each process
    part = values(rank, 2 + rank, 3).requires_grad_()
    whole = functions.AllGather.apply(part, rank, W, dist.group.WORLD)
    (whole * values(5, 5, 3)).sum().backward()
    results["gathered"], results["gathered grad"] = whole.detach(), part.grad

    functions.ensure_comm(part, None)
    assert functions.get_moe_group() is dist.group.WORLD
    gate = torch.randint(-1, E, (7, 2), generator=torch.Generator().manual_seed(rank))
    x = values(30 + rank, 7, D).requires_grad_()
    pos, local, global_, here, size = functions.prepare_forward(gate, LOCAL, W)
    rows = functions.MOEScatter.apply(x, pos // 2, local, global_, size, W)
    factor = torch.arange(1.0, LOCAL + 1).double().repeat_interleave(here)[:, None] + 10 * rank
    output = functions.MOEGather.apply(rows * factor, pos, local, global_, 14, W)
    objective(output, rank).backward()
    results |= {"gate": gate, "local": local, "global": global_, "rows": rows.detach(), "choices": output.detach(),
                "x": x.grad}  # fmt: skip
    results["refused"] = []
    alone = [dist.new_group([r]) for r in range(W)]
    for world_size, group in ((3, None), (2, alone[rank]), (2, alone[1 - rank])):
        try:
            FMoE(2, D, world_size, expert=OfOne, moe_group=group)(x)
        except ValueError as error:
            results["refused"].append(str(error))
    return results


def test_slices_and_functions(of_two):
    results = [result["functions"] for result in of_two]
    layer = FMoETransformerMLP(E, D, H, mask=mask(0, 9), mask_dict={1: values(99, D)}).double()
    with torch.no_grad():
        for seed, parameter in enumerate(layer.experts.parameters()):
            parameter.copy_(values(50 + seed, *parameter.shape))
        for seed, parameter in enumerate(layer.gate.parameters()):
            parameter.copy_(values(seed, *parameter.shape))
    x = values(7, 9, D).requires_grad_()
    output = layer(x)
    objective(output, 0).backward()
    for result in results:
        for kind in ("sliced", "sliced alone"):
            near(result[kind]["output"], output, kind)
            near(result[kind]["x"], x.grad, kind)
    for kind in ("sliced", "sliced alone"):
        near(sum(r[kind]["gate"] for r in results), layer.gate.gate.weight.grad, kind)
    near(torch.cat([r["sliced"]["htoh4"] for r in results]), layer.experts.htoh4.weight.grad, "experts")
    near(sum(r["sliced alone"]["htoh4"] for r in results), layer.experts.htoh4.weight.grad, "experts")

    gathered = torch.cat([values(0, 2, 3), values(1, 3, 3)])
    for rank, result in enumerate(results):
        assert torch.equal(result["gathered"], gathered)
        assert torch.equal(result["gathered grad"], values(5, 5, 3)[2 * rank : 2 + 3 * rank])

    counts = [torch.bincount(r["gate"][r["gate"] >= 0], minlength=E) for r in results]
    for rank, result in enumerate(results):
        assert torch.equal(result["local"], counts[rank])
        mine = slice(rank * LOCAL, (rank + 1) * LOCAL)
        assert torch.equal(result["global"], torch.cat([c[mine] for c in counts]))
        expected_rows = [
            values(30 + source, 7, D)[t]
            for e in range(LOCAL)
            for source in range(W)
            for t in range(7)
            for k in range(2)
            if results[source]["gate"][t, k] == rank * LOCAL + e
        ]
        assert torch.equal(result["rows"], torch.stack(expected_rows))
        x, gate = values(30 + rank, 7, D).requires_grad_(), result["gate"]
        factor = torch.where(gate >= 0, gate % LOCAL + 1 + 10 * (gate // LOCAL), 0)
        choices = x.repeat_interleave(2, 0) * factor.reshape(-1, 1)
        near(result["choices"], choices, "choices")
        near(result["x"], torch.autograd.grad(objective(choices, rank), x)[0], "x")
        result["refused"][2] = result["refused"][2].split(", got")[0]
        assert result["refused"] == [
            "world_size must be the number of processes in all processes, 2, got 3",
            "world_size must be the number of processes in moe_group, 1, got 2",
            "moe_group must be a ProcessGroup that this process is in",
        ]


def a_group_destroyed(rank):
    group = dist.new_group(range(W))
    layer = FMoETransformerMLP(LOCAL, D, H, world_size=W, moe_group=group)
    layer(torch.randn(5, D)).sum().backward()
    found = functions.get_moe_group() is group
    seen = weakref.ref(group)
    dist.destroy_process_group(group)
    del group, layer
    gc.collect()
    return found, seen() is None, functions.get_moe_group() is None


def test_a_destroyed_group_is_not_kept_alive():
    # its threads would go on, and end the process if it ended while one of them dropped a tensor
    assert run_ranks(a_group_destroyed, W) == [(True, True, True)] * W
