"""transformers 4: the MoE blocks of a model, which hold an MLP an expert, become blocks of ours in place.

A block stays an instance of the host's class, which is how the host finds its router logits, and keeps the host's
router, shared experts, hooks and mode. Its list of MLPs becomes one module with the weights stacked, whose state dict
still has a tensor for every expert under the host's name.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import ops
from ...config import MoEConfig, RouterConfig
from ...experts import Experts
from .activation import GATED, elementwise

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Family(NamedTuple):
    """Where a family's block is defined, what its experts are, and the names of their three projections."""

    module: str
    block: str
    mlp: str
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"

    @property
    def served(self) -> str:
        """The name of the class that takes the block's place."""
        return f"FastMoE{self.block}"


FAMILIES = (
    Family("mixtral", "MixtralSparseMoeBlock", "MixtralBlockSparseTop2MLP", "w1", "w3", "w2"),
    Family("qwen2_moe", "Qwen2MoeSparseMoeBlock", "Qwen2MoeMLP"),
    Family("qwen3_moe", "Qwen3MoeSparseMoeBlock", "Qwen3MoeMLP"),
    Family("olmoe", "OlmoeSparseMoeBlock", "OlmoeMLP"),
    Family("deepseek_v3", "DeepseekV3MoE", "DeepseekV3MLP"),
)
_MODULE = "transformers.models.{0}.modeling_{0}"


class StackedExperts(Experts):
    """Experts whose state dict is that of a ModuleList of MLPs: ``{i}.{projection}.weight`` for each expert i."""

    def __init__(
        self, config: MoEConfig, names: tuple[str, str, str], *, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        self.names = names
        super().__init__(config, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Nothing: the weights are the host's."""

    def slices(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight of the host's by its name, as a view."""
        gate, up, down = self.names
        inner = self.config.intermediate_size
        for expert in range(self.config.num_experts):
            yield f"{expert}.{gate}.weight", self.gate_up_proj[expert, :inner]
            yield f"{expert}.{up}.weight", self.gate_up_proj[expert, inner:]
            yield f"{expert}.{down}.weight", self.down_proj[expert]

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        for name, weight in self.slices():
            destination[prefix + name] = weight if keep_vars else weight.detach()

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        known = set()
        for name, weight in self.slices():
            key = prefix + name
            known.add(key)
            given = state_dict.get(key)
            if given is None:
                missing_keys.append(key)
            elif given.shape != weight.shape:
                error_msgs.append(f"{key} must have shape {list(weight.shape)}, got {list(given.shape)}")
            else:
                with torch.no_grad():
                    weight.copy_(given)
        unexpected_keys.extend(key for key in state_dict if key.startswith(prefix) and key not in known)


class _SoftmaxBlock:
    """Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE: softmax over a linear router, top-k; (hidden, router_logits)."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """hidden_states [B, L, H] to the output [B, L, H] and the router's logits [B * L, E] in its dtype."""
        jitter = getattr(self, "jitter_noise", 0.0)
        if self.training and jitter > 0:
            hidden_states = hidden_states * torch.empty_like(hidden_states).uniform_(1.0 - jitter, 1.0 + jitter)
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        router_logits = self.gate(x)
        wide = router_logits if router_logits.dtype == torch.float64 else router_logits.float()
        weights, ids, _ = ops.route(wide, self.top_k, renormalize=getattr(self, "norm_topk_prob", True))
        output = _routed(self.experts, x, weights, ids)
        if hasattr(self, "shared_expert"):
            output = output + torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        return output.reshape(hidden_states.shape), router_logits


class _DeepseekBlock:
    """DeepSeek-V3, whose router module returns ids and weights; the output alone."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [B, L, H] to the output [B, L, H]."""
        ids, weights = self.gate(hidden_states)
        output = _routed(self.experts, hidden_states.reshape(-1, hidden_states.shape[-1]), weights, ids)
        return output.reshape(hidden_states.shape) + self.shared_experts(hidden_states)


def _routed(experts: StackedExperts, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    weights = weights.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return experts(x, weights, ops.dispatch(ids, experts.config.num_experts)).to(x.dtype)


@lru_cache
def _classes(family: Family) -> tuple[type, type, type]:
    """The host's block, the host's MLP, and the class of ours that takes the block's place."""
    module = importlib.import_module(_MODULE.format(family.module))
    block = getattr(module, family.block)
    ours = _DeepseekBlock if family.module == "deepseek_v3" else _SoftmaxBlock
    served = type(family.served, (ours, block), {"__module__": __name__, "__doc__": ours.__doc__})
    return block, getattr(module, family.mlp), served


def __getattr__(name: str) -> type:
    # so that a model with our blocks can be pickled
    for family in FAMILIES:
        if name == family.served:
            return _classes(family)[2]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _family_of(module: nn.Module) -> Family | None:
    for family in FAMILIES:
        if type(module).__module__ == _MODULE.format(family.module) and type(module).__name__ == family.block:
            return family
    return None


def _like_moe(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return name.endswith(("moe", "moeblock", "experts")) or "sparsemoe" in name


def _obstacle(block: nn.Module, family: Family) -> str | None:
    """Why this block can't be served, or None."""
    host, mlp, _ = _classes(family)
    forward = vars(block).get("forward")  # the host leaves the class's own there once it has returned router logits
    if forward is not None and forward != type(block).forward.__get__(block):
        return "its forward was replaced"
    experts = block.experts
    if not isinstance(experts, nn.ModuleList) or len(experts) == 0:
        return f"its experts are a {type(experts).__name__} and not a ModuleList of {family.mlp}"
    first = experts[0]
    if type(first) is mlp and elementwise(first.act_fn) not in GATED:
        return f"its activation is {type(first.act_fn).__name__}"
    wanted = None
    for i, expert in enumerate(experts):
        if type(expert) is not mlp:
            return f"experts.{i} is a {type(expert).__name__} and not a {family.mlp}"
        for name in (family.gate, family.up, family.down):
            linear, where = getattr(expert, name), f"experts.{i}.{name}"
            if type(linear) is not nn.Linear or linear.bias is not None or hasattr(linear, "parametrizations"):
                return f"{where} is a {type(linear).__name__} and not a plain Linear without bias"
            weight = linear.weight
            if weight.device.type == "meta":
                return f"{where} has no values yet (device meta)"
            if weight.dtype not in DTYPES:
                return f"{where} is {weight.dtype}"
            shape = weight.shape[::-1] if name == family.down else weight.shape
            mine = (shape, weight.dtype, weight.device, weight.requires_grad)
            wanted = wanted or mine
            if mine != wanted:
                words = [f"{list(s)} {d} on {v}, requires_grad={r}" for s, d, v, r in (wanted, mine)]
                return f"{where} differs from experts.0 ({words[0]}, here {words[1]})"
        if any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in expert.modules()):
            return f"experts.{i} has hooks, which would not run any more"
    return None


@torch.no_grad()
def _replace(block: nn.Module, family: Family) -> None:
    names = (family.gate, family.up, family.down)
    first = block.experts[0]
    weight = getattr(first, family.gate).weight
    config = MoEConfig(
        hidden_size=weight.shape[1],
        intermediate_size=weight.shape[0],
        num_experts=len(block.experts),
        router=RouterConfig(renormalize=False),  # not used: the router is the host's
        top_k=1,
        activation=GATED[elementwise(first.act_fn)],
    )
    stacked = StackedExperts(config, names, device=weight.device, dtype=weight.dtype)
    for name, target in stacked.slices():
        target.copy_(block.experts.get_parameter(name))
    stacked.requires_grad_(weight.requires_grad).train(block.training)
    block.experts = stacked
    vars(block).pop("forward", None)
    block.__class__ = _classes(family)[2]


def replace(model: nn.Module) -> nn.Module:
    """See fastmoe_cpp.integrations.transformers.replace_moe_blocks."""
    found: dict[str, tuple[nn.Module, Family]] = {}
    others: dict[str, str] = {}
    for name, module in model.named_modules():
        family = _family_of(module)
        if family is not None:
            found[name] = (module, family)
        elif isinstance(module, (_SoftmaxBlock, _DeepseekBlock)):
            raise ValueError(f"{type(model).__name__}'s MoE blocks were replaced before: {name} is of ours")
        elif _like_moe(module) and not any(name.startswith(f"{block}.") for block in found):
            others[name] = type(module).__name__
    kinds = ", ".join(sorted(set(others.values())))
    if not found or others:
        known = ", ".join(family.block for family in FAMILIES)
        raise ValueError(
            f"{type(model).__name__} can't be served: its MoE blocks must be of {known}, "
            f"found {kinds if others else 'none'}"
        )
    for name, (block, family) in found.items():
        if reason := _obstacle(block, family):
            raise ValueError(f"{type(model).__name__} can't be served: of {name}, {reason}")
    for block, family in found.values():
        _replace(block, family)
    return model
