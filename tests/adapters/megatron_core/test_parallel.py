"""Two ranks over gloo against one: experts on both, with and without tensor parallelism around them."""

import contextlib
import importlib
import multiprocessing

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks

from . import host
from .host import dist_checkpointing, parallel_state

CASES = {
    "plain": {},
    "all to rank 0": {},
    "biases, top-1 on the input": {
        "add_bias_linear": True, "moe_router_topk": 1, "moe_router_pre_softmax": True,
        "moe_apply_probs_on_input": True, "expert_tensor_parallel_size": 1,
    },
    "capacity": {"moe_expert_capacity_factor": 0.5, "moe_router_load_balancing_type": "aux_loss"},
    "losses": {
        "moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.5, "moe_z_loss_coeff": 0.1,
        "moe_shared_expert_intermediate_size": 8, "moe_layer_recompute": True,
    },
}  # fmt: skip


def inputs() -> torch.Tensor:
    """[2, s, b, H]: a batch a rank, the same on every process."""
    generator = torch.Generator().manual_seed(11)
    return torch.randn(2, host.SEQUENCE, host.BATCH, host.HIDDEN, generator=generator)


def layer_of(case: str, **changes):
    torch.manual_seed(21)
    layer = host.our_layer(host.config(**CASES[case], **changes))
    if case == "all to rank 0":
        with torch.no_grad():
            layer.router.weight.zero_()  # ties go to the experts 0 and 1
    return layer


@contextlib.contextmanager
def groups(**sizes):
    parallel_state.initialize_model_parallel(**sizes)
    yield
    parallel_state.destroy_model_parallel()


def on_rank(rank: int, folder: str) -> dict:
    """Everything that needs two ranks, by the name of its test."""
    # the host's checkpoints are written by processes of their own
    multiprocessing.current_process()._config["daemon"] = False
    with host.without_gpu():
        with groups(expert_model_parallel_size=2):
            results = {case: experts_of_two(rank, case) for case in CASES}
            checkpoints(folder)
        with groups(tensor_model_parallel_size=2, expert_model_parallel_size=2, expert_tensor_parallel_size=1):
            results["tensor parallel"] = with_tensor_parallelism(rank)
        with groups():
            results["global loss"] = global_loss(rank)
    return results


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    for name in ("one", "two"):
        (folder / name).mkdir()
    dist_checkpointing.save(layer_of("losses").sharded_state_dict(), str(folder / "one"))
    return run_ranks(on_rank, 2, str(folder)), folder


def experts_of_two(rank: int, case: str):
    layer = layer_of(case, expert_model_parallel_size=2)
    assert layer.num_local_experts == host.EXPERTS // 2
    return host.step(layer, inputs()[rank])


def checkpoints(folder: str) -> None:
    """Two ranks read what one wrote, and write."""
    layer = layer_of("losses", expert_model_parallel_size=2)
    back = host.our_layer(host.config(**CASES["losses"], expert_model_parallel_size=2))
    back.load_state_dict(dist_checkpointing.load(back.sharded_state_dict(), f"{folder}/one"))
    assert all(torch.equal(p, q) for p, q in zip(back.parameters(), layer.parameters(), strict=True))
    dist_checkpointing.save(layer.sharded_state_dict(), f"{folder}/two")


def test_checkpoints_of_other_numbers_of_ranks(of_two):
    one, layer = host.our_layer(host.config(**CASES["losses"])), layer_of("losses")
    one.load_state_dict(dist_checkpointing.load(one.sharded_state_dict(), str(of_two[1] / "two")))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), layer.parameters(), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_expert_parallel(case, of_two):
    found = [results[case] for results in of_two[0]]
    layer = layer_of(case)
    expected = [host.step(layer, x) for x in inputs()]
    for rank in (0, 1):
        host.assert_close(found[rank][0], expected[rank][0], "output")
        own = slice(rank * host.EXPERTS // 2, (rank + 1) * host.EXPERTS // 2)
        for name, gradient in found[rank][1].items():
            if name.startswith("experts."):
                both = expected[0][1][name] + expected[1][1][name]
                host.assert_close(gradient, both[own], name)
            else:
                host.assert_close(gradient, expected[rank][1][name], name)


def with_tensor_parallelism(rank: int):
    changes = dict(CASES["losses"])
    del changes["moe_shared_expert_intermediate_size"]  # those are the host's, split over tensor-parallel ranks
    layer = host.config(
        **changes, tensor_model_parallel_size=2, expert_model_parallel_size=2, expert_tensor_parallel_size=1,
        sequence_parallel=True,
    )  # fmt: skip
    torch.manual_seed(21)
    layer = host.our_layer(layer)
    assert layer.router.weight.sequence_parallel
    # the norm of gradients counts every rank's experts: before 0.19 it asks for the group around the experts
    layers = importlib.import_module("megatron.core.tensor_parallel.layers")
    for parameter in layer.experts.parameters():
        group = parallel_state.get_tensor_model_parallel_group()
        assert layers.param_is_not_tensor_parallel_duplicate(parameter, group)
    x = inputs()[0].chunk(2, dim=0)[rank]
    x = x.clone().requires_grad_()
    output, _ = layer(x)
    weight = torch.linspace(-1, 1, 2 * output.numel()).reshape(host.SEQUENCE, host.BATCH, host.HIDDEN)
    (output * weight.chunk(2, dim=0)[rank]).sum().backward()
    dist.all_reduce(layer.router.weight.grad)  # as finalize_model_grads does where sequence_parallel is set
    return output.detach(), layer.router.weight.grad, layer.experts.linear_fc1.weight.grad


def test_tensor_and_expert_parallel(of_two):
    found = [results["tensor parallel"] for results in of_two[0]]
    changes = dict(CASES["losses"])
    del changes["moe_shared_expert_intermediate_size"]
    torch.manual_seed(21)
    layer = host.our_layer(host.config(**changes))
    output, gradients = host.step(layer, inputs()[0])
    host.assert_close(torch.cat([f[0] for f in found]), output, "output")
    host.assert_close(torch.cat([f[2] for f in found]), gradients["experts.linear_fc1.weight"], "linear_fc1")
    for f in found:
        host.assert_close(f[1], gradients["router.weight"], "router.weight")


def global_loss(rank: int):
    torch.manual_seed(21)
    layer = host.our_layer(host.config(moe_router_load_balancing_type="global_aux_loss", moe_aux_loss_coeff=0.5))
    for batch in inputs()[[rank, 1 - rank]]:
        layer.zero_grad()
        (layer(batch)[0] * 0).sum().backward()
    return layer.router.weight.grad


def test_the_global_loss_counts_over_ranks_and_micro_batches(of_two):
    found = [results["global loss"] for results in of_two[0]]
    torch.manual_seed(21)
    weight = host.our_layer(host.config()).router.weight
    rows = inputs().reshape(2, -1, host.HIDDEN)
    counts = (rows @ weight.t()).topk(2, dim=-1).indices.flatten().bincount(minlength=host.EXPERTS)
    tokens = rows.shape[0] * rows.shape[1]
    for rank in (0, 1):
        weight.grad = None
        probs = (rows[1 - rank] @ weight.t()).softmax(-1).sum(0)
        (0.5 * host.EXPERTS / (2 * tokens**2) * (counts * probs).sum()).backward()
        host.assert_close(found[rank], weight.grad, "router.weight")
