"""The shapes every operator is tested over, pairwise, within what a machine can hold."""

from __future__ import annotations

from support.pairwise import Case, cover
from support.samples import DTYPES

TOKENS = (1, 0, 2, 7, 127, 128, 129, 4096)
SIZES = (1, 7, 8, 64, 129, 896, 2048)
EXPERTS = (1, 2, 8, 60, 128, 255, 257, 512)
TOP_K = (1, 2, 8, "E")

# Largest case, in multiply-adds of one forward pass, weights, and elements of one [T * K, *] tensor. The CPU's budget
# keeps the float64 oracle affordable on two shared cores; the GPU runs the same cases and larger ones.
CPU = {"work": 1.5e7, "weights": 3e6, "rows": 4e6}
CUDA = {"work": 3e10, "weights": 4e7, "rows": 4e7}


def top_k(case: Case) -> int:
    return case["E"] if case["K"] == "E" else case["K"]


def affordable(budget: dict[str, float]):
    def feasible(case: Case) -> bool:
        tokens, experts, k = case["T"], case["E"], top_k(case)
        hidden, inner = case["H"], case["I"]
        pairs = tokens * k
        return (
            k <= experts
            and 3 * min(pairs, max(pairs, 1)) * hidden * inner <= budget["work"]
            and 3 * experts * hidden * inner <= budget["weights"]
            and pairs * max(hidden, 2 * inner, 16) <= budget["rows"]
        )

    return feasible


def experts_cases(budget: dict[str, float], seed: int = 0, **more) -> list[Case]:
    values = {"T": TOKENS, "H": SIZES, "I": SIZES, "E": EXPERTS, "K": TOP_K, "dtype": DTYPES, **more}
    return cover(values, affordable(budget), seed)
