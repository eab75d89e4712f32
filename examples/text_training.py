"""Trains the language model with both kinds of MoE layer side by side, step by step, and keeps what happened."""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from text_data import BadInput, Batches, Text, even_windows
from text_model import NEAR_TIE, LoopMoE, TextModel
from text_ranks import Ranks, spread_model, spread_optimizer, whole
from torch import Tensor

from fastmoe_cpp import MoE, MoEConfig, RouterConfig

OURS, LOOP = "fastmoe_cpp", "torch loop"
FORMAT = "fastmoe_cpp train_text, version 3"
#: The two loss curves must be this close, relative, over that many first steps or up to a Parting (float32).
AGREEMENT, AGREEMENT_STEPS = 1e-4, 100
HELD_OUT_WINDOWS = 32
GRADIENT_CLIP = 1.0
FINAL_LEARNING_RATE = 0.1
#: Steps at a run's start whose times are not counted.
UNTIMED_STEPS = 5


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers of a run, beside the text and the machine."""

    steps: int
    seed: int
    layers: int
    hidden_size: int
    heads: int
    experts: int
    top_k: int
    expert_size: int
    context: int
    batch_size: int
    learning_rate: float
    warmup: int
    weight_decay: float
    balance_loss: float
    dtype: str
    eval_every: int
    compare: bool
    compile: bool
    checkpoint_activations: bool
    deterministic: bool

    def moe(self) -> MoEConfig:
        # renormalised, the weight of a single expert would be a constant 1 and teach the router nothing
        router = RouterConfig(balance_loss_coefficient=self.balance_loss, renormalize=self.top_k > 1)
        return MoEConfig(self.hidden_size, self.expert_size, self.experts, self.top_k, router)

    def check(self) -> None:
        """Raises BadInput, one sentence, for values the model can't have."""
        for name in ("steps", "layers", "heads", "context", "batch_size", "eval_every"):
            if getattr(self, name) < 1:
                raise BadInput(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.hidden_size % (2 * self.heads):
            raise BadInput(
                f"--hidden-size must be a multiple of 2 * --heads = {2 * self.heads}, got {self.hidden_size}"
            )
        rates = self.learning_rate, self.weight_decay
        if not all(map(math.isfinite, rates)) or self.learning_rate <= 0 or self.weight_decay < 0 or self.warmup < 0:
            raise BadInput(
                "--learning-rate must be a finite number above 0, --weight-decay one of at least 0, --warmup at least "
                f"0, got {self.learning_rate}, {self.weight_decay} and {self.warmup}"
            )
        if not 0 <= self.seed < 2**63:
            raise BadInput(f"--seed must be at least 0 and below 2**63, got {self.seed}")
        try:
            self.moe()
        except ValueError as error:
            raise BadInput(str(error)) from None

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then a cosine down to a tenth; step counts from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return self.learning_rate * (
            FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * (1 + math.cos(math.pi * progress)) / 2
        )


def bits(nats: float) -> float:
    return nats / math.log(2)


class Learner:
    """One model, its optimizer, and one step of training. Ours is spread over the ranks, and they over the batch."""

    def __init__(self, name: str, settings: Settings, device: torch.device, ranks: Ranks) -> None:
        self.name, self.settings, self.device, self.ranks = name, settings, device, ranks
        s = settings
        torch.manual_seed(s.seed)
        self.model = TextModel(
            MoE if name == OURS else LoopMoE, s.moe(), layers=s.layers, heads=s.heads, context=s.context,
            checkpoint_activations=s.checkpoint_activations,
        ).to(device)  # fmt: skip
        self.spread = ranks.size > 1 and name == OURS
        if self.spread:
            ranks.parallelize(self.model)
        # the loop's shapes depend on the data, so it can't be one graph
        self.run = torch.compile(self.model, fullgraph=name == OURS) if s.compile else self.model
        # what is spread over ranks and what is not can't be updated by one kernel, so experts are a group of their own
        named = list(self.model.named_parameters())
        experts = [p for n, p in named if ".experts." in n]
        matrices = [p for n, p in named if p.dim() > 1 and ".experts." not in n]
        vectors = [p for _, p in named if p.dim() <= 1]
        groups = [{"params": p, "weight_decay": s.weight_decay} for p in (matrices, experts)]
        groups.append({"params": vectors, "weight_decay": 0.0})
        self.optimizer = torch.optim.AdamW(groups, lr=s.learning_rate, betas=(0.9, 0.99), fused=True)

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.settings.dtype == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def step(self, windows: Tensor, learning_rate: float) -> dict[str, Any]:
        """Trains on windows [B, context + 1]; the loss in bits a byte, the balance loss, the load and the seconds."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.spread:
            windows = self.ranks.share(windows)
        self.wait()
        start = time.perf_counter()
        with self.autocast():
            out = self.run(windows[:, :-1])
            loss = F.cross_entropy(out.logits.flatten(0, 1), windows[:, 1:].flatten())
        (loss + out.aux_loss).backward()
        if self.spread:
            self.ranks.clip(self.model, GRADIENT_CLIP)
        else:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.wait()
        seconds = time.perf_counter() - start
        loss, balance_loss, tokens_per_expert = loss, out.balance_loss, out.tokens_per_expert
        if self.spread:
            loss, balance_loss, tokens_per_expert = self.ranks.total(
                loss / self.ranks.shares, balance_loss / self.ranks.shares, tokens_per_expert
            )
        result = {
            "bits_per_byte": bits(loss.item()),
            "balance_loss": balance_loss.item(),
            "seconds": seconds,
            "tokens_per_expert": tokens_per_expert.tolist(),
        }
        if self.name == LOOP:
            result["near_ties"] = [block.moe.near_ties.item() for block in self.model.blocks]
        return result

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @torch.no_grad()
    def held_out(self, windows: Tensor) -> float:
        """Bits a byte over windows [N, context + 1]."""
        self.model.eval()
        total = torch.zeros((), device=self.device)
        with self.autocast():
            for part in windows.split(self.settings.batch_size):
                # every rank takes part in every exchange, with no window too
                part = self.ranks.share(part) if self.spread else part
                logits = self.model(part[:, :-1]).logits
                total += F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
        self.model.train()
        if self.spread:
            total = self.ranks.total(total)[0]
        return bits(total.item() / windows[:, 1:].numel())


@dataclass(frozen=True)
class Parting:
    """The first step at which the two models' routers choose differently, and the first layer where they do.

    A score within rounding of the next one may go either way, and from then on the two models train on different
    choices: training multiplies the difference until nothing can be said of the curves. So they are compared up to
    here, and here it must be a near tie that was decided.
    """

    step: int
    layer: int
    moved: int  #: tokens that chose another expert, counted by the experts' loads
    near_ties: int  #: tokens of that layer that may

    @property
    def ok(self) -> bool:
        return self.moved <= self.near_ties

    def __str__(self) -> str:
        tokens = f"{self.moved} token{'s' if self.moved > 1 else ''}"
        return (
            f"at step {self.step}: {tokens} of layer {self.layer} chose other experts than the loop's, and there "
            f"{self.near_ties} scored two experts alike to {NEAR_TIE:g}; "
            + ("rounding decided, and training amplifies it" if self.ok else "more than rounding explains")
        )


@dataclass(frozen=True)
class Agreement:
    """How far apart the two loss curves are, relative, over the first steps."""

    steps: int
    largest: float
    at_step: int
    parting: Parting | None = None

    @property
    def ok(self) -> bool:
        # False for a NaN
        return self.largest <= AGREEMENT and (self.parting is None or self.parting.ok)


def relative_gaps(history: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """(step, |ours - loop| / |loop|) of every step both models took."""
    gaps = []
    for record in history:
        if record["kind"] == "step" and LOOP in record:
            ours, loop = record[OURS]["bits_per_byte"], record[LOOP]["bits_per_byte"]
            gaps.append((record["step"], abs(ours - loop) / abs(loop)))
    return gaps


def parting(history: list[dict[str, Any]]) -> Parting | None:
    """Where the models part; None where they never do or only one was trained."""
    for record in history:
        if record["kind"] == "step" and LOOP in record:
            loads = zip(record[OURS]["tokens_per_expert"], record[LOOP]["tokens_per_expert"], strict=True)
            for layer, (ours, loop) in enumerate(loads):
                moved = sum(max(a - b, 0) for a, b in zip(ours, loop, strict=True))
                if moved:
                    return Parting(record["step"], layer, moved, record[LOOP]["near_ties"][layer])
    return None


def agreement(history: list[dict[str, Any]], dtype: str) -> Agreement | None:
    """Over the first AGREEMENT_STEPS steps, in fp32 at most to where the models part; None for one model alone."""
    parts = parting(history) if dtype == "fp32" else None
    if parts is not None and parts.step > AGREEMENT_STEPS:
        parts = None
    last = AGREEMENT_STEPS if parts is None else parts.step
    gaps = [g for g in relative_gaps(history) if g[0] <= last]
    if not gaps:
        return None
    # a NaN is the worst gap of all
    step, largest = max(gaps, key=lambda gap: math.inf if math.isnan(gap[1]) else gap[1])
    return Agreement(len(gaps), largest, step, parts)


def tokens_per_second(history: list[dict[str, Any]], settings: Settings, name: str) -> float:
    """From the median time of a step, the first few left out."""
    seconds = [r[name]["seconds"] for r in history if r["kind"] == "step" and name in r]
    seconds = seconds[UNTIMED_STEPS:] or seconds
    return settings.batch_size * settings.context / statistics.median(seconds)


class Training:
    """Both learners, the order of the data, and the history of the run; all of it goes into a checkpoint."""

    def __init__(self, settings: Settings, text: Text, device: torch.device, data: str | None, ranks: Ranks) -> None:
        self.settings, self.text, self.device, self.data, self.ranks = settings, text, device, data, ranks
        # one rank trains the loop, on the whole batch
        names = [OURS, LOOP] if settings.compare and ranks.main else [OURS]
        self.learners = [Learner(name, settings, device, ranks) for name in names]
        first = whole(self.learners[0].model.state_dict())
        for other in self.learners[1:]:
            other.model.load_state_dict(first)
        self.batches = Batches(text.train, settings.batch_size, settings.context, settings.seed)
        self.windows = even_windows(text.held_out, settings.context, HELD_OUT_WINDOWS).to(device)
        self.done = 0
        self.history: list[dict[str, Any]] = []
        torch.manual_seed(settings.seed)

    def step(self) -> dict[str, Any]:
        """One step of every model on the same batch; who goes first alternates."""
        windows = self.batches.next().to(self.device)
        learning_rate = self.settings.learning_rate_at(self.done)
        order = self.learners if self.done % 2 == 0 else self.learners[::-1]
        results = {learner.name: learner.step(windows, learning_rate) for learner in order}
        self.done += 1
        record = {"kind": "step", "step": self.done, "learning_rate": learning_rate, **results}
        self.history.append(record)
        return record

    def evaluate(self) -> dict[str, Any]:
        record = {"kind": "held_out", "step": self.done}
        record |= {learner.name: learner.held_out(self.windows) for learner in self.learners}
        self.history.append(record)
        return record

    def save(self, path: Path) -> None:
        """Everything that decides the next step; the file appears whole or not at all, for any number of ranks."""
        state = {
            "format": FORMAT,
            "settings": asdict(self.settings),
            "text": self.text.fingerprint,
            "source": self.text.source,
            "data": self.data,
            "device": self.device.type,
            "step": self.done,
            "models": {learner.name: whole(learner.model.state_dict()) for learner in self.learners},
            "optimizers": {learner.name: whole(learner.optimizer.state_dict()) for learner in self.learners},
            "batches": self.batches.state(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "history": json.dumps(self.history),
        }
        if not self.ranks.main:
            return
        part = path.with_name(path.name + ".part")
        torch.save(state, part)
        os.replace(part, path)

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where `state`, which read_checkpoint returned, was saved."""
        for learner in self.learners:
            learner.model.load_state_dict(spread_model(state["models"][learner.name], learner.model))
            learner.optimizer.load_state_dict(spread_optimizer(state["optimizers"][learner.name], learner.optimizer))
        self.batches.restore(state["batches"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        self.done = state["step"]
        self.history = json.loads(state["history"])


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of Training.save, or BadInput."""
    if not path.is_file():
        raise BadInput(f"--resume: there is no file {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file that is not a checkpoint makes the unpickler raise
        raise BadInput(f"--resume: {path} is not a checkpoint ({type(error).__name__})") from None
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT or set(state["settings"]) != {f.name for f in fields(Settings)}:
        raise BadInput(f"--resume: {path} is not a checkpoint of this program ('{FORMAT}'), its format is {found!r}")
    return state
