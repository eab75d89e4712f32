"""Small layers of our own that keep GPT-NeoX's contracts, and its defects where our adapter has to mend them."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

NOW = {
    "moe_num_experts": 1, "moe_expert_interval": 1, "moe_top_k": 1, "moe_router_type": "sinkhorn",
    "moe_lbl_in_fp32": False, "moe_jitter_eps": None, "intermediate_size": None, "sequence_parallel": False,
}  # fmt: skip
MOE_LOSS = {
    "num_experts": 1, "expert_interval": 2, "moe_top_k": 1, "use_tutel": False, "moe_loss_coeff": 0.1,
    "moe_train_capacity_factor": 1.0, "moe_eval_capacity_factor": 1.0, "moe_min_capacity": 4,
    "moe_token_dropping": True, "create_moe_param_group": True, "moe_use_residual": True,
    "moe_expert_parallel_size": 1, "mlp_type": "regular",
}  # fmt: skip
COMMON = {
    "hidden_size": 16, "gpt_j_residual": False, "gpt_j_tied": False, "hidden_dropout": 0.0, "activation": "gelu",
    "bias_gelu_fusion": False, "model_parallel_size": 1, "params_dtype": torch.float32, "init_method_std": 0.3,
}  # fmt: skip


class _Attention(nn.Module):
    """Mixes the sequence causally; a bias beside the output."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden, hidden)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, layer_past: Any = None):
        seen = (~mask[0, 0]).to(x.dtype)
        mixed = torch.einsum("st,tbh->sbh", seen / seen.sum(-1, keepdim=True), x)
        return nn.functional.linear(mixed, self.dense.weight), self.dense.bias


class _Linear(nn.Module):
    def __init__(self, in_size: int, out_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(out_size, in_size))
        self.bias = nn.Parameter(torch.zeros(out_size))


class ParallelMLP(nn.Module):
    """Returns its output and the bias of its second projection."""

    def __init__(self, neox_args: Any) -> None:
        super().__init__()
        self.activation_type, self.bias_gelu_fusion = neox_args.activation, neox_args.bias_gelu_fusion
        hidden = neox_args.hidden_size
        self.dense_h_to_4h, self.dense_4h_to_h = _Linear(hidden, 4 * hidden), _Linear(4 * hidden, hidden)

    def forward(self, x: torch.Tensor):
        inner = nn.functional.gelu(nn.functional.linear(x, self.dense_h_to_4h.weight, self.dense_h_to_4h.bias))
        return nn.functional.linear(inner, self.dense_4h_to_h.weight), self.dense_4h_to_h.bias


def _layer_class(era: str, module: types.ModuleType) -> type[nn.Module]:
    with_loss = era == "moe_loss"

    class ParallelTransformerLayer(nn.Module):
        def __init__(self, neox_args, attention_mask_func, init_method, output_layer_init_method, layer_number,
                     rpe=None, rotary=False, use_cache=False):  # fmt: skip
            super().__init__()
            self.use_cache, self.layer_past = use_cache, None
            self.hidden_dropout = neox_args.hidden_dropout
            self.gpt_j_residual, self.gpt_j_tied = neox_args.gpt_j_residual, neox_args.gpt_j_tied
            self.input_layernorm = nn.LayerNorm(neox_args.hidden_size)
            self.post_attention_layernorm = nn.LayerNorm(neox_args.hidden_size)
            self.attention = _Attention(neox_args.hidden_size)
            if self.gpt_j_residual:
                self.reduce = lambda x: x
            names = ("num_experts", "expert_interval") if with_loss else ("moe_num_experts", "moe_expert_interval")
            experts, interval = (getattr(neox_args, name) for name in names)
            self.num_experts = experts if layer_number % interval == 0 else 1
            if self.num_experts <= 1:
                self.mlp = ParallelMLP(neox_args)
            elif with_loss:
                self.mlp = module.MoE(
                    neox_args.hidden_size, ParallelMLP(neox_args), num_experts=self.num_experts,
                    ep_size=neox_args.moe_expert_parallel_size, k=neox_args.moe_top_k,
                    use_residual=neox_args.moe_use_residual, capacity_factor=neox_args.moe_train_capacity_factor,
                    eval_capacity_factor=neox_args.moe_eval_capacity_factor,
                    min_capacity=neox_args.moe_min_capacity, drop_tokens=neox_args.moe_token_dropping,
                    use_tutel=neox_args.use_tutel,
                )  # fmt: skip
            else:
                from megatron.model.moe import ParallelDroplessMoE

                self.mlp = ParallelDroplessMoE(
                    neox_args=neox_args, init_method=init_method, output_layer_init_method=output_layer_init_method
                )

        def forward(self, x, attention_mask, layer_past=None):
            moe_loss = torch.tensor(0.0, device=x.device, dtype=x.dtype)
            first = self.input_layernorm(x)
            attention, bias = self.attention(first, attention_mask, layer_past=layer_past)
            attention = attention + bias
            if self.gpt_j_residual:
                # the host's defects: two values of three, and attention that is lost where there is no bias
                output, bias = self.mlp(first if self.gpt_j_tied else self.post_attention_layernorm(x))
                output = x + self.reduce(output if bias is None else output + bias + attention)
            else:
                attention = attention + x
                values = self.mlp(self.post_attention_layernorm(attention))
                if with_loss and self.num_experts > 1:
                    output, moe_loss, _ = values
                else:
                    output, bias = values
                    if self.num_experts > 1:
                        assert bias is None
                    else:
                        output = output + bias
                output = output + attention
            return (output, moe_loss) if with_loss else output

    return ParallelTransformerLayer


def _modules(era: str) -> dict[str, types.ModuleType]:
    names = ("megatron", "megatron.model", "megatron.model.transformer", "megatron.neox_arguments", "megatron.training")
    found = {name: types.ModuleType(name) for name in names}
    for name in names[:2]:
        found[name].__path__ = []
    fields = COMMON | (MOE_LOSS if era == "moe_loss" else NOW)
    found["megatron.neox_arguments"].NeoXArgs = dataclasses.make_dataclass(
        "NeoXArgs", [(name, Any, dataclasses.field(default=value)) for name, value in fields.items()]
    )
    transformer = found["megatron.model.transformer"]
    transformer.MoE = None
    layer = transformer.ParallelTransformerLayer = _layer_class(era, transformer)

    class ParallelTransformerLayerPipe(layer):
        def forward(self, args):
            x, mask = args
            if era == "moe_loss":
                output, self.last_moe_loss = super().forward(x, mask)
                return output, mask
            return super().forward(x, mask), mask

    transformer.ParallelTransformerLayerPipe = ParallelTransformerLayerPipe
    training = found["megatron.training"]

    def forward_step(data_iterator, model, neox_args, timers, return_logits=False, is_train=False):
        outputs, moe_losses = model(next(data_iterator), neox_args=neox_args)
        loss = training.cross_entropy(outputs)
        return loss + neox_args.moe_loss_coeff * sum(m.item() for m in moe_losses)

    training.forward_step = forward_step
    return found


@contextmanager
def host(era: str) -> Iterator[None]:
    """A `megatron` of these layers in sys.modules."""
    before = {name: m for name, m in sys.modules.items() if name.partition(".")[0] == "megatron"}
    for name in before:
        del sys.modules[name]
    sys.modules.update(_modules(era))
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "megatron"]:
            del sys.modules[name]
        sys.modules.update(before)


def arguments(**changes: Any) -> types.SimpleNamespace:
    """neox_args of a small model, every field at its default."""
    fields = vars(sys.modules["megatron.neox_arguments"].NeoXArgs())
    return types.SimpleNamespace(**fields | changes)


def layer(neox_args: Any, layer_number: int = 0, pipe: bool = False) -> nn.Module:
    """A transformer layer, or the one for a pipeline."""
    transformer = sys.modules["megatron.model.transformer"]
    kind = transformer.ParallelTransformerLayerPipe if pipe else transformer.ParallelTransformerLayer

    def start(tensor: torch.Tensor) -> torch.Tensor:
        return nn.init.normal_(tensor, 0.0, 0.3)

    return kind(neox_args, None, start, start, layer_number)
