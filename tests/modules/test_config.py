"""Configurations: every message names the field, what is allowed and what was given."""

import copy
import dataclasses
import math
import pickle
import warnings
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch

from fastmoe_cpp.config import MoEConfig, RouterConfig

SIZES = {"hidden_size": 8, "intermediate_size": 4, "num_experts": 6, "top_k": 2}


def test_defaults_are_mixtrals():
    c = MoEConfig(8, 4, 6)
    assert (c.top_k, c.activation, c.bias, c.shared_intermediate_size) == (2, "swiglu", False, None)
    assert (c.capacity_factor, c.eval_capacity_factor) == (None, None)
    r = c.router
    assert (r.score_function, r.scores_after_topk, r.renormalize, r.scaling_factor) == ("softmax", False, True, 1.0)
    assert (r.bias, r.expert_bias, r.num_groups, r.dtype) == (False, False, 1, torch.float32)
    assert c.gate_up_size == 8 and MoEConfig(8, 4, 6, activation="relu").gate_up_size == 4


BAD = [
    ("hidden_size", 0, "an integer of at least 1"),
    ("hidden_size", 8.0, "an integer of at least 1"),
    ("hidden_size", True, "an integer of at least 1"),
    ("intermediate_size", -1, "an integer of at least 1"),
    ("num_experts", 1025, "an integer between 1 and 1024"),
    ("num_experts", None, "an integer between 1 and 1024"),
    ("top_k", 0, "an integer of at least 1"),
    ("top_k", 7, "at most num_experts = 6"),
    ("router", None, "a RouterConfig"),
    ("activation", "swish", "one of 'swiglu', 'geglu', 'geglu_tanh', 'reglu', 'clamped_swiglu', 'silu', 'gelu'"),
    ("activation_alpha", 0, "a finite number above 0"),
    ("activation_limit", float("inf"), "a finite number above 0"),
    ("bias", 1, "True or False"),
    ("interleaved", None, "True or False"),
    ("weight_on_input", "no", "True or False"),
    ("shared_intermediate_size", 0, "an integer of at least 1"),
    ("shared_expert_gate", True, "False where shared_intermediate_size is None"),
    ("capacity_factor", -0.5, "a finite number of at least 0"),
    ("eval_capacity_factor", float("nan"), "a finite number of at least 0"),
    ("drop_policy", "random", "one of 'position', 'probs'"),
    ("recompute", 0, "True or False"),
    ("gradient_accumulation_fusion", 1, "True or False"),
    ("initializer_range", -1.0, "a finite number of at least 0"),
]
BAD_ROUTER = [
    ("score_function", "tanh", "one of 'softmax', 'sigmoid', 'sqrtsoftplus'"),
    ("scores_after_topk", 1, "True or False"),
    ("renormalize", None, "True or False"),
    ("renormalize_epsilon", -1e-9, "a finite number of at least 0"),
    ("scaling_factor", 0.0, "a finite number above 0"),
    ("num_groups", 0, "an integer of at least 1"),
    ("topk_groups", 2, "at most num_groups = 1"),
    ("group_score", "mean", "one of 'max', 'top2_sum'"),
    ("bias", "yes", "True or False"),
    ("expert_bias", 1.0, "True or False"),
    ("expert_bias_update_rate", float("nan"), "a finite number of at least 0"),
    ("expert_bias_zero_mean", 2, "True or False"),
    ("sinkhorn", "on", "True or False"),
    ("sinkhorn_iterations", -1, "an integer of at least 0"),
    ("sinkhorn_tolerance", 0, "a finite number above 0"),
    ("jitter_eps", 1.0, "a finite number of at least 0 and below 1"),
    ("jitter_experts", True, "False where jitter_eps is 0"),
    ("dtype", torch.int32, "one of torch.float32, torch.float64, torch.bfloat16, torch.float16"),
    ("dtype", "float32", "one of torch.float32"),
    ("balance_loss", "gshard", "one of 'switch', 'huggingface', 'batch', 'sequence', 'global'"),
    ("balance_loss_coefficient", None, "a finite number of at least 0"),
    ("z_loss_coefficient", -1, "a finite number of at least 0"),
]


@pytest.mark.parametrize("field,value,allowed", BAD)
def test_a_bad_field_is_named(field, value, allowed):
    with pytest.raises(ValueError) as error:
        MoEConfig(**(SIZES | {field: value}))
    given = "NoneType" if field == "router" else repr(value)
    assert str(error.value).startswith(f"MoEConfig.{field} must be {allowed}")
    assert str(error.value).endswith(f", got {given}") and "\n" not in str(error.value)


@pytest.mark.parametrize("field,value,allowed", BAD_ROUTER)
def test_a_bad_router_field_is_named(field, value, allowed):
    with pytest.raises(ValueError) as error:
        RouterConfig(**{field: value})
    assert str(error.value).startswith(f"RouterConfig.{field} must be {allowed}")
    assert str(error.value).endswith(f", got {value!r}") and "\n" not in str(error.value)


def test_every_field_is_validated():
    """A field without a row above could be wrong in silence."""
    assert {f.name for f in dataclasses.fields(MoEConfig)} == {row[0] for row in BAD}
    assert {f.name for f in dataclasses.fields(RouterConfig)} == {row[0] for row in BAD_ROUTER}


@pytest.mark.parametrize(
    "router,changes,message",
    [
        ({"num_groups": 4}, {}, "MoEConfig.router.num_groups must divide num_experts = 6, got 4"),
        (
            {"num_groups": 3, "topk_groups": 1},
            {"top_k": 3},
            "MoEConfig.top_k must be at most 2, the experts in topk_groups = 1 groups of 2, got 3",
        ),
        (
            {"num_groups": 6, "topk_groups": 6, "group_score": "top2_sum"},
            {},
            "MoEConfig.router.group_score must be 'max' for groups of one expert, got 'top2_sum'",
        ),
        (
            {},
            {"activation": "gelu", "interleaved": True},
            "MoEConfig.interleaved must be False for the ungated activation 'gelu', got True",
        ),
    ],
)
def test_fields_that_do_not_go_together(router, changes, message):
    with pytest.raises(ValueError) as error:
        MoEConfig(**(SIZES | changes), router=RouterConfig(**router))
    assert str(error.value) == message


@pytest.mark.parametrize(
    "router,warns",
    [
        ({}, True),
        ({"score_function": "sigmoid"}, True),
        ({"renormalize": False, "scores_after_topk": True}, True),
        ({"renormalize": False}, False),
        ({"renormalize": False, "scores_after_topk": True, "score_function": "sigmoid"}, False),
    ],
)
def test_one_expert_with_a_constant_weight_warns(router, warns):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        MoEConfig(8, 4, 6, 1, router=RouterConfig(**router))
        MoEConfig(8, 4, 6, 2, router=RouterConfig(**router))
        MoEConfig(8, 4, 1, 1, router=RouterConfig(**router))
    assert [str(w.message).startswith("MoEConfig.top_k is 1 and the router's weights") for w in caught] == [
        True
    ] * warns
    assert all(w.filename == __file__ for w in caught)


def test_frozen_hashable_and_copied():
    c = MoEConfig(**SIZES, router=RouterConfig(sinkhorn=True))
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.top_k = 3
    assert c == copy.deepcopy(c) == pickle.loads(pickle.dumps(c)) and len({c, copy.deepcopy(c)}) == 1
    assert dataclasses.replace(c, top_k=3).router is c.router
    with pytest.raises(ValueError, match="at most num_experts = 6, got 9"):
        dataclasses.replace(c, top_k=9)


def test_capacity_tells_none_from_zero():
    c = MoEConfig(**SIZES, capacity_factor=0, eval_capacity_factor=None)
    assert c.capacity(100, training=True) == 0 and c.capacity(100, training=False) is None


@pytest.mark.parametrize("factor", [0, 0.1, 0.5, 1, 1.1, 1.25, 1 / 3, 2.7, 64.0])
@pytest.mark.parametrize("tokens", [0, 1, 7, 100, 2**28])
def test_capacity_is_the_exact_ceiling(factor, tokens):
    exact = Fraction(str(factor)).limit_denominator(10**6) * tokens * 2 / 6
    c = MoEConfig(**SIZES, capacity_factor=factor, eval_capacity_factor=2 * factor)
    assert c.capacity(tokens, training=True) == -(-exact.numerator // exact.denominator)
    assert pickle.loads(pickle.dumps(c)).capacity(tokens, training=False) >= c.capacity(tokens, training=True)


@pytest.mark.parametrize("factor", [1e-12, 1e-7, 4e-7, 1.5e-7, 6.02e-5])
def test_a_small_capacity_is_not_none_at_all(factor):
    c = MoEConfig(**SIZES, capacity_factor=factor)
    assert c.capacity(10**8, training=True) == math.ceil(Fraction(str(factor)) * 10**8 * 2 / 6) > 0
    assert c.capacity(0, training=True) == 0


@pytest.mark.parametrize("factor", [1e7, 1e30, 1e308])
def test_a_large_capacity_drops_nothing_and_fits_64_bits(factor):
    assert 2 * 2**30 <= MoEConfig(**SIZES, capacity_factor=factor).capacity(2**30, training=True) < 2**63


def test_unknown_hosts_and_presets_are_refused():
    with pytest.raises(ValueError, match="model_type must be one of 'mixtral', .*, got 'llama'"):
        MoEConfig.from_hf(SimpleNamespace(model_type="llama"))
    with pytest.raises(ValueError, match="name must be one of 'mixtral-8x7b', .*, got 'mixtral'"):
        MoEConfig.preset("mixtral")


def test_presets():
    c = MoEConfig.preset("deepseek-v3", num_experts=64)
    assert (c.hidden_size, c.intermediate_size, c.num_experts, c.top_k) == (7168, 2048, 64, 8)
    assert (c.shared_intermediate_size, c.router.num_groups, c.router.scaling_factor) == (2048, 8, 2.5)
    assert MoEConfig.preset("mixtral-8x7b") == MoEConfig(4096, 14336, 8, 2)
