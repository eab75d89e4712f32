"""``python -m fastmoe_cpp bench --explain``: which GPU kernels a layer's products run with, and why. Needs no GPU."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from . import _extension
from .config import ACTIVATIONS

#: T, H, I, E, K: fine-grained experts, Qwen3-30B's layer in training and in decoding, Mixtral's.
SHAPES = (
    (40960, 768, 256, 128, 8), (16384, 2048, 768, 128, 8), (64, 2048, 768, 128, 8), (1, 2048, 768, 128, 8),
    (8192, 4096, 14336, 8, 2),
)  # fmt: skip
DTYPES = ("bfloat16", "float16", "float32", "float64")


class Device(NamedTuple):
    """What the choices know of a GPU."""

    name: str
    capability: int  #: 10 * major + minor
    multiprocessors: int
    shared_bytes: int  #: what a block may ask for


#: For machines without one.
KNOWN = {
    "h100": Device("H100 SXM", 90, 132, 232448),
    "h200": Device("H200 SXM", 90, 132, 232448),
    "a100": Device("A100 SXM", 80, 108, 166912),
}


def shape(text: str) -> tuple[int, ...]:
    """'T,H,I,E,K' to five integers of at least 1 (T also 0), with K at most E; argparse's error otherwise."""
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if len(sizes) != 5 or min(sizes[1:]) < 1 or sizes[0] < 0 or sizes[4] > sizes[3]:
        raise argparse.ArgumentTypeError(
            f"a shape is T,H,I,E,K: tokens, hidden size, intermediate size, experts, experts a token (at most the "
            f"experts), got {text!r}"
        )
    return sizes


def here() -> Device | None:
    """The current GPU, or None."""
    if not torch.cuda.is_available():
        return None
    p = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Device(p.name, 10 * p.major + p.minor, p.multi_processor_count, p.shared_memory_per_block_optin)


def explain(sizes: Sequence[int], dtype: str, activation: str, device: Device) -> list[str]:
    """A line for the path that a layer of T, H, I, E, K takes on device, and one for each of its six products.

    Raises RuntimeError where the library was built without CUDA.
    """
    from . import _C

    function: Any = getattr(_C, "explain_experts", None)
    if function is None:
        raise RuntimeError(
            "fastmoe_cpp was built without its CUDA half, which is what chooses the kernels; build it again with: "
            f"{_extension.REBUILD_WITH_CUDA} (no GPU is needed, a CUDA toolkit is)"
        )
    return function(
        dtype, *sizes, activation, capability=device.capability, multiprocessors=device.multiprocessors,
        shared_bytes=device.shared_bytes, wish=os.environ.get("FASTMOE_CPP_PATH", ""),
    )  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Prints the explanation of every shape; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fastmoe_cpp bench --explain",
        description="Which GPU kernels a layer's products run with, and why. Needs no GPU.",
    )
    parser.add_argument("shapes", nargs="*", type=shape, metavar="T,H,I,E,K", help="some of each kind if none is given")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--activation", default="swiglu", choices=ACTIVATIONS)
    parser.add_argument("--device", choices=tuple(KNOWN), help="the GPU of this machine if not given, else an h100")
    given = parser.parse_args(list(arguments))
    device = KNOWN[given.device] if given.device else here() or KNOWN["h100"]
    try:
        texts = [explain(sizes, given.dtype, given.activation, device) for sizes in given.shapes or SHAPES]
    except (RuntimeError, ValueError) as error:
        print(f"fastmoe_cpp bench --explain: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    print(
        f"{device.name}: compute capability {device.capability // 10}.{device.capability % 10}, "
        f"{device.multiprocessors} multiprocessors, {device.shared_bytes // 1024} KiB of shared memory a block"
        + ("" if given.device or here() else " (no GPU is visible here)")
    )
    for sizes, (path, *products) in zip(given.shapes or SHAPES, texts, strict=True):
        names = ", ".join(f"{name} = {size}" for name, size in zip("THIEK", sizes, strict=True))
        print(f"\n{names}, {given.dtype}, {given.activation}\n  {path}")
        for line in products:
            print(f"    {line}")
    return 0
