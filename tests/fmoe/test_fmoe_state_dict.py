"""State dicts of both eras: what FastMoE wrote is read, what it writes today is written."""

import pytest
import torch
from torch import nn

from fastmoe_cpp.fmoe import FMoE, FMoETransformerMLP
from fastmoe_cpp.fmoe.gates import NoisyGate
from fastmoe_cpp.fmoe.transformer import _Expert

E, D, H = 3, 4, 6


class Host(nn.Module):
    """The modules of FastMoE by name, as its versions since 1.0.1 nest them (each) and as those before (stacked)."""

    def __init__(self, each, activation=None):
        super().__init__()

        def linear(n, out, inner):
            module = nn.Module()
            module.weight = nn.Parameter(torch.randn(n, out, inner))
            module.bias = nn.Parameter(torch.randn(n, out))
            return module

        def expert(n):
            module = nn.Module()
            module.htoh4, module.h4toh = linear(n, H, D), linear(n, D, H)
            if isinstance(activation, nn.Module):
                module.activation = activation
            return module

        self.gate = nn.Module()
        self.gate.gate = nn.Linear(D, E)
        self.experts = nn.ModuleList([expert(1) for _ in range(E)]) if each else expert(E)

    def mlp(self, e, x):
        expert, i = (self.experts[e], 0) if isinstance(self.experts, nn.ModuleList) else (self.experts, e)
        h = torch.relu(x @ expert.htoh4.weight[i].T + expert.htoh4.bias[i])
        return h @ expert.h4toh.weight[i].T + expert.h4toh.bias[i]


@pytest.mark.parametrize("each", [True, False])
def test_reads_both_eras(each):
    host, layer = Host(each), FMoETransformerMLP(E, D, H, nn.ReLU())
    assert layer.load_state_dict(host.state_dict()) == ([], [])
    x = torch.randn(9, D)
    ids, scores = layer.gate(x)
    expected = torch.stack([sum(scores[t, k] * host.mlp(int(ids[t, k]), x[t]) for k in range(2)) for t in range(9)])
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.PReLU(init=0.1)])
def test_writes_the_names_of_today(activation):
    layer, host = FMoETransformerMLP(E, D, H, activation), Host(True, activation)
    written = layer.state_dict()
    assert {k: v.shape for k, v in written.items()} == {k: v.shape for k, v in host.state_dict().items()}
    assert list(written) == list(host.state_dict())
    host.load_state_dict(written)
    again = FMoETransformerMLP(E, D, H, nn.PReLU(init=0.1) if isinstance(activation, nn.PReLU) else nn.ReLU())
    again.load_state_dict(host.state_dict())
    for (name, a), b in zip(again.named_parameters(), layer.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_inside_a_model_and_on_disk(tmp_path):
    model = nn.Sequential(nn.Linear(D, D), FMoETransformerMLP(E, D, H), nn.Linear(D, D))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    assert "1.experts.2.h4toh.bias" in saved and saved["1.experts.0.htoh4.weight"].shape == (1, H, D)
    other = nn.Sequential(nn.Linear(D, D), FMoETransformerMLP(E, D, H), nn.Linear(D, D))
    other.load_state_dict(saved)
    x = torch.randn(5, D)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("assign", [True, False])
def test_loading_into_the_meta_device(assign):
    with torch.device("meta"):
        layer = FMoETransformerMLP(E, D, H)
    if not assign:
        layer = layer.to_empty(device="cpu")
    host = Host(True)
    layer.load_state_dict(host.state_dict(), assign=assign)
    assert torch.equal(layer.experts.htoh4.weight[2:], host.experts[2].htoh4.weight)
    assert {n.split(".")[0]: p.dp_comm for n, p in layer.named_parameters()} == {"gate": "gate", "experts": "none"}


def test_what_is_missing_or_left_over_is_named():
    state, layer = Host(True).state_dict(), FMoETransformerMLP(E, D, H)
    before = layer.experts.htoh4.weight.detach().clone()
    del state["experts.1.htoh4.weight"]
    state["experts.3.htoh4.weight"] = torch.zeros(1, H, D)
    result = layer.load_state_dict(state, strict=False)
    assert result.missing_keys == ["experts.1.htoh4.weight"]
    assert result.unexpected_keys == ["experts.3.htoh4.weight"]
    assert torch.equal(layer.experts.htoh4.weight[1], before[1])
    assert torch.equal(layer.experts.htoh4.weight[2:], state["experts.2.htoh4.weight"])
    with pytest.raises(RuntimeError, match=r"Missing key.*experts.1.htoh4.weight") as error:
        layer.load_state_dict(state)
    assert "Unexpected key" in str(error.value) and "experts.3.htoh4.weight" in str(error.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.update({"experts.1.htoh4.weight": torch.zeros(1, H, D + 1)}),
         r"size mismatch for experts.1.htoh4.weight: the checkpoint has \[1, 6, 5\], the layer \[1, 6, 4\]"),
        (lambda s: s.update({"experts.htoh4.weight": torch.zeros(E, H, D)}), "the same weights by two names"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(change, says):
    state = Host(True).state_dict()
    change(state)
    with pytest.raises(RuntimeError, match=says):
        FMoETransformerMLP(E, D, H).load_state_dict(state)


def test_a_shared_activation_must_be_shared():
    state = Host(True, nn.PReLU()).state_dict()
    state["experts.1.activation.weight"] = torch.ones(1)
    with pytest.raises(RuntimeError, match="must be the same for every expert"):
        FMoETransformerMLP(E, D, H, nn.PReLU()).load_state_dict(state)


def test_other_layers_keep_their_names():
    class Stacked(FMoE):
        def __init__(self):
            super().__init__(E, D)
            self.experts = _Expert(E, D, H, torch.relu)

    assert set(Stacked().state_dict()) == set(Host(False).state_dict())
    each = FMoE(E, D, expert=lambda d: nn.Linear(d, d)).state_dict()
    assert each["experts.2.weight"].shape == (D, D)
    noisy = FMoETransformerMLP(E, D, H, gate=NoisyGate).state_dict()
    assert noisy["gate.w_gate"].shape == noisy["gate.w_noise"].shape == (D, E)


def test_one_expert_is_a_part_of_the_layer():
    layer = FMoETransformerMLP(E, D, H, expert_dp_comm="dp")
    layer(torch.randn(5, D)).sum().backward()
    assert len(layer.experts) == len(list(layer.experts)) == E
    one = layer.experts[1]
    assert [tuple(p.shape) for p in one.parameters()] == [(1, H, D), (1, H), (1, D, H), (1, D)]
    assert torch.equal(one.htoh4.weight.grad[0], layer.experts.htoh4.weight.grad[1])
    one.htoh4.weight.fill_(7)
    assert (layer.experts.htoh4.weight[1] == 7).all() and one.htoh4.weight.dp_comm == "dp"
    assert torch.equal(layer.experts[-1].h4toh.bias, layer.experts[2].h4toh.bias)
    with pytest.raises(AttributeError, match="weight is a part of the layer's stacked experts"):
        one.htoh4.weight = nn.Parameter(torch.zeros(1, H, D))
    with pytest.raises(IndexError, match="experts 0 to 2 here, got 3"):
        layer.experts[3]


def test_kept_variables_carry_their_tags():
    layer = FMoETransformerMLP(E, D, H, expert_dp_comm="none")
    state = layer.state_dict(keep_vars=True)
    assert {k.split(".")[0]: v.dp_comm for k, v in state.items()} == {"gate": "gate", "experts": "none"}
