"""One Megatron-LM, a checkout or the stand-in, with a tiny model, for a process that runs checks on it."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastmoe_cpp.fmoe.gates import NaiveGate
from megatron_adapters import get_adapter

HIDDEN, LAYERS, VOCABULARY, LENGTH, BATCH, EXPERTS = 16, 2, 32, 8, 4, 4
_SIZES = (
    f"--num-layers {LAYERS} --hidden-size {HIDDEN} --num-attention-heads 2 --max-position-embeddings {LENGTH} "
    f"--seq-length {LENGTH} --train-iters 20 --lr 0.01 --min-lr 0.01 --clip-grad 1.0 --use-cpu-initialization "
    "--attention-dropout 0 --hidden-dropout 0 --no-bias-gelu-fusion --no-bias-dropout-fusion --init-method-std 0.2"
).split()
_OWN = {
    "2.2": ["--no-scaled-masked-softmax-fusion"],
    "2.5": ["--no-masked-softmax-fusion"],
    "3.0.2": [
        "--no-masked-softmax-fusion",
        "--no-async-tensor-model-parallel-allreduce",
        "--no-gradient-accumulation-fusion",
        "--no-scatter-gather-tensors-in-pipeline",
    ],
}
#: Activation checkpointing of every layer.
RECOMPUTE = {
    "2.2": ["--checkpoint-activations"],
    "2.5": ["--checkpoint-activations"],
    "3.0.2": ["--recompute-granularity", "full", "--recompute-method", "uniform"],
}


class Host:
    """A version of the host and its adapter; ``start`` sets the arguments, ``build`` makes model and optimizer."""

    def __init__(self, version: str) -> None:
        self.version = version
        #: Where the stand-in's model and data are.
        self.device = "cpu"
        self.adapter = get_adapter(version)
        #: Whether it is a checkout.
        self.real = "MEGATRON_STAND_IN" not in os.environ
        self.model: Any = None
        self.optimizer: Any = None
        self.scheduler: Any = None

    @staticmethod
    def module(name: str) -> Any:
        return importlib.import_module(f"megatron.{name}")

    def parse(self, *argv: str, micro_batches: int = 1, batch: int = BATCH) -> Any:
        """The host's own parser with the adapter's arguments; batch samples a step on every data-parallel rank."""
        model_parallel = 1
        for name, value in zip(argv, argv[1:], strict=False):
            if name in ("--tensor-model-parallel-size", "--pipeline-model-parallel-size"):
                model_parallel *= int(value)
        ranks = int(os.environ.get("WORLD_SIZE", "1")) // model_parallel
        sizes = ["--micro-batch-size", str(batch // micro_batches), "--global-batch-size", str(batch * ranks)]
        sys.argv = ["pretrain", *_SIZES, *_OWN[self.version], *sizes, *argv]
        args = self.module("arguments").parse_args(extra_args_provider=self.adapter.add_arguments)
        args.padded_vocab_size = VOCABULARY
        return args

    def start(self, *argv: str, experts: int = EXPERTS, **sizes: int) -> Any:
        """Parses and makes the arguments the host's; groups and random seeds follow them."""
        args = self.parse("--fmoefy", "--fmoe-num-experts", str(experts), *argv, **sizes)
        state = self.module("global_vars")
        state._GLOBAL_ARGS = args
        state._GLOBAL_NUM_MICROBATCHES_CALCULATOR = None
        state._build_num_microbatches_calculator(args)
        state._GLOBAL_TIMERS = state.Timers()
        state._DEVICE = self.device
        self.module("checkpointing")._CHECKPOINT_VERSION = None
        if self.version == "3.0.2":
            args.model_type = self.module("model").ModelType.encoder_or_decoder
        if getattr(state, "_GLOBAL_MEMORY_BUFFER", self) is None:
            state._set_global_memory_buffer()
        mpu, groups = self.module("mpu"), self.module("mpu.initialize")
        for name in vars(groups):
            if name.endswith("_GROUP"):  # the hosts' own destroy_model_parallel forgets some
                setattr(groups, name, None)
        mpu.initialize_model_parallel(args.tensor_model_parallel_size, args.pipeline_model_parallel_size)
        torch.manual_seed(1)
        return args

    def provider(self) -> Callable[..., Any]:
        """The model provider of a script, before it is patched."""
        model = self.module("model").GPTModel
        if self.version == "2.2":

            def model_provider() -> Any:
                mpu, whole = self.module("mpu"), {"num_tokentypes": 0, "parallel_output": True}
                if mpu.get_pipeline_model_parallel_world_size() == 1:
                    return model(**whole)
                package = self.module("model")
                if mpu.is_pipeline_first_stage():
                    return package.GPTModelFirstStage(num_tokentypes=0)
                return package.GPTModelLastStage(**whole)

            return model_provider

        def model_provider(pre_process: bool = True, post_process: bool = True) -> Any:
            return model(num_tokentypes=0, parallel_output=True, pre_process=pre_process, post_process=post_process)

        return model_provider

    def build(self, gate: type | None = None) -> Any:
        """The host's get_model and optimizer over the patched provider; the adapter is installed."""
        training = self.module("training")
        patched = self.adapter.patch_model_provider(self.provider(), gate=gate)
        kind = [self.module("model").ModelType.encoder_or_decoder] if self.version == "3.0.2" else []
        self.model, self.optimizer, self.scheduler = training.setup_model_and_optimizer(patched, *kind)
        return self.model

    def inner(self) -> Any:
        """The model inside its wrappers."""
        model = self.model[0] if isinstance(self.model, list) else self.model
        while hasattr(model, "module"):
            model = model.module
        return model

    def wrapper(self) -> Any:
        """The data-parallel wrapper."""
        return self.model[0] if isinstance(self.model, list) else self.model

    def layers(self) -> list[Any]:
        return self.adapter.moe_layers(self.model)

    # --- a script's forward_step ---

    def forward_step(self) -> Callable[..., Any]:
        """What a pretraining script has, on tokens [B, L + 1] of the iterator."""
        mpu = self.module("mpu")

        def batch(data_iterator: Iterator[Tensor]) -> tuple[Tensor, ...]:
            tokens = next(data_iterator).to(self.device)
            inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
            mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool, device=self.device).triu(1)
            return inputs, labels, torch.arange(LENGTH, device=self.device).expand_as(inputs), mask

        def loss_func(output_tensor: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            loss = output_tensor.float().mean()
            return loss, {"lm loss": loss.detach()}

        def v2_2(data_iterator: Iterator[Tensor], model: Any, input_tensor: Any = None) -> Any:
            inputs, labels, positions, mask = batch(data_iterator)
            if mpu.is_pipeline_first_stage():
                if mpu.is_pipeline_last_stage():
                    return loss_func(model(inputs, positions, mask, labels=labels))
                return model(inputs, positions, mask)
            return loss_func(model(input_tensor, mask, labels=labels))

        def later(data_iterator: Iterator[Tensor], model: Any) -> Any:
            inputs, labels, positions, mask = batch(data_iterator)
            return model(inputs, positions, mask, labels=labels), partial(loss_func)

        return v2_2 if self.version == "2.2" else later

    def data(self, seed: int = 3, samples: int = BATCH) -> Tensor:
        """Tokens [samples, L + 1]."""
        return torch.randint(VOCABULARY, (samples, LENGTH + 1), generator=torch.Generator().manual_seed(seed))

    def gradients_of(self, micro_batches: list[Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """One forward and backward through the host's schedule: gradients by name and what was logged.

        Gradients are as the optimizer finds them: scaled, averaged over data-parallel ranks.
        """
        training, args = self.module("training"), self.module("global_vars").get_args()
        step = self.adapter.patch_forward_step(self.forward_step())
        timers = self.module("global_vars").get_timers()
        if self.version != "2.2" and getattr(self.wrapper(), "use_contiguous_buffers", False):
            self.wrapper().zero_grad_buffer()
        self.optimizer.zero_grad()
        data = iter(micro_batches)
        if self.version == "2.2":
            pipelined = args.pipeline_model_parallel_size > 1
            run = training.forward_backward_pipelining if pipelined else training.forward_backward_no_pipelining
            logged = run(step, data, self.model, self.optimizer, timers)
            self.model.allreduce_params(reduce_after=False, fp32_allreduce=args.fp32_allreduce)
        else:
            run = self.module("schedules").get_forward_backward_func()
            logged = run(step, data, self.model, self.optimizer, timers, forward_only=False)
            self.wrapper().allreduce_gradients()
        found = {}
        for name, parameter in self.inner().named_parameters():
            gradient = getattr(parameter, "main_grad", None) if self.version != "2.2" else parameter.grad
            found[name] = (torch.zeros_like(parameter) if gradient is None else gradient).detach().clone().float()
        return found, logged[-1] if logged else {}

    def train_step(self, micro_batches: list[Tensor]) -> Any:
        """The host's train_step; what it returns."""
        step = self.adapter.patch_forward_step(self.forward_step())
        return self.module("training").train_step(step, iter(micro_batches), self.model, self.optimizer, self.scheduler)


class BalancedGate(NaiveGate):
    """The naive gate with a balance loss: experts * sum over experts of (share of first choices) * (mean of probs)."""

    def forward(self, inp: Tensor, return_all_scores: bool = False) -> tuple[Tensor, ...]:
        ids, scores, probs, _ = self.choose(inp)
        share = torch.bincount(ids[:, 0], minlength=self.tot_expert).to(probs.dtype) / inp.shape[0]
        self.set_loss(self.tot_expert * (share * probs.mean(dim=0)).sum())
        return ids, scores.to(inp.dtype)


def prepare(version: str, source: str) -> None:
    """Puts the host on sys.path: the stand-in, or a checkout with what it needs to run on the CPU."""
    if source == "stand-in":
        os.environ["MEGATRON_STAND_IN"] = version
        sys.path.insert(0, str(Path(__file__).parent / "megatron_stand_in"))
    else:
        import megatron_cpu

        megatron_cpu.prepare(Path(source))


def open_world(backend: str = "gloo") -> None:
    """torch.distributed over a backend, by the environment of the launcher, or alone."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    else:
        dist.init_process_group(backend)
