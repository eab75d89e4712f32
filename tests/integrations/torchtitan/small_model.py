"""A model small enough for a test around TorchTitan's MoE modules, and what every release's are checked for.

A pair is the host's model and the one with our parts, with the same parameters and buffers.
"""

import torch
from torch import nn

DIM = 24


class Block(nn.Module):
    """As much of a transformer block as the hook looks at."""

    def __init__(self, moe):
        super().__init__()
        self.moe_enabled = moe is not None
        if moe is not None:
            self.moe = moe
        self.dense = nn.Linear(DIM, DIM)

    def forward(self, x):
        x = x + self.dense(x)
        return x + self.moe(nn.functional.rms_norm(x, (DIM,))) if self.moe_enabled else x


class Model(nn.Module):
    """A dense block, then one for each of two MoE modules."""

    def __init__(self, first, second):
        super().__init__()
        self.layers = nn.ModuleDict({str(i): Block(moe) for i, moe in enumerate([None, first, second])})

    def forward(self, x):
        for block in self.layers.values():
            x = block(x)
        return x

    @torch.no_grad()
    def draw(self):
        """Random numbers for parameters and buffers, the counts left out."""
        for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
            if "tokens" not in name:
                tensor.copy_(torch.randn(tensor.shape) * 0.2)
        return self


def relative(actual, expected):
    return float((actual - expected).abs().max() / expected.abs().max())


def check_output_gradients_and_counts(pair, counts, counted, x):
    """counts names the modules' buffer, counted is its sum after x."""
    grad = torch.randn(x.shape)
    results = []
    for model in pair:
        mine = x.clone().requires_grad_()
        y = model(mine)
        assert isinstance(y, torch.Tensor) and y.shape == x.shape
        y.backward(grad)
        results.append({"output": y.detach(), "x": mine.grad} | {n: p.grad for n, p in model.named_parameters()})
    assert results[0].keys() == results[1].keys()
    for name, expected in results[0].items():
        assert relative(results[1][name], expected) < 1e-5, name
    for layer in ("1", "2"):
        theirs, ours = (getattr(model.layers[layer].moe, counts) for model in pair)
        assert ours.sum() == counted
        assert torch.equal(ours, theirs)


def check_fifty_steps(pair, optimizer_of, counts, bias, counted):
    """Losses, and after every step of two batches the bias and the counts that the host's own hook leaves.

    counts and bias name the modules' buffers, counted is the sum of the counts before a step.
    """
    # rounding decides a near tie of the routing, and training goes another way from there: these draws have none
    torch.manual_seed(1)
    x, target = torch.randn(4, 2, 16, DIM), torch.randn(4, 2, 16, DIM)
    losses, biases = [], []
    for model in pair:
        optimizer = optimizer_of(model)
        moe = model.layers["2"].moe
        of_model, bias_of_model = [], []
        for step in range(50):
            optimizer.zero_grad()
            for part in range(2):
                batch = (2 * step + part) % 4
                loss = (model(x[batch]) - target[batch]).square().mean()
                loss.backward()
                of_model.append(float(loss))
            assert getattr(moe, counts).sum() == counted
            optimizer.step()
            assert not getattr(moe, counts).any()
            bias_of_model.append(getattr(moe, bias).clone())
        losses.append(of_model)
        biases.append(torch.stack(bias_of_model))
    assert losses[0][-1] < 0.8 * losses[0][1]
    assert max(abs(a - b) / a for a, b in zip(*losses, strict=True)) < 1e-4
    assert (biases[0][-1] - biases[0][0]).abs().max() > 5e-3
    assert (biases[1] - biases[0]).abs().max() < 1e-6


def check_state_dicts(pair, bias):
    """The same names in the same order, loaded both ways."""
    theirs, ours = pair
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(1.5)
        getattr(ours.layers["1"].moe, bias).add_(torch.rand(()))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 7, DIM)
    assert relative(ours(x), theirs(x)) < 3e-6
    ours.load_state_dict(state)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, state[name]), name
