"""A linear layer of several experts."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import ops
from .utils import positive


class MOELinear:
    """Rows through the weights of their experts, for modules of one's own."""

    @staticmethod
    def apply(global_input_buf: Tensor, fwd_expert_count: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """global_input_buf [N, in_feat], in order of expert, to [N, out_feat]; all of one dtype, or autocast's.

        weight is [num_expert, out_feat, in_feat], bias [num_expert, out_feat], fwd_expert_count [num_expert] the rows
        of each expert, integers on any device. Raises ValueError where they are not N in sum (on the CPU) or not
        num_expert in number.
        """
        if fwd_expert_count.shape != weight.shape[:1]:
            raise ValueError(
                f"fwd_expert_count must have shape {list(weight.shape[:1])}, one number an expert, got "
                f"{list(fwd_expert_count.shape)}"
            )
        offsets = torch.zeros(weight.shape[0] + 1, dtype=torch.int32, device=fwd_expert_count.device)
        offsets[1:] = fwd_expert_count.cumsum(0)
        rows = global_input_buf.shape[0]
        if not offsets.is_cuda and int(offsets[-1]) != rows:
            raise ValueError(f"fwd_expert_count must sum to the number of rows, {rows}, got {int(offsets[-1])}")
        return ops.grouped_linear(global_input_buf, weight, offsets.to(global_input_buf.device), bias)


class FMoELinear(nn.Module):
    """``weight [num_expert, out_feat, in_feat]`` and ``bias [num_expert, out_feat]`` (None with bias=False).

    rank is kept for repr() and for whoever reads it; it changes nothing.
    """

    def __init__(self, num_expert: int, in_feat: int, out_feat: int, bias: bool = True, rank: int = 0) -> None:
        super().__init__()
        positive("FMoELinear", num_expert=num_expert, in_feat=in_feat, out_feat=out_feat)
        self.num_expert = num_expert
        self.in_feat = in_feat
        self.out_feat = out_feat
        self.rank = rank
        self.weight = nn.Parameter(torch.empty(num_expert, out_feat, in_feat))
        self.register_parameter("bias", nn.Parameter(torch.zeros(num_expert, out_feat)) if bias else None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Weights from FastMoE's uniform distribution, of bound 1 / sqrt(out_feat * in_feat); biases 0.

        The bound is what kaiming_uniform_(a=sqrt(5)) makes of all three dimensions.
        """
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, inp: Tensor, fwd_expert_count: Tensor) -> Tensor:
        """inp [N, in_feat], in order of expert, to [N, out_feat] in the weights' dtype, or autocast's.

        fwd_expert_count [num_expert] are the rows of each expert, integers on any device. Raises ValueError where they
        are not N in sum (on the CPU) or not num_expert in number.
        """
        return MOELinear.apply(inp.to(self.weight.dtype), fwd_expert_count, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Sizes for repr()."""
        return (
            f"num_expert={self.num_expert}, in_features={self.in_feat}, out_features={self.out_feat}, "
            f"bias={self.bias is not None}, rank={self.rank}"
        )
