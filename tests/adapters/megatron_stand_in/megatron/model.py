"""The model: embeddings, layers with an ``mlp`` slot, a head tied to nothing; and its wrappers."""

import enum

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from . import VERSION, get_args, mpu


class ModelType(enum.Enum):
    encoder_or_decoder = 1


class ParallelMLP(nn.Module):
    """Returns the output without the second bias, and that bias."""

    def __init__(self):
        super().__init__()
        args = get_args()
        self.dense_h_to_4h = nn.Linear(args.hidden_size, 4 * args.hidden_size)
        self.dense_4h_to_h = nn.Linear(4 * args.hidden_size, args.hidden_size)

    def forward(self, hidden_states):
        inner = F.gelu(self.dense_h_to_4h(hidden_states))
        return F.linear(inner, self.dense_4h_to_h.weight), self.dense_4h_to_h.bias


class ParallelTransformerLayer(nn.Module):
    def __init__(self):
        super().__init__()
        hidden = get_args().hidden_size
        self.input_layernorm = nn.LayerNorm(hidden)
        self.self_attention = nn.Linear(hidden, hidden)
        self.post_attention_layernorm = nn.LayerNorm(hidden)
        self.mlp = ParallelMLP()

    def forward(self, hidden_states):
        seen = torch.arange(1, hidden_states.shape[0] + 1, dtype=hidden_states.dtype, device=hidden_states.device)
        seen = seen.view(-1, 1, 1)
        mean = self.input_layernorm(hidden_states).cumsum(dim=0) / seen
        residual = hidden_states + self.self_attention(mean)
        mlp_output, mlp_bias = self.mlp(self.post_attention_layernorm(residual))
        # fails unless the bias is a tensor
        return mlp_output + mlp_bias.expand_as(residual) + residual


class ParallelTransformer(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList([ParallelTransformerLayer() for _ in range(layers)])

    def forward(self, hidden_states):
        for layer in self.layers:
            if get_args().recompute and self.training:
                hidden_states = checkpoint(layer, hidden_states, use_reentrant=True)
            else:
                hidden_states = layer(hidden_states)
        return hidden_states


class Embedding(nn.Module):
    def __init__(self):
        super().__init__()
        args = get_args()
        self.word_embeddings = nn.Embedding(args.padded_vocab_size, args.hidden_size)
        self.position_embeddings = nn.Embedding(args.max_position_embeddings, args.hidden_size)

    def forward(self, tokens, positions):
        return (self.word_embeddings(tokens) + self.position_embeddings(positions)).transpose(0, 1).contiguous()


class TransformerLanguageModel(nn.Module):
    def __init__(self, pre_process, post_process):
        super().__init__()
        args = get_args()
        if pre_process:
            self.embedding = Embedding()
        layers = ParallelTransformer(args.num_layers // args.pipeline_model_parallel_size)
        if VERSION == "2.2":
            self.transformer = layers
        else:
            self.encoder = layers
            self.decoder = None
        if post_process:
            self.head = nn.Linear(args.hidden_size, args.padded_vocab_size, bias=False)

    def forward(self, given, positions):
        hidden_states = self.embedding(given, positions) if hasattr(self, "embedding") else given
        hidden_states = (self.transformer if VERSION == "2.2" else self.encoder)(hidden_states)
        return self.head(hidden_states).transpose(0, 1) if hasattr(self, "head") else hidden_states


class GPTModel(nn.Module):
    def __init__(self, num_tokentypes=0, parallel_output=True, pre_process=True, post_process=True):
        super().__init__()
        self.language_model = TransformerLanguageModel(pre_process, post_process)
        self.pre_process, self.post_process, self.input_tensor = pre_process, post_process, None

    def set_input_tensor(self, input_tensor):
        self.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(self, tokens, positions, attention_mask, labels=None):
        output = self.language_model(tokens if self.pre_process else self.input_tensor, positions)
        if not self.post_process:
            return output
        return F.cross_entropy(output.reshape(-1, output.shape[-1]).float(), labels.reshape(-1), reduction="none")

    def state_dict_for_save_checkpoint(self, destination=None, prefix="", keep_vars=False):
        """Nested, as the host's."""
        return {"language_model": self.language_model.state_dict(prefix=prefix, keep_vars=keep_vars)}

    def load_state_dict(self, state_dict, strict=True):
        self.language_model.load_state_dict(state_dict["language_model"], strict=strict)


class GPTModelFirstStage(GPTModel):
    def __init__(self, num_tokentypes=0):
        super().__init__(num_tokentypes, post_process=False)


class GPTModelLastStage(GPTModel):
    def __init__(self, num_tokentypes=0, parallel_output=True):
        super().__init__(num_tokentypes, pre_process=False)

    def forward(self, input_tensor, attention_mask, labels=None):
        self.input_tensor = input_tensor
        return super().forward(None, None, attention_mask, labels)


class Float16Module(nn.Module):
    def __init__(self, module, args):
        super().__init__()
        self.module = module.to(args.params_dtype)

    def forward(self, *inputs, **named):
        return self.module(*inputs, **named)

    def state_dict_for_save_checkpoint(self, *inputs, **named):
        return self.module.state_dict_for_save_checkpoint(*inputs, **named)

    def load_state_dict(self, state_dict, strict=True):
        self.module.load_state_dict(state_dict, strict)


class DistributedDataParallel(nn.Module):
    """The host's averages every gradient, experts too: it must not be met where an adapter is installed."""

    def __init__(self, *_):
        super().__init__()
        raise AssertionError(f"data-parallel group {mpu.get_data_parallel_group()}: the host's own wrapper was built")
