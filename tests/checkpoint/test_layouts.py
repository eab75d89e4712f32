"""Every layout against tensors spelled out by hand: read into a layer, written, there and back, and what is refused."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from fastmoe_cpp import MoE, MoEConfig, RouterConfig, reference
from fastmoe_cpp.checkpoint import LAYOUTS, Checkpoint, CheckpointError, LayoutError, convert, families, load_moe

from . import make

HOSTS = [(kind, layout) for kind, layouts in make.HOLDERS.items() for layout in layouts]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Each kind of model in each layout that holds it, converted from its own layout; made when first asked for."""
    root = tmp_path_factory.mktemp("converted")

    def get(kind: str, layout: str):
        source = root / kind / "source"
        if not source.exists():
            make.checkpoint(source, kind)
        target = root / kind / layout
        if not target.exists():
            convert(source, target, layout)
        return target

    return get


def test_every_layout_is_covered():
    assert {layout for layouts in make.HOLDERS.values() for layout in layouts} == set(LAYOUTS)


def expected_state(kind: str, layer: int) -> make.Tensors:
    prefix = f"model.layers.{layer}.mlp."
    return {name.removeprefix(prefix): t for name, t in make.own(make.parts(kind, layer), layer).items()}


@pytest.mark.parametrize(("kind", "layout"), HOSTS)
def test_reads_what_the_host_writes(kind, layout, tmp_path):
    """The host's own tensors, with the configuration beside them, go into the layer as they are."""
    source = make.checkpoint(tmp_path / "host", kind, layout, with_trunk=False)
    opened = Checkpoint(source, layout=layout)
    assert opened.layout.name == layout
    opened.validate()
    layer = MoE(opened.moe, dtype=torch.bfloat16)
    load_moe(layer, opened, 1)
    make.same_bits(layer.state_dict(), expected_state(kind, 1))


@pytest.mark.parametrize(("kind", "layout"), HOSTS)
def test_writes_what_the_host_reads(kind, layout, converted):
    """The MoE layers come out under the host's names, in its shapes, bit for bit."""
    found = make.read(converted(kind, layout))
    wanted: make.Tensors = {}
    for layer in range(2):
        wanted |= make.layer_tensors(layout, kind, make.parts(kind, layer), layer)
    make.same_bits({name: found[name] for name in found if name in wanted}, wanted)
    beside = [t for name, t in found.items() if name not in wanted]
    assert len(beside) == (len(make.trunk(kind)) if "model_type" in make.CONFIGS[kind] else 0)


@pytest.mark.parametrize("kind", make.HOLDERS)
def test_there_and_back(kind, converted, tmp_path):
    """A -> B -> A for every pair of layouts that can hold the model: names, shapes, dtypes and bits as before."""
    for a, b in itertools.product(make.HOLDERS[kind], repeat=2):
        there, back = tmp_path / f"{a}-{b}", tmp_path / f"{a}-{b}-{a}"
        convert(converted(kind, a), there, b)
        convert(there, back, a)
        make.same_bits(make.read(back), make.read(converted(kind, a)))
        assert Checkpoint(back).moe == Checkpoint(converted(kind, a)).moe


@pytest.mark.parametrize("kind", make.HOLDERS)
def test_what_a_layout_cannot_hold_is_refused_by_name(kind, converted, tmp_path):
    for layout in sorted(set(LAYOUTS) - set(make.HOLDERS[kind])):
        with pytest.raises(CheckpointError, match=LAYOUTS[layout].family or layout) as caught:
            convert(converted(kind, kind), tmp_path / layout, layout)
        # without a configuration of transformers it is that which is missing
        assert isinstance(caught.value, LayoutError) or "model_type" not in make.CONFIGS[kind]
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "layout", "words"),
    [
        ("qwen2_moe", "torchtitan", "a gate of the shared experts"),
        ("gpt_oss", "torchtitan", "biases of the experts"),
        ("mixtral", "gpt_neox", "gated experts"),
        ("mixtral", "fastmoe", "activation = 'swiglu'"),
        ("olmoe", "qwen3_moe", "their attention differs"),
        ("gpt_neox", "fastmoe", "renormalize = False"),
        ("fastmoe", "gpt_neox", "biases of the experts"),
    ],
)
def test_the_reason_is_said(kind, layout, words, converted, tmp_path):
    with pytest.raises(LayoutError, match=words):
        convert(converted(kind, kind), tmp_path / "out", layout)


def test_a_curve_that_megatron_lacks_is_refused(tmp_path):
    """quick_gelu's alpha is a constant there; the limit is an argument."""
    source = make.checkpoint(tmp_path / "source", "gpt_oss")

    def set_in_config(name: str, value: float) -> None:
        (source / "config.json").write_text(json.dumps(make.CONFIGS["gpt_oss"] | {name: value}))

    set_in_config("swiglu_limit", 3.0)
    convert(source, tmp_path / "grouped", "megatron_grouped")
    assert Checkpoint(tmp_path / "grouped").own["host"]["activation_func_clamp_value"] == 3.0
    set_in_config("swiglu_alpha", 1.5)
    for layout in ("megatron_grouped", "megatron_sequential"):
        with pytest.raises(LayoutError, match=r"activation_alpha = 1.5 \(quick_gelu's is 1.702\)"):
            convert(source, tmp_path / "out", layout)


ROUTED = {
    "plain": {},
    "bias": {"expert_bias": True},
    "best of groups": {"num_groups": 4, "topk_groups": 2, "group_score": "max"},
    "best two of groups": {"num_groups": 4, "topk_groups": 2, "group_score": "top2_sum"},
}


@pytest.mark.parametrize("case", ROUTED)
def test_a_softmax_over_the_chosen_is_a_renormalised_one_where_both_choose_alike(case):
    """By what the reference computes of both."""
    after, before = (
        MoEConfig(6, 4, 8, 4, router=RouterConfig(scores_after_topk=after, renormalize=not after, **ROUTED[case]))
        for after in (True, False)
    )
    torch.manual_seed(0)
    weights = {
        "router.weight": torch.randn(8, 6, dtype=torch.float64),
        "experts.gate_up_proj": torch.randn(8, 8, 6, dtype=torch.float64),
        "experts.down_proj": torch.randn(8, 6, 4, dtype=torch.float64),
    }
    if "expert_bias" in ROUTED[case]:
        weights["router.expert_bias"] = torch.rand(8, dtype=torch.float64)
    x = torch.randn(200, 6, dtype=torch.float64)
    one, other = (reference.moe(x, weights, config).hidden_states for config in (after, before))
    alike = torch.allclose(one, other, rtol=1e-9)
    assert alike == (case in ("plain", "best of groups"))
    assert (families.differences(after, before) == []) == alike
    assert (LAYOUTS["torchtitan"].refusals(MoEConfig(6, 4, 8, 4, router=after.router)) == []) == (case == "plain")


def test_sums_of_a_group_s_best_are_of_logits_in_megatron():
    def refusals(**router) -> list[str]:
        config = MoEConfig(6, 4, 8, 4, router=RouterConfig(**ROUTED["best two of groups"], **router))
        return LAYOUTS["megatron_grouped"].refusals(config)

    assert refusals(renormalize=True) == ["renormalize = True with group_score = 'top2_sum' of softmax scores"]
    assert refusals(renormalize=False) == refusals(scores_after_topk=True) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"router": RouterConfig(expert_bias=True)}, "expert_bias = True with softmax scores"),
        ({"router": RouterConfig(bias=True)}, "router.bias = True where bias is False"),
        ({"bias": True}, "router.bias = False where bias is True"),
        ({"bias": True, "router": RouterConfig(bias=True), "shared_intermediate_size": 5}, "bias = True with shared"),
    ],
)
def test_what_megatron_core_has_no_parameter_for_is_refused(changes, words):
    assert any(
        reason.startswith(words) for reason in LAYOUTS["megatron_sequential"].refusals(MoEConfig(6, 4, 8, 2, **changes))
    )


def test_torchtitan_0_3_weights_no_input():
    config = MoEConfig(6, 4, 8, 2, weight_on_input=True)
    assert LAYOUTS["torchtitan_0_3"].refusals(config) == ["weight_on_input = True"]
    assert LAYOUTS["torchtitan"].refusals(config) == []
    assert "score_before_experts" not in LAYOUTS["torchtitan_0_3"].host_arguments(MoEConfig(6, 4, 8, 2))


@pytest.mark.parametrize(("layout", "head"), [("torchtitan", "output.weight"), ("torchtitan_0_3", "lm_head.weight")])
def test_a_tied_model_gets_its_output_layer_in_torchtitan(layout, head, tmp_path):
    source = make.checkpoint(tmp_path / "source", "qwen3_moe")
    (source / "config.json").write_text(json.dumps(make.CONFIGS["qwen3_moe"] | {"tie_word_embeddings": True}))
    tensors = make.read(source)
    tensors.pop("lm_head.weight", None)
    tied = make.write(tmp_path / "tied", tensors, make.CONFIGS["qwen3_moe"] | {"tie_word_embeddings": True})
    done = convert(tied, tmp_path / "out", layout)
    written = make.read(tmp_path / "out")
    assert torch.equal(written[head], written["tok_embeddings.weight"])
    assert any("tied" in note for note in done.notes)


def test_host_arguments_say_what_weights_do_not(converted):
    titan = Checkpoint(converted("deepseek_v3", "torchtitan")).own["host"]
    assert titan == {
        "num_experts": 8, "num_shared_experts": 2, "score_func": "sigmoid", "route_norm": True, "route_scale": 2.5,
        "gate_bias": False, "score_before_experts": False, "top_k": 4, "num_expert_groups": 4, "num_limited_groups": 2,
        "load_balance_coeff": 1e-3,
    }  # fmt: skip
    megatron = Checkpoint(converted("qwen2_moe", "megatron_grouped")).own["host"]
    assert megatron["moe_router_pre_softmax"] is True and megatron["moe_shared_expert_gate"] is True
    assert (megatron["num_moe_experts"], megatron["moe_router_topk"], megatron["moe_ffn_hidden_size"]) == (8, 4, 4)
    assert Checkpoint(converted("gpt_oss", "megatron_grouped")).own["host"]["activation_func_clamp_value"] == 7.0


def test_torchtitan_gets_its_names_of_the_whole_model(converted):
    names = set(make.read(converted("qwen3_moe", "torchtitan")))
    assert {"tok_embeddings.weight", "norm.weight", "layers.1.attention_norm.weight"} <= names
    assert not any(name.startswith("model.") for name in names)
