"""The C++ autograd functions of fastmoe_cpp. T tokens, H hidden, I intermediate, E experts, K experts a token.

The same functions as torch.ops.fastmoe_cpp, for eager code: a call here breaks a compiled graph.
"""

import collections.abc

import torch

def build_info() -> dict: ...
def explain_experts(  # of a library built with its CUDA half
    dtype: str,
    tokens: int,
    hidden: int,
    intermediate: int,
    experts: int,
    top_k: int,
    activation: str,
    *,
    capability: int,
    multiprocessors: int,
    shared_bytes: int,
    wish: str = "",
) -> list[str]: ...
def saves_for_itself() -> bool: ...
def last_use(saved: torch.Tensor, grad: torch.Tensor) -> bool: ...
def router_logits(
    hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor: ...
def route(
    logits: torch.Tensor,
    top_k: int,
    *,
    expert_bias: torch.Tensor | None = None,
    selection_scores: torch.Tensor | None = None,
    topk_ids: torch.Tensor | None = None,
    score_function: str = "softmax",
    scores_after_topk: bool = False,
    renormalize: bool = True,
    renormalize_epsilon: float = 0.0,
    scaling_factor: float = 1.0,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "max",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...
def sinkhorn(logits: torch.Tensor, iterations: int = 0, tolerance: float = 0.0001) -> torch.Tensor: ...
def dispatch(
    topk_ids: torch.Tensor,
    num_experts: int,
    *,
    topk_weights: torch.Tensor | None = None,
    capacity: int | None = None,
    drop_policy: str = "position",
    padding_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]: ...
def route_and_dispatch(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    top_k: int,
    *,
    expert_bias: torch.Tensor | None = None,
    score_function: str = "softmax",
    scores_after_topk: bool = False,
    renormalize: bool = True,
    renormalize_epsilon: float = 0.0,
    scaling_factor: float = 1.0,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "max",
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]: ...
def gather(
    hidden_states: torch.Tensor, slot_index: torch.Tensor, token_slot: torch.Tensor, expert_offsets: torch.Tensor
) -> torch.Tensor: ...
def experts(
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    topk_weights: torch.Tensor,
    slot_index: torch.Tensor,
    token_slot: torch.Tensor,
    expert_offsets: torch.Tensor,
    *,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    activation: str = "swiglu",
    activation_alpha: float = 1.702,
    activation_limit: float = 7.0,
    interleaved: bool = False,
    weight_on_input: bool = False,
    recompute: bool = False,
) -> torch.Tensor: ...
def grouped_linear(
    rows: torch.Tensor, weight: torch.Tensor, expert_offsets: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor: ...
def combine(
    rows: torch.Tensor,
    topk_weights: torch.Tensor | None,
    slot_index: torch.Tensor,
    token_slot: torch.Tensor,
    expert_offsets: torch.Tensor,
) -> torch.Tensor: ...
def exchange(
    rows: torch.Tensor,
    send_counts: collections.abc.Sequence[int],
    recv_counts: collections.abc.Sequence[int],
    group_name: str,
    operation: str = "exchange",
    caller: str = "this rank",
) -> torch.Tensor: ...
def expert_counts(
    topk_ids: torch.Tensor, num_experts: int, padding_mask: torch.Tensor | None = None
) -> torch.Tensor: ...
def balance_loss(
    scores: torch.Tensor, tokens_per_expert: torch.Tensor, scale: float, padding_mask: torch.Tensor | None = None
) -> torch.Tensor: ...
def z_loss(logits: torch.Tensor, scale: float = 1.0, padding_mask: torch.Tensor | None = None) -> torch.Tensor: ...
def update_expert_bias(
    expert_bias: torch.Tensor, tokens_per_expert: torch.Tensor, rate: float, zero_mean: bool = False
) -> None: ...
