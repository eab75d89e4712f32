"""Our layer on a GPU beside the host's own on the same GPU, and beside ours on the CPU; a GPTModel that trains."""

import copy

import pytest
import torch

from . import host
from .host import GPTModel, get_gpt_layer_local_spec, megatron_core

pytestmark = pytest.mark.cuda
DEVICE = "cuda"
LOSSES = {"moe_aux_loss_coeff": 0.5, "moe_z_loss_coeff": 0.1}
CASES = {
    "plain": {},
    "batch loss": {"moe_router_load_balancing_type": "aux_loss", **LOSSES},
    "sequence loss": {"moe_router_load_balancing_type": "seq_aux_loss", **LOSSES},
    "global loss": {"moe_router_load_balancing_type": "global_aux_loss", **LOSSES},
    "sigmoid, bias": {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    "groups": {"moe_router_num_groups": 4, "moe_router_group_topk": 2, "moe_router_pre_softmax": True},
    "shared experts": {"moe_shared_expert_intermediate_size": 8},
    "capacity": {"moe_expert_capacity_factor": 0.5},
    "float64 router": {"moe_router_dtype": "fp64"},
    "biases": {"add_bias_linear": True},
}


@pytest.fixture(autouse=True)
def random_states():
    """Without which the host's attention finds none."""
    if DEVICE == "cuda":
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        model_parallel_cuda_manual_seed(1)


def pair(parts_only=False, **changes):
    theirs = host.host_layer(host.config(**changes))
    return host.our_layer(host.config(**changes), theirs, parts_only).to(DEVICE), theirs.to(DEVICE)


@pytest.mark.parametrize("parts_only", [False, True], ids=["layer", "parts"])
@pytest.mark.parametrize("case", CASES)
def test_as_the_hosts_layer(case, parts_only):
    ours, theirs = pair(parts_only, **CASES[case])
    assert {p.device.type for p in ours.parameters()} == {DEVICE}
    for _ in range(2):
        host.assert_same_step(ours, theirs, host.hidden_states().to(DEVICE), 1e-4)


@pytest.mark.parametrize("recompute", [False, True])
def test_as_on_the_cpu(recompute):
    """And recomputed by the host's function, which keeps the states of the GPU's generators."""
    changes = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
    # the host puts its expert_bias on the GPU where there is one
    here = host.our_layer(host.config(**changes), host.host_layer(host.config(**changes))).cpu()
    there = host.our_layer(host.config(**changes, moe_layer_recompute=recompute), here).to(DEVICE)
    x, mask = host.hidden_states(), torch.zeros(host.BATCH, host.SEQUENCE, dtype=torch.bool)
    mask[0, -2:] = True
    found, expected = host.step(there, x.to(DEVICE), mask.to(DEVICE)), host.step(here, x, mask)
    host.assert_close(found[0].cpu(), expected[0], "output", 1e-4)
    for name, gradient in expected[1].items():
        host.assert_close(found[1][name].cpu(), gradient, name, 1e-4)
    assert torch.equal(there.router.local_tokens_per_expert.cpu(), here.router.local_tokens_per_expert)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(dtype):
    kind = {"bf16": True} if dtype == torch.bfloat16 else {"fp16": True}
    changes = {**kind, "params_dtype": dtype, "moe_router_dtype": "fp32"}
    ours, theirs = pair(**changes)
    exact = host.host_layer(host.config(moe_router_dtype="fp32"))
    exact.load_state_dict(theirs.state_dict())
    exact = exact.to(DEVICE)
    x = host.hidden_states(dtype).to(DEVICE)
    found, rounded, expected = host.step(ours, x), host.step(theirs, x), host.step(exact, x.float())
    assert found[0].dtype == dtype

    def error(y, z):
        return (y.float() - z).square().mean().sqrt() / z.square().mean().sqrt()

    assert error(found[0], expected[0]) <= 2 * error(rounded[0], expected[0]) + 1e-3
    for name, gradient in expected[1].items():
        assert error(found[1][name], gradient) <= 3 * error(rounded[1][name], gradient) + 1e-3, name


def test_state_dict_goes_from_device_to_device():
    layer = host.our_layer(host.config()).to(DEVICE)
    written = layer.state_dict()
    assert {t.device.type for t in written.values() if isinstance(t, torch.Tensor)} == {DEVICE}
    other = host.our_layer(host.config())
    other.load_state_dict(written)
    for (name, mine), theirs in zip(other.named_parameters(), layer.parameters(), strict=True):
        assert torch.equal(mine, theirs.cpu()), name


def test_a_new_layer_is_on_the_gpu():
    if DEVICE == "cuda":
        layer = host.our_layer(host.config(use_cpu_initialization=False))
        assert {p.device.type for p in layer.experts.parameters()} == {"cuda"}
        assert layer(host.hidden_states().cuda())[0].isfinite().all()


def test_no_wait_for_the_gpu():
    layer = host.our_layer(host.config(moe_router_score_function="sigmoid")).to(DEVICE)
    x = host.hidden_states().to(DEVICE).requires_grad_()
    layer(x)[0].sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_model_trains_as_the_hosts():
    vocabulary, length, sequences = 32, 12, 4
    changes = {"init_method_std": 0.02, "moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 1e-2,
               "moe_shared_expert_intermediate_size": 8, "num_moe_experts": 4}  # fmt: skip
    spec = get_gpt_layer_local_spec(num_experts=4)
    models = [
        GPTModel(
            config=host.config(**changes), transformer_layer_spec=each, vocab_size=vocabulary,
            max_sequence_length=length, position_embedding_type="learned_absolute",
        )
        for each in (spec, megatron_core.use_fastmoe_cpp(spec))
    ]  # fmt: skip
    models[1].load_state_dict(copy.deepcopy(models[0].state_dict()))
    models = [model.to(DEVICE) for model in models]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.3) for model in models]
    positions = torch.arange(length, device=DEVICE).expand(sequences, -1)
    mask = torch.triu(torch.ones(length, length, dtype=torch.bool, device=DEVICE), 1)[None, None]
    tokens = ((torch.randint(vocabulary, (sequences, 1)) + torch.arange(length + 1)) % vocabulary).to(DEVICE)
    losses = []
    for _ in range(20):
        both = []
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss = model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:]).mean()
            loss.backward()
            optimizer.step()
            both.append(loss.item())
        assert both[1] == pytest.approx(both[0], rel=1e-4)
        losses.append(both[0])
    assert losses[-1] < losses[0]
