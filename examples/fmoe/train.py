"""A language model written for FastMoE, trained on fastmoe_cpp, on one process or several, on CPU or GPU.

    python examples/fmoe/train.py                               a minute on two cores
    python examples/fmoe/train.py --gate switch
    torchrun --nproc_per_node=2 examples/fmoe/train.py          half of the experts on each process

The two lines marked below are all that differs from a program for FastMoE. At the end the experts of all processes are
written to one file, which one process reads: both have the same loss on held-out text, or the exit status is 1.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import fastmoe_cpp.fmoe

fastmoe_cpp.fmoe.install()  # the first line: from here on `import fmoe` is fastmoe_cpp.fmoe

from fmoe import DistributedGroupedDataParallel, FMoETransformerMLP  # noqa: E402
from fmoe.gates import BaseGate, GShardGate, NaiveGate, NoisyGate, SwitchGate  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from text_data import BadInput, Batches, even_windows, load_text  # noqa: E402
from text_program import INTERRUPTED, Stop, check_file, check_gpu  # noqa: E402

GATES = {"naive": (NaiveGate, 2), "noisy": (NoisyGate, 2), "gshard": (GShardGate, 2), "switch": (SwitchGate, 1)}
HEADS = 4


class Block(nn.Module):
    """Attention, and a Mixture of Experts where the MLP was."""

    def __init__(self, width: int, heads: int, experts: int, gate: str, world_size: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        make_gate, top_k = GATES[gate]
        if gate in ("gshard", "switch"):
            # room for every token in evaluation
            make_gate = partial(make_gate, capacity=(1.2, float(experts)))
        self.mlp = FMoETransformerMLP(
            experts // world_size, width, 2 * width, world_size=world_size, gate=make_gate, top_k=top_k
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, width] to the same."""
        shape = (*x.shape[:2], 3, self.heads, -1)
        q, k, v = self.qkv(self.norms[0](x)).view(shape).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + self.out(seen)
        return x + self.mlp(self.norms[1](x))


class Model(nn.Module):
    """Bytes to the logits of the next one."""

    def __init__(self, args: argparse.Namespace, world_size: int) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, args.width), nn.Embedding(args.context, args.width)
        self.blocks = nn.Sequential(
            *(Block(args.width, HEADS, args.experts, args.gate, world_size) for _ in range(args.layers))
        )
        self.head = nn.Linear(args.width, 256)

    def forward(self, ids: Tensor) -> Tensor:
        """[B, L] int64 to [B, L, 256]."""
        places = torch.arange(ids.shape[1], device=ids.device)
        return self.head(self.blocks(self.bytes(ids) + self.places(places)))


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross entropy of the next byte over windows [B, L + 1]."""
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: nn.Module, windows: Tensor) -> float:
    """The loss without dropping for want of room; GShard's gate draws at random, here from the same numbers."""
    torch.manual_seed(0)
    return loss_of(model.eval(), windows).item()


def balance_loss(model: nn.Module) -> Tensor | float:
    """The sum of what the gates' last pass left."""
    return sum(gate.get_loss().sum() for gate in model.modules() if isinstance(gate, BaseGate))


def train(args: argparse.Namespace, rank: int, world_size: int) -> float:
    """Trains, writes args.save on the first process, and returns the loss on held-out text."""
    device = torch.device("cuda", rank) if args.device == "cuda" else torch.device(args.device)
    text = load_text(args.data, args.context)
    check_file("--save", args.save)
    torch.manual_seed(rank)
    model = Model(args, world_size).to(device)
    # copies the first process's weights to the others; experts are each process's own
    parallel = DistributedGroupedDataParallel(model) if world_size > 1 else model
    batches = Batches(text.train, args.batch_size, args.context, seed=rank)
    held_out = even_windows(text.held_out, args.context, 32).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    recent: list[float] = []
    # what follows the steps is short, and saves: Ctrl-C leads there
    with Stop(quiet=rank != 0) as stop:
        for step in range(1, args.steps + 1):
            loss = loss_of(parallel, batches.next().to(device))
            total = loss + args.balance * balance_loss(model)
            optimizer.zero_grad()
            # a 1 / world_size in the loss and sums instead of means: experts, which see every process's tokens, get
            # the gradient of the mean loss like everything else
            (total / world_size).backward()
            if world_size > 1:
                parallel.allreduce_gradients(no_scale=True)
            optimizer.step()
            recent = [*recent[-19:], loss.item()]
            stopped = stop.asked_on_any_rank(device)
            if rank == 0 and (step % 20 == 0 or step == args.steps or stopped):
                print(f"step {step}: loss {sum(recent) / len(recent):.3f}", flush=True)
            if stopped:
                break
        final = evaluate(model, held_out)
        # the second line: one state dict of all processes' experts
        merged = fastmoe_cpp.fmoe.merged_state_dict(model)
        if rank == 0:
            torch.save(merged, args.save)
    if rank == 0:
        if stopped:
            print(f"stopped after step {step} of {args.steps}; saved {args.save}")
        alone = Model(args, 1).to(device)
        alone.load_state_dict(torch.load(args.save, weights_only=True))
        again = evaluate(alone, held_out)
        print(f"held out: {final:.4f}; of {args.save}, read by one process: {again:.4f}")
        if abs(final - again) > 1e-3:
            sys.exit(f"train: the model read from {args.save} has the loss {again}, and the one written {final}")
    return final


SIZES = {"steps": 200, "experts": 8, "layers": 2, "width": 128, "context": 128, "batch-size": 8}


def check(args: argparse.Namespace, world_size: int) -> None:
    """Raises BadInput, one sentence, for what can't be trained."""
    for name in SIZES:
        value = getattr(args, name.replace("-", "_"))
        if value < 1:
            raise BadInput(f"--{name} must be at least 1, got {value}")
    if args.width % HEADS:
        raise BadInput(f"--width must be a multiple of {HEADS}, the number of heads, got {args.width}")
    top_k = GATES[args.gate][1]
    if args.experts < top_k:
        raise BadInput(f"--experts must be at least the {top_k} a token of --gate {args.gate}, got {args.experts}")
    if args.experts % world_size:
        raise BadInput(f"--experts must be a multiple of the number of processes, {world_size}, got {args.experts}")
    if args.device == "cuda":
        check_gpu()


def main(argv: list[str] | None = None) -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a folder of text, or a file; Python's standard library without it")
    parser.add_argument("--gate", choices=GATES, default="gshard")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--balance", type=float, default=0.01, help="the weight of the gates' loss")
    parser.add_argument("--save", type=Path, default=Path("runs/fmoe/model.pt"))
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args(argv)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = 0
    try:
        check(args, world_size)
        if world_size > 1:
            dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
            rank = dist.get_rank()
        if args.device == "cuda":
            torch.cuda.set_device(rank)
        train(args, rank, world_size)
    except BadInput as error:
        print(f"train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if rank == 0:
            print(f"train: stopped before the model was saved in {args.save} and read again", file=sys.stderr)
        return INTERRUPTED
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
