"""Any number of ranks computes what one rank computes: outputs, gradients, norms, losses, expert bias, training."""

import pytest
import torch
import torch.distributed as dist
from modules.cases import config
from support.distributions import ids as ids_of
from support.ranks import device, run_ranks

from distributed.layers import CASES, LENGTH, SEQUENCES, batch, ep_mesh, full, near, pair
from fastmoe_cpp.parallel import average_gradients, grad_norm

#: Counted or normalised over each rank's own tokens: these are not the whole batch's by definition.
OWN_TOKENS = {"switch", "capacity", "sinkhorn"}
ROUTINGS = ("uniform", "zipf", "all_to_one", "last_empty", "duplicates", "dropped")
TWELVE = config({"renormalize": False}, num_experts=12, top_k=5, bias=True, weight_on_input=True)


def step(layer, x, cotangent, scale, topk_ids=None):
    """Gradients of scale * <output, cotangent> + aux loss, and everything the layer returns."""
    x = x.clone().requires_grad_()
    out = layer.forward_with_routing(x, topk_ids=topk_ids)
    (scale * (out.hidden_states * cotangent).sum() + out.aux_loss).backward()
    return out, x.grad


def same_as_one_rank(rank, mesh, case, sequences, routing=None, **style):
    ranks = len(sequences)
    whole, spread = pair(case, mesh, **style)
    c = whole.config
    inputs, cotangents = batch(sequences, c.hidden_size), batch(sequences, c.hidden_size, seed=1)
    ids = None
    if routing is not None:
        ids = ids_of(routing, sum(sequences) * LENGTH, c.num_experts, c.top_k, seed=3)[0].to(device())
    out, x_grad = step(whole, torch.cat(inputs), torch.cat(cotangents), 1.0, ids)
    own = slice(sum(sequences[:rank]), sum(sequences[: rank + 1]))
    mine = slice(own.start * LENGTH, own.stop * LENGTH)
    got, got_x_grad = step(spread, inputs[rank], cotangents[rank], float(ranks), None if ids is None else ids[mine])

    what = f"{case}, sequences {sequences}, {routing or 'routed'}"
    assert torch.equal(got.topk_ids, out.topk_ids[mine]) and torch.equal(got.dropped, out.dropped[mine]), what
    near(got.hidden_states, out.hidden_states[own], f"output, {what}")
    near(got_x_grad / ranks, x_grad[own], f"input gradient, {what}")
    for loss in ("balance_loss", "z_loss", "aux_loss"):
        mean = getattr(got, loss).detach().clone()
        dist.all_reduce(mean)
        near(mean / dist.get_world_size(), getattr(out, loss).detach(), f"{loss}, {what}")
    average_gradients(spread, mesh)
    for (name, p), (_, q) in zip(whole.named_parameters(), spread.named_parameters(), strict=True):
        expected = torch.zeros_like(p) if p.grad is None else p.grad
        near(full(q.grad, p), expected, f"gradient of {name}, {what}")
    for norm_type in (2.0, 1.0, float("inf")):
        expected = torch.nn.utils.get_total_norm([p.grad for p in whole.parameters() if p.grad is not None], norm_type)
        near(grad_norm(spread, norm_type), expected.double(), f"norm, {what}")
    whole.update_expert_bias()
    spread.update_expert_bias()
    if whole.router.expert_bias is not None:
        assert torch.equal(whole.router.expert_bias, spread.router.expert_bias), what


def outputs_of_own_tokens(rank, mesh, case, sequences, **style):
    """Capacity and Sinkhorn are of each rank's tokens, so each rank's outputs are one rank's for those tokens."""
    whole, spread = pair(case, mesh, **style)
    x = batch(sequences, whole.config.hidden_size)[rank]
    for training in (True, False):
        one, many = (layer.train(training).forward_with_routing(x) for layer in (whole, spread))
        near(many.hidden_states, one.hidden_states, f"{case}, sequences {sequences}")
        assert torch.equal(one.dropped, many.dropped) and torch.equal(one.tokens_per_expert, many.tokens_per_expert)


def check_ranks(rank, ranks, **style):
    check_mesh(ep_mesh(ranks), rank, ranks, **style)


def check_mesh(mesh, rank, ranks, cases=tuple(CASES), routings=ROUTINGS, **style):
    """Every case over a mesh on which this rank has the tokens of number `rank` of `ranks`."""
    for case in cases:
        if CASES[case].num_experts % ranks:
            continue
        for sequences in SEQUENCES[ranks]:
            if case in OWN_TOKENS:
                outputs_of_own_tokens(rank, mesh, case, sequences, **style)
            else:
                same_as_one_rank(rank, mesh, case, sequences, **style)
    for routing in routings:
        for sequences in SEQUENCES[ranks]:
            # 12 experts, so that any of these numbers of ranks divides them
            same_as_one_rank(rank, mesh, TWELVE, sequences, routing, **style)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_one_step_is_one_ranks(ranks, backend, enough):
    enough(ranks)
    run_ranks(check_ranks, ranks, ranks, backend=backend)
