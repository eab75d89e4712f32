"""Fine-tunes a Hugging Face MoE model on real text, its experts computed by fastmoe_cpp.

    python examples/finetune_transformers.py                        a small Qwen3-MoE on Python's standard library
    python examples/finetune_transformers.py --family gpt_oss --compare    beside the same model with its own experts
    python examples/finetune_transformers.py --model checkpoints/OLMoE-1B-7B --data my/folder --device cuda --dtype bf16
    python examples/finetune_transformers.py --model checkpoints/OLMoE-1B-7B --lora    (needs peft)

Without --model the model is made from a configuration, starts from random weights and reads bytes. With --model its
folder's weights and tokenizer are read. What is saved at the end is what transformers (or, with --lora, peft) saves.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from pathlib import Path
from typing import Any

try:
    import torch
    import torch.nn.functional as F
    import transformers
    from text_data import SEPARATOR, BadInput, Batches, Text, even_windows, load_text
    from text_program import INTERRUPTED, Stop, check_gpu, make_folder
    from torch import Tensor, nn
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from fastmoe_cpp.integrations.transformers import MAJOR, replace_moe_blocks
except ModuleNotFoundError as error:
    sys.exit(f"finetune_transformers: {error.name} is not installed; `pip install {error.name}` installs it")
except ImportError as error:
    sys.exit(f"finetune_transformers: {error}")

SIZES = {
    "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
    "num_experts_per_tok": 2, "vocab_size": 256, "bos_token_id": SEPARATOR, "eos_token_id": SEPARATOR,
    "pad_token_id": SEPARATOR, "router_aux_loss_coef": 0.01, "initializer_range": 0.05,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 128, "head_dim": 32, "norm_topk_prob": True},
    "qwen2_moe": {"num_experts": 8, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128},
    "mixtral": {"num_local_experts": 8, "intermediate_size": 128},
    "olmoe": {"num_experts": 8, "intermediate_size": 128},
    "gpt_oss": {"num_local_experts": 8, "intermediate_size": 128, "head_dim": 32},
    "deepseek_v3": {
        "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 128, "intermediate_size": 256,
        "first_k_dense_replace": 1, "q_lora_rank": 64, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16, "v_head_dim": 32,
    },
}  # fmt: skip
OURS, THEIRS = "fastmoe_cpp", "eager"
HELD_OUT_WINDOWS = 32


class Bytes:
    """A tokenizer whose tokens are bytes, as far as this script needs one."""

    unit = "byte"

    def __call__(self, text: Tensor, args: argparse.Namespace) -> Tensor:
        return text

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i != SEPARATOR).decode(errors="replace")

    def save(self, folder: Path) -> None:
        """Nothing: there is no vocabulary."""


class Tokens:
    """The tokenizer of a checkpoint's folder."""

    unit = "token"

    def __init__(self, folder: str) -> None:
        # without one, the model's type decides what transformers raises, or that it makes one without any words
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
            reads = bool(self.tokenizer("text", add_special_tokens=False)["input_ids"])
        except Exception:
            reads = False
        if not reads:
            raise BadInput(f"--model: {folder} has no tokenizer that transformers can read, such as a tokenizer.json")

    def __call__(self, text: Tensor, args: argparse.Namespace) -> Tensor:
        # which is slow: no more text than the steps can see
        text = text[: 16 * args.steps * args.batch_size * args.context + 2**20]
        files = text.numpy().tobytes().decode(errors="ignore").split(chr(SEPARATOR))
        end = self.tokenizer.eos_token_id
        ids: list[int] = []
        for one in files:
            if one:
                ids += self.tokenizer(one, add_special_tokens=False, verbose=False)["input_ids"]
                ids += [] if end is None else [end]
        return torch.tensor(ids)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", metavar="FOLDER", help="a checkpoint as transformers saves them, with its tokenizer")
    p.add_argument("--family", choices=FAMILIES, default="qwen3_moe", help="of the small model (default: qwen3_moe)")
    p.add_argument("--data", metavar="FOLDER", help="text files to train on (default: Python's standard library)")
    p.add_argument("--lora", action="store_true", help="train low-rank adapters of the experts alone, through peft")
    p.add_argument("--rank", type=int, default=8, metavar="N", help="of the adapters (default: 8)")
    p.add_argument("--compare", action="store_true", help="train the model with its own experts beside it")
    p.add_argument("--steps", type=int, default=200, metavar="N", help="optimizer steps (default: 200)")
    p.add_argument("--batch-size", type=int, default=8, metavar="N", help="windows a step (default: 8)")
    p.add_argument("--context", type=int, default=128, metavar="N", help="bytes or tokens a window (default: 128)")
    p.add_argument(
        "--learning-rate", type=float, metavar="X", help="peak (default: 2e-3; with --model 2e-5, --lora 1e-3)"
    )
    p.add_argument("--eval-every", type=int, default=50, metavar="N", help="steps between two lines (default: 50)")
    p.add_argument("--checkpoint-activations", action="store_true", help="compute each layer again in backward")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    p.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights (default: fp32)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and batches (default: 0)")
    p.add_argument("--prompt", default="def ", help="what the sample starts with (default: 'def ')")
    p.add_argument(
        "--sample", type=int, default=120, metavar="N", help="length of the sample, 0 for none (default: 120)"
    )
    p.add_argument("--out", metavar="FOLDER", type=Path, default=Path("runs/finetune_transformers"),
                   help="for what is saved (default: runs/finetune_transformers)")  # fmt: skip
    return p


def check(args: argparse.Namespace) -> None:
    # of a window of one byte nothing is predicted
    for name, least in (("rank", 1), ("steps", 1), ("batch_size", 1), ("context", 2), ("eval_every", 1)):
        if getattr(args, name) < least:
            raise BadInput(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    if args.sample < 0:
        raise BadInput(f"--sample must be at least 0, got {args.sample}")
    if args.learning_rate is not None and not args.learning_rate > 0:
        raise BadInput(f"--learning-rate must be above 0, got {args.learning_rate}")
    if args.device == "cuda":
        check_gpu()
    if args.model is not None and not Path(args.model, "config.json").is_file():
        raise BadInput(f"--model: {args.model} must be a folder with a config.json, as save_pretrained writes one")
    if args.lora and MAJOR < 5:
        raise BadInput(f"--lora needs transformers 5, found {transformers.__version__}")


def open_model(args: argparse.Namespace) -> tuple[nn.Module, Bytes | Tokens]:
    """The model with its own experts, and its tokenizer."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    if args.model is not None:
        try:
            # first, for it takes a moment and the weights take minutes
            tokenizer: Bytes | Tokens = Tokens(args.model)
            model = AutoModelForCausalLM.from_pretrained(args.model)
        except (OSError, ValueError) as error:
            raise BadInput(f"--model: {str(error).splitlines()[0]}") from None
    else:
        config = AutoConfig.for_model(
            args.family, **SIZES | FAMILIES[args.family], max_position_embeddings=max(args.context, 64)
        )
        torch.manual_seed(args.seed)
        model, tokenizer = AutoModelForCausalLM.from_config(config), Bytes()
    if MAJOR >= 5:
        model.set_experts_implementation("eager")
    model.to(args.device, dtype)
    if args.checkpoint_activations:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model, tokenizer


def with_adapters(model: nn.Module, rank: int) -> nn.Module:
    """peft's model: the weights frozen, and low-rank adapters of every expert's projections."""
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError as error:
        raise BadInput(f"--lora needs {error.name}: `pip install peft` installs it") from None
    from fastmoe_cpp.integrations.transformers.experts import takes_experts

    targets = {
        f"{name.rsplit('.', 1)[-1]}.{weight}"
        for name, module in model.named_modules()
        if takes_experts(module)
        for weight in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    }
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[], target_parameters=sorted(targets))
    model.enable_input_require_grads()
    return get_peft_model(model, config)


def prediction_loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def held_out_bits(model: nn.Module, windows: Tensor, batch_size: int) -> float:
    model.eval()
    losses = [prediction_loss(model(input_ids=ids).logits, ids) * len(ids) for ids in windows.split(batch_size)]
    model.train()
    return float(sum(losses)) / len(windows) / math.log(2)


class Trainer:
    """One model, its optimizer and its losses."""

    def __init__(self, name: str, model: nn.Module, learning_rate: float) -> None:
        self.name, self.model = name, model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.01)
        # transformers adds the balance loss, by the family's coefficient, where it is asked for router logits
        self.asked = {"output_router_logits": True} if hasattr(model.config, "router_aux_loss_coef") else {}
        # of transformers 4 a single expert without tokens would miss the steps that our stacked ones take
        self.zeroed = MAJOR < 5
        for parameter in trained if self.zeroed else []:
            parameter.grad = torch.zeros_like(parameter)
        self.losses: list[Tensor] = []
        self.seconds = 0.0

    def step(self, ids: Tensor, rate: float) -> None:
        begin = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        output = self.model(input_ids=ids, labels=ids, **self.asked)
        self.optimizer.zero_grad(set_to_none=not self.zeroed)
        output.loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(output.loss.detach())
        if ids.is_cuda:
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - begin


def describe(args: argparse.Namespace, text: Text, ids: Tensor, model: nn.Module, unit: str) -> None:
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"text      {text.source}: {text.files:,} files, {ids.numel():,} {unit}s to train on")
    name = args.model or f"{args.family} from a configuration"
    print(f"model     {name} (transformers {transformers.__version__}): {total:,} parameters, {trained:,} trained")
    print(f"training  {args.steps} steps of {args.batch_size} x {args.context} {unit}s, {args.dtype}, {where}")


def fit(
    args: argparse.Namespace, trainers: list[Trainer], ids: Tensor, windows: Tensor, rate: float, stop: Stop
) -> int:
    """Trains up to the last step or Ctrl-C; the number of steps done."""
    batches = Batches(ids, args.batch_size, args.context - 1, args.seed)
    warmup = max(args.steps // 10, 1)
    for step in range(args.steps):
        if step % args.eval_every == 0:
            say_bits(step, trainers, windows, args.batch_size)
        if stop.asked:
            return step
        batch = batches.next().to(args.device)
        factor = min((step + 1) / warmup, 0.1 + 0.9 * (1 - step / args.steps))
        for trainer in trainers:
            trainer.step(batch, rate * factor)
    if not stop.asked:
        say_bits(args.steps, trainers, windows, args.batch_size)
    return args.steps


def say_bits(step: int, trainers: list[Trainer], windows: Tensor, batch_size: int) -> None:
    bits = [held_out_bits(t.model, windows, batch_size) for t in trainers]
    print(f"{step:6}  " + "".join(f"{b:14.4f}" for b in bits), flush=True)


def say_speeds(args: argparse.Namespace, trainers: list[Trainer], unit: str) -> None:
    """How fast each was, and how far apart their losses are."""
    print()
    for trainer in trainers:
        speed = args.steps * args.batch_size * args.context / trainer.seconds
        print(f"{trainer.name:12}{speed:12,.0f} {unit}s a second")
    if args.compare:
        pairs = zip(*(torch.stack(t.losses).tolist() for t in trainers), strict=True)
        print(f"largest relative difference of a loss: {max(abs(a - b) / abs(b) for a, b in pairs):.1e}")


def say_sample(args: argparse.Namespace, model: nn.Module, tokenizer: Bytes | Tokens) -> None:
    prompt = torch.tensor([tokenizer.encode(args.prompt)], device=args.device)
    model.eval()
    sample = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=args.sample, do_sample=False
    )
    print(f"\n{tokenizer.decode(sample[0].tolist())}")


def run(args: argparse.Namespace) -> None:
    check(args)
    text = load_text(args.data, args.context)
    make_folder("--out", args.out)
    theirs, tokenizer = open_model(args)
    if args.lora:
        theirs = with_adapters(theirs, args.rank)
    rate = args.learning_rate or (1e-3 if args.lora else 2e-5 if args.model else 2e-3)
    ours = copy.deepcopy(theirs) if args.compare else theirs
    try:
        replace_moe_blocks(ours.get_base_model() if args.lora else ours)
    except ValueError as error:
        raise BadInput(str(error)) from None
    ids, held_out = tokenizer(text.train, args), tokenizer(text.held_out, args)
    if min(ids.numel(), held_out.numel()) <= args.context + 1:
        raise BadInput(f"--data: too little text for windows of {args.context} {tokenizer.unit}s")
    windows = even_windows(held_out, args.context, HELD_OUT_WINDOWS).to(args.device)
    describe(args, text, ids, ours, tokenizer.unit)

    trainers = [Trainer(OURS, ours, rate)] + ([Trainer(THEIRS, theirs, rate)] if args.compare else [])
    print(f"\nheld-out bits a {tokenizer.unit}:\n  step  " + "".join(f"{t.name:>14}" for t in trainers))
    with Stop() as stop:
        done = fit(args, trainers, ids, windows, rate, stop)
        # before anything that could yet fail
        ours.save_pretrained(args.out)
        tokenizer.save(args.out)
    if stop.asked:
        print(f"stopped after step {done} of {args.steps}; saved {args.out}")
        return
    say_speeds(args, trainers, tokenizer.unit)
    print(f"\nsaved     {args.out}", flush=True)
    if args.sample:
        try:
            say_sample(args, ours, tokenizer)
        except KeyboardInterrupt:
            print("stopped within the sample")


def main(arguments: list[str] | None = None) -> int:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    args = parser().parse_args(arguments)
    try:
        run(args)
    except BadInput as error:
        print(f"finetune_transformers: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"finetune_transformers: stopped before the model was saved in {args.out}", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
