"""The host's parser: the options that have a part in MoE layers, spelled and stored as each version does."""

import argparse
import os

import torch

from . import VERSION

_INTEGERS = (
    "num-layers", "hidden-size", "num-attention-heads", "max-position-embeddings", "seq-length", "train-iters",
    "micro-batch-size", "global-batch-size", "hysteresis",
)  # fmt: skip
_NUMBERS = ("lr", "min-lr", "attention-dropout", "hidden-dropout", "loss-scale")
_IGNORED = (
    "use-cpu-initialization", "no-bias-gelu-fusion", "no-bias-dropout-fusion", "no-scaled-masked-softmax-fusion",
    "no-masked-softmax-fusion", "no-async-tensor-model-parallel-allreduce", "no-gradient-accumulation-fusion",
    "no-scatter-gather-tensors-in-pipeline",
)  # fmt: skip


def parse_args(extra_args_provider=None, ignore_unknown_args=False):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in _INTEGERS:
        parser.add_argument("--" + name, type=int)
    for name in _NUMBERS:
        parser.add_argument("--" + name, type=float)
    for name in (*_IGNORED, "openai-gelu", "fp16"):
        parser.add_argument("--" + name, action="store_true")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    parser.add_argument("--init-method-std", type=float, default=0.02)
    parser.add_argument("--clip-grad", type=float, default=1.0)
    parser.add_argument("--adam-eps", type=float, default=1e-8)
    parser.add_argument("--initial-loss-scale", type=float, default=2**32)
    parser.add_argument("--DDP-impl", default="local", choices=["local", "torch"])
    parser.add_argument("--save")
    parser.add_argument("--load")
    for name in ("no-save-optim", "no-load-optim", "finetune"):
        parser.add_argument("--" + name, action="store_true", default=None)
    _OF_VERSION[VERSION](parser)
    if extra_args_provider is not None:
        parser = extra_args_provider(parser)
    return _finish(parser.parse_known_args()[0] if ignore_unknown_args else parser.parse_args())


def _v2_2(parser):
    parser.add_argument("--checkpoint-activations", action="store_true", dest="recompute")
    parser.add_argument("--fp32-allreduce", action="store_true")


def _v2_5(parser):
    parser.add_argument("--checkpoint-activations", action="store_true", dest="recompute")
    parser.add_argument("--use-contiguous-buffers-in-ddp", action="store_true")
    _later(parser)


def _v3_0_2(parser):
    parser.add_argument("--recompute-granularity", dest="recompute")
    parser.add_argument("--recompute-method")
    parser.add_argument("--num-experts", type=int, default=None)
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument(
        "--no-contiguous-buffers-in-local-ddp", action="store_false", dest="use_contiguous_buffers_in_local_ddp"
    )
    _later(parser)


def _later(parser):
    for name in ("bf16", "accumulate-allreduce-grads-in-fp32", "log-num-zeros-in-grad"):
        parser.add_argument("--" + name, action="store_true")
    parser.add_argument("--ffn-hidden-size", type=int, default=None)
    parser.add_argument("--num-layers-per-virtual-pipeline-stage", type=int, default=None)


_OF_VERSION = {"2.2": _v2_2, "2.5": _v2_5, "3.0.2": _v3_0_2}


def _finish(args):
    args.rank = int(os.environ.get("RANK", "0"))
    args.world_size = int(os.environ.get("WORLD_SIZE", "1"))
    args.data_parallel_size = args.world_size // (args.tensor_model_parallel_size * args.pipeline_model_parallel_size)
    args.params_dtype = torch.half if args.fp16 else torch.float
    if VERSION != "2.2":
        args.virtual_pipeline_model_parallel_size = None
        args.ffn_hidden_size = args.ffn_hidden_size or 4 * args.hidden_size
        if args.bf16:
            args.params_dtype = torch.bfloat16
            args.accumulate_allreduce_grads_in_fp32 = True
        if VERSION == "2.5" and args.accumulate_allreduce_grads_in_fp32:
            args.use_contiguous_buffers_in_ddp = True
    if VERSION == "3.0.2":
        args.transformer_pipeline_model_parallel_size = args.pipeline_model_parallel_size
    return args
