"""Checkpoints of ranks that hold parts of experts: from any split to any other, with FSDP2 around it, as one rank's."""

import warnings
from dataclasses import replace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from support.ranks import device, run_ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import parallelize_module

from distributed.layers import full, mesh_of, near
from distributed.test_fsdp_and_checkpoints import CONFIG, FIRST, THEN, Model, assert_same, made, state_of, train
from fastmoe_cpp.parallel import (
    ExpertParallel,
    ExpertTensorParallel,
    export_safetensors,
    load_checkpoint,
    parameter_groups,
    save_checkpoint,
)

#: Gate rows and then up rows, alternating, and no gate.
CONFIGS = (CONFIG, replace(CONFIG, interleaved=True), replace(CONFIG, activation="gelu"))
MIDDLE = FIRST + 1
#: Ranks by mesh dimension of those that load what two by two ranks saved.
SPLITS = [{"ep": 2}, {"tp": 4}, {"replica": 2, "tp": 2}, {"dp": 2, "tp": 2}, {"dp": 2, "ep": 1, "tp": 2}]


def spread_over(sizes):
    """A model and its optimizer over a mesh, fully sharded where it has a dimension "dp"; the mesh of ranks' tokens."""
    model, mesh = Model(*CONFIGS).to(device()), mesh_of(**sizes)
    names = [name for name in sizes if name != "tp"]
    tokens = mesh[tuple(names)] if names else None
    if len(names) == 2:
        tokens = tokens._flatten("everyone")
    over = mesh[tuple(name for name in sizes if name in ("ep", "tp"))]
    style = ExpertTensorParallel if "tp" in sizes else ExpertParallel
    group = tokens.get_group() if tokens is not None else None
    parallelize_module(model, over, {"layers.*.moe": style(balance_group=group)})
    if "dp" in sizes:
        for layer in model.layers:
            # by experts, or by the last dimension
            by_part = (lambda p: Shard(p.dim() - 1)) if "ep" in sizes else None
            fully_shard(layer.moe.experts, mesh=mesh["dp"], shard_placement_fn=by_part)
            fully_shard(layer, mesh=tokens)
        fully_shard(model, mesh=tokens)
    averaged = None if "dp" in sizes else mesh
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-2, foreach=True)
    rank, ranks = (tokens.get_local_rank(), tokens.size()) if tokens is not None else (0, 1)
    return model, optimizer, (rank, ranks, averaged)


def go_on(rank, sizes, first, last, before, after, export):
    """Loads, trains and saves: what was loaded, whole, and the norms."""
    model, optimizer, how = spread_over(sizes)
    load_checkpoint(before, model, optimizer)
    loaded = state_of(model, optimizer)
    norms = train(model, optimizer, first, last, *how)
    save_checkpoint(after, model, optimizer)
    export_safetensors(export, model)
    return loaded, norms


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """A checkpoint of one process after FIRST steps, and its state there, after MIDDLE steps and at the end."""
    folder = tmp_path_factory.mktemp("one") / "checkpoint"
    model, optimizer = made(*CONFIGS)
    train(model, optimizer, 0, FIRST)
    save_checkpoint(folder, model, optimizer)
    states, norms = [state_of(model, optimizer)], []
    for first, last in ((FIRST, MIDDLE), (MIDDLE, FIRST + THEN)):
        norms.append(train(model, optimizer, first, last))
        states.append(state_of(model, optimizer))
    return str(folder), states, norms


@pytest.fixture(scope="module")
def two_by_two(one_rank, tmp_path_factory):
    """What ranks of both kinds saved, going on from one rank's checkpoint."""
    folder = tmp_path_factory.mktemp("two")
    saved, export = str(folder / "checkpoint"), str(folder / "model.safetensors")
    before, states, norms = one_rank
    for loaded, got in run_ranks(go_on, 4, {"ep": 2, "tp": 2}, FIRST, MIDDLE, before, saved, export):
        assert_same(loaded, states[0])
        assert got == pytest.approx(norms[0], rel=1e-9)
    return saved, export


def alone(folder):
    model, optimizer = made(*CONFIGS)
    load_checkpoint(folder, model, optimizer)
    return state_of(model, optimizer)


def of_model(state):
    return {name: tensor for name, tensor in state.items() if "/" not in name}


def test_one_rank_reads_what_parts_wrote(one_rank, two_by_two):
    saved, export = two_by_two
    state = one_rank[1][1]
    got, exported = alone(saved), load_file(export)
    for found, expected in ((got, state), (exported, of_model(state))):
        assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in expected.items()}
        assert_same(found, expected)
    stored, written = (
        {name: each.size for name, each in metadata.state_dict_metadata.items() if hasattr(each, "size")}
        for metadata in (dcp.FileSystemReader(folder).read_metadata() for folder in (saved, one_rank[0]))
    )
    assert stored == written


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_any_split_reads_what_another_wrote(sizes, one_rank, two_by_two, tmp_path):
    _, states, norms = one_rank
    ranks = torch.Size(sizes.values()).numel()
    after, export = str(tmp_path / "after"), str(tmp_path / "model.safetensors")
    for loaded, got in run_ranks(go_on, ranks, sizes, MIDDLE, FIRST + THEN, two_by_two[0], after, export):
        assert_same(loaded, states[1])
        assert got == pytest.approx(norms[1], rel=1e-9)
    assert_same(alone(after), states[2])
    assert_same(load_file(export), of_model(states[2]))


def test_parts_read_what_one_rank_wrote(one_rank, tmp_path, backend, enough):
    enough(2)
    before, states, norms = one_rank
    after, export = str(tmp_path / "after"), str(tmp_path / "model.safetensors")
    for loaded, got in run_ranks(go_on, 2, {"tp": 2}, FIRST, MIDDLE, before, after, export, backend=backend):
        assert_same(loaded, states[0])
        assert got == pytest.approx(norms[0], rel=1e-9)
    assert_same(alone(after), states[1])
    assert_same(load_file(export), of_model(states[1]))


def by_other_ways(rank, folder):
    """torch's own functions on the parts: what they write they read, and they take one rank's tensors for no parts."""
    model, _, _ = spread_over({"tp": 2})
    expected = {n: t.detach().clone() for n, t in model.named_parameters()}
    wrapped = nn.ModuleDict({"compiled": torch.compile(model)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_checkpoint(f"{folder}/wrapped", wrapped)
        for p in model.parameters():
            p.data.zero_()
        load_checkpoint(f"{folder}/wrapped", wrapped)
        export_safetensors(f"{folder}/wrapped.safetensors", wrapped)
        dcp.save(get_model_state_dict(model), checkpoint_id=f"{folder}/parts")
        state = get_model_state_dict(model)
        for tensor in state.values():
            tensor.zero_()
        dcp.load(state, checkpoint_id=f"{folder}/parts")
    for name, p in model.named_parameters():
        near(
            p.to_local() if hasattr(p, "to_local") else p,
            getattr(expected[name], "_local_tensor", expected[name]),
            name,
        )
    one, _ = made(*CONFIGS)
    with pytest.raises((RuntimeError, IndexError), match="size mismatch|out of range"):
        set_model_state_dict(model, one.state_dict(), options=StateDictOptions(full_state_dict=True))
    with pytest.raises(dcp.api.CheckpointException, match="Size mismatch between saved"):
        dcp.load({"model": get_model_state_dict(model)}, checkpoint_id=f"{folder}/one")
    with torch.device("meta"):
        later = Model(*CONFIGS)
    parallelize_module(later, mesh_of(ep=1, tp=2), {"layers.*.moe": ExpertTensorParallel()})
    later.to_empty(device="cpu")
    for layer in (model, later):
        load_checkpoint(f"{folder}/one", layer)
        for (name, p), q in zip(layer.named_parameters(), one.parameters(), strict=True):
            assert torch.equal(full(p, q), q), name
    smaller = nn.ModuleDict({"layers": nn.ModuleList([model.layers[0]])})
    with pytest.raises(ValueError, match=r"the model lacks layers\.1\."):
        load_checkpoint(f"{folder}/one", smaller)


def test_other_ways(tmp_path):
    model, _ = made(*CONFIGS)
    save_checkpoint(tmp_path / "one", model)
    run_ranks(by_other_ways, 2, str(tmp_path))
    exported = load_file(tmp_path / "wrapped.safetensors")
    assert_same({n.removeprefix("compiled._orig_mod."): t for n, t in exported.items()}, model.state_dict())


def test_groups_of_an_optimizer(tmp_path):
    """Settings come by parameter, however the optimizer's groups were and are."""
    model, _ = made(*CONFIGS)

    def with_groups(*settings):
        parameters = list(model.parameters())
        cuts = [0, *(len(parameters) * (i + 1) // len(settings) for i in range(len(settings)))]
        groups = [{"params": parameters[a:b]} | each for a, b, each in zip(cuts, cuts[1:], settings, strict=False)]
        return torch.optim.AdamW(groups, lr=5.0)

    lr = torch.tensor(0.3)
    for name, settings in (
        ("same", [{"lr": 0.25}] * 3),
        ("tensor", [{"lr": lr}]),
        ("differ", [{"lr": 0.1}, {"lr": 0.2}]),
    ):
        optimizer = with_groups(*settings)
        train(model, optimizer, 0, 1)
        save_checkpoint(tmp_path / name, model, optimizer)
    for groups in (1, 2, 3):
        optimizer = with_groups(*[{}] * groups)
        load_checkpoint(tmp_path / "same", model, optimizer)
        assert [g["lr"] for g in optimizer.param_groups] == [0.25] * groups
        load_checkpoint(tmp_path / "tensor", model, optimizer)
        assert [float(g["lr"]) for g in optimizer.param_groups] == [float(lr)] * groups
    optimizer = with_groups({}, {}, {}, {})
    load_checkpoint(tmp_path / "differ", model, optimizer)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.1, 0.2, 0.2]
    before = state_of(model, optimizer)
    sentence = r"group 0 must have the same settings in the checkpoint: layers\.0\.\S+ has lr 0.1 and layers\.\S+ 0.2"
    with pytest.raises(ValueError, match=sentence):
        load_checkpoint(tmp_path / "differ", model, with_groups({}))
    assert_same(state_of(model, optimizer), before)
    save_checkpoint(tmp_path / "alone", model)
    with pytest.raises(ValueError, match="must hold an optimizer's state, and holds a model alone"):
        load_checkpoint(tmp_path / "alone", model, optimizer)
