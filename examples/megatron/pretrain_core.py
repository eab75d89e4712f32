"""Trains a byte-level GPT with Megatron-Core: its model, process groups, gradients and checkpoints, our experts.

    python examples/megatron/pretrain_core.py                               Python's standard library, CPU or GPU
    python examples/megatron/pretrain_core.py --data my/folder --steps 1000
    python examples/megatron/pretrain_core.py --experts-of host             the same with Megatron-Core's own experts
    python examples/megatron/pretrain_core.py --resume                      goes on from the newest checkpoint
    torchrun --nproc_per_node=2 examples/megatron/pretrain_core.py --expert-parallel 2

Needs the packages megatron-core and psutil (requirements/hosts/megatron-core.txt). A checkpoint of any number of
expert-parallel ranks goes on with any other, and with either kind of experts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # the host compiles small functions, for minutes on a CPU

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from text_data import BadInput, Batches, Text, even_windows, load_text  # noqa: E402
from text_program import INTERRUPTED, Stop, check_gpu, make_folder  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.distributed.checkpoint import CheckpointException  # noqa: E402

try:
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core.dist_checkpointing import ShardedObject
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.dist_checkpointing.optimizer import (
        get_param_id_to_sharded_param_map,
        optim_state_to_sharding_state,
    )
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_adapters import megatron_core
except ImportError as error:
    sys.exit(f"pretrain_core: {error}; `pip install megatron-core psutil` installs what it needs beside fastmoe_cpp")

VOCABULARY = 256
#: What the weights of a checkpoint can't be read without.
SHAPE = ("layers", "hidden_size", "heads", "experts", "expert_size")
COUNTS = (
    "steps", *SHAPE, "top_k", "context", "micro_batch_size", "micro_batches", "expert_parallel", "eval_every"
)  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="a folder or file of text; by default Python's standard library")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--expert-size", type=int, default=128)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=2, help="of a step, on each rank")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--aux-loss", type=float, default=1e-2, help="moe_aux_loss_coeff")
    parser.add_argument("--expert-parallel", type=int, default=1, help="ranks the experts are spread over")
    parser.add_argument("--experts-of", choices=("fastmoe_cpp", "host"), default="fastmoe_cpp")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-every", type=int, default=50)
    parser.add_argument("--save", default="runs/pretrain_core", help="the folder of the checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --save")
    return parser.parse_args()


def check(args: argparse.Namespace) -> None:
    """Raises BadInput, one sentence, for what can't be trained; settles the device."""
    for name in COUNTS:
        if getattr(args, name) < 1:
            raise BadInput(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    # rotary embeddings turn pairs of a head's numbers
    if args.hidden_size % (2 * args.heads):
        raise BadInput(f"--hidden-size must be a multiple of 2 * --heads = {2 * args.heads}, got {args.hidden_size}")
    if args.top_k > args.experts:
        raise BadInput(f"--top-k must be at most --experts = {args.experts}, got {args.top_k}")
    if not args.learning_rate > 0 or not args.aux_loss >= 0:
        raise BadInput(
            f"--learning-rate must be above 0 and --aux-loss at least 0, got {args.learning_rate} and {args.aux_loss}"
        )
    n, processes = args.expert_parallel, int(os.environ.get("WORLD_SIZE", 1))
    if args.experts % n:
        raise BadInput(f"--expert-parallel must divide --experts {args.experts}, got {n}")
    if processes % n:
        raise BadInput(
            f"--expert-parallel {n} needs a number of processes N that it divides, and this is one of {processes}: "
            f"torchrun --nproc_per_node=N examples/megatron/pretrain_core.py --expert-parallel {n}"
        )
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda":
        check_gpu()


def newest_checkpoint(args: argparse.Namespace) -> Path:
    """The folder of the checkpoint to go on from, or BadInput: none, part of one, or one of another model."""
    root = Path(args.save)
    if not (root / "newest").is_file():
        raise BadInput(f"--resume: there is no checkpoint in {root}")
    folder = root / (root / "newest").read_text()
    if not (folder / "ranks").is_file():
        raise BadInput(f"--resume: the checkpoint {folder} is not complete")
    # written by newer versions of this script only
    shape = json.loads((folder / "shape.json").read_text()) if (folder / "shape.json").is_file() else {}
    for name, saved in shape.items():
        if getattr(args, name) != saved:
            option = f"--{name.replace('_', '-')}"
            raise BadInput(f"--resume: {folder} was trained with {option} {saved}, not {getattr(args, name)}")
    return folder


def without_gpu() -> None:
    """Megatron-Core asks CUDA for its device, waits for it and forks its generators: on a CPU there is none."""
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.current_stream = lambda *_: None
    CudaRNGStatesTracker.fork = lambda self, name=None: contextlib.nullcontext()


def start_ranks(args: argparse.Namespace) -> torch.device:
    """Megatron-Core's process groups, of torchrun's processes or of this one; this rank's device."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    backend = "nccl" if args.device == "cuda" else "gloo"
    if size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend, rank=rank, world_size=size)
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    else:
        without_gpu()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=args.expert_parallel)
    torch.manual_seed(args.seed)
    if args.device == "cuda":
        tensor_parallel.model_parallel_cuda_manual_seed(args.seed)
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def make_model(args: argparse.Namespace, device: torch.device) -> DistributedDataParallel:
    config = TransformerConfig(
        num_layers=args.layers, hidden_size=args.hidden_size, num_attention_heads=args.heads,
        num_moe_experts=args.experts, moe_router_topk=args.top_k, moe_ffn_hidden_size=args.expert_size,
        moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=args.aux_loss, moe_z_loss_coeff=1e-3,
        moe_token_dispatcher_type="alltoall" if args.expert_parallel > 1 else "allgather",
        expert_model_parallel_size=args.expert_parallel, gated_linear_unit=True, activation_func=F.silu,
        add_bias_linear=False, normalization="RMSNorm", hidden_dropout=0.0, attention_dropout=0.0,
        bias_activation_fusion=False, use_cpu_initialization=True,
        # softmax after the choice of one expert would be a constant 1: Megatron-Core refuses it
        moe_router_pre_softmax=args.top_k == 1,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(num_experts=args.experts, normalization="RMSNorm")
    if args.experts_of == "fastmoe_cpp":
        spec = megatron_core.use_fastmoe_cpp(spec)
    model = GPTModel(
        config=config, transformer_layer_spec=spec, vocab_size=VOCABULARY, max_sequence_length=args.context,
        position_embedding_type="rope", share_embeddings_and_output_weights=False,
    ).to(device)  # fmt: skip
    return DistributedDataParallel(config, DistributedDataParallelConfig(), model)


def loss_of(model: Any, window: Tensor) -> Tensor:
    """The mean loss of windows [B, context + 1]."""
    tokens, labels = window[:, :-1].contiguous(), window[:, 1:].contiguous()
    length = tokens.shape[1]
    positions = torch.arange(length, device=tokens.device).expand_as(tokens)
    mask = torch.triu(torch.ones(1, 1, length, length, dtype=torch.bool, device=tokens.device), 1)
    return model(tokens, positions, mask, labels=labels).float().mean()


def forward_backward(windows: Iterator[Tensor], model: Any, micro_batches: int) -> list[Tensor]:
    """Gradients of a step, over its micro-batches and the ranks. Megatron's own schedules need a GPU."""
    losses = []
    for i in range(micro_batches):
        with contextlib.nullcontext() if i == micro_batches - 1 else model.no_sync():
            loss = loss_of(model, next(windows))
            MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1 / micro_batches, device=loss.device))
            (loss / micro_batches).backward()
        losses.append(loss.detach())
    finalize_model_grads([model])
    return losses


@torch.no_grad()
def evaluate(model: Any, text: Text, args: argparse.Namespace, device: torch.device) -> float:
    """Mean loss of held-out windows."""
    model.eval()
    windows = even_windows(text.held_out, args.context, 32).to(device).split(args.micro_batch_size)
    losses = [loss_of(model, window) * window.shape[0] for window in windows]
    model.train()
    return (torch.stack(losses).sum() / sum(w.shape[0] for w in windows)).item()


def sharded(model: Any, optimizer: torch.optim.Optimizer, step: int, batches: Batches) -> dict[str, Any]:
    """What the distributed checkpoints write and read: the model, AdamW's moments, the place in the text."""
    weights = model.module.sharded_state_dict()
    moments = optimizer.state_dict()
    if not moments["state"]:
        # read before the first step: the shapes of what is to be read
        for group in moments["param_groups"]:
            for i, parameter in zip(group["params"], optimizer.param_groups[0]["params"], strict=True):
                moments["state"][i] = {
                    "step": torch.zeros(()), "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }  # fmt: skip
    found = get_param_id_to_sharded_param_map(weights, (p for g in optimizer.param_groups for p in g["params"]))
    steps = {i: state.pop("step") for i, state in moments["state"].items()}
    optim_state_to_sharding_state(moments, found, exclude_keys="step")
    rank, size = dist.get_rank(), dist.get_world_size()
    place = ShardedObject("place", batches.state(), (size,), (rank,))
    count = int(next(iter(steps.values()))) if steps else 0
    return {"model": weights, "optimizer": moments, "step": step, "optimizer_step": count, "place": place}


def restore(model: Any, optimizer: torch.optim.Optimizer, batches: Batches, folder: Path) -> int:
    """Reads a checkpoint; the number of steps it was made after."""
    wanted = sharded(model, optimizer, 0, batches)
    if (folder / "ranks").read_text() != str(dist.get_world_size()):
        wanted.pop("place")  # other ranks read other places
    try:
        found = dist_checkpointing.load(wanted, str(folder))
    except (CheckpointingException, CheckpointException) as error:
        # torch's holds what every rank raised, with its traceback
        failures = getattr(error, "failures", {0: (error, None)})
        reason = str(next(iter(failures.values()))[0]).strip().splitlines()[0]
        raise BadInput(f"--resume: {folder} can't be read into this model: {reason}") from None
    model.module.load_state_dict(found["model"])
    moments = found["optimizer"]
    for state in moments["state"].values():
        state["step"] = torch.tensor(float(found["optimizer_step"]))
    optimizer.load_state_dict(moments)
    if "place" in found:
        batches.restore(found["place"])
    return found["step"]


def save(model: Any, optimizer: torch.optim.Optimizer, step: int, batches: Batches, args: argparse.Namespace) -> Path:
    root = Path(args.save)
    folder = root / f"step_{step:06d}"
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    dist_checkpointing.save(sharded(model, optimizer, step, batches), str(folder))
    if dist.get_rank() == 0:
        (folder / "shape.json").write_text(json.dumps({name: getattr(args, name) for name in SHAPE}))
        (folder / "ranks").write_text(str(dist.get_world_size()))
        # only now, for it names what can be read
        (root / "newest").write_text(folder.name)
    dist.barrier()
    return folder


def train(args: argparse.Namespace) -> None:
    check(args)
    text = load_text(args.data, args.context)
    found = newest_checkpoint(args) if args.resume else None
    make_folder("--save", Path(args.save))
    device = start_ranks(args)
    say = partial(print, flush=True) if dist.get_rank() == 0 else lambda *_, **__: None
    model = make_model(args, device)
    optimizer = torch.optim.AdamW(model.module.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    batches = Batches(text.train, args.micro_batch_size, args.context, args.seed * 1000 + dist.get_rank())
    done = 0
    if found is not None:
        done = restore(model, optimizer, batches, found)
        say(f"going on after step {done}")
    parameters = sum(p.numel() for p in model.parameters())
    say(f"{text.files} files of {text.source}; {parameters:,} parameters on each of {dist.get_world_size()} rank(s)")
    say(f"experts of {args.experts_of} on {device}; a uniform guess has a loss of {math.log(VOCABULARY):.3f}")
    tokens, begun = 0, time.perf_counter()
    windows = iter(lambda: batches.next().to(device), None)
    with Stop(quiet=dist.get_rank() != 0) as stop:
        for step in range(done + 1, args.steps + 1):
            model.zero_grad_buffer()
            losses = forward_backward(windows, model, args.micro_batches)
            for parameter in model.module.parameters():
                parameter.grad = parameter.main_grad.to(parameter.dtype)  # Megatron's own optimizer needs a GPU
            optimizer.step()
            optimizer.zero_grad()
            tokens += args.micro_batches * args.micro_batch_size * args.context
            stopped = stop.asked_on_any_rank(device)
            if step % 10 == 0 or step == args.steps or stopped:
                loss = sum(loss.item() for loss in losses) / len(losses)
                speed = tokens / (time.perf_counter() - begun)
                say(f"step {step:5d}  loss {loss:.4f}  {speed:,.0f} tokens/s a rank")
            if stopped:
                break
            if step % args.eval_every == 0 or step == args.steps:
                say(f"step {step:5d}  held out {evaluate(model, text, args, device):.4f}")
        if done < args.steps:
            say(f"checkpoint: {save(model, optimizer, step, batches, args)}")
            if step < args.steps:
                say(f"stopped after step {step} of {args.steps}; go on with --resume")
    dist.destroy_process_group()


def main() -> int:
    try:
        train(arguments())
    except BadInput as error:
        print(f"pretrain_core: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if int(os.environ.get("RANK", 0)) == 0:
            print("pretrain_core: stopped before a checkpoint was saved", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
