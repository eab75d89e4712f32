"""Whole training steps on a GPU at the sizes that the Hopper kernels take: forward, losses, backward, clipping, the
optimizer and the bias of the selection, without a wait for the device, inside one CUDA graph, compiled as one graph."""

import copy

import pytest
import torch
from support.poison import poison
from torch import nn

from fastmoe_cpp import MoE, MoEConfig, RouterConfig

pytestmark = pytest.mark.cuda

HIDDEN, INNER, EXPERTS, TOKENS = 128, 64, 16, 386
CASES = {
    "mixtral": MoEConfig(HIDDEN, INNER, EXPERTS, top_k=2, router=RouterConfig(balance_loss_coefficient=0.1)),
    "deepseek": MoEConfig(
        HIDDEN, INNER, EXPERTS, top_k=4, shared_intermediate_size=32,
        router=RouterConfig(
            score_function="sigmoid", expert_bias=True, num_groups=4, topk_groups=2, group_score="top2_sum",
            balance_loss="sequence", balance_loss_coefficient=0.01,
        ),
    ),
    "gpt-oss": MoEConfig(
        HIDDEN, INNER, EXPERTS, top_k=4, activation="clamped_swiglu", bias=True, interleaved=True,
        router=RouterConfig(scores_after_topk=True, renormalize=False, bias=True, z_loss_coefficient=0.1),
    ),
    "capacity": MoEConfig(
        HIDDEN, INNER, EXPERTS, top_k=1, activation="relu2", capacity_factor=1.0, drop_policy="probs", recompute=True,
        router=RouterConfig(renormalize=False, balance_loss="switch", balance_loss_coefficient=0.1),
    ),
}  # fmt: skip


class Model(nn.Module):
    """Two MoE layers with residuals."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        factory = {"device": "cuda", "dtype": torch.bfloat16}
        self.layers = nn.ModuleList([MoE(config, **factory) for _ in range(2)])
        with torch.no_grad():
            for parameter in self.layers.parameters():
                parameter.normal_(0, 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x * x.float().square().mean(-1, keepdim=True).rsqrt().to(x.dtype))
        return x


class Training:
    """A model and all that a step needs: the input and the target are memory that a step reads."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True, capturable=True)
        self.x, self.target = torch.randn(2, 2, TOKENS // 2, HIDDEN, device="cuda", dtype=torch.bfloat16)

    def step(self) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = (self.model(self.x) - self.target).float().square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        for layer in self.model.layers:
            layer.update_expert_bias()
        return loss.detach()

    def copy(self) -> "Training":
        other = Training(copy.deepcopy(self.model))
        other.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        return other

    def state(self) -> dict[str, torch.Tensor]:
        return dict(self.model.named_parameters()) | dict(self.model.named_buffers())


@pytest.mark.parametrize("case", CASES)
def test_a_whole_step_does_not_wait_for_the_device(case):
    training = Training(Model(CASES[case]))
    first = training.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            last = training.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert last < first


@pytest.mark.parametrize("case", CASES)
def test_a_whole_step_in_one_graph(case):
    """Replayed on other tokens, which go to other experts: the bits of eager steps, for ten steps."""
    training = Training(Model(CASES[case]))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            training.step()
    torch.cuda.current_stream().wait_stream(side)
    eager = training.copy()
    training.optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = training.step()
    loads = []
    for _ in range(10):
        for mine, theirs in ((training.x, eager.x), (training.target, eager.target)):
            mine.normal_()
            theirs.copy_(mine)
        with torch.no_grad():
            loads.append(eager.model.eval().layers[0].forward_with_routing(eager.x).tokens_per_expert)
        eager.model.train()
        poison()
        graph.replay()
        assert torch.equal(loss, eager.step())
        for name, tensor in eager.state().items():
            assert torch.equal(training.state()[name], tensor), name
    assert not any(torch.equal(a, b) for a, b in zip(loads, loads[1:], strict=False))


@pytest.mark.parametrize("tokens", [1, 2, 17, 256])
@pytest.mark.parametrize("case", CASES)
def test_decoding_in_a_graph(case, tokens):
    model = Model(CASES[case]).eval()
    x = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
        for _ in range(5):
            x.normal_()
            poison()
            graph.replay()
            assert torch.equal(y, model(x)) and y.isfinite().all()


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("case", CASES)
def test_compiled_as_one_graph(case, fresh):
    model = Model(CASES[case])
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    for tokens in (TOKENS, 64):
        x = torch.randn(2, tokens // 2, HIDDEN, device="cuda", dtype=torch.bfloat16)
        results = []
        for each in (model, compiled):
            each.zero_grad()
            given = x.clone().requires_grad_()
            y = each(given)
            y.float().square().mean().backward()
            results.append([y, given.grad, *(p.grad for p in each.parameters())])
        for mine, theirs in zip(*results, strict=True):
            error = (mine.float() - theirs.float()).norm() / theirs.float().norm()
            assert error < 0.02


def test_inductor(fresh, monkeypatch):
    import torch._inductor.config

    # a CXX of two words, such as one with ccache, is not a compiler to inductor
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "g++"))
    layer = MoE(CASES["deepseek"], device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.1)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(2, TOKENS // 2, HIDDEN, device="cuda", dtype=torch.bfloat16)
    results = []
    for each in (layer, compiled):
        layer.zero_grad()
        given = x.clone().requires_grad_()
        y = each(given)
        y.float().square().mean().backward()
        results.append([y, given.grad, *(p.grad.clone() for p in layer.parameters())])
    for mine, theirs in zip(*results, strict=True):
        assert (mine.float() - theirs.float()).norm() <= 0.02 * theirs.float().norm()
