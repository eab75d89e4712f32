"""FMoE: a gate, and any module as an expert."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .dispatch import Dispatch
from .expert import _Expert
from .functions import AllGather, Slice, ensure_comm
from .gates import FasterGate, NaiveGate, gen_faster_gate
from .utils import group_of, positive

#: Set, they ask FastMoE for another schedule of the same computation.
_SCHEDULES = ("FMOE_FASTER_SCHEDULE_ENABLE", "FMOE_FASTER_SHADOW_ENABLE")


def mark_module_parallel_comm(module: nn.Module, comm: str) -> None:
    """Tags every parameter of module, as ``dp_comm``, with the group that DistributedGroupedDataParallel reduces in."""
    for parameter in module.parameters():
        parameter.dp_comm = comm


def _fmoe_general_global_forward(
    inp: Any,
    gate: Tensor,
    expert_fn: Callable[[Any, Tensor], Any],
    num_expert: int,
    world_size: int,
    moe_group: dist.ProcessGroup | None = None,
    **kwargs: Any,
) -> Any:
    """expert_fn over the rows of each expert: a tree of [T, ...] and gate [T] or [T, K] to a tree of [T * K, ...].

    expert_fn takes the rows of this process's experts, in order of expert, and their numbers [num_expert]. Dropped
    choices (-1) are zero. moe_group None is the group of ensure_comm(). Of kwargs FastMoE's schedules take ``experts``;
    it is not needed here.
    """
    unknown = set(kwargs) - {"experts"}
    if unknown:
        raise TypeError(f"_fmoe_general_global_forward() takes no argument {sorted(unknown)[0]!r}")
    way = Dispatch(gate.reshape(gate.shape[0], gate.shape[1:].numel()), num_expert, world_size, moe_group)
    rows = expert_fn(tree_map(way.to_experts, inp), way.expert_counts())
    return tree_map(way.to_choices, rows)


class FMoE(nn.Module):
    """A layer of ``num_expert`` experts on each of ``world_size`` processes, whatever modules they are.

    expert is a callable that takes d_model and returns one expert, or a list of such, one an expert (num_expert is then
    its length); None leaves it to a subclass to set ``self.experts`` to a module of all experts here. An expert is
    called as ``expert(rows, count)``, or as ``expert(rows)`` where its forward takes one argument; a module of all
    experts as ``experts(rows, counts)``, with the rows in order of expert.

    gate is called as ``gate(d_model, num_expert, world_size, top_k)``, with gate_bias where it has that argument.
    moe_group are the processes that hold different experts, None for all. The processes of slice_group (mp_group, its
    old name) hold the same input: each computes a part of it, and all get the whole output. gate_hook is called with
    the ids, the scores and None. mask [T] is 0 for the tokens that experts see; one of value k gets mask_dict[k]
    instead, times the sum of its scores, and zero where mask_dict has no k.
    """

    experts: nn.Module

    def __init__(
        self,
        num_expert: int | None = 32,
        d_model: int = 1024,
        world_size: int = 1,
        mp_group: dist.ProcessGroup | None = None,
        slice_group: dist.ProcessGroup | None = None,
        moe_group: dist.ProcessGroup | None = None,
        top_k: int = 2,
        gate: Callable[..., nn.Module] = NaiveGate,
        expert: Callable[[int], nn.Module] | Sequence[Callable[[int], nn.Module]] | None = None,
        gate_hook: Callable[[Tensor, Tensor, None], Any] | None = None,
        mask: Tensor | None = None,
        mask_dict: dict[int, Tensor] | None = None,
        gate_bias: bool = True,
    ) -> None:
        super().__init__()
        for variable in _SCHEDULES:
            if os.environ.get(variable, "").upper() in ("1", "ON"):
                raise ValueError(
                    f"{variable} asks for FasterMoE's schedule, which fastmoe_cpp.fmoe does not have: unset it "
                    "(results are the same without it)"
                )
        if isinstance(expert, list | tuple):
            num_expert = len(expert)
        positive(type(self).__name__, num_expert=num_expert, d_model=d_model, world_size=world_size, top_k=top_k)
        self.num_expert = num_expert
        self.d_model = d_model
        self.world_size = world_size
        if mp_group is not None and slice_group is not None:
            raise ValueError("mp_group is the old name of slice_group: give one of them, got both")
        self.slice_group = mp_group if slice_group is None else slice_group
        self.slice_size = 1 if self.slice_group is None else self.slice_group.size()
        self.slice_rank = 0 if self.slice_group is None else self.slice_group.rank()
        self.moe_group = moe_group
        self.top_k = top_k
        self.experts_fused = expert is None
        if isinstance(expert, list | tuple):
            self.experts = nn.ModuleList([make(d_model) for make in expert])
        elif expert is not None:
            self.experts = nn.ModuleList([expert(d_model) for _ in range(num_expert)])
        self.gate = self._make_gate(gate, gate_bias)
        self.gate_hook = gate_hook
        if (mask is None) != (mask_dict is None):
            raise ValueError("mask and mask_dict must be given together, got one of them")
        self.mask = mask
        self.mask_dict = mask_dict
        self._expert_dp_comm: str | None = None
        self.register_load_state_dict_post_hook(_tag_new_parameters)

    def _make_gate(self, gate: Callable[..., nn.Module], gate_bias: bool) -> nn.Module:
        if isinstance(gate, nn.Module) or not callable(gate):
            raise TypeError(f"gate must be a class of a gate, or a function that makes one, got {type(gate).__name__}")
        if isinstance(gate, type) and issubclass(gate, FasterGate):
            gate = gen_faster_gate(dist.get_rank(self.moe_group) if self.world_size > 1 else 0)
        bias: dict[str, bool] = {}
        if "gate_bias" in inspect.signature(gate).parameters:
            bias["gate_bias"] = gate_bias
        elif not gate_bias:
            raise ValueError(f"gate_bias must be True for {gate.__name__}, which has no such argument, got False")
        return gate(self.d_model, self.num_expert, self.world_size, self.top_k, **bias)

    def mark_parallel_comm(self, expert_dp_comm: str = "none") -> None:
        """Tags for DistributedGroupedDataParallel: the experts' parameters expert_dp_comm, the gate's 'gate'."""
        self._expert_dp_comm = expert_dp_comm
        if getattr(self, "experts", None) is not None:
            mark_module_parallel_comm(self.experts, expert_dp_comm)
        mark_module_parallel_comm(self.gate, "gate")

    def expert_fn(self, inp: Any, fwd_expert_count: Tensor) -> Any:
        """The experts over their rows: a tree of [R, ...] in order of expert, fwd_expert_count [num_expert] of each."""
        if self.experts_fused:
            return self.experts(inp, fwd_expert_count)
        outputs = []
        begin = 0
        for i, count in enumerate(fwd_expert_count.tolist()):
            part = tree_map(lambda t, at=slice(begin, begin + count): t[at], inp)
            outputs.append(self._one_expert(self.experts[i], part, fwd_expert_count[i : i + 1]))
            begin += count
        leaves, trees = zip(*(tree_flatten(output) for output in outputs), strict=True)
        if any(tree != trees[0] for tree in trees):
            raise ValueError(f"every expert must return the same structure, got {trees[0]} and another")
        return tree_unflatten([torch.cat(parts) for parts in zip(*leaves, strict=True)], trees[0])

    def expert_fn_single(self, inp: Any, fwd_expert_count: Tensor, idx: int) -> Any:
        """Expert idx alone over its rows."""
        if self.experts_fused:
            raise ValueError("expert_fn_single needs one module an expert, and the experts here are one module")
        return self._one_expert(self.experts[idx], inp, fwd_expert_count)

    @staticmethod
    def _one_expert(expert: nn.Module, inp: Any, count: Tensor) -> Any:
        return expert(inp, count) if _takes_count(expert) else expert(inp)

    def forward(self, moe_inp: Any) -> Any:
        """A tensor [T, d_model], or a tree of tensors [T, ...], to the experts' outputs, summed by score."""
        leaves = tree_flatten(moe_inp)[0]
        sizes = [leaf.shape[0] for leaf in leaves]
        if not sizes or any(size != sizes[0] for size in sizes):
            raise ValueError(f"the inputs must be tensors of one batch size, got {sizes}")
        if self.world_size > 1:
            # a gate may use the group too
            ensure_comm(leaves[0], group_of(self.moe_group, self.world_size, "moe_group"))
        mask = self._mask(sizes[0], leaves[0].device)
        if self.slice_size > 1:
            where = (self.slice_rank, self.slice_size, self.slice_group)
            moe_inp = tree_map(lambda leaf: Slice.apply(leaf, *where), moe_inp)
            mask = None if mask is None else Slice.apply(mask, *where)

        ids, scores = self.gate(moe_inp)
        if self.gate_hook is not None:
            self.gate_hook(ids, scores, None)
        tokens = tree_flatten(moe_inp)[0][0].shape[0]
        ids, scores = self._choices("indices", ids, tokens), self._choices("scores", scores, tokens)
        if mask is not None:
            ids = ids.masked_fill(mask[:, None] != 0, -1)
        output = self._experts_over(moe_inp, ids, scores)
        if mask is not None:
            output = tree_map(lambda leaf: self._fill_masked(leaf, mask, scores), output)

        if self.slice_size > 1:
            output = tree_map(lambda leaf: AllGather.apply(leaf, *where), output)
        return output

    def _mask(self, tokens: int, device: torch.device) -> Tensor | None:
        if self.mask is None or self.mask_dict is None:
            return None
        if self.mask.numel() != tokens:
            raise ValueError(f"mask must have one value for each of the {tokens} tokens, got {list(self.mask.shape)}")
        return self.mask.reshape(-1).to(device)

    def _choices(self, what: str, given: Tensor, tokens: int) -> Tensor:
        if given.numel() != tokens * self.top_k:
            raise ValueError(
                f"{type(self.gate).__name__} must return {what} [{tokens}, {self.top_k}] for {tokens} tokens and "
                f"top_k {self.top_k}, got {list(given.shape)}"
            )
        return given.reshape(tokens, self.top_k)

    def _experts_over(self, inp: Any, ids: Tensor, scores: Tensor) -> Any:
        if getattr(self, "experts", None) is None:
            raise ValueError(f"{type(self).__name__} was made with expert=None, so it must set self.experts")
        way = Dispatch(ids, self.num_expert, self.world_size, self.moe_group)
        activation = self._fused_activation(inp)
        if activation is None:
            rows = self.expert_fn(tree_map(way.to_experts, inp), way.expert_counts())
            return tree_map(lambda leaf: way.from_experts(leaf, scores), rows)
        if self.world_size == 1:
            return self.experts.fused(inp, scores, way.local, activation)
        rows = way.to_process(inp)
        rows = self.experts.fused(rows, rows.new_ones(rows.shape[0], 1), way.local, activation)
        return way.from_process(rows, scores)

    def _fused_activation(self, inp: Any) -> str | None:
        """The operator's name of the activation where one operator computes what expert_fn would, or None."""
        own = type(self).expert_fn is FMoE.expert_fn and "expert_fn" not in self.__dict__
        if not own or not self.experts_fused or not isinstance(self.experts, _Expert):
            return None
        fits = isinstance(inp, Tensor) and inp.dim() == 2 and inp.is_floating_point()
        return self.experts.fused_activation() if fits else None

    def _fill_masked(self, output: Tensor, mask: Tensor, scores: Tensor) -> Tensor:
        """output [T, ...] with mask_dict[k] * (the sum of its scores) for a token of mask k."""
        for k, value in self.mask_dict.items():
            rows = (mask == k).nonzero()[:, 0]
            value = torch.as_tensor(value, dtype=output.dtype, device=output.device)
            block = value.expand(rows.shape[0], self.top_k, *output.shape[1:])
            weights = scores[rows].to(output.dtype).reshape(*block.shape[:2], *[1] * (block.dim() - 2))
            output = output.index_copy(0, rows, (block * weights).sum(1))
        return output


def _tag_new_parameters(layer: FMoE, incompatible_keys: Any) -> None:
    """load_state_dict(assign=True) makes new parameters, which must have the tags of those before."""
    if layer._expert_dp_comm is None:
        return
    for module, tag in ((layer.experts, layer._expert_dp_comm), (layer.gate, "gate")):
        for parameter in module.parameters():
            if not hasattr(parameter, "dp_comm"):
                parameter.dp_comm = tag


def _takes_count(expert: nn.Module) -> bool:
    """Whether an expert's forward takes the number of rows beside the rows."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(expert.forward).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        # such as a wrapper's forward(*args): ask the module inside, or give what FastMoE gives
        inner = getattr(expert, "module", getattr(expert, "_orig_mod", None))
        return _takes_count(inner) if isinstance(inner, nn.Module) else True
    return sum(p.kind in kinds for p in parameters) > 1
