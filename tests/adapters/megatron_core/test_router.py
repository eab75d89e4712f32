"""What Megatron-Core does around a router: losses and their scale, the expert bias, replay, metrics, forced balance."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from . import host
from .host import (
    RandomSTEShared,
    RouterReplay,
    RouterReplayAction,
    _update_router_expert_bias,
    get_moe_metrics_tracker,
    reset_model_temporary_tensors,
)

SIGMOID = {"moe_router_score_function": "sigmoid"}
BIAS = {"moe_router_enable_expert_bias": True, **SIGMOID}


def pair(**changes):
    expected = host.host_layer(host.config(**changes))
    return host.our_layer(host.config(**changes), expected), expected


def padding():
    """[b, s] bool: the last two of one sequence, the last five of another."""
    mask = torch.zeros(host.BATCH, host.SEQUENCE, dtype=torch.bool)
    mask[0, -2:] = mask[2, -5:] = True
    return mask


@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss", "global_aux_loss"])
@pytest.mark.parametrize("per_token", [False, True])
def test_aux_loss_scale(kind, per_token):
    """The scale the schedules set, per-token losses, and with both the global loss over micro-batches."""
    if kind == "seq_aux_loss" and per_token and host.before_0_18.args[0]:
        pytest.skip("this megatron-core divides by the sequences twice")
    ours, theirs = pair(
        moe_router_load_balancing_type=kind, moe_aux_loss_coeff=0.5, moe_z_loss_coeff=0.1,
        calculate_per_token_loss=per_token,
    )  # fmt: skip
    host.MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(3.0))
    try:
        for _ in range(3):
            host.assert_same_step(ours, theirs, host.hidden_states())
        reset_model_temporary_tensors(ours.config, [ours]), reset_model_temporary_tensors(theirs.config, [theirs])
        host.assert_same_step(ours, theirs, host.hidden_states())
    finally:
        host.MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))


def test_the_aux_loss_alone_reaches_the_router_once():
    ours, _ = pair(moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.5)
    x = host.hidden_states().requires_grad_()
    output, _ = ours(x)
    output.backward(torch.zeros_like(output))
    logits = x.detach().reshape(-1, host.HIDDEN) @ ours.router.weight.detach().t()
    logits.requires_grad_()
    probs, tokens = logits.softmax(-1), logits.shape[0]
    counts = torch.zeros(host.EXPERTS).index_add_(0, logits.topk(2, dim=1).indices.flatten(), torch.ones(2 * tokens))
    (0.5 * host.EXPERTS / (2 * tokens**2) * (counts * probs.sum(0)).sum()).backward()
    expected = logits.grad.t() @ x.detach().reshape(-1, host.HIDDEN)
    host.assert_close(ours.router.weight.grad, expected, "router.weight")


@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss", "global_aux_loss"])
def test_padding_counts_in_no_loss(kind):
    changes = {"moe_router_load_balancing_type": kind, "moe_aux_loss_coeff": 0.5, "moe_z_loss_coeff": 0.1}
    ours, theirs = pair(**changes)
    mask = padding()
    x = host.hidden_states()
    found, expected = host.step(ours, x, mask), host.step(theirs, x, mask)
    real = ~mask.t()
    host.assert_close(found[0][real], expected[0][real], "output")
    assert (found[0][~real] == 0).all()
    # the host computes padding, and its output has a gradient in this test: without it the router's are equal
    for layer in (ours, theirs):
        layer.zero_grad()
        (layer(x, padding_mask=mask)[0] * real[..., None]).sum().backward()
    for name, gradient in host.gradients(theirs).items():
        host.assert_close(host.gradients(ours)[name], gradient, name)


def test_expert_bias_moves_as_the_host_moves_it():
    ours, theirs = pair(**BIAS, moe_router_bias_update_rate=0.125)
    for _ in range(2):
        for _ in range(3):
            x = host.hidden_states()
            host.step(ours, x), host.step(theirs, x)
        assert torch.equal(ours.router.local_tokens_per_expert, theirs.router.local_tokens_per_expert)
        assert ours.router.local_tokens_per_expert.sum() == 3 * 2 * host.SEQUENCE * host.BATCH
        before = ours.router.expert_bias.clone()
        for layer in (ours, theirs):
            _update_router_expert_bias([layer], layer.config)
            reset_model_temporary_tensors(layer.config, [layer])
        assert torch.equal(ours.router.expert_bias, theirs.router.expert_bias)
        assert (ours.router.expert_bias - before).abs().max() == 0.125
        assert (ours.router.local_tokens_per_expert == 0).all()


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_tokens_count_once(reentrant):
    ours, _ = pair(**BIAS)
    x = host.hidden_states().requires_grad_()
    checkpoint(lambda h: ours(h)[0], x, use_reentrant=reentrant).sum().backward()
    counted = ours.router.local_tokens_per_expert
    assert counted.sum() == 2 * host.SEQUENCE * host.BATCH
    ours.eval()(x)
    assert ours.router.local_tokens_per_expert.sum() == 2 * host.SEQUENCE * host.BATCH


def test_padding_is_no_load():
    ours, _ = pair(**BIAS)
    ours(host.hidden_states(), padding_mask=padding())
    assert ours.router.local_tokens_per_expert.sum() == 2 * (host.SEQUENCE * host.BATCH - 7)


def test_counts_and_bias_stay_float32_in_a_16_bit_model():
    ours, _ = pair(**BIAS, moe_router_load_balancing_type="global_aux_loss", moe_aux_loss_coeff=0.1)
    ours.bfloat16()
    assert ours.experts.linear_fc1.weight.dtype == torch.bfloat16
    for name in ("expert_bias", "local_tokens_per_expert", "global_tokens_per_expert"):
        assert getattr(ours.router, name).dtype == torch.float32


@pytest.mark.parametrize("parts_only", [False, True])
def test_bfloat16(parts_only):
    changes = {"bf16": True, "params_dtype": torch.bfloat16, "moe_router_load_balancing_type": "aux_loss",
               "moe_aux_loss_coeff": 0.1, "moe_router_dtype": "fp32"}  # fmt: skip
    theirs = host.host_layer(host.config(**changes))
    ours = host.our_layer(host.config(**changes), theirs, parts_only)
    exact = host.host_layer(host.config(**changes | {"bf16": False, "params_dtype": torch.float32}))
    exact.load_state_dict(theirs.state_dict())
    x = host.hidden_states(torch.bfloat16)
    found, rounded, expected = host.step(ours, x), host.step(theirs, x), host.step(exact, x.float())
    assert found[0].dtype == torch.bfloat16

    def error(y, z):
        return (y.float() - z).square().mean().sqrt() / z.square().mean().sqrt()

    assert error(found[0], expected[0]) <= 2 * error(rounded[0], expected[0]) + 1e-3
    for name, gradient in expected[1].items():
        assert error(found[1][name], gradient) <= 2 * error(rounded[1][name], gradient) + 1e-3, name


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_drop_policies(policy):
    c = host.config(moe_expert_capacity_factor=0.5, moe_token_drop_policy=policy,
                    moe_router_load_balancing_type="aux_loss")  # fmt: skip
    ours = host.our_layer(c)
    x = host.hidden_states()
    routing = ours.router.route(x)
    capacity = -(-host.SEQUENCE * host.BATCH * 2 // (2 * host.EXPERTS))
    expected = torch.zeros(host.SEQUENCE * host.BATCH, host.HIDDEN)
    rows = x.reshape(-1, host.HIDDEN)
    for e in range(host.EXPERTS):
        tokens, k = (routing.topk_ids == e).nonzero(as_tuple=True)
        weights = routing.topk_weights[tokens, k]
        keep = (
            weights.argsort(descending=True)[:capacity] if policy == "probs" else torch.arange(len(tokens))[:capacity]
        )
        gate, up = (rows[tokens[keep]] @ ours.experts.linear_fc1.weight[e].t()).chunk(2, dim=-1)
        y = (torch.nn.functional.silu(gate) * up) @ ours.experts.linear_fc2.weight[e].t()
        expected.index_add_(0, tokens[keep], weights[keep, None] * y)
    host.assert_close(ours(x)[0].detach().reshape(-1, host.HIDDEN), expected.detach(), "output")


def test_padding_to_capacity_changes_nothing():
    changes = {"moe_expert_capacity_factor": 0.5, "moe_router_load_balancing_type": "aux_loss"}
    plain, _ = pair(**changes)
    c = host.config(**changes, moe_pad_expert_input_to_capacity=True)
    theirs = host.host_layer(c)
    x = host.hidden_states()
    assert torch.equal(host.our_layer(c, plain)(x)[0], plain(x)[0])
    host.assert_same_step(host.our_layer(c, theirs), theirs, x)


@pytest.mark.parametrize("changes", [{}, SIGMOID, BIAS])
def test_replay(changes):
    ours, theirs = pair(**changes, moe_enable_routing_replay=True)
    x = host.hidden_states()
    ids = torch.stack([torch.randperm(host.EXPERTS)[:2] for _ in range(host.SEQUENCE * host.BATCH)])
    try:
        for layer in (ours, theirs):
            layer.router.router_replay.set_router_replay_action(RouterReplayAction.RECORD)
            layer(x)
        recorded = [layer.router.router_replay.get_recorded_indices().sort(-1).values for layer in (ours, theirs)]
        assert torch.equal(*recorded)
        for layer in (ours, theirs):
            layer.router.router_replay.set_target_indices(ids)
            layer.router.router_replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        host.assert_same_step(ours, theirs, x)
        assert torch.equal(ours.router.route(x).topk_ids, ids)
    finally:
        RouterReplay.global_router_replay_instances.clear()


@host.before_0_18
def test_metrics():
    """What the host logs of the losses, by layer."""
    logged = []
    for layer in pair(moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.5, moe_z_loss_coeff=0.1,
                      moe_per_layer_logging=True):  # fmt: skip
        torch.manual_seed(5)
        tracker = get_moe_metrics_tracker()
        tracker._metrics.clear()
        layer(host.hidden_states())
        logged.append({name: entry.values.clone() for name, entry in tracker.metrics.items()})
    assert logged[0].keys() == logged[1].keys() == {"load_balancing_loss", "z_loss"}
    for name, values in logged[1].items():
        assert values[0] > 0
        torch.testing.assert_close(logged[0][name], values)


def test_forced_balance():
    ours, _ = pair(moe_router_force_load_balancing=True)
    x = torch.zeros_like(host.hidden_states()).repeat(200, 1, 1)
    counts = ours.router.route(x).topk_ids.flatten().bincount(minlength=host.EXPERTS)
    assert (counts / counts.float().mean() - 1).abs().max() < 0.2


def test_forced_bias():
    ours, theirs = pair(moe_router_force_biased=-2.0)
    x = host.hidden_states()
    torch.manual_seed(3)
    expected = host.step(theirs, x)
    RandomSTEShared._cache.clear()
    torch.manual_seed(3)
    host.assert_close(host.step(ours, x)[0], expected[0], "output")
    RandomSTEShared._cache.clear()
