"""A small decoder language model whose MLPs are Mixture-of-Experts layers, and the same layer as a plain torch loop."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastmoe_cpp import MoE, MoEConfig

#: Relative: scores this close may come out in either order, since two implementations round them differently.
NEAR_TIE = 1e-5


class LoopOutput(NamedTuple):
    """The fields of fastmoe_cpp.MoEOutput that the model uses."""

    hidden_states: Tensor
    tokens_per_expert: Tensor
    balance_loss: Tensor
    aux_loss: Tensor


class LoopMoE(nn.Module):
    """What fastmoe_cpp.MoE computes, written the usual way: a Python loop over the experts. Same parameter names.

    near_ties, of the last forward: how many tokens have their last chosen and first unchosen scores within NEAR_TIE.
    """

    near_ties: Tensor

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        experts, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size
        self.router = nn.Linear(hidden, experts, bias=False)
        self.experts = nn.ParameterDict(
            {
                "gate_up_proj": nn.Parameter(torch.empty(experts, 2 * inner, hidden)),
                "down_proj": nn.Parameter(torch.empty(experts, hidden, inner)),
            }
        )

    def forward_with_routing(self, hidden_states: Tensor) -> LoopOutput:
        c = self.config
        x = hidden_states.reshape(-1, c.hidden_size)
        with torch.autocast(x.device.type, enabled=False):
            scores = torch.softmax(F.linear(x.float(), self.router.weight.float()), dim=-1)
            weights, ids = torch.topk(scores, c.top_k, dim=-1)
            if c.router.renormalize:
                weights = weights / weights.sum(dim=-1, keepdim=True)
        self.near_ties = count_near_ties(scores.detach(), c.top_k)
        output = torch.zeros_like(x)
        chosen = F.one_hot(ids, c.num_experts)
        for expert in range(c.num_experts):
            token, k = torch.where(chosen[..., expert])
            gate, up = F.linear(x[token], self.experts["gate_up_proj"][expert]).chunk(2, dim=-1)
            result = F.linear(F.silu(gate) * up, self.experts["down_proj"][expert])
            output.index_add_(0, token, (result * weights[token, k, None]).to(output.dtype))
        tokens_per_expert = chosen.sum(dim=(0, 1))
        share = tokens_per_expert.float() / ids.numel()
        balance_loss = c.num_experts * (share * scores.mean(dim=0)).sum()
        aux_loss = c.router.balance_loss_coefficient * balance_loss
        return LoopOutput(output.view_as(hidden_states), tokens_per_expert, balance_loss, aux_loss)


def count_near_ties(scores: Tensor, top_k: int) -> Tensor:
    """Of scores [T, E]: the tokens, as an int64 scalar, whose top_k-th score is within NEAR_TIE of the next one."""
    if top_k == scores.shape[-1]:
        return scores.new_zeros((), dtype=torch.int64)
    last, following = scores.topk(top_k + 1, dim=-1).values[:, -2:].unbind(-1)
    return (last - following <= NEAR_TIE * last).sum()


class Attention(nn.Module):
    """Causal self-attention with rotary positions (arXiv 2104.09864) and normalised queries and keys."""

    def __init__(self, hidden_size: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads, self.head_size = heads, hidden_size // heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)
        frequency = 10000.0 ** (-torch.arange(0, self.head_size, 2) / self.head_size)
        angle = torch.arange(context)[:, None] * frequency
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def rotate(self, x: Tensor) -> Tensor:
        a, b = F.rms_norm(x.float(), (self.head_size,)).chunk(2, dim=-1)
        cos, sin = self.cos[: x.shape[-2]], self.sin[: x.shape[-2]]
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, self.head_size).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, hidden))


class Block(nn.Module):
    def __init__(self, moe: MoE | LoopMoE, heads: int, context: int) -> None:
        super().__init__()
        hidden_size = moe.config.hidden_size
        self.attention_norm = nn.RMSNorm(hidden_size)
        self.attention = Attention(hidden_size, heads, context)
        self.moe_norm = nn.RMSNorm(hidden_size)
        self.moe = moe

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = x + self.attention(self.attention_norm(x))
        out = self.moe.forward_with_routing(self.moe_norm(x))
        return x + out.hidden_states, out.aux_loss, out.balance_loss, out.tokens_per_expert


class ModelOutput(NamedTuple):
    logits: Tensor  #: [B, L, 256] float32
    aux_loss: Tensor  #: scalar: the layers' balance losses by their coefficient, added up
    balance_loss: Tensor  #: scalar: the layers' mean, 1 is even
    tokens_per_expert: Tensor  #: [layers, E] int64


class TextModel(nn.Module):
    """Bytes [B, L] to the next bytes' logits; `moe` is the class of its MoE layers."""

    def __init__(
        self, moe: type[MoE] | type[LoopMoE], config: MoEConfig, *, layers: int, heads: int, context: int,
        checkpoint_activations: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.context, self.checkpoint_activations = context, checkpoint_activations
        self.embedding = nn.Embedding(256, config.hidden_size)
        self.blocks = nn.ModuleList(Block(moe(config), heads, context) for _ in range(layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, 256, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal weights of standard deviation 0.02, smaller where a block adds to the residual stream (GPT-2).

        The embedding's is 1: a small one is changed many times over by the first steps of training, and then two
        implementations that differ in the last bit choose other experts after a few dozen steps.
        """
        into_residual = 0.02 / (2 * len(self.blocks)) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                adds = name.endswith(("attention.out.weight", "down_proj"))
                parameter.normal_(0.0, into_residual if adds else 0.02)
        self.embedding.weight.normal_()

    def forward(self, tokens: Tensor) -> ModelOutput:
        x = self.embedding(tokens)
        aux, balance, load = [], [], []
        for block in self.blocks:
            if self.checkpoint_activations and self.training:
                x, a, b, n = checkpoint(block, x, use_reentrant=False)
            else:
                x, a, b, n = block(x)
            aux.append(a)
            balance.append(b)
            load.append(n)
        logits = self.head(self.norm(x)).float()
        return ModelOutput(logits, torch.stack(aux).sum(), torch.stack(balance).mean(), torch.stack(load))


@torch.no_grad()
def generate(model: TextModel, prompt: bytes, length: int, *, temperature: float, seed: int, separator: int) -> bytes:
    """`length` bytes after a prompt, drawn from the model; the separator between files is never drawn."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([[separator, *prompt]], device=device)
    training = model.training
    model.eval()
    for _ in range(length):
        logits = model(tokens[:, -model.context :]).logits[0, -1]
        logits[separator] = -torch.inf
        probabilities = torch.softmax(logits / temperature, dim=-1).cpu()
        drawn = torch.multinomial(probabilities, 1, generator=generator)
        tokens = torch.cat([tokens, drawn.to(device)[None]], dim=1)
    model.train(training)
    return bytes(tokens[0, 1 + len(prompt) :].tolist())
