"""The commands.

``python -m fastmoe_cpp doctor`` and ``python -m fastmoe_cpp bench`` are about this installation;
``python -m fastmoe_cpp convert``, ``python -m fastmoe_cpp inspect`` and ``python -m fastmoe_cpp upcycle`` are about
checkpoints.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import warnings
from pathlib import Path


def bench(arguments: list[str]) -> int:
    """Runs benchmarks/cpu_experts.py of the checkout this package is imported from; with --explain, explain.py."""
    if "--explain" in arguments:
        from . import explain

        return explain.main([argument for argument in arguments if argument != "--explain"])
    script = Path(__file__).resolve().parent.parent / "benchmarks" / "cpu_experts.py"
    if not script.is_file():
        print(
            "fastmoe_cpp bench: the benchmarks are in the source tree and not in an installed package: run this "
            "command in a checkout of the repository",
            file=sys.stderr,
        )
        return 1
    spec = importlib.util.spec_from_file_location("fastmoe_cpp_benchmark", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(script.parent))
    spec.loader.exec_module(module)
    return module.main(arguments, prog="python -m fastmoe_cpp bench") or 0


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m fastmoe_cpp", description="Mixture-of-Experts layers for PyTorch")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser(
        "doctor", help="what is installed, which paths can be used, and a self-check of each; exit code 1 if one fails"
    )
    commands.add_parser(
        "bench",
        help="times the CPU kernels beside plain torch, transformers' blocks and the BLAS bound; with --explain says "
        "which GPU kernels a layer runs with, and why (each has its own --help)",
        add_help=False,
    )
    for command, about in (
        ("convert", "writes a checkpoint in another layout (has its own --help)"),
        ("inspect", "what is in a checkpoint, and what is wrong with it (has its own --help)"),
        ("upcycle", "makes a MoE checkpoint from a dense one (has its own --help)"),
    ):
        commands.add_parser(command, help=about, add_help=False)
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "bench":
        return bench(rest)
    if arguments.command in ("convert", "inspect", "upcycle"):
        from .checkpoint import commands as checkpoint_commands

        return checkpoint_commands.main(arguments.command, rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    from . import doctor

    return doctor.main()


if __name__ == "__main__":
    # the doctor says it in full
    warnings.filterwarnings("ignore", message="fastmoe_cpp's compiled library")
    sys.exit(main())
