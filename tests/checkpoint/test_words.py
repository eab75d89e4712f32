"""What a person reads when a command or load_moe can't do what was asked: the right name, and a remedy that works."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch

from fastmoe_cpp import MoE, MoEConfig, RouterConfig
from fastmoe_cpp.__main__ import main
from fastmoe_cpp.checkpoint import (
    Checkpoint,
    CheckpointError,
    ConfigError,
    MissingTensorError,
    ShapeError,
    convert,
    inspect,
    load_moe,
    upcycle,
)
from fastmoe_cpp.checkpoint.commands import GO_ON

from . import make

PAGE = Path(__file__).resolve().parents[2] / "docs" / "checkpoints.md"
DENSE = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 5}  # fmt: skip


def layers_of(kind: str, layout: str) -> make.Tensors:
    tensors: make.Tensors = {}
    for layer in range(2):
        tensors |= make.layer_tensors(layout, kind, make.parts(kind, layer), layer)
    return tensors


def written(file: Path, fields: dict) -> Path:
    file.write_text(json.dumps(fields))
    return file


def dense(folder: Path) -> Path:
    """A dense Llama of one layer; upcycling looks at nothing else of it."""
    shapes = {"gate": (12, 8), "up": (12, 8), "down": (8, 12)}
    tensors = {f"model.layers.0.mlp.{part}_proj.weight": torch.randn(shape) for part, shape in shapes.items()}
    return make.write(folder, tensors, DENSE)


def said(capsys, *arguments: object) -> str:
    """The one line that a refused command says."""
    assert main([str(argument) for argument in arguments]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"fastmoe_cpp {arguments[0]}: ")
    return lines[0].removeprefix(f"fastmoe_cpp {arguments[0]}: ")


# --- load_moe --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3"])
def test_a_layer_on_meta_is_refused_and_the_remedy_works(tmp_path, kind):
    opened = Checkpoint(make.checkpoint(tmp_path / "source", kind))
    layer = MoE(opened.moe, device="meta", dtype=torch.bfloat16)
    words = r"the layer's router.weight must be on a real device, it is on meta: call to_empty\(device=...\) and reset_"
    # before anything is read: the path is not even looked at
    for source in (opened, tmp_path / "nothing"):
        with pytest.raises(ConfigError, match=words) as caught:
            load_moe(layer, source, 0)
        assert (caught.value.tensor, caught.value.found) == ("router.weight", "meta")
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    load_moe(layer, opened, 0)
    wanted = make.own(make.parts(kind, 0), 0)
    make.same_bits({f"model.layers.0.mlp.{n}": t for n, t in layer.state_dict().items()}, wanted)
    layer.experts.to("meta")
    with pytest.raises(ConfigError, match="the layer's experts.gate_up_proj must be on a real device"):
        load_moe(layer, opened, 0)


def test_a_compiled_layer_is_loaded(tmp_path):
    opened = Checkpoint(make.checkpoint(tmp_path / "source", "qwen3_moe"))
    layer = MoE(opened.moe, dtype=torch.bfloat16)
    load_moe(torch.compile(layer), opened, 1)
    assert torch.equal(layer.experts.down_proj, make.parts("qwen3_moe", 1)["down"])


def test_arguments_that_load_moe_can_not_take(tmp_path):
    opened = Checkpoint(make.checkpoint(tmp_path / "source", "qwen3_moe"))
    layer = MoE(opened.moe)
    for wrong in (torch.nn.Linear(2, 2), torch.nn.Sequential(layer), torch.compile(torch.nn.Linear(2, 2)), None):
        with pytest.raises(ConfigError, match="^layer must be a fastmoe_cpp.MoE, got (Linear|Sequential|NoneType)$"):
            load_moe(wrong, opened, 0)
    for number in ("1", 1.0, None, True):
        with pytest.raises(ConfigError, match=f"^layer_index must be an integer, got {number!r}$"):
            load_moe(layer, opened, number)
    load_moe(layer, opened, torch.tensor(1))
    torch.nn.utils.parametrize.register_parametrization(layer.router, "weight", torch.nn.Identity())
    with pytest.raises(ConfigError, match="the layer's state_dict must hold router.weight, it has none"):
        load_moe(layer, opened, 0)


def test_errors_of_load_moe_hold_both_sides(tmp_path):
    opened = Checkpoint(make.checkpoint(tmp_path / "source", "qwen3_moe"))  # 4 of 8, renormalised, without biases
    layer = MoE(MoEConfig(make.H, make.F, make.E, 2, bias=True, router=RouterConfig(renormalize=True, bias=True)))
    with pytest.raises(ConfigError, match=r"top_k = 2 \(it has 4\).*; router.bias = True \(it has False\)") as caught:
        load_moe(layer, opened, 0)
    assert caught.value.expected == {"top_k": 2, "bias": True, "router.bias": True}
    assert caught.value.found == {"top_k": 4, "bias": False, "router.bias": False}
    layer = MoE(opened.moe)
    layer.router.weight = torch.nn.Parameter(torch.zeros(3, make.H))
    with pytest.raises(ShapeError, match="the layer's router.weight must have shape") as caught:
        load_moe(layer, opened, 0)
    assert (caught.value.expected, caught.value.found) == ((make.E, make.H), (3, make.H))


# --- names -----------------------------------------------------------------------------------------------------------


def test_upcycle_names_the_path_that_is_missing(tmp_path, capsys, monkeypatch):
    dense(tmp_path / "dense")
    monkeypatch.chdir(tmp_path)
    words = "nope: must be a file or a folder, there is none"
    assert said(capsys, "upcycle", "nope", "out", "--num-experts", 4) == words
    assert said(capsys, "inspect", "nope") == words
    assert said(capsys, "upcycle", "dense", "out", "--mode", "merge", "--expert", "dense", "--expert", "nope") == words
    (tmp_path / "dense" / "config.json").unlink()
    assert said(capsys, "upcycle", "dense", "out", "--num-experts", 4) == "dense: config.json is missing"
    os.rename("dense/model.safetensors", "model.safetensors")
    found = said(capsys, "upcycle", "model.safetensors", "out", "--num-experts", 4)
    assert found == "model.safetensors: config.json is missing beside it"
    assert not (tmp_path / "out").exists()
    with pytest.raises(MissingTensorError, match=words):
        upcycle("nope", "out", num_experts=4)


@pytest.mark.parametrize(
    ("kind", "layout", "fits"),
    [
        ("mixtral", "mixtral", {"mixtral"}),
        ("qwen2_moe", "qwen2_moe_packed", {"qwen2_moe_packed"}),
        ("olmoe", "olmoe", {"qwen3_moe", "olmoe", "deepseek"}),
        ("deepseek_v3", "deepseek_v3", {"deepseek_v3"}),
        ("gpt_oss", "gpt_oss", {"gpt_oss"}),
    ],
)
def test_fields_beside_the_names_of_a_family(tmp_path, capsys, kind, layout, fits):
    """JSON of MoEConfig's fields: the layouts that fit are named, and each of them reads the weights."""
    source = make.write(tmp_path / "source", layers_of(kind, layout), None)
    activation = "clamped_swiglu" if kind == "gpt_oss" else "swiglu"
    given = written(tmp_path / "moe.json", {"top_k": 2, "activation": activation})
    words = said(capsys, "inspect", source, "--config", given)
    names, remedy = re.fullmatch(
        rf"{source}: the names of the MoE layers are those of (.*), and {given} has no model_type that says so: give "
        r"--layout (.*), or transformers' config.json with --config", words,
    ).groups()  # fmt: skip
    assert set(names.split(", ")) == fits and remedy == (names if len(fits) == 1 else "with one of these")
    for name in fits:
        assert main(["inspect", str(source), "--config", str(given), "--layout", name]) == 0
        layer = MoE(Checkpoint(source, config=given, layout=name).moe, dtype=torch.bfloat16)
        load_moe(layer, source, 1, config=given, layout=name)
        assert torch.equal(layer.experts.down_proj, make.parts(kind, 1)["down"])
    # the configuration of the folder itself is named likewise
    written(source / "config.json", {"top_k": 2, "activation": activation})
    with pytest.raises(ConfigError, match="source: config.json has no model_type") as caught:
        inspect(source)
    assert set(caught.value.expected) == fits


def test_a_weight_without_dimensions_is_refused(tmp_path):
    tensors = layers_of("mixtral", "mixtral")
    tensors = {name: torch.zeros(()) if name.endswith("w2.weight") else t for name, t in tensors.items()}
    source = make.write(tmp_path / "source", tensors, None)
    for layout in (None, "mixtral"):
        with pytest.raises(CheckpointError):
            inspect(source, config={"top_k": 2, "activation": "swiglu"}, layout=layout)


def test_the_remedy_for_another_attention_works(tmp_path, capsys):
    """The flags of the refusal, as they stand in it, with the target's config.json."""
    source = make.checkpoint(tmp_path / "source", "mixtral", files=2)
    others = ("mixtral_packed", "megatron_grouped")
    for layout in others:
        convert(source, tmp_path / layout, layout)
    target = tmp_path / "target"
    target.mkdir()
    written(target / "config.json", {**make.CONFIGS["qwen3_moe"], "num_experts_per_tok": 2})
    wanted: make.Tensors = {}
    for layer in range(2):
        wanted |= make.hugging_face("qwen3_moe", make.parts("mixtral", layer), layer)
    for layout, start in (("mixtral", source), *((layout, tmp_path / layout) for layout in others)):
        out = tmp_path / f"{start.name}-out"
        arguments = ["convert", str(start), str(out), "--to", "qwen3_moe", "--quiet"]
        words = said(capsys, *arguments, "--moe-only")
        flags = re.search(r"a qwen3_moe model TARGET whose config.json .*: (--layout [^)]*)\)$", words)[1]
        assert flags == f"--layout {layout} --config TARGET/config.json --moe-only"
        assert main([*arguments, *flags.replace("TARGET", str(target)).split()]) == 0
        make.same_bits(make.read(out), wanted)
        assert json.loads((out / "config.json").read_text())["model_type"] == "qwen3_moe"
        assert not inspect(out).all_problems
        capsys.readouterr()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"topk": 2}, "every key must be a field of MoEConfig, got topk (did you mean top_k?)"),
        ({"top_k": 2, "activation": "gelu", "foo": 1}, "got foo (the fields are hidden_size, intermediate_size, "),
        ({"router": {"renorm": False}}, "a field of RouterConfig, got router.renorm (did you mean renormalize?)"),
        ({"top_k": 20, "activation": "gelu"}, "MoEConfig.top_k must be at most num_experts = 8, got 20"),
        ({"top_k": 2, "activation": "swish"}, "activation must be one of swiglu, "),
        ({"top_k": 2}, "activation must be among the fields, it can't be read from weights"),
        ({"top_k": 2, "activation": "gelu", "router": 3}, "router must be an object of RouterConfig's fields, got 3"),
    ],
)
def test_what_is_wrong_with_given_fields_is_said_of_their_file(tmp_path, capsys, fields, words):
    source = make.write(tmp_path / "source", layers_of("fastmoe", "fastmoe"), None)
    given = written(tmp_path / "moe.json", fields)
    found = said(capsys, "inspect", source, "--config", given)
    assert found.startswith(f"{given}: ") and words in found
    with pytest.raises(ConfigError, match="^config: ") as caught:
        inspect(source, config=fields)
    assert words in str(caught.value)
    # of the folder's own as well
    written(source / "config.json", fields)
    found = said(capsys, "inspect", source)
    assert found.startswith(f"{source}: config.json: ") and words in found


@pytest.mark.parametrize("kind", ["mixtral", "fastmoe"])
def test_unknown_fields_come_before_the_layout(tmp_path, capsys, kind):
    source = make.write(tmp_path / "source", layers_of(kind, kind), None)
    given = written(tmp_path / "moe.json", {"topk": 2})
    assert "did you mean top_k?" in said(capsys, "inspect", source, "--config", given)


# --- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "function", "command"),
    [
        ({}, "num_experts must be given for mode 'copy': an", "--num-experts must be given for --mode 'copy': an"),
        ({"num_experts": 0}, "num_experts must be an integer", "--num-experts must be an integer of at least 1, got 0"),
        ({"num_experts": 4, "top_k": 5}, "top_k must be at most num_experts = 4, got 5",
         "--top-k must be at most --num-experts = 4, got 5"),
        ({"num_experts": 4, "mode": "merge"}, "experts must be given for mode 'merge' and for no other, got 0 for mode",
         "--expert must be given for --mode 'merge' and for no other, got 0 for --mode 'merge'"),
        ({"num_experts": 4, "expert": "dense"}, "experts must be given for mode 'merge' and for no other, got 1",
         "--expert must be given for --mode 'merge' and for no other, got 1 for --mode 'copy'"),
        ({"num_experts": 2, "mode": "merge", "expert": "dense"}, "num_experts must be 1, the number of models given as",
         "--num-experts must be 1, the number of models given as --expert, got 2"),
        ({"num_experts": 4, "granularity": 2}, "granularity belongs to mode 'split', got 2",
         "--granularity belongs to --mode 'split', got 2 for --mode 'copy'"),
        ({"num_experts": 6, "mode": "split", "granularity": 4}, "num_experts must be a multiple of granularity = 4",
         "--num-experts must be a multiple of --granularity = 4, got 6"),
        ({"num_experts": 5, "mode": "split"}, "granularity must divide the dense model's intermediate_size = 12",
         "--granularity must divide the dense model's intermediate_size = 12, got 5"),
        ({"num_experts": 4, "mode": "split", "granularity": 0}, "granularity must be an integer of at least 1, got 0",
         "--granularity must be an integer of at least 1, got 0"),
        ({"num_experts": 4, "router_std": -1.0}, "router_std must be a number", "--router-std must be a number be"),
        ({"num_experts": 4, "shared_size": 4}, "shared_size belongs to qwen2_moe, got 4 for mixtral",
         "--shared-size belongs to qwen2_moe, got 4 for mixtral"),
        ({"num_experts": 4, "shared_size": 13, "to": "qwen2_moe"}, "shared_size must be at most the dense",
         "--shared-size must be at most the dense intermediate_size = 12, got 13"),
    ],
)  # fmt: skip
def test_settings_are_named_as_they_were_given(tmp_path, capsys, monkeypatch, options, function, command):
    """The function's refusal has its arguments' names, the command's its flags."""
    dense(tmp_path / "dense")
    monkeypatch.chdir(tmp_path)
    flags = [text for name, value in options.items() for text in ("--" + name.replace("_", "-"), str(value))]
    found = said(capsys, "upcycle", "dense", "out", *flags)
    assert found.startswith(command) and not re.search(r"\b(num_experts|top_k|router_std|shared_size)\b", found)
    options = dict(options)
    if "expert" in options:
        options["experts"] = [options.pop("expert")]
    with pytest.raises(ConfigError) as caught:
        upcycle("dense", "out", **options)
    assert str(caught.value).startswith(function) and "--" not in str(caught.value)


def test_help_says_what_is_required(capsys):
    with pytest.raises(SystemExit):
        main(["upcycle", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--num-experts NUM_EXPERTS experts a layer; required for copy and split, merge counts its --expert" in text


# --- going on --------------------------------------------------------------------------------------------------------


def test_nothing_to_go_on_with(tmp_path, capsys, monkeypatch):
    """A target that can't be made; beside a file, where nobody can make one, not even root."""
    source = make.checkpoint(tmp_path / "source", "qwen3_moe")
    (tmp_path / "file").write_text("")
    found = said(capsys, "convert", source, tmp_path / "file" / "out", "--to", "fastmoe_cpp", "--quiet")
    assert str(tmp_path / "file") in found and "same command" not in found

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastmoe_cpp.checkpoint.commands.convert", interrupted)
    assert main(["convert", str(source), str(tmp_path / "out"), "--to", "fastmoe_cpp"]) == 130
    assert capsys.readouterr().err == "fastmoe_cpp convert: interrupted\n"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_something_to_go_on_with(tmp_path, capsys, monkeypatch, error):
    """A disk that is full, or Ctrl-C, half way; a write gives its error no file name."""
    from fastmoe_cpp.checkpoint import writer

    source, target = make.checkpoint(tmp_path / "source", "qwen3_moe"), tmp_path / "out"
    arguments = ["convert", str(source), str(target), "--to", "fastmoe_cpp", "--quiet", "--max-shard-size", "500"]
    write, count = writer.write_shard, []

    def fail(*given) -> None:
        count.append(given)
        if len(count) == 3:
            raise error
        write(*given)

    monkeypatch.setattr(writer, "write_shard", fail)
    assert main(arguments) in (1, 130)
    text = capsys.readouterr().err
    assert text.endswith(GO_ON + "\n") and "None" not in text
    if isinstance(error, OSError):
        assert text == f"fastmoe_cpp convert: {target}: No space left on device{GO_ON}\n"
    assert main(arguments) == 0
    assert "2 of them from a run before" in capsys.readouterr().out
    wanted: make.Tensors = {}
    for layer in range(2):
        wanted |= make.own(make.parts("qwen3_moe", layer), layer)
    found = make.read(target)
    make.same_bits({name: found[name] for name in wanted}, wanted)


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_runs_as_it_stands(tmp_path, monkeypatch):
    config = {**make.CONFIGS["qwen3_moe"], "num_hidden_layers": 8}
    tensors: make.Tensors = {}
    for layer in range(8):
        tensors |= make.layer_tensors("qwen3_moe", "qwen3_moe", make.parts("qwen3_moe", layer), layer)
    make.write(tmp_path / "Qwen3-30B-A3B", tensors, config)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert blocks
    for block in blocks:
        names: dict = {}
        exec(block, names)
        assert torch.equal(names["layer"].experts.down_proj, make.parts("qwen3_moe", 7)["down"])
