"""Load statistics: counts, figures and the picture."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastmoe_cpp import monitor
from modules.cases import EXPERTS, HIDDEN, TOP_K, config, make


def model(device):
    return nn.Sequential(
        make("mixtral", device), nn.Linear(HIDDEN, HIDDEN, device=device).double(), make("deepseek", device)
    )


def test_records_every_layer_a_row_a_step(device):
    net = model(device)
    x = torch.randn(10, HIDDEN, device=device, dtype=torch.float64)
    rows = []
    with monitor.LoadMonitor(net) as load:
        assert list(load.layers) == ["0", "2"]
        for step in range(3):
            expected = torch.zeros(EXPERTS, dtype=torch.int64, device=device)
            for piece in x.split(5 + step):
                expected += net[0].forward_with_routing(piece).tokens_per_expert
            rows.append(expected.cpu())
            load.step()
        counts = load.counts()
    assert torch.equal(counts["0"], torch.stack(rows)) and counts["0"].sum() == 3 * 10 * TOP_K
    assert (counts["2"] == 0).all() and counts["2"].shape == (3, EXPERTS)
    assert net[0].load is None
    net(x)
    assert torch.equal(load.counts()["0"], counts["0"])
    load.clear()
    assert load.counts()["0"].shape == (0, EXPERTS)


def test_evaluation_counts_and_recomputation_does_not(device):
    layer = make("mixtral", device)
    x = torch.randn(6, HIDDEN, device=device, dtype=torch.float64, requires_grad=True)
    load = monitor.LoadMonitor(layer)
    layer.eval()(x)
    load.step()
    checkpoint(layer.train(), x, use_reentrant=False).sum().backward()
    load.step()
    assert load.counts()[""].sum(1).tolist() == [6 * TOP_K] * 2
    load.close()


def test_it_is_not_part_of_the_state(device):
    layer = make("mixtral", device)
    before = set(layer.state_dict())
    with monitor.LoadMonitor(layer):
        assert set(layer.state_dict()) == before


def test_statistics():
    even, one, half, none = [2, 2, 2, 2], [8, 0, 0, 0], [4, 4, 0, 0], [0, 0, 0, 0]
    s = monitor.statistics(torch.tensor([even, one, half, none]))
    assert s.entropy.tolist() == pytest.approx([1, 0, 0.5, 1])
    assert s.max_over_mean.tolist() == [1, 4, 2, 1]
    assert s.fraction[2].tolist() == [0.5, 0.5, 0, 0] and s.fraction.sum(1).tolist() == [1] * 4
    assert monitor.statistics(torch.tensor([[5]])).entropy.tolist() == [1]
    skewed = monitor.statistics(torch.tensor([[1, 3]])).entropy.item()
    assert skewed == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(2))


def test_nobody_watches_a_copy(device):
    layer = make("mixtral", device)
    x = torch.randn(3, HIDDEN, device=device, dtype=torch.float64)
    with monitor.LoadMonitor(layer):
        for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert copied.load is None and layer.load is not None
            assert torch.equal(copied(x), layer(x))
            monitor.LoadMonitor(copied).close()


def test_what_is_refused():
    with pytest.raises(ValueError, match="model must contain at least one MoE layer, Linear has none"):
        monitor.LoadMonitor(nn.Linear(2, 2))
    layer = make(config())
    with monitor.LoadMonitor(layer), pytest.raises(ValueError, match="must not be watched by another LoadMonitor"):
        monitor.LoadMonitor(layer)
    with pytest.raises(ValueError, match="load must hold at least one layer, got none"):
        monitor.heatmap({})


def test_heatmap(tmp_path):
    pytest.importorskip("matplotlib")
    counts = torch.zeros(20, EXPERTS, dtype=torch.int64)
    counts[:, 3] = 8
    statistics = monitor.statistics(counts)
    figure = monitor.heatmap({"first": statistics, "second": statistics}, tmp_path / "load.png", title="Load")
    assert (tmp_path / "load.png").read_bytes()[:4] == b"\x89PNG"
    panels = [a for a in figure.axes if a.images]
    assert [p.get_title() for p in panels] == ["first", "second"]
    shown = panels[0].images[0].get_array()
    assert shown.shape == (EXPERTS, 20) and shown[3, 0] == EXPERTS and shown[0, 0] == 0
    assert monitor.heatmap(statistics).axes


def test_closing_again_leaves_the_next_monitor_alone(device):
    net = model(device)
    first = monitor.LoadMonitor(net)
    first.close()
    second = monitor.LoadMonitor(net)
    with first:
        pass
    with pytest.raises(RuntimeError, match=r"^step\(\) must come before close\(\)"):
        first.step()
    net(torch.randn(3, HIDDEN, device=device, dtype=torch.float64))
    second.step()
    assert second.counts()["0"].sum() == 3 * TOP_K
    second.close()


def test_a_monitor_made_in_inference_mode_watches_training(device):
    layer = make("mixtral", device)
    x = torch.randn(4, HIDDEN, device=device, dtype=torch.float64)
    with torch.inference_mode():
        load = monitor.LoadMonitor(layer)
        layer(x)
    layer(x).sum().backward()
    load.step()
    assert load.counts()[""].sum() == 8 * TOP_K
    load.close()


def test_counts_follow_the_layer(device):
    layer = make("mixtral", "cpu")
    with monitor.LoadMonitor(layer):
        layer.to(device)
        layer(torch.randn(4, HIDDEN, device=device, dtype=torch.float64))
        assert layer.load.device == layer.router.weight.device and layer.load.sum() == 4 * TOP_K
