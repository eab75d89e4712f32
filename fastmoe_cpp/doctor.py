"""``python -m fastmoe_cpp doctor``: what is installed, what it was built for, which paths can be used and why not the
others, and a self-check of each that can."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from . import _extension, reference

#: The oldest compute capability with the matrix instructions of the portable path, and the one of the Hopper path.
PORTABLE_CAPABILITY, HOPPER_CAPABILITY = (8, 0), (9, 0)
#: Largest error against the float64 reference, as a share of its root mean square, that passes for rounding.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class ComputePath:
    """A way the layer can be computed: usable where ``lacks`` is None."""

    name: str
    device: str
    #: (dtype, hidden size, intermediate size) of layers that take this path and no other.
    layers: tuple[tuple[torch.dtype, int, int], ...]
    lacks: str | None


def paths() -> list[ComputePath]:
    """The three paths, each with what it lacks here."""
    return [
        ComputePath("CPU", "cpu", ((torch.float32, 48, 40), (torch.bfloat16, 48, 40)), _extension.load_error),
        ComputePath(
            "CUDA, portable", "cuda", ((torch.float32, 48, 40), (torch.bfloat16, 36, 20)), lacks_for_portable()
        ),
        ComputePath(
            "CUDA, Hopper", "cuda", ((torch.bfloat16, 256, 128), (torch.float16, 256, 128)), lacks_for_hopper()
        ),
    ]


def architectures() -> list[tuple[int, int, str]]:
    """(major, minor, suffix) of every architecture the CUDA half was built for; suffix as in 9.0a, or PTX's '+'."""
    found = []
    for name in str((_extension.build_record() or {}).get("architectures") or "").replace(";", " ").split():
        number = name.removesuffix("+PTX")
        digits = number.rstrip("af")
        major, _, minor = digits.partition(".")
        suffix = "+" if name.endswith("+PTX") else number[len(digits) :]
        found.append((int(major), int(minor), suffix))
    return found


def runs_on(built: list[tuple[int, int, str]], capability: tuple[int, int]) -> bool:
    """Whether code for one of these architectures runs on a GPU: of its major version and no newer, or as PTX."""
    for major, minor, suffix in built:
        exact, older = (major, minor) == capability, (major, minor) <= capability
        if exact or (suffix == "+" and older) or (suffix == "" and major == capability[0] and older):
            return True
    return False


def lacks_for_cuda() -> str | None:
    """What keeps any CUDA kernel from running here, or None."""
    if _extension.load_error is not None:
        return _extension.load_error
    if not (_extension.build_record() or {}).get("cuda"):
        return f"the library was built without CUDA; build it again with: {_extension.REBUILD_WITH_CUDA}"
    if not torch.cuda.is_available():
        return "no GPU is visible to torch"
    return None


def lacks_for_portable() -> str | None:
    """What keeps the portable CUDA path from running on the current GPU, or None."""
    lacks = lacks_for_cuda()
    if lacks is not None:
        return lacks
    capability = torch.cuda.get_device_capability()
    if capability < PORTABLE_CAPABILITY:
        return f"needs compute capability 8.0 or newer, and {torch.cuda.get_device_name()} has {_dotted(capability)}"
    if not runs_on(architectures(), capability):
        built = (_extension.build_record() or {}).get("architectures")
        return (
            f"the library was built for architectures {built}, and {torch.cuda.get_device_name()} is "
            f"{_dotted(capability)}; build it again with: TORCH_CUDA_ARCH_LIST={_dotted(capability)} "
            f"{_extension.REBUILD_WITH_CUDA}"
        )
    return None


def lacks_for_hopper() -> str | None:
    """What keeps the Hopper path from running on the current GPU, or None."""
    lacks = lacks_for_cuda()
    if lacks is not None:
        return lacks
    capability = torch.cuda.get_device_capability()
    if capability != HOPPER_CAPABILITY:
        return f"needs compute capability 9.0, and {torch.cuda.get_device_name()} has {_dotted(capability)}"
    if (9, 0, "a") not in architectures():
        built = (_extension.build_record() or {}).get("architectures")
        return (
            f"the library was built for architectures {built}, without 9.0a; build it again with: "
            f"TORCH_CUDA_ARCH_LIST='8.0;9.0a' {_extension.REBUILD_WITH_CUDA}"
        )
    return None


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def self_check(device: str, dtype: torch.dtype, hidden: int, intermediate: int) -> float:
    """Forward and backward of a small layer on a device, against the plain-torch reference in float64 on the CPU.

    Returns the largest error over the output and every gradient, each as a share of its reference's root mean square.
    """
    from . import MoE, MoEConfig

    config = MoEConfig(hidden, intermediate, num_experts=8, top_k=2, initializer_range=hidden**-0.5)
    random = torch.Generator().manual_seed(0)
    layer = MoE(config, dtype=dtype)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.copy_(torch.randn(weight.shape, generator=random) * hidden**-0.5)
    x = torch.randn(96, hidden, generator=random).to(dtype)
    grad = torch.randn(96, hidden, generator=random).to(dtype)
    exact = {name: weight.detach().double().requires_grad_() for name, weight in layer.named_parameters()}
    exact_x = x.double().requires_grad_()

    layer.to(device)
    given = x.detach().to(device).requires_grad_()
    out = layer.forward_with_routing(given)
    out.hidden_states.backward(grad.to(device))
    # the experts the layer chose: in 16 bits another choice is no error of the kernels
    expected = reference.moe(exact_x, exact, config, topk_ids=out.topk_ids.cpu())
    expected.hidden_states.backward(grad.double())

    pairs = [(out.hidden_states, expected.hidden_states), (given.grad, exact_x.grad)]
    pairs += [(weight.grad, exact[name].grad) for name, weight in layer.named_parameters()]
    worst = 0.0
    for actual, truth in pairs:
        error = (actual.detach().cpu().double() - truth.detach()).abs().max()
        worst = max(worst, float(error / truth.detach().square().mean().sqrt()))
        if not torch.isfinite(error):
            return float("inf")
    return worst


def _lines_of_installation() -> Iterator[str]:
    from . import __version__

    yield f"fastmoe_cpp {__version__} in {Path(__file__).parent}"
    here, built = _extension.running(), _extension.build_record()
    cuda = f"CUDA {here['cuda']}" if here["cuda"] else "a CPU build"
    yield f"  running    Python {here['python']}, torch {here['torch']} ({cuda})"
    if built is None:
        yield "  built for  nothing: there is no build record beside the package"
    else:
        half = f"CUDA {built['cuda']}, architectures {built['architectures']}" if built["cuda"] else "CPU only"
        yield f"  built for  Python {built['python']}, torch {built['torch']} ({half})"
    yield (
        f"  CPU        {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads in torch"
    )
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            yield (
                f"  GPU {i}      {p.name}, compute capability {p.major}.{p.minor}, {p.multi_processor_count} "
                f"multiprocessors, {p.total_memory / 2**30:.0f} GiB"
            )
    else:
        yield "  GPU        none visible"


def main() -> int:
    """Prints the report. 0 where every usable path passed its self-check, 1 where one failed or none is usable."""
    for line in _lines_of_installation():
        print(line)
    print("paths")
    every = paths()
    for path in every:
        print(f"  {path.name:15} {'usable' if path.lacks is None else 'not usable: ' + path.lacks}")
    print("self-checks: a layer's forward and backward against fastmoe_cpp.reference in float64")
    healthy = any(path.lacks is None for path in every)
    if not healthy:
        print("  none: no path is usable")
    for path in every:
        for dtype, hidden, intermediate in path.layers if path.lacks is None else ():
            name = f"  {path.name:15} {str(dtype).removeprefix('torch.'):9}"
            try:
                error = self_check(path.device, dtype, hidden, intermediate)
            except Exception as failure:  # whatever is wrong is what the doctor is asked for
                healthy = False
                print(f"{name} FAILED: {type(failure).__name__}: {str(failure).splitlines()[0]:.200}")
                continue
            passed = error <= TOLERANCE[dtype]
            healthy = healthy and passed
            print(f"{name} {'ok' if passed else 'FAILED'}: error {error:.1e}, allowed {TOLERANCE[dtype]:.0e}")
    return 0 if healthy else 1
