"""The experts' names, read and written in the host's two layouts; distributed checkpoints from and to its layers."""

import re

import pytest
import torch

from . import host
from .host import (
    TransformerBlock,
    dist_checkpointing,
    get_gpt_layer_local_spec,
    get_param_id_to_sharded_param_map,
    megatron_core,
)

BIASES = {"add_bias_linear": True}


def names(grouped: bool, bias: bool) -> set[str]:
    """Of the experts' tensors in the host, without what Transformer Engine and its linear layers add."""
    kinds = ("weight", "bias") if bias else ("weight",)
    if grouped:
        return {f"experts.linear_fc{j}.{k}{i}" for j in (1, 2) for k in kinds for i in range(host.EXPERTS)}
    return {f"experts.local_experts.{i}.linear_fc{j}.{k}" for j in (1, 2) for k in kinds for i in range(host.EXPERTS)}


def tensors(layer) -> dict:
    return {name: t for name, t in layer.state_dict().items() if isinstance(t, torch.Tensor)}


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_names_written(grouped, bias):
    layer = host.our_layer(host.config(add_bias_linear=bias))
    layer.config.moe_grouped_gemm = grouped  # the host asks for Transformer Engine when the configuration is made
    state = tensors(layer)
    assert {name for name in state if name.startswith("experts.")} == names(grouped, bias)
    first = "experts.linear_fc1.weight0" if grouped else "experts.local_experts.0.linear_fc1.weight"
    assert torch.equal(state[first], layer.experts.linear_fc1.weight[0])
    assert state[first].data_ptr() == layer.experts.linear_fc1.weight.data_ptr()
    assert not state[first].requires_grad and layer.state_dict(keep_vars=True)[first].requires_grad


@pytest.mark.parametrize("bias", [False, True])
def test_the_hosts_state_dict_both_ways(bias):
    theirs = host.host_layer(host.config(add_bias_linear=bias))
    ours = host.our_layer(host.config(add_bias_linear=bias))
    assert set(ours.state_dict()) == set(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    back = host.host_layer(host.config(add_bias_linear=bias))
    back.load_state_dict(ours.state_dict())
    for name, tensor in tensors(theirs).items():
        assert torch.equal(back.state_dict()[name], tensor), name


@pytest.mark.parametrize("grouped", [False, True])
def test_round_trip_with_other_entries(grouped):
    layer, other = host.our_layer(host.config(**BIASES)), host.our_layer(host.config(**BIASES))
    layer.config.moe_grouped_gemm = grouped
    state = dict(layer.state_dict())
    state["experts.linear_fc1._extra_state"] = torch.empty(0, dtype=torch.uint8)  # Transformer Engine's
    before = dict(state)
    other.load_state_dict(state)
    assert all(torch.equal(p, q) for p, q in zip(layer.parameters(), other.parameters(), strict=True))
    assert state.keys() == before.keys()  # the caller's dict is as it was


def test_stacked_names_are_read():
    layer, other = host.our_layer(host.config()), host.our_layer(host.config())
    other.load_state_dict({name: p.detach() for name, p in layer.named_parameters()})
    assert torch.equal(other.experts.linear_fc2.weight, layer.experts.linear_fc2.weight)


def test_bad_state_dicts():
    layer = host.our_layer(host.config())
    before = [p.clone() for p in layer.parameters()]
    state = dict(layer.state_dict())
    del state["experts.local_experts.3.linear_fc1.weight"]
    with pytest.raises(ValueError, match=re.escape("experts.local_experts.3.linear_fc1.weight is missing")):
        layer.load_state_dict(state)
    state["experts.local_experts.3.linear_fc1.weight"] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=re.escape("must have shape [48, 16], got [2, 2]")):
        layer.load_state_dict(state)
    with pytest.raises(RuntimeError, match="linear_fc1.weight"):
        layer.load_state_dict({n: t for n, t in layer.state_dict().items() if not n.startswith("experts.")})
    assert all(torch.equal(p, q) for p, q in zip(layer.parameters(), before, strict=True))


def block(ours: bool, **changes) -> TransformerBlock:
    spec = get_gpt_layer_local_spec(num_experts=host.EXPERTS)
    model = TransformerBlock(
        config=host.config(**changes), spec=megatron_core.use_fastmoe_cpp(spec) if ours else spec
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


@pytest.mark.parametrize("source, target", [(True, False), (False, True), (True, True)],
                         ids=["ours to the host's", "the host's to ours", "ours to ours"])  # fmt: skip
@pytest.mark.parametrize("changes", [{}, {**BIASES, "gated_linear_unit": False}], ids=["swiglu", "silu and biases"])
def test_distributed_checkpoints(source, target, changes, tmp_path):
    writer, reader = block(source, **changes), block(target, **changes)
    dist_checkpointing.save(writer.sharded_state_dict(), str(tmp_path))
    reader.load_state_dict(dist_checkpointing.load(reader.sharded_state_dict(), str(tmp_path)))
    expected, found = tensors(writer), tensors(reader)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_optimizers_find_our_parameters():
    model = block(True)
    found = get_param_id_to_sharded_param_map(model.sharded_state_dict(), model.parameters())
    assert len(found) == len(list(model.parameters()))


def test_singleton_shards_are_refused():
    with pytest.raises(ValueError, match="singleton_local_shards is not honoured"):
        block(True).sharded_state_dict(metadata={"singleton_local_shards": True})
