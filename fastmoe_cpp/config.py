"""Configuration of the layer: frozen, validated once when it is made, and free of torch modules and kernels.

A message about a bad field names the field, what is allowed and what was given. A value that is None is not a value:
``capacity_factor=None`` is unlimited capacity, ``capacity_factor=0`` drops every token.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch

from . import hosts

ACTIVATIONS = (
    "swiglu", "geglu", "geglu_tanh", "reglu", "clamped_swiglu", "silu", "gelu", "gelu_tanh", "relu", "relu2",
)  # fmt: skip
GATED_ACTIVATIONS = ACTIVATIONS[:5]
SCORE_FUNCTIONS = ("softmax", "sigmoid", "sqrtsoftplus")
GROUP_SCORES = ("max", "top2_sum")
DROP_POLICIES = ("position", "probs")
BALANCE_LOSSES = ("switch", "huggingface", "batch", "sequence", "global")
ROUTER_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MAX_EXPERTS = 1024


def _integer(owner: str, name: str, value: Any, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        allowed = f"an integer of at least {low}" if high is None else f"an integer between {low} and {high}"
        raise ValueError(f"{owner}.{name} must be {allowed}, got {value!r}")


def _number(owner: str, name: str, value: Any, low: float, *, open_end: bool = False, high: float = math.inf) -> None:
    """low <= value < high and finite; low < value where open_end."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or value < low or (open_end and value == low) or value >= high:
        allowed = f"a finite number {'above' if open_end else 'of at least'} {low:g}"
        if math.isfinite(high):
            allowed += f" and below {high:g}"
        raise ValueError(f"{owner}.{name} must be {allowed}, got {value!r}")


def _flag(owner: str, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{owner}.{name} must be True or False, got {value!r}")


def _one_of(owner: str, name: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        words = ", ".join(repr(a) for a in allowed)
        raise ValueError(f"{owner}.{name} must be one of {words}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How tokens choose experts. The defaults are Mixtral's: float32 softmax, top-k, renormalised, no bias."""

    #: 'softmax' over the experts, or elementwise 'sigmoid' or 'sqrtsoftplus', the square root of softplus.
    score_function: str = "softmax"
    #: Choose by the logits and apply the score function to the K chosen ones alone (gpt-oss), instead of to all E.
    scores_after_topk: bool = False
    #: Divide the K weights by (their sum + renormalize_epsilon).
    renormalize: bool = True
    renormalize_epsilon: float = 0.0
    #: Multiplies the weights, after renormalisation.
    scaling_factor: float = 1.0
    #: Group-limited routing: experts form num_groups groups, and only the best topk_groups of them are chosen from.
    num_groups: int = 1
    topk_groups: int = 1
    #: What a group is worth: its best score ('max') or the sum of its two best ('top2_sum', DeepSeek-V3).
    group_score: str = "max"
    #: A linear bias of the router's logits, trained like a weight (gpt-oss).
    bias: bool = False
    #: A bias of the selection alone, without gradient, moved against the load by MoE.update_expert_bias() (loss-free
    #: balancing, arXiv 2408.15664).
    expert_bias: bool = False
    expert_bias_update_rate: float = 1e-3
    #: Take the mean off each update of the expert bias (TorchTitan).
    expert_bias_zero_mean: bool = False
    #: In training, choose by Sinkhorn's assignment of the logits instead of the scores; the weights stay the scores.
    sinkhorn: bool = False
    #: 0 runs to the tolerance (Megatron-LM); a positive number runs exactly that many (GPT-NeoX: 3).
    sinkhorn_iterations: int = 0
    sinkhorn_tolerance: float = 1e-4
    #: In training, multiply the router's input by U[1 - jitter_eps, 1 + jitter_eps].
    jitter_eps: float = 0.0
    #: Show the jittered input to the experts as well (transformers' Mixtral).
    jitter_experts: bool = False
    #: What the logits are kept in: they are computed in float32 or wider and rounded to this. Float64 input stays
    #: float64. 16-bit logits are what hosts have that run the router in the model's dtype; scores are float32 anyway.
    dtype: torch.dtype = torch.float32
    #: The form of the balance loss (losses.balance_loss) and its coefficient; 0 trains without it.
    balance_loss: str = "batch"
    balance_loss_coefficient: float = 0.0
    #: Coefficient of the mean squared logsumexp of the logits (ST-MoE, arXiv 2202.08906).
    z_loss_coefficient: float = 0.0

    def __post_init__(self) -> None:
        name = type(self).__name__
        _one_of(name, "score_function", self.score_function, SCORE_FUNCTIONS)
        _one_of(name, "group_score", self.group_score, GROUP_SCORES)
        _one_of(name, "balance_loss", self.balance_loss, BALANCE_LOSSES)
        _one_of(name, "dtype", self.dtype, ROUTER_DTYPES)
        for flag in ("scores_after_topk", "renormalize", "bias", "expert_bias", "expert_bias_zero_mean", "sinkhorn",
                     "jitter_experts"):  # fmt: skip
            _flag(name, flag, getattr(self, flag))
        for low, number in ((0, "renormalize_epsilon"), (0, "expert_bias_update_rate"), (0, "balance_loss_coefficient"),
                            (0, "z_loss_coefficient")):  # fmt: skip
            _number(name, number, getattr(self, number), low)
        _number(name, "scaling_factor", self.scaling_factor, 0, open_end=True)
        _number(name, "sinkhorn_tolerance", self.sinkhorn_tolerance, 0, open_end=True)
        _number(name, "jitter_eps", self.jitter_eps, 0, high=1)
        _integer(name, "sinkhorn_iterations", self.sinkhorn_iterations, 0)
        _integer(name, "num_groups", self.num_groups, 1)
        _integer(name, "topk_groups", self.topk_groups, 1)
        if self.topk_groups > self.num_groups:
            raise ValueError(
                f"{name}.topk_groups must be at most num_groups = {self.num_groups}, got {self.topk_groups}"
            )
        if self.jitter_experts and self.jitter_eps == 0:
            raise ValueError(f"{name}.jitter_experts must be False where jitter_eps is 0, got True")


@dataclass(frozen=True)
class MoEConfig:
    """One Mixture-of-Experts layer. Sizes are counts of features, experts or tokens, never bytes.

    Raises ValueError, one sentence with the field, what is allowed and the value, for anything the layer can't honour.
    Warns where a top_k of 1 with constant weights would leave the router without a gradient.
    """

    hidden_size: int
    #: Of one expert.
    intermediate_size: int
    num_experts: int
    top_k: int = 2
    router: RouterConfig = field(default_factory=RouterConfig)

    #: Gated 'swiglu', 'geglu', 'geglu_tanh', 'reglu', 'clamped_swiglu', or ungated 'silu', 'gelu', 'gelu_tanh', 'relu',
    #: 'relu2'. Gated experts hold 2 * intermediate_size rows in gate_up_proj, ungated ones intermediate_size.
    activation: str = "swiglu"
    #: Of 'clamped_swiglu' alone: gate * sigmoid(alpha * gate), gate and up clamped at limit (gpt-oss).
    activation_alpha: float = 1.702
    activation_limit: float = 7.0
    #: Biases of the experts' two projections (not of the shared experts).
    bias: bool = False
    #: gate_up_proj and its bias alternate gate and up rows instead of holding gate rows, then up rows (gpt-oss).
    interleaved: bool = False
    #: Apply the routing weight to the expert's input (before the up projection's bias) instead of its output (Llama 4).
    weight_on_input: bool = False

    #: Width of the experts every token visits, all of them as one MLP; None for none.
    shared_intermediate_size: int | None = None
    #: Scale the shared experts' output by sigmoid(x @ gate.T), one gate a token (Qwen2-MoE).
    shared_expert_gate: bool = False

    #: An expert takes at most ceil(factor * T * top_k / num_experts) tokens of a batch of T, in training and in
    #: evaluation; None is unlimited and 0 drops everything.
    capacity_factor: float | None = None
    eval_capacity_factor: float | None = None
    #: Which pairs an expert over capacity keeps: the first ('position') or those of largest weight ('probs').
    drop_policy: str = "position"

    #: Keep only the input for backward and compute the pre-activation again: slower, 2 * T * K * I elements less.
    recompute: bool = False
    #: Backward adds the gradients of the routed experts' two weights to the weights' ``main_grad`` in float32, in place
    #: of ``grad``, where they have one: Megatron's buffers, or your own (see fastmoe_cpp.main_grad). Ends a compiled
    #: graph.
    gradient_accumulation_fusion: bool = False
    #: Standard deviation of the normal distribution the weights start from; biases start at 0.
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        name = type(self).__name__
        _integer(name, "hidden_size", self.hidden_size, 1)
        _integer(name, "intermediate_size", self.intermediate_size, 1)
        _integer(name, "num_experts", self.num_experts, 1, MAX_EXPERTS)
        _integer(name, "top_k", self.top_k, 1)
        if self.top_k > self.num_experts:
            raise ValueError(f"{name}.top_k must be at most num_experts = {self.num_experts}, got {self.top_k}")
        if not isinstance(self.router, RouterConfig):
            raise ValueError(f"{name}.router must be a RouterConfig, got {type(self.router).__name__}")
        _one_of(name, "activation", self.activation, ACTIVATIONS)
        _one_of(name, "drop_policy", self.drop_policy, DROP_POLICIES)
        for flag in ("bias", "interleaved", "weight_on_input", "shared_expert_gate", "recompute",
                     "gradient_accumulation_fusion"):  # fmt: skip
            _flag(name, flag, getattr(self, flag))
        _number(name, "activation_alpha", self.activation_alpha, 0, open_end=True)
        _number(name, "activation_limit", self.activation_limit, 0, open_end=True)
        _number(name, "initializer_range", self.initializer_range, 0)
        if self.shared_intermediate_size is not None:
            _integer(name, "shared_intermediate_size", self.shared_intermediate_size, 1)
        for factor in ("capacity_factor", "eval_capacity_factor"):
            if getattr(self, factor) is not None:
                _number(name, factor, getattr(self, factor), 0)
        if self.interleaved and not self.gated:
            raise ValueError(
                f"{name}.interleaved must be False for the ungated activation {self.activation!r}, got True"
            )
        if self.shared_expert_gate and self.shared_intermediate_size is None:
            raise ValueError(
                f"{name}.shared_expert_gate must be False where shared_intermediate_size is None, got True"
            )
        self._check_groups(name)
        self._warn_of_constant_weights()
        ratios = [
            capacity_ratio(self.num_experts, self.top_k, f) for f in (self.eval_capacity_factor, self.capacity_factor)
        ]
        object.__setattr__(self, "_capacity_ratios", tuple(ratios))  # by whether the layer is training

    def _check_groups(self, name: str) -> None:
        groups = self.router.num_groups
        if self.num_experts % groups:
            raise ValueError(f"{name}.router.num_groups must divide num_experts = {self.num_experts}, got {groups}")
        a_group = self.num_experts // groups
        if self.top_k > self.router.topk_groups * a_group:
            raise ValueError(
                f"{name}.top_k must be at most {self.router.topk_groups * a_group}, the experts in topk_groups = "
                f"{self.router.topk_groups} groups of {a_group}, got {self.top_k}"
            )
        if groups > 1 and self.router.group_score == "top2_sum" and a_group < 2:
            raise ValueError(f"{name}.router.group_score must be 'max' for groups of one expert, got 'top2_sum'")

    def _warn_of_constant_weights(self) -> None:
        constant = self.router.renormalize or (
            self.router.scores_after_topk and self.router.score_function == "softmax"
        )
        if self.top_k == 1 and self.num_experts > 1 and constant:
            warnings.warn(
                "MoEConfig.top_k is 1 and the router's weights are normalised over the chosen experts, so every weight "
                "is constant and the router gets no gradient from the layer's output: set renormalize=False "
                "(and scores_after_topk=False)",
                stacklevel=4,
            )

    @property
    def gated(self) -> bool:
        """Whether the activation takes a gate and an up half."""
        return self.activation in GATED_ACTIVATIONS

    @property
    def gate_up_size(self) -> int:
        """Rows of gate_up_proj: 2 * intermediate_size for gated activations, intermediate_size otherwise."""
        return self.intermediate_size * (2 if self.gated else 1)

    def capacity(self, tokens: int, training: bool) -> int | None:
        """The most tokens one expert takes of a batch of that many (padding included), or None where unlimited."""
        ratio = self._capacity_ratios[1 if training else 0]
        return None if ratio is None else -(-tokens * ratio[0] // ratio[1])

    @classmethod
    def from_hf(cls, config: Any, **changes: Any) -> MoEConfig:
        """The MoE block of a transformers configuration: Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek-V3 or gpt-oss.

        changes replace fields of the result. The host's balance loss runs over all layers at once, outside the block
        (losses.huggingface), so no coefficient is taken from the host.
        """
        fields = hosts.layer_fields(config)
        return cls(**(fields | {"router": RouterConfig(**fields["router"])} | changes))

    @classmethod
    def preset(cls, name: str, **changes: Any) -> MoEConfig:
        """The layer of a published model by name, such as 'mixtral-8x7b' or 'qwen3-30b-a3b'; changes replace fields."""
        return cls.from_hf(hosts.published(name), **changes)


def capacity_ratio(num_experts: int, top_k: int, factor: float | None) -> tuple[int, int] | None:
    """factor * top_k / num_experts as numerator and denominator; None for None.

    Exact for the decimal the factor was written as, so that 1.1 means eleven tenths, and in integers that times a
    number of tokens fit 64 bits, so that a symbolic number of tokens stays symbolic. A factor above 10**6 drops nothing
    that 10**6 keeps.
    """
    if factor is None:
        return None
    if factor == 0:
        return 0, 1
    written = min(Fraction(repr(float(factor))), Fraction(10**6))
    exact = max(written.limit_denominator(10**6 if written > 1e-3 else 10**12), Fraction(1, 10**12))
    ratio = exact * top_k / num_experts
    return ratio.numerator, ratio.denominator
