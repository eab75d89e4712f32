"""The layer for the ``mlp`` slot of Megatron-LM's ParallelTransformerLayer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastmoe_cpp.fmoe import FMoETransformerMLP, gates

from ..arguments import ArgumentError, contradiction, read_megatron_lm
from . import host

GATES: dict[str, type[nn.Module]] = {
    "naive": gates.NaiveGate,
    "noisy": gates.NoisyGate,
    "gshard": gates.GShardGate,
    "switch": gates.SwitchGate,
    "swipe": gates.SwipeGate,
}
STRATEGIES_WITH_LOSS = ("noisy", "gshard", "switch")


class _TrainOnLoss(torch.autograd.Function):
    """hidden_states itself; a gradient that flows back through it starts one of layer.balance_scale * loss as well."""

    @staticmethod
    def forward(ctx, hidden_states: Tensor, loss: Tensor, layer: Any) -> Tensor:
        ctx.layer, ctx.like = layer, loss
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx, grad: Tensor):
        # read now: the scale of this backward pass is known when the pass has begun
        return grad, torch.ones_like(ctx.like) * ctx.layer.balance_scale, None


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad * ctx.factor, None


class MegatronMLP(FMoETransformerMLP):
    """The MoE layer in place of Megatron-LM's ParallelMLP: ``[s, b, h]`` to ``(output [s, b, h], bias [h])``.

    The bias is a tensor of zeros in the input's dtype, always: the host adds it to the residual. Experts are spread
    over the data-parallel group where ``distributed_experts``; under tensor parallelism every rank holds a slice of
    each expert and the outputs are summed. In training, the gradient of ``balance_weight`` times the gate's balance
    loss is added to what flows back through the output, also where activations are recomputed; ``balance_scale``
    multiplies it (the scale of the training loss: the loss scale over the number of micro-batches) and
    ``patch_forward_step`` keeps it right.

    args is the host's namespace. gate is a gate class of FastMoE's interface, instead of a ``--balance-strategy``.
    Raises ArgumentError for arguments that are missing, contradictory or not honoured.
    """

    #: The host's version, whose table of arguments is read.
    version: str

    def __init__(self, args: Any, layer_idx: int, gate: type[nn.Module] | None = None) -> None:
        values = read_megatron_lm(args, self.version)
        name = f"Megatron-LM v{self.version}"
        strategy = values["balance_strategy"]
        if gate is not None and strategy is not None:
            raise contradiction(name, "balance_strategy", strategy, "gate", gate.__name__, "the layer has one gate")
        if values["num_layers"] is None:
            raise ArgumentError(f"{name}: --num-layers must be given, found no value (start of the weights)")
        distributed = values["distributed_experts"]
        world_size = values["data_parallel_size"] if distributed else 1
        super().__init__(
            num_expert=values["fmoe_num_experts"],
            d_model=values["hidden_size"],
            d_hidden=values["hidden_hidden_size"],
            activation=nn.GELU(approximate="tanh" if values["openai_gelu"] else "none"),
            top_k=values["top_k"],
            gate=gate or GATES[strategy or "naive"],
            world_size=world_size,
            moe_group=host.data_parallel_group() if world_size > 1 else None,
            expert_dp_comm="none" if distributed else "dp",
        )
        self.layer_idx = layer_idx
        #: What the host's log calls the balance loss; None where the gate has none.
        self.balance_name: str | None = None
        if gate is not None or strategy in STRATEGIES_WITH_LOSS:
            self.balance_name = f"{strategy or gate.__name__}_loss"
        self.hidden_size = values["hidden_size"]
        self.balance_weight = float(values["balance_loss_weight"]) / values["num_layers"]
        self.balance_scale: float | Tensor = 1.0
        #: The balance loss of the last training pass, times its weight, detached; None where the gate has none.
        self.balance_loss: Tensor | None = None
        self.tensor_parallel = values["tensor_model_parallel_size"]
        #: Pipeline stages of the model.
        self.stages = values["pipeline_model_parallel_size"]
        rank = values["rank"] if distributed else 0
        if self.tensor_parallel > 1:
            self._share_experts()
            rank = rank if distributed else host.module("mpu").get_tensor_model_parallel_rank()
        self.sigma, self.num_layers = float(values["init_method_std"]), values["num_layers"]
        self.reset_parameters(rank)

    @torch.no_grad()
    def reset_parameters(self, rank: int = 0) -> None:
        """The experts' weights from normal distributions, sigma for the first and sigma / sqrt(2 * layers) for the
        second; biases 0. Ranks that seed torch alike get the same gate and, by rank, experts of their own."""
        generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())) + rank)
        for name, parameter in self.experts.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
                continue
            sigma = self.sigma if "htoh4" in name else self.sigma / math.sqrt(2.0 * self.num_layers)
            start = torch.empty(parameter.shape, dtype=torch.float32).normal_(0.0, sigma, generator=generator)
            parameter.copy_(start)

    def _share_experts(self) -> None:
        """Marks the experts as slices of tensor-parallel ranks, whose partial outputs are summed."""
        mpu = host.module("mpu")
        first = mpu.get_tensor_model_parallel_rank() == 0
        for name, parameter in self.experts.named_parameters():
            if name.endswith("h4toh.bias"):
                if not first:  # summed over the ranks, so that one of them may learn it
                    parameter.register_hook(torch.zeros_like)
                continue
            parameter.tensor_model_parallel = True
            parameter.partition_dim = parameter.dim() - (2 if "htoh4.weight" in name else 1)
            parameter.partition_stride = 1
        # Every rank's gate sees the gradient of the sum, and its share in the input's gradient counts once.
        ranks = self.tensor_parallel
        self.gate.register_forward_pre_hook(lambda _, inputs: (_ScaleGradient.apply(inputs[0], 1 / ranks),))
        self.gate.register_forward_hook(
            lambda _, __, out: (out[0], mpu.copy_to_tensor_model_parallel_region(out[1]), *out[2:])
        )

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """[s, b, h] to (output of its shape and dtype, zeros [h])."""
        if self.tensor_parallel > 1:
            mpu = host.module("mpu")
            output = super().forward(mpu.copy_to_tensor_model_parallel_region(hidden_states))
            output = mpu.reduce_from_tensor_model_parallel_region(output)
        else:
            output = super().forward(hidden_states)
        output = self._train_on_balance_loss(output)
        return output, torch.zeros(self.hidden_size, dtype=hidden_states.dtype, device=hidden_states.device)

    def _train_on_balance_loss(self, output: Tensor) -> Tensor:
        self.balance_loss = None
        if self.balance_name is None or not self.training or not self.gate.has_loss:
            return output
        loss = self.gate.get_loss().float().sum()
        self.gate.set_loss(loss.detach())  # for whoever logs it; trained on here and nowhere else
        loss = loss * self.balance_weight
        self.balance_loss = loss.detach()
        if not loss.requires_grad or not torch.is_grad_enabled():
            return output
        return _TrainOnLoss.apply(output, loss, self)
