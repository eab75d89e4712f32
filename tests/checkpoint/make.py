"""Small checkpoints of every layout, written with plain torch and the safetensors library from known weights.

Nothing here knows the tables of fastmoe_cpp.checkpoint: each layout's names and shapes are spelled out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

H, F, E, S = 6, 4, 8, 8
Tensors = dict[str, torch.Tensor]

COMMON = {"hidden_size": H, "hidden_act": "silu", "num_hidden_layers": 2, "num_attention_heads": 2,
          "num_key_value_heads": 1, "vocab_size": 10}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {"model_type": "mixtral", "intermediate_size": F, "num_local_experts": E, "num_experts_per_tok": 2},
    "qwen2_moe": {"model_type": "qwen2_moe", "moe_intermediate_size": F, "num_experts": E, "num_experts_per_tok": 4,
                  "shared_expert_intermediate_size": S, "norm_topk_prob": False},
    "qwen3_moe": {"model_type": "qwen3_moe", "moe_intermediate_size": F, "num_experts": E, "num_experts_per_tok": 4,
                  "norm_topk_prob": True},
    "olmoe": {"model_type": "olmoe", "intermediate_size": F, "num_experts": E, "num_experts_per_tok": 4,
              "norm_topk_prob": False},
    "deepseek": {"model_type": "deepseek", "moe_intermediate_size": F, "n_routed_experts": E, "n_shared_experts": 2,
                 "num_experts_per_tok": 3, "norm_topk_prob": False},
    "deepseek_v3": {"model_type": "deepseek_v3", "moe_intermediate_size": F, "n_routed_experts": E,
                    "n_shared_experts": 2, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2,
                    "first_k_dense_replace": 0, "routed_scaling_factor": 2.5, "norm_topk_prob": True},
    "gpt_oss": {"model_type": "gpt_oss", "intermediate_size": F, "num_local_experts": E, "num_experts_per_tok": 4},
    # layouts without a transformers model: MoEConfig's fields that weights don't show
    "gpt_neox": {"top_k": 2, "activation": "gelu_tanh", "router": {"renormalize": False}},
    "fastmoe": {"top_k": 2, "activation": "gelu"},
}  # fmt: skip
for _family, _config in CONFIGS.items():
    if "model_type" in _config:
        _config.update({**COMMON, **_config})


def parts(kind: str, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """Random weights of one layer of a kind of model."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    found = {"router": draw(E, H), "up": draw(E, F, H), "down": draw(E, H, F)}
    if kind not in ("gpt_neox", "fastmoe"):
        found["gate"] = draw(E, F, H)
    if kind in ("qwen2_moe", "deepseek", "deepseek_v3"):
        found |= {"shared_gate": draw(S, H), "shared_up": draw(S, H), "shared_down": draw(H, S)}
    if kind == "qwen2_moe":
        found["shared_scale"] = draw(1, H)
    if kind == "deepseek_v3":
        found["expert_bias"] = torch.randn(E, generator=generator)
    if kind == "gpt_oss":
        found |= {"router_bias": draw(E), "gate_bias": draw(E, F), "up_bias": draw(E, F), "down_bias": draw(E, H)}
    if kind == "fastmoe":
        found |= {"router_bias": draw(E), "up_bias": draw(E, F), "down_bias": draw(E, H)}
    return found


def hugging_face(kind: str, p: Tensors, layer: int, packed: bool = False) -> Tensors:
    """A layer as transformers' checkpoints have it."""
    root = f"model.layers.{layer}."
    if kind == "gpt_oss":
        mixed = torch.empty(E, 2 * F, H, dtype=p["gate"].dtype)
        mixed[:, 0::2], mixed[:, 1::2] = p["gate"], p["up"]
        bias = torch.empty(E, 2 * F, dtype=p["gate"].dtype)
        bias[:, 0::2], bias[:, 1::2] = p["gate_bias"], p["up_bias"]
        return {
            root + "mlp.router.weight": p["router"], root + "mlp.router.bias": p["router_bias"],
            root + "mlp.experts.gate_up_proj": mixed.transpose(1, 2).contiguous(),
            root + "mlp.experts.gate_up_proj_bias": bias,
            root + "mlp.experts.down_proj": p["down"].transpose(1, 2).contiguous(),
            root + "mlp.experts.down_proj_bias": p["down_bias"],
        }  # fmt: skip
    found: Tensors = {}
    if kind == "mixtral" and not packed:
        root += "block_sparse_moe."
        names = {"gate": "w1", "up": "w3", "down": "w2"}
    else:
        root += "mlp."
        names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    found[root + "gate.weight"] = p["router"]
    if packed:
        found[root + "experts.gate_up_proj"] = torch.cat([p["gate"], p["up"]], dim=1)
        found[root + "experts.down_proj"] = p["down"]
    else:
        for e in range(E):
            for part, name in names.items():
                found[f"{root}experts.{e}.{name}.weight"] = p[part][e].clone()
    if "shared_up" in p:
        module = "shared_expert" if kind == "qwen2_moe" else "shared_experts"
        for part in ("gate", "up", "down"):
            found[f"{root}{module}.{part}_proj.weight"] = p[f"shared_{part}"]
    if "shared_scale" in p:
        found[root + "shared_expert_gate.weight"] = p["shared_scale"]
    if "expert_bias" in p:
        found[root + "gate.e_score_correction_bias"] = p["expert_bias"]
    return found


def torchtitan(p: Tensors, layer: int, later: bool = False) -> Tensors:
    """A layer as TorchTitan 0.2 or, later, 0.3 has it."""
    root = f"layers.{layer}.moe."
    names = {"gate": "w1", "up": "w3", "down": "w2"}
    experts = {"gate": "w1_EFD", "up": "w3_EFD", "down": "w2_EDF"} if later else names
    under = "routed_experts.inner_experts." if later else "experts."
    found = {root + under + name: p[part] for part, name in experts.items()}
    found[root + "router.gate.weight"] = p["router"]
    if "expert_bias" in p:
        found[root + ("expert_bias_E" if later else "expert_bias")] = p["expert_bias"]
    if "shared_up" in p:
        found |= {f"{root}shared_experts.{name}.weight": p[f"shared_{part}"] for part, name in names.items()}
    return found


def megatron(p: Tensors, layer: int, sequential: bool = False) -> Tensors:
    """A layer as Megatron-Core has it."""
    root = f"decoder.layers.{layer}.mlp."
    found = {root + "router.weight": p["router"]}
    for part, name in (("router_bias", "router.bias"), ("expert_bias", "router.expert_bias"),
                       ("shared_scale", "shared_experts.gate_weight"),
                       ("shared_down", "shared_experts.linear_fc2.weight")):  # fmt: skip
        if part in p:
            found[root + name] = p[part]
    if "shared_up" in p:
        found[root + "shared_experts.linear_fc1.weight"] = torch.cat([p["shared_gate"], p["shared_up"]])
    for e in range(E):
        for number, kind, halves in ((1, "weight", ("gate", "up")), (1, "bias", ("gate_bias", "up_bias")),
                                     (2, "weight", ("down",)), (2, "bias", ("down_bias",))):  # fmt: skip
            here = [p[half][e] for half in halves if half in p]
            if here:
                name = f"local_experts.{e}.linear_fc{number}.{kind}" if sequential else f"linear_fc{number}.{kind}{e}"
                found[f"{root}experts.{name}"] = torch.cat(here)
    return found


def gpt_neox(p: Tensors, layer: int) -> Tensors:
    """A layer as GPT-NeoX has it."""
    root = f"layers.{layer}.mlp."
    return {
        root + "router.layer.weight": p["router"],
        root + "experts.mlp.w1": p["up"].reshape(E * F, H),
        root + "experts.mlp.w2": p["down"].transpose(1, 2).reshape(E * F, H),
    }


def fastmoe(p: Tensors, layer: int, stacked: bool = False) -> Tensors:
    """A layer as FastMoE has it, before and since 1.0.1."""
    root = f"model.layers.{layer}.mlp."
    found = {root + "gate.gate.weight": p["router"], root + "gate.gate.bias": p["router_bias"]}
    for part, name in (("up", "htoh4.weight"), ("up_bias", "htoh4.bias"), ("down", "h4toh.weight"),
                       ("down_bias", "h4toh.bias")):  # fmt: skip
        if stacked:
            found[f"{root}experts.{name}"] = p[part]
        else:
            found |= {f"{root}experts.{e}.{name}": p[part][e : e + 1].clone() for e in range(E)}
    return found


def own(p: Tensors, layer: int) -> Tensors:
    """A layer as fastmoe_cpp.MoE's state_dict has it."""
    root = f"model.layers.{layer}.mlp."
    rename = {"router": "router.weight", "router_bias": "router.bias", "expert_bias": "router.expert_bias",
              "down": "experts.down_proj", "down_bias": "experts.down_bias", "shared_down": "shared_experts.down_proj",
              "shared_scale": "shared_experts.gate"}  # fmt: skip
    found = {root + name: p[part] for part, name in rename.items() if part in p}
    turns = "gate_bias" in p  # gpt-oss keeps gate and up rows in turn
    for suffix, name in (("", "gate_up_proj"), ("_bias", "gate_up_bias")):
        halves = [p[part + suffix] for part in ("gate", "up") if part + suffix in p]
        if len(halves) == 2 and turns:
            found[f"{root}experts.{name}"] = torch.stack(halves, dim=2).flatten(1, 2)
        elif halves:
            found[f"{root}experts.{name}"] = torch.cat(halves, dim=1)
    if "shared_up" in p:
        found[root + "shared_experts.gate_up_proj"] = torch.cat([p["shared_gate"], p["shared_up"]])
    return found


def layer_tensors(layout: str, kind: str, p: Tensors, layer: int) -> Tensors:
    """A layer of these parts in a layout by its name."""
    packed = layout.endswith("_packed")
    if layout.startswith("torchtitan"):
        return torchtitan(p, layer, later=layout == "torchtitan_0_3")
    if layout.startswith("megatron"):
        return megatron(p, layer, sequential=layout == "megatron_sequential")
    if layout.startswith("fastmoe_cpp"):
        return own(p, layer)
    if layout.startswith("fastmoe"):
        return fastmoe(p, layer, stacked=layout == "fastmoe_stacked")
    if layout == "gpt_neox":
        return gpt_neox(p, layer)
    return hugging_face(layout.removesuffix("_packed"), p, layer, packed)


#: For each kind of model the layouts that can hold it.
HOLDERS: dict[str, tuple[str, ...]] = {
    "mixtral": ("mixtral", "mixtral_packed", "deepseek", "deepseek_packed", "torchtitan", "torchtitan_0_3",
                "megatron_grouped", "megatron_sequential", "fastmoe_cpp"),
    "qwen2_moe": ("qwen2_moe", "qwen2_moe_packed", "megatron_grouped", "megatron_sequential", "fastmoe_cpp"),
    "qwen3_moe": ("qwen3_moe", "qwen3_moe_packed", "torchtitan", "torchtitan_0_3", "megatron_grouped",
                  "megatron_sequential", "fastmoe_cpp"),
    "olmoe": ("olmoe", "olmoe_packed", "torchtitan", "torchtitan_0_3", "megatron_grouped", "megatron_sequential",
              "fastmoe_cpp"),
    "deepseek": ("deepseek", "deepseek_packed", "torchtitan", "torchtitan_0_3", "megatron_grouped",
                 "megatron_sequential", "fastmoe_cpp"),
    "deepseek_v3": ("deepseek_v3", "deepseek_v3_packed", "torchtitan", "torchtitan_0_3", "megatron_grouped",
                    "megatron_sequential", "fastmoe_cpp"),
    "gpt_oss": ("gpt_oss", "megatron_grouped", "megatron_sequential", "fastmoe_cpp"),
    "gpt_neox": ("gpt_neox", "megatron_grouped", "megatron_sequential", "fastmoe_cpp"),
    "fastmoe": ("fastmoe", "fastmoe_stacked", "megatron_grouped", "megatron_sequential", "fastmoe_cpp"),
}  # fmt: skip


def trunk(kind: str) -> Tensors:
    """Something beside the MoE layers, in transformers' names, of a dtype that torch alone does not compute in."""
    generator = torch.Generator().manual_seed(99)
    found = {
        f"model.layers.{n}.input_layernorm.weight": torch.randn(H, generator=generator).bfloat16() for n in range(2)
    }
    return found | {
        "model.embed_tokens.weight": torch.randn(10, H, generator=generator),
        "model.norm.weight": torch.randn(H, generator=generator).to(torch.float8_e4m3fn),
    }


def write(folder: Path, tensors: Tensors, config: dict[str, Any] | None, files: int = 1) -> Path:
    """A folder with config.json and the tensors in that many safetensors files and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    names = list(tensors)
    if files == 1:
        save_file(
            {n: t.contiguous().clone() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
        )
        return folder
    weight_map = {}
    for i in range(files):
        file = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        mine = names[i::files]
        save_file({n: tensors[n].contiguous().clone() for n in mine}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read(folder: Path) -> Tensors:
    """Every tensor of a folder, through the safetensors library."""
    found: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def same_bits(a: Tensors, b: Tensors) -> None:
    """Asserts equal names, shapes, dtypes and bytes."""
    assert sorted(a) == sorted(b)
    for name in a:
        assert a[name].shape == b[name].shape and a[name].dtype == b[name].dtype, name
        one, other = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a[name], b[name]))
        assert torch.equal(one, other), name


def checkpoint(folder: Path, kind: str, layout: str | None = None, files: int = 1, with_trunk: bool = True) -> Path:
    """Two layers of a kind of model in a layout, its own by default."""
    layout = layout or kind
    tensors = trunk(kind) if with_trunk and "model_type" in CONFIGS[kind] else {}
    for layer in range(2):
        tensors |= layer_tensors(layout, kind, parts(kind, layer), layer)
    return write(folder, tensors, CONFIGS[kind], files)
