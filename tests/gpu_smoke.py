"""Every CUDA operator once, forward and backward, at odd sizes and in every type: what the sanitizers run.

compute-sanitizer --tool memcheck python tests/gpu_smoke.py
"""

from __future__ import annotations

import argparse
import itertools

import torch

import fastmoe_cpp
from fastmoe_cpp import MoE, MoEConfig, RouterConfig

ops = torch.ops.fastmoe_cpp
SIZES = [  # T, H, I, E, K: aligned for the fast paths, then odd for the guarded ones
    (70, 64, 32, 4, 2),
    (257, 128, 192, 8, 3),
    (1, 64, 64, 16, 8),
    (4, 520, 264, 8, 3),
    (33, 7, 9, 5, 2),
    (129, 40, 24, 257, 8),
    (0, 64, 64, 4, 2),
]
CARRIED = (8200, 2056, 128, 4, 2)  # so many rows that the sum of their gradients runs beside a weight gradient


def layer(sizes: tuple[int, ...], dtype: torch.dtype, activation: str, **options) -> None:
    T, H, I, E, K = sizes
    torch.manual_seed(0)
    router = RouterConfig(balance_loss_coefficient=0.01, z_loss_coefficient=0.001)
    moe = MoE(MoEConfig(H, I, E, K, router=router, activation=activation, **options)).to("cuda", dtype)
    x = torch.randn(T, H, device="cuda", dtype=dtype, requires_grad=True)
    out = moe.forward_with_routing(x)
    (out.hidden_states.float().sum() + out.aux_loss).backward()
    for p in [x, *moe.parameters()]:
        assert p.grad is not None and torch.isfinite(p.grad).all(), (sizes, dtype, activation)


def stages(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    T, H, I, E, K = sizes
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(T, H, device="cuda", dtype=dtype, requires_grad=True)
    weight = torch.randn(E, I, H, device="cuda", dtype=dtype, requires_grad=True)
    logits = torch.randn(T, E, device="cuda", dtype=wide)
    ops.sinkhorn(logits, 3, 1e-4)
    weights, ids, _ = ops.route(logits, K)
    for policy, capacity in (("position", None), ("position", 2), ("probs", 2)):
        mask = torch.arange(T, device="cuda") % 5 == 4
        plan = ops.dispatch(ids, E, topk_weights=weights, capacity=capacity, drop_policy=policy, padding_mask=mask)[:3]
        rows = ops.gather(x, *plan)
        y = ops.grouped_linear(rows, weight, plan[2], torch.randn(E, I, device="cuda", dtype=dtype))
        ops.combine(y, weights.to(wide).requires_grad_(), *plan).sum().backward()


def crowded(dtype: torch.dtype) -> None:
    """Few tokens that choose one expert again and again: more slots than a matrix-vector pass takes."""
    weight = [torch.randn(3, *shape, device="cuda", dtype=dtype) for shape in ((48, 264), (264, 24))]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for chosen in ([[1] * 5, [1, 2] * 2 + [-1]], [[1] * 5 + [0, -1, 2]]):  # one token's rows are combined by down
        ids = torch.tensor(chosen, device="cuda")
        x = torch.randn(len(ids), 264, device="cuda", dtype=dtype)
        out = ops.experts(x, *weight, torch.rand(*ids.shape, device="cuda", dtype=wide), *ops.dispatch(ids, 3)[:3])
        assert torch.isfinite(out).all()


def decoding(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    T, H, _, E, K = sizes
    x = torch.randn(min(T, 8), H, device="cuda", dtype=dtype)
    for weight_dtype in {dtype, torch.float32}:
        weight, bias = (torch.randn(E, *shape, device="cuda", dtype=weight_dtype) for shape in ((H,), ()))
        logits = ops.route_and_dispatch(x, weight, bias, K, score_function="sigmoid")[0]
        assert torch.equal(logits, ops.router_logits(x, weight, bias)) and torch.isfinite(logits).all()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="bf16 and fp32 alone, for the slower tools")
    parser.add_argument("--small", action="store_true", help="without the largest size")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="the I-th of N parts, from 0")
    args = parser.parse_args()
    part, parts = map(int, args.part.split("/"))
    dtypes = [torch.bfloat16, torch.float32] + ([] if args.quick else [torch.float16, torch.float64])
    mine = SIZES[part::parts]
    for sizes, dtype in itertools.product(mine, dtypes):
        stages(sizes, dtype)
        decoding(sizes, dtype)
        layer(sizes, dtype, "swiglu")
        layer(sizes, dtype, "clamped_swiglu", bias=True, interleaved=True)
        layer(sizes, dtype, "gelu", bias=True, weight_on_input=True)
        layer(sizes, dtype, "swiglu", recompute=True, capacity_factor=1.0)
    if part == parts - 1:
        for dtype in dtypes:
            crowded(dtype)
        if not args.small:
            layer(CARRIED, torch.bfloat16, "swiglu")
    torch.cuda.synchronize()
    print(f"smoke: fastmoe_cpp {fastmoe_cpp.__version__}, {len(mine)} sizes x {len(dtypes)} types ran")


if __name__ == "__main__":
    main()
