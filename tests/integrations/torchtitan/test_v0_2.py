# ruff: noqa: E402
"""TorchTitan 0.2's own MoE module and its training hook, with its own code and converted to ours."""

import copy
from types import SimpleNamespace

import pytest
import torch

from ..conftest import require

require("torchtitan", "0.2")

import torchtitan.models.moe.utils as host_utils
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torchtitan.components.optimizer import build_optimizers_with_moe_load_balancing
from torchtitan.config import JobConfig
from torchtitan.models.moe import MoE, MoEArgs
from torchtitan.protocols.model_converter import build_model_converters

import fastmoe_cpp.integrations.torchtitan  # noqa: F401  registers the converter
from fastmoe_cpp.integrations.torchtitan import convert
from fastmoe_cpp.integrations.torchtitan.v0_2 import FastMoE

from . import small_model
from .small_model import DIM, check_fifty_steps, check_output_gradients_and_counts, check_state_dicts, relative

HIDDEN = 20
PLAIN = {"num_experts": 8, "top_k": 3, "use_grouped_mm": False}
CASES = {
    "defaults": {},
    "softmax": {"score_func": "softmax"},
    "normalised": {"route_norm": True, "route_scale": 2.5},
    "qwen3": {"score_func": "softmax", "route_norm": True, "score_before_experts": False, "num_shared_experts": 0},
    "llama4": {"top_k": 1, "score_before_experts": True},
    "deepseek_v3": {
        "num_expert_groups": 4, "num_limited_groups": 2, "route_norm": True, "route_scale": 2.5,
        "num_shared_experts": 2, "score_before_experts": False,
    },
    "gate_bias": {"gate_bias": True},
    "no_balancing": {"load_balance_coeff": None},
    "round_robin": {"_debug_force_load_balance": True},
}  # fmt: skip


@pytest.fixture(autouse=True)
def counts_on_the_cpu(monkeypatch):
    """TorchTitan counts integers with torch.histc, which torch has for GPUs alone."""
    histc = torch.histc

    def counting(ids, bins, min, max):
        return histc(ids, bins, min, max) if ids.is_floating_point() else torch.bincount(ids, minlength=bins)

    monkeypatch.setattr(torch, "histc", counting)


class Model(small_model.Model):
    def __init__(self, **args):
        super().__init__(*(MoE(MoEArgs(**PLAIN | args), DIM, HIDDEN) for _ in range(2)))

    @torch.no_grad()
    def init(self):
        for block in self.layers.values():
            if block.moe_enabled:
                block.moe.init_weights(0.3, torch.device("cpu"))
        return self.draw()


def dims(**changes):
    fields = {"tp": 1, "ep": 1, "etp": 1, "ep_enabled": False, "pp_enabled": False} | changes
    return SimpleNamespace(**fields, get_optional_mesh=lambda name: None)


def converted(model, **changes):
    """As a job with `converters = ["fastmoe_cpp"]` does it."""
    job = JobConfig()
    job.model.converters = ["fastmoe_cpp"]
    build_model_converters(job, dims(**changes)).convert(model)
    return model


def pair(**args):
    theirs = Model(**args).init()
    ours = converted(copy.deepcopy(theirs))
    assert type(ours.layers["1"].moe) is FastMoE and type(theirs.layers["1"].moe) is MoE
    return theirs, ours


@pytest.mark.parametrize("case", CASES)
def test_output_gradients_and_counts(case):
    top_k = CASES[case].get("top_k", PLAIN["top_k"])
    check_output_gradients_and_counts(pair(**CASES[case]), "tokens_per_expert", 2 * 33 * top_k, torch.randn(2, 33, DIM))


def test_a_typed_return_contract():
    """Routing is read by name: a tuple that grows by a field can't be unpacked wrongly any more."""
    from fastmoe_cpp.integrations.torchtitan.layer import Routing, RoutingRule, route

    moe = Model().init().layers["1"].moe
    routing = route(torch.randn(5, 8), RoutingRule.of(moe.router), moe.expert_bias)
    assert isinstance(routing, Routing) and Routing._fields == ("topk_weights", "topk_ids", "scores")
    assert (routing.topk_weights.shape, routing.topk_ids.shape, routing.scores.shape) == ((5, 3), (5, 3), (5, 8))


@pytest.mark.parametrize("values", [2, 3, 4])
def test_generate_permute_indices_may_return_what_it_likes(values, monkeypatch):
    """It once returned a third value, and its caller unpacked two. Ours does not depend on it, on either path."""
    model = converted(Model(use_grouped_mm=True).init())
    x = torch.randn(1, 9, DIM)
    expected = model(x)
    monkeypatch.setattr(host_utils, "generate_permute_indices", lambda *args: (torch.zeros(1),) * values)
    assert torch.equal(model(x), expected)


def optimizers(model):
    config = JobConfig().optimizer
    config.name, config.lr, config.implementation = "AdamW", 2e-3, "for-loop"
    return build_optimizers_with_moe_load_balancing([model], config, dims())


@pytest.mark.parametrize("checkpointed", [False, True])
def test_fifty_steps_with_the_hook(checkpointed):
    """With gradient accumulation, and with its activation checkpointing, which counts twice and halves."""
    models = pair(route_norm=True)
    for model in models if checkpointed else ():
        for name, block in model.layers.items():
            model.layers[name] = checkpoint_wrapper(block, checkpoint_impl=CheckpointImpl.NO_REENTRANT)
    counted = 2 * 2 * 16 * PLAIN["top_k"] * (2 if checkpointed else 1)
    check_fifty_steps(models, optimizers, "tokens_per_expert", "expert_bias", counted)


def test_state_dicts_go_both_ways():
    models = pair(num_shared_experts=2)
    names = list(models[0].state_dict())
    assert [k for k in names if k.endswith("expert_bias")] and not [k for k in names if "tokens_per_expert" in k]
    check_state_dicts(models, "expert_bias")


def test_on_the_meta_device_then_initialised():
    """The order of TorchTitan's trainer: built without memory, converted, given memory, initialised."""
    with torch.device("meta"):
        model = Model()
    converted(model)
    model.to_empty(device="cpu")
    torch.manual_seed(3)
    model.init()
    theirs = Model()
    torch.manual_seed(3)
    theirs.init()
    moe, host = model.layers["1"].moe, theirs.layers["1"].moe
    for name, tensor in host.state_dict().items():
        assert torch.equal(moe.state_dict()[name], tensor), name
    x = torch.randn(1, 7, DIM)
    assert relative(moe(x), host(x)) < 3e-6


def test_compiled_as_the_host_compiles_it():
    """Every child but the experts is compiled on its own."""
    theirs, ours = pair()
    torch._dynamo.reset()
    for attribute, child in list(ours.layers["1"].moe.named_children()):
        if attribute != "experts":
            setattr(ours.layers["1"].moe, attribute, torch.compile(child, backend="aot_eager", fullgraph=True))
    x = torch.randn(1, 7, DIM)
    assert relative(ours(x), theirs(x)) < 3e-6


def test_autocast_and_bfloat16():
    theirs, ours = pair(score_before_experts=False)
    x = torch.randn(2, 40, DIM)
    exact = theirs(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(x)
    assert 1e-4 < relative(y, exact) < 0.03
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in ours.parameters())
    narrow = ours.bfloat16()(x.bfloat16())
    assert narrow.dtype == torch.bfloat16 and relative(narrow.float(), exact) < 0.05


def test_fully_sharded_in_mixed_precision(tmp_path):
    """FSDP casts what a module is given: routing weights stay float32, gradients reach everything."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "s"), 1), rank=0, world_size=1
    )
    try:
        theirs, ours = pair(score_before_experts=False)
        x = torch.randn(2, 40, DIM)
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for block in ours.layers.values():
            if block.moe_enabled:
                fully_shard(block.moe.experts, mesh=mesh, mp_policy=policy)
            fully_shard(block, mesh=mesh, mp_policy=policy)
        seen = []
        experts = ours.layers["1"].moe.experts
        experts.register_forward_hook(lambda module, args, output: seen.append(args))
        expected, actual = theirs(x), ours(x)
        ((rows, assignment),) = seen
        assert rows.dtype == torch.bfloat16 and assignment.topk_weights.dtype == torch.float32
        assert relative(actual.float(), expected) < 0.05
        expected.square().sum().backward()
        actual.float().square().sum().backward()
        for (name, mine), host in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            error = (mine.grad.to_local() - host.grad).square().mean().sqrt() / host.grad.square().mean().sqrt()
            assert error < 0.15, f"{name}: {error:.3f}"
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("degree, setting", [("tp", "tensor"), ("ep", "expert"), ("etp", "expert_tensor")])
def test_other_parallelism_is_refused_by_its_setting(degree, setting):
    with pytest.raises(ValueError, match=f"needs {setting}_parallel_degree = 1 in .*, got 2"):
        converted(Model().init(), **{degree: 2})


def test_what_can_not_be_served_is_refused_and_left():
    class Other(MoE):
        pass

    model = Model().init()
    model.layers["2"].moe = Other(MoEArgs(**PLAIN), DIM, HIDDEN)
    with pytest.raises(ValueError, match=r"Model can't be served: layers.2.moe is a Other of GroupedExperts"):
        convert(model)
    assert type(model.layers["1"].moe) is MoE
    with pytest.raises(ValueError, match=r"Linear can't be served: it has no torchtitan.models.moe.MoE"):
        convert(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"converted before: layers.1.moe"):
        convert(converted(Model().init()))
    with pytest.raises(ValueError, match=r"score_func must be 'softmax' or 'sigmoid', got 'tanh'"):
        convert(Model(score_func="tanh"))
    with pytest.raises(ValueError, match=r"num_expert_groups must divide num_experts = 8 into groups .* got 3"):
        convert(Model(num_expert_groups=3, num_limited_groups=1))
    with pytest.raises(ValueError, match="num_limited_groups must be set"):
        convert(Model(num_expert_groups=4))
