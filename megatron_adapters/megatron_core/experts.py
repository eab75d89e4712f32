"""The experts: Megatron-Core's weights under its names, our grouped kernels."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from fastmoe_cpp import main_grad, ops
from fastmoe_cpp.outputs import DispatchPlan

from . import state_dict
from .configuration import check, layer_config


class GroupedLinear(nn.Module):
    """Holds ``weight [E_local, out, in]`` and where configured ``bias [E_local, out]``."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, experts: int, out_size: int, in_size: int, bias: bool, **factory: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, out_size, in_size, **factory))
        self.register_parameter("bias", nn.Parameter(torch.empty(experts, out_size, **factory)) if bias else None)
        for parameter in self.parameters():
            # reduced over the expert-data-parallel group, not over all data-parallel ranks
            parameter.allreduce = False
            # every tensor-parallel rank's experts are its own, which the norm of gradients asks in these words
            parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, 0, 1


class GroupedExperts(MegatronModule):
    """This rank's experts: ``linear_fc1.weight [E_local, 2 * F, H]`` (gate rows, then up rows; ``[E_local, F, H]``
    ungated) and ``linear_fc2.weight [E_local, H, F]``, with biases where add_bias_linear is set.

    ``state_dict()`` writes the names of TEGroupedMLP where moe_grouped_gemm is set and of SequentialMLP otherwise, and
    ``load_state_dict()`` reads both. As ``submodules.experts`` of the host's MoELayer, ``forward`` has its contract.
    """

    def __init__(self, num_local_experts: int, config: Any, pg_collection: Any = None, name: str | None = None) -> None:
        super().__init__(config=config)
        self.moe_config = c = layer_config(config, check(config))
        self.num_local_experts = num_local_experts
        self.ep_group, self.tp_group, self.dp_group = pg_collection.ep, pg_collection.expt_tp, pg_collection.expt_dp
        factory = {"dtype": config.params_dtype, "device": _device(config)}
        sizes = (c.hidden_size, c.intermediate_size)
        self.linear_fc1 = GroupedLinear(num_local_experts, c.gate_up_size, sizes[0], c.bias, **factory)
        self.linear_fc2 = GroupedLinear(num_local_experts, *sizes, c.bias, **factory)
        if config.perform_initialization:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Every expert's weights by the host's init_method and output_layer_init_method; biases 0."""
        if self.linear_fc1.weight.is_meta:
            return
        tracker = get_cuda_rng_tracker()
        name = get_expert_parallel_rng_tracker_name()
        on_gpu = self.linear_fc1.weight.is_cuda and name in tracker.get_states()
        with tracker.fork(name) if on_gpu else nullcontext():
            for linear, initialize in (
                (self.linear_fc1, self.config.init_method),
                (self.linear_fc2, self.config.output_layer_init_method),
            ):
                if self.linear_fc1.weight.is_cuda or self.ep_group.size() == 1:
                    for weight in linear.weight:
                        initialize(weight)
                else:
                    self._initialize_of_all(linear.weight, initialize)
                if linear.bias is not None:
                    linear.bias.zero_()

    def _initialize_of_all(self, weight: Tensor, initialize: Any) -> None:
        # On the CPU every rank draws from the same generator: each draws all experts and keeps its own.
        for rank in range(self.ep_group.size()):
            for i in range(self.num_local_experts):
                drawn = torch.empty_like(weight[i])
                initialize(drawn)
                if rank == self.ep_group.rank():
                    weight[i].copy_(drawn)

    def compute(self, rows: Tensor, topk_weights: Tensor, plan: DispatchPlan) -> Tensor:
        """[T, H] of rows [T, H] and topk_weights [T, K] over a plan of this rank's experts."""
        c = self.moe_config
        fused = getattr(self.config, "gradient_accumulation_fusion", False)
        return (main_grad.experts if fused else ops.experts)(
            rows,
            self.linear_fc1.weight,
            self.linear_fc2.weight,
            topk_weights.to(torch.float64 if rows.dtype == torch.float64 else torch.float32),
            plan,
            gate_up_bias=self.linear_fc1.bias,
            down_bias=self.linear_fc2.bias,
            activation=c.activation,
            activation_alpha=c.activation_alpha,
            activation_limit=c.activation_limit,
            weight_on_input=c.weight_on_input,
        )

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """The host's contract: rows [P, H] in the order of this rank's experts, how many each has [E_local] (P in all,
        on any device) and weights [P]; returns the weighted outputs [P, H] and no bias."""
        rows = permuted_local_hidden_states
        plan = _plan_of_sorted(rows.shape[0], tokens_per_expert.to(rows.device))
        return self.compute(rows, permuted_probs.reshape(-1, 1), plan), None

    def backward_dw(self) -> None:
        """Nothing: weight gradients are a part of backward, delay_wgrad_compute is refused."""

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> dict:
        """The tensors under the host's names, an expert each; views of the parameters where keep_vars is False."""
        destination = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        return state_dict.split(destination, prefix, grouped=bool(self.config.moe_grouped_gemm))

    def _load_from_state_dict(self, state: dict, prefix: str, *args: Any) -> None:
        state_dict.stack(state, prefix, self)
        super()._load_from_state_dict(state, prefix, *args)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """For dist_checkpointing: the same tensors under the same keys as the host's experts write, in any format of
        theirs, resharded over any number of expert-parallel ranks."""
        return state_dict.sharded(self, prefix, sharded_offsets, metadata)


def _device(config: Any) -> Any:
    if getattr(config, "init_model_with_meta_device", False):
        return "meta"
    if config.use_cpu_initialization or not torch.cuda.is_available():
        return "cpu"
    return torch.cuda.current_device()


def _plan_of_sorted(rows: int, tokens_per_expert: Tensor) -> DispatchPlan:
    """The plan of rows that lie in the order of their experts, one expert each."""
    slots = torch.arange(rows, dtype=torch.int32, device=tokens_per_expert.device)
    offsets = torch.zeros(tokens_per_expert.numel() + 1, dtype=torch.int32, device=tokens_per_expert.device)
    offsets[1:] = tokens_per_expert.cumsum(0)
    return DispatchPlan(slots, slots[:, None], offsets, tokens_per_expert)
