"""What must hold of an adapter on two ranks: data, tensor and pipeline parallelism have the gradients of one rank.

As a program: ``megatron_rank_checks.py VERSION (CHECKOUT | stand-in) FOLDER``, once alone, which writes the reference
into FOLDER, then on two ranks (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), each of which writes {check: None or its
traceback} to FOLDER/RANK.json.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from megatron_compare import all_close, close
from megatron_host import BATCH, EXPERTS, HIDDEN, LAYERS, BalancedGate, Host, open_world, prepare

RANK_CHECKS: dict[str, Callable[[Host, dict, Path], None]] = {}
#: Settings of every run. Adam's first step is the sign of a gradient, which rounding may turn, but for a large epsilon.
SETTINGS = ("--balance-loss-weight", "2", "--adam-eps", "0.01")
WIDTH = 2 * HIDDEN


def check(function: Callable[[Host, dict, Path], None]) -> Callable[[Host, dict, Path], None]:
    RANK_CHECKS[function.__name__] = function
    return function


def reference(host: Host) -> dict:
    """One rank, two micro-batches of half the data: weights, gradients, norm, and weights after a step."""
    host.start(*SETTINGS, "--hidden-hidden-size", str(WIDTH), micro_batches=2)
    host.build(gate=BalancedGate)
    result: dict = {"weights": _weights(host)}
    result["gradients"], logged = host.gradients_of(_halves(host))
    result["balance"] = logged["BalancedGate_loss"]
    for parameter in host.inner().parameters():
        parameter.grad = getattr(parameter, "main_grad", parameter.grad)
    result["norm"] = host.adapter.grad_norm(host.inner().parameters())
    host.train_step(_halves(host))
    result["after"] = _weights(host)
    return result


def _weights(host: Host) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in host.inner().named_parameters()}


def _halves(host: Host) -> list[Tensor]:
    return list(host.data().split(BATCH // 2))


def _mine(host: Host, whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """This rank's part of a reference's tensors, under this rank's names."""
    mpu = host.module("mpu")
    stages = mpu.get_pipeline_model_parallel_world_size()
    first_layer = mpu.get_pipeline_model_parallel_rank() * (LAYERS // stages)
    tensor_rank, tensor_ranks = mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()
    found = {}
    for name, parameter in host.inner().named_parameters():
        there = re.sub(r"layers\.(\d+)", lambda m: f"layers.{int(m[1]) + first_layer}", name)
        if name.startswith("word_embeddings"):  # the last stage's copy
            there = "language_model.embedding." + name
        tensor = whole[there]
        if "experts" in name and mpu.get_data_parallel_world_size() > 1:
            tensor = tensor.chunk(mpu.get_data_parallel_world_size())[mpu.get_data_parallel_rank()]
        if getattr(parameter, "tensor_model_parallel", False):
            tensor = tensor.chunk(tensor_ranks, dim=parameter.partition_dim)[tensor_rank]
        elif tensor_ranks > 1 and name.endswith("h4toh.bias") and tensor_rank > 0:
            tensor = torch.zeros_like(tensor)  # the first tensor-parallel rank's
        assert tensor.shape == parameter.shape, name
        found[name] = tensor
    return found


def _load(host: Host, whole: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in _mine(host, whole).items():
            dict(host.inner().named_parameters())[name].copy_(tensor)
    if hasattr(host.optimizer, "reload_model_params"):
        host.optimizer.reload_model_params()


def _layers_alone(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the embedding, whose stages are summed in train_step."""
    return {name: tensor for name, tensor in tensors.items() if "embedding" not in name}


def _same_step(host: Host, whole: dict, micro_batches: list[Tensor]) -> None:
    _load(host, whole["weights"])
    found, logged = host.gradients_of(micro_batches)
    all_close(_layers_alone(found), _layers_alone(_mine(host, whole["gradients"])))
    _load(host, whole["weights"])
    given = host.train_step(micro_batches)
    if host.version != "2.2":
        close(torch.tensor(given[2]), whole["norm"].cpu(), 1e-5)
    after = {name: parameter.detach() for name, parameter in host.inner().named_parameters()}
    all_close(after, _mine(host, whole["after"]))


@check
def data_parallel_ranks_with_experts_of_their_own(host: Host, whole: dict, folder: Path) -> None:
    ways = {
        "2.2": ([],),
        "2.5": ([], ["--use-contiguous-buffers-in-ddp", "--accumulate-allreduce-grads-in-fp32"]),
        "3.0.2": ([], ["--no-contiguous-buffers-in-local-ddp"]),
    }
    rank = torch.distributed.get_rank()
    for extra in ways[host.version]:
        host.start(
            *SETTINGS, "--hidden-hidden-size", str(WIDTH), *extra, experts=EXPERTS // 2, batch=BATCH // 2
        )  # fmt: skip
        host.build(gate=BalancedGate)
        assert [layer.world_size for layer in host.layers()] == [2] * LAYERS
        _same_step(host, whole, [_halves(host)[rank]])


@check
def data_parallel_ranks_start_alike_but_for_experts(host: Host, whole: dict, folder: Path) -> None:
    for distributed in (True, False):
        args = host.start(experts=2)
        args.distributed_experts = distributed
        host.build()
        for name, parameter in host.inner().named_parameters():
            both = [torch.empty_like(parameter) for _ in range(2)]
            torch.distributed.all_gather(both, parameter.detach().contiguous())
            different = distributed and "experts" in name and name.endswith("weight")
            assert torch.equal(*both) != different, name
            tag = getattr(parameter, "dp_comm", "dp")
            assert (tag == "none") == (distributed and "experts" in name)


@check
def tensor_parallel_ranks_share_experts(host: Host, whole: dict, folder: Path) -> None:
    host.start(
        *SETTINGS, "--hidden-hidden-size", str(WIDTH // 2), "--tensor-model-parallel-size", "2", micro_batches=2
    )  # fmt: skip
    host.build(gate=BalancedGate)
    assert [layer.world_size for layer in host.layers()] == [1] * LAYERS
    _same_step(host, whole, _halves(host))


@check
def the_default_width_is_divided_by_tensor_parallel_ranks(host: Host, whole: dict, folder: Path) -> None:
    host.start("--tensor-model-parallel-size", "2")
    host.build()
    assert {layer.experts.htoh4.weight.shape[1] for layer in host.layers()} == {4 * HIDDEN // 2 // 2}


@check
def pipeline_stages_train_on_their_own_balance_loss(host: Host, whole: dict, folder: Path) -> None:
    host.start(
        *SETTINGS, "--hidden-hidden-size", str(WIDTH), "--pipeline-model-parallel-size", "2", micro_batches=2
    )  # fmt: skip
    host.build(gate=BalancedGate)
    assert len(host.layers()) == 1
    _same_step(host, whole, _halves(host))


@check
def every_rank_saves_and_loads_its_experts(host: Host, whole: dict, folder: Path) -> None:
    rank = torch.distributed.get_rank()
    for kind in ([], ["--fp16"] if host.version == "2.2" else ["--bf16"]):
        settings = ("--balance-strategy", "gshard", "--loss-scale", "4", *kind)
        args = host.start(*settings, experts=2)
        args.save = str(folder / f"checkpoint{len(kind)}")
        host.build()
        host.train_step([host.data(rank)])
        host.module("training").save_checkpoint(1, host.model, host.optimizer, host.scheduler)
        names = sorted(path.parent.name for path in Path(args.save).rglob("*.pt"))
        assert names == ["mp_rank_00", "mp_rank_00_dp_rank_0001"]
        own = Path(host.adapter.checkpoint_name(args.save, 1))
        assert own.parent.name == names[rank] and own.is_file()
        if rank == 1:
            saved = torch.load(own, weights_only=True)
            assert ("fp32_from_fp16_params" in saved["optimizer"]) == bool(kind)
        torch.manual_seed(9)
        expected = host.train_step([host.data(5 + rank)])[0]
        weights = _weights(host)
        args = host.start(*settings, experts=2)
        args.load = str(folder / f"checkpoint{len(kind)}")
        torch.manual_seed(77)
        host.build()
        assert args.iteration == 1
        torch.manual_seed(9)
        found = host.train_step([host.data(5 + rank)])[0]
        assert found == expected
        assert all(torch.equal(parameter, weights[name]) for name, parameter in host.inner().named_parameters())
        _refuses_damaged_files(host, own, rank)
        torch.distributed.barrier()


@check
def weights_loaded_without_their_optimizer_are_the_ones_that_train(host: Host, whole: dict, folder: Path) -> None:
    """The host's float32 copies were drawn at random, and its load_checkpoint leaves them so on rank 0."""
    rank = torch.distributed.get_rank()
    settings = ("--balance-strategy", "gshard", "--loss-scale", "4", "--fp16" if host.version == "2.2" else "--bf16")
    for how in ("--finetune", "--no-load-optim"):
        args = host.start(*settings, experts=2)
        args.save = str(folder / f"without_optimizer{how}")
        host.build()
        host.module("training").save_checkpoint(1, host.model, host.optimizer, host.scheduler)
        saved = _weights(host)
        args = host.start(*settings, how, experts=2)
        args.load = str(folder / f"without_optimizer{how}")
        torch.manual_seed(77)
        host.build()
        assert all(torch.equal(parameter, saved[name]) for name, parameter in host.inner().named_parameters())
        host.train_step([host.data(5 + rank)])
        for name, parameter in host.inner().named_parameters():
            assert (parameter - saved[name]).abs().max() < 0.1, name  # a step's length; the random start is further
            if "experts" not in name:
                ranks = [torch.empty_like(parameter) for _ in range(2)]
                torch.distributed.all_gather(ranks, parameter.detach().contiguous())
                assert torch.equal(*ranks), name
        torch.distributed.barrier()


def _refuses_damaged_files(host: Host, own: Path, rank: int) -> None:
    """One sentence, on the rank whose file it is; here without the other rank, whose load would wait."""
    if rank == 0:
        return
    from megatron_adapters.megatron_lm import checkpoint

    weights = _weights(host)
    saved = torch.load(own, weights_only=True)["model"]
    name, tensor = next(iter(checkpoint._leaves(saved)))
    flat = dict(checkpoint._leaves(saved))
    with pytest.raises(ValueError, match=f"one side lacks {re.escape(name)}"):
        checkpoint._load_experts(host.inner(), {k: v for k, v in flat.items() if k != name}, "file")
    with pytest.raises(ValueError, match=f"file: {re.escape(name)} must have shape"):
        checkpoint._load_experts(host.inner(), {**flat, name: tensor[..., :1]}, "file")
    assert all(torch.equal(parameter, weights[n]) for n, parameter in host.inner().named_parameters())
    own.rename(own.with_suffix(".away"))
    with pytest.raises(FileNotFoundError, match="no experts for data-parallel rank 1"):
        host.adapter.load_checkpoint(host.model, host.optimizer, host.scheduler)
    own.with_suffix(".away").rename(own)


@check
def an_overflow_on_one_rank_skips_the_step_on_all(host: Host, whole: dict, folder: Path) -> None:
    host.start("--fp16", "--initial-loss-scale", "256", "--hysteresis", "1", experts=2)
    host.build()
    before = _weights(host)
    if torch.distributed.get_rank() == 1:
        parameter = host.layers()[0].experts.htoh4.weight
        parameter.register_hook(lambda gradient: torch.full_like(gradient, float("inf")))
    skipped = host.train_step([host.data()])[1]
    assert skipped == 1
    assert host.optimizer.get_loss_scale().item() == 128
    assert all(torch.equal(parameter, before[name]) for name, parameter in host.inner().named_parameters())


def main(version: str, source: str, folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    prepare(version, source)
    alone = "WORLD_SIZE" not in os.environ
    open_world()
    host = Host(version)
    host.adapter.install()
    if alone:
        torch.save(reference(host), folder / "reference.pt")
        return
    whole = torch.load(folder / "reference.pt")
    results = {}
    for name, function in RANK_CHECKS.items():
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                function(host, whole, folder)
            results[name] = None
        except (Exception, SystemExit):
            results[name] = traceback.format_exc()
            break  # the ranks are no longer in step
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
