"""Conversions as they are run: cut off and gone on with, in little memory, with their options and their words."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from fastmoe_cpp import MoE, MoEConfig, RouterConfig
from fastmoe_cpp.__main__ import main
from fastmoe_cpp.checkpoint import (
    Checkpoint,
    ConfigError,
    ConversionError,
    LayoutError,
    MissingTensorError,
    ShapeError,
    UnsafeFileError,
    convert,
    inspect,
    load_moe,
)

from . import make

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


# The command, on a disk that takes its time: so it is met half way on every machine.
SLOWLY = """
import sys, time
from fastmoe_cpp.__main__ import main
from fastmoe_cpp.checkpoint import writer
sync = writer.sync_folder
writer.sync_folder = lambda folder: (time.sleep(0.1), sync(folder))
sys.exit(main(sys.argv[1:]))
"""


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "fastmoe_cpp", *map(str, arguments)]


def wide(folder: Path, layers: int = 10) -> Path:
    """Many small layers, so that there are many shards."""
    config = {**make.CONFIGS["qwen3_moe"], "num_hidden_layers": layers}
    tensors: make.Tensors = {}
    for layer in range(layers):
        tensors |= make.layer_tensors("qwen3_moe", "qwen3_moe", make.parts("qwen3_moe", layer), layer)
    make.write(folder, tensors, config, files=3)
    (folder / "tokenizer.json").write_text('{"a": 1}')
    return folder


def killed_half_way(arguments: list[str], partial: Path, shards: int) -> None:
    """Runs the command and kills it (SIGKILL) once that many shards are whole."""
    slowly = [sys.executable, "-c", SLOWLY, *arguments[3:]]
    process = subprocess.Popen(slowly, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            if sum(name.endswith(".safetensors") for name in os.listdir(partial)) >= shards:
                process.send_signal(signal.SIGKILL)
                break
        time.sleep(0.01)
    assert process.wait(60) == -signal.SIGKILL


def test_killed_and_gone_on_with(tmp_path):
    """After kill -9 nothing has the target's name; the same command finishes it without writing a shard again."""
    source = wide(tmp_path / "source")
    convert(source, tmp_path / "whole", "fastmoe_cpp", max_shard_size=100)
    target, partial = tmp_path / "target", tmp_path / ".target.partial"
    arguments = command("convert", source, target, "--to", "fastmoe_cpp", "--max-shard-size", "100", "--quiet")
    killed_half_way(arguments, partial, shards=5)
    assert not target.exists()
    before = {f.name: f.stat().st_mtime_ns for f in partial.glob("*.safetensors")}
    noted = [json.loads(line).get("shard") for line in (partial / "journal.jsonl").read_text().splitlines()]
    assert 5 <= len(before) < len(list((tmp_path / "whole").glob("*.safetensors")))

    done = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{len(noted) - 1} of them from a run before" in done.stdout
    assert not partial.exists()
    assert all((target / name).stat().st_mtime_ns == before[name] for name in noted if name)
    whole = {f.name: f.read_bytes() for f in (tmp_path / "whole").iterdir()}
    assert {f.name: f.read_bytes() for f in target.iterdir()} == whole


def test_another_conversion_is_not_gone_on_with(tmp_path):
    source = wide(tmp_path / "source")
    target = tmp_path / "target"
    run = command("convert", source, target, "--to", "fastmoe_cpp", "--max-shard-size", "100", "--quiet")
    killed_half_way(run, tmp_path / ".target.partial", shards=2)
    with pytest.raises(ConversionError, match="the beginning of another conversion.*--restart"):
        convert(source, target, "torchtitan", max_shard_size=100)
    os.utime(source / "model-00001-of-00003.safetensors", ns=(1, 1))
    with pytest.raises(ConversionError, match="another source"):
        convert(source, target, "fastmoe_cpp", max_shard_size=100)
    done = convert(source, target, "torchtitan", max_shard_size=100, restart=True)
    assert done.resumed_shards == 0 and done.shards == len(list(target.glob("*.safetensors")))
    assert Checkpoint(target).layout.name == "torchtitan"


def test_a_shard_cut_off_while_it_is_written_is_written_again(tmp_path):
    source = wide(tmp_path / "source", layers=6)
    target, partial = tmp_path / "target", tmp_path / ".target.partial"
    killed_half_way(
        command("convert", source, target, "--to", "fastmoe_cpp", "--max-shard-size", "100", "--quiet"), partial, 2
    )
    first = min(partial.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-1])
    (partial / "model-00009.safetensors.tmp").write_bytes(b"left over")
    with open(partial / "journal.jsonl", "a") as journal:
        journal.write('{"shard": "cut o')
    convert(source, target, "fastmoe_cpp", max_shard_size=100)
    convert(source, tmp_path / "whole", "fastmoe_cpp", max_shard_size=100)
    make.same_bits(make.read(target), make.read(tmp_path / "whole"))
    assert {f.name for f in target.iterdir()} == {f.name for f in (tmp_path / "whole").iterdir()}


def test_two_at_once(tmp_path):
    import fcntl

    source = make.checkpoint(tmp_path / "source", "qwen3_moe")
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    with open(partial / "journal.jsonl", "a") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        with pytest.raises(ConversionError, match="another process is writing it"):
            convert(source, tmp_path / "out", "fastmoe_cpp")


def test_a_target_that_exists_is_left_alone(tmp_path):
    source = make.checkpoint(tmp_path / "source", "qwen3_moe")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(ConversionError, match="must not exist yet"):
        convert(source, tmp_path / "out", "fastmoe_cpp")
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["precious"]


def test_memory_is_that_of_an_expert(tmp_path):
    """250 MB packed, as one layer and one file, through a process that may hold 40 MB beside what it starts with."""
    experts, hidden, inner = 32, 1024, 1280  # an expert's gate and up: 5.2 MB in bfloat16
    script = textwrap.dedent(
        f"""
        import json, shutil, threading, time, torch
        from pathlib import Path
        from fastmoe_cpp.checkpoint import convert
        from fastmoe_cpp.checkpoint.writer import Target, write_shard

        def anonymous():
            return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) << 10

        source = Path("source"); source.mkdir()
        config = {{"model_type": "qwen3_moe", "hidden_size": {hidden}, "moe_intermediate_size": {inner},
                   "num_experts": {experts}, "num_experts_per_tok": 2, "num_hidden_layers": 1}}
        (source / "config.json").write_text(json.dumps(config))
        piece = torch.ones(1 << 20, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
        def pieces(n):
            return lambda: (piece[: min(len(piece), n - i)] for i in range(0, n, len(piece)))
        root = "model.layers.0.mlp."
        shapes = {{root + "gate.weight": ({experts}, {hidden}),
                   root + "experts.gate_up_proj": ({experts}, {2 * inner}, {hidden}),
                   root + "experts.down_proj": ({experts}, {hidden}, {inner})}}
        tensors = [Target(n, "BF16", s, pieces(torch.Size(s).numel() * 2)) for n, s in shapes.items()]
        write_shard(source / "model.safetensors", tensors, lambda n: None)
        convert(source, "small", "qwen3_moe", max_shard_size=10**9)  # imports and allocators warm
        shutil.rmtree("small")
        start, peak, stop = anonymous(), 0, False
        def watch():
            global peak
            while not stop:
                peak = max(peak, anonymous())
                time.sleep(0.002)
        watcher = threading.Thread(target=watch); watcher.start()
        convert(source, "target", "torchtitan")
        stop = True; watcher.join()
        print((source / "model.safetensors").stat().st_size, peak - start)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    size, grown = map(int, done.stdout.split())
    assert size > 250_000_000
    assert grown < 40_000_000, f"grew by {grown / 1e6:.0f} MB over a checkpoint of {size / 1e6:.0f} MB"
    found = make.read(tmp_path / "target")["layers.0.moe.experts.w2"]
    assert found.shape == (experts, hidden, inner) and bool((found == 1).all())


def test_the_command_and_what_goes_with_the_weights(tmp_path, capsys):
    source = make.checkpoint(tmp_path / "source", "qwen3_moe", files=2)
    (source / "tokenizer.json").write_text("{}")
    (source / "README.md").write_text("a model")
    (source / "model.gguf").write_text("not ours")
    (source / ".cache").write_text("hidden")
    assert main(["convert", str(source), str(tmp_path / "out"), "--to", "qwen3_moe_packed", "--quiet"]) == 0
    assert "qwen3_moe -> qwen3_moe_packed, 2 MoE layers" in capsys.readouterr().out
    names = {f.name for f in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == make.CONFIGS["qwen3_moe"]
    assert main(["convert", str(source), str(tmp_path / "out"), "--to", "qwen3_moe"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("fastmoe_cpp convert: ") and error.count("\n") == 1 and "must not exist yet" in error
    with pytest.raises(SystemExit):
        main(["convert", str(source), str(tmp_path / "b"), "--to", "qwen3_moe", "--max-shard-size", "many"])


def test_files_that_transformers_reads_have_an_index(tmp_path):
    source = make.checkpoint(tmp_path / "source", "qwen3_moe")
    done = convert(source, tmp_path / "out", "qwen3_moe_packed", max_shard_size=500)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert done.shards == len(set(index["weight_map"].values())) > 2
    assert (
        index["metadata"]["total_size"]
        == done.nbytes
        == sum(t.numel() * t.element_size() for t in make.read(tmp_path / "out").values())
    )
    for name, file in index["weight_map"].items():
        assert name in make.load_file(tmp_path / "out" / file)


def test_weights_without_a_configuration(tmp_path):
    """A trainer's own weights: sizes are read from shapes, the rest is given; a file alone is a checkpoint too."""
    tensors = make.gpt_neox(make.parts("gpt_neox", 0), 0) | make.gpt_neox(make.parts("gpt_neox", 1), 1)
    source = make.write(tmp_path / "source", tensors, None)
    with pytest.raises(ConfigError, match="top_k can't be read from weights"):
        convert(source, tmp_path / "out", "megatron_grouped")
    given = tmp_path / "moe.json"
    given.write_text(json.dumps(make.CONFIGS["gpt_neox"]))
    convert(source / "model.safetensors", tmp_path / "out", "megatron_grouped", config=given)
    moe = Checkpoint(tmp_path / "out").moe
    assert (moe.num_experts, moe.hidden_size, moe.intermediate_size, moe.top_k) == (make.E, make.H, make.F, 2)
    assert moe.activation == "gelu_tanh" and not moe.router.renormalize and not moe.bias
    with pytest.raises(ConfigError, match="activation must be one of"):
        convert(source, tmp_path / "b", "megatron_grouped", config={"top_k": 2, "activation": "swish"})
    with pytest.raises(ConfigError, match="top_k must be at most"):
        convert(source, tmp_path / "b", "megatron_grouped", config={"top_k": 20, "activation": "gelu"})


def test_megatron_weights_into_transformers(tmp_path):
    """Raw Megatron weights with the target's config.json; what has no place is refused, --moe-only leaves it out."""
    tensors: make.Tensors = {"embedding.word_embeddings.weight": torch.zeros(10, make.H)}
    for layer in range(2):
        tensors |= make.megatron(make.parts("olmoe", layer), layer)
        tensors[f"decoder.layers.{layer}.mlp.experts.linear_fc1._extra_state"] = torch.zeros(4, dtype=torch.uint8)
    source = make.write(tmp_path / "source", tensors, make.CONFIGS["olmoe"])
    with pytest.raises(LayoutError, match="embedding.word_embeddings.weight has no place in a olmoe model.*--moe-only"):
        convert(source, tmp_path / "out", "olmoe")
    convert(source, tmp_path / "out", "olmoe", moe_only=True)
    wanted: make.Tensors = {}
    for layer in range(2):
        wanted |= make.hugging_face("olmoe", make.parts("olmoe", layer), layer)
    make.same_bits(make.read(tmp_path / "out"), wanted)


def test_attention_in_megatron(tmp_path):
    """Each group of heads has its queries, key and value under one another; norms lie where the host has them."""
    source = make.checkpoint(tmp_path / "source", "qwen3_moe")
    config = {**make.CONFIGS["qwen3_moe"], "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 3}
    rows = {"q": torch.arange(12.0), "k": 100 + torch.arange(6.0), "v": 200 + torch.arange(6.0)}
    tensors = make.read(source)
    for n in range(2):
        tensors |= {
            f"model.layers.{n}.self_attn.{p}_proj.weight": r[:, None].repeat(1, make.H) for p, r in rows.items()
        }
    make.write(source, tensors, config)
    convert(source, tmp_path / "grouped", "megatron_grouped")
    found = make.read(tmp_path / "grouped")
    group = [[*range(6), 100, 101, 102, 200, 201, 202], [*range(6, 12), 103, 104, 105, 203, 204, 205]]
    assert found["decoder.layers.1.self_attention.linear_qkv.weight"][:, 2].tolist() == group[0] + group[1]
    assert "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight" in found
    own = Checkpoint(tmp_path / "grouped").own
    assert own["host"]["num_query_groups"] == 2 and own["host"]["kv_channels"] == 3
    assert own["model"]["vocab_size"] == 10 and own["host"]["moe_layer_freq"] == [1, 1]
    convert(tmp_path / "grouped", tmp_path / "sequential", "megatron_sequential")
    assert "decoder.layers.1.input_layernorm.weight" in make.read(tmp_path / "sequential")
    convert(tmp_path / "sequential", tmp_path / "back", "qwen3_moe")
    make.same_bits(make.read(tmp_path / "back"), tensors)

    make.write(source, tensors, {**config, "head_dim": 4})
    with pytest.raises(
        ShapeError, match=r"self_attn.q_proj.weight must have 16 rows by config.json's heads.*\[12, 6\]"
    ):
        convert(source, tmp_path / "out", "megatron_grouped")
    make.write(source, {n: t for n, t in tensors.items() if n != "model.layers.0.self_attn.v_proj.weight"}, config)
    with pytest.raises(MissingTensorError, match="layers.0.self_attn.v_proj.weight is missing, and its neighbours"):
        convert(source, tmp_path / "out", "megatron_grouped")
    make.write(source, {**tensors, "model.layers.0.self_attn.sinks": torch.zeros(4)}, config)
    with pytest.raises(LayoutError, match="self_attn.sinks has no place in Megatron's GPTModel.*--moe-only"):
        convert(source, tmp_path / "out", "megatron_grouped")
    convert(source, tmp_path / "out", "megatron_grouped", moe_only=True)


def test_a_prefix_is_used_and_remembered(tmp_path):
    source = make.checkpoint(tmp_path / "source", "fastmoe")
    tensors = {re.sub("^model.layers", "encoder.h", n): t for n, t in make.read(source).items()}
    make.write(source, tensors, make.CONFIGS["fastmoe"])
    convert(source, tmp_path / "a", "megatron_grouped")
    convert(tmp_path / "a", tmp_path / "b", "fastmoe")
    make.same_bits(make.read(tmp_path / "b"), tensors)
    convert(source, tmp_path / "c", "fastmoe_cpp", prefix="blocks.{layer}.moe.")
    assert "blocks.1.moe.router.weight" in make.read(tmp_path / "c")
    with pytest.raises(LayoutError, match="the prefix must hold"):
        convert(source, tmp_path / "d", "fastmoe_cpp", prefix="blocks.")


def test_two_stacks_of_layers(tmp_path):
    tensors = make.fastmoe(make.parts("fastmoe", 0), 0)
    both = {n.replace("model", side, 1): t for side in ("encoder", "decoder") for n, t in tensors.items()}
    source = make.write(tmp_path / "source", both, make.CONFIGS["fastmoe"])
    with pytest.raises(LayoutError, match="must form one stack, they are under decoder.layers.*encoder.layers"):
        convert(source, tmp_path / "out", "fastmoe_cpp")
    layer = MoE(Checkpoint(source).moe)
    with pytest.raises(LayoutError, match="layer 0 is in decoder.*encoder"):
        load_moe(layer, source, 0)


def test_a_layer_of_another_configuration(tmp_path):
    source = make.checkpoint(tmp_path / "source", "qwen3_moe")
    moe = Checkpoint(source).moe
    layer = MoE(MoEConfig(make.H, make.F, make.E, 2, router=RouterConfig(score_function="sigmoid")))
    with pytest.raises(ConfigError, match="top_k = 2 .it has 4.*score_function = 'sigmoid' .it has 'softmax'"):
        load_moe(layer, source, 1)
    with pytest.raises(ConfigError, match="repair_shared_gate belongs to a path"):
        load_moe(MoE(moe), Checkpoint(source), 0, repair_shared_gate=True)
    with pytest.raises(MissingTensorError, match="layer 7 must be a MoE layer, the MoE layers are 0, 1"):
        load_moe(MoE(moe), source, 7)


def test_dtype_follows_the_layer(tmp_path):
    source = make.checkpoint(tmp_path / "source", "qwen3_moe")
    layer = MoE(Checkpoint(source).moe, dtype=torch.float64)
    load_moe(layer, source, 0)
    assert torch.equal(layer.experts.down_proj, make.parts("qwen3_moe", 0)["down"].double())


def test_layers_of_prediction_after_the_last(tmp_path):
    """DeepSeek-V3 files hold a MoE layer beyond num_hidden_layers, for multi-token prediction."""
    source = make.checkpoint(tmp_path / "source", "deepseek_v3")
    config = {**make.CONFIGS["deepseek_v3"], "num_hidden_layers": 1, "num_nextn_predict_layers": 1}
    make.write(source, make.read(source), config)
    assert inspect(source).all_problems == []
    make.write(source, make.read(source), {**config, "num_nextn_predict_layers": 0})
    assert [type(p).__name__ for p in inspect(source).all_problems] == ["UnknownTensorError"]


def test_inspect_says_what_is_there(tmp_path, capsys):
    source = make.checkpoint(tmp_path / "source", "qwen2_moe")
    tensors = make.read(source)
    name = "model.layers.1.mlp.gate.weight"
    tensors[name][3] = tensors[name][2]  # two experts that can't be told apart
    tensors["model.layers.0.mlp.experts.1.up_proj.weight"] = torch.zeros(3, 3)
    make.write(source, tensors, make.CONFIGS["qwen2_moe"])
    assert main(["inspect", str(source)]) == 1
    text = capsys.readouterr().out
    assert "qwen2_moe, layout qwen2_moe" in text and "8 experts, top 4" in text and "1 problems" in text
    assert "experts.1.up_proj.weight must have shape [4, 6], it has [3, 3]" in text
    assert main(["inspect", str(source), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [len(layer["problems"]) for layer in found["layers"]] == [1, 0]
    assert found["layers"][1]["router"]["closest"] == pytest.approx(1, abs=1e-3)
    assert found["layers"][0]["router"]["closest"] < 0.99
    assert found["notes"] == [
        "in layers 1 a router's row is 0 or two rows point the same way: those experts can't be told apart"
    ]
    assert found["parameters"] == sum(t.numel() for t in tensors.values())


def test_router_statistics_are_of_the_router():
    from fastmoe_cpp.checkpoint.inspect import statistics

    moe = MoEConfig(64, 4, 8, 2)
    even = statistics(torch.eye(64)[:8], moe)
    assert even.norm_min == even.norm_max == 1 and even.closest == 0
    assert even.busiest < 1.3 and even.idlest > 0.7 and even.entropy > 0.99
    dead = torch.eye(64)[:8] * 5
    dead[0] = 0
    dead[1] *= 10
    loud = statistics(dead, moe)
    assert loud.norm_min == 0 and loud.norm_max == 50 and loud.busiest > 1.5


def test_safetensors_is_asked_for_in_one_sentence(tmp_path):
    source = make.checkpoint(tmp_path / "source", "qwen3_moe")
    script = (
        "import sys; sys.modules['safetensors'] = None\n"
        "import fastmoe_cpp.checkpoint\nfrom fastmoe_cpp.__main__ import main\n"
        f"sys.exit(main(['inspect', {str(source)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1 and "not installed: pip install safetensors" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_that_is_refused_is_refused_before_any_weight(tmp_path):
    source = make.checkpoint(tmp_path / "source", "qwen3_moe")
    (tmp_path / "tokenizer.json").write_text("{}")
    (source / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    with pytest.raises(UnsafeFileError, match="tokenizer.json: must lie inside"):
        convert(source, tmp_path / "out", "qwen3_moe_packed")
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()


def test_a_source_s_file_named_as_the_journal_is_left_out_and_said(tmp_path):
    source = make.checkpoint(tmp_path / "source", "qwen3_moe")
    for name in ("journal.jsonl", "tokenizer.json"):
        (source / name).write_text("{}")
    done = convert(source, tmp_path / "out", "qwen3_moe_packed")
    assert (tmp_path / "out" / "tokenizer.json").is_file() and not (tmp_path / "out" / "journal.jsonl").exists()
    assert [note for note in done.notes if note.startswith("journal.jsonl was not copied")]
