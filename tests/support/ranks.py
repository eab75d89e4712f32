"""Processes that are the ranks of one group, by gloo on the CPU or NCCL with a GPU each, for tests that need them."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_device = torch.device("cpu")


def device() -> torch.device:
    """Where this rank's tensors belong: its own GPU under NCCL, else the CPU."""
    return _device


class RankFailed(AssertionError):
    """Some ranks raised, died or did not end in time: what each of them has to say."""


#: Imported once, by the process that the ranks are forks of: it has no threads and no CUDA context.
_PRELOAD = ["support.ranks", "fastmoe_cpp.parallel", "torch.distributed.fsdp"]


def _rank(
    rank: int, world_size: int, backend: str, folder: str, timeout: float, environment: dict[str, str],
    fn: Callable[..., Any], args: tuple,
) -> None:  # fmt: skip
    global _device
    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(environment)
    try:
        if backend == "nccl":
            _device = torch.device("cuda", rank)
            torch.cuda.set_device(_device)
        dist.init_process_group(
            backend, init_method=f"file://{folder}/store", rank=rank, world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )  # fmt: skip
        result = fn(rank, *args)
        torch.save(result, f"{folder}/{rank}.result")
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
        # no destructors: they would wait for ranks that are gone
        os._exit(1)


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120.0,
    backend: str = "gloo",
    grace: float = 5.0,
) -> list[Any]:
    """fn(rank, *args) in world_size new processes that form the default group; their results, in rank order.

    fn is a function of a module's top level, and args can be pickled; results are what torch.save can write. Where a
    rank fails the others are ended `grace` seconds later, at the latest after `timeout` seconds, and RankFailed shows
    every rank's traceback. backend 'nccl' gives each rank the GPU of its number, which is its `device()`.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        ranks = [
            context.Process(
                target=_rank, args=(rank, world_size, backend, folder, timeout, dict(os.environ), fn, args), daemon=True
            )
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        end = time.monotonic() + timeout
        while any(p.is_alive() for p in ranks) and time.monotonic() < end:
            if any(p.exitcode for p in ranks):
                # the others of a failed rank learn of it soon, and what they say belongs to the report
                end = min(end, time.monotonic() + grace)
            for process in ranks:
                process.join(0.05)
        late = [rank for rank, p in enumerate(ranks) if p.is_alive()]
        for process in ranks:
            if process.is_alive():
                process.kill()
            process.join()
        failed = [rank for rank, p in enumerate(ranks) if p.exitcode != 0]
        if failed:
            raise RankFailed("\n".join(_said(folder, rank, ranks[rank].exitcode, rank in late) for rank in failed))
        return [torch.load(f"{folder}/{rank}.result", weights_only=False) for rank in range(world_size)]


def _said(folder: str, rank: int, exit_code: int | None, late: bool) -> str:
    error = Path(folder, f"{rank}.error")
    if error.exists():
        return f"rank {rank} failed:\n{error.read_text()}"
    return f"rank {rank} " + ("did not end in time" if late else f"died with exit code {exit_code}")
