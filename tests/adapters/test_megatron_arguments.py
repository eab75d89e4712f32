"""Every argument of every version of Megatron-LM: honoured, refused, default, None, of a wrong type, contradictory."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastmoe_cpp import MoEConfig
from megatron_adapters import get_adapter
from megatron_adapters.arguments import (
    MEGATRON_LM,
    REQUIRED,
    Argument,
    ArgumentError,
    contradiction,
    describe,
    option,
    read,
    read_megatron_lm,
)

pytestmark = pytest.mark.filterwarnings("ignore:MoEConfig.top_k is 1")
VERSIONS = tuple(MEGATRON_LM)
#: What every namespace here has, but for what a test changes.
BASE = {"hidden_size": 16, "fmoe_num_experts": 4, "num_layers": 2}
ROWS = [(version, row) for version in VERSIONS for row in MEGATRON_LM[version]]


def namespace(**changes: Any) -> SimpleNamespace:
    """BASE with changes; a change to ``...`` takes the argument away."""
    return SimpleNamespace(**{name: value for name, value in {**BASE, **changes}.items() if value is not ...})


def config(version: str, **changes: Any) -> MoEConfig:
    return get_adapter(version).moe_config(namespace(**changes))


@dataclass(frozen=True)
class Effect:
    """A value of an argument, what else it needs, and what it does: to fields of the MoEConfig or to values read."""

    value: Any
    given: dict[str, Any]
    fields: dict[str, Any]
    values: dict[str, Any]


def effect(value: Any, given: dict[str, Any] | None = None, values: dict[str, Any] | None = None, **fields: Any):
    return Effect(value, given or {}, fields, values or {})


#: For every argument that is honoured, a value that is not its default and what comes of it.
HONOURED: dict[str, Effect] = {
    "fmoe_num_experts": effect(6, num_experts=6),
    "top_k": effect(1, top_k=1, intermediate_size=64),
    "hidden_hidden_size": effect(24, intermediate_size=24),
    "balance_strategy": effect("gshard", values={"balance_strategy": "gshard"}),
    "balance_loss_weight": effect(0.25, {"balance_strategy": "gshard"}, values={"balance_loss_weight": 0.25}),
    "fmoefy": effect(False, values={"fmoefy": False}),
    "distributed_experts": effect(False, {"data_parallel_size": 2}, num_experts=4),
    "hidden_size": effect(32, hidden_size=32, intermediate_size=64),
    "num_layers": effect(3, values={"num_layers": 3}),
    "init_method_std": effect(0.5, initializer_range=0.5),
    "openai_gelu": effect(True, activation="gelu_tanh"),
    "data_parallel_size": effect(2, num_experts=8),
    "tensor_model_parallel_size": effect(2, intermediate_size=16),
    "pipeline_model_parallel_size": effect(2, values={"pipeline_model_parallel_size": 2}),
    "world_size": effect(2, {"data_parallel_size": 2}, num_experts=8),
    "rank": effect(1, values={"rank": 1}),
    "fp16": effect(True, values={"params_dtype": torch.float16}),
    "params_dtype": effect(torch.float16, {"fp16": True}, values={"params_dtype": torch.float16}),
    "bf16": effect(True, values={"params_dtype": torch.bfloat16}),
    "ffn_hidden_size": effect(40, intermediate_size=20),
    "fp32_allreduce": effect(True, values={"fp32_allreduce": True}),
    "accumulate_allreduce_grads_in_fp32": effect(
        True, {"use_contiguous_buffers_in_ddp": True}, values={"accumulate_allreduce_grads_in_fp32": True}
    ),
    "use_contiguous_buffers_in_ddp": effect(True, values={"use_contiguous_buffers_in_ddp": True}),
    "use_contiguous_buffers_in_local_ddp": effect(False, values={"use_contiguous_buffers_in_local_ddp": False}),
    "transformer_pipeline_model_parallel_size": effect(1, values={"transformer_pipeline_model_parallel_size": 1}),
}
#: For every argument that is refused, a value and the reason that must be named.
REFUSED: dict[str, tuple[Any, str]] = {
    "DDP_impl": ("torch", "would average different experts"),
    "num_layers_per_virtual_pipeline_stage": (1, "checkpoint files"),
    "virtual_pipeline_model_parallel_size": (2, "checkpoint files"),
    "log_num_zeros_in_grad": (True, "one data-parallel rank alone"),
    "sequence_parallel": (True, "a part of the sequence"),
}


def test_every_argument_is_here() -> None:
    rows = {row.name: row for _, row in ROWS}
    assert {name for name, row in rows.items() if row.honoured} == set(HONOURED)
    assert {name for name, row in rows.items() if not row.honoured} == set(REFUSED)


@pytest.mark.parametrize(("version", "row"), ROWS, ids=lambda v: v if isinstance(v, str) else v.name)
def test_an_argument(version: str, row: Argument) -> None:
    host = f"Megatron-LM v{version}"
    names = [*row.names]
    # by default: missing and None are the same
    absent = {name: ... for name in names}
    if row.default is REQUIRED:
        for nothing in (absent, dict.fromkeys(names)):
            with pytest.raises(ArgumentError) as refused:
                config(version, **nothing)
            assert str(refused.value).startswith(f"{host}: {' or '.join(map(option, names))} must be given")
    else:
        missing = read_megatron_lm(namespace(**absent), version)
        assert missing == read_megatron_lm(namespace(**dict.fromkeys(names)), version)
        assert config(version, **absent) == config(version, **dict.fromkeys(names))
        if row.name not in ("hidden_hidden_size", "params_dtype"):  # filled in
            assert missing[row.name] == row.default
    # of a wrong type
    wrong = object() if row.kind is torch.dtype else torch.float32
    with pytest.raises(ArgumentError) as refused:
        config(version, **{row.name: wrong})
    assert str(refused.value).startswith(f"{host}: {option(row.name)} must be ")
    assert repr(wrong) in str(refused.value)
    if row.kind is int or row.kind is float:
        with pytest.raises(ArgumentError, match=f"{option(row.name)} must be .*, got True"):
            config(version, **{row.name: True})
        with pytest.raises(ArgumentError, match=f"{option(row.name)} (must be at least|is not honoured).*, got -1"):
            config(version, **{row.name: -1})
    if row.kind is float:
        with pytest.raises(ArgumentError, match=f"{option(row.name)} must be finite, got nan"):
            config(version, **{row.name: float("nan")})
    if not row.honoured:
        value, reason = REFUSED[row.name]
        with pytest.raises(ArgumentError) as refused:
            config(version, **{row.name: value})
        message = str(refused.value)
        assert message.startswith(f"{host}: {option(row.name)} is not honoured") and reason in message
        assert message.endswith(f"got {value!r}")
        return
    # honoured, and not what it is without
    honoured = HONOURED[row.name]
    given = {name: value for name, value in honoured.given.items() if any(r.name == name for r in MEGATRON_LM[version])}
    found = config(version, **given, **{row.name: honoured.value})
    for name, value in honoured.fields.items():
        assert getattr(found, name) == value
        if name != "num_experts" or row.name != "world_size":
            assert getattr(config(version, **given), name) != value
    values = read_megatron_lm(namespace(**given, **{row.name: honoured.value}), version)
    assert {name: values[name] for name in honoured.values} == honoured.values


@pytest.mark.parametrize("version", VERSIONS)
def test_a_balance_loss_has_its_weight(version: str) -> None:
    def coefficient(**changes: Any) -> float:
        return config(version, **changes).router.balance_loss_coefficient

    assert coefficient(balance_strategy="gshard") == 1.0
    assert coefficient(balance_strategy="switch", top_k=1, balance_loss_weight=0.5) == 0.5
    for strategy in (None, "naive", "swipe"):
        assert coefficient(balance_strategy=strategy, balance_loss_weight=0.5) == 0.0


@pytest.mark.parametrize("version", VERSIONS)
def test_num_experts_is_the_old_name_of_fmoe_num_experts(version: str) -> None:
    """None under one name must not hide a value under the other."""
    for given in (
        {"num_experts": 8, "fmoe_num_experts": ...},
        {"num_experts": 8, "fmoe_num_experts": None},
        {"num_experts": None, "fmoe_num_experts": 8},
        {"num_experts": 8, "fmoe_num_experts": 8},
    ):
        assert config(version, **given).num_experts == 8


CONTRADICTIONS = [
    ({"num_experts": 8}, "--fmoe-num-experts 4", "--num-experts 8"),
    ({"balance_strategy": "switch"}, "--top-k 2", "--balance-strategy 'switch'"),
    ({"balance_strategy": "gshard", "top_k": 1}, "--top-k 1", "--balance-strategy 'gshard'"),
    ({"top_k": 5, "hidden_hidden_size": 8}, "--top-k 5", "--fmoe-num-experts 4"),
    ({"params_dtype": torch.float16}, "--params-dtype torch.float16", "--fp16 False"),
    ({"world_size": 4, "data_parallel_size": 2}, "--world-size 4", "--data-parallel-size 2"),
    ({"fp16": True, "bf16": True}, "--fp16 True", "--bf16 True"),
    ({"bf16": True, "params_dtype": torch.float32}, "--params-dtype torch.float32", "--bf16 True"),
    (
        {"accumulate_allreduce_grads_in_fp32": True, "use_contiguous_buffers_in_ddp": False,
         "use_contiguous_buffers_in_local_ddp": False},
        "--accumulate-allreduce-grads-in-fp32 True", "--use-contiguous-buffers-in-",
    ),
]  # fmt: skip


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("given", "first", "second"), CONTRADICTIONS)
def test_contradictions_name_both(version: str, given: dict[str, Any], first: str, second: str) -> None:
    known = {name for row in MEGATRON_LM[version] for name in row.names}
    if version == "2.2" and not set(given) <= known:
        return  # bf16 and gradient buffers came with v2.5
    with pytest.raises(ArgumentError) as refused:
        config(version, **given)
    message = str(refused.value)
    assert message.startswith(f"Megatron-LM v{version}: {first} contradicts {second}")
    assert message.count("\n") == 0


@pytest.mark.parametrize("version", VERSIONS)
def test_a_width_that_is_not_divisible_must_be_given(version: str) -> None:
    with pytest.raises(ArgumentError, match="--hidden-hidden-size must be given where the MLP's width 64 is not a mul"):
        config(version, top_k=3)
    assert config(version, top_k=3, hidden_hidden_size=20).intermediate_size == 20


@pytest.mark.parametrize("version", VERSIONS)
def test_the_config_is_fastmoes_naive_layer(version: str) -> None:
    found = config(version)
    assert found == MoEConfig(
        16, 32, 4, 2, activation="gelu", bias=True, router=found.router, initializer_range=0.02
    )  # fmt: skip
    router = found.router
    assert router.bias and router.scores_after_topk and not router.renormalize and router.score_function == "softmax"


@pytest.mark.parametrize("version", VERSIONS)
def test_the_layer_needs_num_layers_and_one_gate(version: str) -> None:
    from fastmoe_cpp.fmoe.gates import NoisyGate

    layer = get_adapter(version).MegatronMLP
    with pytest.raises(ArgumentError, match="--num-layers must be given"):
        layer(namespace(num_layers=None), 0)
    with pytest.raises(ArgumentError, match="--balance-strategy 'naive' contradicts --gate 'NoisyGate'"):
        layer(namespace(balance_strategy="naive"), 0, gate=NoisyGate)
    assert type(layer(namespace(), 0, gate=NoisyGate).gate) is NoisyGate
    assert layer(namespace(balance_loss_weight=3.0), 0).balance_weight == 1.5


@pytest.mark.parametrize("version", VERSIONS)
def test_the_parsers_arguments(version: str) -> None:
    parser = argparse.ArgumentParser()
    if version == "3.0.2":  # the host has one of its own
        parser.add_argument("--num-experts", type=int, default=None)
    args = get_adapter(version).add_arguments(parser).parse_args([])
    assert vars(args) == {
        "fmoefy": False, "fmoe_num_experts": None, "num_experts": None, "top_k": 2, "balance_loss_weight": 1.0,
        "balance_strategy": None, "hidden_hidden_size": None,
    }  # fmt: skip
    rows = {row.name: row for row in MEGATRON_LM[version]}
    assert rows["top_k"].default == args.top_k and rows["balance_loss_weight"].default == args.balance_loss_weight


# --- the mechanism ----------------------------------------------------------------------------------------------------


def test_read_takes_the_first_name_that_has_a_value() -> None:
    table = [Argument(name="a", aliases=("b", "c"), kind=int, default=7)]
    assert read(SimpleNamespace(), table, "host") == {"a": 7}
    assert read(SimpleNamespace(a=None, c=0), table, "host") == {"a": 0}
    with pytest.raises(ArgumentError, match="host: --b 1 contradicts --c 2: they are two names of one argument"):
        read(SimpleNamespace(b=1, c=2), table, "host")


def test_refused_arguments_let_harmless_values_through() -> None:
    table = [Argument(name="mode", kind=str, default="off", refused="no kernel", harmless=("auto",))]
    assert read(SimpleNamespace(mode="auto"), table, "host") == {"mode": "auto"}
    with pytest.raises(ArgumentError) as refused:
        read(SimpleNamespace(mode="on"), table, "host")
    assert str(refused.value) == "host: --mode is not honoured (no kernel): leave it at 'off', got 'on'"


def test_choices_and_kinds() -> None:
    table = [Argument(name="x", kind=(int, str), default=None, choices=(1, "one"))]
    assert read(SimpleNamespace(x="one"), table, "h") == {"x": "one"}
    with pytest.raises(ArgumentError, match="h: --x must be one of 1, 'one', got 2"):
        read(SimpleNamespace(x=2), table, "h")
    with pytest.raises(ArgumentError, match="h: --x must be an integer or a string, got 0.5"):
        read(SimpleNamespace(x=0.5), table, "h")


def test_a_contradiction_is_one_sentence_with_both() -> None:
    error = contradiction("h", "a_b", 1, "c", 2, "because")
    assert isinstance(error, ArgumentError) and str(error) == "h: --a-b 1 contradicts --c 2: because"


@pytest.mark.parametrize("version", VERSIONS)
def test_the_documents_table(version: str) -> None:
    shown = describe(MEGATRON_LM[version])
    for row in MEGATRON_LM[version]:
        assert f"`{option(row.name)}`" in shown
        assert row.honoured or f"refused: {row.refused}" in shown


def test_the_page_names_what_is_refused_and_what_is_added() -> None:
    page = (Path(__file__).parents[2] / "docs" / "hosts" / "megatron-lm.md").read_text()
    internal = {"virtual_pipeline_model_parallel_size"}  # computed by the host
    for name in {
        *REFUSED,
        *vars(get_adapter("2.5").add_arguments(argparse.ArgumentParser()).parse_args([])),
    } - internal:
        assert f"`{option(name)}" in page, name
