"""Trains a byte-level language model with Mixture-of-Experts layers, beside the same model in plain torch.

    python examples/train_text.py                      on Python's standard library: a few minutes on 2 cores
    python examples/train_text.py --data my/folder     on any folder of text
    python examples/train_text.py --device cuda --dtype bf16
    python examples/train_text.py --resume runs/train_text/checkpoint.pt
    torchrun --nproc_per_node=2 examples/train_text.py --expert-parallel 2

Both models start from the same weights and see the same batches, so their loss curves must agree: in float32 that is
checked over the first 100 steps, or up to the one where rounding first decides between two experts for a token, and
the exit status is 1 where they do not. Under torchrun each process holds a part of the experts and takes a part of
every batch, while the first also trains the loop, alone, on all of it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

try:
    import torch
    from text_data import SEPARATOR, BadInput, load_text
    from text_model import generate
    from text_picture import draw
    from text_program import INTERRUPTED, Stop, check_file, make_folder
    from text_ranks import Ranks
    from text_training import (
        AGREEMENT,
        AGREEMENT_STEPS,
        LOOP,
        OURS,
        Learner,
        Settings,
        Training,
        agreement,
        read_checkpoint,
        tokens_per_second,
    )
    from tqdm import tqdm
except ModuleNotFoundError as error:
    sys.exit(f"train_text: {error.name} is not installed; `pip install --no-build-isolation '.[demo]'` installs it")
except ImportError as error:
    sys.exit(f"train_text: {error}")

DEFAULTS = Settings(
    steps=700, seed=0, layers=4, hidden_size=256, heads=4, experts=8, top_k=2, expert_size=256, context=256,
    batch_size=4, learning_rate=1e-3, warmup=100, weight_decay=0.1, balance_loss=0.01, dtype="fp32", eval_every=50,
    compare=True, compile=False, checkpoint_activations=False, deterministic=False,
)  # fmt: skip
GPU_BATCH_SIZE = 64
HELP = {
    "steps": "optimizer steps of each model",
    "seed": "of the weights, the batches and the sample",
    "layers": "blocks of attention and MoE",
    "heads": "attention heads",
    "experts": "experts a layer",
    "top_k": "experts a token",
    "expert_size": "intermediate size of one expert",
    "context": "bytes the model sees at once",
    "batch_size": f"windows of --context bytes a step; on a GPU the default is {GPU_BATCH_SIZE}",
    "learning_rate": "peak, after a linear warm-up; a cosine takes it down to a tenth",
    "warmup": "steps",
    "balance_loss": "coefficient of the loss that keeps experts evenly used; 0 trains without it",
    "dtype": "fp32, or bf16 (autocast; weights and optimizer stay float32)",
    "eval_every": "steps between two looks at the held-out text",
    "compare": "train the plain torch loop beside it",
    "compile": "torch.compile both models",
    "checkpoint_activations": "compute each block's activations again in backward",
    "deterministic": "the same bits every run on a GPU too, slower (on a CPU they are anyway)",
}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", metavar="FOLDER", help="text files to train on (default: Python's standard library)")
    p.add_argument("--device", choices=("cpu", "cuda"), help="(default: cpu)")
    p.add_argument(
        "--expert-parallel", metavar="N", type=int, default=1,
        help="processes (of torchrun) over which the experts are spread (default: 1)",
    )  # fmt: skip
    p.add_argument(
        "--expert-tensor-parallel", metavar="N", type=int, default=1,
        help="processes over which each expert is spread (default: 1)",
    )  # fmt: skip
    p.add_argument("--out", metavar="FOLDER", type=Path, help="for everything written (default: runs/train_text)")
    p.add_argument("--save", metavar="FILE", type=Path, help="the checkpoint (default: checkpoint.pt in --out)")
    p.add_argument("--save-every", metavar="N", type=int, default=100, help="steps between checkpoints (default: 100)")
    p.add_argument("--resume", metavar="FILE", type=Path, help="go on from a checkpoint, with its settings")
    p.add_argument("--stop-at", metavar="STEP", type=int, help="save and stop after this step, as Ctrl-C does")
    p.add_argument("--prompt", default="def ", help="what the sample starts with (default: 'def ')")
    p.add_argument("--sample-bytes", metavar="N", type=int, default=400, help="length of the sample (default: 400)")
    p.add_argument("--temperature", type=float, default=1.0, help="of the sample (default: 1.0)")
    settings = p.add_argument_group("settings of the run (a resumed run has the checkpoint's)")
    for field in fields(Settings):
        default = getattr(DEFAULTS, field.name)
        option, words = f"--{field.name.replace('_', '-')}", HELP.get(field.name, "")
        shown = {True: "yes", False: "no"}.get(default, default) if isinstance(default, bool) else default
        words = f"{words} (default: {shown})".strip()
        if isinstance(default, bool):
            settings.add_argument(option, action=argparse.BooleanOptionalAction, default=None, help=words)
        elif field.name == "dtype":
            settings.add_argument(option, choices=("fp32", "bf16"), help=words)
        else:
            settings.add_argument(option, type=type(default), metavar="N", help=words)
    return p


def resolve(args: argparse.Namespace, state: dict[str, Any] | None) -> Settings:
    """What was asked for, over the checkpoint's settings or the defaults; a checkpoint's can't be changed."""
    asked = {f.name: getattr(args, f.name) for f in fields(Settings) if getattr(args, f.name) is not None}
    if state is None:
        base = replace(DEFAULTS, batch_size=GPU_BATCH_SIZE) if args.device == "cuda" else DEFAULTS
        return replace(base, **asked)
    for name, value in asked.items():
        saved = state["settings"][name]
        if value != saved:
            option = f"--{name.replace('_', '-')}"
            raise BadInput(
                f"--resume: {args.resume} was trained with {option} {saved}, not {value}; leave {option} out"
            )
    return Settings(**state["settings"])


def open_ranks(args: argparse.Namespace, settings: Settings) -> Ranks:
    """The processes of the run, once everything that can be refused before they talk to each other was."""
    n, parts = args.expert_parallel, args.expert_tensor_parallel
    for option, number, of, total in (
        ("--expert-parallel", n, "--experts", settings.experts),
        ("--expert-tensor-parallel", parts, "--expert-size", settings.expert_size),
    ):
        if number < 1 or total % number:
            raise BadInput(f"{option} must divide {of} {total}, got {number}")
        if number > 1 and settings.compile:
            raise BadInput(f"--compile: the exchange between processes can't be compiled; leave it or {option} out")
    processes = int(os.environ.get("WORLD_SIZE", 1)) // parts
    if processes and settings.batch_size % processes:
        raise BadInput(f"--batch-size must be a multiple of the {processes} processes, got {settings.batch_size}")
    return Ranks(args.device, n, parts)


def open_device(name: str, settings: Settings) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: torch sees no GPU here")
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return torch.device(name)


def prepare(args: argparse.Namespace) -> Training:
    """Reads the text and the checkpoint, makes the models, and says in a few lines what will be trained."""
    for name in ("save_every", "stop_at", "sample_bytes"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise BadInput(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not args.temperature > 0:
        raise BadInput(f"--temperature must be above 0, got {args.temperature}")
    try:
        args.prompt.encode()
    except UnicodeEncodeError:
        raise BadInput(f"--prompt must be text in UTF-8, got {args.prompt!r}") from None
    state = read_checkpoint(args.resume) if args.resume else None
    args.device = args.device or (state["device"] if state else "cpu")
    settings = resolve(args, state)
    settings.check()
    device = open_device(args.device, settings)
    args.data = args.data or (state["data"] if state else None)
    text = load_text(args.data, settings.context)
    if state is not None and state["text"] != text.fingerprint:
        raise BadInput(f"--resume: {args.resume} was trained on {state['source']}, and {text.source} holds other text")
    args.out = args.out or (args.resume.parent if args.resume else Path("runs/train_text"))
    args.save = args.save or args.out / "checkpoint.pt"
    ranks = open_ranks(args, settings)
    make_folder("--out", args.out)
    check_file("--save", args.save)

    training = Training(settings, text, device, args.data, ranks)
    s, model = settings, training.learners[0].model
    total = sum(p.numel() for p in model.parameters())
    routed = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    active = total - routed + routed * s.top_k // s.experts
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    skipped = f" ({text.skipped} left out: not text)" if text.skipped else ""
    print(f"text      {text.source}")
    sizes = f"{text.train.numel():,} bytes to train on, {text.held_out.numel():,} held out"
    print(f"          {text.files:,} files{skipped}: {sizes}")
    print(f"model     {s.layers} layers, hidden size {s.hidden_size}, {s.experts} experts, {s.top_k} a token:")
    print(f"          {total:,} parameters, {active:,} active for a byte")
    names = " and ".join(learner.name for learner in training.learners)
    print(f"training  {names}, {s.steps} steps of {s.batch_size} x {s.context} bytes, {s.dtype}, {where},")
    print(f"          balance loss coefficient {s.balance_loss:g}")
    if ranks.size > 1:
        over = f"the experts over {args.expert_parallel}"
        if args.expert_tensor_parallel > 1:
            over += f", each expert over {args.expert_tensor_parallel}"
        print(f"ranks     {ranks.size}, {over}: {model.blocks[0].moe.experts.parallel}")
    if state is not None:
        training.restore(state)
        print(f"resumed   {args.resume} at step {training.done}")
    return training


class Log:
    """Every record of the history as a line of JSON, after the run's settings."""

    def __init__(self, path: Path, training: Training) -> None:
        path = path if training.ranks.main else Path(os.devnull)
        self.file = path.open("w", encoding="utf-8", buffering=1)
        text = training.text
        self.write(
            {
                "kind": "settings", **asdict(training.settings), "device": training.device.type,
                "torch": torch.__version__, "threads": torch.get_num_threads(), "text": text.source,
                "train_bytes": text.train.numel(), "held_out_bytes": text.held_out.numel(),
            }
        )  # fmt: skip
        for record in training.history:
            self.write(record)

    def write(self, record: dict[str, Any]) -> None:
        self.file.write(json.dumps(record) + "\n")


def train(training: Training, args: argparse.Namespace, log: Log) -> bool:
    """Up to the last step, --stop-at or Ctrl-C, and saves; whether it was the last step."""
    s, history, ranks = training.settings, training.history, training.ranks
    started = time.perf_counter()
    bar = tqdm(
        total=s.steps, initial=training.done, unit="step", dynamic_ncols=True,
        disable=not (ranks.main and sys.stderr.isatty()),
        bar_format="{n_fmt}/{total_fmt} |{bar:20}| {elapsed}<{remaining} {postfix}", leave=False,
    )  # fmt: skip
    with Stop(quiet=not ranks.main) as stop, bar:
        if training.done == 0:
            log.write(training.evaluate())
        while training.done < min(s.steps, args.stop_at or s.steps):
            if ranks.any(stop.asked, training.device):
                break
            log.write(training.step())
            bar.update()
            held_out = next(r for r in reversed(history) if r["kind"] == "held_out")[OURS]
            speeds = {one.name: tokens_per_second(history[-25:], s, one.name) for one in training.learners}
            words = ", ".join(f"{name} {speed:,.0f}" for name, speed in speeds.items())
            loss = history[-1][OURS]["bits_per_byte"]
            bar.set_postfix_str(
                f"loss {loss:.3f}, held out {held_out:.3f} bits/byte | tokens/s: {words}", refresh=False
            )
            if training.done % s.eval_every == 0 or training.done == s.steps:
                record = training.evaluate()
                log.write(record)
                passed = time.perf_counter() - started
                tqdm.write(
                    f"step {training.done:5d}  loss {loss:.3f}, held out {record[OURS]:.3f} bits/byte  "
                    f"tokens/s: {words}  {passed // 60:.0f}:{passed % 60:02.0f}"
                )
            if training.done == AGREEMENT_STEPS < s.steps:
                say_agreement(training)
            if training.done % args.save_every == 0 and training.done < s.steps:
                training.save(args.save)
        training.save(args.save)
    return training.done == s.steps


def say_agreement(training: Training) -> bool:
    """Prints how far apart the curves are; False where float32 curves are further apart than allowed."""
    found = agreement(training.history, training.settings.dtype)
    if found is None:
        return True
    words = f"at most {found.largest:.1e} apart (relative, at step {found.at_step}) over the first {found.steps} steps"
    if training.settings.dtype != "fp32":
        tqdm.write(f"loss curves: {words}; bf16 rounds differently, so no bound is set")
        return True
    tqdm.write(f"loss curves {'agree' if found.ok else 'DO NOT AGREE'}: {words}; allowed {AGREEMENT:g}")
    if found.parting is not None:
        tqdm.write(f"they part {found.parting}")
    return found.ok


def report(training: Training, args: argparse.Namespace, log: Log) -> int:
    """The sample, the picture and the figures; the exit status."""
    s, history = training.settings, training.history
    ours: Learner = training.learners[0]
    with ours.autocast():
        sample = generate(
            ours.model, args.prompt.encode(), args.sample_bytes,
            temperature=args.temperature, seed=s.seed, separator=SEPARATOR,
        ).decode(errors="replace")  # fmt: skip
    if not training.ranks.main:
        return 0
    (args.out / "sample.txt").write_text(args.prompt + sample, encoding="utf-8")
    rule = "-" * 88
    print(f"\nWhat the model writes after {args.prompt!r}:\n{rule}\n{args.prompt}{sample}\n{rule}")

    speeds = {learner.name: tokens_per_second(history, s, learner.name) for learner in training.learners}
    evaluations = [r[OURS] for r in history if r["kind"] == "held_out"]
    result = {"kind": "result", "held_out": evaluations[-1], "tokens_per_second": speeds}
    agree = say_agreement(training)
    speed = f"{OURS} {speeds[OURS]:,.0f} tokens/s"
    if LOOP in speeds:
        ratio = speeds[OURS] / speeds[LOOP]
        found = agreement(history, s.dtype)
        result |= {"ratio": ratio, "largest_gap": found.largest, "agree": agree}
        speed += f", {LOOP} {speeds[LOOP]:,.0f}: {ratio:.2f} times as fast (whole training steps, medians, interleaved)"
    print(f"held out: {evaluations[0]:.3f} -> {evaluations[-1]:.3f} bits per byte")
    print(f"speed: {speed}")
    log.write(result)
    title = (
        f"{s.layers} layers, hidden size {s.hidden_size}, {s.experts} experts, top {s.top_k}; {s.dtype} on "
        f"{training.device.type}; {speed.split(' (')[0]}"
    )
    draw(history, s, args.out / "training.png", title)
    for name, path in (
        ("picture", args.out / "training.png"), ("log", args.out / "log.jsonl"),
        ("sample", args.out / "sample.txt"), ("checkpoint", args.save),
    ):  # fmt: skip
        print(f"{name + ':':12}{path}")
    return 0 if agree else 1


def run(args: argparse.Namespace) -> int:
    training = prepare(args)
    log = Log(args.out / "log.jsonl", training)
    status = 0
    if train(training, args, log):
        status = report(training, args, log)
    else:
        print(f"stopped at step {training.done} of {training.settings.steps}; go on with --resume {args.save}")
    training.ranks.close()
    return status


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    sys.stdout.reconfigure(line_buffering=True)
    try:
        return run(args)
    except BadInput as error:
        print(f"train_text: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = args.save is not None and args.save.is_file()
        print(f"train_text: stopped; {f'{args.save} is kept' if kept else 'nothing was saved'}", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
