"""Every argument of both eras: its default, what it becomes, None, a wrong type, a refused value, contradictions."""

import types

import pytest

from megatron_adapters import gpt_neox
from megatron_adapters.arguments import REQUIRED

from . import small

ROWS = [(era, row) for era, table in gpt_neox.TABLES.items() for row in table]
FIELDS = {"now": small.COMMON | small.NOW, "moe_loss": small.COMMON | small.MOE_LOSS}

# Honoured values and what moe_config makes of them, beside the defaults of FIELDS.
CHANGES = [
    ("now", {"moe_num_experts": 8}, "num_experts", 8),
    ("now", {"te_fp8_mha": True}, "num_experts", 4),
    ("now", {"moe_num_experts": 8, "moe_top_k": 3}, "top_k", 3),
    ("now", {"hidden_size": 32}, "hidden_size", 32),
    ("now", {"intermediate_size": 48}, "intermediate_size", 48),
    ("now", {"moe_router_type": "topk"}, "router.sinkhorn", False),
    ("now", {"moe_router_type": "sinkhorn"}, "router.sinkhorn", True),
    ("now", {"moe_router_type": "sinkhorn"}, "router.sinkhorn_iterations", 3),
    ("now", {"moe_router_type": "sinkhorn", "moe_top_k": 1}, "router.score_function", "sigmoid"),
    ("now", {"moe_router_type": "sinkhorn", "moe_top_k": 2}, "router.score_function", "softmax"),
    ("now", {"moe_router_type": "topk", "moe_top_k": 1}, "router.score_function", "softmax"),
    ("now", {"moe_router_type": "topk", "moe_jitter_eps": 0.1}, "router.jitter_eps", 0.1),
    ("now", {"activation": "swish"}, "activation", "silu"),
    ("now", {"activation": "swiglu"}, "activation", "swiglu"),
    ("now", {"bias_gelu_fusion": True}, "activation", "gelu_tanh"),
    ("now", {"init_method_std": 0.1}, "initializer_range", 0.1),
    ("moe_loss", {"num_experts": 8}, "num_experts", 8),
    ("moe_loss", {"moe_top_k": 2}, "top_k", 2),
    ("moe_loss", {"moe_loss_coeff": 0.5}, "router.balance_loss_coefficient", 0.5),
    ("moe_loss", {"moe_train_capacity_factor": 1.5}, "capacity_factor", 1.5),
    ("moe_loss", {"moe_eval_capacity_factor": 1.5}, "eval_capacity_factor", 1.5),
    ("moe_loss", {"moe_token_dropping": False}, "capacity_factor", None),
    ("moe_loss", {"activation": "relu"}, "activation", "relu"),
    ("moe_loss", {}, "intermediate_size", 64),
]  # fmt: skip


def arguments(era, **changes):
    experts = {"moe_num_experts" if era == "now" else "num_experts": 4}
    return types.SimpleNamespace(**FIELDS[era] | experts | changes)


@pytest.mark.parametrize("era", gpt_neox.ERAS)
def test_defaults_are_the_hosts(era):
    rows = {row.name: row for row in gpt_neox.TABLES[era]}
    for name, value in FIELDS[era].items():
        if name in rows and rows[name].default is not REQUIRED:
            assert rows[name].default == value, name


@pytest.mark.filterwarnings("ignore:MoEConfig.top_k is 1")
@pytest.mark.parametrize("era, changes, field, value", CHANGES)
def test_honoured(era, changes, field, value):
    found = gpt_neox.moe_config(arguments(era, **changes), era)
    for name in field.split("."):
        found = getattr(found, name)
    assert found == value


@pytest.mark.parametrize("era, row", ROWS, ids=lambda v: getattr(v, "name", v))
def test_none_is_no_value(era, row):
    args = arguments(era)
    setattr(args, row.name, None)
    if row.default is REQUIRED:
        with pytest.raises(ValueError, match=f"{row.name.replace('_', '-')} must be given"):
            gpt_neox.check(args, era)
    else:
        assert gpt_neox.check(args, era)[row.name] == row.default


@pytest.mark.parametrize("era, row", ROWS, ids=lambda v: getattr(v, "name", v))
def test_a_wrong_type_is_named(era, row):
    args = arguments(era)
    setattr(args, row.name, [1])
    with pytest.raises(ValueError, match=rf"--{row.name.replace('_', '-')} must be .*got \[1\]"):
        gpt_neox.check(args, era)


@pytest.mark.parametrize("era, row", [(e, r) for e, r in ROWS if not r.honoured], ids=lambda v: getattr(v, "name", v))
def test_refused_by_name(era, row):
    args = arguments(era)
    setattr(args, row.name, {bool: True, int: 7, float: 0.5}[row.kind])
    with pytest.raises(ValueError, match=f"--{row.name.replace('_', '-')} is not honoured"):
        gpt_neox.check(args, era)


@pytest.mark.parametrize(
    "era, changes, message",
    [
        ("now", {"moe_top_k": 5}, "--moe-top-k 5 contradicts --moe-num-experts 4"),
        ("now", {"moe_jitter_eps": 0.1}, "--moe-jitter-eps 0.1 contradicts --moe-router-type 'sinkhorn'"),
        ("now", {"model_parallel_size": 3}, "--moe-num-experts 4 contradicts --model-parallel-size 3"),
        (
            "now",
            {"te_fp8_mha": True, "gpt_j_residual": True},
            "--te-fp8-mha True contradicts --gpt-j-residual True: attention",
        ),
        ("now", {"activation": "mish"}, "--activation must be one of .*got 'mish'"),
        ("moe_loss", {"activation": "geglu"}, "--activation must be one of .*got 'geglu'"),
        ("moe_loss", {"moe_top_k": 3}, "--moe-top-k must be one of 1, 2, got 3"),
        ("moe_loss", {"model_parallel_size": 2}, "--model-parallel-size is not honoured beside --num-experts"),
        ("moe_loss", {"mlp_type": "llama"}, "--mlp-type must be one of"),
    ],
)
def test_contradictions(era, changes, message):
    with pytest.raises(ValueError, match=message):
        gpt_neox.check(arguments(era, **changes), era)


def test_an_unknown_era_is_refused():
    with pytest.raises(ValueError, match="era must be one of 'now', 'moe_loss', got 'before'"):
        gpt_neox.moe_config(arguments("now"), "before")
