"""The experts at the sizes that the Hopper kernels take: one token to 40,960, every routing distribution, against the
float64 oracle; and the same bits a thousand times while other work comes and goes on the GPU.

Sizes that they don't take are in test_cuda_experts.py. On another GPU the same cases run on the portable kernels.
"""

from __future__ import annotations

import pytest
import torch
from support import matrix, oracle, pairwise
from support.distributions import NAMES
from support.poison import poison
from support.samples import dispatch, experts_inputs, leaves, normal, run_experts

from .test_cuda_experts import check

pytestmark = pytest.mark.cuda

# Odd numbers and their neighbours, few rows an expert and many, ragged tiles and whole ones.
TOKENS = (1, 3, 31, 65, 127, 128, 129, 1023, 4097, 16385, 40959, 40960)
#: Ten ways to spread tokens; rows of NaN are no inputs of a product that is compared with another.
DISTRIBUTIONS = tuple(name for name in NAMES if name != "nan_rows")
# multiples of 8: below a tile, of whole tiles, and past one
HIDDEN = (64, 8, 136, 256, 520, 768, 1536)
INNER = (64, 8, 72, 128, 264, 512)
# multiply-adds of one forward pass, elements of the weights and of one float64 [T * K, *] tensor of the oracle's
BUDGET = {"work": 1.2e11, "weights": 3e7, "rows": 6e7}

CASES = pairwise.cover(
    {
        "T": TOKENS, "distribution": DISTRIBUTIONS, "H": HIDDEN, "I": INNER, "E": (8, 1, 2, 60, 128, 257),
        "K": (2, 1, 4, 8), "dtype": (torch.bfloat16, torch.float16), "activation": oracle.ACTIVATIONS,
        "bias": ("none", "both"), "interleaved": (False, True), "weight_on_input": (False, True),
        "recompute": (False, True),
    },
    matrix.affordable(BUDGET), seed=4, tries=2,
)  # fmt: skip


def test_ten_distributions_meet_every_number_of_tokens():
    assert len(DISTRIBUTIONS) == 10
    met = {(case["T"], case["distribution"]) for case in CASES}
    assert met == {(tokens, name) for tokens in TOKENS for name in DISTRIBUTIONS}


@pytest.mark.parametrize("case", CASES, ids=pairwise.name)
def test_against_oracle(case):
    gated = case["activation"] in oracle.GATED
    interleaved = case["interleaved"] and gated
    inputs = experts_inputs(
        case["T"], case["H"], case["I"], case["E"], matrix.top_k(case), dtype=case["dtype"], device="cuda",
        distribution=case["distribution"], activation=case["activation"], bias=case["bias"], interleaved=interleaved,
    )  # fmt: skip
    poison()
    check(
        inputs, case["dtype"], activation=case["activation"], interleaved=interleaved,
        weight_on_input=case["weight_on_input"], recompute=case["recompute"],
    )  # fmt: skip


# T, H, I, E, K: many rows an expert, few, a ragged shape, and one token
RACES = [(1500, 512, 256, 16, 4), (200, 256, 128, 64, 2), (997, 264, 136, 7, 3), (1, 512, 256, 32, 8)]


class Load:
    """Work of another kind every time, on a stream of its own: products, copies, many small kernels, pauses."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.matrix = torch.randn(1536, 1536, device="cuda", dtype=torch.bfloat16)
        self.memory = torch.empty(2, 2**24, device="cuda")
        self.small = torch.ones(64, device="cuda")

    def start(self, number: int) -> None:
        with torch.cuda.stream(self.stream):
            match number % 5:
                case 0:
                    torch.mm(self.matrix, self.matrix)
                case 1:
                    self.memory[0].copy_(self.memory[1])
                case 2:
                    for _ in range(8):
                        self.small.mul_(1.0)
                case 3:
                    torch.cuda._sleep(20_000 + 997 * (number % 23))
        if number % 7 == 0:  # and a pause on the experts' own stream
            torch.cuda._sleep(5_000 + 131 * (number % 29))
        if number % 64 == 63:  # neither stream runs away from the other
            torch.cuda.current_stream().wait_stream(self.stream)
            self.stream.wait_stream(torch.cuda.current_stream())


@pytest.mark.parametrize("path", ["portable", ""])
@pytest.mark.parametrize("size", RACES, ids=str)
def test_the_same_bits_1000_times_under_load(size, path, monkeypatch):
    monkeypatch.setenv("FASTMOE_CPP_PATH", path)
    inputs = experts_inputs(*size, dtype=torch.bfloat16, device="cuda", distribution="zipf", bias=True)
    cotangent = normal(*inputs["hidden_states"].shape, seed=9, dtype=torch.bfloat16, device="cuda")
    plan = dispatch(inputs["topk_ids"], size[3])
    given = leaves(inputs)
    wanted = [t for t in given.values() if t.is_floating_point()]

    def step(number: int) -> list[torch.Tensor]:
        out = run_experts(given, plan, recompute=number % 2 == 1)
        return [out.detach(), *torch.autograd.grad(out, wanted, cotangent)]

    # recomputed or kept, the bits are the same
    first = [t.clone() for t in step(0)]
    load = Load()
    different = torch.zeros(len(first), dtype=torch.int64, device="cuda")
    for number in range(1000):
        load.start(number)
        different += torch.stack([(a != b).any() for a, b in zip(step(number), first, strict=True)])
    torch.cuda.synchronize()
    assert all(t.isfinite().all() for t in first)
    assert not different.any(), f"of 1000 runs {different.tolist()} differ"
