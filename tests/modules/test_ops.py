"""fastmoe_cpp.ops hands every option to its operator that is not the operator's default."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch

from fastmoe_cpp import ops
from fastmoe_cpp.outputs import DispatchPlan

TENSOR = torch.ones(2, 3)
PLAN = DispatchPlan(TENSOR, TENSOR, TENSOR, TENSOR)
OTHER = {
    "score_function": "sigmoid", "scores_after_topk": True, "renormalize": False, "renormalize_epsilon": 1e-20,
    "scaling_factor": 2.5, "num_groups": 4, "topk_groups": 2, "group_score": "top2_sum", "capacity": 0,
    "drop_policy": "probs", "activation": "relu2", "activation_alpha": 1.5, "activation_limit": 0.5,
    "interleaved": True, "weight_on_input": True, "recompute": True,
}  # fmt: skip
CALLS = {
    "route": lambda **options: ops.route(TENSOR, 2, **options),
    "dispatch": lambda **options: ops.dispatch(TENSOR, 3, **options),
    "experts": lambda **options: ops.experts(TENSOR, TENSOR, TENSOR, TENSOR, PLAN, **options),
}


@pytest.fixture
def given(monkeypatch):
    """The options of each call of an operator, in place of the call."""
    calls = []

    def operator(*_, **options):
        calls.append(options)
        return PLAN

    monkeypatch.setattr(ops, "_ops", SimpleNamespace(**dict.fromkeys(CALLS, operator)))
    return calls


@pytest.mark.parametrize("name", CALLS)
def test_options_reach_their_operator(name, given):
    signature = inspect.signature(getattr(ops, name)).parameters.values()
    options = [p for p in signature if p.kind is p.KEYWORD_ONLY]
    assert len(options) >= 4
    CALLS[name]()
    CALLS[name](**{p.name: p.default for p in options})
    assert given == [{}, {}]
    for p in options:
        value = TENSOR if p.default is None and p.name not in OTHER else OTHER[p.name]
        CALLS[name](**{p.name: value})
        assert list(given[-1]) == [p.name] and given[-1][p.name] is value
    everything = {p.name: OTHER.get(p.name, TENSOR) for p in options}
    CALLS[name](**everything)
    assert given[-1].keys() == everything.keys()


@pytest.mark.parametrize("name", CALLS)
def test_signature_and_schema_have_the_same_defaults(name):
    schema = {a.name: a for a in getattr(torch.ops.fastmoe_cpp, name).default._schema.arguments}
    for p in inspect.signature(getattr(ops, name)).parameters.values():
        if p.kind is p.KEYWORD_ONLY:
            assert schema[p.name].has_default_value() and schema[p.name].default_value == p.default, p.name
