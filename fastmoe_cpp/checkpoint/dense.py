"""Dense Llama, Mistral and Qwen2 checkpoints: their MLPs checked and read, and their configuration as a MoE model's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .errors import (
    ConfigError,
    DtypeError,
    LayoutError,
    MissingTensorError,
    NonFiniteError,
    ShapeError,
    UnknownTensorError,
)
from .files import TORCH_DTYPES, TensorInfo, all_finite, inside, read_json
from .source import must_exist, open_store

PARTS = ("gate", "up", "down")
# Defaults of the configuration classes in transformers that the MoE families do not share.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
              "num_attention_heads": 32, "num_key_value_heads": None, "max_position_embeddings": 2048,
              "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
                "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 2,
                "sliding_window": 4096},
    "qwen2": {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
              "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 32768,
              "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "use_sliding_window": False, "sliding_window": 4096,
              "max_window_layers": 28},
}  # fmt: skip
_SHARED = {"hidden_act": "silu", "initializer_range": 0.02, "tie_word_embeddings": False, "attention_dropout": 0.0}


class Dense:
    """A dense checkpoint whose MLPs can become experts; their names, shapes and dtypes are checked when it is made."""

    def __init__(self, path: str | Path, allow_pickle: bool = False) -> None:
        self.path = Path(path)
        must_exist(self.path)
        folder = self.path if self.path.is_dir() else self.path.parent
        file = folder / "config.json"
        if not file.is_file():
            beside = "" if self.path.is_dir() else " beside it"
            raise ConfigError(f"{self.path}: config.json is missing{beside}")
        found = read_json(inside(folder, file), "configuration")
        self.family = found.get("model_type")
        if self.family not in _DEFAULTS:
            raise ConfigError(
                f"{file}: model_type must be one of {', '.join(_DEFAULTS)}, got {self.family!r}", found=self.family
            )
        if found.get("quantization_config"):
            raise ConfigError(f"{file}: the weights must be unquantised, quantization_config is set")
        if found.get("mlp_bias"):
            raise ConfigError(f"{file}: mlp_bias must be false, experts have no biases here; got {found['mlp_bias']!r}")
        self.config = _SHARED | _DEFAULTS[self.family] | found
        if self.config["num_key_value_heads"] is None:
            self.config["num_key_value_heads"] = self.config["num_attention_heads"]
        self._positive("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        self.hidden, self.inner = self.config["hidden_size"], self.config["intermediate_size"]
        self.layers = self.config["num_hidden_layers"]
        self.store = open_store(self.path, allow_pickle)
        self._check()

    def _positive(self, *names: str) -> None:
        for name in names:
            value = self.config[name]
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{self.path}: {name} in config.json must be an integer of at least 1, got {value!r}")

    def name(self, layer: int, part: str) -> str:
        """The tensor of an MLP's part."""
        return f"model.layers.{layer}.mlp.{part}_proj.weight"

    def info(self, layer: int, part: str) -> TensorInfo:
        """Where that tensor lies."""
        return self.store.infos[self.name(layer, part)]

    def _check(self) -> None:
        mlps = {self.name(layer, part): part for layer in range(self.layers) for part in PARTS}
        for name, part in mlps.items():
            shape = (self.hidden, self.inner) if part == "down" else (self.inner, self.hidden)
            info = self.store.infos.get(name)
            if info is None:
                raise MissingTensorError(f"{self.path}: {name} of shape {list(shape)} is missing", tensor=name)
            if info.shape != shape:
                raise ShapeError(
                    f"{self.path}: {name} must have shape {list(shape)}, it has {list(info.shape)}",
                    tensor=name, expected=shape, found=info.shape,
                )  # fmt: skip
            if info.dtype not in TORCH_DTYPES:
                raise DtypeError(
                    f"{self.path}: {name} must have one of the dtypes {', '.join(TORCH_DTYPES)}, it has {info.dtype}",
                    tensor=name, found=info.dtype,
                )  # fmt: skip
        self.trunk = [name for name in sorted(self.store.infos) if name not in mlps]
        for name in self.trunk:
            if ".mlp." in name:
                raise UnknownTensorError(f"{self.path}: {name} has no place in a MoE model", tensor=name)

    def read(self, layer: int, part: str) -> torch.Tensor:
        """[F, H] of gate and up, [H, F] of down; NonFiniteError where it is not finite."""
        name = self.name(layer, part)
        tensor = self.store.read(name)
        if not all_finite(tensor):
            raise NonFiniteError(f"{self.path}: {name} must be finite, it holds NaN or infinite values", tensor=name)
        return tensor

    def close(self) -> None:
        """Closes its files."""
        self.store.close()


def default_layout(dense: Dense) -> str:
    """Qwen2-MoE for Qwen2, Mixtral for the others."""
    return "qwen2_moe" if dense.family == "qwen2" else "mixtral"


def moe_config(dense: Dense, family: str, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the MoE model ('mixtral' or 'qwen2_moe') around these experts; LayoutError where it can't hold the
    dense model's attention.

    sizes: num_experts, top_k, intermediate_size (of an expert) and, for Qwen2-MoE, shared_size.
    """
    config = dict(dense.config)
    biases = [name for name in dense.trunk if "self_attn" in name and name.endswith(".bias")]
    qkv = [name for name in biases if name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias"))]
    if biases and (family == "mixtral" or len(qkv) != len(biases)):
        wrong = biases[0] if family == "mixtral" else next(name for name in biases if name not in qkv)
        raise LayoutError(f"{wrong} has no place in a {family} model", tensor=wrong)
    window = config.get("sliding_window") if dense.family != "qwen2" or config.get("use_sliding_window") else None
    if family == "mixtral" and dense.family == "qwen2" and window is not None:
        raise LayoutError("use_sliding_window = true has no place in a mixtral model made from qwen2")
    if family == "qwen2_moe" and dense.family != "qwen2" and window is not None:
        raise LayoutError(f"sliding_window = {window} has no place in a qwen2_moe model made from {dense.family}")
    for name in ("transformers_version", "auto_map", "mlp_bias", "attention_bias", "pretraining_tp", "layer_types"):
        if name != "layer_types" or family == "mixtral":
            config.pop(name, None)
    rope = config.get("rope_parameters")
    if isinstance(rope, Mapping) and "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
    config |= {"model_type": family, "num_experts_per_tok": sizes["top_k"]}
    if family == "mixtral":
        for name in ("use_sliding_window", "max_window_layers"):
            config.pop(name, None)
        return config | {
            "architectures": ["MixtralForCausalLM"], "num_local_experts": sizes["num_experts"],
            "intermediate_size": sizes["intermediate_size"], "sliding_window": window,
        }  # fmt: skip
    return config | {
        "architectures": ["Qwen2MoeForCausalLM"], "num_experts": sizes["num_experts"], "qkv_bias": bool(qkv),
        "moe_intermediate_size": sizes["intermediate_size"], "decoder_sparse_step": 1, "mlp_only_layers": [],
        "shared_expert_intermediate_size": sizes["shared_size"], "norm_topk_prob": True,
        "use_sliding_window": window is not None, "sliding_window": window,
    }  # fmt: skip
