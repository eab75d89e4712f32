"""Every field of TransformerConfig about experts, routers or MoE is in the table: honoured, shown by what it does
beside the host's own layer, or refused by name."""

import contextlib
import dataclasses
import types

import pytest
import torch
import torch.nn.functional as F

from . import host
from .host import TransformerConfig, megatron_core

HOST_FIELDS = {
    f.name: f.default
    for f in dataclasses.fields(TransformerConfig)
    if any(word in f.name for word in ("moe", "expert", "router"))
}
ROWS = {row.name: row for row in megatron_core.FIELDS}
SIGMOID = {"moe_router_score_function": "sigmoid"}
PRE = {"moe_router_pre_softmax": True}
GROUPS = {"moe_router_num_groups": 4, "moe_router_group_topk": 2}

# Configurations in which each honoured field has a value that matters; the layer is compared with the host's own.
CASES: dict[str, list[dict]] = {
    "num_moe_experts": [{"num_moe_experts": 5}],
    "moe_router_topk": [{"moe_router_topk": 3}, {"moe_router_topk": 1, **PRE}, {"moe_router_topk": 1, **SIGMOID}],
    "moe_ffn_hidden_size": [{"moe_ffn_hidden_size": 13}],
    "moe_shared_expert_intermediate_size": [{"moe_shared_expert_intermediate_size": 20}],
    "moe_shared_expert_gate": [{"moe_shared_expert_intermediate_size": 20, "moe_shared_expert_gate": True}],
    "moe_router_load_balancing_type": [
        {"moe_router_load_balancing_type": "sinkhorn"},
        {"moe_router_load_balancing_type": "sinkhorn", "moe_router_topk": 1},
        *(
            {"moe_router_load_balancing_type": kind, "moe_aux_loss_coeff": 0.5, **scores}
            for kind in ("aux_loss", "seq_aux_loss", "global_aux_loss")
            for scores in ({}, SIGMOID)
        ),
    ],
    "moe_aux_loss_coeff": [
        {
            "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss", "global_aux_loss"],
            "moe_aux_loss_coeff": [0.5, 0.0, 0.25],
        },
        {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.5, **SIGMOID, **GROUPS},
    ],
    "moe_z_loss_coeff": [{"moe_z_loss_coeff": 0.2}],
    "moe_router_num_groups": [GROUPS, {**GROUPS, **SIGMOID}, {**GROUPS, **PRE}],
    "moe_router_group_topk": [
        {"moe_router_num_groups": 4, "moe_router_group_topk": 1},
        {"moe_router_num_groups": 2, "moe_router_group_topk": 1, "moe_router_topk": 3, **SIGMOID},
        {"moe_router_num_groups": 2, "moe_router_group_topk": 1, "moe_router_topk": 3},
    ],
    "moe_router_topk_limited_devices": [{"moe_router_topk_limited_devices": 1}],
    "moe_router_pre_softmax": [PRE],
    "moe_router_topk_scaling_factor": [
        {"moe_router_topk_scaling_factor": 2.5, **PRE},
        {"moe_router_topk_scaling_factor": 2.5, **SIGMOID},
    ],
    "moe_router_score_function": [SIGMOID, {"moe_router_score_function": "sqrtsoftplus"}],
    "moe_router_dtype": [{"moe_router_dtype": "fp32"}, {"moe_router_dtype": "fp64"}],
    "moe_router_enable_expert_bias": [
        {"moe_router_enable_expert_bias": True, **SIGMOID},
        {"moe_router_enable_expert_bias": True, **SIGMOID, **GROUPS},
        {
            "moe_router_enable_expert_bias": True, **SIGMOID, "moe_router_topk": 3, "moe_router_num_groups": 2,
            "moe_router_group_topk": 1, "moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.5,
        },
    ],
    "moe_input_jitter_eps": [{"moe_input_jitter_eps": 0.2}],
    "moe_expert_capacity_factor": [
        {"moe_expert_capacity_factor": 0.5, "moe_router_load_balancing_type": "aux_loss"},
        {"moe_expert_capacity_factor": 4.0, "moe_router_load_balancing_type": "aux_loss"},
    ],
    "moe_apply_probs_on_input": [{"moe_apply_probs_on_input": True, "moe_router_topk": 1, **PRE}],
    "moe_grouped_gemm": [{}],
}  # fmt: skip

# Honoured fields that need more than one layer's forward and backward pass, and the tests that show them.
ELSEWHERE = {
    "moe_layer_freq": "test_specs.test_block_of_dense_and_moe_layers",
    "moe_router_bias_update_rate": "test_router.test_expert_bias_moves_as_the_host_moves_it",
    "moe_router_force_load_balancing": "test_router.test_forced_balance",
    "moe_router_force_biased": "test_router.test_forced_bias",
    "moe_enable_routing_replay": "test_router.test_replay",
    "moe_token_drop_policy": "test_router.test_drop_policies",
    "moe_pad_expert_input_to_capacity": "test_router.test_padding_to_capacity_changes_nothing",
    "moe_grad_scale_func": "test_router.test_aux_loss_scale",
    "moe_per_layer_logging": "test_router.test_metrics",
    "moe_layer_recompute": "test_specs.test_recompute",
    "moe_permute_fusion": "needs Transformer Engine in the host",
    "moe_router_fusion": "test_fields.test_fusion_of_the_router_is_what_we_do",
    "expert_model_parallel_size": "test_parallel",
    "moe_token_dispatcher_type": "test_fields.test_dispatchers_are_one",
}

OTHER = {
    "biases": {"add_bias_linear": True},
    "gelu": {"activation_func": F.gelu, "gated_linear_unit": False},
    "geglu": {"activation_func": F.gelu},
    "relu": {"activation_func": F.relu, "gated_linear_unit": False},
    "silu": {"activation_func": F.silu, "gated_linear_unit": False},
    "squared_relu": {
        "activation_func": megatron_core.configuration.host_activations.squared_relu, "gated_linear_unit": False,
    },
    "fast_gelu": {"activation_func": megatron_core.configuration.host_activations.fast_gelu},
    "gpt-oss": {
        "activation_func": megatron_core.configuration.host_activations.quick_gelu, "glu_linear_offset": 1.0,
        "activation_func_clamp_value": 1.5, "add_bias_linear": True,
    },
}  # fmt: skip


def test_the_table_has_every_field_of_the_host():
    assert set(HOST_FIELDS) <= set(ROWS)


@host.before_0_18
def test_the_table_has_no_other_field():
    assert set(ROWS) <= set(HOST_FIELDS)


@pytest.mark.parametrize("name", sorted(HOST_FIELDS))
def test_defaults_are_the_hosts(name):
    assert HOST_FIELDS[name] in (ROWS[name].default, *ROWS[name].harmless)


@pytest.mark.parametrize("row", [r for r in megatron_core.FIELDS if not r.honoured], ids=lambda r: r.name)
def test_refused_by_name(row):
    c = host.config()
    other = {bool: True, int: 977, float: 0.37, str: "another"}.get(type(row.default), 977)
    setattr(c, row.name, other)
    with pytest.raises(ValueError, match=rf"{row.name} is not honoured .*got {other!r}"):
        host.our_layer(c)


def test_honoured_fields_are_shown_by_a_test():
    honoured = {row.name for row in megatron_core.FIELDS if row.honoured}
    assert honoured == set(CASES) | set(ELSEWHERE) and not set(CASES) & set(ELSEWHERE)


@pytest.mark.parametrize("parts_only", [False, True], ids=["layer", "parts"])
@pytest.mark.parametrize(
    "changes", [pytest.param(c, id=f"{name}-{i}") for name, cases in CASES.items() for i, c in enumerate(cases)]
    + [pytest.param(c, id=name) for name, c in OTHER.items()],
)  # fmt: skip
def test_as_the_hosts_layer(changes, parts_only):
    if changes.get("moe_router_score_function") == "sqrtsoftplus" and host.before_0_18.args[0]:
        pytest.skip("this megatron-core has no sqrtsoftplus")
    host_layer = host.host_layer(host.config(**changes))
    layer = host.our_layer(host.config(**changes), host_layer, parts_only)
    assert type(layer) is (host.MoELayer if parts_only else megatron_core.FastMoELayer)
    for training in (True, False):
        torch.manual_seed(7)
        x = host.hidden_states()
        host_layer.train(training), layer.train(training)
        # the jitter draws the same numbers
        torch.manual_seed(8)
        found = host.step(layer, x)
        torch.manual_seed(8)
        expected = host.step(host_layer, x)
        host.assert_close(found[0], expected[0], "output")
        assert found[1].keys() == expected[1].keys()
        for name, gradient in expected[1].items():
            host.assert_close(found[1][name], gradient, name)


def test_fusion_of_the_router_is_what_we_do():
    c = host.config()
    layer = host.our_layer(c, host.host_layer(host.config()))
    x = host.hidden_states()
    expected = layer(x)[0]
    c.moe_router_fusion = True  # the host asks for Transformer Engine when the configuration is made
    assert torch.equal(host.our_layer(c, layer)(x)[0], expected)


def test_dispatchers_are_one():
    expected = host.host_layer(host.config())
    c = host.config(moe_token_dispatcher_type="alltoall")
    host.assert_same_step(host.our_layer(c, expected), expected, host.hidden_states())
    assert c.moe_token_dispatcher_type == "alltoall"


def test_moe_config():
    c = host.config(
        moe_router_load_balancing_type="seq_aux_loss", moe_aux_loss_coeff=1e-2, moe_z_loss_coeff=1e-3,
        moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True, moe_router_topk_scaling_factor=2.5,
        moe_router_num_groups=4, moe_router_group_topk=1, moe_router_dtype="fp32", moe_expert_capacity_factor=1.5,
    )  # fmt: skip
    m = megatron_core.moe_config(c)
    assert (m.hidden_size, m.intermediate_size, m.num_experts, m.top_k) == (16, 24, 8, 2)
    assert (m.activation, m.bias, m.capacity_factor, m.drop_policy) == ("swiglu", False, 1.5, "probs")
    r = m.router
    assert (r.score_function, r.renormalize, r.scaling_factor, r.expert_bias) == ("sigmoid", True, 2.5, True)
    assert (r.num_groups, r.topk_groups, r.group_score, r.dtype) == (4, 1, "top2_sum", torch.float32)
    assert (r.balance_loss, r.balance_loss_coefficient, r.z_loss_coefficient) == ("sequence", 1e-2, 1e-3)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"moe_router_load_balancing_type": "quantile_balancing"}, "'quantile_balancing' is not honoured"),
        ({"moe_router_load_balancing_type": "balanced"}, "must be one of .*got 'balanced'"),
        ({"moe_token_dispatcher_type": "flex"}, "moe_token_dispatcher_type 'flex' is not honoured"),
        ({"num_moe_experts": None}, "num_moe_experts must be"),
        ({"moe_router_load_balancing_type": "sinkhorn", "moe_router_topk_scaling_factor": 2.0}, "Sinkhorn's routing"),
        ({"moe_router_load_balancing_type": "sinkhorn", "moe_aux_loss_coeff": 0.1}, "it has no auxiliary loss"),
        ({"moe_router_load_balancing_type": ["aux_loss"], "moe_aux_loss_coeff": 0.1}, "one coefficient for each"),
        ({"moe_apply_probs_on_input": True}, "need a top-k of 1"),
        ({"moe_router_enable_expert_bias": True}, "sigmoid or sqrtsoftplus"),
        ({"moe_router_topk": True}, "moe_router_topk must be an integer"),
        ({"moe_new_idea": 1}, "moe_new_idea is not known"),
        ({"fp8": "hybrid"}, "fp8 is not honoured"),
        ({"delay_wgrad_compute": True}, "delay_wgrad_compute is not honoured"),
        ({"transformer_impl": "inference_optimized"}, "transformer_impl 'inference_optimized'"),
        ({"cuda_graph_modules": ["moe_router"]}, "cuda_graph_modules"),
        ({"activation_func": torch.tanh}, "activation_func .gated. must be one of"),
        ({"glu_linear_offset": 1.0}, "glu_linear_offset and activation_func_clamp_value"),
    ],
)
def test_refused(changes, message):
    c = host.config()
    for name, value in changes.items():
        setattr(c, name, value)
    with pytest.raises(ValueError, match=message):
        megatron_core.moe_config(c)


def test_parts_in_cuda_graphs_are_refused_by_their_older_name():
    fields = vars(host.config()) | {"cuda_graph_scope": ["attn", "moe_router"]}
    fields.pop("cuda_graph_modules", None)
    with pytest.raises(ValueError, match=r"cuda_graph_scope \['moe_router'\] is not honoured"):
        megatron_core.moe_config(types.SimpleNamespace(**fields))


@pytest.mark.parametrize("version, refused", [((0, 17, 1, ""), True), ((0, 18, 0, ""), False), ((1, 0, 0, ""), False)])
def test_prediction_layers_need_a_host_that_names_them(version, refused, monkeypatch):
    monkeypatch.setattr("megatron.core.package_info.VERSION", version)
    c = host.config()
    c.mtp_num_layers = 1
    with (
        pytest.raises(ValueError, match="mtp_num_layers needs release 0.18 or newer, got 1 with 0.17.1")
        if refused
        else (contextlib.nullcontext())
    ):
        megatron_core.moe_config(c)
