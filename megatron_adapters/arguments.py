"""The hosts' arguments: a table of rows a version, read by one function, refused by name where they can't be honoured.

A row names the argument as the host's parser stores it, the type and the range of its value, its default, and what it
becomes. None is never a value: an argument that is None was not given, and its default is taken. An argument without a
default must be given. An argument that is not honoured is refused, with the reason, at any value but its default.

``MEGATRON_LM`` holds the tables of Megatron-LM v2.2, v2.5 and v3.0.2; the other adapters have theirs in their own
files. The same rows are what the documents list (``describe``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastmoe_cpp import MoEConfig, RouterConfig

#: The default of an argument that has none.
REQUIRED: Any = type("Required", (), {"__repr__": lambda self: "REQUIRED"})()


class ArgumentError(ValueError):
    """An argument of the host is missing, of a wrong type or value, not honoured, or contradicts another."""


@dataclass(frozen=True, kw_only=True)
class Argument:
    """One argument of a host."""

    #: As the host's parser stores it: ``top_k`` for ``--top-k``.
    name: str
    #: Types its value may have; float takes integers, int takes no bool.
    kind: type | tuple[type, ...]
    #: What it becomes: a field of MoEConfig ('top_k', 'router.jitter_eps') or what the adapter does with it.
    becomes: str = ""
    #: Taken where the argument is missing or None; REQUIRED where it must be given. None: stays without a value.
    default: Any = REQUIRED
    #: Other names of the same argument. Two that are given must agree.
    aliases: tuple[str, ...] = ()
    #: The only values there are; all where empty.
    choices: tuple[Any, ...] = ()
    #: The smallest value.
    minimum: float | None = None
    #: Why any value but the default (and those in ``harmless``) is refused; None where the argument is honoured.
    refused: str | None = None
    harmless: tuple[Any, ...] = ()

    @property
    def honoured(self) -> bool:
        """Whether the argument's values are honoured."""
        return self.refused is None

    @property
    def names(self) -> tuple[str, ...]:
        """The name and its aliases."""
        return (self.name, *self.aliases)


def option(name: str) -> str:
    """The argument as it is typed: ``--top-k`` for ``top_k``."""
    return "--" + name.replace("_", "-")


def _is(value: Any, kind: type | tuple[type, ...]) -> bool:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if isinstance(value, bool):
        return bool in kinds or object in kinds
    if float in kinds and isinstance(value, int):
        return True
    return isinstance(value, kinds)


def _words(kind: type | tuple[type, ...]) -> str:
    names = {"int": "an integer", "float": "a number", "bool": "True or False", "str": "a string"}
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join(names.get(k.__name__, k.__name__) for k in kinds)


def read(args: Any, table: Iterable[Argument], host: str) -> dict[str, Any]:
    """The values of a table's arguments by name, of the host's args (a namespace or any object with attributes).

    Raises ArgumentError, one sentence with the argument, what is allowed and what was found, for one that is missing,
    is of a wrong type or value, contradicts another name of itself, or is refused.
    """
    return {row.name: _read_one(args, row, host) for row in table}


def _read_one(args: Any, row: Argument, host: str) -> Any:
    given = {name: getattr(args, name, None) for name in row.names}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        if row.default is REQUIRED:
            wanted = " or ".join(option(name) for name in row.names)
            raise ArgumentError(f"{host}: {wanted} must be given, found no value ({row.becomes or row.name})")
        return row.default
    (name, value), *others = given.items()
    for other, different in others:
        if different != value:
            raise contradiction(host, name, value, other, different, "they are two names of one argument")
    if not _is(value, row.kind):
        raise ArgumentError(f"{host}: {option(name)} must be {_words(row.kind)}, got {value!r}")
    if row.refused is not None and value != row.default and value not in row.harmless:
        raise ArgumentError(
            f"{host}: {option(name)} is not honoured ({row.refused}): leave it at {row.default!r}, got {value!r}"
        )
    if row.choices and value not in row.choices:
        raise ArgumentError(f"{host}: {option(name)} must be one of {', '.join(map(repr, row.choices))}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ArgumentError(f"{host}: {option(name)} must be finite, got {value!r}")
    if row.minimum is not None and value < row.minimum:
        raise ArgumentError(f"{host}: {option(name)} must be at least {row.minimum:g}, got {value!r}")
    return value


def contradiction(host: str, name: str, value: Any, other: str, different: Any, why: str) -> ArgumentError:
    """The error, to be raised, of two arguments that can't both be honoured."""
    return ArgumentError(f"{host}: {option(name)} {value!r} contradicts {option(other)} {different!r}: {why}")


def describe(table: Sequence[Argument]) -> str:
    """A table as Markdown: argument, default, what it becomes or why it is refused."""
    lines = ["| argument | default | |", "|---|---|---|"]
    for row in table:
        names = ", ".join(f"`{option(name)}`" for name in row.names)
        default = "must be given" if row.default is REQUIRED else f"`{row.default}`"
        lines.append(f"| {names} | {default} | {row.becomes if row.honoured else 'refused: ' + str(row.refused)} |")
    return "\n".join(lines)


# --- Megatron-LM ------------------------------------------------------------------------------------------------------

#: FastMoE's balance strategies, each the name of a gate. None is 'naive': no balance loss.
BALANCE_STRATEGIES = ("naive", "noisy", "gshard", "switch", "swipe")
_FIXED_TOP_K = {"gshard": 2, "switch": 1}

_EXPERTS = "num_experts: experts of one worker; times the data-parallel size where they are distributed"

# What FastMoE's users set, the same in every version; then what the host itself has.
_COMMON = (
    Argument(name="fmoe_num_experts", aliases=("num_experts",), kind=int, minimum=1, becomes=_EXPERTS),
    Argument(name="top_k", kind=int, default=2, minimum=1, becomes="top_k"),
    Argument(
        name="hidden_hidden_size", kind=int, default=None, minimum=1,
        becomes="intermediate_size: of one expert on one tensor-parallel rank; by default --ffn-hidden-size "
                "(4 * hidden) / top_k / tensor-parallel size",
    ),
    Argument(name="balance_strategy", kind=str, default=None, choices=BALANCE_STRATEGIES, becomes="the gate"),
    Argument(
        name="balance_loss_weight", kind=float, default=1.0, minimum=0, becomes="router.balance_loss_coefficient",
    ),
    Argument(name="fmoefy", kind=bool, default=True, becomes="whether the model's MLPs are replaced (as a flag: off)"),
    Argument(
        name="distributed_experts", kind=bool, default=True,
        becomes="whether the data-parallel ranks hold experts of their own",
    ),
    Argument(name="hidden_size", kind=int, minimum=1, becomes="hidden_size"),
    Argument(name="num_layers", kind=int, default=None, minimum=1, becomes="start of the weights, balance loss"),
    Argument(name="init_method_std", kind=float, default=0.02, minimum=0, becomes="initializer_range"),
    Argument(name="openai_gelu", kind=bool, default=False, becomes="activation: 'gelu_tanh' instead of 'gelu'"),
    Argument(name="data_parallel_size", kind=int, default=1, minimum=1, becomes="ranks the experts are spread over"),
    Argument(name="tensor_model_parallel_size", kind=int, default=1, minimum=1, becomes="ranks that share an expert"),
    Argument(name="pipeline_model_parallel_size", kind=int, default=1, minimum=1, becomes="stages of the model"),
    Argument(name="world_size", kind=int, default=None, minimum=1, becomes="checked: product of the three sizes"),
    Argument(name="rank", kind=int, default=0, minimum=0, becomes="seed of the experts' start"),
    Argument(name="fp16", kind=bool, default=False, becomes="dtype"),
    Argument(name="params_dtype", kind=torch.dtype, default=None, becomes="dtype"),
    Argument(
        name="DDP_impl", kind=str, default="local", choices=("local", "torch"),
        refused="torch's DistributedDataParallel would average different experts",
    ),
)  # fmt: skip
_ONLY_V2_2 = (Argument(name="fp32_allreduce", kind=bool, default=False, becomes="DistributedDataParallel"),)
_INTERLEAVED = "interleaved stages have no place in the experts' checkpoint files"
_FROM_V2_5 = (
    Argument(name="bf16", kind=bool, default=False, becomes="dtype"),
    Argument(name="ffn_hidden_size", kind=int, default=None, minimum=1, becomes="default of --hidden-hidden-size"),
    Argument(
        name="accumulate_allreduce_grads_in_fp32",
        kind=bool,
        default=False,
        becomes="DistributedDataParallel",
    ),
    Argument(name="num_layers_per_virtual_pipeline_stage", kind=int, default=None, refused=_INTERLEAVED),
    Argument(name="virtual_pipeline_model_parallel_size", kind=int, default=None, refused=_INTERLEAVED),
    Argument(
        name="log_num_zeros_in_grad",
        kind=bool,
        default=False,
        refused="the host counts the experts of one data-parallel rank alone",
    ),
)
_ONLY_V2_5 = (
    Argument(name="use_contiguous_buffers_in_ddp", kind=bool, default=False, becomes="DistributedDataParallel"),
)
_ONLY_V3_0_2 = (
    Argument(name="use_contiguous_buffers_in_local_ddp", kind=bool, default=True, becomes="DistributedDataParallel"),
    Argument(
        name="sequence_parallel", kind=bool, default=False,
        refused="a tensor-parallel rank's router would see a part of the sequence",
    ),
    Argument(
        name="transformer_pipeline_model_parallel_size", kind=int, default=None, minimum=1,
        becomes="stages with transformer layers, for the balance loss",
    ),
)  # fmt: skip

#: The tables of Megatron-LM, by the adapter's version.
MEGATRON_LM: dict[str, tuple[Argument, ...]] = {
    "2.2": _COMMON + _ONLY_V2_2,
    "2.5": _COMMON + _FROM_V2_5 + _ONLY_V2_5,
    "3.0.2": _COMMON + _FROM_V2_5 + _ONLY_V3_0_2,
}


def read_megatron_lm(args: Any, version: str) -> dict[str, Any]:
    """The values of Megatron-LM's arguments by name, checked against each other, the experts' width filled in.

    ``hidden_hidden_size`` is never None in the result. Raises ArgumentError as ``read`` does.
    """
    host = f"Megatron-LM v{version}"
    values = read(args, MEGATRON_LM[version], host)
    strategy, top_k = values["balance_strategy"], values["top_k"]
    if strategy in _FIXED_TOP_K and top_k != _FIXED_TOP_K[strategy]:
        why = f"this gate chooses exactly {_FIXED_TOP_K[strategy]}"
        raise contradiction(host, "top_k", top_k, "balance_strategy", strategy, why)
    if values["fp16"] and values.get("bf16"):
        raise contradiction(host, "fp16", True, "bf16", True, "parameters have one dtype")
    expected = torch.float16 if values["fp16"] else torch.bfloat16 if values.get("bf16") else torch.float32
    if values["params_dtype"] not in (None, expected):
        flag = "bf16" if values.get("bf16") else "fp16"
        raise contradiction(host, "params_dtype", values["params_dtype"], flag, values[flag], f"that is {expected}")
    values["params_dtype"] = expected
    buffers = next((name for name in values if name.startswith("use_contiguous_buffers")), None)
    if buffers is not None and values["accumulate_allreduce_grads_in_fp32"] and not values[buffers]:
        why = "float32 gradients are kept in the contiguous buffers"
        raise contradiction(host, "accumulate_allreduce_grads_in_fp32", True, buffers, False, why)
    sizes = [values[f"{axis}_parallel_size"] for axis in ("data", "tensor_model", "pipeline_model")]
    if values["world_size"] is not None and values["world_size"] != math.prod(sizes):
        why = f"the world is data * tensor * pipeline = {' * '.join(map(str, sizes))}"
        raise contradiction(host, "world_size", values["world_size"], "data_parallel_size", sizes[0], why)
    if values["hidden_hidden_size"] is None:
        values["hidden_hidden_size"] = _default_width(values, host)
    experts = values["fmoe_num_experts"] * (values["data_parallel_size"] if values["distributed_experts"] else 1)
    if top_k > experts:
        raise contradiction(host, "top_k", top_k, "fmoe_num_experts", values["fmoe_num_experts"],
                            f"there are {experts} experts to choose from")  # fmt: skip
    return values


def _default_width(values: dict[str, Any], host: str) -> int:
    width, top_k = values.get("ffn_hidden_size") or 4 * values["hidden_size"], values["top_k"]
    ranks = values["tensor_model_parallel_size"]
    if width % (top_k * ranks):
        raise ArgumentError(
            f"{host}: --hidden-hidden-size must be given where the MLP's width {width} is not a multiple of --top-k "
            f"{top_k} times --tensor-model-parallel-size {ranks}"
        )
    return width // (top_k * ranks)


def megatron_lm_config(args: Any, version: str) -> MoEConfig:
    """The MoEConfig of Megatron-LM's arguments: see the adapters' ``moe_config``."""
    values = read_megatron_lm(args, version)
    strategy = values["balance_strategy"] or "naive"
    switch_loss = strategy in ("gshard", "switch")
    router = RouterConfig(
        bias=True,
        scores_after_topk=strategy != "switch",
        renormalize=False,
        balance_loss="switch",
        balance_loss_coefficient=float(values["balance_loss_weight"]) if switch_loss else 0.0,
    )
    return MoEConfig(
        hidden_size=values["hidden_size"],
        intermediate_size=values["hidden_hidden_size"],
        num_experts=values["fmoe_num_experts"] * (values["data_parallel_size"] if values["distributed_experts"] else 1),
        top_k=values["top_k"],
        router=router,
        activation="gelu_tanh" if values["openai_gelu"] else "gelu",
        bias=True,
        initializer_range=float(values["init_method_std"]),
    )
