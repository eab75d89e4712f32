"""The commands convert, inspect and upcycle of ``python -m fastmoe_cpp``."""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from pathlib import Path

from . import CheckpointError, Conversion, convert, inspect, upcycle
from .convert import DEFAULT_SHARD
from .errors import ArgumentError
from .inspect import to_text
from .layouts import LAYOUTS
from .writer import is_begun

COMMANDS = ("convert", "inspect", "upcycle")
GO_ON = ": the same command goes on from here"
_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "KI": 1024, "MI": 1024**2, "GI": 1024**3}


def size(text: str) -> int:
    """'5GB', '512MiB' or a number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?)?B?", text.strip().upper())
    found = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if found < 1:
        raise argparse.ArgumentTypeError(
            f"a size is a number with KB, MB, GB, KiB, MiB or GiB, of at least 1 byte, got {text!r}"
        )
    return found


def _reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", help="configuration of the source where it has none: config.json of transformers, "
                        "or JSON of MoEConfig's fields")  # fmt: skip
    parser.add_argument(
        "--layout", choices=LAYOUTS, metavar="LAYOUT", help="layout of the source, where it can't be told"
    )


def _writing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-shard-size", type=size, default=DEFAULT_SHARD, metavar="SIZE",
                        help="largest file, such as 5GB (the default) or 512MiB")  # fmt: skip
    parser.add_argument(
        "--restart", action="store_true", help="begin anew instead of going on with a run cut off before"
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (0)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _pickle(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--allow-pickle", action="store_true",
                        help="read .bin and .pt files too, with torch.load(weights_only=True)")  # fmt: skip


def parser_of(command: str) -> argparse.ArgumentParser:
    """The argument parser of one command."""
    layouts = "\n".join(f"  {layout.name:20} {layout.title}" for layout in LAYOUTS.values())
    raw = argparse.RawDescriptionHelpFormatter
    program = f"python -m fastmoe_cpp {command}"
    if command == "convert":
        parser = argparse.ArgumentParser(
            prog=program, formatter_class=raw, epilog=f"layouts:\n{layouts}",
            description="Writes a checkpoint in another layout, in the memory of one expert. The target appears when "
            "it is whole;\nthe same command goes on where a run was cut off.",
        )  # fmt: skip
        parser.add_argument("source", metavar="SRC", help="folder or file of the checkpoint")
        parser.add_argument("target", metavar="DST", help="folder to make")
        parser.add_argument(
            "--to", required=True, choices=LAYOUTS, metavar="LAYOUT", help="layout of the target, see below"
        )
        _reading(parser)
        parser.add_argument("--prefix", help="what names of layer N begin with in DST, such as 'layers.{layer}.'")
        parser.add_argument("--moe-only", action="store_true", help="write the MoE layers alone")
        parser.add_argument("--repair-shared-gate", action="store_true",
                            help="draw anew a shared_expert_gate of shape [0, H] (older mergekit-moe)")  # fmt: skip
        _pickle(parser)
        _writing(parser)
        return parser
    if command == "inspect":
        parser = argparse.ArgumentParser(
            prog=program, formatter_class=raw, epilog=f"layouts:\n{layouts}",
            description="Says what is in a checkpoint, what is wrong with it and how its routers look; exit code 1\n"
            "where something is wrong.",
        )  # fmt: skip
        parser.add_argument("path", metavar="PATH", help="folder or file of the checkpoint")
        parser.add_argument(
            "--values", action="store_true", help="read every weight of the MoE layers and look for NaN"
        )
        parser.add_argument("--json", action="store_true", help="JSON instead of text")
        _reading(parser)
        _pickle(parser)
        return parser
    parser = argparse.ArgumentParser(
        prog=program,
        description="Makes a MoE checkpoint (Mixtral or Qwen2-MoE) from a dense Llama, Mistral or Qwen2 one.",
    )
    parser.add_argument("source", metavar="SRC", help="folder of the dense checkpoint")
    parser.add_argument("target", metavar="DST", help="folder to make")
    parser.add_argument("--num-experts", type=int,
                        help="experts a layer; required for copy and split, merge counts its --expert")  # fmt: skip
    parser.add_argument("--top-k", type=int, default=2, help="experts a token (2)")
    parser.add_argument("--mode", choices=("copy", "split", "merge"), default="copy",
                        help="each expert the dense MLP, a slice of it, or another model's MLP")  # fmt: skip
    parser.add_argument("--granularity", type=int, help="slices an MLP is cut into (split; by default --num-experts)")
    parser.add_argument(
        "--expert", action="append", default=[], metavar="DENSE", help="a dense model of merge, once for each expert"
    )
    targets = [name for name, layout in LAYOUTS.items() if layout.family in ("mixtral", "qwen2_moe")]
    parser.add_argument("--to", choices=targets,
                        help="layout (qwen2_moe for Qwen2, mixtral otherwise)")  # fmt: skip
    parser.add_argument("--router-init", choices=("normal", "zeros"), default="normal")
    parser.add_argument("--router-std", type=float, default=0.02, help="of the normal distribution (0.02)")
    parser.add_argument("--shared-size", type=int, help="features of Qwen2-MoE's shared expert (an expert's)")
    _pickle(parser)
    _writing(parser)
    return parser


def _done(result: Conversion) -> None:
    for note in result.notes:
        print(f"note: {note}")
    resumed = f", {result.resumed_shards} of them from a run before" if result.resumed_shards else ""
    print(
        f"{result.path}: {result.source_layout} -> {result.layout}, {result.layers} MoE layers, "
        f"{result.tensors:,} tensors, {result.nbytes / 2**30:.2f} GiB in {result.shards} files{resumed}"
    )


def _go_on(command: str, arguments: argparse.Namespace) -> str:
    """What can be said of a run that stopped: that it can be gone on with, where there is something to go on with."""
    return GO_ON if command != "inspect" and is_begun(Path(arguments.target)) else ""


def main(command: str, argv: list[str]) -> int:
    """Runs one command; 0, or 1 with one sentence on stderr."""
    a = parser_of(command).parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        if command == "inspect":
            found = inspect(a.path, values=a.values, config=a.config, layout=a.layout, allow_pickle=a.allow_pickle)
            print(json.dumps(found.to_json(), indent=2) if a.json else to_text(found))
            return 1 if found.all_problems else 0
        if command == "convert":
            _done(convert(
                a.source, a.target, a.to, config=a.config, layout=a.layout, prefix=a.prefix, moe_only=a.moe_only,
                allow_pickle=a.allow_pickle, repair_shared_gate=a.repair_shared_gate, seed=a.seed,
                max_shard_size=a.max_shard_size, restart=a.restart, progress=not a.quiet,
            ))  # fmt: skip
        else:
            _done(upcycle(
                a.source, a.target, num_experts=a.num_experts, top_k=a.top_k, mode=a.mode, granularity=a.granularity,
                experts=a.expert, to=a.to, router_init=a.router_init, router_std=a.router_std,
                shared_size=a.shared_size, seed=a.seed, allow_pickle=a.allow_pickle, max_shard_size=a.max_shard_size,
                restart=a.restart, progress=not a.quiet,
            ))  # fmt: skip
    except ArgumentError as error:
        print(f"fastmoe_cpp {command}: {error.as_flags()}", file=sys.stderr)
        return 1
    except (CheckpointError, ImportError) as error:
        print(f"fastmoe_cpp {command}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        # a write to a full disk has no file name
        where = a.path if command == "inspect" else a.target
        name = where if error.filename is None else error.filename
        print(f"fastmoe_cpp {command}: {name}: {error.strerror}{_go_on(command, a)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"fastmoe_cpp {command}: interrupted{_go_on(command, a)}", file=sys.stderr)
        return 130
    return 0
