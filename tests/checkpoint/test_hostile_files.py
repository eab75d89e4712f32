"""Files that lie: each a typed error that names what is wrong, and nothing written or changed."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmoe_cpp.checkpoint import (
    CheckpointError,
    ConfigError,
    DtypeError,
    FileFormatError,
    MissingTensorError,
    NonFiniteError,
    ShapeError,
    UnknownTensorError,
    UnsafeFileError,
    convert,
    inspect,
)
from fastmoe_cpp.checkpoint.files import all_finite

from . import make
from .refusals import json_values, refused

MOE = "model.layers.1.mlp."


def changed(tmp_path: Path, change, kind: str = "qwen3_moe", layout: str | None = None, config=None) -> Path:
    source = make.checkpoint(tmp_path / "source", kind, layout)
    tensors = make.read(source)
    change(tensors)
    return make.write(source, tensors, config or make.CONFIGS[kind])


def test_a_missing_expert(tmp_path):
    source = changed(tmp_path, lambda t: t.pop(MOE + "experts.3.up_proj.weight"))
    error = refused(source, MissingTensorError, r"experts.\{N\}.up_proj.weight must be there for N = 0 .. 7: missing 3")
    assert error.tensor == MOE + "experts.3.up_proj.weight"


def test_an_expert_too_many(tmp_path):
    def add(tensors):
        tensors[MOE + "experts.8.up_proj.weight"] = tensors[MOE + "experts.7.up_proj.weight"].clone()

    refused(changed(tmp_path, add), MissingTensorError, "too many 8")


def test_a_missing_router(tmp_path):
    source = changed(tmp_path, lambda t: t.pop(MOE + "gate.weight"))
    refused(source, MissingTensorError, "layers.1.mlp.gate.weight is missing|layer 1 must be a MoE layer")


def test_a_tensor_without_a_place(tmp_path):
    source = changed(tmp_path, lambda t: t.update({MOE + "experts.0.lora.weight": torch.ones(2)}))
    error = refused(source, UnknownTensorError, "has no place in the layout qwen3_moe")
    assert error.tensor == MOE + "experts.0.lora.weight"


def test_a_wrong_shape(tmp_path):
    def change(tensors):
        tensors[MOE + "experts.2.down_proj.weight"] = torch.zeros(make.F, make.H, dtype=torch.bfloat16)

    error = refused(changed(tmp_path, change), ShapeError, r"must have shape \[6, 4\], it has \[4, 6\]")
    assert (error.tensor, error.expected, error.found) == (MOE + "experts.2.down_proj.weight", (6, 4), (4, 6))


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn, torch.bool])
def test_a_wrong_dtype(tmp_path, dtype):
    def change(tensors):
        tensors[MOE + "gate.weight"] = torch.ones(make.E, make.H).to(dtype)

    refused(changed(tmp_path, change), DtypeError, "gate.weight must have one of the dtypes F64, F32, F16, BF16")


def test_mixed_dtypes_that_a_packed_tensor_cannot_hold(tmp_path):
    def change(tensors):
        name = MOE + "experts.2.down_proj.weight"
        tensors[name] = tensors[name].float()

    source = changed(tmp_path, change)
    with pytest.raises(DtypeError, match="experts.2.down_proj.weight must have the dtype of .*BF16.* it has F32"):
        convert(source, tmp_path / "out", "fastmoe_cpp")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", ["qwen3_moe", "qwen3_moe_packed"])
def test_not_finite(tmp_path, value, layout):
    name = MOE + ("experts.gate_up_proj" if layout.endswith("packed") else "experts.5.up_proj.weight")

    def change(tensors):
        tensors[name].view(-1)[-1] = value

    source = changed(tmp_path, change, layout=layout)
    error = refused(source, NonFiniteError, "must be finite, it holds 1 NaN or infinite values")
    assert error.tensor == name
    assert [p.tensor for p in inspect(source, values=True).all_problems] == [name]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_is_exact(dtype):
    largest = torch.full((64, 3), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(largest) and all_finite(largest[:0])  # whose sum is infinite
    for value in (float("nan"), float("inf"), -float("inf")):
        for at in (0, 63):
            wrong = largest.clone()
            wrong[at, 1] = value
            assert not all_finite(wrong)
    both = torch.zeros(4, dtype=dtype)
    both[0], both[1] = float("inf"), -float("inf")
    assert not all_finite(both)


def test_quantised_experts(tmp_path):
    def change(tensors):
        for layer in range(2):
            whole = tensors.pop(f"model.layers.{layer}.mlp.experts.gate_up_proj")
            tensors[f"model.layers.{layer}.mlp.experts.gate_up_proj_blocks"] = torch.zeros(
                whole.shape, dtype=torch.uint8
            )
            tensors[f"model.layers.{layer}.mlp.experts.gate_up_proj_scales"] = torch.zeros(4, dtype=torch.uint8)

    source = changed(tmp_path, change, "gpt_oss")
    with pytest.raises(CheckpointError, match="gate_up_proj_blocks: .*MXFP4"):
        convert(source, tmp_path / "out", "fastmoe_cpp")
    config = {**make.CONFIGS["gpt_oss"], "quantization_config": {"quant_method": "mxfp4"}}
    source = changed(tmp_path, lambda tensors: None, "gpt_oss", config=config)
    with pytest.raises(ConfigError, match="quantised .mxfp4"):
        convert(source, tmp_path / "out", "fastmoe_cpp")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_experts_per_tok": 9}, "top_k must be at most num_experts = 8, got 9"),
        ({"num_experts_per_tok": "two"}, "num_experts_per_tok must be an integer"),
        ({"num_experts": 0}, "num_experts must be an integer"),
        ({"hidden_size": -6}, "hidden_size must be an integer"),
        ({"hidden_size": "6" * 10**6}, "hidden_size must be an integer of at least 0, got .{,80}$"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers must be an integer"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers must be an integer"),
        ({"hidden_act": "swoosh"}, "hidden_act must be one of"),
        ({"model_type": "bert"}, "model_type must be one of"),
        ({"mlp_only_layers": 7}, "mlp_only_layers must be a list"),
    ],
)
def test_a_configuration_that_makes_no_sense(tmp_path, change, words):
    source = make.write(
        make.checkpoint(tmp_path / "source", "qwen3_moe"),
        make.read(tmp_path / "source"),
        {**make.CONFIGS["qwen3_moe"], **change},
    )
    with pytest.raises(ConfigError, match=words):
        convert(source, tmp_path / "out", "fastmoe_cpp")
    assert not (tmp_path / "out").exists()


def test_a_configuration_that_is_not_the_weights(tmp_path):
    source = changed(tmp_path, lambda t: None, config={**make.CONFIGS["qwen3_moe"], "num_experts": 4})
    refused(source, CheckpointError, r"must have shape \[4, 6\], it has \[8, 6\]")


def test_no_configuration(tmp_path):
    source = make.checkpoint(tmp_path / "source", "qwen3_moe")
    (source / "config.json").unlink()
    with pytest.raises(ConfigError, match="config.json is missing.*qwen2_moe, .*give the configuration"):
        inspect(source)


anything = json_values | st.integers(-3, 10**20) | st.sampled_from([*make.CONFIGS, "layout", "fastmoe_cpp"])


def only_typed_errors(source: Path) -> None:
    """Whatever lies there is inspected, or refused by a CheckpointError."""
    with contextlib.suppress(CheckpointError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inspect(source, values=True)


@pytest.mark.parametrize("kind", [kind for kind in make.CONFIGS if "model_type" in make.CONFIGS[kind]])
@settings(max_examples=60)
@given(st.data())
def test_any_configuration_is_read_or_a_typed_error(tmp_path_factory, kind, data):
    source = tmp_path_factory.getbasetemp() / f"any-{kind}"
    if not source.exists():
        make.checkpoint(source, kind)
    config = dict(make.CONFIGS[kind])
    for name in data.draw(st.lists(st.sampled_from([*config, "quantization_config", "num_nextn_predict_layers",
                                                    "mlp_only_layers", "moe_layer_freq", "swiglu_limit",
                                                    "router_jitter_noise", "fastmoe_cpp"]), max_size=3)):  # fmt: skip
        config[name] = data.draw(anything)
    (source / "config.json").write_text(json.dumps(config))
    only_typed_errors(source)


@settings(max_examples=100)
@given(st.data())
def test_any_configuration_of_our_own_is_read_or_a_typed_error(tmp_path_factory, data):
    root = tmp_path_factory.getbasetemp()
    source = root / "any-own"
    if not source.exists():
        convert(make.checkpoint(root / "any-own-source", "deepseek_v3"), source, "fastmoe_cpp")
        (source / "whole.json").write_text((source / "config.json").read_text())
    config = json.loads((source / "whole.json").read_text())
    own = config["fastmoe_cpp"]
    for level in data.draw(st.lists(st.sampled_from([config, own, own["moe"], own["moe"]["router"]]), max_size=2)):
        level[data.draw(st.sampled_from(sorted(level)))] = data.draw(anything)
    (source / "config.json").write_text(json.dumps(config))
    only_typed_errors(source)
    target = root / "any-own-target"
    with contextlib.suppress(CheckpointError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        convert(source, target, "megatron_grouped")
        shutil.rmtree(target)


@settings(max_examples=100)
@given(st.data())
def test_any_names_are_read_or_a_typed_error(tmp_path_factory, data):
    source = tmp_path_factory.getbasetemp() / "any-names"
    tensors = make.layer_tensors("qwen3_moe", "qwen3_moe", make.parts("qwen3_moe", 0), 0)
    for name in data.draw(st.lists(st.sampled_from(sorted(tensors)), max_size=3, unique=True)):
        pieces = name.split(".")
        pieces[data.draw(st.integers(0, len(pieces) - 1))] = data.draw(
            st.sampled_from(["9" * 5000, "-1", "", "7", "\u0663", "{layer}", "{e}", "..", "mlp", "*"])
            | st.text(max_size=5)
        )
        tensors[".".join(pieces)] = tensors.pop(name)
    make.write(source, tensors, make.CONFIGS["qwen3_moe"])
    only_typed_errors(source)


# --- folders ----------------------------------------------------------------------------------------------------------


def indexed(tmp_path: Path) -> tuple[Path, dict]:
    source = make.checkpoint(tmp_path / "source", "qwen3_moe", files=3)
    return source, json.loads((source / "model.safetensors.index.json").read_text())


def put(source: Path, index: dict) -> None:
    (source / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "where", ["../elsewhere.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "config.json"]
)
def test_an_index_that_points_elsewhere(tmp_path, where):
    source, index = indexed(tmp_path)
    make.checkpoint(tmp_path, "qwen3_moe")  # a readable file right where '..' leads
    (tmp_path / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    index["weight_map"][MOE + "gate.weight"] = where
    put(source, index)
    error = refused(source, UnsafeFileError, "must lie in a .safetensors file of this folder")
    assert error.tensor == MOE + "gate.weight"


def test_an_index_with_a_missing_shard(tmp_path):
    source, _ = indexed(tmp_path)
    (source / "model-00002-of-00003.safetensors").unlink()
    refused(source, MissingTensorError, "must lie in model-00002-of-00003.safetensors, which is missing")
    (source / "model.safetensors.index.json").unlink()
    refused(source, MissingTensorError, "is one of 3 files, 2 are here and there is no index")


def test_an_index_that_promises_what_is_not_there(tmp_path):
    source, index = indexed(tmp_path)
    index["weight_map"]["model.ghost"] = "model-00001-of-00003.safetensors"
    put(source, index)
    refused(source, MissingTensorError, "must hold model.ghost, as the index says")


def test_a_tensor_in_no_index(tmp_path):
    source, index = indexed(tmp_path)
    del index["weight_map"][MOE + "gate.weight"]
    put(source, index)
    refused(source, FileFormatError, "gate.weight is in no index")


def test_a_tensor_in_two_files(tmp_path):
    source, _ = indexed(tmp_path)
    (source / "model.safetensors.index.json").unlink()
    first, second = source / "model-00001-of-00003.safetensors", source / "model-00002-of-00003.safetensors"
    second.write_bytes(first.read_bytes())
    refused(source, FileFormatError, "must lie in one file, it lies in model-00001")


def test_an_index_that_is_no_index(tmp_path):
    source, _ = indexed(tmp_path)
    put(source, {"weight_map": {"a": 1}})
    refused(source, FileFormatError, "weight_map must map")
    (source / "model.safetensors.index.json").write_text("{" * 100000)
    refused(source, FileFormatError, "must be JSON")


def test_a_link_out_of_the_folder(tmp_path):
    source = make.checkpoint(tmp_path / "source", "qwen3_moe")
    secret = tmp_path / "elsewhere.safetensors"
    (source / "model.safetensors").rename(secret)
    (source / "model.safetensors").symlink_to(secret)
    refused(source, UnsafeFileError, "must lie inside .* it leads to .*elsewhere")
    (source / "model.safetensors").unlink()
    secret.rename(source / "model.safetensors")
    (tmp_path / "private.txt").write_text("private")
    (source / "tokenizer.json").symlink_to(tmp_path / "private.txt")
    with pytest.raises(UnsafeFileError, match="tokenizer.json: must lie inside"):
        convert(source, tmp_path / "out", "fastmoe_cpp")
    assert not (tmp_path / "out").exists()


def test_a_hub_cache_may_link_into_its_blobs(tmp_path):
    cache = tmp_path / "models--someone--model"
    snapshot = make.checkpoint(cache / "snapshots" / "abc", "qwen3_moe")
    (cache / "blobs").mkdir()
    for file in list(snapshot.iterdir()):
        blob = cache / "blobs" / f"sha-{file.name}"
        file.rename(blob)
        file.symlink_to(Path("../../blobs") / blob.name)
    convert(snapshot, tmp_path / "out", "fastmoe_cpp")
    assert not (tmp_path / "out" / "model.safetensors").is_symlink()


# --- pickles ----------------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("was-executed"),))


def test_pickles_are_opened_only_where_asked_for(tmp_path):
    source = make.checkpoint(tmp_path / "source", "qwen3_moe")
    tensors = make.read(source)
    (source / "model.safetensors").unlink()
    torch.save({"model": tensors, "optimizer": {"step": 3}}, source / "model.pt")
    refused(source, UnsafeFileError, "is a pickle.*--allow-pickle")
    convert(source, tmp_path / "out", "qwen3_moe", allow_pickle=True)
    make.same_bits(make.read(tmp_path / "out"), tensors)


def test_a_pickle_that_runs_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = make.checkpoint(tmp_path / "source", "qwen3_moe")
    (source / "model.safetensors").unlink()
    torch.save({"a": Evil()}, source / "pytorch_model.bin")
    with pytest.raises(FileFormatError, match="must be a file of tensors alone"):
        convert(source, tmp_path / "out", "fastmoe_cpp", allow_pickle=True)
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(FileFormatError, match="must be a file of tensors alone"):
        convert(source, tmp_path / "out", "fastmoe_cpp", allow_pickle=True)
    assert not (tmp_path / "was-executed").exists()
